"""The tables, as SQLModel classes; they never leave this folder.

Entries and events are append-only, and budgets never go back: triggers refuse it. Triggers
stop accidents. Against whoever owns the file, the chain makes edits evident.
"""

from __future__ import annotations

from typing import ClassVar

from sqlalchemy import DDL, MetaData, event
from sqlalchemy.orm import registry
from sqlmodel import Field, SQLModel

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


def _forbid(table: str, what: str, when: str = "") -> str:
    name = f"{table}_{what.split(maxsplit=1)[0].lower()}"
    condition = f"WHEN {when} " if when else ""
    return (
        f"CREATE TRIGGER {name} BEFORE {what} ON {table} {condition}"
        f"BEGIN SELECT RAISE(ABORT, 'the ledger is append-only: {table}'); END"
    )


_TRIGGERS = [
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
        "NEW.uses <> OLD.uses OR NEW.marked < OLD.marked OR NEW.open > OLD.open",
    ),
    _forbid("epsledger_reservation", "DELETE"),
    _forbid("epsledger_key", "UPDATE", "OLD.answer IS NOT NULL OR NEW.payload <> OLD.payload"),
]

for _statement in _TRIGGERS:
    event.listen(METADATA, "after_create", DDL(_statement))  # type: ignore[no-untyped-call]
