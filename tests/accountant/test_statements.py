"""Statements: folded from the entries, and equal to what is enforced."""

from __future__ import annotations

import math

import pytest

from accountant import BudgetExceeded
from dp import Gaussian, Laplace, PoissonSampled, PureDP

STEP = PoissonSampled(0.01, Gaussian(1.0))


def spend(accountant):
    """A little of everything, in both budgets."""
    accountant.charge("news", Gaussian(50.0), uses=40, unit="article", activity="survey")
    with accountant.reserve(
        "news", STEP, uses=200, unit="article", activity="training", note="run 7"
    ) as steps:
        steps.mark(150)
    accountant.charge("news", Laplace(100.0), uses=3, unit="article", activity="survey")
    accountant.reserve("news", Gaussian(80.0), uses=9, unit="article", activity="votes").mark(2)
    for _ in range(4):
        with pytest.raises(BudgetExceeded):
            accountant.charge("news", PureDP(9.0), unit="article", activity="probe")


def test_of_a_new_budget(accountant):
    statement = accountant.statement("news")
    assert statement.budget == accountant.budget("news")
    assert (statement.seq, statement.share, statement.refused) == (1, 0.0, 0)
    assert (statement.activities, statement.open_reservations) == ((), ())
    assert statement.spent == ()
    assert [line.entry.kind.name for line in statement.lines] == ["OPEN"]


def test_the_fold_is_what_is_stored(accountant, location, query, totals_of):
    spend(accountant)
    statement = accountant.statement("news")
    ((seq, head),) = query(
        location, "SELECT seq, head FROM epsledger_budget WHERE name = ?", "news"
    )
    assert (statement.seq, statement.head) == (seq, head.hex())
    assert statement.share == statement.budget.filter.share(totals_of(location, "news"))
    assert statement.lines[-1].share == statement.share
    assert [line.entry.seq for line in statement.lines] == list(range(1, seq + 1))
    assert statement.refused == 4
    assert statement.open_reservations == ((7, 9, 2),)


def test_activities_add_up_to_the_total(accountant):
    spend(accountant)
    statement = accountant.statement("news")
    assert [(line.name, line.uses, line.refused) for line in statement.activities] == [
        ("probe", 0, 4),
        ("survey", 43, 0),
        ("training", 150, 0),
        ("votes", 9, 0),
    ]
    total = math.fsum(line.share for line in statement.activities)
    assert total == pytest.approx(statement.share, rel=1e-12)
    assert 0 < statement.share < 1
    assert sum(line.refused for line in statement.activities) == statement.refused


def test_shares_of_a_pure_budget(accountant):
    for activity, uses in [("a", 2), ("b", 3)]:
        accountant.charge("tips", PureDP(1.0), uses=uses, unit="article", activity=activity)
    statement = accountant.statement("tips")
    assert statement.share == pytest.approx(0.5, rel=1e-8)
    assert [line.share for line in statement.activities] == pytest.approx([0.2, 0.3], rel=1e-8)
    assert statement.spent == ((PureDP(1.0), 5),)


def test_the_share_rises_with_a_reservation_and_falls_at_settling(accountant):
    with accountant.reserve("tips", PureDP(1.0), uses=8, unit="article", activity="x") as held:
        held.mark(2)
    shares = [line.share for line in accountant.statement("tips").lines]
    assert shares == pytest.approx([0.0, 0.8, 0.8, 0.2], rel=1e-8)


def test_spent_leaves_out_what_was_returned(accountant):
    spend(accountant)
    with accountant.reserve("news", STEP, uses=30, unit="article", activity="x") as held:
        held.mark(4)
    spent = dict(accountant.statement("news").spent)
    assert sum(spent.values()) == 43 + 150 + 9 + 4
    assert spent[STEP] == 154
    with accountant.reserve("tips", PureDP(1.0), uses=2, unit="article", activity="x"):
        pass
    assert accountant.statement("tips").spent == ()


def test_notes_events_and_times_are_readable(accountant):
    spend(accountant)
    lines = accountant.statement("news").lines
    reserved = next(line for line in lines if line.entry.kind.name == "RESERVE")
    assert (reserved.entry.note, reserved.event, reserved.entry.uses) == ("run 7", STEP, 200)
    times = [line.entry.time for line in lines]
    assert times == sorted(times)
    assert lines[0].event is None
