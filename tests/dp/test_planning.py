"""What-if: the same integers as enforcement, and nothing is spent."""

from __future__ import annotations

import pytest

from dp import (
    Filter,
    Gaussian,
    InvalidParameter,
    Laplace,
    MalformedEvent,
    NeighboringRelation,
    PoissonSampled,
    PureDP,
    ShuffledEpoch,
    UnsupportedEvent,
    adaptive,
    after,
    frontier,
    planned,
    pure,
    steps_that_fit,
    uses_that_fit,
)
from dp.accountings import merged
from dp.codec import read_event
from dp.mechanisms import BandedMatrixFactorization
from dp.pld import compose, largest_mu

STEP = PoissonSampled(0.01, Gaussian(1.0))
BUDGETS = [
    pure(3.0),
    adaptive(8.0, 1e-6),
    adaptive(3.0, 1e-6, expect=STEP),
    planned(8.0, 1e-6, slots=[(STEP, 200), (Laplace(20.0), 30)]),
]


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_after_is_charging_one_by_one(budget: Filter) -> None:
    events = [(Laplace(20.0), 12), (PureDP(0.01), 3), (Laplace(20.0), 25)]
    totals = (0,) * len(budget.limits)
    for event, uses in events:
        for _ in range(uses):
            totals = budget.after(totals, budget.price(event), 1)
    at_once = after(budget, (0,) * len(totals), events)
    for one, many, limit in zip(at_once, totals, budget.limits, strict=True):
        assert one == many or min(one, many) > limit  # lanes above their limits are capped
    left = uses_that_fit(budget, totals, Laplace(20.0))
    assert after(budget, totals, [(Laplace(20.0), left)]) is not None
    assert after(budget, totals, [(Laplace(20.0), left), (Laplace(20.0), 1)]) is None
    with pytest.raises(InvalidParameter, match="uses"):
        after(budget, totals, [(Laplace(20.0), 0)])


@pytest.mark.parametrize("budget", BUDGETS[1:], ids=str)
def test_steps_and_frontier_are_uses_that_fit(budget: Filter) -> None:
    zero = (0,) * len(budget.limits)
    steps = steps_that_fit(budget, zero, sampling_probability=0.01, noise_multiplier=1.0)
    assert steps == uses_that_fit(budget, zero, STEP) > 100
    curve = frontier(budget, zero, Gaussian, [10.0, 20.0, 40.0])
    assert curve == tuple((s, uses_that_fit(budget, zero, Gaussian(s))) for s in (10.0, 20.0, 40.0))
    assert curve[0][1] < curve[1][1] < curve[2][1]


@pytest.mark.parametrize("coefficients", [(), [], (0.0, 1.0), (1.0,) * 4097, "ab", 3, ("x",)])
def test_coefficients_that_are_none(coefficients) -> None:
    with pytest.raises(InvalidParameter, match="coefficients"):
        BandedMatrixFactorization(1.0, coefficients, 1)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "3", '{"kind": "Gauss"}'])
def test_events_that_nobody_can_read(text: str) -> None:
    with pytest.raises(MalformedEvent):
        read_event(text)


def test_slots_merge_and_split() -> None:
    pair = read_event(
        '{"kind": "Composed", "events": [{"kind": "PureDP", "epsilon": 1},'
        ' {"kind": "Repeated", "count": 2, "event": {"kind": "Laplace", "noise_multiplier": 9}}]}'
    )
    assert dict(merged([(pair, 3), (Laplace(9.0), 1)])) == {Laplace(9.0): 7, PureDP(1.0): 3}


def test_what_is_expected_may_have_no_counted_witness() -> None:
    """Then the shares go to an order, or to mu squared, as without a witness of its own."""
    wide = PureDP(1e5)  # its losses do not fit the grid
    for expect in (wide, Gaussian(50.0), PoissonSampled(0.5, PureDP(1e5))):
        assert adaptive(1.0, 1e-6, expect=expect).slots == ()
    assert adaptive(1.0, 1e-9, expect=STEP).slots == ()  # below the FFT's rounding
    assert adaptive(1.0, 1e-6, expect=Laplace(9.0)).slots == (Laplace(9.0),)


def test_an_epoch_is_its_event() -> None:
    replace = NeighboringRelation.REPLACE_ONE
    epoch, zero = ShuffledEpoch(Gaussian(5.0)), (0, 0)
    shuffled = planned(4.0, 1e-6, slots=[(epoch, 3)], relation=replace)
    plain = planned(4.0, 1e-6, slots=[(Gaussian(5.0), 3)], relation=replace)
    assert shuffled.limits == plain.limits
    assert uses_that_fit(shuffled, zero, Gaussian(50.0)) == uses_that_fit(
        plain, zero, Gaussian(50.0)
    )
    with pytest.raises(UnsupportedEvent):
        planned(4.0, 1e-6, slots=[(epoch, 3)])


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_a_part_of_a_contribution_is_that_of_fewer_uses(budget: Filter) -> None:
    zero, price = (0,) * len(budget.limits), budget.price(Laplace(20.0))
    charged = budget.charge(zero, price, 40)
    for uses in (0, 7, 31, 40):
        assert budget.part(charged, price, uses) == budget.charge(zero, price, uses)


def test_a_plan_that_leaves_nothing() -> None:
    losses = compose(((STEP, 1000),), NeighboringRelation.ADD_REMOVE)
    assert largest_mu(losses, 2.0, losses.delta(2.0) * (1 + 1e-12)) == 0.0
