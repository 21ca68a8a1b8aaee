"""A tiny network, its runs, and its clipped sums by hand.

With next to no noise the clipped sum of a step can be read off the weights.
"""

from __future__ import annotations

import torch
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch.utils.data import DataLoader

from finetune import TrainingPlan, training_run

ROWS, NOISELESS = 24, 5e-3
MODES = ("hooks", "ghost")


def network():
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))


def plan(**changes):
    values = {
        "noise_multiplier": NOISELESS,
        "sampling_probability": 1.0,
        "steps": 2,
        "expected_batch_size": ROWS,
        "max_grad_norm": 0.5,
    }
    return TrainingPlan(**(values | changes))


def trained(accountant, rows, *, mode="hooks", physical=None, workers=0, manager=False, **changes):
    """Return the weights after a run, and how often it took a batch."""
    model, asked = network(), plan(**changes)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    loader = DataLoader(rows, num_workers=workers)
    taken = 0
    with training_run(accountant, "b", asked, unit="row") as run:
        private, guarded, batches = run.make_private(model, optimizer, loader, mode=mode)
        if manager:
            batches = BatchMemoryManager(
                data_loader=batches, max_physical_batch_size=physical, optimizer=guarded
            ).__enter__()
            physical = None
        for features, labels in run.batches(batches, physical=physical):
            assert physical is None or len(features) <= physical
            torch.nn.functional.cross_entropy(private(features), labels).backward()
            guarded.step()
            guarded.zero_grad()
            taken += 1
        assert run.reservation.marked == asked.steps
    return torch.cat([part.detach().flatten() for part in model.parameters()]), taken


def by_hand(rows, steps=2, max_grad_norm=0.5, lost=()):
    """Return the weights after clipped steps without noise, one row at a time."""
    model = network()
    for _ in range(steps):
        total = [torch.zeros_like(part) for part in model.parameters()]
        for number, (features, label) in enumerate(rows):
            if number in lost:
                continue
            loss = torch.nn.functional.cross_entropy(model(features[None]), label[None])
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            norm = torch.cat([part.flatten() for part in gradients]).norm()
            for summed, gradient in zip(total, gradients, strict=True):
                summed.add_(gradient * min(1.0, max_grad_norm / norm))
        with torch.no_grad():
            for weight, summed in zip(model.parameters(), total, strict=True):
                weight.sub_(summed / ROWS)
    return torch.cat([part.detach().flatten() for part in model.parameters()])


def close(one, other):
    return torch.allclose(one, other, atol=6 * NOISELESS * 0.5 / ROWS * 2)


def run_of(accountant, rows, model, mode="hooks", steps=2):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    context = training_run(accountant, "b", plan(steps=steps), unit="row")
    run = context.__enter__()
    run.entered = context  # or it would be left when nobody holds it
    return run, *run.make_private(model, optimizer, DataLoader(rows), mode=mode), optimizer


def sums_of(guarded):
    """Return a list to which each step adds its clipped sums before noise."""
    sums, add_noise = [], guarded.add_noise

    def noted():
        sums.append([part.summed_grad.clone() for part in guarded.params])
        add_noise()

    guarded.add_noise = noted
    return sums


def untouched(model, before) -> bool:
    return all(map(torch.equal, before, model.parameters()))


def tried(accountant, rows, model, loss):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with training_run(accountant, "b", plan(), unit="row") as run:
        run.make_private(model, optimizer, DataLoader(rows), loss=loss)


def mean_of_rows(model, batch):
    return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])
