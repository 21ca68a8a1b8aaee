"""A budget: the promise for a dataset's whole life. Immutable once created."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

import rfc8785

from accountant.errors import InvalidRequest, LedgerCorrupt
from dp import DPError, Filter, InvalidParameter, validate

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
MAX_LABEL = 200
"""Longest unit, activity, note or key, in characters."""


@dataclass(frozen=True, slots=True)
class Budget:
    """What is promised to every privacy unit of one dataset.

    Attributes:
        name: Of the budget: letters, digits, dot, dash and underscore, at most 64.
        unit: The privacy unit, for instance ``article`` or ``patient``.
        filter: The frozen limits: epsilon, delta, relation and accounting.
        units: Declared number of privacy units, if it is public; delta must stay below 1/units.

    Raises:
        InvalidRequest: If the name or the unit cannot be recorded.
        InvalidParameter: If delta is not below 1/units.
    """

    name: str
    unit: str
    filter: Filter
    units: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise InvalidRequest(
                f"budget name {self.name!r} must be 1 to 64 letters, digits, '.', '_' or '-'"
            )
        label(unit=self.unit)
        of_type(Filter, filter=self.filter)
        if self.units is not None:
            validate.count(units=self.units)
            if not self.filter.delta * self.units < 1:
                raise InvalidParameter(
                    "delta", self.filter.delta, f"below 1/units = 1/{self.units}"
                )

    def to_json(self) -> bytes:
        """Return the canonical JSON (RFC 8785) that a ledger keeps."""
        return rfc8785.dumps(
            {
                "filter": self.filter.to_record(),
                "name": self.name,
                "unit": self.unit,
                "units": self.units,
            }
        )

    @classmethod
    def from_json(cls, encoded: bytes) -> Budget:
        """Return the budget that :meth:`to_json` wrote.

        Raises:
            LedgerCorrupt: If it is not one.
        """
        try:
            record = json.loads(encoded)
            return cls(
                record["name"],
                record["unit"],
                Filter.from_record(record["filter"]),
                record["units"],
            )
        except (ValueError, KeyError, TypeError, AttributeError, DPError) as error:
            raise LedgerCorrupt(f"unreadable budget record: {error}") from error


def label(**values: object) -> str:
    """Return the one text; raise unless it is 1 to 200 printable characters.

    >>> label(activity="training")
    'training'
    >>> label(activity="")
    Traceback (most recent call last):
    accountant.errors.InvalidRequest: activity must be 1 to 200 printable characters, got ''
    """
    ((name, value),) = values.items()
    if not isinstance(value, str) or not 1 <= len(value) <= MAX_LABEL or not value.isprintable():
        raise InvalidRequest(f"{name} must be 1 to {MAX_LABEL} printable characters, got {value!r}")
    return value


def of_type(kind: Any, **values: object) -> None:
    """Raise unless the one value is an instance of the type.

    >>> of_type(bytes, payload="text")
    Traceback (most recent call last):
    accountant.errors.InvalidRequest: payload must be of type bytes, got 'text'
    """
    ((name, value),) = values.items()
    if not isinstance(value, kind):
        expected = getattr(kind, "__name__", "Event")
        raise InvalidRequest(f"{name} must be of type {expected}, got {value!r}")
