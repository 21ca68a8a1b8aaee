"""Every price against the Renyi divergence of explicit output distributions, both directions.

The oracles integrate or sum the definition at 40 digits; none shares a formula with dp/costs.py.
"""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from dp_accounting import rdp
from dp_accounting.dp_event import GaussianDpEvent, PoissonSampledDpEvent
from mpmath import mp, mpf

from dp import (
    ZCDP,
    ApproximateDP,
    Composed,
    Event,
    Gaussian,
    InvalidParameter,
    Laplace,
    NeighboringRelation,
    NonPrivate,
    PoissonSampled,
    PureDP,
    Repeated,
    TreeAggregation,
    UnsupportedEvent,
    adaptive,
    pure,
)
from dp.conversions import pure_mu
from dp.costs import cost
from dp.filters import NEVER, ORDERS
from tests.dp import oracles

RELATIVE, ABSOLUTE = 1e-10, 2.0**-41
"""What dp/costs.py promises of a real-valued cost: one or the other."""

UNIT = 2**40


def renyi(event: Event, order: int) -> float:
    return cost(event).renyi(order)


def mu_squared(event: Event) -> float:
    return cost(event).mu_squared


def pure_epsilon(event: Event) -> float:
    return cost(event).epsilon


@pytest.fixture(autouse=True)
def _forty_digits():
    with mp.workdps(40):
        yield


def assert_close(computed: float, exact: mpf) -> None:
    assert abs(mpf(computed) - exact) <= max(RELATIVE * exact, mpf(ABSOLUTE))


def assert_price_covers(event: Event, order: int, exact: mpf) -> None:
    """An integer price is at or above the truth, and above it by 2e-9 of it and 3 units at most."""
    budget = adaptive(8.0, 1e-6)
    price = budget.price(event)[budget.lanes.index(str(order))]
    assert exact * UNIT <= price <= exact * UNIT * (1 + 2e-9) + 3


@pytest.mark.parametrize("order", [2, 8, 64])
@pytest.mark.parametrize("sigma", [0.1, 0.5, 0.9, 1.0, 2.5, 50.0, 1e3, 1e6])
def test_gaussian(sigma: float, order: int) -> None:
    exact = oracles.gaussian_both_ways(sigma, order)
    assert_close(renyi(Gaussian(sigma), order), exact)
    assert_price_covers(Gaussian(sigma), order, exact)


@pytest.mark.parametrize("order", [2, 3, 16, 64])
@pytest.mark.parametrize("scale", [1e9, 1e6, 1e3, 100.0, 64.0, 10.0, 2.0, 1.0, 0.2, 0.01, 1 / 750])
def test_laplace(scale: float, order: int) -> None:
    exact = oracles.laplace_both_ways(scale, order)
    assert_close(renyi(Laplace(scale), order), exact)
    assert_price_covers(Laplace(scale), order, exact)


@pytest.mark.parametrize("order", [2, 3, 16, 64])
@pytest.mark.parametrize(
    "epsilon", [1e-9, 1e-6, 1e-3, 1 / 64, 0.1, 0.5, 1.0, 2.0, 8.0, 40.0, 699.9, 710.0, 1e5]
)
def test_randomized_response(epsilon: float, order: int) -> None:
    exact = oracles.both_ways(*oracles.randomized_response(epsilon), order)
    assert_close(renyi(PureDP(epsilon), order), exact)
    assert_price_covers(PureDP(epsilon), order, exact)


@pytest.mark.parametrize("order", [2, 5, 24])
@pytest.mark.parametrize("epsilon", [1e-3, 0.7, 3.0, 20.0])
def test_randomized_response_is_the_dearest_of_its_epsilon(epsilon: float, order: int) -> None:
    price = mpf(renyi(PureDP(epsilon), order)) * (1 + mpf(RELATIVE))
    with mp.workdps(40):
        for k in (3, 10, 1000):  # k-ary randomized response
            other = 1 / (mp.exp(epsilon) + k - 1)
            p = [mp.exp(epsilon) * other, other, (k - 2) * other]
            q = [other, mp.exp(epsilon) * other, (k - 2) * other]
            assert oracles.both_ways(p, q, order) < price
        assert oracles.laplace_both_ways(1 / mpf(epsilon), order) < price


SAMPLED = [
    (0.01, 1.0, 2),
    (0.01, 1.0, 6),
    (0.01, 1.0, 32),
    (0.01, 0.6, 3),
    (0.01, 0.6, 16),
    (0.001, 0.8, 4),
    (0.001, 0.8, 10),
    (0.04, 1.5, 5),
    (0.04, 1.5, 20),
    (0.04, 1.5, 64),
    (0.5, 2.0, 3),
    (0.5, 2.0, 48),
    (0.5, 20.0, 8),
    (0.9, 0.3, 5),
    (0.99, 5.0, 7),
    (0.999, 1.0, 64),
    (1e-4, 50.0, 2),
    (1e-4, 0.5, 2),
    (1e-4, 0.5, 12),
    (0.25, 1e3, 24),
    # extremes
    (1e-7, 0.1, 2),
    (1e-7, 0.1, 64),
    (1e-7, 0.3, 14),
    (1e-7, 0.7, 64),
    (1e-7, 1e3, 2),
    (0.999, 0.1, 64),
    (1 - 2**-53, 0.7, 64),
    (1e-12, 1.0, 64),
]


@pytest.mark.parametrize(("q", "sigma", "order"), SAMPLED)
def test_sampled_gaussian(q: float, sigma: float, order: int) -> None:
    up, down = oracles.sampled_gaussian_both_ways(q, sigma, order)
    assert down <= up * (1 + mpf(10) ** -15)  # adding is the dearer direction; checked, not assumed
    event = PoissonSampled(q, Gaussian(sigma))
    assert_close(renyi(event, order), max(up, down))
    assert_price_covers(event, order, max(up, down))


@pytest.mark.parametrize(("q", "sigma", "order"), SAMPLED[:21])
def test_sampled_gaussian_as_dp_accounting(q: float, sigma: float, order: int) -> None:
    accountant = rdp.RdpAccountant(orders=[order])
    accountant.compose(PoissonSampledDpEvent(q, GaussianDpEvent(sigma)))
    theirs = float(accountant._rdp[0])
    ours = renyi(PoissonSampled(q, Gaussian(sigma)), order)
    # dp_accounting's own rounding is 9e-9 of the price at q = 1e-7 (gate review, row "rounding").
    assert ours == pytest.approx(theirs, rel=2e-8, abs=1e-15)


@pytest.mark.parametrize("order", [2, 5, 16])
@pytest.mark.parametrize(
    ("q", "sigmas"), [(0.01, (1.0, 2.0)), (0.2, (3.0, 3.0, 3.0)), (1e-3, (0.9, 4.0, 7.0, 7.0))]
)
def test_gaussians_on_one_sample(q: float, sigmas: tuple[float, ...], order: int) -> None:
    """On the line through both means the joint output is one mixture; its scale from |mean|."""
    event = PoissonSampled(q, Composed(tuple(map(Gaussian, sigmas))))
    distance = mp.sqrt(mp.fsum(1 / mpf(sigma) ** 2 for sigma in sigmas))
    exact = max(oracles.sampled_gaussian_both_ways(q, 1 / distance, order))
    assert_close(renyi(event, order), exact)
    assert_price_covers(event, order, exact)
    separate = math.fsum(renyi(PoissonSampled(q, Gaussian(s)), order) for s in sigmas)
    assert renyi(event, order) > separate  # the reason why a sample serves one event


def test_two_gaussians_on_one_sample_by_a_double_integral() -> None:
    """Without the rotation: a two-dimensional grid over both outputs."""
    q, first, second, order = mpf("0.1"), mpf(1), mpf(2), 4
    one, two = oracles.normal_log(0, first), oracles.normal_log(0, second)
    step = mpf(1) / 2
    total = mp.fsum(
        mp.exp(one(x) + two(y))
        * (1 - q + q * mp.exp((2 * x - 1) / (2 * first**2) + (2 * y - 1) / (2 * second**2)))
        ** order
        for x in mp.arange(-10, 14, step * first)
        for y in mp.arange(-20, 24, step * second)
    )
    exact = mp.log(total * step * first * step * second) / (order - 1)
    event = PoissonSampled(float(q), Composed((Gaussian(1.0), Gaussian(2.0))))
    assert_close(renyi(event, order), exact)


def sampled_response(q: float, epsilon: float) -> tuple[list[mpf], list[mpf]]:
    """Explicit outputs with and without the unit: (1 - q) RR of 0 + q RR of 1, against RR of 0."""
    zero, one = oracles.randomized_response(epsilon)
    mixed = [(1 - mpf(q)) * a + mpf(q) * b for a, b in zip(zero, one, strict=True)]
    return mixed, zero


SAMPLED_PURE = [
    (q, epsilon)
    for q in (1e-7, 1e-3, 0.1, 0.5, 0.99)
    for epsilon in (1e-9, 1e-3, 0.5, 1.0, 4.0, 30.0, 690.0, 705.0)
]


@pytest.mark.parametrize(("q", "epsilon"), SAMPLED_PURE)
def test_sampled_pure_dp(q: float, epsilon: float) -> None:
    event = PoissonSampled(q, PureDP(epsilon))
    with mp.workdps(350):  # 1 - (1 - q) - q exp(-705) must keep digits
        p, r = sampled_response(q, epsilon)
        loss = oracles.largest_loss(p, r)
        price = mpf(pure_epsilon(event))
        assert price >= loss * (1 - mpf(RELATIVE)) - mpf(ABSOLUTE)
        if epsilon < 700:  # amplification is tight: the loss is reached
            assert_close(pure_epsilon(event), loss)
        (integer,) = pure(1.0).price(event)
        assert integer >= loss * UNIT
        for order in (2, 8, 64):
            exact = oracles.both_ways(p, r, order)
            assert_close(renyi(event, order), exact)
            assert_price_covers(event, order, exact)


def test_sampled_repeated_pure_dp_against_the_joint_outputs() -> None:
    """Three responses on one sample: eight outcomes, mixed over the sample, not one by one."""
    q, epsilon = mpf("0.2"), mpf("0.7")
    zero, one = oracles.randomized_response(epsilon)
    joint_zero = [a * b * c for a in zero for b in zero for c in zero]
    joint_one = [a * b * c for a in one for b in one for c in one]
    mixed = [(1 - q) * a + q * b for a, b in zip(joint_zero, joint_one, strict=True)]
    event = PoissonSampled(0.2, Repeated(PureDP(0.7), 3))
    assert_close(pure_epsilon(event), oracles.largest_loss(mixed, joint_zero))
    for order in (2, 3, 8, 64):
        assert_close(renyi(event, order), oracles.both_ways(mixed, joint_zero, order))


@pytest.mark.parametrize("epsilon", [1e-3, 0.05, 0.5, 1.0, 2.5, 8.0, 30.0, 100.0, 600.0])
def test_pure_mu_is_the_smallest_that_covers(epsilon: float) -> None:
    """Both curves are convex and meet the axes alike: the response's kink decides."""
    with mp.workdps(320 if epsilon > 100 else 60):
        kink = 1 / (1 + mp.exp(mpf(epsilon)))
        # Type II error k at level k <=> the quantile of k sits half-way: G_mu(k) = k.
        exact = 2 * mp.findroot(
            lambda x: mp.log(mp.erfc(x / mp.sqrt(2)) / 2) - mp.log(kink),
            max(1e-3, pure_mu(epsilon) / 2),
        )
        assert abs(pure_mu(epsilon) / exact - 1) <= 1e-9 or pure_mu(epsilon) < 1e-6
    with mp.workdps(50):
        if epsilon <= 30:
            allowed = mpf(pure_mu(epsilon)) * (1 + mpf(10) ** -11)
            assert oracles.gaussian_tradeoff(kink, allowed) <= kink
            # control: a mu that is 1e-6 smaller leaves the kink under its curve
            assert oracles.gaussian_tradeoff(kink, allowed * (1 - mpf(10) ** -6)) > kink


@pytest.mark.parametrize("epsilon", [0.05, 1.0, 4.0])
def test_the_whole_response_curve_lies_above(epsilon: float) -> None:
    kink = 1 / (1 + mp.exp(mpf(epsilon)))
    mu = mpf(pure_mu(epsilon)) * (1 + mpf(10) ** -11)
    for step in range(1, 100):
        alpha = mpf(step) / 100
        curve = max(1 - mp.exp(epsilon) * alpha, mp.exp(-epsilon) * (1 - alpha))
        assert curve >= oracles.gaussian_tradeoff(alpha, mu)
    assert oracles.gaussian_tradeoff(kink, mu) == pytest.approx(float(kink))


@pytest.mark.parametrize("event", [PureDP(1.5), Laplace(1 / 1.5)])
def test_mu_squared_of_pure_events(event: Event) -> None:
    assert mu_squared(event) == pytest.approx(pure_mu(1.5) ** 2)


@pytest.mark.parametrize("sigma", [0.1, 1.0, 3.0, 50.0, 1e6])
def test_mu_squared_of_a_gaussian_is_its_renyi_slope(sigma: float) -> None:
    divergence = oracles.gaussian_both_ways(sigma, 2)
    assert mu_squared(Gaussian(sigma)) == pytest.approx(float(divergence), rel=1e-12)
    assert mu_squared(PoissonSampled(0.5, Gaussian(sigma))) == math.inf


def exact_gaussian_price(sigma: float, order: int) -> Fraction:
    return Fraction(order, 2) / Fraction(sigma) ** 2 * UNIT


@pytest.mark.parametrize("sigma", [1e-3, 0.3, 0.7, 1.0, 3.7, 50.0, 1234.5, 1e7, 1e9])
def test_integer_prices_are_above_the_exact_rationals(sigma: float) -> None:
    budget = adaptive(3.0, 1e-6)
    prices = dict(zip(budget.lanes, budget.price(Gaussian(sigma)), strict=True))
    for order in ORDERS:
        exact = exact_gaussian_price(sigma, order)
        assert exact <= prices[str(order)] <= exact * (1 + Fraction(2, 10**9)) + 3
    exact = UNIT / Fraction(sigma) ** 2
    assert exact <= prices["mu_squared"] <= exact * (1 + Fraction(2, 10**9)) + 3
    assert prices["epsilon"] == NEVER
    assert prices["delta"] == 0


@pytest.mark.parametrize("event", [Gaussian(1e-200), PoissonSampled(0.1, Gaussian(1e-200))])
def test_no_noise_fits_nothing(event: Event) -> None:
    prices = adaptive(8.0, 1e-6).price(event)
    assert set(prices[1:]) == {NEVER}


def test_a_sampled_exponent_beyond_doubles_is_infinite() -> None:
    event = PoissonSampled(0.5, Gaussian(1e-154))
    assert renyi(event, 64) == math.inf
    assert math.isfinite(renyi(event, 2))


@pytest.mark.parametrize(
    "event",
    [
        Gaussian(1e200),
        PoissonSampled(1e-7, Gaussian(1e200)),
        PoissonSampled(0.5, Gaussian(1e300)),
        PureDP(1e-300),
        PoissonSampled(1e-300, PureDP(1e-300)),
    ],
)
def test_nearly_free_is_never_free(event: Event) -> None:
    budget = adaptive(8.0, 1e-6)
    prices = dict(zip(budget.lanes, budget.price(event), strict=True))
    del prices["delta"]
    assert all(1 <= price <= 3 or price == NEVER for price in prices.values())
    assert prices["2"] <= 3


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("event", [NonPrivate(), Gaussian(1.0)])
def test_what_has_no_pure_epsilon(event: Event, order: int) -> None:
    assert pure_epsilon(event) == math.inf
    assert (renyi(event, order) == math.inf) == isinstance(event, NonPrivate)


REPLACE = NeighboringRelation.REPLACE_ONE


@pytest.mark.parametrize(
    "event",
    [
        PoissonSampled(0.1, Gaussian(1.0)),
        PoissonSampled(0.1, PureDP(1.0)),
        Repeated(Composed((Gaussian(1.0), PoissonSampled(0.1, Gaussian(1.0)))), 3),
    ],
)
def test_replace_one_refuses_sampling(event: Event) -> None:
    adaptive(1.0, 1e-6).price(event)
    with pytest.raises(UnsupportedEvent, match="add_remove"):
        adaptive(1.0, 1e-6, relation=REPLACE).price(event)
    with pytest.raises(UnsupportedEvent, match="add_remove"):
        adaptive(1.0, 1e-6, relation=REPLACE, expect=event)


@pytest.mark.parametrize("event", [Gaussian(2.0), Laplace(3.0), PureDP(0.2)])
def test_replace_one_prices_the_rest_alike(event: Event) -> None:
    assert adaptive(1.0, 1e-6, relation=REPLACE).price(event) == adaptive(1.0, 1e-6).price(event)


@pytest.mark.parametrize(
    "inner",
    [
        NonPrivate(),
        ZCDP(0.1),
        PoissonSampled(0.1, Gaussian(1.0)),
        Composed((Gaussian(1.0), TreeAggregation(1.0, 10))),
        Composed((ApproximateDP(1.0, 1e-9), Gaussian(1.0))),
    ],
)
def test_samples_of_what_is_not_proved_are_refused(inner: Event) -> None:
    with pytest.raises(UnsupportedEvent) as caught:
        adaptive(1.0, 1e-6).price(Repeated(PoissonSampled(0.5, inner), 2))
    assert caught.value.event == PoissonSampled(0.5, inner)


def test_a_sample_of_a_sample_of_pure_dp() -> None:
    event = PoissonSampled(0.5, PoissonSampled(0.2, PureDP(1.0)))
    assert pure_epsilon(event) == pytest.approx(pure_epsilon(PoissonSampled(0.1, PureDP(1.0))))


def test_nothing_is_priced_with_a_parameter_outside_its_domain() -> None:
    with pytest.raises(InvalidParameter):
        PoissonSampled(1.0000001, Gaussian(1.0))
