"""Reading: what a ledger says, without spending anything."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from accountant.anchors import Checkpoint, history, since
from accountant.budgets import Budget, of_type
from accountant.errors import AnchorInvalid, InvalidRequest, LedgerUnavailable
from accountant.notes import VerifierKey
from accountant.statements import Statement, read_statement
from accountant.stores import Store, open_store
from accountant.stores.rows import unpack_lanes
from accountant.stores.sqlite import SqliteStore
from accountant.verify import Verification, verify
from dp import (
    Event,
    Gaussian,
    PoissonSampled,
    Price,
    after,
    frontier,
    smallest_noise,
    uses_that_fit,
)


class Reader:
    """The part of an :class:`Accountant` that only reads."""

    def __init__(self, store: Store) -> None:
        self._store = store

    @classmethod
    def open(cls, location: str | Path, *, create: bool = True) -> Self:
        """Open a ledger.

        Args:
            location: A path, or a URL: ``sqlite:///``, ``postgresql+psycopg://`` or, for a ledger
                that ends with its process, ``memory:``.
            create: Whether a missing file, or an empty database, becomes an empty ledger.

        Raises:
            LedgerUnavailable: If it cannot be opened, or is some other program's database.
            LedgerCorrupt: If it is not a database.
            SchemaMismatch: If another schema version wrote it.
        """
        return cls(open_store(location, create=create))

    @property
    def ledger(self) -> str:
        """Identity of the ledger, 32 hexadecimal digits."""
        return self._store.ledger

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

    def backup(self, to: str | Path) -> None:
        """Copy the ledger as it is now to a new file; writers go on meanwhile.

        A backup is an older copy from its next charge on: it may only replace a lost ledger, as
        docs/recovery.md describes. Never copy the file itself: its log would be missing.

        Raises:
            LedgerUnavailable: If the file exists or cannot be written, or this is no SQLite
                ledger (use ``pg_dump``).
        """
        if not isinstance(self._store, SqliteStore):
            raise LedgerUnavailable("only SQLite ledgers are copied; use pg_dump for PostgreSQL")
        self._store.check_process()
        self._store.backup(Path(to))

    def verify(
        self,
        anchors: Iterable[Sequence[str]] = (),
        *,
        key: VerifierKey | None = None,
        vouched: Collection[VerifierKey] = (),
    ) -> Verification:
        """Replay the whole ledger and compare it with itself, and with what is known elsewhere.

        If it is clean, this machine remembers where each budget ended.

        Args:
            anchors: For each place that they were published to, signed checkpoints, oldest first.
            key: A verifier key that is trusted; checkpoints from before it was valid are left
                out. With it the checkpoints that the ledger keeps of itself are compared, too.
            vouched: Keys that somebody you trust gave you because an older one was lost.

        Raises:
            AnchorInvalid: If a checkpoint is not signed by a key that was valid then.
        """
        places = tuple(anchors)
        for notes in places:
            of_type(list | tuple, anchors=notes)
        if places and key is None:
            raise InvalidRequest(
                "anchors prove nothing without the verifier key they are signed by"
            )
        with self._store.snapshot() as snapshot:
            anchored: list[Checkpoint] = []
            own: tuple[Checkpoint, ...] = ()
            if key is not None:
                for notes in places:
                    valid = since(notes, key)
                    if not valid:
                        raise AnchorInvalid("anchors", f"none is signed by {key.name}+{key.hash}")
                    anchored += history(valid, key, vouched=vouched)[0]
                stored = since(
                    [note for _, note in snapshot.checkpoints() if isinstance(note, str)], key
                )
                own, _ = history(stored, key, vouched=vouched, shared=True)
            found = verify(snapshot, anchored, own)
        if found.clean:
            heads = ((each.budget, each.entries, each.head) for each in found.budgets)
            self._store.saw({name: (seq, bytes.fromhex(head)) for name, seq, head in heads})
        return found

    def close(self) -> None:
        """Close the ledger."""
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
