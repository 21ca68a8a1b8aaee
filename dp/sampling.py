"""HAZARDOUS: raw noise. Whatever is drawn here is charged to nobody.

Only the guards in :mod:`retrieval` may import this module; a lint contract holds them to it.
Randomness comes from the operating system. :func:`discrete_laplace` and :func:`discrete_gaussian`
draw integers from exactly the distribution they state. :func:`gaussian` and :func:`gumbel` are fast
and round to doubles; what that leaves open is stated in docs/known-limitations.md.

[1] Canonne, Kamath, Steinke, "The Discrete Gaussian for Differential Privacy" (2020),
    arXiv:2004.00010, Algorithms 1 to 3.
"""

from __future__ import annotations

import os
import secrets
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from dp import validate
from dp.errors import InvalidParameter

SMALLEST, LARGEST = 1e-6, 1e12
"""The range of the exact samplers' parameter."""


def gaussian(size: int, standard_deviation: float) -> NDArray[np.float64]:
    """Return independent normal variates of mean 0, each rounded to a double.

    Guarantees are proved for a real Gaussian. That doubles are close enough to one is assumed,
    not proved: see "Floating point" in docs/known-limitations.md.

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
    tail, upper = _tails(validate.count(size=size))
    noise: NDArray[np.float64] = (1.0 - 2.0 * upper) * ndtri(tail) * standard_deviation
    return noise


def gumbel(size: int, scale: float) -> NDArray[np.float64]:
    """Return independent Gumbel variates of mode 0, each rounded to a double.

    The candidate of largest score + gumbel is drawn with probability proportional to
    exp(score / scale): the exponential mechanism. That holds for real numbers. With doubles, two
    sums can be equal, about once in 2**50 draws, and candidates of next to no probability are
    never drawn: see "Floating point" in docs/known-limitations.md. Release the winner alone,
    never a noisy score.

    Args:
        size: How many.
        scale: Of each of them; the standard deviation is 1.28 times as much.

    Returns:
        Array of shape (size,), by inversion from 127 bits of either tail: finite, from -4.5 to
        89.5 scales.

    >>> gumbel(3, 2.0).shape
    (3,)
    """
    scale = validate.positive(scale=scale)
    if scale > 1e300:
        raise InvalidParameter("scale", scale, "at most 1e300")
    tail, upper = _tails(validate.count(size=size))
    # Both are computed for all, so that the time does not tell which one was taken.
    exponential = np.where(upper, -np.log1p(-tail), -np.log(tail))
    noise: NDArray[np.float64] = -np.log(exponential) * scale
    return noise


def _tails(size: int) -> tuple[NDArray[np.float64], NDArray[np.bool]]:
    """Return uniform variates in (0, 1/2], of 127 bits, and a fair coin for each."""
    high, low = np.frombuffer(os.urandom(16 * size), "<u8").reshape(2, size)
    tail = ((high >> np.uint64(1)) + (low + 0.5) * 2.0**-64) * 2.0**-64
    return tail, (high & np.uint64(1)).astype(bool)


def discrete_laplace(scale: float | Fraction) -> int:
    """Return an integer x with probability exactly proportional to exp(-abs(x) / scale).

    Computed from integers alone [1]. How long it takes depends a little on what is drawn.

    Args:
        scale: From 1e-6 to 1e12; a float counts as exactly the binary fraction that it is.

    Raises:
        InvalidParameter: If the scale is not such a number.

    >>> type(discrete_laplace(2.5))
    <class 'int'>
    """
    return _laplace(*_exact(scale=scale).as_integer_ratio())


def discrete_gaussian(standard_deviation: float | Fraction) -> int:
    """Return an integer x with probability exactly proportional to exp(-x**2 / (2 * sigma**2)).

    Computed from integers and fractions alone [1]. How long it takes depends a little on what is
    drawn.

    Args:
        standard_deviation: sigma, from 1e-6 to 1e12; a float counts as exactly the binary
            fraction that it is. The deviation of x is at most sigma.

    Raises:
        InvalidParameter: If sigma is not such a number.

    >>> type(discrete_gaussian(2.5))
    <class 'int'>
    """
    sigma = _exact(standard_deviation=standard_deviation)
    variance, t = sigma**2, int(sigma) + 1
    while True:  # [1, Algorithm 3]
        x = _laplace(t, 1)
        gamma = (abs(x) - variance / t) ** 2 / (2 * variance)
        if _bernoulli_exp(*gamma.as_integer_ratio()):
            return x


def _exact(**values: object) -> Fraction:
    ((name, value),) = values.items()
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float, Fraction))
        or not SMALLEST <= value <= LARGEST
    ):
        raise InvalidParameter(name, value, f"a number from {SMALLEST:g} to {LARGEST:g}")
    return Fraction(value)


def _laplace(t: int, s: int) -> int:
    """[1, Algorithm 2], of scale t/s: a geometric variate and a sign; minus zero is refused."""
    while True:
        remainder = secrets.randbelow(t)
        if not _bernoulli_exp(remainder, t):
            continue
        quotient = 0
        while _bernoulli_exp_to_1(1, 1):
            quotient += 1
        size = (remainder + t * quotient) // s
        if not secrets.randbelow(2):
            return size
        if size:
            return -size


def _bernoulli_exp(numerator: int, denominator: int) -> bool:
    """[1, Algorithm 1]: True with probability exp(-numerator / denominator)."""
    whole, rest = divmod(numerator, denominator)
    ones = (_bernoulli_exp_to_1(1, 1) for _ in range(whole))
    return all(ones) and _bernoulli_exp_to_1(rest, denominator)


def _bernoulli_exp_to_1(numerator: int, denominator: int) -> bool:
    """The same for a quotient from 0 to 1."""
    k = 1
    while secrets.randbelow(k * denominator) < numerator:
        k += 1
    return k % 2 == 1
