"""Readings against explicit mechanisms: what they say is reached, and never passed."""

from __future__ import annotations

import math

import numpy as np
import pytest
from mpmath import mp, mpf
from scipy.stats import norm

from dp import (
    ApproximateDP,
    Composed,
    DiscreteGaussian,
    Filter,
    Gaussian,
    InvalidParameter,
    Laplace,
    NeighboringRelation,
    PoissonSampled,
    PureDP,
    Repeated,
    adaptive,
    planned,
    pure,
)
from dp.conversions import gaussian_delta, gaussian_epsilon
from dp.readings import (
    IfFixed,
    group,
    if_fixed,
    largest_posterior,
    largest_power,
    lifetime_delta,
    lifetime_epsilon,
    lifetime_power,
)
from tests.dp import oracles

ADD_REMOVE = NeighboringRelation.ADD_REMOVE
STEP = PoissonSampled(0.01, Gaussian(1.0))


def revealing_response(epsilon: float, delta: float) -> tuple[np.ndarray, np.ndarray]:
    """The (epsilon, delta)-DP pair that is worst at everything (Kairouz, Oh, Viswanath 2015)."""
    truth, lie = ((1 - delta) / (1 + math.exp(-s * epsilon)) for s in (1, -1))
    return np.array([delta, truth, lie, 0.0]), np.array([0.0, lie, truth, delta])


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 3.0, 8.0])
@pytest.mark.parametrize("delta", [0.0, 1e-6, 0.05])
def test_the_largest_power_is_reached_by_the_worst_pair(epsilon: float, delta: float) -> None:
    inside, outside = revealing_response(epsilon, delta)
    # Neyman-Pearson: outcomes in the order of their ratio, the last one by a coin.
    for alpha in (0.0, 1e-4, 0.01, 0.3, 0.7, 1.0):
        power, left = 0.0, alpha
        for p, q in zip(inside, outside, strict=True):
            share = 1.0 if q <= left else left / q
            power, left = power + share * p, max(0.0, left - q)
        found = largest_power(epsilon, delta, false_positive_rate=alpha)
        assert found == pytest.approx(power, abs=1e-12)


def test_a_posterior_by_counting() -> None:
    prior, alpha = 0.2, 0.01
    power = largest_power(2.0, 1e-3, false_positive_rate=alpha)
    found = largest_posterior(2.0, 1e-3, prior=prior, false_positive_rate=alpha)
    assert found == pytest.approx(prior * power / (prior * power + (1 - prior) * alpha))
    assert largest_posterior(1.0, 0.0, prior=0.0, false_positive_rate=alpha) == 0.0
    assert largest_posterior(1.0, 0.0, prior=1.0, false_positive_rate=alpha) == 1.0
    # without delta the odds grow by exp(epsilon) at most, and by that much
    odds = largest_posterior(1.0, 0.0, prior=0.5, false_positive_rate=1e-3)
    assert odds / (1 - odds) == pytest.approx(math.e)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize(("epsilon", "delta"), [(0.3, 1e-4), (1.0, 1e-9), (2.0, 0.0)])
def test_a_group_is_a_chain_of_neighbors(epsilon: float, delta: float, size: int) -> None:
    """One by one: H(P0, P2) <= delta + exp(epsilon) H(P1, P2), added up."""
    found_epsilon, found_delta = group(epsilon, delta, size=size)
    assert found_epsilon == pytest.approx(size * epsilon)
    chained = sum(math.exp(k * epsilon) for k in range(size)) * delta
    assert found_delta == pytest.approx(chained, rel=1e-12)


def test_a_group_of_many_has_no_more_than_certainty() -> None:
    assert group(1.0, 0.5, size=10**6) == (1e6, 1.0)


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_shares_out_of_range(value: float) -> None:
    for reading in (
        lambda: largest_power(1.0, 0.0, false_positive_rate=value),
        lambda: largest_power(1.0, value, false_positive_rate=0.1),
        lambda: largest_posterior(1.0, 0.0, prior=value, false_positive_rate=0.1),
        lambda: group(1.0, value, size=2),
    ):
        with pytest.raises(InvalidParameter):
            reading()
    with pytest.raises(InvalidParameter, match="above 0"):
        largest_posterior(1.0, 0.0, prior=0.1, false_positive_rate=0.0)


BUDGETS = [
    pure(2.0),
    adaptive(8.0, 1e-6),
    adaptive(1.0, 1e-3),
    adaptive(1.0, 1e-6, expect=STEP),
    planned(3.0, 1e-6, slots=[(STEP, 500), (Laplace(10.0), 20)]),
]


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_the_life_of_a_budget_at_other_epsilons(budget: Filter) -> None:
    assert lifetime_delta(budget, budget.epsilon) <= budget.delta * (1 + 1e-6)
    curve = [lifetime_delta(budget, budget.epsilon * ratio) for ratio in (0.5, 0.9, 1.0, 1.3, 3.0)]
    assert curve == sorted(curve, reverse=True)
    # Whatever the budget admits stays below: the most Gaussians, the largest response.
    zero = (0,) * len(budget.limits)
    uses = budget.uses_that_fit(zero, budget.price(Gaussian(30.0)))
    for ratio in (0.6, 0.9, 1.0, 1.3):
        epsilon = ratio * budget.epsilon
        if uses:
            assert gaussian_delta(epsilon, math.sqrt(uses) / 30) <= lifetime_delta(budget, epsilon)
    if budget.accounting != "planned":
        fits = budget.uses_that_fit(zero, budget.price(PureDP(budget.epsilon / 1.001)))
        assert fits == 1
        with mp.workdps(30):
            pair = oracles.randomized_response(mpf(budget.epsilon / 1.001))
            exact = oracles.worst_delta(list(zip(*pair, strict=True)), mpf(0.8 * budget.epsilon))
        assert exact <= lifetime_delta(budget, 0.8 * budget.epsilon)


@pytest.mark.parametrize("budget", BUDGETS[1:], ids=str)
def test_lifetime_epsilon_is_the_inverse(budget: Filter) -> None:
    for delta in (budget.delta, budget.delta * 3):
        epsilon = lifetime_epsilon(budget, delta)
        assert lifetime_delta(budget, epsilon) <= delta
        assert epsilon <= budget.epsilon * (1 + 1e-6) + 2e-6
        assert lifetime_delta(budget, epsilon - 1e-4) > delta


def test_deltas_that_a_budget_has_not() -> None:
    assert lifetime_epsilon(adaptive(1.0, 1e-3), 1e-9) == math.inf  # its own events' delta
    assert lifetime_epsilon(planned(1e-4, 0.1, slots=[]), 0.1) <= 1e-4 * (1 + 1e-6) + 2e-6
    assert lifetime_epsilon(planned(1e-6, 1e-6, slots=[]), 0.1) == 1e-6


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_the_power_against_a_budget_covers_what_it_admits(budget: Filter) -> None:
    zero = (0,) * len(budget.limits)
    uses = budget.uses_that_fit(zero, budget.price(Gaussian(30.0)))
    for alpha in (1e-4, 0.01, 0.2):
        bound = lifetime_power(budget, false_positive_rate=alpha)
        assert alpha < bound <= 1
        assert bound <= largest_power(budget.epsilon, budget.delta, false_positive_rate=alpha)
        assert norm.sf(norm.isf(alpha) - math.sqrt(uses) / 30) <= bound * (1 + 1e-9)


@pytest.mark.parametrize(
    ("spent", "epsilon"),
    [
        ([(Gaussian(50.0), 2500)], gaussian_epsilon(1.0, 1e-6)),
        ([(Repeated(Composed((Gaussian(50.0), Gaussian(50.0))), 5), 250)], 4.8866),
        ([(PureDP(0.5), 3)], 1.5),
        ([(PureDP(1.0), 1), (ApproximateDP(1.0, 1e-7), 1)], 2.0),
    ],
)
def test_a_log_as_if_fixed(spent: list, epsilon: float) -> None:
    found = if_fixed(spent, 1e-6, ADD_REMOVE)
    assert found.pld_low <= found.pld <= found.renyi * (1 + 1e-5)
    assert found.pld_low * (1 - 1e-3) <= epsilon * (1 + 1e-3)
    assert found.pld == pytest.approx(epsilon, rel=0.02)


def test_a_gaussian_log_lies_between_its_bounds() -> None:
    exact = gaussian_epsilon(math.sqrt(900) / 30, 1e-6)
    found = if_fixed([(Gaussian(30.0), 900)], 1e-6, ADD_REMOVE)
    assert found.pld_low <= exact <= found.pld
    assert found.pld - found.pld_low < 0.02
    assert found.renyi == pytest.approx(exact, rel=1e-8)


@pytest.mark.parametrize(
    ("spent", "delta"),
    [
        ([(DiscreteGaussian(5.0), 10)], 1e-6),  # no pair
        ([(PureDP(1e4), 1)], 1e-6),  # beyond the grid
        ([(Gaussian(5.0), 10)], 1e-12),  # beyond the FFT
        ([(Gaussian(5.0 + k), 1) for k in range(40)], 1e-6),  # too many
    ],
)
def test_logs_without_a_pld(spent: list, delta: float) -> None:
    found = if_fixed(spent, delta, ADD_REMOVE)
    assert (found.pld, found.pld_low) == (None, None)
    assert 0 < found.renyi < math.inf


def test_logs_at_the_edge() -> None:
    assert if_fixed([], 1e-6, ADD_REMOVE) == IfFixed(1e-6, 0.0, 0.0, 0.0)
    assert if_fixed([(PureDP(0.5), 4)], 0.0, ADD_REMOVE) == IfFixed(0.0, 2.0)
    assert if_fixed([(Gaussian(0.5), 4)], 0.0, ADD_REMOVE) == IfFixed(0.0, math.inf)
    overspent = [(ApproximateDP(0.5, 1e-6), 2)]
    assert if_fixed(overspent, 1e-6, ADD_REMOVE) == IfFixed(1e-6, math.inf)
