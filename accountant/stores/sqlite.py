"""The SQLite store: one file, for the processes of one host.

A write transaction starts with ``BEGIN IMMEDIATE``: with the default of SQLAlchemy and SQLModel
on SQLite, two threads read the same totals and overspend without an error. ``synchronous=FULL``
makes a commit survive a power cut. Processes take turns by a lock on the ledger's folder,
for which they wait in steps of a tenth of a millisecond; SQLite by itself lets them sleep up to a
thousand times as long. The turn is for fairness alone, the database's lock decides.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import stat
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakSet

from sqlalchemy import URL, Connection, create_engine, event

from accountant.errors import AccountantError, LedgerCorrupt, LedgerUnavailable, SchemaMismatch
from accountant.notes import fsync_folder
from accountant.stores.inode import check_in_place, inode
from accountant.stores.schema import (
    APPLICATION_ID,
    METADATA,
    SCHEMA_VERSION,
    new_ledger,
    sqlite_triggers,
)
from accountant.stores.sql import SqlStore
from accountant.stores.statements import Statements

NETWORK_FILE_SYSTEMS = frozenset(
    {
        "9p",
        "afs",
        "ceph",
        "cifs",
        "fuse.sshfs",
        "glusterfs",
        "lustre",
        "nfs",
        "nfs4",
        "smb3",
        "smbfs",
    }
)
_DURABLE = {"journal_mode": "wal", "synchronous": 2, "fullfsync": 1}
"""What the pragmas of a connection must answer; 2 is FULL."""
_PATIENCE_SECONDS = 30
_TURN_SECONDS = 1.0
_POLL_SECONDS = 1e-4
_BUSY_MILLISECONDS = 30_000


class SqliteStore(SqlStore):
    """A ledger in an SQLite file.

    Args:
        url: An ``sqlite:///`` URL.
        create: Whether a missing or empty file becomes a ledger.

    Raises:
        LedgerUnavailable: If it cannot be opened or is some other program's database.
        LedgerCorrupt: If it is not a database.
        SchemaMismatch: If another schema version wrote it.
    """

    statements: ClassVar[Statements] = Statements("?")
    _driver_error = sqlite3.Error

    def __init__(self, url: URL, *, create: bool = True) -> None:
        # Through a link that is pointed elsewhere later, new connections would be another ledger's.
        url = url.set(database=os.path.realpath(str(url.database)))
        engine = create_engine(url, max_overflow=-1)
        event.listen(engine, "connect", configure)
        event.listen(engine, "begin", start)
        self._path = ""
        self._log: tuple[int, int] | None = None
        self._turn = -1
        super().__init__(url, engine, create=create)
        self._file = inode(self._path)
        with suppress(OSError):
            self._turn = os.open(Path(self._path).parent, os.O_RDONLY | os.O_CLOEXEC)
        _OPEN.add(self)
        self._check_file()

    def let_go_of_the_turn(self) -> None:
        """Close the folder that the turn is a lock on, without giving the turn up elsewhere."""
        if self._turn >= 0:
            os.close(self._turn)
            self._turn = -1

    @property
    def place(self) -> str:
        """What errors call the ledger."""
        return str(self.url.database)

    def covers(self, names: frozenset[str]) -> bool:  # noqa: ARG002
        """Say whether the transaction in hand holds the lock of these budgets: always."""
        return True

    def close(self) -> None:
        """Close every connection; in a forked child, touch none of the parent's."""
        super().close()
        self.let_go_of_the_turn()

    def backup(self, to: Path) -> None:
        """Copy the ledger as it is now to a new file, through SQLite's backup API.

        Raises:
            LedgerUnavailable: If the file exists or cannot be written; nothing is left of it then.
        """
        part = None
        try:
            os.close(os.open(to, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        except FileExistsError as error:
            raise LedgerUnavailable(f"{to} exists; a backup never overwrites") from error
        except OSError as error:
            raise LedgerUnavailable(f"{to}: no backup was made: {error}") from error
        try:
            descriptor, name = tempfile.mkstemp(prefix=f"{to.name}.", suffix=".part", dir=to.parent)
            os.close(descriptor)
            part = Path(name)
            with (
                self.engine.connect() as connection,
                closing(sqlite3.connect(part)) as copy,
            ):
                connection.connection.driver_connection.backup(copy)  # type: ignore[union-attr]
            with part.open("rb") as file:
                os.fsync(file.fileno())
            with suppress(OSError):
                part.chmod(stat.S_IMODE(os.stat(self._path).st_mode))  # noqa: PTH116
            part.replace(to)
            fsync_folder(to)
        except (OSError, sqlite3.Error) as error:
            to.unlink(missing_ok=True)
            raise LedgerUnavailable(f"{to}: no backup was made: {error}") from error
        finally:
            if part is not None:
                part.unlink(missing_ok=True)

    def warnings(self) -> list[str]:
        """Return what could lose acknowledged charges here, or let two writers in."""
        with self.engine.connect() as connection:
            found = [connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in _DURABLE]
        return [
            f"SQLite answers {name}={value!r} and must answer {wanted!r}"
            for (name, wanted), value in zip(_DURABLE.items(), found, strict=True)
            if value != wanted
        ]

    def missing_triggers(self) -> list[str]:
        """Return the names of the triggers that the ledger has lost, or that were changed."""
        with self.engine.connect() as connection:
            query = "SELECT sql FROM sqlite_master WHERE type = 'trigger'"
            found = set(connection.exec_driver_sql(query).scalars())
        return [trigger.split()[2] for trigger in sqlite_triggers() if trigger not in found]

    def _prepare(self, *, create: bool) -> str:
        if not create and not (Path(self.place).exists() and Path(self.place).stat().st_size):
            raise self._no_ledger()
        check_local(self.place)
        with self.engine.connect() as connection:
            self._path = str(connection.exec_driver_sql("PRAGMA database_list").one()[2])
            if self._is_ledger(connection):
                return _identity(connection)
        if not create:
            raise self._no_ledger()
        with self.engine.execution_options(ledger_write=True).begin() as connection:
            if not self._is_ledger(connection):
                METADATA.create_all(connection, checkfirst=False)
                new_ledger(connection)
                connection.exec_driver_sql(f"PRAGMA application_id={APPLICATION_ID}")
                connection.exec_driver_sql(f"PRAGMA user_version={SCHEMA_VERSION}")
            return _identity(connection)

    def _is_ledger(self, connection: Connection) -> bool:
        """Return False if the file is empty; raise if another schema version wrote it."""
        if not connection.exec_driver_sql("SELECT count(*) FROM sqlite_master").scalar():
            return False
        self._check_version(connection.exec_driver_sql("PRAGMA user_version").scalar())
        return True

    def _check_version(self, version: Any) -> None:
        if version != SCHEMA_VERSION:
            raise SchemaMismatch(self.place, int(version), SCHEMA_VERSION)

    def _connect(self) -> Any:
        self._log = None
        return self.engine.raw_connection()

    def _begin(self, names: frozenset[str]) -> None:  # noqa: ARG002
        self._take_turn()
        self._execute("BEGIN IMMEDIATE", ())
        self._check_version(self._execute("PRAGMA user_version", ())[0][0])
        self._log = self._log or inode(f"{self._path}-wal")
        self._check_file()

    def _commit(self) -> None:
        self._execute("COMMIT", ())
        self._end_turn()
        self._check_file()

    def _roll_back(self) -> None:
        try:
            if self._connection is not None and self._driver.in_transaction:
                self._execute("ROLLBACK", ())
        except sqlite3.Error:
            self._discard()
        finally:
            self._end_turn()

    def _discard(self) -> None:
        super()._discard()
        self._log = None  # the last connection takes the log with it
        self._end_turn()

    def _take_turn(self) -> None:
        """Wait for the turn; go on without it if whoever has it does not go on."""
        patience = time.monotonic() + _TURN_SECONDS
        while self._turn >= 0:
            try:
                fcntl.flock(self._turn, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > patience:
                    return
                time.sleep(_POLL_SECONDS)
            else:
                return

    def _end_turn(self) -> None:
        if self._turn >= 0:
            fcntl.flock(self._turn, fcntl.LOCK_UN)

    def _execute(self, statement: str, values: Sequence[Any]) -> list[Any]:
        rows: list[Any] = self._driver.execute(statement, values).fetchall()
        return rows

    def _execute_many(self, statement: str, rows: Sequence[Sequence[Any]]) -> int:
        changed: int = self._driver.executemany(statement, rows).rowcount
        return changed

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        with self.engine.connect() as connection, connection.begin():
            self._check_file()
            yield connection

    def _translate(self, error: BaseException) -> AccountantError:
        if isinstance(error, sqlite3.OperationalError):
            return LedgerUnavailable(f"{self.place}: {error}; nothing was charged")
        if isinstance(error, sqlite3.DatabaseError):
            return LedgerCorrupt(f"{self.place}: {error}")
        return LedgerUnavailable(f"{self.place}: {error}; nothing was charged")

    def _check_file(self) -> None:
        """Raise if the files at the ledger's path are no longer the ones that are open."""
        check_in_place(self._path, self._file, self._log)


_OPEN: WeakSet[SqliteStore] = WeakSet()


def _in_child() -> None:
    """A child that kept the folder open would keep the turn when its parent dies."""
    for store in _OPEN:
        store.let_go_of_the_turn()


os.register_at_fork(after_in_child=_in_child)


def check_local(place: str) -> None:
    """Raise LedgerUnavailable if the file is where SQLite's locks may not hold."""
    kind = file_system(Path(place))
    if kind in NETWORK_FILE_SYSTEMS and not os.environ.get("EPSLEDGER_NETWORK_FILES"):
        raise LedgerUnavailable(
            f"{place} is on a {kind} file system, where SQLite's locks may not hold; use"
            " a local disk, or PostgreSQL for several hosts (EPSLEDGER_NETWORK_FILES=1 if you"
            " know that its locks hold)"
        )


def file_system(path: Path) -> str:
    """Return the kind of file system that a path is on, or "" where the system does not tell."""
    try:
        mounts = Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()
        place = path.resolve()
    except OSError:
        return ""
    fields = [mount.split(" ") for mount in mounts]
    over = [(len(at), kind) for _, at, kind, *_ in fields if place.is_relative_to(at)]
    return max(over, default=(0, ""))[1]


def _identity(connection: Connection) -> str:
    return str(connection.exec_driver_sql("SELECT id FROM epsledger_ledger").scalar_one())


def configure(connection: Any, _record: object) -> None:
    """Make a new driver connection durable, and refuse what is not a ledger."""
    connection.isolation_level = None  # the driver starts no transaction of its own
    # A tampered value must reach verify, not fail in the driver.
    connection.text_factory = lambda raw: raw.decode("utf-8", "surrogateescape")
    connection.execute(f"PRAGMA busy_timeout={_BUSY_MILLISECONDS}")
    # In this order: another process may be making the file a ledger right now.
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    if tables and application != APPLICATION_ID:
        raise LedgerUnavailable("this is a database of another program, not a ledger")
    make_durable(connection)


def make_durable(connection: Any) -> None:
    """Let every commit of a driver connection survive a power cut."""
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


def start(connection: Connection) -> None:
    """Start a transaction: at once as a writer where that was asked for."""
    write = connection.get_execution_options().get("ledger_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")
