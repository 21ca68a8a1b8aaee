"""SQLite's file calls, recorded or failing: apsw lets Python stand between SQLite and the disk.

:class:`ApswStore` is the SQLite store with its write path on an apsw connection. apsw brings its
own SQLite, so nothing else in the process may have the file open meanwhile: POSIX locks belong
to the process, and a second library would drop them.
"""

from __future__ import annotations

import errno
import sqlite3
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import apsw

from accountant import Accountant
from accountant.stores import ledger_url
from accountant.stores.sqlite import SqliteStore


@contextmanager
def as_sqlite3():
    try:
        yield
    except apsw.ConstraintError as error:
        raise sqlite3.IntegrityError(str(error)) from error
    except (apsw.CorruptError, apsw.NotADBError) as error:
        raise sqlite3.DatabaseError(str(error)) from error
    except apsw.Error as error:
        raise sqlite3.OperationalError(str(error)) from error


class Rows:
    def __init__(self, rows: list, rowcount: int = -1) -> None:
        self._rows, self.rowcount = rows, rowcount

    def fetchall(self) -> list:
        return self._rows


class Connection:
    """What the store uses of a sqlite3 connection, on apsw."""

    def __init__(self, path: str, vfs: str, pragmas: tuple[str, ...]) -> None:
        with as_sqlite3():
            self.inner = apsw.Connection(path, vfs=vfs)
            for pragma in pragmas:
                self.inner.execute(f"PRAGMA {pragma}")
        self.driver_connection = self

    @property
    def in_transaction(self) -> bool:
        return self.inner.in_transaction

    def execute(self, statement: str, values=()) -> Rows:
        with as_sqlite3():
            return Rows(list(self.inner.execute(statement, tuple(values))))

    def executemany(self, statement: str, rows) -> Rows:
        with as_sqlite3():
            before = self.inner.total_changes()
            self.inner.executemany(statement, [tuple(row) for row in rows])
            return Rows([], self.inner.total_changes() - before)

    def invalidate(self) -> None:
        pass

    def close(self) -> None:
        with as_sqlite3():
            self.inner.close(True)


class ApswStore(SqliteStore):
    """The store as it is, but for the library below its statements."""

    def __init__(self, location: Path, vfs: str, *pragmas: str) -> None:
        self.vfs = vfs
        self.pragmas = ("busy_timeout=1000", "journal_mode=WAL", "synchronous=FULL", *pragmas)
        super().__init__(ledger_url(location))
        self.engine.dispose()

    def _connect(self) -> Connection:
        self._log = None
        return Connection(self._path, self.vfs, self.pragmas)


def accountant_on(location: Path, vfs: str, *pragmas: str) -> Accountant:
    return Accountant(ApswStore(location, vfs, *pragmas))


class Watched(apsw.VFS):
    """The default VFS; every call that can reach the disk is shown to ``watch`` first.

    ``watch(call, file, offset, data)`` may raise what the disk would.
    """

    def __init__(self, name: str, watch: Callable[[str, str, int, bytes], None]) -> None:
        self.watch, self.named = watch, name
        super().__init__(name, "")

    def xOpen(self, name, flags):  # noqa: N802
        return WatchedFile(self, name, flags)

    def xDelete(self, name, sync):  # noqa: N802
        self.watch("delete", name, 0, b"")
        super().xDelete(name, sync)


class WatchedFile(apsw.VFSFile):
    def __init__(self, vfs: Watched, name, flags) -> None:
        self.name = name.filename() if isinstance(name, apsw.URIFilename) else name
        self.watch = vfs.watch
        self.watch("open", self.name, 0, b"")
        super().__init__("", name, flags)

    def xWrite(self, data, offset):  # noqa: N802
        self.watch("write", self.name, offset, bytes(data))
        super().xWrite(data, offset)

    def xTruncate(self, size):  # noqa: N802
        self.watch("truncate", self.name, size, b"")
        super().xTruncate(size)

    def xSync(self, flags):  # noqa: N802
        self.watch("sync", self.name, 0, b"")
        super().xSync(flags)

    def xRead(self, amount, offset):  # noqa: N802
        self.watch("read", self.name, offset, b"")
        return super().xRead(amount, offset)


def disk_error(code: int) -> Exception:
    """What SQLite is told when the disk fails: EIO or ENOSPC."""
    return apsw.FullError("no space") if code == errno.ENOSPC else apsw.IOError("input/output")
