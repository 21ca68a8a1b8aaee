"""The ranks of distributed runs, each a process of its own: JSON objects say what they do."""

from __future__ import annotations

import json
import os
import random
import sys
import time
import warnings
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch._dynamo  # which optimizers import when they are made: here, and not in each fork
from torch import distributed
from torch.utils.data import DataLoader, Subset, TensorDataset

from accountant import Accountant
from finetune import CappedRows, OneRowPerUnit, TrainingPlan, UnitMap, training_run, units


def train(task: dict) -> dict:
    rank, torn = task["rank"], task["tear"]
    torch.manual_seed(rank)  # different weights: the run gives all those of rank 0
    model = torch.nn.Linear(5, 200)
    generator = torch.Generator().manual_seed(7)
    rows = TensorDataset(
        torch.randn(24, 5, generator=generator),
        torch.randint(0, 3, (24,), generator=generator),
    )
    if torn == "drawn":
        rows = OneRowPerUnit(rows, UnitMap.of(rows, [at // 2 for at in range(24)]))
    plan = TrainingPlan(**task["plan"])
    if rank == 1:
        plan = replace(plan, max_grad_norm=50.0) if torn == "plan" else plan
        rows = Subset(rows, range(23, -1, -1)) if torn == "order" else rows
        rows = Subset(rows, range(23)) if torn == "fewer" else rows
        model = torch.nn.Linear(5, 201) if torn == "model" else model
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
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
                    if rank == 1 and steps == 2:
                        if torn == "loud":
                            guarded.noise_multiplier = 0.1
                        if torn == "broken":
                            guarded.clip_and_accumulate = lambda: 1 / 0
                        if torn == "skipping":
                            continue
                        if torn == "leaving":
                            break
                        if torn == "killed":
                            os._exit(1)
                    guarded.step()
                    guarded.zero_grad()
                    steps += 1
                _ = 1 / (torn != "late" or rank != 1)
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


def share(task: dict) -> dict:
    """Cap rows of two units; return the rows that this rank would sample."""
    rows = list(range(24))
    if task["tear"] == "each chooses":
        units.as_on_rank_0, units._OS = (lambda chosen: chosen), random.Random(task["rank"])
    distributed.barrier()  # with all connected, none leaves too early
    capped = CappedRows(rows, UnitMap.of(rows, [at % 2 for at in rows]), most=4)
    return {"share": [capped[at] for at in range(task["rank"], len(capped), task["ranks"])]}


def one(task: dict) -> None:
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{task['meet']}",
        rank=task["rank"],
        world_size=task["ranks"],
        timeout=timedelta(seconds=60),
    )
    os.environ["EPSLEDGER_STATE"] = task["state"]
    found = share(task) if "choose" in task["tear"] else train(task)
    Path(task["out"]).write_text(json.dumps(found), encoding="utf-8")


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
