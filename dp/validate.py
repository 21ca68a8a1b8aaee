"""Checks of parameters by keyword: the name given becomes the message.

Every check is written so that NaN fails it.
"""

from __future__ import annotations

import math
import sys

from dp.errors import InvalidParameter

MAX_COUNT = 2**53 - 1
"""Largest count that canonical JSON (RFC 8785) carries exactly."""


def _real(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidParameter(name, value, "a number")
    try:
        number = float(value)
    except OverflowError:
        raise InvalidParameter(name, value, "a finite number") from None
    if not math.isfinite(number):
        raise InvalidParameter(name, value, "a finite number")
    return number


def positive(**values: object) -> float:
    """Return the one value as a float; raise unless it is finite, normal and above zero.

    Raises:
        InvalidParameter: On NaN, infinity, zero, a negative or a subnormal number.

    >>> positive(noise_multiplier=1)
    1.0
    >>> positive(noise_multiplier=float("nan"))
    Traceback (most recent call last):
    dp.errors.InvalidParameter: noise_multiplier must be a finite number, got nan
    """
    ((name, value),) = values.items()
    number = _real(name, value)
    if not number >= sys.float_info.min:
        raise InvalidParameter(name, value, "positive and not subnormal")
    return number


def finite(**values: object) -> float:
    """Return the one value as a float; raise unless it is finite.

    >>> finite(eta=-1)
    -1.0
    """
    ((name, value),) = values.items()
    return _real(name, value) + 0.0  # never -0.0


def boolean(**values: object) -> bool:
    """Return the one value; raise unless it is True or False.

    >>> boolean(monotone=1)
    Traceback (most recent call last):
    dp.errors.InvalidParameter: monotone must be True or False, got 1
    """
    ((name, value),) = values.items()
    if not isinstance(value, bool):
        raise InvalidParameter(name, value, "True or False")
    return value


def probability(**values: object) -> float:
    """Return the one value as a float; raise unless it lies in (0, 1].

    >>> probability(sampling_probability=0.5)
    0.5
    """
    ((name, value),) = values.items()
    number = _real(name, value)
    if not sys.float_info.min <= number <= 1.0:
        raise InvalidParameter(name, value, "in (0, 1]")
    return number


def count(**values: object) -> int:
    """Return the one value; raise unless it is an integer from 1 to 2**53 - 1.

    >>> count(steps=0)
    Traceback (most recent call last):
    dp.errors.InvalidParameter: steps must be an integer from 1 to 2**53 - 1, got 0
    """
    ((name, value),) = values.items()
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_COUNT:
        raise InvalidParameter(name, value, "an integer from 1 to 2**53 - 1")
    return value


def delta(**values: object) -> float:
    """Return the one value as a float; raise unless it lies in [1e-15, 0.1].

    Below 1e-15 the rounding of the delta lane (units of 2**-62) would eat the budget;
    above 0.1 an (epsilon, delta) guarantee says nothing.

    >>> delta(delta=1e-6)
    1e-06
    """
    ((name, value),) = values.items()
    number = _real(name, value)
    if not 1e-15 <= number <= 0.1:
        raise InvalidParameter(name, value, "in [1e-15, 0.1]")
    return number


def epsilon(**values: object) -> float:
    """Return the one value as a float; raise unless it lies in [1e-6, 1e6].

    >>> epsilon(epsilon=3)
    3.0
    """
    ((name, value),) = values.items()
    number = _real(name, value)
    if not 1e-6 <= number <= 1e6:
        raise InvalidParameter(name, value, "in [1e-6, 1e6]")
    return number
