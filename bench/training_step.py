"""Time a guarded DP-SGD step beside the same step of bare Opacus, in alternating runs.

Prints the median of the paired ratios. A mark is one durable commit, an absolute time: the smaller
the model, the larger its share. What is gained is that gradients of rows are not copied.
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from opacus import GradSampleModule
from opacus.data_loader import DPDataLoader
from opacus.optimizers import DPOptimizer
from torch.utils.data import DataLoader, TensorDataset

from accountant import Accountant
from dp import adaptive
from finetune import TrainingPlan, training_run

ROWS, BATCH, STEPS, PAIRS = 2_000, 64, 40, 5


def network(width: int) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(128, width), torch.nn.ReLU(), torch.nn.Linear(width, 10)
    )


def update(model: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: list) -> None:
    torch.nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()
    optimizer.zero_grad()


def bare(data: TensorDataset, width: int) -> float:
    model = GradSampleModule(network(width))
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        expected_batch_size=BATCH,
    )
    loader = DPDataLoader(data, sample_rate=BATCH / ROWS)
    start, done = perf_counter(), 0
    while done < STEPS:
        for batch in loader:
            update(model, optimizer, batch)
            done += 1
            if done == STEPS:
                break
    return (perf_counter() - start) / STEPS


def guarded(accountant: Accountant, data: TensorDataset, width: int, mode: str) -> float:
    plan = TrainingPlan.for_units(
        ROWS, expected_batch_size=BATCH, noise_multiplier=1.0, steps=STEPS
    )
    model = network(width)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with training_run(accountant, "bench", plan, unit="row") as run:
        model, optimizer, loader = run.make_private(model, optimizer, DataLoader(data), mode=mode)
        start = perf_counter()
        for batch in run.batches(loader):
            update(model, optimizer, batch)
        return (perf_counter() - start) / STEPS


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    data = TensorDataset(torch.randn(ROWS, 128), torch.randint(0, 10, (ROWS,)))
    with tempfile.TemporaryDirectory() as folder:
        accountant = Accountant.open(Path(folder) / "ledger.db")
        accountant.create_budget("bench", adaptive(1000.0, 1e-6), unit="row")
        print(f"{'parameters':>12} {'mode':>6} {'bare ms':>9} {'guarded ms':>11} {'ratio':>7}")
        for width in (64, 1024, 4096):
            size = sum(p.numel() for p in network(width).parameters())
            for mode in ("hooks", "ghost"):
                pairs = [
                    (bare(data, width), guarded(accountant, data, width, mode))
                    for _ in range(PAIRS)
                ]
                print(
                    f"{size:>12,} {mode:>6}"
                    f" {median(a for a, _ in pairs) * 1e3:>9.2f}"
                    f" {median(b for _, b in pairs) * 1e3:>11.2f}"
                    f" {median(b / a for a, b in pairs):>7.3f}"
                )
        accountant.close()
    print(f"median of {PAIRS} pairs of {STEPS} steps, expected batch {BATCH}, one thread")


if __name__ == "__main__":
    main()
