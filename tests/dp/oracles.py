"""Exact or high-precision privacy of explicit output distributions: shares no formula with dp/."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from mpmath import mp, mpf

Distribution = Sequence[mpf]


def finite_renyi(p: Distribution, q: Distribution, order: int) -> mpf:
    """Renyi divergence of two distributions on finitely many outcomes, by its definition."""
    moment = mp.fsum(a**order * b ** (1 - order) for a, b in zip(p, q, strict=True))
    return mp.log(moment) / (order - 1)


def both_ways(p: Distribution, q: Distribution, order: int) -> mpf:
    return max(finite_renyi(p, q, order), finite_renyi(q, p, order))


def largest_loss(p: Distribution, q: Distribution) -> mpf:
    return max(abs(mp.log(a / b)) for a, b in zip(p, q, strict=True))


def hockey_stick(pairs: Iterable[tuple[mpf, mpf]], epsilon: mpf) -> mpf:
    """Exact delta(epsilon) from the two probabilities of every transcript, one direction."""
    return mp.fsum(max(mpf(0), a - mp.exp(epsilon) * b) for a, b in pairs)


def worst_delta(leaves: Sequence[tuple[mpf, mpf]], epsilon: mpf) -> mpf:
    return max(
        hockey_stick(leaves, epsilon),
        hockey_stick([(b, a) for a, b in leaves], epsilon),
    )


def randomized_response(epsilon: object) -> tuple[list[mpf], list[mpf]]:
    truth = 1 / (1 + mp.exp(-mpf(epsilon)))
    lie = 1 / (1 + mp.exp(mpf(epsilon)))
    return [truth, lie], [lie, truth]


def jump(probability: object, loss: object) -> tuple[list[mpf], list[mpf]]:
    """Two outcomes: one of the given probability and privacy loss, one that is nearly neutral."""
    p, z = mpf(probability), mpf(loss)
    return [p, 1 - p], [p * mp.exp(-z), 1 - p * mp.exp(-z)]


def density_renyi(
    log_p: Callable[[mpf], mpf],
    log_q: Callable[[mpf], mpf],
    order: int,
    *,
    low: mpf,
    high: mpf,
    step: mpf,
) -> mpf:
    """Renyi divergence of two analytic densities, by the trapezoidal rule on the real line.

    It sums the excess E_Q[r**a - 1 - a (r - 1)] of r = p/q, whose mean is the moment less 1: a
    divergence of 1e-20 keeps its digits. The rule converges exponentially for such integrands.
    """
    terms = []
    for index in range(int(mp.ceil((high - low) / step)) + 1):
        at = low + index * step
        log_base = log_q(at)
        log_ratio = log_p(at) - log_base
        excess = mp.exp(order * log_ratio) - 1 - order * (mp.exp(log_ratio) - 1)
        terms.append(mp.exp(log_base) * excess)
    return mp.log1p(step * mp.fsum(terms)) / (order - 1)


def normal_log(center: object, sigma: mpf) -> Callable[[mpf], mpf]:
    norm = mp.log(sigma) + mp.log(2 * mp.pi) / 2
    return lambda at: -(((at - center) / sigma) ** 2) / 2 - norm


def mixture_log(q: mpf, sigma: mpf) -> Callable[[mpf], mpf]:
    """(1 - q) N(0, sigma^2) + q N(1, sigma^2)."""
    base = normal_log(0, sigma)
    return lambda at: base(at) + mp.log1p(q * mp.expm1((2 * at - 1) / (2 * sigma**2)))


def gaussian_both_ways(sigma: object, order: int) -> mpf:
    sigma = mpf(sigma)
    bounds = {"low": -order - 14 * sigma, "high": order + 14 * sigma, "step": sigma / 2}
    zero, one = normal_log(0, sigma), normal_log(1, sigma)
    return max(density_renyi(one, zero, order, **bounds), density_renyi(zero, one, order, **bounds))


def sampled_gaussian_both_ways(q: object, sigma: object, order: int) -> tuple[mpf, mpf]:
    """Both directions. The integrand's singularities lie pi sigma^2 off the line: see the step."""
    q, sigma = mpf(q), mpf(sigma)
    mixed, base = mixture_log(q, sigma), normal_log(0, sigma)
    up = density_renyi(mixed, base, order, low=-14 * sigma, high=order + 14 * sigma, step=sigma / 2)
    down = density_renyi(
        base,
        mixed,
        order,
        low=-14 * sigma - 1,
        high=14 * sigma + 1,
        step=min(sigma / 2, sigma**2 / 2),
    )
    return up, down


def laplace_both_ways(scale: object, order: int) -> mpf:
    """Numeric between the kinks at 0 and 1, where the integrand rises; the two ways are equal."""
    scale = mpf(scale)

    def moment(at: mpf) -> mpf:
        return mp.exp((-order * abs(at - 1) - (1 - order) * abs(at)) / scale) / (2 * scale)

    width = 6 * scale / (2 * order - 1)
    low = max(mpf(0), 1 - 12 * width)  # what lies below is e**-72 of the whole
    panels = mp.linspace(low, 1, max(2, int((1 - low) / width) + 2))
    inside = mp.quad(moment, panels, method="gauss-legendre", maxdegree=5)
    # Outside [0, 1] the integrand is one exponential of rate 1/scale.
    return mp.log(inside + scale * (moment(mpf(0)) + moment(mpf(1)))) / (order - 1)


def gaussian_delta(epsilon: object, mu: object) -> mpf:
    """delta of a mu-GDP pair from its definition, in the caller's precision.

    The privacy loss of N(mu, 1) against N(0, 1) is N(mu^2/2, mu^2) under the first.
    """
    epsilon, mu = mpf(epsilon), mpf(mu)
    kept = mp.erfc((epsilon / mu - mu / 2) / mp.sqrt(2)) / 2
    removed = mp.erfc((epsilon / mu + mu / 2) / mp.sqrt(2)) / 2
    return kept - mp.exp(epsilon) * removed


def gaussian_tradeoff(alpha: mpf, mu: mpf) -> mpf:
    """Type II error of the best test at level alpha of N(mu, 1) against N(0, 1)."""
    quantile = mp.sqrt(2) * mp.erfinv(1 - 2 * alpha)
    return mp.erfc(-(quantile - mu) / mp.sqrt(2)) / 2
