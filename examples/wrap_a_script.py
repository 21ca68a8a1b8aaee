"""Wrap a DP-SGD script: the four lines that differ from an unguarded one are marked."""

import tempfile
from pathlib import Path

import torch
from torch.utils.data import DataLoader, TensorDataset

from accountant import Accountant
from dp import adaptive
from finetune import TrainingPlan, training_run

folder = Path(tempfile.mkdtemp())
accountant = Accountant.open(folder / "ledger.db")
accountant.create_budget("tickets", adaptive(3.0, 1e-6), unit="ticket", units=10_000)

rows = TensorDataset(torch.randn(10_000, 20), torch.randint(0, 2, (10_000,)))
model = torch.nn.Linear(20, 2)
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
loader = DataLoader(rows)

plan = TrainingPlan.for_units(10_000, expected_batch_size=100, noise_multiplier=1.0, steps=50)
with training_run(accountant, "tickets", plan, unit="ticket") as run:  # priced, or refused
    model, optimizer, loader = run.make_private(model, optimizer, loader)
    for features, labels in run.batches(loader):  # each batch is marked in the ledger first
        torch.nn.functional.cross_entropy(model(features), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

print(f"{accountant.statement('tickets').share:.0%} of the limits used")
