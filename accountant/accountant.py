"""The accountant: who may spend what, and the record of it."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path

from accountant.anchors import (
    Checkpoint,
    Head,
    check_continues,
    is_command,
    publish,
    read_notes,
    sign,
    successor,
)
from accountant.budgets import Budget
from accountant.errors import AccountantError, AnchorInvalid, InvalidRequest, ReleaseUnknown
from accountant.ledger import Outcome
from accountant.notes import Signer
from accountant.reader import Reader
from accountant.requests import (
    Adopt,
    Anchor,
    Answer,
    Borrow,
    Charge,
    Close,
    Correct,
    Holds,
    Open,
    Receipt,
    Request,
    Reserve,
    Unprotected,
    Void,
)
from accountant.reservations import Lease, Reservation, holds_of
from accountant.stores import Store
from accountant.writer import Writer, answer
from dp import DPError, Event, Filter, NeighboringRelation

_ADD_REMOVE = NeighboringRelation.ADD_REMOVE
_WAIT_SECONDS = 5.0
"""How long a request with a key waits for the answer of an earlier one with that key."""
_BLOCK = 4096
"""Most uses that a lease puts aside at once."""
Budgets = str | Sequence[str]
"""One budget, or several that are charged together, all or none: the dataset's, its quotas, and
the budgets of other datasets that the same operation touches."""


class Accountant(Reader):
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

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self._writer = Writer(store)

    def create_budget(
        self,
        name: str,
        filter: Filter,
        *,
        unit: str,
        units: int | None = None,
        dataset: str | None = None,
        lineage: Sequence[str] = (),
        supersedes: str | None = None,
        imported: Iterable[tuple[Event, int]] = (),
    ) -> Budget:
        """Create a budget. It never changes.

        Args:
            name: Of the budget.
            filter: Its limits, from :func:`dp.pure`, :func:`dp.adaptive` or :func:`dp.planned`.
            unit: The privacy unit, for instance ``article``.
            units: Number of privacy units where it is public; delta must be below 1/units.
            dataset: Fingerprint of the dataset, for instance from :func:`accountant.fingerprint`.
            lineage: Fingerprints of datasets that it was made from, or shares units with.
            supersedes: The budget that this one replaces: it is closed, and all that was spent
                there is charged here first. The guarantee of the new one holds if the change
                was decided without looking at what had been released; the old one's holds anyway.
            imported: What was spent before there was a ledger: events with their uses.

        Raises:
            BudgetExists: If the name is taken.
            DatasetCovered: If another budget is about the same dataset.
            BudgetExceeded: If what is carried over or imported does not fit; nothing is created.
            InvalidRequest: If something cannot be recorded, or the superseded budget has open
                reservations.
        """
        budget = Budget(name, unit, filter, units, dataset, tuple(lineage), supersedes)
        self._writer.submit(Open(budget, tuple(imported)))
        return budget

    def create_quota(self, name: str, filter: Filter, *, of: str) -> Budget:
        """Create a quota: a share of a budget for a team, a tenant or an application.

        It is charged together with the budget, ``charge((budget, quota), ...)``. It is a limit
        for management and no guarantee: two teams' answers together reveal what both spent.

        Args:
            name: Of the quota.
            filter: Its limits.
            of: Name of the dataset's budget.

        Raises:
            AccountantError: As for :meth:`create_budget`.
        """
        owner = self.budget(of)
        budget = Budget(name, owner.unit, filter, quota_of=of)
        self._writer.submit(Open(budget))
        return budget

    def close_budget(self, name: str, *, note: str = "") -> Receipt:
        """Admit nothing under a budget any more, open reservations included. It stays closed.

        Raises:
            BudgetClosed: If it is closed.
            UnknownBudget: If there is none of that name.
        """
        return self._writer.submit(Close(name, note))

    def charge(
        self,
        budget: Budgets,
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
            budget: Name of the budget, or of several that are charged together, all or none.
            event: One use of what will run.
            unit: The privacy unit that the event's sensitivity is about.
            activity: What it is for, for instance ``retrieval/vote``.
            uses: How many uses, each with fresh randomness.
            relation: The neighboring relation that the sensitivity is about.
            note: Free text for the ledger; it is public to whoever reads the ledger.
            key: Idempotency key. The same key with the same request returns the stored answer
                in ``Receipt.answer``, and then nothing may be drawn again. While another request
                with the key is at work, its answer is waited for.
            payload: Everything the answer depends on besides the event, if ``key`` is given.

        Raises:
            BudgetExceeded: If it does not fit; the refusal is in the ledger.
            BudgetClosed: If the budget was closed.
            UnknownBudget: If there is no such budget.
            UnitMismatch: If unit or relation are not the budget's.
            KeyReused: If the key belongs to another request.
            ReleaseUnknown: If the key was charged but its answer was not stored in time.
            UnsupportedEvent: If the event has no proved price.
            LedgerUnavailable: If nothing could be written; nothing was charged.
            OutcomeUnknown: If the commit failed; count it as spent.
        """
        ask = Charge(_names(budget), event, uses, unit, relation, activity, note, key, payload)
        patience = time.monotonic() + _WAIT_SECONDS
        while True:
            try:
                return self._writer.submit(ask)
            except ReleaseUnknown:
                if time.monotonic() > patience:
                    raise
                time.sleep(0.02)

    async def acharge(
        self,
        budget: Budgets,
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
        """Spend at once, as :meth:`charge` does, without blocking the event loop.

        A task that is cancelled before its turn spends nothing; afterwards its charge stays.
        """
        ask = Charge(_names(budget), event, uses, unit, relation, activity, note, key, payload)
        patience = time.monotonic() + _WAIT_SECONDS
        while True:
            try:
                return await self._asubmit(ask)
            except ReleaseUnknown:
                if time.monotonic() > patience:
                    raise
                await asyncio.sleep(0.02)

    def keep_answer(self, budget: Budgets, key: str, answer: bytes) -> None:
        """Store the released answer of a charge with a key, for a retry to get back."""
        self._writer.submit(Answer(_names(budget)[0], key, answer))

    def correct(
        self,
        budget: Budgets,
        event: Event,
        *,
        unit: str,
        activity: str,
        uses: int = 1,
        relation: NeighboringRelation = _ADD_REMOVE,
        note: str = "",
    ) -> Receipt:
        """Record a spend that was missed. It is recorded even where it does not fit.

        ``verify`` then says that the guarantee does not hold. Nothing lowers a spend.

        Raises:
            InvalidRequest: If a budget was superseded, and the one that carries its spend is not
                named as well.
            AccountantError: As for :meth:`charge`.
        """
        return self._writer.submit(
            Correct(_names(budget), event, uses, unit, relation, activity, note)
        )

    def record_unprotected(
        self, budget: Budgets, *, unit: str, activity: str, note: str
    ) -> Receipt:
        """Record that private data is read without noise; return when it is durable.

        Only then read. It spends nothing, fits whatever is left, and stays in the ledger, in
        statements and in reports. What was read has no guarantee: that of the budget is about
        everybody but the reader, as long as what was read stays with them and decides nothing
        that others see.

        Args:
            budget: As for :meth:`charge`.
            unit: The privacy unit that is read.
            activity: What it is for, for instance ``retrieval/raw``.
            note: The reason; it is public to whoever reads the ledger.

        Raises:
            InvalidRequest: If there is no reason.
            BudgetClosed: If the budget was closed.
            UnknownBudget: If there is no such budget.
            UnitMismatch: If the unit is not the budget's.
            LedgerUnavailable: If nothing could be written.
            OutcomeUnknown: If the commit failed; it may be recorded, so record it again.

        >>> from dp import pure
        >>> with Accountant.open("memory:") as books:
        ...     _ = books.create_budget("news", pure(1.0), unit="article")
        ...     ask = {"unit": "article", "activity": "retrieval/raw", "note": "ticket 7"}
        ...     _ = books.record_unprotected("news", **ask)
        ...     books.statement("news").unprotected, books.statement("news").share
        (1, 0.0)
        """
        return self._writer.submit(Unprotected(_names(budget), unit, activity, note))

    def reserve(
        self,
        budget: Budgets,
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
        ask = Reserve(_names(budget), event, uses, unit, relation, activity, note, holder)
        return self._reservation(self._writer.submit(ask), ask)

    async def areserve(
        self,
        budget: Budgets,
        event: Event,
        *,
        uses: int,
        unit: str,
        activity: str,
        relation: NeighboringRelation = _ADD_REMOVE,
        note: str = "",
    ) -> Reservation:
        """Put uses aside, as :meth:`reserve` does, without blocking the event loop.

        If the task is cancelled, the reservation is voided: nobody could use it.
        """
        holder = secrets.token_hex(16)
        ask = Reserve(_names(budget), event, uses, unit, relation, activity, note, holder)

        def void(outcome: Future[Outcome]) -> None:
            with suppress(AccountantError, DPError):
                self._writer.enqueue(Void(holds_of(answer(outcome.result())), holder))

        return self._reservation(await self._asubmit(ask, on_cancel=void), ask)

    def lease(
        self,
        budget: Budgets,
        event: Event,
        *,
        unit: str,
        activity: str,
        relation: NeighboringRelation = _ADD_REMOVE,
        note: str = "",
        block: int = _BLOCK,
    ) -> Lease:
        """Return uses that are reserved in blocks and marked in memory, for a high rate.

        Args:
            budget: As for :meth:`charge`.
            event: One use.
            unit: The privacy unit that the event's sensitivity is about.
            activity: What it is for.
            relation: The neighboring relation that the sensitivity is about.
            note: Free text for the ledger.
            block: Most uses of a block: what a crash forfeits at worst.
        """
        return Lease(
            self._writer, Borrow(_names(budget), event, block, unit, relation, activity, note)
        )

    def adopt(self, holds: Holds, event: Event) -> Reservation:
        """Take over an open reservation from a process that died, to go on from its marks.

        Whoever held it is shut out: a mark of theirs raises from now on.

        Args:
            holds: ``Reservation.holds`` of the lost handle, all of them.
            event: One use; it must be the one that was reserved.

        Raises:
            ReservationError: If it is not open, of another event, or a lease.
            InvalidRequest: If ``holds`` is no such value.
        """
        holder = secrets.token_hex(16)
        try:
            named = tuple((name, seq) for name, seq in holds)
        except (TypeError, ValueError) as error:
            raise InvalidRequest(f"holds are (budget, seq) pairs, got {holds!r}") from error
        ask = Adopt(named, holder, event)
        receipt, (name, seq) = self._writer.submit(ask), ask.holds[0]
        with self._store.snapshot() as snapshot:
            (row,) = (row for row in snapshot.reservations(name) if row.seq == seq)
        return Reservation(
            self._writer,
            receipt,
            event,
            uses=row.uses,
            holds=ask.holds,
            holder=holder,
            marked=row.marked,
        )

    def _reservation(self, receipt: Receipt, ask: Reserve) -> Reservation:
        return Reservation(
            self._writer,
            receipt,
            ask.event,
            uses=ask.uses,
            holds=holds_of(receipt),
            holder=ask.holder,
        )

    async def _asubmit(
        self,
        request: Request,
        on_cancel: Callable[[Future[Outcome]], None] | None = None,
    ) -> Receipt:
        done = self._writer.enqueue(request)
        try:
            return answer(await asyncio.wrap_future(done))
        except asyncio.CancelledError:
            if on_cancel is not None and not done.cancelled():
                done.add_done_callback(on_cancel)
            raise

    def checkpoint(
        self, *signers: Signer, to: Iterable[str | Path] = (), lines: Sequence[str] = ()
    ) -> str:
        """Sign the last entry of every budget, and publish that as an anchor.

        Args:
            signers: Keys, from :func:`accountant.notes.read_key`.
            to: Files to append to, or ``command:...`` lines that get it on their standard input.
                Choose places that whoever can change the ledger cannot.
            lines: Further lines, as :mod:`accountant.anchors` describes.

        Returns:
            The signed note. It is in the ledger, too.

        Raises:
            AnchorUnavailable: If it could not be published everywhere; do it again.
            AnchorInvalid: If there is no signer, or one whose key was replaced, or a file holds
                anything else than whole notes, or those of another ledger or key.
        """
        with self._store.snapshot() as snapshot:
            rows = [snapshot.row(name) for name in snapshot.budgets()]
            before = [row.note for row in snapshot.checkpoints()]
        heads = tuple(Head(row.name, row.seq, row.head) for row in rows)
        when = f"time {datetime.now(UTC).isoformat(timespec='seconds')}"
        checkpoint = Checkpoint(self._store.ledger, heads, (when, *lines))
        note, places = sign(checkpoint, signers), list(to)
        keys = [signer.verifier_key for signer in signers]
        files = [place for place in places if not is_command(place) and Path(place).exists()]
        series = [read_notes(file) for file in files]
        for key in keys:
            new = successor(chain(before, *series), key)
            if new is not None and f"key {new.to_text()}" not in lines:
                raise AnchorInvalid(f"key {key.name}", f"it was replaced by {new.to_text()}")
        for notes in series:
            check_continues(notes, checkpoint, keys)
        for place in places:
            publish(note, place)
        self._writer.submit(Anchor(note))
        return note

    def close(self) -> None:
        """Finish what is queued and close the ledger."""
        if self._writer.close():
            super().close()


def _names(budget: Budgets) -> tuple[str, ...]:
    return (budget,) if isinstance(budget, str) else tuple(budget)
