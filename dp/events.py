"""What was run, as frozen values: an event has exactly the parameters that its price needs.

Mechanisms, ledger and accounting meet only here (after ``dp_accounting.dp_event``). What each
event costs, under which relation, and by which theorem: the table in :mod:`dp.rows`.

Every sensitivity is meant under the neighboring relation of the budget that is charged.

Compatibility contract, because ledgers store events for ever:

* a class or a parameter is never removed and its meaning never changes; a new meaning is a
  new class;
* an event that a version does not know is an error in that version, never skipped;
* two events that :func:`canonical` maps to the same value have the same price.

>>> canonical(Repeated(Repeated(Gaussian(2.0), 3), 5))
Repeated(event=Gaussian(noise_multiplier=2.0), count=15)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, get_args

from dp import validate
from dp.errors import InvalidParameter
from dp.mechanisms import (
    ZCDP,
    ApproximateDP,
    BandedMatrixFactorization,
    DiscreteGaussian,
    DiscreteLaplace,
    ExponentialMechanism,
    Gaussian,
    GumbelTopK,
    Laplace,
    PermuteAndFlip,
    PerUnitFilter,
    ProposeTestRelease,
    PureDP,
    RandomizedResponse,
    ReportNoisyMax,
    SparseVector,
    TreeAggregation,
    checked,
)

MAX_DEPTH = 16
"""Deepest nesting of events that is accepted."""


# --- sampling -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PoissonSampled:
    """An event on a fresh secret sample that holds each unit with the same probability.

    Independently for every unit and every use. A sample serves one use: several releases on
    one sample are ``PoissonSampled(q, Composed(...))``, never several events. Where several of
    these are discrete Gaussians, they are chosen before the first of them answers.

    Attributes:
        sampling_probability: Probability that a unit is in the sample, in (0, 1].
        event: What is run on the sample.
    """

    sampling_probability: float
    event: Event

    def __post_init__(self) -> None:
        _check(self, sampling_probability=validate.probability)


@dataclass(frozen=True, slots=True)
class FixedSizeSampled:
    """An event on a fresh secret sample of fixed size, drawn without replacement.

    Attributes:
        sample_size: Units in each sample.
        dataset_size: Units in the dataset; public.
        event: What is run on the sample. Its sensitivity is that of replacing one unit: twice the
            clipping norm for a clipped sum.
    """

    sample_size: int
    dataset_size: int
    event: Event

    def __post_init__(self) -> None:
        _check(self, sample_size=validate.count, dataset_size=validate.count)
        if self.sample_size > self.dataset_size:
            raise InvalidParameter("sample_size", self.sample_size, "at most dataset_size")


@dataclass(frozen=True, slots=True)
class ShuffledEpoch:
    """One pass over the dataset in batches that hold every unit once.

    Shuffled and sequential loaders alike; there is no amplification by sampling. The order must
    not depend on what the units contain: sorting or bucketing them by length moves all of them
    when one changes, and is not priced by this.

    Attributes:
        event: What is run on each of the batches. Its sensitivity is that of replacing one unit.
    """

    event: Event

    def __post_init__(self) -> None:
        _check(self)


# --- whole runs ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RepeatAndSelect:
    """The best of K independent runs, K drawn from a truncated negative binomial distribution.

    K is drawn before the first run and stays secret; runs are independent draws from one fixed
    distribution of hyper-parameters; the score is part of each run; only the best run is released.

    Attributes:
        event: One whole run, its score included.
        eta: Shape, above -1; 1 is the geometric and 0 the logarithmic distribution.
        gamma: In (0, 1); the smaller, the more runs.
    """

    event: Event
    eta: float
    gamma: float

    def __post_init__(self) -> None:
        _check(self, eta=validate.finite, gamma=validate.probability)
        if not self.eta > -1:
            raise InvalidParameter("eta", self.eta, "above -1")
        if not self.gamma < 1:
            raise InvalidParameter("gamma", self.gamma, "below 1")


@dataclass(frozen=True, slots=True)
class RepeatAndSelectPoisson:
    """The best of K independent runs, K drawn from a Poisson distribution; conditions as above.

    Attributes:
        event: One whole run, its score included.
        mean: Mean of K, at least 1.
    """

    event: Event
    mean: float

    def __post_init__(self) -> None:
        _check(self, mean=validate.positive)
        if not self.mean >= 1:
            raise InvalidParameter("mean", self.mean, "at least 1")


# --- compositions -------------------------------------------------------------------------------


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
        _check(self, count=validate.count)


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
        object.__setattr__(self, "events", tuple(self.events))
        _check(self)


@dataclass(frozen=True, slots=True)
class NonPrivate:
    """A release without any guarantee: it fits no budget, and asking for it is recorded."""


Atomic = (
    Gaussian
    | DiscreteGaussian
    | Laplace
    | DiscreteLaplace
    | PureDP
    | ApproximateDP
    | ZCDP
    | RandomizedResponse
    | ExponentialMechanism
    | GumbelTopK
    | ReportNoisyMax
    | PermuteAndFlip
    | SparseVector
    | ProposeTestRelease
    | PerUnitFilter
    | PoissonSampled
    | FixedSizeSampled
    | ShuffledEpoch
    | TreeAggregation
    | BandedMatrixFactorization
    | RepeatAndSelect
    | RepeatAndSelectPoisson
    | NonPrivate
)
"""Events that are priced by a formula; the others are sums of these."""

Event = Atomic | Repeated | Composed
"""Every event there is; the type checker names the places that a new one must reach."""

KINDS: dict[str, type[Any]] = {kind.__name__: kind for kind in get_args(Event)}
"""Every class of events by its name."""


def canonical(event: Event) -> Event:
    """Return the one form in which equal events are equal values.

    Nested repetitions are multiplied, nested compositions flattened, their equal parts merged
    and sorted, and sampling with probability 1 is dropped.

    Raises:
        InvalidParameter: If multiplied counts pass 2**53 - 1.

    >>> canonical(Composed((PureDP(1.0), Composed((Gaussian(2.0), PureDP(1.0))))))
    Composed(events=(Gaussian(noise_multiplier=2.0), Repeated(event=PureDP(epsilon=1.0), count=2)))
    """
    repeated = [
        part if uses == 1 else Repeated(part, uses)
        for part, uses in sorted(parts(event).items(), key=lambda item: repr(item[0]))
    ]
    return repeated[0] if len(repeated) == 1 else Composed(tuple(repeated))


def parts(event: Event) -> dict[Atomic, int]:
    """Return how often each atomic event, in canonical form, happens in one use of the event.

    >>> parts(Repeated(Composed((PureDP(1.0), Repeated(Gaussian(2.0), 3))), 2))
    {PureDP(epsilon=1.0): 2, Gaussian(noise_multiplier=2.0): 6}
    """
    match event:
        case Repeated(inner, uses):
            return {part: _product(uses, times) for part, times in parts(inner).items()}
        case Composed(events):
            total: dict[Atomic, int] = {}
            for inner in events:
                for part, times in parts(inner).items():
                    total[part] = _product(1, total.get(part, 0) + times)
            return total
        case PoissonSampled(1.0, inner):
            return parts(inner)
        case (
            PoissonSampled(event=inner)
            | FixedSizeSampled(event=inner)
            | ShuffledEpoch(event=inner)
            | RepeatAndSelect(event=inner)
            | RepeatAndSelectPoisson(event=inner)
        ):
            others = {field.name: getattr(event, field.name) for field in fields(event)}
            return {type(event)(**(others | {"event": canonical(inner)})): 1}
        case _ if KINDS.get(type(event).__name__) is type(event):
            return {event: 1}
    raise InvalidParameter("event", event, "an event of dp.events")


def _product(uses: int, times: int) -> int:
    return validate.count(count=uses * times)


def _depth(event: Event) -> int:
    # One Repeated around anything is free, so that canonical forms are never deeper.
    match event:
        case Repeated(Repeated() as inner, _):
            return 1 + _depth(inner)
        case Repeated(inner, _):
            return _depth(inner)
        case Composed(events):
            return 1 + max(_depth(inner) for inner in events)
        case _ if KINDS.get(type(event).__name__) is type(event):
            return 1 + _depth(event.event) if hasattr(event, "event") else 1
    raise InvalidParameter("event", event, "an event of dp.events")


def _check(event: Event, **validators: Callable[..., object]) -> None:
    """Replace each named parameter by its validated value, and bound the depth."""
    checked(event, **validators)
    if _depth(event) > MAX_DEPTH:
        raise InvalidParameter("event", event, f"nested at most {MAX_DEPTH} deep")
