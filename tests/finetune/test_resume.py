"""Runs that die and are resumed: every update is paid for, and the budget holds.

Control: a script that marks its steps when it saves pays for fewer than it ran.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from accountant import Accountant, ReservationError, UnitMismatch
from dp import adaptive
from finetune import CheckpointInvalid, PlanChanged, TrainingPlan, training_run


@pytest.fixture(scope="module")
def trainers():
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("trainers.py"))],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def train(**task: object) -> int:
        """Train in a fresh process; return its wait status."""
        server.stdin.write(json.dumps(task) + "\n")
        server.stdin.flush()
        return int(server.stdout.readline())

    yield train
    server.stdin.close()
    server.stdout.close()
    server.wait(60)


def crashed_run(
    trainers, folder: Path, seed: int, *, broken: bool = False
) -> tuple[int, int, int, int]:
    """Kill a random run at random points; return its crashes, updates, paid steps and plan."""
    choose = random.Random(seed)
    folder.mkdir()
    rows, batch = choose.randint(20, 90), choose.randint(2, 10)
    plan = TrainingPlan.for_units(
        rows,
        expected_batch_size=batch,
        noise_multiplier=choose.uniform(0.8, 3.0),
        steps=choose.randint(2, 9),
    )
    budget = adaptive(choose.choice((6.0, 8.0, 12.0)), 1e-5)
    checkpoint, saved = folder / "run.pt", []
    with Accountant.open(folder / "ledger.db") as accountant:
        accountant.create_budget("b", budget, unit="row")
        steps = min(plan.steps, accountant.uses_that_fit("b", plan.event))
    assert steps > 0
    task = {
        "ledger": str(folder / "ledger.db"),
        "checkpoint": str(checkpoint),
        "state": os.environ["EPSLEDGER_STATE"],
        "updates": str(folder / "updates"),
        "out": str(folder / "out"),
        "rows": rows,
        "noise_multiplier": plan.noise_multiplier,
        "sampling_probability": plan.sampling_probability,
        "steps": steps,
        "expected_batch_size": batch,
        "max_grad_norm": 1.0,
        "save_every": choose.randint(1, 3),
        "broken": broken,
    }
    crashes = 0
    for _ in range(choose.randint(1, 4)):
        status = trainers(**task, die_at=choose.randint(1, 4 * steps + 4))
        if not os.WIFSIGNALED(status):
            break
        crashes += 1
        if checkpoint.exists():
            saved.append(shutil.copy(checkpoint, folder / f"older-{crashes}.pt"))
        if saved and choose.random() < 0.3:  # an older checkpoint is put back
            shutil.copy(choose.choice(saved), checkpoint)
    if not (folder / "out").exists():
        trainers(**task, die_at=0)
    assert (folder / "out").read_text() == "done"
    with Accountant.open(folder / "ledger.db") as accountant:
        assert accountant.verify().clean
        statement = accountant.statement("b")
        paid = sum(uses for _, uses in statement.spent)
        assert statement.open_reservations == ()
    updates = (folder / "updates").stat().st_size if (folder / "updates").exists() else 0
    shutil.rmtree(folder)
    return crashes, updates, paid, steps


@pytest.mark.parametrize("plans", [5, pytest.param(150, marks=pytest.mark.long)])
def test_every_update_is_paid_for(trainers, tmp_path, plans, scale):
    plans *= scale if plans > 8 else 1
    died = ran = spent = over = 0
    for seed in range(plans):
        crashes, updates, paid, steps = crashed_run(trainers, tmp_path / f"{seed}", seed)
        assert updates <= paid <= steps
        assert paid - updates <= crashes
        died, ran, spent = died + crashes, ran + updates, spent + paid
        over = max(over, paid - updates)
    print(f"{plans} plans, {died} crashes: {ran} updates, {spent} steps paid, at most {over} over")
    assert died > plans / 2


def test_the_control_pays_for_fewer_steps_than_it_ran(trainers, tmp_path):
    for seed in range(20):
        _, updates, paid, _ = crashed_run(trainers, tmp_path / f"{seed}", seed, broken=True)
        if updates > paid:
            break
    print(f"control, marks at the next save: {updates} updates, {paid} steps paid")
    assert updates > paid


@pytest.fixture
def accountant(tmp_path):
    with Accountant.open(tmp_path / "ledger.db") as accountant:
        accountant.create_budget("b", adaptive(8.0, 1e-5), unit="row")
        yield accountant


PLAN = TrainingPlan.for_units(50, expected_batch_size=5, noise_multiplier=1.0, steps=6)


def run_on(accountant, path, steps: int, plan: TrainingPlan = PLAN):
    """Run some steps, save, and leave by an error as if the process had died; return the model."""
    torch.manual_seed(0)
    rows = TensorDataset(torch.randn(50, 3), torch.randint(0, 2, (50,)))
    inner = torch.nn.Linear(3, 2)
    adam = torch.optim.Adam(inner.parameters(), lr=0.1)
    with (
        pytest.raises(KeyboardInterrupt),
        training_run(accountant, "b", plan, unit="row", checkpoint=path) as run,
    ):
        model, optimizer, loader = run.make_private(inner, adam, DataLoader(rows))
        start = {name: part.clone() for name, part in inner.state_dict().items()}
        for number, (features, labels) in enumerate(run.batches(loader), 1):
            torch.nn.functional.cross_entropy(model(features), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            if number == steps:
                run.save()
                break
        raise KeyboardInterrupt
    return start, {name: part.clone() for name, part in inner.state_dict().items()}, run, adam


def equal(one, other) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())


def test_a_resumed_run_goes_on_from_weights_and_optimizer(accountant, tmp_path):
    _, end, first, _ = run_on(accountant, tmp_path / "run.pt", 2)
    start, later, second, adam = run_on(accountant, tmp_path / "run.pt", 3)
    assert equal(start, end)
    assert not equal(start, later)
    assert adam.state_dict()["state"][0]["step"] == 5
    assert second.reservation.marked == 5
    assert second.reservation.holds == first.reservation.holds
    with pytest.raises(ReservationError, match="another holder"):
        first.reservation.mark()  # the old process is shut out


def test_an_older_checkpoint_gives_no_step_back(accountant, tmp_path):
    path, older = tmp_path / "run.pt", tmp_path / "older.pt"
    run_on(accountant, path, 2)
    shutil.copy(path, older)
    run_on(accountant, path, 2)
    shutil.copy(older, path)
    _, _, run, _ = run_on(accountant, path, 9)
    assert run.reservation.marked == 6
    with training_run(accountant, "b", PLAN, unit="row", checkpoint=path) as run:
        assert run.reservation.remaining == 0
    with (
        pytest.raises(CheckpointInvalid, match=r"no open reservation.*weights as last saved are"),
        training_run(accountant, "b", PLAN, unit="row", checkpoint=path),
    ):
        pytest.fail("resumed a run that has ended")


def test_a_run_is_resumed_as_it_was_priced(accountant, tmp_path):
    run_on(accountant, tmp_path / "run.pt", 2)
    other = TrainingPlan.for_units(50, expected_batch_size=5, noise_multiplier=0.5, steps=6)
    before = accountant.statement("b").seq
    with (
        pytest.raises(PlanChanged, match=r"noise_multiplier is 0\.5, .* says 1\.0"),
        training_run(accountant, "b", other, unit="row", checkpoint=tmp_path / "run.pt"),
    ):
        pytest.fail("resumed with other noise")
    assert accountant.statement("b").seq == before


def test_a_run_is_resumed_for_its_own_unit(accountant, tmp_path):
    run_on(accountant, tmp_path / "run.pt", 2)
    with (
        pytest.raises(UnitMismatch, match="protects one 'row'"),
        training_run(accountant, "b", PLAN, unit="token", checkpoint=tmp_path / "run.pt"),
    ):
        pytest.fail("resumed for another unit")


@pytest.mark.parametrize("content", [b"", b"spam" * 99, "torch"], ids=["empty", "text", "other"])
def test_a_file_that_is_no_checkpoint(accountant, tmp_path, content):
    path = tmp_path / "run.pt"
    if content == "torch":
        torch.save({"model": {}}, path)
    else:
        path.write_bytes(content)
    before = path.read_bytes()
    with (
        pytest.raises(CheckpointInvalid, match=r"run\.pt: it "),
        training_run(accountant, "b", PLAN, unit="row", checkpoint=path),
    ):
        pytest.fail("entered")
    assert path.read_bytes() == before
    assert accountant.statement("b").seq == 1


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("segments",), None),
        (("segments", 0), {}),
        (("segments", 0, "plan", "more"), 1),
        (("segments", 0, "plan", "steps"), "six"),
        (("segments", 0, "holds"), 7),
        (("segments", 0, "holds", 0), ["b"]),
        (("segments", 0, "holds", 0), [1, "b"]),
        (("model",), [1]),
        (("model",), {"weight": 1}),
        (("optimizer",), None),
        (("optimizer",), {"state": 1}),
    ],
    ids=str,
)
def test_a_checkpoint_with_odd_contents_is_refused_as_one(accountant, tmp_path, place, value):
    path = tmp_path / "run.pt"
    run_on(accountant, path, 1)
    inner = content = torch.load(path, weights_only=True)
    for step in place[:-1]:
        inner = inner[step]
    inner[place[-1]] = value
    torch.save(content, path)
    model = torch.nn.Linear(3, 2)
    rows = TensorDataset(torch.randn(50, 3), torch.randint(0, 2, (50,)))
    with (
        pytest.raises(CheckpointInvalid, match=r"run\.pt: it is "),
        training_run(accountant, "b", PLAN, unit="row", checkpoint=path) as run,
    ):
        run.make_private(model, torch.optim.Adam(model.parameters()), DataLoader(rows))


def test_a_run_is_resumed_with_its_own_model_and_optimizer(accountant, tmp_path):
    run_on(accountant, tmp_path / "run.pt", 2)
    rows = TensorDataset(torch.randn(50, 3), torch.randint(0, 2, (50,)))
    for model, kind in (
        (torch.nn.Linear(3, 4), "Adam"),
        (torch.nn.Linear(3, 2, bias=False), "SGD"),
    ):
        optimizer = getattr(torch.optim, kind)(model.parameters(), lr=0.1)
        with (
            pytest.raises(CheckpointInvalid, match="another model or optimizer"),
            training_run(accountant, "b", PLAN, unit="row", checkpoint=tmp_path / "run.pt") as run,
        ):
            run.make_private(model, optimizer, DataLoader(rows))


def test_code_in_a_checkpoint_is_not_run(accountant, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.kill, (os.getpid(), signal.SIGKILL)

    torch.save({"model": Evil()}, tmp_path / "run.pt")
    with (
        pytest.raises(CheckpointInvalid, match="cannot be read"),
        training_run(accountant, "b", PLAN, unit="row", checkpoint=tmp_path / "run.pt"),
    ):
        pytest.fail("entered")


def test_a_checkpoint_of_another_ledger(accountant, tmp_path):
    run_on(accountant, tmp_path / "run.pt", 2)
    with Accountant.open(tmp_path / "other.db") as other:
        other.create_budget("b", adaptive(8.0, 1e-5), unit="row")
        with (
            pytest.raises(CheckpointInvalid, match=f"in ledger {accountant.ledger}"),
            training_run(other, "b", PLAN, unit="row", checkpoint=tmp_path / "run.pt"),
        ):
            pytest.fail("entered")


def test_a_checkpoint_that_cannot_be_written(accountant, tmp_path):
    with (
        pytest.raises(CheckpointInvalid, match="cannot be written"),
        training_run(
            accountant, "b", PLAN, unit="row", checkpoint=tmp_path / "absent" / "run.pt"
        ) as run,
    ):
        model = torch.nn.Linear(3, 2)
        rows = TensorDataset(torch.randn(50, 3), torch.randint(0, 2, (50,)))
        run.make_private(model, torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(rows))


def test_nothing_but_outputs_is_in_a_checkpoint(accountant, tmp_path):
    run_on(accountant, tmp_path / "run.pt", 2)
    content = torch.load(tmp_path / "run.pt", weights_only=True)
    assert content["model"].keys() == {"weight", "bias"}
    assert content["optimizer"]["state"][0].keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert not list(tmp_path.glob("*.part"))


def test_a_run_that_nobody_left_asks_nothing_of_the_ledger_when_it_is_collected(accountant):
    """The collector may find it in the ledger's own thread, which would wait for itself."""
    context = training_run(accountant, "b", PLAN, unit="row")
    context.__enter__()
    before = accountant.statement("b").seq
    context.gen.close()
    assert accountant.statement("b").seq == before
