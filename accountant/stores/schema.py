"""The tables, as SQLModel classes; they never leave this folder.

Entries and events are append-only, and budgets never go back: triggers refuse it. Triggers
stop accidents. Against whoever owns the file, the chain makes edits evident.
"""

from __future__ import annotations

from typing import ClassVar

from sqlalchemy import DDL, MetaData, event
from sqlalchemy.orm import registry
from sqlmodel import Field, SQLModel

from accountant.errors import LedgerCorrupt
from dp import Price

SCHEMA_VERSION = 1
APPLICATION_ID = 0x65707364
"""``epsd``: marks an SQLite file as a ledger of epsledger."""

_registry = registry(metadata=MetaData())


class _Table(SQLModel, registry=_registry):
    """A registry of its own, so that the ledger's tables never mix with an application's."""


class BudgetRow(_Table, table=True):
    """One budget: its frozen record, and the head and totals that its entries come to."""

    __tablename__: ClassVar[str] = "epsledger_budget"

    name: str = Field(primary_key=True)
    record: bytes
    seq: int
    head: bytes
    time: int
    totals: bytes
    pending: str


class EventRow(_Table, table=True):
    """An event that was asked for, with the price that is frozen for this budget."""

    __tablename__: ClassVar[str] = "epsledger_event"

    budget: str = Field(primary_key=True)
    digest: bytes = Field(primary_key=True)
    encoded: bytes
    price: bytes


class EntryRow(_Table, table=True):
    """One entry, packed, and its digest."""

    __tablename__: ClassVar[str] = "epsledger_entry"

    budget: str = Field(primary_key=True)
    seq: int = Field(primary_key=True)
    body: bytes
    digest: bytes


class ReservationRow(_Table, table=True):
    """One reservation: what its entries come to, and the secret of its holder."""

    __tablename__: ClassVar[str] = "epsledger_reservation"

    budget: str = Field(primary_key=True)
    seq: int = Field(primary_key=True)
    event: bytes
    uses: int
    holder: str
    charged: bytes
    marked: int
    open: bool


class KeyRow(_Table, table=True):
    """One idempotency key, and the answer that was released for it."""

    __tablename__: ClassVar[str] = "epsledger_key"

    budget: str = Field(primary_key=True)
    key: str = Field(primary_key=True)
    payload: bytes
    seq: int
    digest: bytes
    answer: bytes | None = None


METADATA = _Table.metadata
BUDGET = METADATA.tables["epsledger_budget"]
EVENT = METADATA.tables["epsledger_event"]
ENTRY = METADATA.tables["epsledger_entry"]
RESERVATION = METADATA.tables["epsledger_reservation"]
KEY = METADATA.tables["epsledger_key"]

_LANE_BYTES = 16


def pack_lanes(lanes: Price) -> bytes:
    """Return lanes as 128-bit little-endian integers: no sum of them can overflow.

    >>> unpack_lanes(pack_lanes((1, 2**96)))
    (1, 79228162514264337593543950336)
    """
    return b"".join(lane.to_bytes(_LANE_BYTES, "little") for lane in lanes)


def unpack_lanes(packed: bytes) -> Price:
    """Return the lanes that :func:`pack_lanes` packed.

    Raises:
        LedgerCorrupt: If these are not whole lanes.
    """
    if len(packed) % _LANE_BYTES:
        raise LedgerCorrupt(f"lanes of {len(packed)} bytes")
    return tuple(
        int.from_bytes(packed[at : at + _LANE_BYTES], "little")
        for at in range(0, len(packed), _LANE_BYTES)
    )


def _forbid(table: str, what: str, when: str = "") -> str:
    name = f"{table}_{what.split(maxsplit=1)[0].lower()}"
    condition = f"WHEN {when} " if when else ""
    return (
        f"CREATE TRIGGER {name} BEFORE {what} ON {table} {condition}"
        f"BEGIN SELECT RAISE(ABORT, 'the ledger is append-only: {table}'); END"
    )


def _forbid_twice(table: str, *keys: str) -> str:
    """Refuse ``INSERT OR REPLACE``, which would go past the DELETE trigger."""
    same = " AND ".join(f"{key} = NEW.{key}" for key in keys)
    exists = f"EXISTS (SELECT 1 FROM {table} WHERE {same})"  # noqa: S608 - names of ours
    return _forbid(table, "INSERT", exists)


_TRIGGERS = [
    _forbid_twice("epsledger_budget", "name"),
    _forbid_twice("epsledger_event", "budget", "digest"),
    _forbid_twice("epsledger_entry", "budget", "seq"),
    _forbid_twice("epsledger_reservation", "budget", "seq"),
    _forbid_twice("epsledger_key", "budget", "key"),
    _forbid("epsledger_entry", "UPDATE"),
    _forbid("epsledger_entry", "DELETE"),
    _forbid("epsledger_event", "UPDATE"),
    _forbid("epsledger_event", "DELETE"),
    _forbid(
        "epsledger_budget",
        "UPDATE",
        "NEW.name <> OLD.name OR NEW.record <> OLD.record OR NEW.seq < OLD.seq",
    ),
    _forbid("epsledger_budget", "DELETE"),
    _forbid(
        "epsledger_reservation",
        "UPDATE",
        "NEW.uses <> OLD.uses OR NEW.charged <> OLD.charged"
        " OR NEW.marked < OLD.marked OR NEW.open > OLD.open",
    ),
    _forbid("epsledger_reservation", "DELETE"),
    _forbid("epsledger_key", "UPDATE", "OLD.answer IS NOT NULL OR NEW.payload <> OLD.payload"),
]

for _statement in _TRIGGERS:
    event.listen(METADATA, "after_create", DDL(_statement))  # type: ignore[no-untyped-call]
