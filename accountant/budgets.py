"""A budget: the promise for a dataset's whole life. Immutable once created."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from collections.abc import Iterable
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
        dataset: Fingerprint of the dataset, so that nobody opens a second budget over it.
        lineage: Fingerprints of the datasets that it was made from, or shares units with.
        supersedes: Name of the budget that this one replaces, with its spend carried over.
        quota_of: Name of the dataset's budget, if this is only a share of it for a team, tenant
            or application. A quota by itself guarantees nothing.

    Raises:
        InvalidRequest: If the name or the unit cannot be recorded.
        InvalidParameter: If delta is not below 1/units.
    """

    name: str
    unit: str
    filter: Filter
    units: int | None = None
    dataset: str | None = None
    lineage: tuple[str, ...] = ()
    supersedes: str | None = None
    quota_of: str | None = None

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
        of_type(tuple, lineage=self.lineage)
        for fingerprint in (self.dataset, *self.lineage):
            if fingerprint is not None:
                label(fingerprint=fingerprint)
        for name in (self.supersedes, self.quota_of):
            if name is not None:
                label(budget=name)
        if self.quota_of is not None and (self.dataset, self.supersedes) != (None, None):
            raise InvalidRequest(
                f"quota {self.name!r}: the dataset is that of budget {self.quota_of!r}, and only"
                " budgets are superseded; close the quota and create another one"
            )
        if self.lineage and self.dataset is None:
            raise InvalidRequest(f"budget {self.name!r}: a lineage needs a dataset fingerprint")

    def covers(self, other: Budget) -> bool:
        """Say whether both are about the same data, as far as fingerprints and lineage tell."""
        ours, theirs = ({b.dataset, *b.lineage} - {None} for b in (self, other))
        return not ours.isdisjoint(theirs)

    def to_json(self) -> bytes:
        """Return the canonical JSON (RFC 8785) that a ledger keeps."""
        optional = {
            "dataset": self.dataset,
            "lineage": list(self.lineage),
            "quota_of": self.quota_of,
            "supersedes": self.supersedes,
        }
        return rfc8785.dumps(
            {
                "filter": self.filter.to_record(),
                "name": self.name,
                "unit": self.unit,
                "units": self.units,
                **{member: value for member, value in optional.items() if value},
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
                record.get("dataset"),
                tuple(record.get("lineage", ())),
                record.get("supersedes"),
                record.get("quota_of"),
            )
        except (
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            RecursionError,
            DPError,
        ) as error:
            raise LedgerCorrupt(f"unreadable budget record: {error}") from error


def fingerprint(records: Iterable[bytes], *, key: bytes = b"") -> str:
    """Return a fingerprint of a dataset: the same for the same records in any order.

    Args:
        records: Each as bytes.
        key: A secret. Without one, whoever reads the ledger and guesses the whole dataset can
            check the guess.

    >>> fingerprint([b"one", b"two"]) == fingerprint([b"two", b"one"])
    True
    >>> fingerprint([])
    'sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855'
    """
    kind = "hmac-sha256" if key else "sha256"

    def digest(data: bytes) -> bytes:
        return hmac.digest(key, data, "sha256") if key else hashlib.sha256(data).digest()

    return f"{kind}:{digest(b''.join(sorted(map(digest, records)))).hex()}"


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
