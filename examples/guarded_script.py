"""The tutorial of opacus_script.py under guard: five statements differ."""

import torch
from torch.utils.data import DataLoader, TensorDataset

from accountant import Accountant
from finetune import TrainingPlan, training_run

torch.manual_seed(0)
rows = TensorDataset(torch.randn(2000, 20), torch.randint(0, 2, (2000,)))
loader = DataLoader(rows, batch_size=100)
model = torch.nn.Sequential(torch.nn.Linear(20, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
criterion = torch.nn.CrossEntropyLoss()

with training_run(
    Accountant.open("ledger.db", create=False),
    "tickets",
    TrainingPlan.for_units(2000, expected_batch_size=100, noise_multiplier=1.0, epochs=1),
    unit="row",
) as run:
    model, optimizer, loader = run.make_private(model, optimizer, loader)
    for features, labels in run.batches(loader):
        optimizer.zero_grad()
        criterion(model(features), labels).backward()
        optimizer.step()
print("trained")
