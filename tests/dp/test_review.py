"""What reviews of the mathematics found, each as a test that failed before."""

from __future__ import annotations

import dataclasses
import math

import pytest
from mpmath import mp, mpf

from dp import (
    ApproximateDP,
    DiscreteGaussian,
    Gaussian,
    InvalidParameter,
    Laplace,
    NeighboringRelation,
    NothingFits,
    PoissonSampled,
    PureDP,
    RandomizedResponse,
    UnsupportedEvent,
    adaptive,
    planned,
    pure,
    smallest_noise,
)
from dp.accountings import limits_hold
from dp.conversions import gaussian_delta_above, gaussian_epsilon
from dp.costs import cost
from dp.filters import Filter
from dp.pld import largest_count
from dp.readings import if_fixed, lifetime_power
from dp.validate import MAX_COUNT

ADD_REMOVE, REPLACE_ONE = NeighboringRelation.ADD_REMOVE, NeighboringRelation.REPLACE_ONE


def test_shares_above_one_that_others_make_up_for_are_no_budget() -> None:
    honest = adaptive(8.0, 1e-6)
    weights = (-1000.0, 0.0) + (50.0,) * (len(honest.lanes) - 2)
    forged = dataclasses.replace(honest, weights=weights)
    with pytest.raises(InvalidParameter, match="weights"):
        Filter.from_record(forged.to_record())


@pytest.mark.parametrize("k", [2, 3, 10])
@pytest.mark.parametrize("epsilon", [1.0, 22.0, 25.0, 30.0, 34.0, 36.7, 37.4, 40.0])
def test_the_mu_of_a_response_that_is_nearly_always_true(epsilon: float, k: int) -> None:
    event = RandomizedResponse(epsilon, k)
    with mp.workdps(60):
        whole = mp.e ** mpf(epsilon) + k - 1
        # Phi^-1(p) = -sqrt(2) erfinv(1 - 2p), with both tails exact in 60 digits.
        lie, untrue = 1 / whole, (k - 1) / whole
        exact = mp.sqrt(2) * (mp.erfinv(1 - 2 * untrue) + mp.erfinv(1 - 2 * lie))
        exact = min(exact, 2 * mp.sqrt(2) * mp.erfinv(1 - 2 / (1 + mp.e ** mpf(epsilon))))
    priced = math.sqrt(cost(event, REPLACE_ONE).mu_squared)
    assert priced >= exact * (1 - mpf(10) ** -13)
    assert priced <= exact * (1 + mpf(10) ** -9)


@pytest.mark.parametrize("budget", [pure(1.0), adaptive(1.0, 1e-6)])
def test_a_delta_too_small_for_a_double_is_still_a_delta(budget: Filter) -> None:
    event = PoissonSampled(1e-200, ApproximateDP(0.1, 1e-200))
    totals = (0,) * len(budget.limits)
    if budget.accounting == "pure":
        assert not budget.admits(budget.after(totals, budget.price(event), 1))
    else:
        assert budget.price(event)[0] > 0


def test_a_count_that_is_returned_was_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 10**9 < largest_count(PureDP(1e-20), ADD_REMOVE, 10.0, 1e-6) < MAX_COUNT
    asked = []

    def compose(slots, _):
        asked.append(slots[0][1])
        return _Losses(1e-9 if asked[-1] < MAX_COUNT else 1.0)

    monkeypatch.setattr("dp.pld.compose", compose)
    found = largest_count(PureDP(1e-3), ADD_REMOVE, 10.0, 1e-6)
    assert found in asked
    assert found < MAX_COUNT
    monkeypatch.undo()
    monkeypatch.setattr("dp.validate.MAX_COUNT", 1000)
    assert largest_count(PureDP(1e-9), ADD_REMOVE, 10.0, 1e-6) == 1000


class _Losses:
    def __init__(self, value: float) -> None:
        self._value = value

    def delta(self, _: float) -> float:
        return self._value


@pytest.mark.parametrize("expect", [DiscreteGaussian(1e200), PureDP(1e-200)])
def test_an_expected_event_that_costs_nothing(expect) -> None:
    assert limits_hold(adaptive(1.0, 1e-6, expect=expect))


def test_an_expected_event_that_is_too_wide_to_search_far() -> None:
    budget = adaptive(1e5, 1e-6, expect=PoissonSampled(0.1, Gaussian(0.8)))
    assert limits_hold(budget)


@pytest.mark.parametrize(
    "slot",
    [
        (PoissonSampled(1e-17, PureDP(50.0)), 2**53 - 1),
        (PoissonSampled(1e-17, Laplace(0.02)), 10**12),
    ],
)
def test_a_plan_beyond_what_can_be_computed(slot) -> None:
    with pytest.raises((NothingFits, InvalidParameter)):
        planned(8.0, 1e-6, slots=[slot])


@pytest.mark.parametrize("epsilon", [1e-6, 1e6])
def test_the_power_against_budgets_at_the_ends_of_the_range(epsilon: float) -> None:
    assert 0.0 < lifetime_power(adaptive(epsilon, 1e-6), false_positive_rate=0.01) <= 1.0


@pytest.mark.parametrize("delta", [math.nan, 2.0, -1.0])
def test_a_log_at_a_delta_that_is_none(delta: float) -> None:
    with pytest.raises(InvalidParameter):
        if_fixed([(Gaussian(50.0), 3)], delta, ADD_REMOVE)


def test_the_noise_of_a_slot_is_found() -> None:
    budget = planned(1.0, 1e-6, slots=[(PoissonSampled(0.01, Gaussian(1.0)), 60)])
    totals = (0,) * len(budget.limits)

    def step(noise: float) -> PoissonSampled:
        return PoissonSampled(0.01, Gaussian(noise))

    assert smallest_noise(budget, totals, step, uses=50) == 1.0
    with pytest.raises(NothingFits):
        smallest_noise(budget, totals, step, uses=61)
    plain = planned(8.0, 1e-6, slots=[(Gaussian(40.0), 60)])
    totals = (0,) * len(plain.limits)
    assert smallest_noise(plain, totals, Gaussian, uses=50) < 40.0


@pytest.mark.parametrize(("epsilon", "mu"), [(1.246e-6, 1.772e-7), (1e-5, 1e-6), (3.0, 0.5)])
def test_a_delta_to_report_is_not_below_the_exact_one(epsilon: float, mu: float) -> None:
    with mp.workdps(60):
        e, m = mpf(epsilon), mpf(mu)
        exact = mp.ncdf(-e / m + m / 2) - mp.e**e * mp.ncdf(-e / m - m / 2)
    assert gaussian_delta_above(epsilon, mu) >= exact
    assert gaussian_epsilon(mu, float(exact) * (1 - 1e-15)) >= epsilon * (1 - 1e-15)


@pytest.mark.parametrize("accounting", ["pure", "adaptive"])
def test_a_record_with_slots_where_none_are_counted(accounting: str) -> None:
    budget = pure(1.0) if accounting == "pure" else adaptive(1.0, 1e-6)
    record = budget.to_record()
    slots = planned(1.0, 1e-6, slots=[(Gaussian(90.0), 1), (Gaussian(95.0), 1)]).to_record()[
        "slots"
    ]
    record["slots"] = slots
    with pytest.raises(InvalidParameter):
        Filter.from_record(record)


def test_what_has_no_row_stays_refused() -> None:
    with pytest.raises(UnsupportedEvent):
        cost(PoissonSampled(0.1, RandomizedResponse(1.0, 3)), REPLACE_ONE)
