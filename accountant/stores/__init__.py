"""Stores: where a ledger is kept. A URL or a path selects one."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from accountant.errors import LedgerUnavailable
from accountant.marks import Heads
from accountant.stores.snapshot import Snapshot
from accountant.stores.transaction import Remembered, Transaction


class Store(Protocol):
    """Where a ledger is kept. Every store passes ``tests/conformance``.

    Attributes:
        ledger: Identity of the ledger, 32 hexadecimal digits.
        remembered: What this process saw of it, and the marks of this machine.
    """

    ledger: str
    remembered: Remembered

    def transaction(self, names: frozenset[str]) -> AbstractContextManager[Transaction]:
        """Hold the lock of these budgets; write back and commit on leaving, or roll back."""

    def covers(self, names: frozenset[str]) -> bool:
        """Say whether the transaction in hand holds the lock of these budgets."""

    def snapshot(self) -> AbstractContextManager[Snapshot]:
        """Read one consistent state; writers are not held up."""

    def saw(self, heads: Heads) -> None:
        """Raise this machine's marks to these heads, which were found sound."""

    def check_process(self) -> None:
        """Raise in a forked child: it must not use the parent's connections, nor its locks."""

    def close(self) -> None:
        """Close every connection; in a forked child, touch none of the parent's."""


def open_store(location: str | Path, *, create: bool = True) -> Store:
    """Return the store at a path or URL.

    Args:
        location: Path of an SQLite file, or a URL: ``sqlite:///...``, ``postgresql+psycopg://...``
            or ``memory:`` for a ledger that ends with its process.
        create: Whether a missing file, or an empty database, becomes an empty ledger.

    Raises:
        LedgerUnavailable: If it cannot be opened or is some other program's database.
        LedgerCorrupt: If it is not a database.
        SchemaMismatch: If another schema version wrote it.
    """
    if location == "memory:" and create:
        from accountant.stores.memory import MemoryStore

        return MemoryStore()
    url = ledger_url(location)
    if url.get_backend_name() == "postgresql":
        from accountant.stores.postgres import PostgresStore

        return PostgresStore(url, create=create)
    from accountant.stores.sqlite import SqliteStore

    return SqliteStore(url, create=create)


def ledger_url(location: str | Path) -> URL:
    """Return the URL of a path or URL, or raise LedgerUnavailable if no ledger can be there."""
    if isinstance(location, str) and "://" in location:
        try:
            url = make_url(location)
        except ArgumentError as error:
            raise LedgerUnavailable(f"{location!r} is neither a path nor a URL") from error
    else:
        url = URL.create("sqlite", database=str(location))
    if url.drivername in ("postgresql", "postgresql+psycopg"):
        return url.set(drivername="postgresql+psycopg")
    if url.drivername not in ("sqlite", "sqlite+pysqlite"):
        raise LedgerUnavailable(
            f"{url.render_as_string()}: a ledger is kept in sqlite:/// or postgresql+psycopg://"
        )
    if not url.database or url.database == ":memory:":
        raise LedgerUnavailable("a ledger must outlive its process: name a file")
    if url.query or url.database.startswith("file:"):
        raise LedgerUnavailable(
            f"{url.render_as_string()}: name the file alone; options of SQLite could turn its"
            " locks off"
        )
    return url
