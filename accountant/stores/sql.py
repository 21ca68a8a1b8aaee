"""What the SQL stores share: reads and writes under the lock, and the order of a transaction.

The write path speaks to the driver directly: composing a statement in SQLAlchemy costs more
than SQLite needs to run it. Schema and snapshots go through SQLAlchemy.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, ClassVar, TypeVar

from sqlalchemy import URL, Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from accountant.errors import AccountantError, LedgerCorrupt, LedgerUnavailable, OutcomeUnknown
from accountant.forks import process
from accountant.marks import Heads, HighWaterMarks
from accountant.requests import WHOLE_LEDGER
from accountant.stores.rows import BudgetRow, EventRow, KeyRow, ReservationRow, Spent
from accountant.stores.snapshot import SqlSnapshot
from accountant.stores.statements import SPEND_KINDS, Statements, bound
from accountant.stores.transaction import Remembered, Transaction

_Row = TypeVar("_Row", EventRow, ReservationRow, KeyRow)


class SqlStore(ABC):
    """The part of a SQL store that does not depend on the database.

    A subclass opens the connections, takes the lock, and knows the driver's errors.

    Attributes:
        ledger: Identity of the ledger, 32 hexadecimal digits.
        remembered: What this process saw of it, and the marks of this machine.
    """

    statements: ClassVar[Statements]

    def __init__(self, url: URL, engine: Engine, *, create: bool) -> None:
        self.url, self.engine = url, engine
        self._process = process()
        self._connection: Any = None
        self.remembered = Remembered()
        try:
            with self.translated():
                self.ledger = self._prepare(create=create)
        except AccountantError:
            engine.dispose()
            raise
        self.remembered.marks = HighWaterMarks.open(self.ledger)

    @contextmanager
    def transaction(self, names: frozenset[str]) -> Iterator[Transaction]:
        """Hold the lock of these budgets; write back and commit on leaving, or roll back.

        For one thread at a time: the writer thread of the accountant.

        Raises:
            LedgerUnavailable: If the lock was not had or a write failed; nothing was charged.
            OutcomeUnknown: If the commit failed.
        """
        try:
            with self.translated():
                if self._connection is None:
                    self._connection = self._connect()
                self._begin(names)
                tx = Transaction(self, self.remembered, names)
                yield tx
                tx.write_back()
        except BaseException:
            self._roll_back()
            raise
        try:
            self._commit()
        except BaseException as error:
            self._discard()
            raise OutcomeUnknown(
                f"{self.place}: the commit failed ({error}); count it as spent"
            ) from error
        self.saw(tx.remember())

    def saw(self, heads: Heads) -> None:
        """Raise this machine's marks to these heads."""
        if self.remembered.marks is not None:
            self.remembered.marks.raise_to(heads)

    def try_locks(self, names: frozenset[str]) -> None:
        """Take what a transaction over these names locks, and let it go; nothing is remembered.

        Raises:
            LedgerUnavailable: If the lock was not had.
        """
        with self.translated():
            if self._connection is None:
                self._connection = self._connect()
            try:
                self._begin(names)
                self.read_budgets(sorted(names - {WHOLE_LEDGER}))
            finally:
                self._roll_back()

    @contextmanager
    def snapshot(self) -> Iterator[SqlSnapshot]:
        """Read one consistent state; writers are not held up."""
        self.check_process()
        seen = self.remembered.highest()  # before: the writer goes on while this is read
        with self.translated(), self._reading() as connection:
            yield SqlSnapshot(self.ledger, connection, self.statements, seen)

    @property
    def place(self) -> str:
        """What errors call the ledger."""
        return self.url.render_as_string(hide_password=True)

    def check_process(self) -> None:
        """Raise in a forked child: it must not use the parent's connections, nor its locks."""
        if process() != self._process:
            raise LedgerUnavailable(
                "this ledger was opened before a fork; open it again in the child process"
            )

    def close(self) -> None:
        """Close every connection; in a forked child, touch none of the parent's."""
        if process() != self._process:
            return
        self._discard()
        self.engine.dispose()
        if self.remembered.marks is not None:
            self.remembered.marks.close()

    @contextmanager
    def translated(self) -> Iterator[None]:
        """Turn the errors of driver and SQLAlchemy into ours."""
        try:
            yield
        except AccountantError:
            raise
        except SQLAlchemyError as error:
            raise self._translate(getattr(error, "orig", None) or error) from error
        except Exception as error:
            if isinstance(error, self._driver_error):
                raise self._translate(error) from error
            raise

    # What the rules read and write while the lock is held.

    def read_budgets(self, names: Sequence[str]) -> list[BudgetRow]:
        """Return the rows of these budgets, locked until the transaction ends."""
        if not names:
            return []
        return [
            BudgetRow._make(row)
            for row in self._execute(self.statements.budgets(len(names)), names)
        ]

    def read_records(self) -> list[bytes]:
        """Return the records of all budgets."""
        return [record for (record,) in self._execute(self.statements.records, ())]

    def read_event(self, budget: str, digest: bytes) -> EventRow | None:
        """Return a stored event, or None."""
        return self._one(EventRow, budget, digest)

    def read_reservation(self, budget: str, seq: int) -> ReservationRow | None:
        """Return a reservation, or None."""
        return self._one(ReservationRow, budget, seq)

    def read_key(self, budget: str, key: str) -> KeyRow | None:
        """Return an idempotency key, or None."""
        return self._one(KeyRow, budget, key)

    def read_open_reservations(self, budget: str) -> list[int]:
        """Return the ``seq`` of the open reservations of a budget, without leases."""
        return [seq for (seq,) in self._execute(self.statements.open_reservations, (budget,))]

    def read_spent(self, budget: str) -> list[Spent]:
        """Return what the entries of a budget spent, added up; reservations by their marks."""
        charged = self._execute(self.statements.spent, (budget, *SPEND_KINDS))
        held = self._execute(self.statements.held, (budget,))
        return [
            *(
                Spent(event, int.from_bytes(uses, "little"), times)
                for event, uses, times in charged
            ),
            *(Spent(*row) for row in held if row[1]),
        ]

    def read_checkpoints(self) -> int:
        """Return how many checkpoints there are."""
        ((count,),) = self._execute(self.statements.checkpoints, ())
        return int(count)

    def read_digest(self, budget: str, seq: int) -> bytes | None:
        """Return the digest of an entry, or None."""
        for (digest,) in self._execute(self.statements.digest, (budget, seq)):
            return bytes(digest)
        return None

    def insert(self, rows: Sequence[tuple[Any, ...]]) -> None:
        """Add rows, all of one class."""
        self._execute_many(self.statements.inserts[type(rows[0])], rows)

    def update(self, rows: Sequence[tuple[Any, ...]], before: Sequence[Any]) -> None:
        """Replace rows, all of one class; a budget only if its ``seq`` is still the one before."""
        values = [bound(new, old) for new, old in zip(rows, before, strict=True)]
        if self._execute_many(self.statements.updates[type(rows[0])], values) != len(rows):
            raise LedgerCorrupt(f"{self.place}: a row changed under the write lock")

    def _one(self, kind: type[_Row], *key: Any) -> _Row | None:
        for row in self._execute(self.statements.by_key[kind], key):
            return kind(*row)
        return None

    @property
    def _driver(self) -> Any:
        return self._connection.driver_connection

    def _discard(self) -> None:
        """Close a connection that may still be in its transaction; the next one is new."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(self._driver_error):
                connection.invalidate()
                connection.close()

    # What a subclass knows.

    _driver_error: type[Exception]

    @abstractmethod
    def covers(self, names: frozenset[str]) -> bool:
        """Say whether the transaction in hand holds the lock of these budgets."""

    @abstractmethod
    def _prepare(self, *, create: bool) -> str:
        """Make an empty database a ledger if asked to, check its version, return its id."""

    def _no_ledger(self) -> LedgerUnavailable:
        return LedgerUnavailable(
            f"no ledger at {self.place}; is that the right place? The first budget makes one"
        )

    @abstractmethod
    def warnings(self) -> list[str]:
        """Return what could lose acknowledged charges here."""

    @abstractmethod
    def missing_triggers(self) -> list[str]:
        """Return the names of the triggers that the ledger has lost, or that were changed."""

    @abstractmethod
    def _connect(self) -> Any:
        """Return a new driver connection for the write path."""

    @abstractmethod
    def _begin(self, names: frozenset[str]) -> None:
        """Start a write transaction that holds what these names need, or may wait for it."""

    @abstractmethod
    def _commit(self) -> None:
        """Commit; return only when it is durable."""

    @abstractmethod
    def _roll_back(self) -> None:
        """Undo the transaction, whatever state it is in."""

    @abstractmethod
    def _execute(self, statement: str, values: Sequence[Any]) -> Sequence[Any]:
        """Run one statement and return its rows."""

    @abstractmethod
    def _execute_many(self, statement: str, rows: Sequence[Sequence[Any]]) -> int:
        """Run one statement for each row of values; return how many rows it changed."""

    @abstractmethod
    def _reading(self) -> AbstractContextManager[Connection]:
        """Return a connection in a read transaction of one consistent state."""

    @abstractmethod
    def _translate(self, error: BaseException) -> AccountantError:
        """Return our error for one of the driver's."""
