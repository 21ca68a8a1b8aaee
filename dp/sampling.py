"""HAZARDOUS: raw noise. Whatever is drawn here is charged to nobody.

Only the guards in :mod:`retrieval` may import this module; a lint contract holds them to it.
Randomness comes from the operating system. Normal variates are rounded to double precision,
and the guards round noisy counts to integers before they release them; what that leaves open
is stated in docs/known-limitations.md.
"""

from __future__ import annotations

import os

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from dp import validate
from dp.errors import InvalidParameter


def gaussian(size: int, standard_deviation: float) -> NDArray[np.float64]:
    """Return independent normal variates of mean 0.

    Args:
        size: How many.
        standard_deviation: Of each of them.

    Returns:
        Array of shape (size,), by inversion from 127 bits each, and a sign: tails to 13 standard
        deviations.

    >>> gaussian(3, 2.0).shape
    (3,)
    """
    standard_deviation = validate.positive(standard_deviation=standard_deviation)
    if standard_deviation > 1e300:
        raise InvalidParameter("standard_deviation", standard_deviation, "at most 1e300")
    words = np.frombuffer(os.urandom(16 * validate.count(size=size)), "<u8").reshape(2, size)
    high, low = words.astype(np.float64)
    tail = ((high // 2) + (low + 0.5) * 2.0**-64) * 2.0**-64
    sign = np.where(words[0] & np.uint64(1), 1.0, -1.0)
    noise: NDArray[np.float64] = sign * ndtri(tail) * standard_deviation
    return noise
