"""Errors of the mathematics.

::

    DPError
    ├── InvalidParameter      a number outside its domain (also a ValueError)
    ├── UnsupportedEvent      no proved price for this event here (also a ValueError)
    ├── MalformedEvent        a serialised event that cannot be read back (also a ValueError)
    └── NothingFits           a calibration without a solution (also a ValueError)

Each error carries its facts as attributes and says what to do about it.
"""

from __future__ import annotations

from typing import Any


class FactualError(Exception):
    """An exception that keeps its attributes when it is pickled, between processes for instance."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (type(self), self.args, self.__dict__)


def _restored(
    kind: type[FactualError], args: tuple[Any, ...], facts: dict[str, Any]
) -> FactualError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(facts)
    return error


class DPError(FactualError):
    """Base class of every error raised by :mod:`dp`."""


class InvalidParameter(DPError, ValueError):
    """A parameter is outside its domain; NaN and infinity always are.

    Attributes:
        name: The parameter.
        value: What was given.
        must: What it must be.
    """

    def __init__(self, name: str, value: object, must: str) -> None:
        super().__init__(f"{name} must be {must}, got {value!r}")
        self.name, self.value, self.must = name, value, must


class UnsupportedEvent(DPError, ValueError):
    """No price has been proved for this event under this accounting and relation.

    Attributes:
        event: The offending event, innermost where it is nested.
        reason: Why, and what would take it.
    """

    def __init__(self, event: object, reason: str) -> None:
        super().__init__(f"{event!r} cannot be priced: {reason}")
        self.event, self.reason = event, reason


class MalformedEvent(DPError, ValueError):
    """A serialised event is not one that this version can read; nothing is skipped.

    Attributes:
        reason: What is wrong with it.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f"not a readable event: {reason}")
        self.reason = reason


class NothingFits(DPError, ValueError):
    """No parameter in the searched range fits what is left of the budget.

    Attributes:
        reason: What was searched.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f"nothing fits: {reason}")
        self.reason = reason
