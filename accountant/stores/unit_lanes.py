"""The private state of a per-unit filter: how much each privacy unit has spent, in integers.

A file of its own, beside the ledger: what a unit has spent depends on private data, so it stays
out of entries, chain and checkpoints. The ledger holds the one charge that opened the filter.

The file is a log (:mod:`accountant.stores.lane_state`): new units, and for each query which lanes
paid. Every few hundred queries it is folded into a snapshot of all lanes, in the transaction of
the query. What a process knows of it is a cache, brought up to date under the file's lock.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import stat
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from accountant.budgets import of_type
from accountant.errors import (
    AccountantError,
    InvalidRequest,
    LedgerCorrupt,
    LedgerUnavailable,
    OutcomeUnknown,
    QueriesExhausted,
)
from accountant.forks import process
from accountant.marks import HighWaterMarks
from accountant.stores.inode import check_in_place, inode
from accountant.stores.lane_file import (
    ADD_BODY,
    ADD_ENTRY,
    ADD_SNAPSHOT,
    APPLICATION_ID,
    DROP_BODIES,
    ENTRIES,
    create_file,
)
from accountant.stores.lane_state import LaneEntry, Lanes, LaneState, checked_lanes, whole
from accountant.stores.sqlite import check_local, make_durable

FOLD = 256
"""After so many queries their bodies become one snapshot."""

_UNITS_OF_AN_ENTRY = 100_000
_BUSY_SECONDS = 30
_MARK = "lanes"


class UnitLanes:
    """What every unit has spent of one per-unit filter: durable, and PRIVATE.

    Threads may share it, and other processes of this host may have the same file open. Nothing
    that depends on what units have spent may leave the guard that owns it: no error and no log
    line here does. How long a charge takes depends on it a little.

    Args:
        path: Of the file; made, for its owner alone, if there is none.
        opening: What the ledger calls the charge that opened the filter. This machine's
            high-water marks go by it: a file that is made anew under the same name is refused.
        limit: What every unit is held to, below 2**62.
        most_queries: How many queries there may be at most; public.

    Raises:
        InvalidRequest: If the file is of another opening, limit or cap, or one is out of range.
        LedgerUnavailable: If it cannot be opened, or others can read it.
        LedgerCorrupt: If it is damaged, is something else, or is an older copy of itself.

    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> path, opening = f"{folder.name}/lanes.db", folder.name
    >>> lanes = UnitLanes(path, opening=opening, limit=10, most_queries=3)
    >>> at = lanes.lanes_of(["ann", "bob"])
    >>> lanes.charge(at, 6).tolist()
    [True, True]
    >>> lanes.charge(at[:1], 6).tolist(), lanes.charge(at, 4).tolist()
    ([False], [True, True])
    >>> lanes.queries
    3
    >>> lanes.close(); folder.cleanup()
    """

    def __init__(self, path: str | Path, *, opening: str, limit: int, most_queries: int) -> None:
        of_type(str, opening=opening)
        self.path = os.path.realpath(path)
        self.limit = whole("limit", limit)
        self.most_queries = whole("most_queries", most_queries)
        self._opening, self._process, self._door = opening, process(), threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._closed = False
        self._log: tuple[int, int] | None = None
        self._state = LaneState()
        self._seen: frozenset[tuple[int, bytes]] = frozenset()
        check_local(self.path)
        with self._translated():
            create_file(Path(self.path), [opening, self.limit, self.most_queries])
            status = Path(self.path).stat()
        self._file = (status.st_dev, status.st_ino)
        if stat.S_IMODE(status.st_mode) & 0o077:
            raise LedgerUnavailable(
                f"{self.path} is private state and others can read it: chmod 600 {self.path}"
            )
        self._marks = HighWaterMarks.open(f"lanes-{hashlib.sha256(opening.encode()).hexdigest()}")
        try:
            with self._locked():
                pass  # it is sound, and of these terms
        except BaseException:
            self.close()
            raise

    @property
    def queries(self) -> int:
        """How many queries were counted, by all processes; public."""
        with self._locked():
            return self._state.queries

    @property
    def identity(self) -> str:
        """What tells this file from any other that was made with the same terms; public."""
        with self._locked():
            ((digest,),) = self._execute("SELECT digest FROM entry WHERE seq = 1")
            return str(digest.hex())

    def lanes_of(self, units: Sequence[str]) -> Lanes:
        """Return the lane of each unit; one that is new gets a lane that has spent nothing.

        A unit keeps its lane for ever, also while no index has it.

        Args:
            units: Their ids, not empty.

        Returns:
            Array of shape (units,).

        Raises:
            InvalidRequest: If an id is none.
            LedgerError: As for :meth:`charge`.
        """
        for position, unit in enumerate(units):
            if not isinstance(unit, str) or not unit:
                raise InvalidRequest(f"unit {position} has no id: a text that is not empty")
            try:
                unit.encode()
            except UnicodeEncodeError as error:
                raise InvalidRequest(f"unit {position}: UTF-8 cannot hold its id") from error
        with self._locked():
            lane = self._state.lane
            new = [unit for unit in dict.fromkeys(units) if unit not in lane]
            for start in range(0, len(new), _UNITS_OF_AN_ENTRY):
                self._append(self._state.add(new[start : start + _UNITS_OF_AN_ENTRY]))
            return np.fromiter(map(lane.__getitem__, units), np.intp, len(units))

    def charge(self, lanes: Lanes, price: int) -> NDArray[np.bool]:
        """Charge a query to those of these lanes that have room; count it in any case.

        It is durable when this returns. A lane has room if it has spent at most limit - price.

        Args:
            lanes: Array of shape (n,), each lane at most once; may be empty.
            price: What each of them pays, from 1 to 2**62 - 1.

        Returns:
            Array of shape (n,): which of them had room, and were charged.

        Raises:
            QueriesExhausted: If there were ``most_queries``; nothing was charged.
            InvalidRequest: If a lane or the price is none; nothing was charged.
            LedgerUnavailable: If the file cannot be locked or written; nothing was charged.
            OutcomeUnknown: If the commit failed: it may be charged, and nothing may be released.
            LedgerCorrupt: If the file is damaged, or an older copy of it was put in its place.
        """
        price, lanes = whole("price", price), checked_lanes(lanes)
        with self._locked():
            if self._state.queries >= self.most_queries:
                raise QueriesExhausted(self.most_queries)
            paid = np.zeros(len(self._state.spent), bool)
            if lanes.size and not 0 <= lanes.min() <= lanes.max() < len(paid):
                raise InvalidRequest("a lane is not one of this file: ask lanes_of for them")
            paid[lanes] = True
            if np.count_nonzero(paid) != len(lanes):
                raise InvalidRequest("a lane is named twice: a query charges each unit once")
            kept: NDArray[np.bool] = self._state.spent[lanes] <= self.limit - price
            paid[lanes] = kept
            self._append(self._state.spend(price, paid, lanes[kept]))
            if self._state.unfolded >= FOLD:
                self._fold()
            return kept

    def close(self) -> None:
        """Close the file; in a forked child, touch none of the parent's connection."""
        if process() != self._process:
            return
        with self._door:
            self._closed = True
            self._discard()
            if self._marks is not None:
                self._marks.close()

    # --- one transaction ------------------------------------------------------------------------

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the file's lock, know what others committed; commit what is appended on leaving."""
        if process() != self._process:
            raise LedgerUnavailable(
                f"{self.path} was opened before a fork; open it again in the child process"
            )
        with self._door:
            if self._closed:
                raise LedgerUnavailable(f"{self.path} is closed")
            try:
                with self._translated():
                    self._begin()
                    self._catch_up()
                    before = self._state.seq
                    yield
                if self._state.seq == before:
                    self._roll_back()
                else:
                    self._commit()
                self._remember()
            except (InvalidRequest, QueriesExhausted):  # nothing was appended
                self._roll_back()
                raise
            except BaseException:
                self._roll_back()
                self._state = LaneState()
                raise

    def _begin(self) -> None:
        if self._connection is None:
            self._connection = self._connect()
        self._execute("BEGIN IMMEDIATE")
        self._log = self._log or inode(f"{self.path}-wal")
        check_in_place(self.path, self._file, self._log)

    def _commit(self) -> None:
        try:
            self._execute("COMMIT")
            check_in_place(self.path, self._file, self._log)
        except BaseException as error:
            self._discard()
            raise OutcomeUnknown(
                f"{self.path}: the commit failed ({error}); count it as spent and release nothing"
            ) from error

    def _remember(self) -> None:
        """Keep what is durable now, also outside the file, so that it cannot go back unseen."""
        now = (self._state.seq, self._state.head)
        if now not in self._seen:
            self._seen = frozenset({now})
            if self._marks is not None:
                self._marks.raise_to({_MARK: now})

    def _roll_back(self) -> None:
        if self._connection is not None and self._connection.in_transaction:
            try:
                self._execute("ROLLBACK")
            except sqlite3.Error:
                self._discard()

    def _discard(self) -> None:
        """Close a connection that may still be in its transaction; the file is read again."""
        connection, self._connection, self._log = self._connection, None, None
        self._state = LaneState()
        if connection is not None:
            with suppress(sqlite3.Error):
                connection.close()

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            f"{Path(self.path).as_uri()}?mode=rw",
            uri=True,
            timeout=_BUSY_SECONDS,
            isolation_level=None,  # the driver starts no transaction of its own
            check_same_thread=False,
        )
        try:
            self._check_kind(connection)
            make_durable(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _check_kind(self, connection: sqlite3.Connection) -> None:
        """Before anything is written: it may be some other program's."""
        if connection.execute("PRAGMA application_id").fetchone() != (APPLICATION_ID,):
            raise LedgerCorrupt(f"{self.path} is not, or no longer, the lanes of a per-unit filter")

    def _execute(self, statement: str, values: Sequence[Any] = ()) -> list[Any]:
        if self._connection is None:
            raise LedgerUnavailable(f"{self.path} is not open")
        return self._connection.execute(statement, values).fetchall()

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Turn the driver's errors into ours."""
        try:
            yield
        except AccountantError:
            raise
        except (sqlite3.Error, OSError) as error:
            code = getattr(error, "sqlite_errorcode", None)  # SQLITE_ERROR: a table is missing
            if isinstance(error, sqlite3.OperationalError | OSError) and code != 1:
                raise LedgerUnavailable(f"{self.path}: {error}; nothing was charged") from error
            raise LedgerCorrupt(f"{self.path} is damaged: {error}") from error

    # --- what is in the file --------------------------------------------------------------------

    def _catch_up(self) -> None:
        """Apply what was committed since; raise if the file went back, or does not add up."""
        try:
            if not self._state.seq:
                self._check_terms()
            self._check_not_back()
            entries = self._entries()
            if self._state.seq and any(entry.body is None for entry in entries):
                self._state = LaneState()  # others have folded meanwhile
                entries = self._entries()
            if not self._state.seq:
                for seq, seal, spent in self._execute("SELECT seq, seal, spent FROM snapshot"):
                    self._state.start_from(seq, seal, spent, entries)
            for entry in entries:
                self._state.apply(entry)
            self._state.check_complete()
        except AccountantError:
            raise
        except (TypeError, ValueError, IndexError, struct.error) as error:
            raise LedgerCorrupt(f"{self.path} is damaged: {error}") from error
        if entries:
            self._check_limit()

    def _check_limit(self) -> None:
        if self._state.spent.max(initial=0) > self.limit:
            raise LedgerCorrupt(f"{self.path} is damaged: a lane is above the limit")

    def _entries(self, most: int = -1) -> list[LaneEntry]:
        return [LaneEntry(*row) for row in self._execute(ENTRIES, (self._state.seq, most))]

    def _check_not_back(self) -> None:
        marks = {} if self._marks is None else self._marks.read(frozenset({_MARK}))
        for seq, head in {*self._seen, *marks.values()}:
            if self._execute("SELECT head FROM entry WHERE seq = ?", (seq,)) != [(head,)]:
                raise LedgerCorrupt(
                    f"{self.path} went back, or on from a copy, after its entry {seq} was seen:"
                    " an older copy was put in its place, and what units spent meanwhile is"
                    " missing. Put the newest copy back; if there is none, the filter is lost"
                )

    def _check_terms(self) -> None:
        """Before anything else: the marks are those of the opening that was named."""
        first = LaneState()
        for entry in self._entries(most=1):
            first.apply(entry)
        given = {"opening": self._opening, "limit": self.limit, "cap": self.most_queries}
        for (name, asked), found in zip(given.items(), first.terms, strict=True):
            if asked != found:
                raise InvalidRequest(f"{self.path} has the {name} {found!r}, not {asked!r}")

    def _append(self, entry: LaneEntry) -> None:
        self._execute(ADD_ENTRY, entry[:-1])
        self._execute(ADD_BODY, (entry.seq, entry.body))

    def _fold(self) -> None:
        before = self._state.folded
        self._execute("DELETE FROM snapshot")
        self._execute(ADD_SNAPSHOT, self._state.fold())
        self._execute(DROP_BODIES, (before,))
