"""DP-SGD as Opacus's tutorials do it: nothing keeps a budget, and the epsilon comes at the end."""

import torch
from opacus import PrivacyEngine
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
rows = TensorDataset(torch.randn(2000, 20), torch.randint(0, 2, (2000,)))
loader = DataLoader(rows, batch_size=100)
model = torch.nn.Sequential(torch.nn.Linear(20, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
criterion = torch.nn.CrossEntropyLoss()

engine = PrivacyEngine()
model, optimizer, loader = engine.make_private(
    module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=1.0, max_grad_norm=1.0
)
for features, labels in loader:
    optimizer.zero_grad()
    criterion(model(features), labels).backward()
    optimizer.step()
print("trained")
