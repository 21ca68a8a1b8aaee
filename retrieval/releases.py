"""What is drawn for an answer, and the checks of what is asked for before it is paid."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from inspect import iscoroutinefunction

import numpy as np
from numpy.typing import NDArray

from dp import Gaussian, GumbelTopK, sampling
from retrieval.errors import InvalidQuery

_MOST_NOISE = 1e15
"""Counts are released as 64-bit integers."""


def additive(noise_multiplier: float) -> Gaussian:
    """Return the event of Gaussian noise on counts.

    Raises:
        InvalidParameter: If the noise multiplier is not above 0.
        InvalidQuery: If it is too large for integers.
    """
    event = Gaussian(noise_multiplier)
    if event.noise_multiplier > _MOST_NOISE:
        raise InvalidQuery(f"noise_multiplier must be at most {_MOST_NOISE:g}")
    return event


def selection(epsilon: float, k: int, candidates: int) -> GumbelTopK:
    """Return the event of selecting k of so many candidates.

    Raises:
        InvalidParameter: If epsilon or k is not above 0.
        InvalidQuery: If there are fewer candidates, or epsilon is too small for doubles.
    """
    event = GumbelTopK(epsilon, k)
    if event.epsilon < 1 / _MOST_NOISE:
        raise InvalidQuery(f"epsilon must be at least {1 / _MOST_NOISE:g}, got {epsilon!r}")
    if event.k > candidates:
        raise InvalidQuery(f"k = {k} of {candidates} candidates: at most as many as there are")
    return event


def bar_of(bar: int) -> int:
    """Return a number of units.

    Raises:
        InvalidQuery: If it is no integer.
    """
    if isinstance(bar, bool) or not isinstance(bar, int | np.integer):
        raise InvalidQuery(f"bar must be an integer number of units, got {bar!r}")
    return int(bar)


def check_callable(*functions: object) -> None:
    """Check that these can be called and return what they say, before anything is paid for.

    Raises:
        InvalidQuery: If one cannot be called, or returns something to be awaited.
    """
    for function in functions:
        if not callable(function) or iscoroutinefunction(function):
            raise InvalidQuery(
                f"{function!r} must be a function that returns its answer, not one to be awaited"
            )


def public_prompt(text: object) -> str:
    """Return the prompt without private data.

    Raises:
        InvalidQuery: If it is no text.
    """
    if not isinstance(text, str):
        raise InvalidQuery(f"prompt(None) must be a text without private data, got {text!r}")
    return text


def noisy(counts: NDArray[np.int64], standard_deviation: float) -> list[int]:
    """Return the counts with Gaussian noise, rounded to integers (post-processing)."""
    noise = sampling.gaussian(len(counts), standard_deviation)
    return [int(count) for count in np.rint(counts + noise)]


def selected(counts: NDArray[np.int64], names: Sequence[str], event: GumbelTopK) -> tuple[str, ...]:
    """Return the names of the largest counts with Gumbel noise, largest first.

    One unit changes each count by at most 1, and all in the same direction, so that the noise's
    scale is 1/epsilon.
    """
    noise = sampling.gumbel(len(counts), 1 / event.epsilon)
    return tuple(names[at] for at in np.argsort(-(counts + noise), kind="stable")[: event.k])


def public_list(name: str, items: Sequence[str]) -> tuple[str, ...]:
    """Return the items of a public list.

    Raises:
        InvalidQuery: If they are not distinct texts in an order, and at least one.
    """
    unordered = isinstance(items, str | set | frozenset) or not isinstance(items, Iterable)
    listed = () if unordered else tuple(items)
    if not listed or len(set(listed)) < len(listed) or not all(isinstance(x, str) for x in listed):
        raise InvalidQuery(f"{name} must be a list of distinct texts, and at least one")
    return listed
