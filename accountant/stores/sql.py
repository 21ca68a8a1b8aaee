"""The SQL store: SQLite through SQLAlchemy Core. The only file that talks to a database.

A write transaction starts with ``BEGIN IMMEDIATE``: with the default of SQLAlchemy and SQLModel
on SQLite, two threads read the same totals and overspend without an error. ``synchronous=FULL``
makes a commit survive a power cut.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import (
    URL,
    Connection,
    Engine,
    create_engine,
    event,
    make_url,
)
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from accountant.budgets import Budget
from accountant.errors import (
    LedgerCorrupt,
    LedgerUnavailable,
    OutcomeUnknown,
    SchemaMismatch,
)
from accountant.stores.schema import (
    APPLICATION_ID,
    METADATA,
    SCHEMA_VERSION,
)
from accountant.stores.snapshot import Snapshot
from accountant.stores.transaction import SqlTransaction, translated
from dp import Event, Price

_PATIENCE_SECONDS = 30


class SqlStore:
    """A ledger in an SQLite file.

    Args:
        location: Path of the file, or an ``sqlite:///`` URL. A missing file is created.

    Raises:
        LedgerUnavailable: If it cannot be opened or is some other program's database.
        LedgerCorrupt: If it is not a database.
        SchemaMismatch: If another schema version wrote it.
    """

    def __init__(self, location: str | Path) -> None:
        self.url = _url(location)
        self._process = os.getpid()
        self.engine = create_engine(self.url, max_overflow=-1)
        event.listen(self.engine, "connect", _configure)
        event.listen(self.engine, "begin", _begin)
        self._writer = self.engine.execution_options(ledger_write=True)
        self._connection: Connection | None = None
        self._log: tuple[int, int] | None = None
        # What is durable and immutable, or must not go back, remembered between transactions.
        self.prices: dict[tuple[str, Event], tuple[bytes, Price]] = {}
        self.budgets: dict[str, tuple[bytes, Budget]] = {}
        self.seen: dict[str, tuple[int, bytes]] = {}
        with translated(self.url):
            self._path = _prepare(self.engine, self._writer)
            self._file = _inode(self._path)
            self._check_file()

    @contextmanager
    def transaction(self) -> Iterator[SqlTransaction]:
        """Hold the write lock; write back and commit on leaving, or roll back.

        For one thread at a time: the writer thread of the accountant.

        Raises:
            LedgerUnavailable: If the lock was not had or a write failed; nothing was charged.
            OutcomeUnknown: If the commit failed.
        """
        with translated(self.url):
            if self._connection is None:
                self._connection, self._log = self._writer.connect(), None
            connection = self._connection
            transaction = connection.begin()
        try:
            self._log = self._log or _inode(f"{self._path}-wal")
            self._check_file()
            tx = SqlTransaction(self, connection)
            yield tx
            with translated(self.url):
                tx.write_back()
        except BaseException:
            self._roll_back(transaction)
            raise
        try:
            transaction.commit()
            self._check_file()
        except BaseException as error:
            self._discard()
            raise OutcomeUnknown(
                f"{self.url.database}: the commit failed ({error}); count it as spent"
            ) from error
        tx.remember()

    def _roll_back(self, transaction: Any) -> None:
        try:
            transaction.rollback()
        except SQLAlchemyError:
            self._discard()

    def _discard(self) -> None:
        """Close a connection that may still be in its transaction; the next one is new."""
        if self._connection is not None:
            self._connection.invalidate()
            self._connection.close()
            self._connection = None

    @contextmanager
    def snapshot(self) -> Iterator[Snapshot]:
        """Read one consistent state; writers are not held up."""
        self.check_process()
        with translated(self.url), self.engine.connect() as connection, connection.begin():
            self._check_file()
            yield Snapshot(connection, self.check_not_back)

    def check_not_back(self, row: Any) -> None:
        """Raise if a budget's row is older than one that this process has seen.

        Raises:
            LedgerCorrupt: If an older copy of the ledger was put in its place.
        """
        seen = self.seen.get(row.name)
        if seen is not None and (row.seq < seen[0] or (row.seq == seen[0] and row.head != seen[1])):
            raise LedgerCorrupt(
                f"budget {row.name!r} went back to entry {row.seq} after entry {seen[0]} was seen"
            )

    def _check_file(self) -> None:
        """Raise if the files at the ledger's path are no longer the ones that are open.

        Closing any other handle on the file in this process drops SQLite's locks; another
        process may then take the write-ahead log away, and what is committed to it is lost.
        A second name (hard link) would have a log of its own.
        """
        moved = _inode(self._path) != self._file
        if moved or (self._log is not None and _inode(f"{self._path}-wal") != self._log):
            raise LedgerUnavailable(
                f"{self._path} or its write-ahead log was moved, deleted or replaced while it was"
                " open; open it again, and never open, copy or hash the file in a process that"
                " has it open as a ledger"
            )
        if Path(self._path).stat().st_nlink != 1:
            raise LedgerUnavailable(
                f"{self._path} has a second name (hard link); remove that first"
            )

    def check_process(self) -> None:
        """Raise in a forked child: it must not use the parent's connections, nor its locks."""
        if os.getpid() != self._process:
            raise LedgerUnavailable(
                "this ledger was opened before a fork; open it again in the child process"
            )

    def close(self) -> None:
        """Close every connection; in a forked child, touch none of the parent's."""
        if os.getpid() != self._process:
            return
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        self.engine.dispose()


def _url(location: str | Path) -> URL:
    if isinstance(location, str) and "://" in location:
        try:
            url = make_url(location)
        except ArgumentError as error:
            raise LedgerUnavailable(f"{location!r} is neither a path nor a URL") from error
        if url.drivername not in ("sqlite", "sqlite+pysqlite"):
            raise LedgerUnavailable(f"{url.render_as_string()}: only sqlite:/// ledgers so far")
    else:
        url = URL.create("sqlite", database=str(location))
    if not url.database or url.database == ":memory:":
        raise LedgerUnavailable("a ledger must outlive its process: name a file")
    return url


def _configure(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # the driver starts no transaction of its own
    # A tampered value must reach verify, not fail in the driver.
    connection.text_factory = lambda raw: raw.decode("utf-8", "surrogateescape")
    connection.execute("PRAGMA busy_timeout=30000")
    # In this order: another process may be making the file a ledger right now.
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    if tables and application != APPLICATION_ID:
        raise LedgerUnavailable("this is a database of another program, not a ledger")
    mode = _turn_to_wal(connection)
    if mode != "wal":
        raise LedgerUnavailable(f"SQLite answered journal mode {mode!r} instead of 'wal'")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("PRAGMA fullfsync=1")


def _turn_to_wal(connection: Any) -> str:
    """Return the journal mode; SQLite does not wait by itself while others open the same file."""
    patience = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            (mode,) = connection.execute("PRAGMA journal_mode=WAL").fetchone()
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > patience:
                raise
            time.sleep(0.01)
        else:
            return str(mode)


def _begin(connection: Connection) -> None:
    write = connection.get_execution_options().get("ledger_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")


def _prepare(engine: Engine, writer: Engine) -> str:
    """Make an empty file a ledger, check the schema version, and return the file's path."""
    with engine.connect() as connection:
        path = str(connection.exec_driver_sql("PRAGMA database_list").one()[2])
        if _is_ledger(connection, path):
            return path
    with writer.begin() as connection:
        if not _is_ledger(connection, path):
            METADATA.create_all(connection, checkfirst=False)
            connection.exec_driver_sql(f"PRAGMA application_id={APPLICATION_ID}")
            connection.exec_driver_sql(f"PRAGMA user_version={SCHEMA_VERSION}")
    return path


def _is_ledger(connection: Connection, path: str) -> bool:
    """Return False if the file is empty; raise if another schema version wrote it."""
    if not connection.exec_driver_sql("SELECT count(*) FROM sqlite_master").scalar():
        return False
    version = connection.exec_driver_sql("PRAGMA user_version").scalar()
    if version != SCHEMA_VERSION:
        raise SchemaMismatch(
            f"{path} has ledger schema {version}, this epsledger reads {SCHEMA_VERSION};"
            " use the version that wrote it"
        )
    return True


def _inode(path: str) -> tuple[int, int] | None:
    """Return device and inode of a file, or None if there is none."""
    try:
        found = Path(path).stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino
