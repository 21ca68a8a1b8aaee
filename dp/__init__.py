"""Pure mathematics of privacy: events, prices, filters. No I/O, no clock, no database.

>>> from dp import Gaussian, PoissonSampled, adaptive
>>> budget = adaptive(epsilon=8.0, delta=1e-6)
>>> step = PoissonSampled(0.01, Gaussian(noise_multiplier=1.0))
>>> budget.uses_that_fit((0,) * len(budget.limits), budget.price(step))
10919
"""

from dp.calibration import smallest_noise, uses_that_fit
from dp.errors import DPError, InvalidParameter, MalformedEvent, NothingFits, UnsupportedEvent
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
from dp.filters import Filter, Price, adaptive, pure
from dp.units import NeighboringRelation

__all__ = [
    "Composed",
    "DPError",
    "Event",
    "Filter",
    "Gaussian",
    "InvalidParameter",
    "Laplace",
    "MalformedEvent",
    "NeighboringRelation",
    "NonPrivate",
    "NothingFits",
    "PoissonSampled",
    "Price",
    "PureDP",
    "Repeated",
    "UnsupportedEvent",
    "adaptive",
    "pure",
    "smallest_noise",
    "uses_that_fit",
]
