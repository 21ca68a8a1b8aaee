"""Reading: one consistent state of a ledger, for statements and verify."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from sqlalchemy import Connection, select

from accountant.errors import UnknownBudget
from accountant.stores.schema import BUDGET, ENTRY, EVENT, KEY, RESERVATION


class Snapshot:
    """One consistent state of the ledger, to read."""

    def __init__(self, connection: Connection, check_row: Callable[[Any], None]) -> None:
        self._connection, self._check_row = connection, check_row

    def budgets(self) -> list[str]:
        """Return the names of all budgets, sorted."""
        return list(self._connection.execute(select(BUDGET.c.name).order_by("name")).scalars())

    def row(self, budget: str) -> Any:
        """Return the stored row of a budget.

        Raises:
            UnknownBudget: If there is none.
            LedgerCorrupt: If it went back since this process last saw it.
        """
        row = self._connection.execute(select(BUDGET).where(BUDGET.c.name == budget)).first()
        if row is None:
            raise UnknownBudget(budget)
        self._check_row(row)
        return row

    def entries(self, budget: str) -> Iterator[Any]:
        """Yield the stored entries of a budget by ``seq``: rows of seq, body, digest."""
        query = (
            select(ENTRY.c.seq, ENTRY.c.body, ENTRY.c.digest)
            .where(ENTRY.c.budget == budget)
            .order_by(ENTRY.c.seq)
        )
        yield from self._connection.execution_options(yield_per=1000).execute(query)

    def events(self, budget: str) -> list[Any]:
        """Return the stored events of a budget: rows of digest, encoded, price."""
        return self._all(EVENT, budget)

    def reservations(self, budget: str) -> list[Any]:
        """Return the stored reservations of a budget."""
        return self._all(RESERVATION, budget)

    def keys(self, budget: str) -> list[Any]:
        """Return the stored idempotency keys of a budget."""
        return self._all(KEY, budget)

    def strays(self) -> list[str]:
        """Return the names under which rows are stored that no budget has."""
        known = set(self.budgets())
        found: set[str] = set()
        for table in (ENTRY, EVENT, RESERVATION, KEY):
            found.update(self._connection.execute(select(table.c.budget).distinct()).scalars())
        return sorted(found - known)

    def _all(self, table: Any, budget: str) -> list[Any]:
        return list(self._connection.execute(select(table).where(table.c.budget == budget)))
