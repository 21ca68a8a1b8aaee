"""What-if on a budget's current state: the same integers as enforcement, and spends nothing.

>>> from dp import Gaussian, adaptive
>>> budget = adaptive(3.0, 1e-6)
>>> unspent = (0,) * len(budget.limits)
>>> uses_that_fit(budget, unspent, Gaussian(50.0))
952
>>> round(smallest_noise(budget, unspent, Gaussian, uses=952), 2)
49.98
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from dp import validate
from dp.errors import NothingFits
from dp.events import (
    Event,
    PoissonSampled,
    parts,
)
from dp.filters import Filter, Price
from dp.mechanisms import (
    Gaussian,
)


def uses_that_fit(budget: Filter, totals: Price, event: Event) -> int:
    """Return how many uses of the event still fit on top of the totals.

    Args:
        budget: The budget's filter.
        totals: What its lanes hold now.
        event: One use.

    Raises:
        UnsupportedEvent: If the event has no price under this budget.
    """
    return budget.uses_that_fit(totals, budget.price(event))


def steps_that_fit(
    budget: Filter, totals: Price, *, sampling_probability: float, noise_multiplier: float
) -> int:
    """Return how many DP-SGD steps with Poisson samples still fit.

    >>> from dp import adaptive
    >>> budget = adaptive(3.0, 1e-6)
    >>> steps_that_fit(budget, (0,) * 19, sampling_probability=0.01, noise_multiplier=1.0)
    1544
    """
    return uses_that_fit(
        budget, totals, PoissonSampled(sampling_probability, Gaussian(noise_multiplier))
    )


def after(budget: Filter, totals: Price, events: Iterable[tuple[Event, int]]) -> Price | None:
    """Return what the lanes would hold after the events in this order, or None if one is refused.

    Args:
        budget: The budget's filter.
        totals: What its lanes hold now.
        events: Each with its number of uses.

    Raises:
        UnsupportedEvent: If an event has no price under this budget.
    """
    for event, uses in events:
        totals = budget.after(totals, budget.price(event), validate.count(uses=uses))
        if not budget.admits(totals):
            return None
    return totals


def frontier(
    budget: Filter,
    totals: Price,
    with_noise: Callable[[float], Event],
    noise_multipliers: Sequence[float],
) -> tuple[tuple[float, int], ...]:
    """Return (noise multiplier, uses that fit) for each noise multiplier.

    >>> from dp import Gaussian, adaptive
    >>> frontier(adaptive(3.0, 1e-6), (0,) * 19, Gaussian, [25.0, 50.0, 100.0])
    ((25.0, 238), (50.0, 952), (100.0, 3810))
    """
    return tuple(
        (noise, uses_that_fit(budget, totals, with_noise(noise))) for noise in noise_multipliers
    )


def smallest_noise(
    budget: Filter,
    totals: Price,
    with_noise: Callable[[float], Event],
    *,
    uses: int,
    at_most: float = 1e9,
) -> float:
    """Return the smallest noise multiplier with which ``uses`` uses still fit, rounded up.

    Args:
        budget: The budget's filter.
        totals: What its lanes hold now.
        with_noise: Builds one use from a noise multiplier, for instance
            ``lambda sigma: PoissonSampled(0.01, Gaussian(sigma))``; more noise must cost less.
        uses: How many uses must fit.
        at_most: Largest noise multiplier to consider.

    Returns:
        A noise multiplier of at least 1e-9 that fits, at most 1e-6 of itself above the smallest.

    Raises:
        NothingFits: If not even ``at_most`` fits.

    Under ``planned`` the noise of a slot's event is tried by itself: it costs uses of the slot,
    where less and more noise both cost mu squared.
    """
    uses = validate.count(uses=uses)

    def fits(noise: float) -> bool:
        return uses_that_fit(budget, totals, with_noise(noise)) >= uses

    high = validate.positive(at_most=at_most)
    planned = [noise for noise in _noises(budget.slots) if noise <= high and fits(noise)]
    if not fits(high):
        if planned:
            return min(planned)
        raise NothingFits(f"{uses} uses with a noise multiplier of up to {at_most:g}")
    low = min(1e-9, high)
    if fits(low):
        return low
    while high / low > 1 + 1e-6:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if fits(middle) else (middle, high)
    return min((high, *planned))


def _noises(slots: Iterable[Event]) -> Iterator[float]:
    """Yield the noise multipliers of the Gaussians in these events."""
    for slot in slots:
        if isinstance(slot, Gaussian):
            yield slot.noise_multiplier
        elif hasattr(slot, "event"):
            yield from _noises(parts(slot.event))
