"""Mechanisms without others inside them, as frozen values; :mod:`dp.events` has all events.

Every sensitivity is meant under the neighboring relation of the budget that is charged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dp import validate
from dp.errors import InvalidParameter

MAX_COEFFICIENTS = 4096
"""Longest band of a matrix factorization."""


# --- additive noise -----------------------------------------------------------------------------


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
        checked(self, noise_multiplier=validate.positive)


@dataclass(frozen=True, slots=True)
class DiscreteGaussian:
    """An integer sum of L2 sensitivity C, plus discrete Gaussian noise per coordinate.

    The noise of each coordinate is one draw of mass proportional to
    exp(-x**2 / (2 * (noise_multiplier * C)**2)) on the integers; a sum of draws that several
    parties add is another distribution, and dearer.

    Attributes:
        noise_multiplier: Parameter sigma of the noise over L2 sensitivity.
    """

    noise_multiplier: float

    def __post_init__(self) -> None:
        checked(self, noise_multiplier=validate.positive)


@dataclass(frozen=True, slots=True)
class Laplace:
    """A sum of L1 sensitivity C, plus Laplace noise of scale noise_multiplier * C.

    Attributes:
        noise_multiplier: Scale over L1 sensitivity; the release is 1/noise_multiplier-DP.
    """

    noise_multiplier: float

    def __post_init__(self) -> None:
        checked(self, noise_multiplier=validate.positive)


@dataclass(frozen=True, slots=True)
class DiscreteLaplace:
    """An integer sum of L1 sensitivity C, plus discrete Laplace noise per coordinate.

    The noise has mass proportional to exp(-abs(x) / (noise_multiplier * C)) on the integers
    (two-sided geometric).

    Attributes:
        noise_multiplier: Scale over L1 sensitivity; the release is 1/noise_multiplier-DP.
    """

    noise_multiplier: float

    def __post_init__(self) -> None:
        checked(self, noise_multiplier=validate.positive)


# --- bounds that somebody proved ----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PureDP:
    """Any mechanism that is proved to be (epsilon, 0)-DP.

    Attributes:
        epsilon: The proved bound on the privacy loss, in nats.
    """

    epsilon: float

    def __post_init__(self) -> None:
        checked(self, epsilon=validate.positive)


@dataclass(frozen=True, slots=True)
class ApproximateDP:
    """Any mechanism that is proved to be (epsilon, delta)-DP, run as one non-interactive release.

    Attributes:
        epsilon: In nats.
        delta: In (0, 1]; it is paid from the budget's share for events that carry a delta.
    """

    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        checked(self, epsilon=validate.positive, delta=validate.probability)


@dataclass(frozen=True, slots=True)
class ZCDP:
    """Any mechanism that is proved to be rho-zCDP.

    Attributes:
        rho: The Renyi divergence of every order a is at most rho * a.
    """

    rho: float

    def __post_init__(self) -> None:
        checked(self, rho=validate.positive)


# --- selection ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RandomizedResponse:
    """One unit's category, kept with probability exp(epsilon) times that of each other one.

    Attributes:
        epsilon: Log of the ratio of the two probabilities, in nats.
        categories: How many there are, at least 2.
    """

    epsilon: float
    categories: int = 2

    def __post_init__(self) -> None:
        checked(self, epsilon=validate.positive, categories=validate.count)
        if self.categories < 2:
            raise InvalidParameter("categories", self.categories, "at least 2")


@dataclass(frozen=True, slots=True)
class ExponentialMechanism:
    """One candidate of a public set, drawn with mass proportional to exp(score / scale).

    Attributes:
        epsilon: The range of the privacy loss, in nats: the largest less the smallest change of a
            score, over scale. That is 2 * sensitivity / scale, or sensitivity / scale where one
            unit moves all scores in the same direction.
    """

    epsilon: float

    def __post_init__(self) -> None:
        checked(self, epsilon=validate.positive)


@dataclass(frozen=True, slots=True)
class GumbelTopK:
    """The ordered k candidates of largest score + Gumbel(scale), without their scores.

    Attributes:
        epsilon: The range of the privacy loss of one selection, as in
            :class:`ExponentialMechanism`.
        k: How many are released.
    """

    epsilon: float
    k: int

    def __post_init__(self) -> None:
        checked(self, epsilon=validate.positive, k=validate.count)


@dataclass(frozen=True, slots=True)
class ReportNoisyMax:
    """The candidate of largest score plus Laplace or exponential noise, without its score.

    Attributes:
        epsilon: 2 * sensitivity / scale, or sensitivity / scale where one unit moves all scores
            in the same direction; in nats.
    """

    epsilon: float

    def __post_init__(self) -> None:
        checked(self, epsilon=validate.positive)


@dataclass(frozen=True, slots=True)
class PermuteAndFlip:
    """One candidate by permute-and-flip, without its score.

    Attributes:
        epsilon: Of the mechanism: as in :class:`ReportNoisyMax`, which it equals for exponential
            noise.
    """

    epsilon: float

    def __post_init__(self) -> None:
        checked(self, epsilon=validate.positive)


@dataclass(frozen=True, slots=True)
class SparseVector:
    """A whole AboveThreshold session: one noisy threshold, and a bit for each query.

    It ends after ``positives`` answers above the threshold; only the bits are released, never a
    noisy value. All noise is Laplace, the threshold's drawn once.

    Attributes:
        threshold_noise: Scale of the threshold's noise over the sensitivity of the queries.
        query_noise: Scale of each query's noise over that sensitivity.
        positives: At most so many answers are above the threshold.
        monotone: Whether one unit moves all queries of the session in the same direction.
    """

    threshold_noise: float
    query_noise: float
    positives: int
    monotone: bool = False

    def __post_init__(self) -> None:
        checked(
            self,
            threshold_noise=validate.positive,
            query_noise=validate.positive,
            positives=validate.count,
            monotone=validate.boolean,
        )


@dataclass(frozen=True, slots=True)
class ProposeTestRelease:
    """A private test of a proposed sensitivity, and a release only where the test passes.

    Both are paid, also when the test fails.

    Attributes:
        test_epsilon: Pure epsilon of the test, in nats.
        release_epsilon: Pure epsilon of the release where the proposal holds, in nats.
        delta: Probability that the test passes although the proposal does not hold.
    """

    test_epsilon: float
    release_epsilon: float
    delta: float

    def __post_init__(self) -> None:
        checked(
            self,
            test_epsilon=validate.positive,
            release_epsilon=validate.positive,
            delta=validate.probability,
        )


# --- budgets of single units ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PerUnitFilter:
    """A whole session in which every unit is held to mu: an individual privacy filter.

    Each release is mu_i-GDP towards a unit, where mu_i depends on that unit, the outputs released
    so far and public queries alone. A unit takes part only while its sum of mu_i**2, the next
    release included, is at most mu**2; one without room is left out silently, and nothing that
    is released depends on who has room in any other way. The session may have any number of
    releases.

    Attributes:
        mu: Gaussian-DP parameter that every unit is held to.
    """

    mu: float

    def __post_init__(self) -> None:
        checked(self, mu=validate.positive)


# --- training runs with correlated noise ---------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TreeAggregation:
    """All prefix sums of a stream through one binary tree with Gaussian noise on every node.

    One tree of DP-FTRL; a restart is another use. Each unit is in at most one of the sums, and
    which one does not depend on the other units.

    Attributes:
        noise_multiplier: Standard deviation at a node over the L2 sensitivity of one sum.
        steps: Number of sums, the leaves of the tree.
    """

    noise_multiplier: float
    steps: int

    def __post_init__(self) -> None:
        checked(self, noise_multiplier=validate.positive, steps=validate.count)


@dataclass(frozen=True, slots=True)
class BandedMatrixFactorization:
    """A whole run of DP-FTRL with noise correlated by a banded Toeplitz strategy matrix C.

    Step t adds row t of inverse(C) @ Z to its clipped sum, with Z Gaussian. Two participations of
    one unit must lie at least ``len(coefficients)`` steps apart; the sampler enforces it.

    Attributes:
        noise_multiplier: Standard deviation of Z over the L2 sensitivity of one step's sum.
        coefficients: First column of C without its zeros: one for each band.
        participations: At most so many steps see one unit.
    """

    noise_multiplier: float
    coefficients: tuple[float, ...]
    participations: int

    def __post_init__(self) -> None:
        checked(
            self,
            noise_multiplier=validate.positive,
            coefficients=_coefficients,
            participations=validate.count,
        )


def checked(event: object, **validators: Callable[..., object]) -> None:
    """Replace each named parameter of a new event by its validated value."""
    for name, validator in validators.items():
        object.__setattr__(event, name, validator(**{name: getattr(event, name)}))


def _coefficients(coefficients: object) -> tuple[float, ...]:
    if not isinstance(coefficients, tuple | list) or not (
        1 <= len(coefficients) <= MAX_COEFFICIENTS
    ):
        raise InvalidParameter("coefficients", coefficients, f"1 to {MAX_COEFFICIENTS} numbers")
    numbers = tuple(validate.finite(coefficients=number) for number in coefficients)
    if not numbers[0]:
        raise InvalidParameter("coefficients", coefficients, "led by a number other than 0")
    return numbers
