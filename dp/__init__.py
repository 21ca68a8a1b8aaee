"""Pure mathematics of privacy: events, prices, filters. No I/O, no clock, no database.

>>> from dp import Gaussian, PoissonSampled, adaptive
>>> budget = adaptive(epsilon=8.0, delta=1e-6)
>>> step = PoissonSampled(0.01, Gaussian(noise_multiplier=1.0))
>>> budget.uses_that_fit((0,) * len(budget.limits), budget.price(step))
10919
"""

from dp.accountings import adaptive, planned, pure
from dp.errors import DPError, InvalidParameter, MalformedEvent, NothingFits, UnsupportedEvent
from dp.events import (
    Composed,
    Event,
    FixedSizeSampled,
    NonPrivate,
    PoissonSampled,
    RepeatAndSelect,
    RepeatAndSelectPoisson,
    Repeated,
    ShuffledEpoch,
)
from dp.filters import Filter, Price
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
)
from dp.planning import after, frontier, smallest_noise, steps_that_fit, uses_that_fit
from dp.units import NeighboringRelation

__all__ = [
    "ZCDP",
    "ApproximateDP",
    "BandedMatrixFactorization",
    "Composed",
    "DPError",
    "DiscreteGaussian",
    "DiscreteLaplace",
    "Event",
    "ExponentialMechanism",
    "Filter",
    "FixedSizeSampled",
    "Gaussian",
    "GumbelTopK",
    "InvalidParameter",
    "Laplace",
    "MalformedEvent",
    "NeighboringRelation",
    "NonPrivate",
    "NothingFits",
    "PerUnitFilter",
    "PermuteAndFlip",
    "PoissonSampled",
    "Price",
    "ProposeTestRelease",
    "PureDP",
    "RandomizedResponse",
    "RepeatAndSelect",
    "RepeatAndSelectPoisson",
    "Repeated",
    "ReportNoisyMax",
    "ShuffledEpoch",
    "SparseVector",
    "TreeAggregation",
    "UnsupportedEvent",
    "adaptive",
    "after",
    "frontier",
    "planned",
    "pure",
    "smallest_noise",
    "steps_that_fit",
    "uses_that_fit",
]
