"""The tables, as SQLModel classes; they never leave this folder.

Entries and events are append-only, and budgets never go back: triggers refuse it. Triggers
stop accidents. Against whoever owns the database, the chain makes edits evident.
"""

from __future__ import annotations

import secrets
from typing import Any, ClassVar

from sqlalchemy import DDL, BigInteger, Connection, MetaData, event, insert
from sqlalchemy.orm import registry
from sqlmodel import Field, SQLModel

SCHEMA_VERSION = 2
APPLICATION_ID = 0x65707364
"""``epsd``: marks an SQLite file as a ledger of epsledger."""

_registry = registry(metadata=MetaData())


class _Table(SQLModel, registry=_registry):
    """A registry of its own, so that the ledger's tables never mix with an application's."""


def _whole(**arguments: Any) -> Any:
    return Field(sa_type=BigInteger, **arguments)


class _Ledger(_Table, table=True):
    __tablename__: ClassVar[str] = "epsledger_ledger"

    id: str = Field(primary_key=True)
    schema_version: int


class _Budget(_Table, table=True):
    __tablename__: ClassVar[str] = "epsledger_budget"

    name: str = Field(primary_key=True)
    record: bytes
    seq: int = _whole()
    head: bytes
    time: int = _whole()
    totals: bytes
    pending: str
    closed: bool


class _Event(_Table, table=True):
    __tablename__: ClassVar[str] = "epsledger_event"

    budget: str = Field(primary_key=True)
    digest: bytes = Field(primary_key=True)
    encoded: bytes
    price: bytes


class _Entry(_Table, table=True):
    __tablename__: ClassVar[str] = "epsledger_entry"

    budget: str = Field(primary_key=True)
    seq: int = _whole(primary_key=True, sa_column_kwargs={"autoincrement": False})
    body: bytes
    digest: bytes


class _Reservation(_Table, table=True):
    __tablename__: ClassVar[str] = "epsledger_reservation"

    budget: str = Field(primary_key=True)
    seq: int = _whole(primary_key=True, sa_column_kwargs={"autoincrement": False})
    event: bytes
    uses: int = _whole()
    holder: str
    charged: bytes
    marked: int = _whole()
    open: bool
    lease: bool


class _Key(_Table, table=True):
    __tablename__: ClassVar[str] = "epsledger_key"

    budget: str = Field(primary_key=True)
    key: str = Field(primary_key=True)
    payload: bytes
    seq: int = _whole()
    digest: bytes
    answer: bytes | None = None


class _Checkpoint(_Table, table=True):
    __tablename__: ClassVar[str] = "epsledger_checkpoint"

    number: int = _whole(primary_key=True, sa_column_kwargs={"autoincrement": False})
    note: str


METADATA = _Table.metadata
LEDGER = METADATA.tables["epsledger_ledger"]
BUDGET = METADATA.tables["epsledger_budget"]
EVENT = METADATA.tables["epsledger_event"]
ENTRY = METADATA.tables["epsledger_entry"]
RESERVATION = METADATA.tables["epsledger_reservation"]
KEY = METADATA.tables["epsledger_key"]
CHECKPOINT = METADATA.tables["epsledger_checkpoint"]

_RULES: tuple[tuple[str, str, str], ...] = (
    ("epsledger_entry", "UPDATE", ""),
    ("epsledger_entry", "DELETE", ""),
    ("epsledger_event", "UPDATE", ""),
    ("epsledger_event", "DELETE", ""),
    (
        "epsledger_budget",
        "UPDATE",
        (
            "NEW.name <> OLD.name OR NEW.record <> OLD.record OR NEW.seq < OLD.seq"
            " OR (OLD.closed AND NOT NEW.closed) OR (NEW.seq = OLD.seq AND (NEW.head <> OLD.head"
            " OR NEW.time <> OLD.time OR NEW.totals <> OLD.totals OR NEW.closed <> OLD.closed))"
        ),
    ),
    ("epsledger_budget", "DELETE", ""),
    (
        "epsledger_reservation",
        "UPDATE",
        (
            "NEW.budget <> OLD.budget OR NEW.seq <> OLD.seq OR NEW.event <> OLD.event"
            " OR NEW.uses <> OLD.uses OR NEW.charged <> OLD.charged OR NEW.marked < OLD.marked"
            " OR NEW.lease <> OLD.lease OR (NEW.open AND NOT OLD.open)"
        ),
    ),
    ("epsledger_reservation", "DELETE", ""),
    (
        "epsledger_key",
        "UPDATE",
        (
            "OLD.answer IS NOT NULL OR NEW.budget <> OLD.budget OR NEW.key <> OLD.key"
            " OR NEW.payload <> OLD.payload OR NEW.seq <> OLD.seq OR NEW.digest <> OLD.digest"
        ),
    ),
    ("epsledger_key", "DELETE", ""),
    (
        "epsledger_ledger",
        "UPDATE",
        "NEW.id <> OLD.id OR NEW.schema_version < OLD.schema_version",
    ),
    ("epsledger_ledger", "DELETE", ""),
    ("epsledger_checkpoint", "UPDATE", ""),
    ("epsledger_checkpoint", "DELETE", ""),
)
"""What nobody may do: table, statement, and when."""


def new_ledger(connection: Connection) -> None:
    """Give a ledger its identity and schema version."""
    connection.execute(
        insert(LEDGER), {"id": secrets.token_hex(16), "schema_version": SCHEMA_VERSION}
    )


def sqlite_triggers() -> list[str]:
    """Return the statements that make the rules hold in SQLite."""
    # INSERT OR REPLACE would go past a DELETE trigger.
    twice = []
    for table in METADATA.sorted_tables:
        same = " AND ".join(f"{key.name} = NEW.{key.name}" for key in table.primary_key)
        exists = f"EXISTS (SELECT 1 FROM {table.name} WHERE {same})"  # noqa: S608 - names of ours
        twice.append((table.name, "INSERT", exists))
    return [
        f"CREATE TRIGGER {table}_{what.lower()} BEFORE {what} ON {table}"
        + (f" WHEN {when}" if when else "")
        + f" BEGIN SELECT RAISE(ABORT, 'the ledger is append-only: {table}'); END"
        for table, what, when in (*twice, *_RULES)
    ]


def postgres_triggers() -> list[str]:
    """Return the statements that make the rules hold in PostgreSQL."""
    function = (
        "CREATE FUNCTION epsledger_append_only() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN RAISE EXCEPTION 'the ledger is append-only: %', TG_TABLE_NAME; END $$"
    )
    truncated = [
        f"CREATE TRIGGER {table.name}_truncate BEFORE TRUNCATE ON {table.name}"
        " FOR EACH STATEMENT EXECUTE FUNCTION epsledger_append_only()"
        for table in METADATA.sorted_tables
    ]
    return [
        function,
        *truncated,
        *(
            f"CREATE TRIGGER {table}_{what.lower()} BEFORE {what} ON {table} FOR EACH ROW"
            + (f" WHEN ({when})" if when else "")
            + " EXECUTE FUNCTION epsledger_append_only()"
            for table, what, when in _RULES
        ),
    ]


for _dialect, _statements in (("sqlite", sqlite_triggers()), ("postgresql", postgres_triggers())):
    for _statement in _statements:
        event.listen(
            METADATA,
            "after_create",
            DDL(_statement.replace("%", "%%")).execute_if(dialect=_dialect),  # type: ignore[no-untyped-call]
        )
