"""Charges: what they add to each lane, and what is refused."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest

from accountant import (
    Accountant,
    BudgetExceeded,
    BudgetExists,
    UnitMismatch,
    UnknownBudget,
)
from dp import (
    Composed,
    Gaussian,
    Laplace,
    NeighboringRelation,
    NonPrivate,
    PureDP,
    Repeated,
    adaptive,
)
from dp.filters import NEVER

ASK = {"unit": "article", "activity": "survey"}
_SLACK = 1 + Fraction(1, 10**9)


def rounded_up(cost: Fraction) -> int:
    return math.ceil(cost * 2**40 * _SLACK) + 1


def gaussian_price(lane: str, sigma: int) -> int:
    if lane == "delta":
        return 0
    if lane == "epsilon":
        return NEVER
    if lane == "mu_squared":
        return rounded_up(Fraction(1, sigma**2))
    return rounded_up(Fraction(int(lane), 2 * sigma**2))


def test_every_lane_grows_by_the_price_of_the_uses(accountant, location, totals_of):
    limits = accountant.budget("news").filter
    expected = [0] * len(limits.lanes)
    for sigma, uses in [(50, 1), (50, 7), (80, 30), (33, 2)]:
        accountant.charge("news", Gaussian(sigma), uses=uses, **ASK)
        for lane, name in enumerate(limits.lanes):
            cap = max(limits.limits[lane], -1) + 1
            expected[lane] += min(uses * gaussian_price(name, sigma), cap)
        assert totals_of(location, "news") == tuple(expected)


def test_pure_epsilons_add_up(accountant, location, totals_of):
    for epsilon in (1, 2, 1):
        accountant.charge("tips", PureDP(epsilon), **ASK)
    accountant.charge("tips", Laplace(4.0), uses=4, **ASK)
    expected = 2 * rounded_up(Fraction(1)) + rounded_up(Fraction(2))
    assert totals_of(location, "tips") == (expected + 4 * rounded_up(Fraction(1, 4)),)


def test_uses_cost_the_same_one_by_one_repeated_and_at_once(accountant, location, totals_of):
    budgets = ["single", "at-once", "repeated", "composed"]
    for name in budgets:
        accountant.create_budget(name, adaptive(3.0, 1e-6), unit="article")
    for _ in range(6):
        accountant.charge("single", Gaussian(50.0), **ASK)
    accountant.charge("at-once", Gaussian(50.0), uses=6, **ASK)
    accountant.charge("repeated", Repeated(Gaussian(50.0), 6), **ASK)
    accountant.charge("composed", Composed((Repeated(Gaussian(50.0), 2),) * 3), **ASK)
    lanes = accountant.budget("single").filter.lanes
    # A Gaussian has no pure epsilon: that lane is capped for each charge, and says no more.
    spent = [
        [
            total
            for lane, total in zip(lanes, totals_of(location, name), strict=True)
            if lane != "epsilon"
        ]
        for name in budgets
    ]
    assert spent[0][1] > 0
    assert all(row == spent[0] for row in spent)


def test_a_receipt_names_the_entry_that_is_stored(accountant, location, query):
    receipts = [accountant.charge("tips", PureDP(1.0), **ASK) for _ in range(3)]
    assert [receipt.seq for receipt in receipts] == [2, 3, 4]
    for receipt in receipts:
        stored = query(
            location,
            "SELECT digest FROM epsledger_entry WHERE budget = ? AND seq = ?",
            receipt.budget,
            receipt.seq,
        )
        assert stored == [(bytes.fromhex(receipt.digest),)]
        assert receipt.answer is None


def test_exactly_what_fits_is_admitted(accountant):
    # 10 / (1 + 1e-9) holds nine uses of epsilon 1: the slack of the prices costs the tenth.
    fitting = accountant.uses_that_fit("tips", PureDP(1.0))
    assert fitting == 9
    for _ in range(fitting):
        accountant.charge("tips", PureDP(1.0), **ASK)
    with pytest.raises(BudgetExceeded) as refusal:
        accountant.charge("tips", PureDP(1.0), **ASK)
    assert (refusal.value.budget, refusal.value.event) == ("tips", PureDP(1.0))
    assert (refusal.value.requested, refusal.value.remaining) == (1, 0)


def test_all_uses_of_a_charge_fit_or_none(accountant, location, totals_of):
    before = totals_of(location, "tips")
    with pytest.raises(BudgetExceeded) as refusal:
        accountant.charge("tips", PureDP(1.0), uses=10, **ASK)
    assert (refusal.value.requested, refusal.value.remaining) == (10, 9)
    assert totals_of(location, "tips") == before
    accountant.charge("tips", PureDP(1.0), uses=refusal.value.remaining, **ASK)


@pytest.mark.parametrize("event", [NonPrivate(), Composed((Gaussian(100.0), NonPrivate()))])
def test_what_has_no_guarantee_fits_nowhere(accountant, event):
    for budget in ("news", "tips"):
        with pytest.raises(BudgetExceeded) as refusal:
            accountant.charge(budget, event, **ASK)
        assert refusal.value.remaining == 0


def test_a_gaussian_does_not_fit_a_pure_budget(accountant):
    with pytest.raises(BudgetExceeded):
        accountant.charge("tips", Gaussian(1e6), **ASK)


def test_another_unit_or_relation_is_named_with_both_sides(accountant):
    replace = NeighboringRelation.REPLACE_ONE
    for unit, relation in [("author", "add_remove"), ("article", "replace_one")]:
        with pytest.raises(UnitMismatch) as error:
            accountant.charge(
                "news",
                Gaussian(50.0),
                unit=unit,
                relation=NeighboringRelation(relation),
                activity="x",
            )
        assert error.value.expected == ("article", NeighboringRelation.ADD_REMOVE)
        assert error.value.given == (unit, relation)
    accountant.create_budget("rows", adaptive(3.0, 1e-6, relation=replace), unit="article")
    with pytest.raises(UnitMismatch):
        accountant.charge("rows", Gaussian(50.0), **ASK)
    assert accountant.charge("rows", Gaussian(50.0), relation=replace, **ASK).seq == 2


def test_a_name_is_taken_for_ever(accountant):
    accountant.charge("news", Gaussian(50.0), **ASK)
    before = accountant.statement("news")
    for filter in (adaptive(3.0, 1e-6), adaptive(300.0, 1e-6)):
        with pytest.raises(BudgetExists) as error:
            accountant.create_budget("news", filter, unit="article")
        assert error.value.budget == "news"
    assert accountant.statement("news") == before
    assert accountant.budgets() == ["news", "tips"]


def test_an_unknown_budget_is_named(accountant):
    reads = [accountant.statement, accountant.budget]
    for read in reads:
        with pytest.raises(UnknownBudget) as error:
            read("absent")
        assert error.value.budget == "absent"
    with pytest.raises(UnknownBudget):
        accountant.uses_that_fit("absent", Gaussian(50.0))


def test_planning_spends_nothing_and_is_exact(accountant, location, digest_of):
    accountant.charge("news", Gaussian(50.0), uses=100, **ASK)
    before = digest_of(location)
    fitting = accountant.uses_that_fit("news", Gaussian(40.0))
    sigma = accountant.smallest_noise("news", Gaussian, uses=200)
    share = accountant.share_after("news", [(Gaussian(40.0), fitting)])
    assert digest_of(location) == before
    assert 0.99 < share <= 1
    assert accountant.share_after("news", [(Gaussian(40.0), fitting + 1)]) is None
    assert accountant.uses_that_fit("news", Gaussian(sigma)) >= 200
    assert accountant.uses_that_fit("news", Gaussian(sigma * (1 - 1e-4))) < 200
    with pytest.raises(BudgetExceeded):
        accountant.charge("news", Gaussian(40.0), uses=fitting + 1, **ASK)
    accountant.charge("news", Gaussian(40.0), uses=fitting, **ASK)


def test_a_budgets_prices_are_frozen_when_first_stored(accountant, location, query, totals_of):
    """A version whose formula got cheaper or dearer still charges the old price to this budget."""
    accountant.charge("tips", PureDP(1.0), **ASK)
    (before,) = totals_of(location, "tips")
    accountant.close()
    query(location, "DROP TRIGGER epsledger_event_update")
    dearer = (2 * before).to_bytes(16, "little")
    query(location, "UPDATE epsledger_event SET price = ? WHERE budget = 'tips'", dearer)
    with Accountant.open(location) as reopened:
        reopened.charge("tips", PureDP(1.0), **ASK)
        reopened.charge("tips", PureDP(2.0), **ASK)
    # the stored price for the first event, a fresh one for the second
    assert totals_of(location, "tips") == (3 * before + rounded_up(Fraction(2)),)
