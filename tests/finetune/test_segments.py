"""Runs of several plans: schedules of noise, clipping, sampling and batch size."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from accountant import Accountant, BudgetExceeded
from dp import InvalidParameter, adaptive
from finetune import PlanChanged, TrainingPlan, training_run

ROWS = 40
PLANS = (
    TrainingPlan(1.5, 0.1, steps=3, expected_batch_size=4),
    TrainingPlan(1.0, 0.2, steps=2, expected_batch_size=8, max_grad_norm=0.5),
    TrainingPlan(0.9, 0.9, steps=1, expected_batch_size=36, max_grad_norm=0.1),
)


@pytest.fixture
def accountant(tmp_path):
    with Accountant.open(tmp_path / "ledger.db") as accountant:
        accountant.create_budget("b", adaptive(8.0, 1e-5), unit="row")
        yield accountant


def parts():
    model = torch.nn.Linear(5, 2)
    rows = TensorDataset(torch.randn(ROWS, 5), torch.randint(0, 2, (ROWS,)))
    return model, torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(rows)


def seen(run, mode="hooks", most=99, physical=None):
    """Run to the end, or for some batches; return what each step was made with."""
    found = []
    model, optimizer, loader = run.make_private(*parts(), mode=mode)
    criterion = torch.nn.CrossEntropyLoss()
    for features, labels in run.batches(loader, physical=physical):
        criterion(model(features), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(
            (optimizer.noise_multiplier, optimizer.max_grad_norm, optimizer.expected_batch_size)
        )
        if len(found) == most:
            break
    return found


EXPECTED = [(p.noise_multiplier, p.max_grad_norm, p.expected_batch_size) for p in PLANS]


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_each_step_is_made_as_its_plan_says_and_charged_so(accountant, mode):
    before = accountant.share_after("b", [(plan.event, plan.steps) for plan in PLANS])
    with training_run(accountant, "b", PLANS, unit="row") as run:
        assert run.remaining == 6
        steps = seen(run, mode)
    assert steps == [EXPECTED[0]] * 3 + [EXPECTED[1]] * 2 + [EXPECTED[2]]
    statement = accountant.statement("b")
    assert dict(statement.spent) == {plan.event: plan.steps for plan in PLANS}
    assert statement.share == before  # the price before is the charge after
    assert statement.open_reservations == ()


def test_what_is_left_of_every_plan_is_returned(accountant):
    with training_run(accountant, "b", PLANS, unit="row") as run:
        assert len(seen(run, most=4)) == 4
    assert dict(accountant.statement("b").spent) == {PLANS[0].event: 3, PLANS[1].event: 1}


def test_all_plans_are_reserved_or_none(accountant):
    fit = accountant.uses_that_fit("b", PLANS[2].event)
    big = TrainingPlan(0.9, 1.0, steps=fit, expected_batch_size=40)
    before = accountant.statement("b").share
    with (
        pytest.raises(BudgetExceeded) as refusal,
        training_run(accountant, "b", (PLANS[0], PLANS[1], big), unit="row"),
    ):
        pytest.fail("entered")
    assert 0 <= refusal.value.remaining < fit
    statement = accountant.statement("b")
    assert (statement.share, statement.open_reservations) == (before, ())
    with (
        pytest.raises(InvalidParameter, match="a TrainingPlan, or several"),
        training_run(accountant, "b", (), unit="row"),
    ):
        pytest.fail("entered")


def test_a_schedule_of_its_own_making_is_refused(accountant):
    """A scheduler that lowers the noise between steps, which the price does not know."""
    with training_run(accountant, "b", PLANS[0], unit="row") as run:
        model, optimizer, loader = run.make_private(*parts())
        for features, labels in run.batches(loader):
            optimizer.noise_multiplier *= 0.9
            torch.nn.functional.cross_entropy(model(features), labels).backward()
            with pytest.raises(PlanChanged, match=r"noise_multiplier is 1\.35.*says 1\.5"):
                optimizer.step()
            break


def test_a_resumed_run_goes_on_in_its_segment(accountant, tmp_path):
    path = tmp_path / "run.pt"
    with (
        pytest.raises(KeyboardInterrupt),
        training_run(accountant, "b", PLANS, unit="row", checkpoint=path) as run,
    ):
        seen(run, most=4)
        run.save()
        raise KeyboardInterrupt
    with (
        pytest.raises(PlanChanged, match="number of segments"),
        training_run(accountant, "b", PLANS[:2], unit="row", checkpoint=path),
    ):
        pytest.fail("entered")
    with training_run(accountant, "b", PLANS, unit="row", checkpoint=path) as run:
        assert run.plan == PLANS[1]
        assert seen(run) == [EXPECTED[1], EXPECTED[2]]
    assert dict(accountant.statement("b").spent) == {plan.event: plan.steps for plan in PLANS}
    assert accountant.verify().clean
