"""Reading: one consistent state of a ledger, for statements and verify."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from sqlalchemy import Connection, select

from accountant.errors import UnknownBudget
from accountant.stores.rows import BudgetRow, CheckpointRow, Spent
from accountant.stores.schema import BUDGET, CHECKPOINT, ENTRY, EVENT, KEY, RESERVATION
from accountant.stores.statements import SPEND_KINDS, Statements
from accountant.stores.transaction import check_not_back


class Snapshot(Protocol):
    """One consistent state of a ledger, to read; what is stored, not what it ought to be.

    Attributes:
        ledger: Identity of the ledger.
        seen: What this process, or an earlier one on this machine, had seen of each budget.
    """

    ledger: str
    seen: dict[str, tuple[int, bytes]]

    def budgets(self) -> list[str]:
        """Return the names of all budgets, sorted; also of those seen that are missing."""

    def row(self, budget: str) -> BudgetRow:
        """Return the stored row of a budget.

        Raises:
            UnknownBudget: If there is none.
            LedgerCorrupt: If it went back since it was last seen.
        """

    def records(self) -> list[bytes]:
        """Return the records of all stored budgets."""

    def entries(self, budget: str) -> Iterator[tuple[Any, bytes, Any]]:
        """Yield (seq, body, digest) of the stored entries of a budget, by ``seq``."""

    def events(self, budget: str) -> list[Any]:
        """Return the stored events of a budget: rows of digest, encoded, price."""

    def reservations(self, budget: str) -> list[Any]:
        """Return the stored reservations of a budget."""

    def keys(self, budget: str) -> list[Any]:
        """Return the stored idempotency keys of a budget."""

    def spent(self, budget: str) -> list[Spent]:
        """Return what the entries of a budget charged at once, added up by the database."""

    def read_digest(self, budget: str, seq: int) -> bytes | None:
        """Return the digest of an entry, or None."""

    def checkpoints(self) -> list[CheckpointRow]:
        """Return the signed checkpoints that were made, in order."""

    def strays(self) -> list[str]:
        """Return the names under which rows are stored that no budget has."""


class SqlSnapshot:
    """A read transaction of a SQL database."""

    def __init__(
        self,
        ledger: str,
        connection: Connection,
        statements: Statements,
        seen: dict[str, tuple[int, bytes]],
    ) -> None:
        self.ledger, self.seen = ledger, seen
        self._connection, self._statements = connection, statements

    def budgets(self) -> list[str]:
        """Return the names of all budgets, sorted; also of those seen that are missing."""
        return sorted({*self._stored_budgets(), *self.seen}, key=str)

    def row(self, budget: str) -> BudgetRow:
        """Return the stored row of a budget.

        Raises:
            UnknownBudget: If there is none.
            LedgerCorrupt: If it went back since it was last seen.
        """
        found = self._connection.execute(select(BUDGET).where(BUDGET.c.name == budget)).first()
        row = None if found is None else BudgetRow(*found)
        check_not_back(budget, row, self.seen, self.read_digest)
        if row is None:
            raise UnknownBudget(budget)
        return row

    def records(self) -> list[bytes]:
        """Return the records of all stored budgets."""
        return list(self._connection.execute(select(BUDGET.c.record)).scalars())

    def entries(self, budget: str) -> Iterator[tuple[Any, bytes, Any]]:
        """Yield (seq, body, digest) of the stored entries of a budget, by ``seq``."""
        query = (
            select(ENTRY.c.seq, ENTRY.c.body, ENTRY.c.digest)
            .where(ENTRY.c.budget == budget)
            .order_by(ENTRY.c.seq)
        )
        rows = self._connection.execution_options(yield_per=2000).execute(query)
        for part in rows.partitions():
            yield from part

    def events(self, budget: str) -> list[Any]:
        """Return the stored events of a budget: rows of digest, encoded, price."""
        return self._all(EVENT, budget)

    def reservations(self, budget: str) -> list[Any]:
        """Return the stored reservations of a budget."""
        return self._all(RESERVATION, budget)

    def keys(self, budget: str) -> list[Any]:
        """Return the stored idempotency keys of a budget."""
        return self._all(KEY, budget)

    def spent(self, budget: str) -> list[Spent]:
        """Return what the entries of a budget charged at once, added up by the database."""
        rows = self._connection.exec_driver_sql(self._statements.spent, (budget, *SPEND_KINDS))
        return [Spent(event, int.from_bytes(uses, "little"), times) for event, uses, times in rows]

    def read_digest(self, budget: str, seq: int) -> bytes | None:
        """Return the digest of an entry, or None."""
        query = select(ENTRY.c.digest).where(ENTRY.c.budget == budget, ENTRY.c.seq == seq)
        return self._connection.execute(query).scalar()

    def checkpoints(self) -> list[CheckpointRow]:
        """Return the signed checkpoints that were made, in order."""
        query = select(CHECKPOINT).order_by(CHECKPOINT.c.number)
        return [CheckpointRow(*row) for row in self._connection.execute(query)]

    def strays(self) -> list[str]:
        """Return the names under which rows are stored that no budget has."""
        known = self._stored_budgets()
        found: set[str] = set()
        for table in (ENTRY, EVENT, RESERVATION, KEY):
            found.update(self._connection.execute(select(table.c.budget).distinct()).scalars())
        return sorted(map(str, found - known))

    def _stored_budgets(self) -> set[str]:
        return set(self._connection.execute(select(BUDGET.c.name)).scalars())

    def _all(self, table: Any, budget: str) -> list[Any]:
        return list(self._connection.execute(select(table).where(table.c.budget == budget)))
