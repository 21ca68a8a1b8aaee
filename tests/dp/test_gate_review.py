"""What a review of the gate broke, one test for each: the broken variant fails, ours does not."""

from __future__ import annotations

import math
import sqlite3
from fractions import Fraction

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution
from dp_accounting.rdp import RdpAccountant
from mpmath import mp, mpf

from dp import (
    ApproximateDP,
    Composed,
    Event,
    Gaussian,
    NeighboringRelation,
    PoissonSampled,
    ProposeTestRelease,
    PureDP,
    Repeated,
    UnsupportedEvent,
    adaptive,
    planned,
    pld,
    pure,
)
from dp.conversions import pure_mu
from dp.costs import cost
from dp.events import parts
from dp.filters import NEVER, ORDERS
from tests.dp import oracles

ADD_REMOVE, REPLACE_ONE = NeighboringRelation.ADD_REMOVE, NeighboringRelation.REPLACE_ONE
UNIT = 2**40


@pytest.fixture(autouse=True)
def _sixty_digits():
    with mp.workdps(60):
        yield


# --- rounding -----------------------------------------------------------------------------------


def sampled_gaussian(q: float, sigma: float, order: int) -> mpf:
    """Its Renyi divergence, by the binomial sum at 60 digits."""
    q, sigma = mpf(q), mpf(sigma)
    moment = mp.fsum(
        mp.binomial(order, k)
        * (1 - q) ** (order - k)
        * q**k
        * mp.exp(mpf(k * k - k) / (2 * sigma**2))
        for k in range(order + 1)
    )
    return mp.log(moment) / (order - 1)


@pytest.mark.parametrize("sigma", [0.6, 1.0, 2.0])
def test_an_rdp_accountant_undershoots_at_a_small_sampling_probability(sigma: float) -> None:
    exact = sampled_gaussian(1e-7, sigma, 2)
    accountant = RdpAccountant([2])
    accountant.compose(
        dp_accounting.PoissonSampledDpEvent(1e-7, dp_accounting.GaussianDpEvent(sigma))
    )
    theirs = mpf(float(accountant._rdp[0]))
    assert mpf("1e-9") < 1 - theirs / exact < mpf("1e-7")
    uses = 10**12
    assert mp.ceil(uses * theirs * UNIT) < uses * exact * UNIT  # rounded up, and too low

    event = PoissonSampled(1e-7, Gaussian(sigma))
    assert abs(cost(event).renyi(2) / exact - 1) < mpf("1e-12")
    budget = adaptive(8.0, 1e-6)
    assert budget.price(Repeated(event, uses))[budget.lanes.index("2")] > uses * exact * UNIT


@pytest.mark.parametrize("q", [1e-7, 1e-4, 0.01, 0.5])
@pytest.mark.parametrize("sigma", [0.2, 0.6, 1.0, 4.0])
def test_no_price_is_below_the_exact_divergence(q: float, sigma: float) -> None:
    budget = adaptive(8.0, 1e-6)
    prices = dict(zip(budget.lanes, budget.price(PoissonSampled(q, Gaussian(sigma))), strict=True))
    for order in ORDERS:
        exact = sampled_gaussian(q, sigma, order) * UNIT
        assert exact < prices[str(order)] < exact * (1 + mpf("1e-8")) + 3


# --- lanes --------------------------------------------------------------------------------------


def test_lanes_of_64_bits_wrap() -> None:
    one = 256 / 2 / 0.5**2 * UNIT  # sigma 0.5 at order 256
    wrapped = np.array([one], dtype=np.int64) * 20_000
    assert wrapped[0] < 0  # and so below every limit
    with sqlite3.connect(":memory:") as database:
        query = "SELECT typeof(a), typeof(a + a), a + a > a FROM (SELECT ? AS a)"
        assert database.execute(query, (2**62,)).fetchone() == ("integer", "real", 1)
        low = database.execute("SELECT ? + ? = ? + ?", (2**62, 2**62, 2**62, 2**62 + 1))
        assert low.fetchone() == (1,)  # doubles: the last digits are gone
    database.close()


@pytest.mark.parametrize("uses", [20_000, 2**53 - 1])
@pytest.mark.parametrize("sigma", [0.5, 1e-3, 1e-150])
def test_our_lanes_never_wrap(uses: int, sigma: float) -> None:
    budget = adaptive(8.0, 1e-6)
    start = (0,) * len(budget.limits)
    for price, times in (
        (budget.price(Gaussian(sigma)), uses),
        (budget.price(Repeated(Gaussian(sigma), uses)), 1),
    ):
        assert all(0 <= lane <= NEVER for lane in price)
        charged = budget.charge(start, price, times)
        assert not budget.admits(charged)
        assert all(
            0 <= lane <= max(limit + 1, 0) < 2**63
            for lane, limit in zip(charged, budget.limits, strict=True)
        )
        assert not budget.admits(budget.after(budget.after(start, price, times), price, times))


# --- the delta lane -----------------------------------------------------------------------------


@pytest.mark.parametrize("small", [1e-13, 4e-13, 1.2e-12])
def test_a_delta_lane_of_forty_bits_is_too_coarse(small: float) -> None:
    budget = adaptive(1.0, 1e-6)
    room, true = 1e-8, Fraction(1e-8) / Fraction(small)
    up, nearest = math.ceil(small * UNIT), round(small * UNIT)
    refused_wrongly = math.floor(room * UNIT) // up
    assert refused_wrongly < true * Fraction(7, 10)
    if not nearest:
        assert math.floor(room * UNIT) >= 10**6 * nearest  # a million uses cost nothing
        assert true < 10**6
    fit = budget.uses_that_fit((0,) * len(budget.limits), budget.price(ApproximateDP(1e-9, small)))
    assert true * Fraction(999, 1000) < fit <= true


# --- events that carry a delta ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "epsilon", "delta", "q"),
    [
        (ApproximateDP(1.0, 1e-3), 1.0, 1e-3, 1.0),
        (ProposeTestRelease(0.5, 1.5, 1e-4), 2.0, 1e-4, 1.0),
        (PoissonSampled(0.1, ApproximateDP(1.0, 1e-2)), 1.0, 1e-2, 0.1),
        (PoissonSampled(0.5, ApproximateDP(3.0, 1e-2)), 3.0, 1e-2, 0.5),
    ],
)
def test_one_decomposition_serves_all_orders(
    event: Event, epsilon: float, delta: float, q: float
) -> None:
    """Reveal with probability delta, else respond; on a sample. Both lose the SAME part, once."""
    truth, lie = oracles.randomized_response(epsilon)
    d, q = mpf(delta), mpf(q)
    # Outcomes: reveals "in", reveals "out", two responses.
    without = [mpf(0), d, *((1 - d) * b for b in lie)]
    mixed = [q * d, (1 - q) * d, *((1 - d) * (q * a + (1 - q) * b) for a, b in zip(truth, lie, strict=True))]  # fmt: skip
    bounds = cost(event)
    assert bounds.delta >= q * d * (1 - mpf("1e-15"))
    rest = 1 - q * d
    kept_p = [x / rest for x in mixed[1 + (q == 1) :]]
    kept_q = [x / rest for x in [without[1] - q * d, *without[2:]][int(q == 1) :]]
    assert mp.fsum(kept_p) == pytest.approx(1, abs=1e-15)
    assert mp.fsum(kept_q) == pytest.approx(1, abs=1e-15)
    for order in ORDERS:  # the same two distributions at every order, and for the other measures
        assert oracles.both_ways(kept_p, kept_q, order) <= bounds.renyi(order) * (1 + mpf("1e-9"))
    loss = oracles.largest_loss(kept_p, kept_q)
    assert loss <= bounds.epsilon * (1 + mpf("1e-12"))
    assert bounds.mu_squared >= pure_mu(float(loss)) ** 2 * (1 - 1e-9)
    # The broken variant, a delta that some orders get for nothing, is below the truth.
    whole = oracles.finite_renyi([x + mpf("1e-40") for x in mixed], [x + mpf("1e-40") for x in without], 2)  # fmt: skip
    assert whole > bounds.renyi(2)


# --- the rounding of an FFT ---------------------------------------------------------------------


def test_an_fft_returns_a_negative_delta() -> None:
    """10,000 releases of sigma 100 are 1-GDP."""
    theirs = privacy_loss_distribution.from_gaussian_mechanism(
        100.0, value_discretization_interval=1e-4
    ).self_compose(10_000)
    exact = oracles.gaussian_delta(8, 1)
    assert mp.nstr(exact, 3) == "3.65e-15"
    assert theirs.get_delta_for_epsilon(8.0) < 0


@pytest.mark.parametrize(
    ("sigma", "uses"), [(100.0, 10_000), (50.0, 2500), (20.0, 400), (5.0, 25), (1.0, 1), (7.0, 31)]
)
def test_our_delta_is_never_below_the_truth(sigma: float, uses: int) -> None:
    losses = pld.compose(((Gaussian(sigma), uses),), ADD_REMOVE)
    mu = mp.sqrt(uses) / mpf(sigma)
    for epsilon in (0.0, 1.0, 4.0, 6.0, 7.0, 7.25, 7.5, 7.75, 8.0, 8.25, 9.0, 12.0):
        exact = oracles.gaussian_delta(epsilon, mu)
        bound = losses.delta(epsilon)
        assert exact <= bound <= exact * (1 + mpf("1e-3")) + 2 * mpf("1e-11")


# --- directions ---------------------------------------------------------------------------------


def responses_on_samples(q: float, epsilon: float, uses: int, at: float) -> tuple[mpf, mpf]:
    """The exact delta of removing and of adding, over the number of truths."""
    (truth, lie), q = (mpf(x) for x in oracles.randomized_response(epsilon)[0]), mpf(q)
    mixed = q * truth + (1 - q) * lie
    leaves = [
        (
            mp.binomial(uses, k) * mixed**k * (1 - mixed) ** (uses - k),
            mp.binomial(uses, k) * lie**k * (1 - lie) ** (uses - k),
        )
        for k in range(uses + 1)
    ]
    return oracles.hockey_stick(leaves, mpf(at)), oracles.hockey_stick(
        [(b, a) for a, b in leaves], mpf(at)
    )


@pytest.mark.parametrize(
    ("q", "epsilon", "uses", "at"), [(0.1, 2.0, 5, 0.5), (0.01, 4.0, 5, 0.5), (0.02, 3.0, 40, 1.0)]
)
def test_the_larger_direction_counts(q: float, epsilon: float, uses: int, at: float) -> None:
    removing, adding = responses_on_samples(q, epsilon, uses, at)
    assert adding < removing / 50  # the broken variant takes this one alone
    losses = pld.compose(((PoissonSampled(q, PureDP(epsilon)), uses),), ADD_REMOVE)
    assert removing <= losses.delta(at) <= removing * (1 + mpf("1e-3")) + mpf("2e-11")


def test_the_larger_direction_of_sampled_gaussians() -> None:
    losses = pld.compose(((PoissonSampled(0.01, Gaussian(1.0)), 100),), ADD_REMOVE)
    each = [
        infinity + float(-probabilities @ np.expm1(np.minimum(0.5 - at, 0.0)))
        for at, probabilities, infinity in losses.directions
    ]
    assert min(each) < max(each) / 1e4
    assert losses.delta(0.5) >= max(each)


# --- one secret sample for several releases -----------------------------------------------------


def test_a_sample_that_is_probed_before_it_is_used() -> None:
    """Four samples, a probe of mu 0.8 on each, then the slot on the most promising one."""
    q, mu, epsilon = mpf("1e-3"), mpf("0.8"), 8
    with mp.workdps(15):
        likely = mp.quad(lambda x: mp.npdf(x, mu, 1) * mp.ncdf(x) ** 3, [-12, 0, 2, 13])
    real = 4 * q * (1 - q) ** 3 * likely  # it is in one sample, and that one is revealed
    assert real > mpf("1.94e-3")

    # Charged as four Gaussians and one sampled use: the sample reveals it, or loses log(1 - q).
    charged = q + (1 - q) * oracles.gaussian_delta(epsilon - mp.log(1 - q), 2 * mu)
    assert charged < mpf("1.01e-3") < real

    slot = PoissonSampled(1e-3, Gaussian(0.17))
    separate = pld.compose(((Gaussian(1.25), 4), (slot, 1)), ADD_REMOVE)
    assert separate.delta(epsilon) < mpf("1.01e-3")
    together = PoissonSampled(1e-3, Composed((Gaussian(1.25), Gaussian(0.17))))
    honest = pld.compose(((together, 4),), ADD_REMOVE)
    assert honest.delta(epsilon) > real


def test_several_releases_on_one_sample_are_one_event() -> None:
    probe, release = Gaussian(1.25), Gaussian(0.6)
    together = PoissonSampled(1e-3, Composed((probe, release)))
    assert list(parts(together).values()) == [1]  # never taken apart
    budget = adaptive(8.0, 1e-2)
    apart = budget.price(Composed((PoissonSampled(1e-3, probe), PoissonSampled(1e-3, release))))
    for lane, whole, sum_of_two in zip(budget.lanes, budget.price(together), apart, strict=True):
        if lane.isdigit():
            assert whole > 1.02 * sum_of_two
    plan = planned(8.0, 1e-2, slots=[(PoissonSampled(1e-3, release), 1)])
    assert not plan.admits(plan.after((0, 0), plan.price(together), 1))  # not the slot's event
    assert not plan.admits(plan.after((0, 0), plan.price(PoissonSampled(1e-3, probe)), 1))
    assert plan.admits(plan.after((0, 0), plan.price(PoissonSampled(1e-3, release)), 1))


# --- Poisson samples under replace-one ----------------------------------------------------------


def test_poisson_sampling_is_not_amplified_when_a_unit_is_replaced() -> None:
    """A mechanism that shows the size of its sample is still epsilon-DP for replacing one."""
    q, epsilon = mpf("0.1"), 1
    truth, lie = oracles.randomized_response(epsilon)
    one = [1 - q, *(q * x for x in truth)]
    other = [1 - q, *(q * x for x in lie)]
    event = PoissonSampled(0.1, PureDP(1.0))
    broken = cost(event, ADD_REMOVE)
    assert oracles.largest_loss(one, other) > broken.epsilon * 5
    assert all(oracles.both_ways(one, other, order) > broken.renyi(order) * 1.5 for order in ORDERS)


@pytest.mark.parametrize(
    "inner", [Gaussian(1.0), PureDP(1.0), Composed((PureDP(1.0), Gaussian(1.0)))]
)
def test_poisson_sampling_is_refused_when_a_unit_is_replaced(inner: Event) -> None:
    event = PoissonSampled(0.1, inner)
    for budget in (
        pure(1.0, relation=REPLACE_ONE),
        adaptive(8.0, 1e-6, relation=REPLACE_ONE),
        planned(8.0, 1e-6, slots=[(Gaussian(1.0), 1)], relation=REPLACE_ONE),
    ):
        for nested in (event, Repeated(event, 3), Composed((PureDP(1.0), event))):
            with pytest.raises(UnsupportedEvent, match="adding or removing"):
                budget.price(nested)
    with pytest.raises(UnsupportedEvent, match="adding or removing"):
        planned(8.0, 1e-6, slots=[(event, 1)], relation=REPLACE_ONE)
    with pytest.raises(UnsupportedEvent, match="adding or removing"):
        adaptive(8.0, 1e-6, expect=event, relation=REPLACE_ONE)
