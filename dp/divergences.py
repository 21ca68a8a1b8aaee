"""Renyi divergences of explicit pairs of output distributions, at integer orders of at least 2.

Each is that of a pair (P, Q) in the dearer direction. Computed without cancellation where terms
have one sign: the relative error stays below 1e-10 or the absolute one below 2**-41.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable


def laplace(epsilon: float, order: int) -> float:
    """Return the divergence of two Laplace distributions of scale 1 whose means are epsilon apart.

    Mironov, "Renyi Differential Privacy" (2017), Proposition 6.

    >>> round(laplace(1.0, 2), 6)
    0.619124
    """
    a = order
    if a * epsilon < 1:  # as a power series, without its first two terms, which cancel
        excess = math.fsum(
            epsilon**k / math.factorial(k) * ((a - 1) ** (k - 1) + (-1) ** k * a ** (k - 1))
            for k in range(2, 26)
        )
        return math.log1p(a * (a - 1) / (2 * a - 1) * excess) / (a - 1)
    grown = math.log(a / (2 * a - 1)) + (a - 1) * epsilon
    shrunk = math.log((a - 1) / (2 * a - 1)) - a * epsilon
    return (grown + math.log1p(math.exp(shrunk - grown))) / (a - 1)


def randomized_response(epsilon: float, order: int, categories: int = 2) -> float:
    """Return the divergence of the randomized responses of two different categories.

    For two categories the largest that any (epsilon, 0)-DP pair has: Bun and Steinke,
    "Concentrated Differential Privacy" (2016), Proposition 3.3.

    The moment is 1 + r (x**a - 1)(1 - x**(1-a)) with x = exp(epsilon) and r = 1/(x + k - 1).

    >>> round(randomized_response(1.0, 2), 6)
    0.735326
    """
    a, others = order, categories - 1
    if a * epsilon < 1:
        share = 1 / (math.exp(epsilon) + others)
        excess = share * math.expm1(a * epsilon) * -math.expm1((1 - a) * epsilon)
        return math.log1p(excess) / (a - 1)
    lies = math.exp(-(2 * a - 1) * epsilon) + (others - 1) * math.exp(-a * epsilon)
    return epsilon + (math.log1p(lies) - math.log1p(others * math.exp(-epsilon))) / (a - 1)


def bounded_range(epsilon: float, order: int) -> float:
    """Return the largest divergence of any pair whose privacy loss lies in an interval [t-e, t].

    Dong, Durfee, Rogers, "Optimal Differential Privacy Composition for Exponential Mechanisms"
    (2020), Lemma 3.2: for each t the worst pair has the two losses t and t - e. Its moment
    u**(a-1) (A - u B) / (exp(e) - 1), with u = exp(t), A = exp(e) - exp((1-a) e) and
    B = 1 - exp((1-a) e), is largest at u = (a-1) A / (a B). Below 1e-4 the bound a e**2 / 8
    (Cesar and Rogers, "Bounding, Concentrating, and Truncating", 2021), which it approaches.

    >>> round(bounded_range(1.0, 2), 6)
    0.240229
    """
    a = order
    quadratic = a * epsilon * epsilon / 8
    if a * epsilon < 1e-4:
        return quadratic
    numerator = -math.expm1(-a * epsilon)
    denominator = -math.expm1((1 - a) * epsilon)
    log_u = math.log((a - 1) / a) + epsilon + math.log(numerator / denominator)
    rest = math.log(numerator / -math.expm1(-epsilon)) - math.log(a)
    return min(quadratic, epsilon, log_u + rest / (a - 1))


def sampled(probability: float, order: int, log_moment: Callable[[int], float]) -> float:
    """Return the divergence of (1-q) P0 + q P1 from P0 for a symmetric pair.

    ``log_moment(k)`` is (k-1) times the divergence of P1 from P0 at order k. The moment is
    1 + sum over k >= 2 of binomial(a, k) (1-q)**(a-k) q**k (exp(log_moment(k)) - 1), since the
    binomial weights sum to 1 and k = 0, 1 contribute nothing: all terms are positive.

    Mironov, Talwar, Zhang, "Renyi Differential Privacy of the Sampled Gaussian Mechanism" (2019),
    section 3.3; by Theorem 5 there, the other direction is never dearer where an involution
    swaps P0 and P1.

    Args:
        probability: q, in (0, 1).
        order: a.
        log_moment: Non-negative and finite or infinite, for k = 2, ..., a.
    """
    q, logs = probability, []
    for k in range(2, order + 1):
        exponent = max(log_moment(k), sys.float_info.min)
        if exponent == math.inf:
            return math.inf
        growth = exponent + math.log(-math.expm1(-exponent))
        rest = (order - k) * math.log1p(-q) if k < order else 0.0
        logs.append(math.log(math.comb(order, k)) + rest + k * math.log(q) + growth)
    return _log1p_of_sum(logs) / (order - 1)


def sampled_without_replacement(
    probability: float, order: int, divergence: Callable[[int], float], epsilon: float
) -> float:
    """Bound the divergence of a mechanism on a sample of fixed size, one unit replaced.

    Wang, Balle, Kasiviswanathan, "Subsampled Renyi Differential Privacy and Analytical Moments
    Accountant" (2019), Theorem 9.

    Args:
        probability: Sample size over dataset size.
        order: a.
        divergence: That of the mechanism itself by order, one unit of the sample replaced.
        epsilon: Its pure epsilon, ``math.inf`` if it has none.
    """
    q, logs = probability, []
    log_factor = math.log(math.expm1(epsilon)) if epsilon < 1 else math.inf
    for k in range(2, order + 1):
        exponent = max((k - 1) * divergence(k), sys.float_info.min)
        if exponent == math.inf:
            return math.inf
        grown = exponent + min(math.log(2), k * log_factor)
        if k == 2:
            grown = min(grown, math.log(4) + exponent + math.log(-math.expm1(-exponent)))
        logs.append(math.log(math.comb(order, k)) + k * math.log(q) + grown)
    return _log1p_of_sum(logs) / (order - 1)


def total(values: Iterable[float]) -> float:
    """Return the exactly rounded sum; infinite where it is beyond doubles.

    >>> total([1e308, 1e308])
    inf
    """
    try:
        return math.fsum(values)
    except OverflowError:
        return math.inf


def _log1p_of_sum(logs: list[float]) -> float:
    """Return log(1 + sum(exp(logs)))."""
    top = max(logs)
    log_sum = top + math.log(math.fsum(math.exp(term - top) for term in logs))
    if log_sum > 0:
        return log_sum + math.log1p(math.exp(-log_sum))
    return math.log1p(math.exp(log_sum))
