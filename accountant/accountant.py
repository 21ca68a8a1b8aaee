"""The accountant: who may spend what, and the record of it."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from accountant.budgets import Budget
from accountant.ledger import Answer, Charge, Open, Receipt, Reserve
from accountant.reservations import Reservation
from accountant.statements import Statement, read_statement
from accountant.stores.schema import unpack_lanes
from accountant.stores.sql import SqlStore
from accountant.verify import Verification, verify
from accountant.writer import Writer
from dp import (
    Event,
    Filter,
    Gaussian,
    NeighboringRelation,
    PoissonSampled,
    Price,
    after,
    frontier,
    smallest_noise,
    uses_that_fit,
)

_ADD_REMOVE = NeighboringRelation.ADD_REMOVE


class Accountant:
    """Charges budgets in one ledger. Safe to share between threads; open one per process.

    What an accountant guarantees: for each budget, the outputs of everything charged to it are
    together (epsilon, delta)-DP for its privacy unit and neighboring relation, however each
    operation was chosen from the outputs before it, as long as each mechanism is what its event
    says. It does not cover what was never charged.

    >>> import tempfile
    >>> from dp import Gaussian, adaptive
    >>> folder = tempfile.TemporaryDirectory()
    >>> accountant = Accountant.open(f"{folder.name}/ledger.db")
    >>> _ = accountant.create_budget("news", adaptive(3.0, 1e-6), unit="article")
    >>> accountant.charge("news", Gaussian(50.0), unit="article", activity="survey").seq
    2
    >>> accountant.uses_that_fit("news", Gaussian(50.0))
    951
    >>> accountant.close(); folder.cleanup()
    """

    def __init__(self, store: SqlStore) -> None:
        self._store = store
        self._writer = Writer(store)

    @classmethod
    def open(cls, location: str | Path) -> Self:
        """Open the ledger in an SQLite file; a missing file becomes an empty ledger.

        Args:
            location: A path or an ``sqlite:///`` URL.

        Raises:
            LedgerUnavailable: If it cannot be opened, or is some other program's database.
            LedgerCorrupt: If it is not a database.
            SchemaMismatch: If another schema version wrote it.
        """
        return cls(SqlStore(location))

    def create_budget(
        self, name: str, filter: Filter, *, unit: str, units: int | None = None
    ) -> Budget:
        """Create a budget. It never changes.

        Args:
            name: Of the budget.
            filter: Its limits, from :func:`dp.pure`, :func:`dp.adaptive` or :func:`dp.planned`.
            unit: The privacy unit, for instance ``article``.
            units: Number of privacy units where it is public; delta must be below 1/units.

        Raises:
            BudgetExists: If the name is taken.
            InvalidRequest: If name or unit cannot be recorded.
        """
        budget = Budget(name, unit, filter, units)
        self._writer.submit(Open(budget))
        return budget

    def charge(
        self,
        budget: str,
        event: Event,
        *,
        unit: str,
        activity: str,
        uses: int = 1,
        relation: NeighboringRelation = _ADD_REMOVE,
        note: str = "",
        key: str | None = None,
        payload: bytes = b"",
    ) -> Receipt:
        """Spend at once; return when it is durable. Only then touch private data.

        Args:
            budget: Name of the budget.
            event: One use of what will run.
            unit: The privacy unit that the event's sensitivity is about.
            activity: What it is for, for instance ``retrieval/vote``.
            uses: How many uses, each with fresh randomness.
            relation: The neighboring relation that the sensitivity is about.
            note: Free text for the ledger; it is public to whoever reads the ledger.
            key: Idempotency key. The same key with the same request returns the stored answer
                in ``Receipt.answer``, and then nothing may be drawn again.
            payload: Everything the answer depends on besides the event, if ``key`` is given.

        Raises:
            BudgetExceeded: If it does not fit; the refusal is in the ledger.
            UnknownBudget: If there is no such budget.
            UnitMismatch: If unit or relation are not the budget's.
            KeyReused: If the key belongs to another request.
            ReleaseUnknown: If the key was charged but its answer was never stored.
            UnsupportedEvent: If the event has no proved price.
            LedgerUnavailable: If nothing could be written; nothing was charged.
            OutcomeUnknown: If the commit failed; count it as spent.
        """
        return self._writer.submit(
            Charge(budget, event, uses, unit, relation, activity, note, key, payload)
        )

    def keep_answer(self, budget: str, key: str, answer: bytes) -> None:
        """Store the released answer of a charge with a key, for a retry to get back."""
        self._writer.submit(Answer(budget, key, answer))

    def reserve(
        self,
        budget: str,
        event: Event,
        *,
        uses: int,
        unit: str,
        activity: str,
        relation: NeighboringRelation = _ADD_REMOVE,
        note: str = "",
    ) -> Reservation:
        """Put uses aside for a long run; each is marked before it touches data.

        An open reservation counts in full.

        Raises:
            BudgetExceeded: If not all of them fit; ``remaining`` says how many would.
            AccountantError: As for :meth:`charge`.
        """
        holder = secrets.token_hex(16)
        receipt = self._writer.submit(
            Reserve(budget, event, uses, unit, relation, activity, note, holder)
        )
        return Reservation(self._writer, receipt, event, uses, holder)

    def budgets(self) -> list[str]:
        """Return the names of all budgets, sorted."""
        with self._store.snapshot() as snapshot:
            return snapshot.budgets()

    def budget(self, name: str) -> Budget:
        """Return a budget."""
        return self._now(name)[0]

    def statement(self, name: str) -> Statement:
        """Return what a budget looks like now."""
        with self._store.snapshot() as snapshot:
            return read_statement(snapshot, name)

    def uses_that_fit(self, name: str, event: Event) -> int:
        """Return how many uses of the event would fit now; spends nothing."""
        budget, totals = self._now(name)
        return uses_that_fit(budget.filter, totals, event)

    def smallest_noise(
        self, name: str, with_noise: Callable[[float], Event], *, uses: int
    ) -> float:
        """Return the smallest noise multiplier with which ``uses`` uses would fit now.

        Args:
            name: Of the budget.
            with_noise: Builds one use from a noise multiplier.
            uses: How many uses must fit.

        Raises:
            NothingFits: If no noise is enough.
        """
        budget, totals = self._now(name)
        return smallest_noise(budget.filter, totals, with_noise, uses=uses)

    def steps_that_fit(
        self, name: str, *, sampling_probability: float, noise_multiplier: float
    ) -> int:
        """Return how many DP-SGD steps with Poisson samples would fit now; spends nothing."""
        return self.uses_that_fit(
            name, PoissonSampled(sampling_probability, Gaussian(noise_multiplier))
        )

    def frontier(
        self, name: str, with_noise: Callable[[float], Event], noise_multipliers: Sequence[float]
    ) -> tuple[tuple[float, int], ...]:
        """Return (noise multiplier, uses that would fit now) for each noise multiplier."""
        budget, totals = self._now(name)
        return frontier(budget.filter, totals, with_noise, noise_multipliers)

    def share_after(self, name: str, events: Iterable[tuple[Event, int]]) -> float | None:
        """Return the used share of the limits after the events, in this order; spends nothing.

        Args:
            name: Of the budget.
            events: Each with its number of uses.

        Returns:
            The share, from 0 to 1, or None if one of the events would be refused.
        """
        budget, totals = self._now(name)
        reached = after(budget.filter, totals, events)
        return None if reached is None else budget.filter.share(reached)

    def verify(self) -> Verification:
        """Replay the whole ledger and compare it with itself."""
        with self._store.snapshot() as snapshot:
            return verify(snapshot)

    def close(self) -> None:
        """Finish what is queued and close the ledger."""
        self._writer.close()
        self._store.close()

    def _now(self, name: str) -> tuple[Budget, Price]:
        with self._store.snapshot() as snapshot:
            row = snapshot.row(name)
        return Budget.from_json(row.record), unpack_lanes(row.totals)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
