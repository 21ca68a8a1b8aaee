"""Real-valued privacy costs of the atomic events: the table of formulas.

========================== ===================== ============== =====================
event                      Renyi order a          mu squared     pure epsilon
========================== ===================== ============== =====================
Gaussian(s)                a / (2 s^2) [1]        1 / s^2 [2]    none
Laplace(b)                 closed form [1]        as PureDP      1 / b
PureDP(e)                  randomized response    pure_mu(e)^2   e
                           of e [3]
PoissonSampled(q, G)       binomial sum over      none           none
G = Gaussians, add/remove  integer orders [4]
PoissonSampled(q, P)       as PureDP(e')          as PureDP(e')  e' = log(1+q(exp(e)-1))
P = pure DP, add/remove                                          [5]
NonPrivate                 none                   none           none
========================== ===================== ============== =====================

``none`` is ``math.inf``: that measure cannot bound the event. Repeated and Composed are added up
as integers in :mod:`dp.filters`. Every figure bounds both directions of the neighboring relation.

[1] Mironov, "Renyi Differential Privacy" (2017), Propositions 6 and 7.
[2] Dong, Roth, Su, "Gaussian Differential Privacy" (2022), Theorem 2.7.
[3] Bun, Steinke, "Concentrated Differential Privacy" (2016), Proposition 3.3: among (e, 0)-DP
    pairs, randomized response has the largest Renyi divergence at every order.
[4] Mironov, Talwar, Zhang, "Renyi Differential Privacy of the Sampled Gaussian Mechanism"
    (2019), Theorem 5 and section 3.3.
[5] Balle, Barthe, Gaboardi, "Privacy Amplification by Subsampling" (2018), Theorem 8.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable

from dp.conversions import pure_mu
from dp.errors import UnsupportedEvent
from dp.events import (
    Composed,
    Event,
    Gaussian,
    Laplace,
    NonPrivate,
    PoissonSampled,
    PureDP,
    Repeated,
)
from dp.units import NeighboringRelation

Atomic = Gaussian | Laplace | PureDP | PoissonSampled | NonPrivate
"""Events that are priced by a formula; the others are sums of these."""


def renyi(event: Atomic, order: int) -> float:
    """Bound the Renyi divergence of one use, in nats.

    Args:
        event: The event.
        order: Integer Renyi order, at least 2.

    Returns:
        The bound, ``math.inf`` where there is none. Computed without cancellation: the relative
        error stays below 1e-10 or the absolute one below 2**-41.

    >>> renyi(Gaussian(2.0), 8)
    1.0
    """
    match event:
        case Gaussian(sigma):
            return order / 2 / sigma / sigma
        case Laplace(scale):
            return _laplace_renyi(1 / scale, order)
        case PureDP(epsilon):
            return _randomized_response_renyi(epsilon, order)
        case PoissonSampled(q, inner):
            joint = _joint_sigma(inner)
            if joint is not None:
                return _sampled_gaussian_renyi(q, joint, order)
            # Sampling never hurts: the divergence is jointly quasi-convex.
            unsampled = summed(lambda part: renyi(part, order), inner)
            return min(unsampled, _randomized_response_renyi(pure_epsilon(event), order))
        case NonPrivate():
            return math.inf


def mu_squared(event: Atomic) -> float:
    """Bound mu^2 of one use, where mu is its Gaussian-DP parameter; ``math.inf`` where it has none.

    >>> mu_squared(Gaussian(2.0))
    0.25
    """
    if isinstance(event, Gaussian):
        return 1 / event.noise_multiplier / event.noise_multiplier
    epsilon = pure_epsilon(event)
    return pure_mu(epsilon) ** 2 if epsilon < math.inf else math.inf


def pure_epsilon(event: Atomic) -> float:
    """Bound the privacy loss of one use, in nats; ``math.inf`` where it is unbounded.

    >>> pure_epsilon(Laplace(4.0))
    0.25
    """
    match event:
        case Laplace(scale):
            return 1 / scale
        case PureDP(epsilon):
            return epsilon
        case PoissonSampled(q, inner):
            epsilon = summed(pure_epsilon, inner)
            if epsilon == math.inf:
                return math.inf
            return math.log1p(q * math.expm1(epsilon)) if epsilon < 700 else epsilon
        case Gaussian() | NonPrivate():
            return math.inf


def summed(formula: Callable[[Atomic], float], event: Event) -> float:
    """Add a formula up over the atomic parts of an event.

    >>> summed(pure_epsilon, Repeated(PureDP(0.5), 3))
    1.5
    """
    match event:
        case Repeated(inner, uses):
            return uses * summed(formula, inner)
        case Composed(events):
            return _fsum(summed(formula, inner) for inner in events)
        case _:
            return formula(event)


def check_supported(event: Event, relation: NeighboringRelation) -> None:
    """Raise unless every part of the event has a proved price under the relation.

    Raises:
        UnsupportedEvent: Naming the innermost offending part.

    >>> check_supported(
    ...     PoissonSampled(0.1, Gaussian(1.0)), NeighboringRelation.REPLACE_ONE
    ... )  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    dp.errors.UnsupportedEvent: ... proved for add_remove only; use a budget with that relation
    """
    match event:
        case Repeated(inner, _):
            check_supported(inner, relation)
        case Composed(events):
            for inner in events:
                check_supported(inner, relation)
        case PoissonSampled(_, inner):
            check_supported(inner, relation)
            if relation is not NeighboringRelation.ADD_REMOVE:
                raise UnsupportedEvent(
                    event,
                    "amplification by Poisson sampling is proved for add_remove only;"
                    " use a budget with that relation",
                )
            if _joint_sigma(inner) is None and summed(pure_epsilon, inner) == math.inf:
                raise UnsupportedEvent(
                    event,
                    "a Poisson sample is priced under Gaussians only, or under pure-DP events only",
                )


def _joint_sigma(event: Event) -> float | None:
    """Return the noise multiplier of one Gaussian equal to the event, if there is one.

    Gaussians of noise multipliers s_i released together are one Gaussian with
    1/s^2 = sum of 1/s_i^2. Rounded down, so that the price is rounded up, and kept in a range
    in which squares are normal numbers.
    """
    precision = _gaussian_precision(event)
    if precision is None:
        return None
    return 1 / math.sqrt(min(max(precision, sys.float_info.min), sys.float_info.max)) * (1 - 1e-15)


def _gaussian_precision(event: Event) -> float | None:
    match event:
        case Gaussian(sigma):
            return 1 / sigma / sigma
        case Repeated(inner, uses):
            precision = _gaussian_precision(inner)
            return None if precision is None else uses * precision
        case Composed(events):
            precisions = [_gaussian_precision(inner) for inner in events]
            return None if None in precisions else _fsum(p for p in precisions if p is not None)
        case _:
            return None


def _fsum(values: Iterable[float]) -> float:
    try:
        return math.fsum(values)
    except OverflowError:
        return math.inf


def _laplace_renyi(epsilon: float, order: int) -> float:
    # Mironov 2017, Proposition 6. For small losses as a power series: its first two terms cancel,
    # and they are left out.
    a = order
    if a * epsilon < 1:
        excess = math.fsum(
            epsilon**k / math.factorial(k) * ((a - 1) ** (k - 1) + (-1) ** k * a ** (k - 1))
            for k in range(2, 26)
        )
        return math.log1p(a * (a - 1) / (2 * a - 1) * excess) / (a - 1)
    grown = math.log(a / (2 * a - 1)) + (a - 1) * epsilon
    shrunk = math.log((a - 1) / (2 * a - 1)) - a * epsilon
    return (grown + math.log1p(math.exp(shrunk - grown))) / (a - 1)


def _randomized_response_renyi(epsilon: float, order: int) -> float:
    # log(cosh((a - 1/2) e) / cosh(e / 2)) / (a - 1), as a product of sinh: no cancellation.
    a = order
    if a * epsilon < 1:
        excess = 2 * math.sinh(a * epsilon / 2) * math.sinh((a - 1) * epsilon / 2)
        return math.log1p(excess / math.cosh(epsilon / 2)) / (a - 1)
    ones = math.log1p(math.exp(-(2 * a - 1) * epsilon)) - math.log1p(math.exp(-epsilon))
    return epsilon + ones / (a - 1)


def _sampled_gaussian_renyi(q: float, sigma: float, order: int) -> float:
    # The binomial weights sum to 1 and the terms k = 0, 1 have exponent 0, so the moment is
    # 1 + sum_{k >= 2} weight_k * (exp(k (k - 1) / (2 sigma^2)) - 1): all terms positive.
    logs = []
    for k in range(2, order + 1):
        exponent = k * (k - 1) / 2 / sigma / sigma
        if exponent == math.inf:
            return math.inf
        growth = exponent + math.log(-math.expm1(-exponent))
        rest = (order - k) * math.log1p(-q) if k < order else 0.0
        logs.append(math.log(math.comb(order, k)) + rest + k * math.log(q) + growth)
    top = max(logs)
    log_excess = top + math.log(math.fsum(math.exp(term - top) for term in logs))
    if log_excess > 0:
        return (log_excess + math.log1p(math.exp(-log_excess))) / (order - 1)
    return math.log1p(math.exp(log_excess)) / (order - 1)
