"""Privacy loss distributions: tight sums of what was fixed before anything ran.

A thin layer over dp_accounting (Doroshenko et al., "Connect the Dots: Tighter Discrete
Approximations of Privacy Loss Distributions", 2022), always with pessimistic rounding: each event
is replaced by a pair of output distributions on a grid of losses that dominates it, and uses are
composed by FFT, apart for adding and for removing a unit.

Never a rule for events that are chosen after seeing outputs; :mod:`dp.accountings` says what may
be computed from this.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import log_ndtr

from dp import divergences, validate
from dp.conversions import gaussian_mu, pure_mu
from dp.costs import cost
from dp.errors import InvalidParameter, NothingFits, UnsupportedEvent
from dp.events import (
    Atomic,
    PoissonSampled,
    ShuffledEpoch,
    parts,
)
from dp.mechanisms import (
    Gaussian,
    Laplace,
)
from dp.units import NeighboringRelation

if TYPE_CHECKING:
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

SMALLEST_DELTA = 1e-9
"""Below it the rounding errors of an FFT are not negligible."""

_GRID = 1e-4
"""Distance of neighboring losses, in nats; twice as much, and so on, where a sum is very wide."""

_POINTS = 1_000_000
"""About the most points of one grid."""

_WIDEST = 600.0
"""Most nats between the losses of one use: beyond it the probabilities leave double precision."""

_ROUNDING, _ROUNDING_PER_USE = 1e-11, 2.0**-52
"""Added to every delta for the FFT's rounding, on top of what its output shows of it (eight times
the negative cells, and the mass that is missing). Raising a transform to the n-th power multiplies
the rounding of its values by n."""

Slots = tuple[tuple[Atomic, int], ...]
"""Events in canonical form, and how often each is used."""


@dataclass(frozen=True, slots=True, eq=False)
class Losses:
    """The privacy losses of a fixed composition, one distribution for each direction.

    Attributes:
        directions: (losses, probabilities, mass at infinity) of each: two arrays of equal shape
            (n,), in nats and in probability.
        slack: What rounding may have taken from a delta; already in :meth:`delta`.
    """

    directions: tuple[tuple[NDArray[np.float64], NDArray[np.float64], float], ...]
    slack: float

    def delta(self, epsilon: float, mu: float = 0.0) -> float:
        """Bound the delta at epsilon of this composition together with a mu-GDP interaction.

        The mass at infinity plus, over all losses l, p(l) times the delta of mu-GDP at
        epsilon - l; the larger direction; plus the slack.

        Args:
            epsilon: In nats; any real number.
            mu: Gaussian-DP parameter; 0 for this composition alone.
        """
        return self.slack + max(
            infinity + float(probabilities @ _gaussian_deltas(epsilon - losses, mu))
            for losses, probabilities, infinity in self.directions
        )

    def epsilon(self, delta: float, mu: float = 0.0) -> float:
        """Return the smallest epsilon at delta, rounded up by 1e-6; infinite if there is none."""
        if self.delta(0.0, mu) <= delta:
            return 0.0
        high = 1.0
        while self.delta(high, mu) > delta:
            high *= 2
            if high > 1e4:
                return math.inf
        return float(brentq(lambda at: self.delta(at, mu) - delta, 0.0, high, xtol=1e-9)) + 1e-6


@lru_cache(maxsize=8)
def compose(slots: Slots, relation: NeighboringRelation, *, pessimistic: bool = True) -> Losses:
    """Return the losses of all uses of all slots.

    Args:
        slots: Events and their uses.
        relation: Neighboring relation.
        pessimistic: Whether losses are rounded up; down only to show what the grid costs.

    Raises:
        UnsupportedEvent: If no dominating pair is known for an event under the relation.

    >>> from dp.units import NeighboringRelation
    >>> steps = ((PoissonSampled(0.01, Gaussian(1.0)), 1000),)
    >>> losses = compose(steps, NeighboringRelation.ADD_REMOVE)
    >>> round(losses.epsilon(1e-6), 3)
    2.125
    """
    pairs = tuple(_pairs(slots, relation))
    if not pairs:
        nothing = np.zeros(1), np.ones(1), 0.0
        return Losses((nothing,), 0.0)
    grid = _grid(pairs, relation, pessimistic=pessimistic)
    total: PrivacyLossDistribution | None = None
    for event, uses in pairs:
        one = one_use(event, relation, grid, pessimistic=pessimistic)
        _check_length(event, uses, one)
        try:
            several = one.self_compose(uses)
            total = several if total is None else total.compose(several)
        except MemoryError:
            raise NothingFits(f"{uses} uses of {event!r} are too many to compute") from None
    return _losses(total, math.fsum(uses for _, uses in pairs) * _ROUNDING_PER_USE)


def _pairs(slots: Slots, relation: NeighboringRelation) -> Iterator[tuple[Atomic, int]]:
    """Yield the events that have a pair each: an epoch is as many uses as its event has parts."""
    for event, uses in slots:
        cost(event, relation)  # refuses it under another relation
        if isinstance(event, ShuffledEpoch):
            yield from _pairs(
                tuple((part, uses * n) for part, n in parts(event.event).items()), relation
            )
        else:
            yield event, uses


def _grid(pairs: Slots, relation: NeighboringRelation, *, pessimistic: bool) -> float:
    """Return the distance of losses at which the sum takes about a million points at most.

    Losses that are rounded down drift by half of the grid at each use, and get a finer one;
    connected dots do not drift.
    """
    squared = divergences.total(uses * cost(event, relation).renyi(2) for event, uses in pairs)
    grid = _GRID if pessimistic else _GRID / 8
    while (squared / 2 + 16 * math.sqrt(squared)) / grid > _POINTS:
        grid *= 2
        if grid > 0.1:
            raise NothingFits(f"the losses of {pairs!r} are too wide for any budget")
    return grid


def largest_count(
    event: Atomic, relation: NeighboringRelation, epsilon: float, delta: float
) -> int:
    """Return how many uses of one event are (epsilon, delta)-DP if fixed in advance.

    Raises:
        UnsupportedEvent: As for :func:`compose`.
    """

    def excess(uses: float) -> float:
        try:
            spent = compose(((event, max(1, round(uses))),), relation).delta(epsilon)
        except NothingFits:  # too wide to compute is too much
            spent = 1.0
        return math.log(max(spent, 1e-300) / delta)

    if excess(1) > 0:
        return 0
    high = 2
    while excess(high) <= 0:
        if high == validate.MAX_COUNT:
            return high
        high = min(4 * high, validate.MAX_COUNT)
    found = round(brentq(excess, 1, high, xtol=0.5, rtol=1e-12))
    while excess(found) > 0:
        found -= 1
    return found


def largest_mu(losses: Losses, epsilon: float, delta: float) -> float:
    """Return the largest mu for which the losses and a mu-GDP interaction are (epsilon, delta)-DP.

    Rounded down; 0 where nothing is left.

    Raises:
        NothingFits: If the losses alone are not (epsilon, delta)-DP.
        InvalidParameter: If the numerical slack is not negligible beside delta.
    """
    if losses.slack > 0.1 * delta:
        raise InvalidParameter(
            "delta", delta, f"far above {losses.slack:.1e}, the rounding error of this plan"
        )
    spent = losses.delta(epsilon)
    if spent > delta:
        raise NothingFits(
            f"the slots alone have delta {spent:.3g} at epsilon {epsilon!r}, above {delta!r}:"
            " commit to fewer uses or more noise"
        )
    high = gaussian_mu(epsilon, delta) * 1.001  # which alone is too much
    low = high / 1e6
    if losses.delta(epsilon, low) > delta:
        return 0.0
    mu = float(brentq(lambda mu: losses.delta(epsilon, mu) - delta, low, high, rtol=1e-10))
    while losses.delta(epsilon, mu) > delta:
        mu *= 1 - 1e-9
    return mu


@lru_cache(maxsize=32)
def one_use(
    event: Atomic, relation: NeighboringRelation, grid: float, *, pessimistic: bool
) -> PrivacyLossDistribution:
    """Return dp_accounting's distribution of one use, its losses rounded up or down to a grid.

    Raises:
        UnsupportedEvent: If no dominating pair is known for the event under the relation.
        NothingFits: If its losses are too wide for the grid.
    """
    bound = cost(event, relation)
    match event:
        case Laplace(scale):
            return _laplace(event, scale, 1.0, grid, pessimistic=pessimistic)
        case PoissonSampled(q, Laplace(scale)):
            return _laplace(event, scale, q, grid, pessimistic=pessimistic)
        case PoissonSampled(q, inner) if all(isinstance(part, Gaussian) for part in parts(inner)):
            mu_squared = cost(inner, relation).mu_squared
            return _gaussian(event, mu_squared, q, grid, pessimistic=pessimistic)
        case PoissonSampled(q, inner) if bound.epsilon < math.inf and not bound.delta:
            epsilon = cost(inner, relation).epsilon
            return _response(event, epsilon, 0.0, q, grid, pessimistic=pessimistic)
    if bound.mu_squared < 0.99 * pure_mu(bound.epsilon) ** 2:
        return _gaussian(event, bound.mu_squared, 1.0, grid, pessimistic=pessimistic)
    if bound.epsilon == math.inf:
        raise UnsupportedEvent(event, "no dominating pair is known for it; use an adaptive budget")
    return _response(event, bound.epsilon, bound.delta, 1.0, grid, pessimistic=pessimistic)


def _laplace(
    event: Atomic, scale: float, q: float, grid: float, *, pessimistic: bool
) -> PrivacyLossDistribution:
    from dp_accounting.pld import privacy_loss_distribution as pld

    _check_range(event, 2 / scale, grid)
    return _dense(
        pld.from_laplace_mechanism(
            scale,
            pessimistic_estimate=pessimistic,
            use_connect_dots=pessimistic,
            value_discretization_interval=grid,
            sampling_prob=q,
        )
    )


def _gaussian(
    event: Atomic, mu_squared: float, q: float, grid: float, *, pessimistic: bool
) -> PrivacyLossDistribution:
    from dp_accounting.pld import privacy_loss_distribution as pld

    mu = math.sqrt(mu_squared) * (1 + 1e-12)
    _check_range(event, mu * mu + 20 * mu, grid)
    return _dense(
        pld.from_gaussian_mechanism(
            1 / max(mu, 1e-12),
            pessimistic_estimate=pessimistic,
            use_connect_dots=pessimistic,
            value_discretization_interval=grid,
            sampling_prob=q,
        )
    )


def _response(
    event: Atomic, epsilon: float, delta: float, q: float, grid: float, *, pessimistic: bool
) -> PrivacyLossDistribution:
    """Return the distribution of randomized response, or of its response on a Poisson sample."""
    from dp_accounting.pld import pld_pmf
    from dp_accounting.pld import privacy_loss_distribution as pld

    _check_range(event, 2 * epsilon, grid)
    out = 1 / (1 + math.exp(epsilon)), 1 / (1 + math.exp(-epsilon))
    mixed = (1 - q) * out[0] + q * out[1], (1 - q) * out[1] + q * out[0]

    def rounded(p: tuple[float, float], r: tuple[float, float]) -> pld_pmf.PLDPmf:
        # Two outcomes, of probabilities p against r; the dots around their losses.
        losses = [math.log(one / other) for one, other in zip(p, r, strict=True)]
        low = [math.floor(loss / grid) for loss in losses]
        if not pessimistic:
            inside = {low[0]: p[0] * (1 - delta)}
            inside[low[1]] = inside.get(low[1], 0.0) + p[1] * (1 - delta)
            return pld_pmf.create_pmf(inside, grid, delta, False)
        dots = sorted({dot + step for dot in low for step in (0, 1)})
        scales = [math.exp(dot * grid) for dot in dots]
        deltas = [max(0.0, p[0] - c * r[0]) + max(0.0, p[1] - c * r[1]) for c in scales]
        pmf = pld_pmf.create_pmf_pessimistic_connect_dots(grid, dots, deltas)
        inside = {at: mass * (1 - delta) for at, mass in pmf._loss_probs.items()}  # noqa: SLF001
        return pld_pmf.create_pmf(inside, grid, delta + (1 - delta) * pmf._infinity_mass, True)  # noqa: SLF001

    return _dense(pld.PrivacyLossDistribution(rounded(mixed, out), rounded(out, mixed)))


def _dense(distribution: PrivacyLossDistribution) -> PrivacyLossDistribution:
    # Sparse ones are composed use by use: a loop over 2**53 uses of next to nothing.
    both = distribution._pmf_remove.to_dense_pmf(), distribution._pmf_add.to_dense_pmf()  # noqa: SLF001
    return type(distribution)(*both)


def _check_range(event: Atomic, losses: float, grid: float) -> None:
    if not losses <= min(2 * _POINTS * grid, _WIDEST):
        raise NothingFits(f"one use of {event!r} may lose up to {losses / 2:.3g} nats of privacy")


def _check_length(event: Atomic, uses: int, one: PrivacyLossDistribution) -> None:
    """Refuse so many uses that their losses leave dp_accounting's 64-bit integers, or memory."""
    for pmf in (one._pmf_remove, one._pmf_add):  # noqa: SLF001
        dense = pmf.to_dense_pmf()
        if abs(int(dense._lower_loss)) * uses >= 2**62:  # noqa: SLF001
            raise NothingFits(f"{uses} uses of {event!r} are too many to compute")


def _losses(distribution: PrivacyLossDistribution, rounding: float) -> Losses:
    # dp_accounting offers no public view of the probabilities; tests pin what is read here.
    directions, slack = [], 0.0
    for pmf in (distribution._pmf_remove, distribution._pmf_add):  # noqa: SLF001
        dense = pmf.to_dense_pmf()
        raw = np.asarray(dense._probs, dtype=np.float64)  # noqa: SLF001
        probabilities = np.maximum(raw, 0.0)
        infinity = float(dense._infinity_mass)  # noqa: SLF001
        missing = max(0.0, 1.0 - math.fsum((infinity, float(raw.sum()))))
        slack = max(slack, missing + 8 * float((probabilities - raw).sum()))
        kept = probabilities > 0
        losses = (np.arange(len(raw)) + dense._lower_loss)[kept] * dense._discretization  # noqa: SLF001
        directions.append((losses, probabilities[kept], infinity))
    return Losses(tuple(directions), slack + _ROUNDING + rounding)


def _gaussian_deltas(epsilons: NDArray[np.float64], mu: float) -> NDArray[np.float64]:
    if mu == 0.0:
        return -np.expm1(np.minimum(epsilons, 0.0))
    kept = log_ndtr(-epsilons / mu + mu / 2)
    removed = epsilons + log_ndtr(-epsilons / mu - mu / 2)
    return np.exp(kept) * -np.expm1(np.minimum(0.0, removed - kept))
