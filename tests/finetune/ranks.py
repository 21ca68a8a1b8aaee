"""The ranks of distributed runs, each a process of its own: JSON objects say what they do."""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed
from torch.utils.data import DataLoader, TensorDataset

from accountant import Accountant
from finetune import TrainingPlan, training_run


def train(task: dict) -> dict:
    rank, torn = task["rank"], task["tear"]
    torch.manual_seed(rank)  # different weights: the run gives all those of rank 0
    model = torch.nn.Linear(5, 60)
    generator = torch.Generator().manual_seed(7)
    rows = TensorDataset(
        torch.randn(24, 5, generator=generator),
        torch.randint(0, 3, (24,), generator=generator),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    plan = TrainingPlan(**task["plan"])
    steps, started = 0, time.monotonic()
    with Accountant.open(task["ledger"]) as accountant:
        said = "done"
        try:
            with training_run(
                accountant, "b", plan, unit="row", checkpoint=task["checkpoint"]
            ) as run:
                model_, guarded, loader = run.make_private(model, optimizer, DataLoader(rows))
                start = model.weight.detach().clone()
                for features, labels in run.batches(loader, physical=5):
                    if torn == "adopted" and rank == 0 and run.reservation.marked == 2:
                        with Accountant.open(task["ledger"]) as other:  # shuts this one out
                            other.adopt(run.reservation.holds, plan.event)
                    torch.nn.functional.cross_entropy(model_(features), labels).backward()
                    if torn == "loud" and rank == 1:
                        guarded.noise_multiplier = 0.1
                    guarded.step()
                    guarded.zero_grad()
                    steps += 1
                if task["checkpoint"]:
                    run.save()
                    _ = 1 / (torn != "interrupted")
        except BaseException as error:  # noqa: BLE001
            said = f"{type(error).__name__}: {error}"
    return {
        "said": said,
        "parts": steps,
        "seconds": time.monotonic() - started,
        "weights": model.weight.detach().flatten().tolist(),
        "start": start.flatten().tolist() if said == "done" else [],
    }


def one(task: dict) -> None:
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{task['meet']}",
        rank=task["rank"],
        world_size=task["ranks"],
        timeout=timedelta(seconds=60),
    )
    os.environ["EPSLEDGER_STATE"] = task["state"]
    Path(task["out"]).write_text(json.dumps(train(task)), encoding="utf-8")


def main() -> None:
    """Import once; fork the ranks of each line."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for line in sys.stdin:
        forked = []
        for task in json.loads(line):
            forked.append(os.fork())
            if not forked[-1]:
                try:
                    one(task)
                finally:
                    os._exit(0)
        for process in forked:
            os.waitpid(process, 0)
        print("ended", flush=True)


if __name__ == "__main__":
    main()
