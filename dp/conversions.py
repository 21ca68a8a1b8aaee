"""Conversions between Renyi DP, Gaussian DP and (epsilon, delta)-DP.

The Renyi conversion is Proposition 12 of Canonne, Kamath and Steinke, "The Discrete Gaussian
for Differential Privacy" (2020), also equation 20 of Asoodeh et al. (2020); the Gaussian one is
Corollary 2.13 of Dong, Roth and Su, "Gaussian Differential Privacy" (2022), equal to Theorem 8
of Balle and Wang, "Improving the Gaussian Mechanism for Differential Privacy" (2018).
"""

from __future__ import annotations

import math

from scipy.optimize import brentq
from scipy.special import expit, log_ndtr, ndtri

from dp import validate
from dp.errors import InvalidParameter


def renyi_to_epsilon(order: int, divergence: float, delta: float) -> float:
    """Return the epsilon at ``delta`` of a mechanism with this Renyi divergence at this order.

    Args:
        order: Renyi order, above 1.
        divergence: Bound on the Renyi divergence at that order, in nats.
        delta: Target delta.

    Returns:
        Epsilon, in nats, never below 0.

    >>> round(renyi_to_epsilon(32, 32 * 0.1, 1e-6), 4)
    3.5021
    """
    epsilon = (
        divergence + math.log1p(-1 / order) - (math.log(delta) + math.log(order)) / (order - 1)
    )
    return max(0.0, epsilon)


def renyi_to_delta(order: int, divergence: float, epsilon: float) -> float:
    """Return the delta at ``epsilon`` of a mechanism with this Renyi divergence at this order.

    >>> f"{renyi_to_delta(32, 32 * 0.1, renyi_to_epsilon(32, 32 * 0.1, 1e-6)):.3e}"
    '1.000e-06'
    """
    a = order
    exponent = (a - 1) * (divergence - epsilon) + a * math.log1p(-1 / a) - math.log(a - 1)
    return math.exp(min(0.0, exponent))


def renyi_limit(order: int, epsilon: float, delta: float) -> float:
    """Return the Renyi divergence at ``order`` that converts to exactly (epsilon, delta).

    The inverse of :func:`renyi_to_epsilon`; negative where this order cannot reach
    (epsilon, delta) at all.
    """
    return epsilon - math.log1p(-1 / order) + (math.log(delta) + math.log(order)) / (order - 1)


def gaussian_delta(epsilon: float, mu: float) -> float:
    """Return the smallest delta for which a mu-GDP mechanism is (epsilon, delta)-DP.

    >>> f"{gaussian_delta(1.0, 0.25):.6e}"
    '2.924272e-06'
    """
    kept = log_ndtr(-epsilon / mu + mu / 2)
    removed = epsilon + log_ndtr(-epsilon / mu - mu / 2)
    return float(math.exp(kept) * -math.expm1(min(0.0, removed - kept)))


def gaussian_delta_above(epsilon: float, mu: float) -> float:
    """Return :func:`gaussian_delta` with its rounding error added, to report.

    Two tails of nearly equal size are subtracted; where epsilon and mu are tiny, little is left
    of them.

    >>> gaussian_delta_above(1.2e-6, 1.8e-7) > gaussian_delta(1.2e-6, 1.8e-7)
    True
    """
    kept = float(log_ndtr(-epsilon / mu + mu / 2))
    return gaussian_delta(epsilon, mu) + math.exp(kept) * 4e-16 * (1 + abs(kept))


def gaussian_mu(epsilon: float, delta: float) -> float:
    """Return the largest mu for which mu-GDP is (epsilon, delta)-DP, less 1e-8 of it.

    >>> mu = gaussian_mu(1.0, 1e-6)
    >>> gaussian_delta(1.0, mu) <= 1e-6 < gaussian_delta(1.0, mu * (1 + 1e-7))
    True
    """
    epsilon, delta = validate.epsilon(epsilon=epsilon), validate.positive(delta=delta)
    if not delta < 1:
        raise InvalidParameter("delta", delta, "below 1")
    high = 1.0
    while gaussian_delta(epsilon, high) < delta:
        high *= 2
    low = high
    while gaussian_delta(epsilon, low) > delta:
        low /= 2
    mu: float = brentq(
        lambda mu: gaussian_delta(epsilon, mu) - delta, low, high, xtol=low * 1e-13, rtol=1e-13
    )
    return mu * (1 - 1e-8)


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Return the smallest epsilon for which mu-GDP is (epsilon, delta)-DP, rounded up by 1e-9.

    >>> round(gaussian_epsilon(1.0, 1e-5), 5)
    4.37718
    """
    if not mu < math.inf:
        return math.inf
    if mu == 0 or gaussian_delta_above(0.0, mu) <= delta:
        return 0.0
    high = mu
    while gaussian_delta_above(high, mu) > delta:
        high *= 2
    found = brentq(
        lambda at: gaussian_delta_above(at, mu) - delta, 0.0, high, xtol=1e-13, rtol=1e-13
    )
    return float(found) * (1 + 1e-9)


def pure_mu(epsilon: float) -> float:
    """Return the smallest mu for which every (epsilon, 0)-DP mechanism is mu-GDP.

    Its trade-off curve is two chords of the Gaussian one, so the bound is exact.

    >>> round(pure_mu(1.0), 6)
    1.232035
    """
    return float(-2 * ndtri(expit(-epsilon)))
