"""Published and independently computed figures. Every value names where it comes from."""

from __future__ import annotations

import numpy as np
import pytest
from dp_accounting import pld, rdp
from dp_accounting.dp_event import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from mpmath import mp, mpf

from dp import Event, Gaussian, PerUnitFilter, PoissonSampled, adaptive, planned
from dp.conversions import gaussian_delta, gaussian_mu, renyi_limit, renyi_to_epsilon
from dp.costs import cost
from dp.filters import ORDERS
from dp.readings import IfFixed, if_fixed
from dp.rows import ADD_REMOVE
from tests.dp import oracles

TUTORIAL = (0.04, 1.5, 2250, 1e-5)
"""The DP-SGD setting of Opacus's tutorials: q = 0.04, sigma = 1.5, 2,250 steps, delta 1e-5."""

LONG_RUN = (0.01, 1.0, 10_000, 1e-5)

OPACUS_RDP = 7.32911117143  # opacus 1.6.0 RDPAccountant, best order 3.9
DP_ACCOUNTING_RDP = 7.32933470238  # dp-accounting 0.6.0 RdpAccountant, best order 3.9
DP_ACCOUNTING_PLD = 6.76879  # dp-accounting 0.6.0 PLDAccountant, grid 1e-4

BY_ORDER = {  # 40-digit trapezoidal sums of the definition, then the conversion solved for epsilon
    TUTORIAL: {
        2: 12.1403742793,
        3: 7.89965436243,
        4: 7.32987677383,
        5: 7.70655889467,
        6: 8.50525472725,
        8: 10.8251743530,
        12: 18.2062284636,
        16: 376.289029177,
        64: 24642.6705257,
    },
    LONG_RUN: {
        2: 11.8447653246,
        3: 7.44806722589,
        4: 6.71940211794,  # autodp 0.2.3.1, Mechanism API: 6.719402
        5: 6.93940075851,
        6: 7.59689313174,
        8: 10.1505482439,
        12: 9780.85089786,
        64: 273217.419728,
    },
}


def solved_conversion(order: int, divergence: mpf, delta: float) -> mpf:
    """Epsilon from delta = exp((a-1)(r - eps)) / (a-1) * (1 - 1/a)**a by bisection, 40 digits."""

    def delta_at(epsilon: mpf) -> mpf:
        return (
            mp.exp((order - 1) * (divergence - epsilon))
            / (order - 1)
            * (1 - mpf(1) / order) ** order
        )

    low, high = divergence - 60, divergence + 60
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if delta_at(middle) > delta else (low, middle)
    return high


def our_epsilons(setting: tuple[float, float, int, float]) -> dict[int, float]:
    q, sigma, steps, delta = setting
    step = PoissonSampled(q, Gaussian(sigma))
    return {a: renyi_to_epsilon(a, steps * cost(step).renyi(a), delta) for a in ORDERS}


@pytest.mark.parametrize(
    ("setting", "order", "golden"),
    [(setting, a, value) for setting, table in BY_ORDER.items() for a, value in table.items()],
)
def test_epsilon_at_a_fixed_order(
    setting: tuple[float, float, int, float], order: int, golden: float
) -> None:
    q, sigma, steps, delta = setting
    assert our_epsilons(setting)[order] == pytest.approx(golden, rel=1e-11)
    with mp.workdps(40):
        divergence = steps * max(oracles.sampled_gaussian_both_ways(q, sigma, order))
        assert float(solved_conversion(order, divergence, delta)) == pytest.approx(
            golden, rel=1e-11
        )


@pytest.mark.parametrize(
    ("setting", "peer", "truth"),
    [
        pytest.param(TUTORIAL, OPACUS_RDP, DP_ACCOUNTING_PLD, id="tutorial-opacus-1.6.0"),
        pytest.param(TUTORIAL, DP_ACCOUNTING_RDP, DP_ACCOUNTING_PLD, id="tutorial-dp-accounting"),
        # truth: prv-accountant 0.2.0 brackets it in [6.186385, 6.189040] (peers, 2A)
        pytest.param(LONG_RUN, 6.712738, 6.1877, id="peers-2A-opacus-1.6.0"),
        pytest.param(LONG_RUN, 6.712757, 6.1877, id="peers-2A-dp-accounting-0.6.0"),
    ],
)
def test_integer_orders_against_peers(
    setting: tuple[float, float, int, float], peer: float, truth: float
) -> None:
    """Peers have fractional orders, ours may only be above them; all are above the truth."""
    best = min(our_epsilons(setting).values())
    assert truth < peer
    assert peer * (1 - 1e-4) <= best <= peer * 1.002  # 4 digits below: dp-accounting rounds up
    assert truth < best < truth * 1.10


@pytest.mark.parametrize("setting", [TUTORIAL, LONG_RUN])
def test_the_peers_figures_are_still_theirs(setting: tuple[float, float, int, float]) -> None:
    q, sigma, steps, delta = setting
    event = SelfComposedDpEvent(PoissonSampledDpEvent(q, GaussianDpEvent(sigma)), steps)
    theirs = rdp.RdpAccountant().compose(event).get_epsilon(delta)
    assert theirs == pytest.approx({2250: DP_ACCOUNTING_RDP, 10_000: 6.712757}[steps], abs=1e-6)
    tight = pld.PLDAccountant(value_discretization_interval=1e-3).compose(event).get_epsilon(delta)
    assert tight == pytest.approx({2250: DP_ACCOUNTING_PLD, 10_000: 6.1877}[steps], abs=0.01)
    assert tight < min(our_epsilons(setting).values())


@pytest.mark.parametrize(
    ("queries", "epsilon"),
    [
        pytest.param(1_000, 2.594383381, id="peers-2B-1e3"),
        pytest.param(100_000, 46.211210191, id="peers-2B-1e5"),
        pytest.param(1_000_000, 284.391849498, id="peers-2B-1e6"),
    ],
)
def test_analytic_gaussian(queries: int, epsilon: float) -> None:
    """Balle and Wang (2018), Theorem 8, for N queries of sigma 50: mu = sqrt(N) / 50."""
    mu = queries**0.5 / 50
    assert gaussian_delta(epsilon, mu) == pytest.approx(1e-5, rel=1e-8)
    assert gaussian_mu(epsilon, 1e-5) == pytest.approx(mu, rel=2e-8)


@pytest.mark.parametrize(
    ("epsilon", "delta"),
    [
        (1e-3, 1e-15),
        (1e-3, 1e-6),
        (0.01, 0.1),
        (0.05, 1e-6),
        (0.1, 1e-15),
        (0.5, 1e-5),
        (1.0, 1e-6),
        (1.0, 1e-15),
        (3.0, 1e-9),
        (8.0, 1e-6),
        (8.0, 0.1),
        (50.0, 1e-15),
        (500.0, 1e-6),
        (1e4, 1e-12),
        (1e6, 1e-6),
    ],
)
def test_gaussian_dp_at_60_digits(epsilon: float, delta: float) -> None:
    mu = gaussian_mu(epsilon, delta)
    with mp.workdps(60):
        assert float(oracles.gaussian_delta(epsilon, mu)) <= delta
        assert oracles.gaussian_delta(epsilon, mpf(mu) * (1 + 2 * mpf(10) ** -8)) > delta
        exact = float(oracles.gaussian_delta(epsilon, mu))
    assert gaussian_delta(epsilon, mu) == pytest.approx(exact, rel=1e-7)


@pytest.mark.parametrize(
    ("rho", "cks", "truth"),
    [  # theory note, section 3, delta 1e-6: CKS over real orders; exact for a Gaussian
        pytest.param(0.1, 2.142, 1.995, id="theory-3-rho.1"),
        pytest.param(0.5, 5.222, 4.887, id="theory-3-rho.5"),
        pytest.param(2.0, 11.69, 11.00, id="theory-3-rho2"),
    ],
)
def test_concentrated_dp(rho: float, cks: float, truth: float) -> None:
    ours = min(renyi_to_epsilon(a, rho * a, 1e-6) for a in ORDERS)
    with mp.workdps(20):
        real = min(
            float(rho * a + mp.log(1 - 1 / a) - (mp.log(1e-6) + mp.log(a)) / (a - 1))
            for a in (mpf(1) + mpf(k) / 100 for k in range(10, 4000))
        )
    assert real == pytest.approx(cks, rel=3e-4)
    assert real <= ours <= real * 1.02
    mu = (2 * rho) ** 0.5
    assert gaussian_delta(truth, mu) == pytest.approx(1e-6, rel=0.01)
    assert truth < ours


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("epsilon", "delta"), [(0.5, 1e-6), (8.0, 1e-3), (100.0, 1e-12)])
def test_a_limit_converts_to_its_target(order: int, epsilon: float, delta: float) -> None:
    limit = renyi_limit(order, epsilon, delta)
    if limit > 0:
        assert renyi_to_epsilon(order, limit, delta) == pytest.approx(epsilon, rel=1e-12)
        with mp.workdps(40):
            assert float(solved_conversion(order, mpf(limit), delta)) == pytest.approx(epsilon)
    assert renyi_to_epsilon(order, 0.0, 0.999) == 0.0


QUERY, STEP = Gaussian(50.0), PoissonSampled(0.01, Gaussian(1.0))


@pytest.mark.parametrize(
    ("event", "epsilon", "expect", "review", "pld_optimum"),
    [
        pytest.param(QUERY, 8.0, None, 5386, 5864, id="gate-review-gaussian-8"),
        pytest.param(QUERY, 3.0, None, 945, 1048, id="gate-review-gaussian-3"),
        pytest.param(STEP, 8.0, None, 10_841, 12_984, id="gate-review-dpsgd-8"),
        pytest.param(STEP, 3.0, None, 1502, 2061, id="gate-review-dpsgd-3"),
        pytest.param(QUERY, 8.0, QUERY, 5736, 5864, id="gate-review-gaussian-expected-8"),
        pytest.param(QUERY, 3.0, QUERY, 1021, 1048, id="gate-review-gaussian-expected-3"),
        pytest.param(QUERY, 1.0, QUERY, 135, 140, id="gate-review-gaussian-expected-1"),
        pytest.param(STEP, 8.0, STEP, 11_219, 12_984, id="gate-review-dpsgd-expected-8"),
        pytest.param(STEP, 3.0, STEP, 1598, 2061, id="gate-review-dpsgd-expected-3"),
    ],
)
def test_how_many_fit(
    event: Event, epsilon: float, expect: Event | None, review: int, pld_optimum: int
) -> None:
    """At delta 1e-6: at least the review's count (delta_ops was 10 % there), below the optimum."""
    budget = adaptive(epsilon, 1e-6, expect=expect)
    fits = budget.uses_that_fit((0,) * len(budget.limits), budget.price(event))
    assert review <= fits < pld_optimum


@pytest.mark.parametrize(("epsilon", "review", "pld_optimum"), [(8.0, 3384, 4038), (3.0, 507, 693)])
def test_how_many_pairs_fit(epsilon: float, review: int, pld_optimum: int) -> None:
    """The review's mixed row: one query and one training step, in turn."""
    budget = adaptive(epsilon, 1e-6)
    pair = tuple(np.add(budget.price(QUERY), budget.price(STEP)).tolist())
    assert review <= budget.uses_that_fit((0,) * len(budget.limits), pair) < pld_optimum


@pytest.mark.parametrize(
    ("event", "epsilon", "optimum"), [(QUERY, 8.0, 5864), (QUERY, 3.0, 1048), (QUERY, 1.0, 140)]
)
def test_the_optimum_itself(event: Gaussian, epsilon: float, optimum: int) -> None:
    """The review's PLD column for Gaussians, from the closed form at 40 digits."""
    with mp.workdps(40):
        per_use = 1 / mpf(event.noise_multiplier)
        assert oracles.gaussian_delta(epsilon, per_use * mp.sqrt(optimum)) <= 1e-6 * 1.003
        assert oracles.gaussian_delta(epsilon, per_use * mp.sqrt(optimum + 2)) > 1e-6


def test_a_filter_takes_what_one_gaussian_takes() -> None:
    """At epsilon 3 and delta 1e-6 that is mu = 0.647727 (Balle and Wang, Theorem 8)."""
    budget = planned(3.0, 1e-6, slots=[])
    unspent = (0,) * len(budget.limits)
    assert budget.uses_that_fit(unspent, budget.price(PerUnitFilter(0.64772))) == 1
    assert budget.uses_that_fit(unspent, budget.price(PerUnitFilter(0.64773))) == 0
    assert budget.price(PerUnitFilter(0.25)) == budget.price(Gaussian(4.0))


def test_the_tutorial_if_fixed_in_advance() -> None:
    q, sigma, steps, delta = TUTORIAL
    found = if_fixed([(PoissonSampled(q, Gaussian(sigma)), steps)], delta, ADD_REMOVE)
    assert found.renyi == pytest.approx(BY_ORDER[TUTORIAL][4], rel=1e-8)
    assert found.pld_low <= 6.768787 <= found.pld < 6.7689  # dp_accounting's PLD
    assert if_fixed([], delta, ADD_REMOVE) == IfFixed(delta, 0.0, 0.0, 0.0)
