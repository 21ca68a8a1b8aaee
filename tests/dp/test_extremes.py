"""Parameters at the ends of their domains: a price or a named error, never something else.

What does not hold yet is marked with its reason; nothing here admits what it should not.
"""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from mpmath import mp, mpf

from dp import (
    Composed,
    Event,
    Gaussian,
    InvalidParameter,
    Laplace,
    NothingFits,
    PoissonSampled,
    PureDP,
    Repeated,
    UnsupportedEvent,
    adaptive,
    pure,
    smallest_noise,
)
from dp.accountings import limits_hold
from dp.codec import decode, encode
from dp.conversions import gaussian_mu
from dp.errors import DPError, MalformedEvent
from dp.events import canonical
from dp.filters import NEVER, Filter
from dp.sampling import gaussian
from dp.validate import MAX_COUNT
from tests.dp import oracles

BUDGET = adaptive(8.0, 1e-6)
WITHOUT_DELTA = {name: BUDGET.to_record()[name][1:] for name in ("lanes", "weights", "limits")}


def assert_nothing_fits(event: Event) -> None:
    price = BUDGET.price(event)
    assert not BUDGET.admits(BUDGET.charge((), price, 1))
    assert BUDGET.uses_that_fit((0,) * len(price), price) == 0
    assert pure(8.0).price(event)[0] > pure(8.0).limits[0]


@pytest.mark.parametrize(
    "sigma",
    [2.3e-308, 1e-300, 1e-200, 1e-160, 1e-155, 1e-154, 1e-150, 1e-100, 1e-20],
)
@pytest.mark.parametrize(
    "build",
    [
        Gaussian,
        lambda s: Repeated(Gaussian(s), MAX_COUNT),
        lambda s: PoissonSampled(0.5, Gaussian(s)),
        lambda s: PoissonSampled(0.5, Composed((Gaussian(s), Gaussian(1.1 * s)))),
    ],
)
def test_a_gaussian_of_next_to_no_noise(build, sigma: float) -> None:
    assert_nothing_fits(build(sigma))


@pytest.mark.parametrize("epsilon", [1.7e308, 1e307, 1e300, 1e290, 1e200, 1e100, 1e20, 1e3])
@pytest.mark.parametrize(
    "build",
    [
        PureDP,
        lambda e: Laplace(1 / min(e, 4e307)),
        lambda e: Repeated(PureDP(e), MAX_COUNT),
        lambda e: PoissonSampled(0.5, PureDP(e)),
        lambda e: PoissonSampled(0.5, Composed((PureDP(e / 2), PureDP(e / 4)))),
    ],
)
def test_pure_dp_of_next_to_no_noise(build, epsilon: float) -> None:
    assert_nothing_fits(build(epsilon))


@pytest.mark.parametrize("size", [1e15, 1e16, 1e17, 1e20, 1e100, 1e150, 1e300, 1.7e308])
@pytest.mark.parametrize(
    "build",
    [
        Gaussian,
        lambda s: PureDP(max(1 / s, 2.3e-308)),
        lambda s: PoissonSampled(0.5, Gaussian(s)),
        lambda s: PoissonSampled(0.5, Laplace(s)),
        lambda s: PoissonSampled(1e-300, Composed((Gaussian(s), Gaussian(s)))),
    ],
)
def test_next_to_nothing_costs_a_unit_or_two(build, size: float) -> None:
    assert_costs_a_unit_or_two(build(size))


@pytest.mark.parametrize("scale", [1e12, 1e14, 1e16, 1e17, 1e20, 1e100, 1e300, 1.7e308])
def test_laplace_of_next_to_nothing(scale: float) -> None:
    assert_costs_a_unit_or_two(Laplace(scale))


def assert_costs_a_unit_or_two(event: Event) -> None:
    prices = dict(zip(BUDGET.lanes, BUDGET.price(event), strict=True))
    assert all(1 <= prices[lane] <= 3 for lane in BUDGET.lanes if lane.isdigit())


@pytest.mark.parametrize(
    "expect",
    [
        PoissonSampled(1.0, Gaussian(50.0)),
        Composed((Gaussian(1e-154), Gaussian(1.1e-154))),
        PoissonSampled(1e-7, Gaussian(1e200)),
        PoissonSampled(1e-7, PureDP(1e-200)),
        Gaussian(1e200),
        Repeated(Gaussian(50.0), MAX_COUNT),
    ],
    ids=repr,
)
def test_an_expected_workload_may_be_extreme(expect: Event) -> None:
    budget = adaptive(8.0, 1e-6, expect=expect)
    assert limits_hold(budget)
    assert budget.uses_that_fit((0,) * len(budget.limits), budget.price(Gaussian(50.0))) > 1000


def test_certain_sampling_expects_the_same_as_none() -> None:
    once = adaptive(8.0, 1e-6, expect=Gaussian(50.0))
    assert adaptive(8.0, 1e-6, expect=PoissonSampled(1.0, Gaussian(50.0))) == once


def test_equal_canonical_forms_have_one_price() -> None:
    """The contract of dp.events, for a pair of which only one member was ever written down."""
    pair = Composed((Gaussian(1.0), Laplace(1.0)))
    certain = PoissonSampled(1.0, pair)
    assert canonical(certain) == canonical(pair)
    assert BUDGET.price(certain) == BUDGET.price(pair)


def test_every_event_has_a_canonical_form() -> None:
    """Merging equal parts puts a Repeated around them: one level more than was written."""
    event: Event = PureDP(0.1)
    for level in range(7):
        event = PoissonSampled(0.5, Composed((event, event, PureDP(0.2 + level))))
    assert decode(encode(event)) == canonical(event)


@pytest.mark.parametrize("value", ["Gaussian", None, 1.0, b"{}"], ids=repr)
def test_pricing_what_is_no_event(value) -> None:
    with pytest.raises(DPError):
        BUDGET.price(value)


@pytest.mark.parametrize("value", [5, None, Gaussian(1.0)], ids=repr)
def test_composing_what_is_no_sequence(value) -> None:
    with pytest.raises(InvalidParameter):
        Composed(value)


def test_a_sample_of_laplace_is_never_dearer_than_all() -> None:
    whole = BUDGET.price(Laplace(0.5))
    sample = BUDGET.price(PoissonSampled(0.75, Laplace(0.5)))
    assert all(a <= b for a, b in zip(sample, whole, strict=True))


@pytest.mark.parametrize("delta", [1.0, 2.0, 300.0])
def test_gaussian_mu_of_no_probability(delta: float) -> None:
    with pytest.raises(InvalidParameter):
        gaussian_mu(1.0, delta)


@pytest.mark.parametrize(
    "changed",
    [
        {"delta": float("nan")},
        {"epsilon": 1e9},
        {"epsilon": float("nan")},
        {"weights": [float("nan")] * 19},
        {"delta": 300.0},
        {"delta": 0.5},
        {"delta": 1.5},
        {"weights": [0.0, 0.0, 0.3, *[0.0] * 16]},
        {"limits": ["1"]},
        {"lanes": [], "weights": [], "limits": []},
        {"lanes": ["delta"] * 19},
        {"lanes": ["1", *BUDGET.lanes[1:]]},
        WITHOUT_DELTA,
    ],
    ids="-".join,
)
def test_a_damaged_record_does_not_hold(changed: dict[str, object]) -> None:
    """Refused when it is read or when it is checked, by an error of dp or by False."""
    try:
        held = limits_hold(Filter.from_record(BUDGET.to_record() | changed))
    except DPError:
        return
    assert not held


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"accounting": "pure", "version": 1},
        {"accounting": [], "version": 1},
        BUDGET.to_record() | {"relation": "replace"},
        BUDGET.to_record() | {"limits": ["x"] * 19},
        BUDGET.to_record() | {"limits": [1.9] * 19},
    ],
    ids=lambda record: repr(record)[:40],
)
def test_an_unreadable_record(record: dict[str, object]) -> None:
    with pytest.raises(DPError):
        Filter.from_record(record)


@pytest.mark.parametrize(
    "target",
    [(1e-3, 1e-15), (1e-4, 1e-15), (1e-6, 1e-15), (1e-5, 1e-6), (1e-4, 1e-9), (1e-3, 1e-7)],
)
def test_gaussian_mu_at_small_epsilons(target: tuple[float, float]) -> None:
    epsilon, delta = target
    with mp.workdps(60):
        assert oracles.gaussian_delta(epsilon, gaussian_mu(epsilon, delta)) <= delta


@pytest.mark.parametrize("delta", [1e-15, 1e-11, 1e-7, 1e-6, 1e-3, 0.1])
@pytest.mark.parametrize("epsilon", [1e-6, 1e-5, 1e-4, 1e-3, 0.1, 1e6])
def test_the_limit_on_mu_squared_is_safe_all_the_same(epsilon: float, delta: float) -> None:
    budget = adaptive(epsilon, delta)
    lane = budget.lanes.index("mu_squared")
    if budget.limits[lane] > 0:
        with mp.workdps(60):
            mu = mp.sqrt(mpf(budget.limits[lane]) / 2**40)
            spent = oracles.gaussian_delta(epsilon, mu)
            assert spent <= budget.weights[lane] * mpf(delta) * (1 - mpf(1) / 100)


@pytest.mark.parametrize(
    "error",
    [
        InvalidParameter("epsilon", 0, "positive"),
        UnsupportedEvent(Gaussian(1.0), "no price"),
        MalformedEvent("not JSON"),
        NothingFits("10 uses"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_cross_processes(error: DPError) -> None:
    again = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert str(again) == str(error)
    assert vars(again) == vars(error)


@pytest.mark.parametrize("at_most", [1e-4, 1e-3])
def test_the_smallest_noise_is_within_what_was_asked(at_most: float) -> None:
    budget = adaptive(1e6, 0.1)
    totals = (0,) * len(budget.limits)
    try:
        noise = smallest_noise(budget, totals, Laplace, uses=1, at_most=at_most)
    except NothingFits:
        return
    assert noise <= at_most


def test_the_smallest_noise_may_be_below_a_thousandth() -> None:
    """A scale of 1e-6 is epsilon 1e6: the documented precision is 1e-6 of the smallest."""
    budget = pure(1e6)
    noise = smallest_noise(budget, (0,), Laplace, uses=1)
    assert budget.uses_that_fit((0,), budget.price(Laplace(noise * (1 - 2e-6)))) < 1


def test_uses_that_fit_can_be_asked_for() -> None:
    budget = pure(1e6)
    assert budget.uses_that_fit((0,), budget.price(PureDP(1e-300))) <= MAX_COUNT


def test_a_price_is_one_of_the_integers_that_pack() -> None:
    price = BUDGET.price(Repeated(Gaussian(1e-200), MAX_COUNT))
    assert max(price) <= NEVER * MAX_COUNT
    assert max(BUDGET.charge((), price, MAX_COUNT)) < 2**64


def test_noise_at_the_top_of_the_range_is_finite() -> None:
    assert np.isfinite(gaussian(10_000, 1e300)).all()
