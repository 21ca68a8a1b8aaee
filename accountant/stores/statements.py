"""The statements of the write path, made once for a driver's placeholder."""

from __future__ import annotations

from typing import Any

from accountant.entries import EVENT_AT, KIND_AT, SPENDS, USES_AT
from accountant.stores.rows import (
    BudgetRow,
    CheckpointRow,
    EntryRow,
    EventRow,
    KeyRow,
    ReservationRow,
)
from accountant.stores.schema import METADATA

TABLES: dict[Any, str] = {
    BudgetRow: "epsledger_budget",
    EventRow: "epsledger_event",
    EntryRow: "epsledger_entry",
    ReservationRow: "epsledger_reservation",
    KeyRow: "epsledger_key",
    CheckpointRow: "epsledger_checkpoint",
}
MUTABLE: dict[Any, tuple[str, ...]] = {
    BudgetRow: ("seq", "head", "time", "totals", "pending", "closed"),
    ReservationRow: ("holder", "marked", "open"),
    KeyRow: ("answer",),
}
"""What may change of a row; all else of the ledger is only ever added."""
SPEND_KINDS = tuple(bytes([kind]) for kind in sorted(SPENDS))


class Statements:
    """SQL text; ``mark`` stands for a value, ``lock`` ends the statement that locks budgets."""

    def __init__(self, mark: str, lock: str = "") -> None:
        self._mark, self._lock = mark, lock
        self.records = "SELECT record FROM epsledger_budget ORDER BY name"
        self.by_key = {row: self._by_key(row) for row in (EventRow, ReservationRow, KeyRow)}
        self.digest = f"SELECT digest FROM epsledger_entry WHERE budget = {mark} AND seq = {mark}"  # noqa: S608
        self.open_reservations = (
            f"SELECT seq FROM epsledger_reservation WHERE budget = {mark} AND open AND NOT lease"  # noqa: S608
            " ORDER BY seq"
        )
        self.checkpoints = "SELECT count(*) FROM epsledger_checkpoint"
        # What was spent, added up by the database: the replay of the chain has no part in it.
        kinds = ", ".join([mark] * len(SPEND_KINDS))
        self.spent = (
            f"SELECT substr(body, {EVENT_AT + 1}, 32), substr(body, {USES_AT + 1}, 8), count(*)"  # noqa: S608
            f" FROM epsledger_entry WHERE budget = {mark}"
            f" AND substr(body, {KIND_AT + 1}, 1) IN ({kinds}) GROUP BY 1, 2"
        )
        self.held = (
            "SELECT event, CASE WHEN open THEN uses ELSE marked END, count(*)"  # noqa: S608
            f" FROM epsledger_reservation WHERE budget = {mark} GROUP BY 1, 2"
        )
        self.inserts = {row: self._insert(row) for row in TABLES}
        self.updates = {row: self._update(row) for row in MUTABLE}

    def budgets(self, names: int) -> str:
        """Return the statement that reads, and locks, this many budgets."""
        columns, marks = ", ".join(BudgetRow._fields), ", ".join([self._mark] * names)
        return (
            f"SELECT {columns} FROM epsledger_budget WHERE name IN ({marks})"  # noqa: S608
            f" ORDER BY name{self._lock}"
        )

    def _by_key(self, row: Any) -> str:
        keys = " AND ".join(f"{key} = {self._mark}" for key in _key(row))
        return f"SELECT {', '.join(row._fields)} FROM {TABLES[row]} WHERE {keys}"  # noqa: S608

    def _insert(self, row: Any) -> str:
        columns, marks = ", ".join(row._fields), ", ".join([self._mark] * len(row._fields))
        return f"INSERT INTO {TABLES[row]} ({columns}) VALUES ({marks})"  # noqa: S608

    def _update(self, row: Any) -> str:
        """Return an UPDATE of a row by its key and, for a budget, the ``seq`` before.

        It sets nothing else than what may change: a key that is set anew costs an index page.
        """
        sets = ", ".join(f"{name} = {self._mark}" for name in MUTABLE[row])
        last = ["seq"] if row is BudgetRow else []
        where = " AND ".join(f"{name} = {self._mark}" for name in (*_key(row), *last))
        return f"UPDATE {TABLES[row]} SET {sets} WHERE {where}"  # noqa: S608


def bound(new: Any, before: Any) -> tuple[Any, ...]:
    """Return the values of the UPDATE that puts a row in place of the one before."""
    last = (before.seq,) if isinstance(before, BudgetRow) else ()
    key = new[: _KEY_LENGTHS[type(new)]]
    return (*(getattr(new, name) for name in MUTABLE[type(new)]), *key, *last)


def _key(row: Any) -> list[str]:
    return [column.name for column in METADATA.tables[TABLES[row]].primary_key]


_KEY_LENGTHS = {row: len(_key(row)) for row in TABLES}
