"""The memory store: for tests and for trying things out. It ends with its process."""

from __future__ import annotations

import secrets
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from accountant.entries import SPENDS, unpack
from accountant.errors import LedgerCorrupt, LedgerUnavailable, UnknownBudget
from accountant.forks import process
from accountant.marks import Heads
from accountant.stores.rows import (
    BudgetRow,
    CheckpointRow,
    EntryRow,
    EventRow,
    KeyRow,
    ReservationRow,
    Spent,
)
from accountant.stores.transaction import Remembered, Transaction

_LENGTH_OF_KEY: dict[Any, int] = {
    BudgetRow: 1,
    EventRow: 2,
    EntryRow: 2,
    ReservationRow: 2,
    KeyRow: 2,
    CheckpointRow: 1,
}


class MemoryStore:
    """A ledger in memory, with the rules and the chains of the others. It is its own snapshot.

    Attributes:
        ledger: Identity of the ledger.
        remembered: What this process saw of it.
        seen: The budgets among that.
    """

    def __init__(self) -> None:
        self.ledger = secrets.token_hex(16)
        self.remembered = Remembered()
        self.seen = self.remembered.seen
        self._process = process()
        self._lock = threading.RLock()
        self._rows: dict[Any, dict[Any, Any]] = {kind: {} for kind in _LENGTH_OF_KEY}
        self._written: list[tuple[Any, ...]] = []

    @contextmanager
    def transaction(self, names: frozenset[str]) -> Iterator[Transaction]:
        """Hold the lock; keep the changes on leaving, or drop them."""
        with self._lock:
            self._written = []
            tx = Transaction(self, self.remembered, names)
            yield tx
            tx.write_back()
            for row in self._written:
                self._rows[type(row)][_key(row)] = row
            tx.remember()

    def covers(self, names: frozenset[str]) -> bool:  # noqa: ARG002
        """Say whether the transaction in hand holds the lock of these budgets: always."""
        return True

    @contextmanager
    def snapshot(self) -> Iterator[MemoryStore]:
        """Read one consistent state; writers wait."""
        self.check_process()
        with self._lock:
            yield self

    def saw(self, heads: Heads) -> None:
        """Do nothing: nobody can put back what is in memory."""

    def check_process(self) -> None:
        """Raise in a forked child: what it writes, its parent does not see."""
        if process() != self._process:
            raise LedgerUnavailable("a ledger in memory belongs to the process that made it")

    def close(self) -> None:
        """Do nothing: the ledger lives as long as this object."""

    # What the rules read and write while the lock is held.

    def read_budgets(self, names: Sequence[str]) -> list[BudgetRow]:
        """Return the rows of these budgets."""
        stored = self._rows[BudgetRow]
        return [stored[name] for name in names if name in stored]

    def read_records(self) -> list[bytes]:
        """Return the records of all budgets."""
        return [row.record for row in self._rows[BudgetRow].values()]

    def read_event(self, budget: str, digest: bytes) -> EventRow | None:
        """Return a stored event, or None."""
        return self._rows[EventRow].get((budget, digest))

    def read_reservation(self, budget: str, seq: int) -> ReservationRow | None:
        """Return a reservation, or None."""
        return self._rows[ReservationRow].get((budget, seq))

    def read_key(self, budget: str, key: str) -> KeyRow | None:
        """Return an idempotency key, or None."""
        return self._rows[KeyRow].get((budget, key))

    def read_open_reservations(self, budget: str) -> list[int]:
        """Return the ``seq`` of the open reservations of a budget, without leases."""
        return [row.seq for row in self.reservations(budget) if row.open and not row.lease]

    def read_spent(self, budget: str) -> list[Spent]:
        """Return what the entries of a budget spent, added up; reservations by their marks."""
        held = (
            Spent(row.event, row.uses if row.open else row.marked, 1)
            for row in self.reservations(budget)
        )
        return [*self.spent(budget), *(spent for spent in held if spent.uses)]

    def read_digest(self, budget: str, seq: int) -> bytes | None:
        """Return the digest of an entry, or None."""
        row = self._rows[EntryRow].get((budget, seq))
        return None if row is None else row.digest

    def read_checkpoints(self) -> int:
        """Return how many checkpoints there are."""
        return len(self._rows[CheckpointRow])

    def insert(self, rows: Sequence[tuple[Any, ...]]) -> None:
        """Add rows, all of one class."""
        for row in rows:
            if _key(row) in self._rows[type(row)]:
                raise LedgerCorrupt(f"there is a row {_key(row)} already")
            self._written.append(row)

    def update(self, rows: Sequence[tuple[Any, ...]], before: Sequence[Any]) -> None:  # noqa: ARG002
        """Replace rows, all of one class."""
        self._written.extend(rows)

    # What a snapshot shows.

    def budgets(self) -> list[str]:
        """Return the names of all budgets, sorted."""
        return sorted(self._rows[BudgetRow])

    def row(self, budget: str) -> BudgetRow:
        """Return the stored row of a budget, or raise UnknownBudget."""
        if budget not in self._rows[BudgetRow]:
            raise UnknownBudget(budget)
        row: BudgetRow = self._rows[BudgetRow][budget]
        return row

    def records(self) -> list[bytes]:
        """Return the records of all budgets."""
        return self.read_records()

    def entries(self, budget: str) -> Iterator[tuple[Any, bytes, Any]]:
        """Yield (seq, body, digest) of the stored entries of a budget, by ``seq``."""
        yield from sorted(row[1:] for row in self._of(EntryRow, budget))

    def events(self, budget: str) -> list[Any]:
        """Return the stored events of a budget."""
        return self._of(EventRow, budget)

    def reservations(self, budget: str) -> list[Any]:
        """Return the stored reservations of a budget."""
        return self._of(ReservationRow, budget)

    def keys(self, budget: str) -> list[Any]:
        """Return the stored idempotency keys of a budget."""
        return self._of(KeyRow, budget)

    def spent(self, budget: str) -> list[Spent]:
        """Return what the entries of a budget charged at once, added up."""
        entries = (unpack(body) for _, body, _ in self.entries(budget))
        times = Counter((entry.event, entry.uses) for entry in entries if entry.kind in SPENDS)
        return [Spent(event, uses, count) for (event, uses), count in times.items()]

    def checkpoints(self) -> list[CheckpointRow]:
        """Return the signed checkpoints that were made, in order."""
        return list(self._rows[CheckpointRow].values())

    def strays(self) -> list[str]:
        """Return the names under which rows are stored that no budget has: none."""
        return []

    def _of(self, kind: Any, budget: str) -> list[Any]:
        return [row for row in self._rows[kind].values() if row.budget == budget]


def _key(row: Any) -> Any:
    length = _LENGTH_OF_KEY[type(row)]
    return row[0] if length == 1 else row[:length]
