"""Planned and expecting budgets in a real ledger: slots first, and settled to where they came from."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from random import Random

import pytest

from accountant import Accountant, BudgetExceeded
from dp import ZCDP, Gaussian, Laplace, PoissonSampled, PureDP, adaptive, planned, pure
from dp.readings import if_fixed

STEP, VOTE, QUERY = PoissonSampled(0.01, Gaussian(1.0)), Laplace(20.0), Gaussian(50.0)
ASK = {"unit": "article", "activity": "x"}


@pytest.fixture
def ledger(location):
    """A ledger with the budget ``plan``: 100 steps, 10 votes, and a Gaussian filter."""
    with Accountant.open(location) as accountant:
        limits = planned(3.0, 1e-6, slots=[(STEP, 100), (VOTE, 10)])
        accountant.create_budget("plan", limits, unit="article")
        yield accountant


def lanes(accountant, location, totals_of):
    filter = accountant.budget("plan").filter
    return dict(zip(filter.lanes, totals_of(location, "plan"), strict=True))


def test_a_slot_is_used_up_and_the_rest_pays_mu_squared(ledger, location, totals_of):
    vote = ledger.budget("plan").filter.price(PureDP(0.05))[-1]  # the same bound without a slot
    ledger.charge("plan", VOTE, uses=7, **ASK)
    assert lanes(ledger, location, totals_of) == {"uses 1": 0, "uses 2": 7, "mu_squared": 0}
    ledger.charge("plan", VOTE, uses=5, **ASK)
    assert lanes(ledger, location, totals_of) == {"uses 1": 0, "uses 2": 10, "mu_squared": 2 * vote}
    ledger.charge("plan", QUERY, **ASK)
    (query,) = {ledger.budget("plan").filter.price(QUERY)[-1]}
    assert lanes(ledger, location, totals_of)["mu_squared"] == 2 * vote + query
    assert ledger.verify().clean


def test_a_slot_without_mu_squared_ends(ledger):
    ledger.charge("plan", STEP, uses=100, **ASK)
    with pytest.raises(BudgetExceeded) as caught:
        ledger.charge("plan", STEP, **ASK)
    assert (caught.value.remaining, caught.value.advice) == (0, "")
    assert ledger.uses_that_fit("plan", QUERY) > 100


def test_settling_returns_slot_uses_to_the_slot(ledger, location, totals_of):
    vote = ledger.budget("plan").filter.price(PureDP(0.05))[-1]
    with ledger.reserve("plan", VOTE, uses=14, **ASK) as first:  # 10 of the slot, 4 beyond
        assert lanes(ledger, location, totals_of)["mu_squared"] == 4 * vote
        first.mark(6)
        with ledger.reserve("plan", VOTE, uses=3, **ASK) as second:  # all beyond
            second.mark(2)
        assert lanes(ledger, location, totals_of)["mu_squared"] == 6 * vote
    assert lanes(ledger, location, totals_of) == {"uses 1": 0, "uses 2": 6, "mu_squared": 2 * vote}
    ledger.charge("plan", VOTE, uses=4, **ASK)
    assert lanes(ledger, location, totals_of)["mu_squared"] == 2 * vote
    assert ledger.verify().clean


@pytest.mark.parametrize(
    "seed", [*range(3), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(3, 30))]
)
def test_random_lives_replay(location, ledger, totals_of, seed):
    """Charges, reservations, marks, settlements and voids in any order: verify and the fold agree."""
    random, held = Random(seed), []
    for _ in range(60):
        event = random.choice([STEP, VOTE, QUERY, PureDP(0.01)])
        act = random.choice(["charge", "reserve", "mark", "mark", "settle"])
        try:
            if act == "charge":
                ledger.charge("plan", event, uses=random.randint(1, 15), **ASK)
            elif act == "reserve":
                held.append(ledger.reserve("plan", event, uses=random.randint(1, 30), **ASK))
            elif held:
                chosen = random.choice(held)
                if act == "mark" and chosen.remaining:
                    chosen.mark(random.randint(1, chosen.remaining))
                elif act == "settle":
                    chosen.settle() if chosen.marked else chosen.void()
                    held.remove(chosen)
        except BudgetExceeded:
            pass
    assert ledger.verify().clean
    statement = ledger.statement("plan")
    filter = statement.budget.filter
    assert statement.share == filter.share(totals_of(location, "plan"))
    assert filter.admits(totals_of(location, "plan"))
    spent = dict(statement.spent)
    assert spent.get(STEP, 0) <= 100
    assert if_fixed(statement.spent, 1e-6, filter.relation).pld <= 3.0
    assert statement.share == pytest.approx(sum(a.share for a in statement.activities))


@pytest.mark.parametrize(
    "tampering",
    [
        "UPDATE epsledger_reservation SET charged = zeroblob(48)",
        "UPDATE epsledger_budget SET totals = zeroblob(48)",
    ],
)
def test_a_contribution_that_was_changed_is_found(location, ledger, tampering, untrigger):
    held = ledger.reserve("plan", VOTE, uses=14, **ASK)
    held.mark(3)
    ledger.close()
    untrigger(location)
    with closing(sqlite3.connect(location)) as connection, connection:
        connection.execute(tampering)
    with Accountant.open(location) as accountant:
        assert not accountant.verify().clean


@pytest.mark.parametrize(
    ("limits", "event", "advice"),
    [
        (planned(3.0, 1e-6, slots=[]), ZCDP(0.01), "neither a slot nor Gaussian DP"),
        (planned(3.0, 1e-6, slots=[]), STEP, "needs an adaptive budget"),
        (pure(1.0), QUERY, "needs a budget with a delta"),
        (pure(1.0), PureDP(2.0), "beyond the whole budget"),
        (adaptive(1.0, 1e-6), STEP, "commits to it (dp.planned)"),
    ],
    ids=repr,
)
def test_a_refusal_says_which_budget_would_take_it(location, limits, event, advice):
    with Accountant.open(location) as accountant:
        accountant.create_budget("b", limits, unit="article")
        with pytest.raises(BudgetExceeded) as caught:
            accountant.charge("b", event, **ASK)
    assert advice in str(caught.value)
    assert advice in caught.value.advice


def test_an_expecting_budget_counts_uses(location):
    with Accountant.open(location) as accountant:
        accountant.create_budget("b", adaptive(1.0, 1e-6, expect=STEP), unit="article")
        fitting = accountant.uses_that_fit("b", STEP)
        assert fitting > 80
        with accountant.reserve("b", STEP, uses=fitting, **ASK) as run:
            run.mark(40)
        assert accountant.uses_that_fit("b", STEP) == fitting - 40
        assert (
            accountant.steps_that_fit("b", sampling_probability=0.01, noise_multiplier=1.0)
            == fitting - 40
        )
        with pytest.raises(BudgetExceeded):  # that would kill the witness of the steps
            accountant.charge("b", QUERY, **ASK)
        ((first, _), (second, more)) = accountant.frontier("b", Gaussian, [50.0, 1e5])
        assert (first, second, more) == (50.0, 1e5, 0)
        assert accountant.share_after("b", [(STEP, 10)]) == pytest.approx(50 / fitting)
        assert accountant.share_after("b", [(STEP, 10), (QUERY, 1)]) is None
        assert accountant.verify().clean
