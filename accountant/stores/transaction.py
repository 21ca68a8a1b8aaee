"""The state that the rules see while a store holds its lock, and what they changed in it.

No SQL: a store shows its rows through :class:`Tables` and takes back what changed.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from accountant.books import Book, Hold, Keyed
from accountant.budgets import Budget
from accountant.errors import InvalidRequest, LedgerCorrupt, UnknownBudget
from accountant.marks import HighWaterMarks
from accountant.requests import WHOLE_LEDGER, Ask, Request, Uses
from accountant.stores.rows import (
    BudgetRow,
    CheckpointRow,
    EntryRow,
    EventRow,
    KeyRow,
    ReservationRow,
    Spent,
    pack_lanes,
    unpack_lanes,
)
from dp import DPError, Event, Price
from dp.codec import decode, digest, encode

_LOG = logging.getLogger(__name__)
_CACHED_PRICES = 4096


class Tables(Protocol):
    """What a store shows while it holds its lock, and takes back before it commits."""

    def read_budgets(self, names: Sequence[str]) -> Iterable[BudgetRow]:
        """Return the rows of these budgets, locked until the transaction ends."""

    def read_records(self) -> Iterable[bytes]:
        """Return the records of all budgets."""

    def read_event(self, budget: str, digest: bytes) -> EventRow | None:
        """Return a stored event, or None."""

    def read_reservation(self, budget: str, seq: int) -> ReservationRow | None:
        """Return a reservation, or None."""

    def read_open_reservations(self, budget: str) -> Iterable[int]:
        """Return the ``seq`` of the open reservations of a budget, without leases."""

    def read_spent(self, budget: str) -> Iterable[Spent]:
        """Return what the entries of a budget spent, added up; reservations by their marks."""

    def read_key(self, budget: str, key: str) -> KeyRow | None:
        """Return an idempotency key, or None."""

    def read_checkpoints(self) -> int:
        """Return how many checkpoints there are."""

    def read_digest(self, budget: str, seq: int) -> bytes | None:
        """Return the digest of an entry, or None."""

    def insert(self, rows: Sequence[tuple[Any, ...]]) -> None:
        """Add rows, all of one class."""

    def update(self, rows: Sequence[tuple[Any, ...]], before: Sequence[Any]) -> None:
        """Replace rows, all of one class; a budget only if its ``seq`` is still the one before.

        Raises:
            LedgerCorrupt: If one of them changed meanwhile.
        """


@dataclass(slots=True)
class Remembered:
    """What a process keeps between transactions: the immutable, and what must not go back."""

    prices: dict[tuple[str, Event], tuple[bytes, Price]] = field(default_factory=dict)
    ahead: dict[tuple[str, Event], Price] = field(default_factory=dict)
    budgets: dict[str, tuple[bytes, Budget]] = field(default_factory=dict)
    seen: dict[str, tuple[int, bytes]] = field(default_factory=dict)
    marks: HighWaterMarks | None = None

    def marked(self, names: frozenset[str] | None = None) -> dict[str, tuple[int, bytes]]:
        """Return what other processes of this machine saw, too: of all budgets if not named.

        To be asked before what is stored is read: marks follow commits.
        """
        try:
            return {} if self.marks is None else self.marks.read(names)
        except OSError as error:
            _LOG.warning("the high-water marks cannot be read: %s", error)
            return {}

    def highest(self) -> dict[str, tuple[int, bytes]]:
        """Return the highest entry of each budget that this machine saw, or this process."""
        seen = dict(self.seen)  # at once: the writer goes on meanwhile
        for name, (seq, head) in self.marked().items():
            if name not in seen or seen[name][0] < seq:
                seen[name] = (seq, head)
        return seen


def check_not_back(
    name: str,
    row: BudgetRow | None,
    seen: Mapping[str, tuple[int, bytes]],
    digest_at: Callable[[str, int], bytes | None],
) -> None:
    """Raise if a budget is older than, or another one than, what was seen of it.

    Args:
        name: Of the budget.
        row: What is stored of it now, or None.
        seen: Position and digest of an entry that each budget had.
        digest_at: Returns the digest of an entry by budget and position, None where there is none.

    Raises:
        LedgerCorrupt: If an older copy of the ledger was put in its place, or it is a fork.
    """
    if name not in seen:
        return
    seq, head = seen[name]
    now = 0 if row is None else row.seq
    if row is not None and now == seq:
        gone = row.head != head
    else:
        gone = now < seq or digest_at(name, seq) != head
    if gone:
        raise LedgerCorrupt(
            f"budget {name!r} went back to entry {now}, or on from a copy, after entry"
            f" {seq} ({head.hex()[:16]}...) was seen: what was spent meanwhile is"
            " missing. Put the newest copy back; if there is none, see docs/recovery.md"
        )


def price_ahead(remembered: Remembered, request: Request) -> None:
    """Price an event that is new to a budget before its request waits for the lock.

    The first request about a budget in a process is priced under the lock: nobody here knows the
    budget before.

    Args:
        remembered: Where transactions will find the price.
        request: What is asked; whatever is wrong with it is for the rules to say.
    """
    if not isinstance(request, Ask):
        return
    for name in request.budgets:
        key, known = (name, request.event), remembered.budgets.get(name)
        if known is None or key in remembered.prices or key in remembered.ahead:
            continue
        if len(remembered.ahead) > _CACHED_PRICES:
            remembered.ahead.clear()
        with suppress(DPError):
            remembered.ahead[key] = known[1].filter.price(request.event)


class Transaction:
    """The state as the rules see it while a store holds its lock."""

    def __init__(self, tables: Tables, remembered: Remembered, names: frozenset[str]) -> None:
        self._tables, self._remembered = tables, remembered
        self._books: dict[str, tuple[Book, BudgetRow | None]] = {}
        self._holds: dict[tuple[str, int], tuple[Hold, ReservationRow | None]] = {}
        self._keyed: dict[tuple[str, str], tuple[Keyed, KeyRow | None]] = {}
        self._priced: dict[tuple[str, bytes], tuple[Event, bytes, Price]] = {}
        self._kept: dict[tuple[str, bytes], tuple[Event, bytes, Price]] = {}
        self._notes: list[str] = []
        self._loaded: set[str] = set()
        self._broken: dict[str, Exception] = {}
        self._load(sorted(names - {WHOLE_LEDGER}))

    def _load(self, names: Sequence[str]) -> None:
        self._loaded.update(names)
        marked = self._remembered.marked(frozenset(names))
        rows = {row.name: row for row in self._tables.read_budgets(names)}
        for name in names:
            row = rows.get(name)
            try:
                check_not_back(name, row, self._remembered.seen, self._tables.read_digest)
                if marked.get(name) != self._remembered.seen.get(name):
                    check_not_back(name, row, marked, self._tables.read_digest)
                if row is not None:
                    self._books[name] = (self._book(row), row)
            except (LedgerCorrupt, ValueError, TypeError, RecursionError) as error:  # of it alone
                self._broken[name] = error

    def _book(self, row: BudgetRow) -> Book:
        known = self._remembered.budgets.get(row.name)
        if known is None or known[0] != row.record:
            known = self._remembered.budgets[row.name] = (row.record, Budget.from_json(row.record))
        totals, pending = unpack_lanes(row.totals), json.loads(row.pending)
        if len(totals) != len(known[1].filter.limits):
            raise LedgerCorrupt(f"budget {row.name!r}: its totals are {len(totals)} lanes")
        book = Book(known[1], row.seq, row.head, row.time, totals, pending)
        book.closed, book.before = bool(row.closed), totals
        return book

    def find_book(self, budget: str) -> Book | None:
        """Return the book of a budget, or None."""
        if budget not in self._loaded:  # a request that joined once the lock was had
            self._load([budget])
        if budget in self._broken:
            raise LedgerCorrupt(str(self._broken[budget])) from self._broken[budget]
        found = self._books.get(budget)
        return None if found is None else found[0]

    def book(self, budget: str) -> Book:
        """Return the book of a budget, or raise UnknownBudget."""
        book = self.find_book(budget)
        if book is None:
            raise UnknownBudget(budget)
        return book

    def books(self) -> list[Book]:
        """Return the books that were looked at."""
        return [book for book, _ in self._books.values()]

    def add_book(self, book: Book) -> None:
        """Add a new budget's book."""
        self._books[book.budget.name] = (book, None)

    def budgets(self) -> list[Budget]:
        """Return all budgets; the request must have locked the whole ledger.

        Raises:
            LedgerCorrupt: If one that was seen is missing.
        """
        seen = self._remembered.highest()
        stored = [Budget.from_json(record) for record in self._tables.read_records()]
        for name in seen.keys() - {budget.name for budget in stored}:
            check_not_back(name, None, seen, self._tables.read_digest)
        return stored + [book.budget for book, row in self._books.values() if row is None]

    def spent(self, book: Book) -> Uses:
        """Return what was charged to a budget, or raise if a reservation is open."""
        name = book.budget.name
        if self._books[name][1] is None or book.appended:
            raise InvalidRequest(f"budget {name!r} changed just now; ask again")
        if pending := list(self._tables.read_open_reservations(name)):
            raise InvalidRequest(
                f"budget {name!r} has open reservations {pending}; settle or adopt them first"
            )
        uses: dict[bytes, int] = {}
        for spent in self._tables.read_spent(name):
            uses[spent.event] = uses.get(spent.event, 0) + spent.uses * spent.times
        events = {key: self._tables.read_event(name, key) for key in sorted(uses)}
        return tuple((decode(row.encoded), uses[key]) for key, row in events.items() if row)

    def price(self, book: Book, event: Event) -> tuple[bytes, Price]:
        """Return digest and price of an event: the stored price, or else a new one."""
        name = book.budget.name
        cached = self._remembered.prices.get((name, event))
        if cached is not None:
            return cached
        encoded = encode(event)
        key = (name, digest(encoded))
        if key not in self._priced:
            price = self._stored_price(*key)
            ahead = self._remembered.ahead.pop((name, event), None)
            if price is None:
                price = book.budget.filter.price(event) if ahead is None else ahead
            else:
                self._kept[key] = (event, b"", price)
            self._priced[key] = (event, encoded, price)
        return key[1], self._priced[key][2]

    def frozen_price(self, book: Book, event: bytes) -> Price:
        """Return the price of a stored event by its digest."""
        key = (book.budget.name, event)
        if key in self._priced:
            return self._priced[key][2]
        price = self._stored_price(*key)
        if price is None:
            raise LedgerCorrupt(f"budget {key[0]!r} has lost the event {event.hex()}")
        return price

    def _stored_price(self, budget: str, event: bytes) -> Price | None:
        row = self._tables.read_event(budget, event)
        return None if row is None else unpack_lanes(row.price)

    def keep_event(self, book: Book, event: bytes) -> None:
        """Store the event of that digest, just priced, if it is not stored yet."""
        key = (book.budget.name, event)
        if key in self._priced and key not in self._kept:
            self._kept[key] = self._priced[key]

    def hold(self, budget: str, reservation: int) -> Hold | None:
        """Return a reservation, or None."""
        key = (budget, reservation)
        if key not in self._holds:
            row = self._tables.read_reservation(budget, reservation)
            if row is None:
                return None
            hold = Hold(
                row.seq,
                row.event,
                row.uses,
                row.holder,
                unpack_lanes(row.charged),
                row.marked,
                bool(row.open),
                bool(row.lease),
            )
            self._holds[key] = (hold, row)
        return self._holds[key][0]

    def add_hold(self, budget: str, hold: Hold) -> None:
        """Add a new reservation."""
        self._holds[budget, hold.seq] = (hold, None)

    def keyed(self, budget: str, key: str) -> Keyed | None:
        """Return the charge that was made under a key, or None."""
        if (budget, key) not in self._keyed:
            row = self._tables.read_key(budget, key)
            if row is None:
                return None
            self._keyed[budget, key] = (Keyed(*row[1:]), row)
        return self._keyed[budget, key][0]

    def add_keyed(self, budget: str, keyed: Keyed) -> None:
        """Add a charge under a key."""
        self._keyed[budget, keyed.key] = (keyed, None)

    def add_checkpoint(self, note: str) -> int:
        """Add a signed checkpoint; the request must have locked the whole ledger."""
        self._notes.append(note)
        return self._tables.read_checkpoints() + len(self._notes)

    def write_back(self) -> None:
        """Give the store everything that the rules changed."""
        budgets = [(row, _row(book, row)) for book, row in self._books.values()]
        entries = [
            EntryRow(book.budget.name, entry.seq, body, head)
            for book, _ in self._books.values()
            for entry, body, head in book.appended
        ]
        events = [
            EventRow(name, key, encoded, pack_lanes(price))
            for (name, key), (_, encoded, price) in self._kept.items()
            if encoded
        ]
        holds = [
            (
                row,
                ReservationRow(
                    name,
                    seq,
                    hold.event,
                    hold.uses,
                    hold.holder,
                    pack_lanes(hold.charged),
                    hold.marked,
                    hold.open,
                    hold.lease,
                ),
            )
            for (name, seq), (hold, row) in self._holds.items()
        ]
        keys = [
            (row, KeyRow(name, key, keyed.payload, keyed.seq, keyed.digest, keyed.answer))
            for (name, key), (keyed, row) in self._keyed.items()
        ]
        before = self._tables.read_checkpoints() if self._notes else 0
        self._insert([CheckpointRow(n, note) for n, note in enumerate(self._notes, before + 1)])
        self._insert(events)
        self._insert(entries)
        for changed in (budgets, holds, keys):
            self._insert([new for old, new in changed if old is None])
            replaced = [(old, new) for old, new in changed if old is not None and old != new]
            if replaced:
                self._tables.update([new for _, new in replaced], [old for old, _ in replaced])

    def _insert(self, rows: Sequence[tuple[Any, ...]]) -> None:
        if rows:
            self._tables.insert(rows)

    def remember(self) -> dict[str, tuple[int, bytes]]:
        """Keep what is durable now for later transactions; return the budgets' new heads."""
        remembered = self._remembered
        if len(remembered.prices) > _CACHED_PRICES:
            remembered.prices.clear()
        for (name, key), (asked, _, price) in self._kept.items():
            remembered.prices[name, asked] = (key, price)
        heads = {name: (book.seq, book.head) for name, (book, _) in self._books.items()}
        remembered.seen.update(heads)
        return heads


def _row(book: Book, before: BudgetRow | None) -> BudgetRow:
    return BudgetRow(
        book.budget.name,
        book.budget.to_json() if before is None else before.record,
        book.seq,
        book.head,
        book.time,
        pack_lanes(book.totals),
        json.dumps(book.pending, separators=(",", ":")) if book.pending else "{}",
        book.closed,
    )
