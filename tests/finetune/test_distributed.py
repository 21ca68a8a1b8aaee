"""Two processes with gloo: one mark for each step, the same weights, and no rank left waiting."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from accountant import Accountant
from dp import adaptive
from finetune import UnsupportedModel
from finetune.models import check_model

PLAN = {
    "noise_multiplier": 5e-3,
    "sampling_probability": 1.0,
    "steps": 3,
    "expected_batch_size": 24,
    "max_grad_norm": 0.5,
}
AT_ONCE = 30
"""Seconds: half of the time after which gloo gives up on a rank that it waits for."""


@pytest.fixture(scope="module")
def server():
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("ranks.py"))],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    yield server
    server.stdin.close()
    server.stdout.close()
    server.wait(60)


@pytest.fixture
def ranks(server):
    """Run so many ranks; return what each found."""

    def run(folder: Path, count: int = 2, *, tear: str = "", checkpoint=None, **plan) -> list[dict]:
        tasks = [
            {
                "rank": rank,
                "ranks": count,
                "meet": str(folder / f"meet-{len(list(folder.iterdir()))}"),
                "ledger": str(folder / "ledger.db"),
                "state": os.environ["EPSLEDGER_STATE"],
                "checkpoint": None if checkpoint is None else str(checkpoint),
                "out": str(folder / f"out-{rank}"),
                "tear": tear,
                "plan": {**PLAN, **plan},
            }
            for rank in range(count)
        ]
        server.stdin.write(json.dumps(tasks) + "\n")
        server.stdin.flush()
        assert server.stdout.readline() == "ended\n"
        return [json.loads(Path(task["out"]).read_text()) for task in tasks]

    return run


@pytest.fixture
def folder(tmp_path):
    with Accountant.open(tmp_path / "ledger.db") as accountant:
        accountant.create_budget("b", adaptive(1e6, 1e-5), unit="row")
    return tmp_path


def spent(folder: Path) -> int:
    with Accountant.open(folder / "ledger.db") as accountant:
        assert accountant.verify().clean
        return sum(uses for _, uses in accountant.statement("b").spent)


def test_two_ranks_make_the_steps_of_one(ranks, folder):
    one = folder / "one"
    one.mkdir()
    with Accountant.open(one / "ledger.db") as accountant:
        accountant.create_budget("b", adaptive(1e6, 1e-5), unit="row")
    (alone,) = ranks(one, 1)
    first, second = ranks(folder)
    assert [each["said"] for each in (alone, first, second)] == ["done"] * 3
    assert first["weights"] == second["weights"]
    assert first["start"] == second["start"] == alone["start"]
    # next to no noise, 8 standard deviations: the same clipped sums, whichever rank has the row
    assert torch.allclose(torch.tensor(first["weights"]), torch.tensor(alone["weights"]), atol=2e-3)
    assert not torch.allclose(
        torch.tensor(first["weights"]), torch.tensor(first["start"]), atol=5e-3
    )
    assert (first["parts"], second["parts"], alone["parts"]) == (9, 9, 15)
    assert spent(folder) == spent(one) == 3  # one charge for each step


def test_noise_is_added_once(ranks, folder):
    """On samples without rows the weights move by the noise alone, on all ranks alike."""
    first, second = ranks(folder, noise_multiplier=20.0, sampling_probability=1e-9, steps=30)
    assert first["weights"] == second["weights"]
    moved = torch.tensor(first["weights"]) - torch.tensor(first["start"])
    expected = 20.0 * 0.5 / 24 * 30**0.5
    # of 1,000 weights, 7 standard deviations; two noises: 1.41, half of one: 0.71
    assert 0.84 * expected < moved.std().item() < 1.17 * expected


def test_a_plan_that_does_not_fit_ends_both_at_once(ranks, folder):
    first, second = ranks(folder, noise_multiplier=1e-3, steps=50)
    assert first["said"].startswith("BudgetExceeded: budget 'b': 50 x")
    assert second["said"].startswith("PeerFailed: rank 0 left the run: BudgetExceeded")
    print(f"refused: both ranks ended in {max(first['seconds'], second['seconds']):.2f} s")
    assert max(first["seconds"], second["seconds"]) < AT_ONCE
    assert spent(folder) == 0


def test_a_refusal_in_the_middle_ends_both_at_once(ranks, folder):
    first, second = ranks(folder, tear="adopted", steps=6)
    assert first["said"].startswith("ReservationError: ")
    assert "another holder" in first["said"]
    assert second["said"].startswith("PeerFailed: rank 0 left the run: ReservationError")
    print(f"shut out: both ranks ended in {max(first['seconds'], second['seconds']):.2f} s")
    assert max(first["seconds"], second["seconds"]) < AT_ONCE
    assert first["weights"] == second["weights"]


@pytest.mark.parametrize(
    ("tear", "said", "heard"),
    [
        ("loud", "PlanChanged: noise_multiplier is 0.1", "rank 1 left the run: "),
        ("broken", "ZeroDivisionError", "rank 1 left the run: ZeroDivisionError"),
        ("skipping", "SkippedStep: the last batch", "rank 1 left the run: SkippedStep"),
        ("leaving", "PeerFailed: rank 0 is at ", "rank 1 is at the end of the run"),
        ("late", "ZeroDivisionError", "rank 1 left the run: ZeroDivisionError"),
    ],
)
def test_what_one_rank_does_alone_ends_both_at_once(ranks, folder, tear, said, heard):
    first, second = ranks(folder, tear=tear)
    assert second["said"].startswith(said)
    assert first["said"].startswith(f"PeerFailed: {heard}")
    assert first["weights"] == second["weights"]
    assert max(first["seconds"], second["seconds"]) < AT_ONCE


def test_a_rank_that_is_killed_ends_the_others_at_once(ranks, folder):
    (folder / "out-1").write_text("{}")
    first, _ = ranks(folder, tear="killed")
    assert first["said"].startswith("PeerFailed: at ")
    assert "another rank cannot be reached" in first["said"]
    assert first["seconds"] < AT_ONCE


@pytest.mark.parametrize(
    ("tear", "said"),
    [
        ("plan", "PlanChanged: max_grad_norm on rank 1 is 50.0, the plan that was priced says 0.5"),
        ("order", "NotPoissonSampled: rank 1 has other rows than rank 0, or in another order"),
        ("fewer", "NotPoissonSampled: rank 1 has other rows than rank 0, or in another order"),
        ("model", "UnsupportedModel: rank 1 has weights of other shapes than rank 0"),
    ],
)
def test_ranks_that_differ_are_refused_on_both_before_a_step(ranks, folder, tear, said):
    for found in ranks(folder, tear=tear):
        assert found["said"].startswith(said)
        assert found["seconds"] < AT_ONCE
    assert spent(folder) == 0


def test_rows_that_are_drawn_at_random_are_no_difference(ranks, folder):
    assert [each["said"] for each in ranks(folder, tear="drawn")] == ["done", "done"]


def test_rank_0_chooses_which_rows_of_a_unit_are_kept(ranks, folder):
    def most_of_a_unit(tear):
        first, second = (each["share"] for each in ranks(folder, tear=tear))
        units = [row % 2 for row in {*first, *second}]
        return max(map(units.count, units))

    assert most_of_a_unit("choose") == 4
    found = most_of_a_unit("each chooses")
    print(f"control, each rank chooses: {found} rows of a unit under a cap of 4")
    assert found > 4


def test_a_distributed_run_is_resumed_on_all_ranks(ranks, folder):
    checkpoint = folder / "run.pt"
    first, second = ranks(folder, tear="interrupted", checkpoint=checkpoint)
    assert first["said"] == second["said"] == "ZeroDivisionError: division by zero"
    again = ranks(folder, checkpoint=checkpoint)
    assert [each["said"] for each in again] == ["done", "done"]
    assert again[0]["start"] == again[1]["start"] == first["weights"] == second["weights"]
    assert [each["parts"] for each in again] == [0, 0]  # all steps were taken before
    assert spent(folder) == 3


def test_a_model_that_averages_raw_gradients_is_refused(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1
    )
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
        with pytest.raises(UnsupportedModel, match="pass the model itself"):
            check_model(wrapped)
    finally:
        torch.distributed.destroy_process_group()
