"""Processes that train under the guard and die at a point of their own choice.

One server imports torch once and forks a trainer for each line on its standard input. A trainer
is given by a JSON object: ``ledger``, ``checkpoint``, ``state``, the members of a plan, how often
it saves, and ``die_at``: at which point it kills itself (0: it does not). A point is reached
before and after each mark, before and after each update, and before and after each save.

Before an update the trainer notes in ``updates`` that it happens: the recount that the ledger
has to stand up to. ``broken`` is the control: it marks the steps since the last save when it
saves, as a script does that keeps its accountant's history in the checkpoint.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from pathlib import Path

import torch
import torch._dynamo  # which optimizers import when they are made: here, and not in each fork
from torch.utils.data import DataLoader, TensorDataset

from accountant import Accountant
from finetune import TrainingPlan, training_run

PLAN = ("noise_multiplier", "sampling_probability", "steps", "expected_batch_size", "max_grad_norm")


def train(task: dict) -> str:
    points = 0

    def point() -> None:
        nonlocal points
        points += 1
        if points == task["die_at"]:
            os.kill(os.getpid(), signal.SIGKILL)

    updates = Path(task["updates"]).open("a", encoding="utf-8")  # noqa: SIM115
    plan = TrainingPlan(**{name: task[name] for name in PLAN})
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    optimizer.register_step_pre_hook(lambda *_: print("u", end="", file=updates, flush=True))
    rows = TensorDataset(torch.randn(task["rows"], 3), torch.randint(0, 2, (task["rows"],)))
    with (
        Accountant.open(task["ledger"]) as accountant,
        training_run(accountant, "b", plan, unit="row", checkpoint=task["checkpoint"]) as run,
    ):
        mark, pending = run.reservation.mark, 0

        def marked() -> None:
            nonlocal pending
            point()
            if task["broken"]:
                run.reservation.marked += 1
                pending += 1
            else:
                mark()
            point()

        run.reservation.mark = marked
        model, optimizer, loader = run.make_private(model, optimizer, DataLoader(rows))
        for number, (features, labels) in enumerate(run.batches(loader), 1):
            torch.nn.functional.cross_entropy(model(features), labels).backward()
            point()
            optimizer.step()
            point()
            optimizer.zero_grad()
            if number % task["save_every"] == 0:
                point()
                run.save()
                if pending:
                    mark(pending)
                    run.reservation.marked -= pending
                    pending = 0
                point()
    return "done"


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for line in sys.stdin:
        trainer = os.fork()
        if trainer == 0:
            task = json.loads(line)
            os.environ["EPSLEDGER_STATE"] = task["state"]
            try:
                said = train(task)
            except Exception as error:  # noqa: BLE001
                said = f"{type(error).__name__}: {error}"
            Path(task["out"]).write_text(said, encoding="utf-8")
            os._exit(0)
        _, status = os.waitpid(trainer, 0)
        print(status, flush=True)


if __name__ == "__main__":
    main()
