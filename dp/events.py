"""What was run, as frozen values: an event has exactly the parameters that its price needs.

Mechanisms, ledger and accounting meet only here (after ``dp_accounting.dp_event``).

Compatibility contract, because ledgers store events for ever:

* a class or a parameter is never removed and its meaning never changes; a new meaning is a
  new class;
* an event that a version does not know is an error in that version, never skipped;
* two events that :func:`canonical` maps to the same value have the same price.

>>> canonical(Repeated(Repeated(Gaussian(2.0), 3), 5))
Repeated(event=Gaussian(noise_multiplier=2.0), count=15)
"""

from __future__ import annotations

from dataclasses import dataclass

from dp import validate
from dp.errors import InvalidParameter

MAX_DEPTH = 16
"""Deepest nesting of events that is accepted."""


@dataclass(frozen=True, slots=True)
class Gaussian:
    """A sum of L2 sensitivity C, plus N(0, (noise_multiplier * C)**2) per coordinate.

    Attributes:
        noise_multiplier: Standard deviation over L2 sensitivity, under the budget's relation.

    >>> Gaussian(noise_multiplier=1.5)
    Gaussian(noise_multiplier=1.5)
    """

    noise_multiplier: float

    def __post_init__(self) -> None:
        _set(self, noise_multiplier=validate.positive(noise_multiplier=self.noise_multiplier))


@dataclass(frozen=True, slots=True)
class Laplace:
    """A sum of L1 sensitivity C, plus Laplace noise of scale noise_multiplier * C.

    Attributes:
        noise_multiplier: Scale over L1 sensitivity; the release is 1/noise_multiplier-DP.
    """

    noise_multiplier: float

    def __post_init__(self) -> None:
        _set(self, noise_multiplier=validate.positive(noise_multiplier=self.noise_multiplier))


@dataclass(frozen=True, slots=True)
class PureDP:
    """Any mechanism that is proved to be (epsilon, 0)-DP.

    Attributes:
        epsilon: The proved bound on the privacy loss, in nats.
    """

    epsilon: float

    def __post_init__(self) -> None:
        _set(self, epsilon=validate.positive(epsilon=self.epsilon))


@dataclass(frozen=True, slots=True)
class PoissonSampled:
    """An event on a fresh secret sample that holds each unit with the same probability.

    Independently for every unit and every use. A sample serves one use: several releases on
    one sample are ``PoissonSampled(q, Composed(...))``, never several events.

    Attributes:
        sampling_probability: Probability that a unit is in the sample, in (0, 1].
        event: What is run on the sample.
    """

    sampling_probability: float
    event: Event

    def __post_init__(self) -> None:
        _set(
            self,
            sampling_probability=validate.probability(
                sampling_probability=self.sampling_probability
            ),
        )
        _check_depth(self)


@dataclass(frozen=True, slots=True)
class Repeated:
    """The same event, ``count`` times, each with fresh randomness.

    Attributes:
        event: What is repeated.
        count: How often, from 1 to 2**53 - 1.
    """

    event: Event
    count: int

    def __post_init__(self) -> None:
        validate.count(count=self.count)
        _check_depth(self)


@dataclass(frozen=True, slots=True)
class Composed:
    """Several events that are charged together, all or none.

    Attributes:
        events: At least one; their order does not matter.
    """

    events: tuple[Event, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.events, tuple | list) or not self.events:
            raise InvalidParameter("events", self.events, "a tuple of at least one event")
        _set(self, events=tuple(self.events))
        _check_depth(self)


@dataclass(frozen=True, slots=True)
class NonPrivate:
    """A release without any guarantee: it fits no budget, and asking for it is recorded."""


Event = Gaussian | Laplace | PureDP | PoissonSampled | Repeated | Composed | NonPrivate
"""Every event there is; the type checker names the places that a new one must reach."""


def canonical(event: Event) -> Event:
    """Return the one form in which equal events are equal values.

    Nested repetitions are multiplied, nested compositions flattened, their equal parts merged
    and sorted, and sampling with probability 1 is dropped.

    Raises:
        InvalidParameter: If multiplied counts pass 2**53 - 1.

    >>> canonical(Composed((PureDP(1.0), Composed((Gaussian(2.0), PureDP(1.0))))))
    Composed(events=(Gaussian(noise_multiplier=2.0), Repeated(event=PureDP(epsilon=1.0), count=2)))
    """
    parts = [
        part if uses == 1 else Repeated(part, uses)
        for part, uses in sorted(_parts(event).items(), key=lambda item: repr(item[0]))
    ]
    return parts[0] if len(parts) == 1 else Composed(tuple(parts))


def _parts(event: Event) -> dict[Event, int]:
    match event:
        case Repeated(inner, uses):
            return {part: uses * times for part, times in _parts(inner).items()}
        case Composed(events):
            total: dict[Event, int] = {}
            for inner in events:
                for part, times in _parts(inner).items():
                    total[part] = total.get(part, 0) + times
            return total
        case PoissonSampled(q, inner):
            return _parts(inner) if q == 1.0 else {PoissonSampled(q, canonical(inner)): 1}
        case Gaussian() | Laplace() | PureDP() | NonPrivate():
            return {event: 1}
    raise InvalidParameter("event", event, "an event of dp.events")


def _depth(event: Event) -> int:
    # One Repeated around anything is free, so that canonical forms are never deeper.
    match event:
        case Repeated(Repeated() as inner, _) | PoissonSampled(_, inner):
            return 1 + _depth(inner)
        case Repeated(inner, _):
            return _depth(inner)
        case Composed(events):
            return 1 + max(_depth(inner) for inner in events)
        case Gaussian() | Laplace() | PureDP() | NonPrivate():
            return 1
    raise InvalidParameter("event", event, "an event of dp.events")


def _check_depth(event: Event) -> None:
    if _depth(event) > MAX_DEPTH:
        raise InvalidParameter("event", event, f"nested at most {MAX_DEPTH} deep")


def _set(event: object, **values: object) -> None:
    for name, value in values.items():
        object.__setattr__(event, name, value)
