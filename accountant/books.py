"""Books: the running state of budgets, and the view of it that a store gives the rules.

A :class:`Transaction` shows objects that are the state itself: what the rules change in them,
the store writes back before it commits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from accountant.budgets import Budget
from accountant.entries import GENESIS, Entry, Kind, chain, pack
from accountant.requests import Receipt, Uses
from dp import Event, Price


@dataclass(slots=True)
class Hold:
    """A reservation as the ledger sees it.

    Attributes:
        seq: Position of the entry that made it.
        event: Digest of one use.
        uses: How many were put aside.
        holder: Secret of who may mark and end it.
        charged: What it added to the lanes.
        marked: How many uses were taken.
        open: Whether it has not ended.
        lease: Whether it is marked in its holder's memory.
    """

    seq: int
    event: bytes
    uses: int
    holder: str
    charged: Price
    marked: int = 0
    open: bool = True
    lease: bool = False


@dataclass(slots=True)
class Keyed:
    """A charge that was made under an idempotency key."""

    key: str
    payload: bytes
    seq: int
    digest: bytes
    answer: bytes | None = None


@dataclass(slots=True)
class Book:
    """The running state of one budget: what the fold of its entries comes to.

    Attributes:
        budget: The promise.
        seq: Position of the last entry; 0 before the first.
        head: Digest of the last entry.
        time: Label of the last entry.
        totals: Sum in each lane.
        pending: Refusals not yet written: [times, first, last] by (event, uses, activity).
        appended: Entries of this transaction, with their digests.
        closed: Whether it admits nothing any more.
        before: Sum in each lane when the transaction began; empty for a new budget.
    """

    budget: Budget
    seq: int = 0
    head: bytes = GENESIS
    time: int = 0
    totals: Price = ()
    pending: dict[str, list[int]] = field(default_factory=dict)
    appended: list[tuple[Entry, bytes, bytes]] = field(default_factory=list)
    closed: bool = False
    before: Price = ()

    def append(self, kind: Kind, now: int, **members: Any) -> Receipt:
        """Chain one more entry; write pending refusals first, except before another refusal."""
        if self.pending and kind is not Kind.REFUSE:
            pending, self.pending = self.pending, {}
            for key, (times, first, last) in pending.items():
                if times:
                    event, uses, activity = key.split(":", 2)
                    self.append(
                        Kind.REFUSE,
                        last,
                        event=bytes.fromhex(event),
                        uses=int(uses),
                        activity=activity,
                        times=times,
                        first=first,
                    )
        self.time = max(now, self.time)
        members.setdefault("first", self.time)
        entry = Entry(kind, self.seq + 1, self.time, **members)
        body = pack(entry)
        self.seq, self.head = entry.seq, chain(self.head, body)
        self.appended.append((entry, body, self.head))
        return Receipt(self.budget.name, self.seq, self.head.hex(), uses=entry.uses)

    def settled(self, hold: Hold, price: Price) -> Price:
        """Return the totals with a reservation's contribution recomputed from its marks."""
        kept = self.budget.filter.part(hold.charged, price, hold.marked)
        return tuple(
            total - held + left
            for total, held, left in zip(self.totals, hold.charged, kept, strict=True)
        )


class Transaction(Protocol):
    """What a store shows the rules while it holds the write lock.

    The objects that it returns are the state itself: what the rules change in them, the store
    writes back before it commits.
    """

    def find_book(self, budget: str) -> Book | None:
        """Return the book of a budget, or None."""

    def book(self, budget: str) -> Book:
        """Return the book of a budget, or raise UnknownBudget."""

    def add_book(self, book: Book) -> None:
        """Add a new budget's book."""

    def budgets(self) -> list[Budget]:
        """Return all budgets; the request must have locked the whole ledger."""

    def spent(self, book: Book) -> Uses:
        """Return what was charged to a budget, or raise if a reservation is open."""

    def add_checkpoint(self, note: str) -> int:
        """Add a signed checkpoint and return its number."""

    def price(self, book: Book, event: Event) -> tuple[bytes, Price]:
        """Return digest and price of an event; the price is frozen when it is first stored."""

    def frozen_price(self, book: Book, event: bytes) -> Price:
        """Return the price of a stored event by its digest."""

    def keep_event(self, book: Book, event: bytes) -> None:
        """Store the event of that digest, just priced, if it is not stored yet."""

    def hold(self, budget: str, reservation: int) -> Hold | None:
        """Return a reservation, or None."""

    def add_hold(self, budget: str, hold: Hold) -> None:
        """Add a new reservation."""

    def keyed(self, budget: str, key: str) -> Keyed | None:
        """Return the charge that was made under a key, or None."""

    def add_keyed(self, budget: str, keyed: Keyed) -> None:
        """Add a charge under a key."""
