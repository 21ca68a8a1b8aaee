"""Migrations: ordered and additive, so that every chain stays as it was written.

A migration adds tables and columns; it never touches an entry. It runs under the write lock in
one transaction, only when asked for: older processes must not have the ledger open.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sqlalchemy import URL, Connection, create_engine, event
from sqlalchemy.exc import DatabaseError
from sqlalchemy.schema import CreateTable

from accountant.errors import LedgerUnavailable, SchemaMismatch
from accountant.stores.schema import (
    CHECKPOINT,
    LEDGER,
    SCHEMA_VERSION,
    new_ledger,
    sqlite_triggers,
)
from accountant.stores.sqlite import configure, start


def migrate(url: URL, step: Callable[[int], object] = int) -> tuple[int, ...]:
    """Bring an SQLite ledger to this schema version; each version is one transaction.

    Stop every process that has the ledger open first: an older one would not know the new rules.
    PostgreSQL ledgers exist since version 2 and need none.

    Args:
        url: Of the ledger.
        step: Called with each version after its statements and before its commit.

    Returns:
        The versions that it went through; empty if it was up to date.

    Raises:
        SchemaMismatch: If a newer epsledger wrote it.
        LedgerUnavailable: If it cannot be locked or written; then it is as it was.
    """
    if url.get_backend_name() != "sqlite":
        raise LedgerUnavailable("PostgreSQL ledgers exist since version 2 and need no migration")
    if not Path(str(url.database)).exists():
        raise LedgerUnavailable(f"no ledger at {url.database}; is that the right place?")
    engine = create_engine(url)
    event.listen(engine, "connect", configure)
    event.listen(engine, "begin", start)
    done: list[int] = []
    try:
        while True:
            with engine.execution_options(ledger_write=True).begin() as connection:
                version = int(connection.exec_driver_sql("PRAGMA user_version").scalar_one())
                if version == SCHEMA_VERSION:
                    return tuple(done)
                if version not in _STEPS:
                    raise SchemaMismatch(str(url.database), version, SCHEMA_VERSION)
                _STEPS[version](connection)
                connection.exec_driver_sql(f"PRAGMA user_version={version + 1}")
                step(version + 1)
            done.append(version + 1)
    except DatabaseError as error:
        raise LedgerUnavailable(f"{url.database}: not migrated: {error.orig}") from error
    finally:
        engine.dispose()


def _to_2(connection: Connection) -> None:
    """Add the ledger's identity, checkpoints, closed budgets, and leases."""
    for statement in (
        "ALTER TABLE epsledger_budget ADD COLUMN closed BOOLEAN NOT NULL DEFAULT 0",
        "ALTER TABLE epsledger_reservation ADD COLUMN lease BOOLEAN NOT NULL DEFAULT 0",
    ):
        connection.exec_driver_sql(statement)
    triggers = connection.exec_driver_sql(
        "SELECT name FROM sqlite_master WHERE type = 'trigger'"
    ).scalars()
    for name in list(triggers):
        connection.exec_driver_sql(f"DROP TRIGGER {name}")
    for table in (LEDGER, CHECKPOINT):
        connection.execute(CreateTable(table))
    for statement in sqlite_triggers():
        connection.exec_driver_sql(statement)
    new_ledger(connection)


_STEPS = {1: _to_2}
