"""Readings of a guarantee: what (epsilon, delta) means, and what was spent if it had been fixed.

Nothing here decides anything. A budget's guarantee is its own (epsilon, delta) for life;
:func:`lifetime_delta` reads the same guarantee at other epsilons, and the functions of an
(epsilon, delta) say what an attacker can do at most who knows every other unit.

>>> round(largest_power(3.0, 1e-6, false_positive_rate=0.01), 3)
0.201
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from scipy.optimize import brentq

from dp import pld, validate
from dp.accountings import merged
from dp.conversions import (
    gaussian_delta_above,
    gaussian_epsilon,
    renyi_to_delta,
    renyi_to_epsilon,
)
from dp.costs import cost
from dp.divergences import total
from dp.errors import InvalidParameter, NothingFits, UnsupportedEvent
from dp.events import Event
from dp.filters import DELTA, EPSILON, MU_SQUARED, ORDERS, USES, Filter
from dp.units import NeighboringRelation

_MANY_EVENTS = 32
"""Beyond so many different events no PLD is computed for a log: it takes 0.1 s for each."""

_ALL_ORDERS = (*ORDERS, 96, 128, 256)


# --- of a guarantee -----------------------------------------------------------------------------


def largest_power(epsilon: float, delta: float, *, false_positive_rate: float) -> float:
    """Return the largest true positive rate of any membership test at a false positive rate.

    Wasserman and Zhou, "A Statistical Framework for Differential Privacy" (2010), Theorem 2.4;
    Kairouz, Oh and Viswanath (2015): 1 less the trade-off curve
    max(0, 1 - delta - exp(epsilon) alpha, exp(-epsilon) (1 - delta - alpha)).

    Args:
        epsilon: In nats.
        delta: From 0 to below 1.
        false_positive_rate: alpha, from 0 to 1.
    """
    alpha = _share(false_positive_rate=false_positive_rate)
    epsilon, delta = validate.epsilon(epsilon=epsilon), _share(delta=delta)
    steep = delta + alpha * math.exp(min(epsilon, 700.0))
    flat = 1 - math.exp(-epsilon) * (1 - delta - alpha)
    return max(0.0, min(1.0, steep, flat))


def largest_posterior(
    epsilon: float, delta: float, *, prior: float, false_positive_rate: float
) -> float:
    """Return the largest probability that a unit is in the data, given that a test says so.

    Args:
        epsilon: In nats.
        delta: From 0 to below 1.
        prior: Probability that it is in the data, before the test.
        false_positive_rate: Of the test, above 0: the probability that it says so of a unit that is
            not in the data.

    >>> round(largest_posterior(1.0, 0.0, prior=0.5, false_positive_rate=0.01), 4)
    0.7311
    """
    prior, alpha = _share(prior=prior), _share(false_positive_rate=false_positive_rate)
    if not alpha > 0:
        raise InvalidParameter("false_positive_rate", alpha, "above 0")
    said = prior * largest_power(epsilon, delta, false_positive_rate=alpha)
    return said / (said + (1 - prior) * alpha) if said else 0.0


def group(epsilon: float, delta: float, *, size: int) -> tuple[float, float]:
    """Return the (epsilon, delta) for groups of ``size`` units, or for a user who owns so many.

    By summing along the chain of neighbors: size * epsilon, and
    delta * (exp(size * epsilon) - 1) / (exp(epsilon) - 1), at most 1. (Vadhan, "The Complexity of
    Differential Privacy", 2017, Lemma 2.2 states the looser size * exp(size * epsilon) * delta.)

    >>> group(1.0, 0.0, size=3)
    (3.0, 0.0)
    """
    epsilon, delta = validate.epsilon(epsilon=epsilon), _share(delta=delta)
    validate.count(size=size)
    if not delta:
        return size * epsilon, 0.0
    growth = (size - 1) * epsilon + math.log(-math.expm1(-size * epsilon) / -math.expm1(-epsilon))
    return size * epsilon, math.exp(min(0.0, math.log(delta) + growth))


# --- of a budget --------------------------------------------------------------------------------


def lifetime_delta(budget: Filter, epsilon: float) -> float:
    """Return a delta at another epsilon that the budget guarantees for its whole life.

    Under ``adaptive`` the sum over the witnesses of what the transcripts that end under each can
    contribute; at the budget's own epsilon at most its delta. Below its epsilon the pure witness
    contributes much, since the budget admits anything of that pure epsilon.

    >>> from dp import adaptive
    >>> lifetime_delta(adaptive(3.0, 1e-6), 3.0) <= 1e-6
    True
    """
    epsilon = validate.epsilon(epsilon=epsilon)
    if budget.accounting == "planned":
        mu = math.sqrt(math.ldexp(budget.limits[-1], -40))
        return min(1.0, pld.compose(budget.committed, budget.relation).delta(epsilon, mu))
    return min(
        1.0,
        math.fsum(
            _contribution(budget, lane, limit, epsilon)
            for lane, limit in zip(budget.lanes, budget.limits, strict=True)
            if limit > 0
        ),
    )


def lifetime_epsilon(budget: Filter, delta: float) -> float:
    """Return an epsilon at another delta that the budget guarantees for its whole life.

    Rounded up by 1e-6; infinite where delta is below what no epsilon buys.

    >>> from dp import adaptive
    >>> 8.0 < lifetime_epsilon(adaptive(8.0, 1e-6), 1e-7) < 10.0
    True
    """
    delta = validate.delta(delta=delta)
    high = 1e-6
    while lifetime_delta(budget, high) > delta:
        high *= 2
        if high > 1e5:
            return math.inf
    if high == 1e-6:
        return high
    found = brentq(lambda at: lifetime_delta(budget, at) - delta, high / 2, high, xtol=1e-9)
    return float(found) + 1e-6


def lifetime_power(budget: Filter, *, false_positive_rate: float) -> float:
    """Return the largest true positive rate of any membership test against the budget's whole life.

    The smallest of :func:`largest_power` at the budget's epsilon and at others of its curve.

    >>> from dp import pure
    >>> round(lifetime_power(pure(1.0), false_positive_rate=0.1), 4)
    0.2718
    """
    others = () if budget.accounting == "pure" else (0.5, 0.7, 0.85, 1.2, 1.5, 2.0)
    guarantees = [(budget.epsilon, budget.delta)]
    guarantees += [
        (at, lifetime_delta(budget, at))
        for at in (ratio * budget.epsilon for ratio in others)
        if 1e-6 <= at <= 1e6
    ]
    return min(
        largest_power(epsilon, delta, false_positive_rate=false_positive_rate)
        for epsilon, delta in guarantees
    )


def _contribution(budget: Filter, lane: str, limit: int, epsilon: float) -> float:
    most = math.ldexp(limit + 1, -40) * (1 + 1e-12)
    if lane == DELTA:
        return math.ldexp(limit + 1, -62)
    if lane == EPSILON:
        return -math.expm1(min(0.0, epsilon - most)) / (1 + math.exp(-most))
    if lane == MU_SQUARED:
        return gaussian_delta_above(epsilon, math.sqrt(most))
    if lane.startswith(USES):
        return pld.compose(budget.committed, budget.relation).delta(epsilon)
    return renyi_to_delta(int(lane), most, epsilon)


# --- of a log -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class IfFixed:
    """Epsilon of a log if its operations had been fixed in advance: not a guarantee.

    Attributes:
        delta: At which it is meant.
        renyi: The smallest of Renyi DP of integer orders, Gaussian DP, and added pure epsilons.
        pld: By privacy loss distributions, rounded up; None where an event has none.
        pld_low: The same, rounded down: the truth of the dominating pairs lies between.
    """

    delta: float
    renyi: float
    pld: float | None = None
    pld_low: float | None = None


def if_fixed(
    spent: Iterable[tuple[Event, int]], delta: float, relation: NeighboringRelation
) -> IfFixed:
    """Return the epsilon at delta of events as if they had been fixed in advance.

    For operations that were chosen after seeing outputs this is a diagnostic, whose hard bound is
    the budget's filter.

    Args:
        spent: Events, each with its number of uses.
        delta: At which epsilon is meant; 0 for the sum of pure epsilons.
        relation: Neighboring relation.

    >>> from dp import Gaussian, PoissonSampled
    >>> found = if_fixed(
    ...     [(PoissonSampled(0.01, Gaussian(1.0)), 1000)], 1e-6, NeighboringRelation.ADD_REMOVE
    ... )
    >>> round(found.renyi, 2), round(found.pld, 4), found.pld - found.pld_low < 0.05
    (2.44, 2.1245, True)
    """
    delta = _share(delta=delta)
    slots = merged(tuple(spent))
    costs = [(cost(event, relation), uses) for event, uses in slots]
    epsilon = total(uses * one.epsilon for one, uses in costs)
    left = delta - total(uses * one.delta for one, uses in costs)
    if not slots or left <= 0:
        nothing = 0.0 if not slots else epsilon if left == 0 else math.inf
        return IfFixed(delta, nothing, *((0.0, 0.0) if not slots else ()))
    renyi = min(
        epsilon,
        gaussian_epsilon(math.sqrt(total(uses * one.mu_squared for one, uses in costs)), left),
        *(
            renyi_to_epsilon(order, total(uses * one.renyi(order) for one, uses in costs), left)
            for order in _ALL_ORDERS
        ),
    )
    if delta < pld.SMALLEST_DELTA or len(slots) > _MANY_EVENTS:
        return IfFixed(delta, renyi)
    try:
        high = pld.compose(slots, relation).epsilon(delta)
        low = pld.compose(slots, relation, pessimistic=False)
    except (UnsupportedEvent, NothingFits):
        return IfFixed(delta, renyi)
    return IfFixed(delta, renyi, high, max(0.0, low.epsilon(delta + 2 * low.slack) - 2e-6))


def _share(**values: float) -> float:
    ((name, value),) = values.items()
    number = validate.finite(**values)
    if not 0 <= number <= 1:
        raise InvalidParameter(name, value, "from 0 to 1")
    return number
