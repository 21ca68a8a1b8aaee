"""The rules of the ledger: every check, no I/O.

:func:`decide` takes one request inside one write transaction, checks it against the state that
the transaction shows, and appends what happened. The store behind the transaction makes it
durable; only after that may a caller learn the outcome. The rules:

1. An event is admitted on the lanes that include it, or refused; a refusal is recorded too.
2. An open reservation counts in full. A mark takes one of its uses and never exceeds them.
3. Settling recomputes a reservation's contribution from its marks; voiding needs no marks.
4. Only the holder marks, settles or voids.
5. A key with the same request gets the stored answer back, never a second charge and never a
   second draw of noise; with another request it is an error.
6. Refusals equal to a recorded one are counted in the budget's row and written as one entry
   when the next entry of another kind is appended, so that a storm of them stays small.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from accountant.budgets import Budget, label, of_type
from accountant.entries import GENESIS, NO_EVENT, Entry, Kind, chain, pack
from accountant.errors import (
    BudgetExceeded,
    BudgetExists,
    InvalidRequest,
    KeyReused,
    ReleaseUnknown,
    ReservationError,
    UnitMismatch,
)
from dp import Event, Filter, NeighboringRelation, Price, validate
from dp.accountings import limits_hold
from dp.codec import digest

MAX_TALLIES = 64
"""Distinct refusals counted apart between two other entries; the rest share one count."""
_OTHER = f"{NO_EVENT.hex()}:0:other"


@dataclass(frozen=True, slots=True)
class Open:
    """Ask for a new budget."""

    budget: Budget

    def __post_init__(self) -> None:
        limits = self.budget.filter
        if Filter.from_record(limits.to_record()) != limits or not limits_hold(limits):
            raise InvalidRequest(
                f"budget {self.budget.name!r}: its limits are not those of its epsilon and delta;"
                " make the filter with dp.pure, dp.adaptive or dp.planned"
            )


@dataclass(frozen=True, slots=True)
class Ask:
    """Ask to run an event: the common part of a charge and a reservation."""

    budget: str
    event: Event
    uses: int
    unit: str
    relation: NeighboringRelation
    activity: str
    note: str = ""

    def __post_init__(self) -> None:
        label(budget=self.budget)
        of_type(Event, event=self.event)
        validate.count(uses=self.uses)
        label(unit=self.unit)
        of_type(NeighboringRelation, relation=self.relation)
        label(activity=self.activity)
        if self.note != "":
            label(note=self.note)


@dataclass(frozen=True, slots=True)
class Charge(Ask):
    """Ask to spend at once. ``payload`` is a digest of everything that the answer depends on."""

    key: str | None = None
    payload: bytes = b""

    def __post_init__(self) -> None:
        Ask.__post_init__(self)
        of_type(bytes, payload=self.payload)
        if self.key is not None:
            label(key=self.key)


@dataclass(frozen=True, slots=True)
class Reserve(Ask):
    """Ask to put uses aside for ``holder``."""

    holder: str = ""


@dataclass(frozen=True, slots=True)
class Mark:
    """Take ``uses`` uses of a reservation; durable before they touch data."""

    budget: str
    reservation: int
    holder: str
    uses: int = 1

    def __post_init__(self) -> None:
        validate.count(uses=self.uses)


@dataclass(frozen=True, slots=True)
class Settle:
    """Return the uses of a reservation that were never marked, and end it."""

    budget: str
    reservation: int
    holder: str


@dataclass(frozen=True, slots=True)
class Void:
    """End a reservation before its first mark."""

    budget: str
    reservation: int
    holder: str


@dataclass(frozen=True, slots=True)
class Answer:
    """Keep the released answer of a charge with a key, to be returned on a retry."""

    budget: str
    key: str
    answer: bytes

    def __post_init__(self) -> None:
        label(key=self.key)
        of_type(bytes, answer=self.answer)


Request = Open | Charge | Reserve | Mark | Settle | Void | Answer


@dataclass(frozen=True, slots=True)
class Receipt:
    """Proof that something is in the ledger.

    Attributes:
        budget: Name of the budget.
        seq: Position of the entry in the budget's chain.
        digest: Digest of the entry, 32 bytes in hexadecimal.
        answer: The stored answer where this is the replay of a key, else None.
    """

    budget: str
    seq: int
    digest: str
    answer: bytes | None = None


@dataclass(slots=True)
class Hold:
    """A reservation as the ledger sees it; ``charged`` is what it added to the lanes."""

    seq: int
    event: bytes
    uses: int
    holder: str
    charged: Price
    marked: int = 0
    open: bool = True


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
    """

    budget: Budget
    seq: int = 0
    head: bytes = GENESIS
    time: int = 0
    totals: Price = ()
    pending: dict[str, list[int]] = field(default_factory=dict)
    appended: list[tuple[Entry, bytes, bytes]] = field(default_factory=list)

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
        return Receipt(self.budget.name, self.seq, self.head.hex())

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


Outcome = Receipt | BudgetExceeded


def decide(tx: Transaction, request: Request, now: int) -> Outcome:
    """Carry out one request inside a write transaction.

    Args:
        tx: The transaction.
        request: What is asked.
        now: Microseconds since 1970, to label entries with.

    Returns:
        A receipt; or the refusal, to be raised once its entry is durable.

    Raises:
        AccountantError: If the request is refused for another reason than the budget; then
            nothing was changed.
        DPError: If the event cannot be priced; then nothing was changed.
    """
    match request:
        case Open(budget):
            return _open(tx, budget, now)
        case Charge():
            return _charge(tx, request, now)
        case Reserve():
            return _reserve(tx, request, now)
        case Mark(name, seq, holder, uses):
            book, hold = _held(tx, name, seq, holder)
            if hold.marked + uses > hold.uses:
                raise ReservationError(
                    f"reservation {seq} of budget {name!r} has {hold.uses - hold.marked}"
                    f" of {hold.uses} uses left, {uses} asked"
                )
            hold.marked += uses
            return book.append(Kind.MARK, now, event=hold.event, uses=uses, reservation=seq)
        case Settle(name, seq, holder):
            book, hold = _held(tx, name, seq, holder)
            return _end(tx, book, hold, Kind.SETTLE, now)
        case Void(name, seq, holder):
            book, hold = _held(tx, name, seq, holder)
            if hold.marked:
                raise ReservationError(
                    f"reservation {seq} of budget {name!r} has {hold.marked} marked uses;"
                    " settle it instead"
                )
            return _end(tx, book, hold, Kind.VOID, now)
        case Answer(name, key, answer):
            keyed = tx.keyed(name, key)
            if keyed is None or keyed.answer is not None:
                raise InvalidRequest(f"no charge waits for an answer under key {key!r}")
            keyed.answer = answer
            return Receipt(name, keyed.seq, keyed.digest.hex(), answer)


def _open(tx: Transaction, budget: Budget, now: int) -> Receipt:
    if tx.find_book(budget.name) is not None:
        raise BudgetExists(budget.name)
    book = Book(budget, totals=(0,) * len(budget.filter.limits))
    tx.add_book(book)
    return book.append(Kind.OPEN, now, event=digest(budget.to_json()))


def _charge(tx: Transaction, ask: Charge, now: int) -> Outcome:
    book = _checked(tx, ask)
    event, price = tx.price(book, ask.event)
    parts = (event, ask.uses.to_bytes(8, "little"), ask.activity.encode(), ask.payload)
    payload = digest(b"".join(map(digest, parts)))
    if ask.key is not None and (keyed := tx.keyed(ask.budget, ask.key)) is not None:
        if keyed.payload != payload:
            raise KeyReused(ask.key)
        if keyed.answer is None:
            raise ReleaseUnknown(ask.key)
        return Receipt(ask.budget, keyed.seq, keyed.digest.hex(), keyed.answer)
    outcome = _admit(tx, book, ask, Kind.CHARGE, event, price, now)
    if ask.key is not None and isinstance(outcome, Receipt):
        keyed = Keyed(ask.key, payload, outcome.seq, bytes.fromhex(outcome.digest))
        tx.add_keyed(ask.budget, keyed)
    return outcome


def _reserve(tx: Transaction, ask: Reserve, now: int) -> Outcome:
    book = _checked(tx, ask)
    event, price = tx.price(book, ask.event)
    charged = book.budget.filter.charge(book.totals, price, ask.uses)
    outcome = _admit(tx, book, ask, Kind.RESERVE, event, price, now)
    if isinstance(outcome, Receipt):
        tx.add_hold(ask.budget, Hold(outcome.seq, event, ask.uses, ask.holder, charged))
    return outcome


def _admit(
    tx: Transaction, book: Book, ask: Ask, kind: Kind, event: bytes, price: Price, now: int
) -> Outcome:
    limits = book.budget.filter
    totals = limits.after(book.totals, price, ask.uses)
    if not limits.admits(totals):
        _refuse(tx, book, ask, event, now)
        return BudgetExceeded(
            ask.budget,
            ask.event,
            ask.uses,
            limits.uses_that_fit(book.totals, price),
            limits.advice(price),
        )
    tx.keep_event(book, event)
    book.totals = totals
    return book.append(kind, now, event=event, uses=ask.uses, activity=ask.activity, note=ask.note)


def _refuse(tx: Transaction, book: Book, ask: Ask, event: bytes, now: int) -> None:
    key = f"{event.hex()}:{ask.uses}:{ask.activity}"
    if key not in book.pending and len(book.pending) >= MAX_TALLIES:
        key = _OTHER
    if key in book.pending:
        tally = book.pending[key]
        tally[0], tally[2] = tally[0] + 1, max(now, tally[2])
        tally[1] = tally[1] or now
    elif key == _OTHER:
        book.pending[key] = [1, now, now]
    else:
        tx.keep_event(book, event)
        book.append(
            Kind.REFUSE, now, event=event, uses=ask.uses, activity=ask.activity, note=ask.note
        )
        book.pending[key] = [0, 0, 0]


def _end(tx: Transaction, book: Book, hold: Hold, kind: Kind, now: int) -> Receipt:
    price = tx.frozen_price(book, hold.event)
    book.totals = book.settled(hold, price)
    hold.open = False
    return book.append(kind, now, event=hold.event, uses=hold.marked, reservation=hold.seq)


def _checked(tx: Transaction, ask: Ask) -> Book:
    book = tx.book(ask.budget)
    expected = (book.budget.unit, book.budget.filter.relation)
    if (ask.unit, ask.relation) != expected:
        raise UnitMismatch(ask.budget, expected, (ask.unit, ask.relation))
    return book


def _held(tx: Transaction, budget: str, seq: int, holder: str) -> tuple[Book, Hold]:
    book, hold = tx.book(budget), tx.hold(budget, seq)
    if hold is None or not hold.open:
        raise ReservationError(f"budget {budget!r} has no open reservation {seq}")
    if hold.holder != holder:
        raise ReservationError(f"reservation {seq} of budget {budget!r} has another holder")
    return book, hold
