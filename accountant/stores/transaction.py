"""Writing: the state that the rules see while the store holds the write lock."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sqlalchemy import URL, Connection, bindparam, insert, select, update
from sqlalchemy.exc import DatabaseError, OperationalError, SQLAlchemyError

from accountant.budgets import Budget
from accountant.errors import LedgerCorrupt, LedgerUnavailable, UnknownBudget
from accountant.ledger import Book, Hold, Keyed
from accountant.stores.schema import (
    BUDGET,
    ENTRY,
    EVENT,
    KEY,
    RESERVATION,
    pack_lanes,
    unpack_lanes,
)
from dp import Event, Price
from dp.codec import digest, encode

if TYPE_CHECKING:
    from accountant.stores.sql import SqlStore

# Built once: composing a statement costs more than running it.
_BUDGET_BY_NAME = select(BUDGET).where(BUDGET.c.name == bindparam("of"))
_PRICE_BY_DIGEST = select(EVENT.c.price).where(
    EVENT.c.budget == bindparam("of"), EVENT.c.digest == bindparam("at")
)
_RESERVATION_BY_SEQ = select(RESERVATION).where(
    RESERVATION.c.budget == bindparam("of"), RESERVATION.c.seq == bindparam("at")
)
_KEY_BY_NAME = select(KEY).where(KEY.c.budget == bindparam("of"), KEY.c.key == bindparam("at"))
_INSERTS = {table: insert(table) for table in (BUDGET, EVENT, ENTRY, RESERVATION, KEY)}
_UPDATE_BUDGET = (
    update(BUDGET)
    .where(BUDGET.c.name == bindparam("of"), BUDGET.c.seq == bindparam("before"))
    .values({name: bindparam(name) for name in ("seq", "head", "time", "totals", "pending")})
)
_UPDATE_RESERVATION = (
    update(RESERVATION)
    .where(RESERVATION.c.budget == bindparam("of"), RESERVATION.c.seq == bindparam("at"))
    .values(marked=bindparam("marked"), open=bindparam("open"))
)
_UPDATE_KEY = (
    update(KEY)
    .where(KEY.c.budget == bindparam("of"), KEY.c.key == bindparam("at"))
    .values(answer=bindparam("answer"))
)

_CACHED_PRICES = 4096


class SqlTransaction:
    """The state as the rules see it while the store holds the write lock."""

    def __init__(self, store: SqlStore, connection: Connection) -> None:
        self._store, self._connection = store, connection
        self._books: dict[str, tuple[Book, int, str]] = {}
        self._new_books: list[Book] = []
        self._holds: dict[tuple[str, int], tuple[Hold, tuple[int, bool]]] = {}
        self._new_holds: list[tuple[str, Hold]] = []
        self._keyed: dict[tuple[str, str], tuple[Keyed, bytes | None]] = {}
        self._new_keyed: list[tuple[str, Keyed]] = []
        self._priced: dict[tuple[str, bytes], tuple[Event, bytes, Price]] = {}
        self._kept: dict[tuple[str, bytes], tuple[Event, bytes, Price]] = {}

    def find_book(self, budget: str) -> Book | None:
        """Return the book of a budget, or None."""
        if budget in self._books:
            return self._books[budget][0]
        with translated(self._store.url):
            row = self._connection.execute(_BUDGET_BY_NAME, {"of": budget}).first()
        if row is None:
            return None
        self._store.check_not_back(row)
        known = self._store.budgets.get(budget)
        if known is None or known[0] != row.record:
            known = self._store.budgets[budget] = (row.record, Budget.from_json(row.record))
        pending = json.loads(row.pending)
        book = Book(known[1], row.seq, row.head, row.time, unpack_lanes(row.totals), pending)
        self._books[budget] = (book, row.seq, row.pending)
        return book

    def book(self, budget: str) -> Book:
        """Return the book of a budget, or raise UnknownBudget."""
        book = self.find_book(budget)
        if book is None:
            raise UnknownBudget(budget)
        return book

    def add_book(self, book: Book) -> None:
        """Add a new budget's book."""
        self._books[book.budget.name] = (book, 0, "")
        self._new_books.append(book)

    def price(self, book: Book, event: Event) -> tuple[bytes, Price]:
        """Return digest and price of an event: the stored price, or else a new one."""
        name = book.budget.name
        cached = self._store.prices.get((name, event))
        if cached is not None:
            return cached
        encoded = encode(event)
        key = (name, digest(encoded))
        if key not in self._priced:
            price = self._stored_price(*key)
            if price is None:
                price = book.budget.filter.price(event)
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
        with translated(self._store.url):
            packed = self._connection.execute(
                _PRICE_BY_DIGEST, {"of": budget, "at": event}
            ).scalar()
        return None if packed is None else unpack_lanes(packed)

    def keep_event(self, book: Book, event: bytes) -> None:
        """Store the event of that digest, just priced, if it is not stored yet."""
        key = (book.budget.name, event)
        if key in self._priced and key not in self._kept:
            self._kept[key] = self._priced[key]

    def hold(self, budget: str, reservation: int) -> Hold | None:
        """Return a reservation, or None."""
        key = (budget, reservation)
        if key not in self._holds:
            with translated(self._store.url):
                row = self._connection.execute(
                    _RESERVATION_BY_SEQ, {"of": budget, "at": reservation}
                ).first()
            if row is None:
                return None
            charged = unpack_lanes(row.charged)
            hold = Hold(row.seq, row.event, row.uses, row.holder, charged, row.marked, row.open)
            self._holds[key] = (hold, (hold.marked, hold.open))
        return self._holds[key][0]

    def add_hold(self, budget: str, hold: Hold) -> None:
        """Add a new reservation."""
        self._holds[budget, hold.seq] = (hold, (hold.marked, hold.open))
        self._new_holds.append((budget, hold))

    def keyed(self, budget: str, key: str) -> Keyed | None:
        """Return the charge that was made under a key, or None."""
        if (budget, key) not in self._keyed:
            with translated(self._store.url):
                row = self._connection.execute(_KEY_BY_NAME, {"of": budget, "at": key}).first()
            if row is None:
                return None
            keyed = Keyed(row.key, row.payload, row.seq, row.digest, row.answer)
            self._keyed[budget, key] = (keyed, keyed.answer)
        return self._keyed[budget, key][0]

    def add_keyed(self, budget: str, keyed: Keyed) -> None:
        """Add a charge under a key."""
        self._keyed[budget, keyed.key] = (keyed, keyed.answer)
        self._new_keyed.append((budget, keyed))

    def write_back(self) -> None:
        """Write everything that the rules changed."""
        new_books = {id(book) for book in self._new_books}
        self._insert(
            BUDGET,
            [
                {"name": book.budget.name, "record": book.budget.to_json(), **_state(book)}
                for book in self._new_books
            ],
        )
        self._insert(
            EVENT,
            [
                {"budget": name, "digest": key, "encoded": encoded, "price": pack_lanes(price)}
                for (name, key), (_, encoded, price) in self._kept.items()
                if encoded
            ],
        )
        entries, budgets = [], []
        for book, seq, pending in self._books.values():
            entries += [
                {"budget": book.budget.name, "seq": entry.seq, "body": body, "digest": head}
                for entry, body, head in book.appended
            ]
            state = _state(book)
            if id(book) not in new_books and (book.appended or state["pending"] != pending):
                budgets.append({"of": book.budget.name, "before": seq, **state})
        self._insert(ENTRY, entries)
        self._update(_UPDATE_BUDGET, budgets)
        self._insert(
            RESERVATION,
            [
                {
                    "budget": name,
                    "seq": hold.seq,
                    "event": hold.event,
                    "uses": hold.uses,
                    "holder": hold.holder,
                    "charged": pack_lanes(hold.charged),
                    "marked": hold.marked,
                    "open": hold.open,
                }
                for name, hold in self._new_holds
            ],
        )
        new_holds = {id(hold) for _, hold in self._new_holds}
        self._update(
            _UPDATE_RESERVATION,
            [
                {"of": name, "at": seq, "marked": hold.marked, "open": hold.open}
                for (name, seq), (hold, before) in self._holds.items()
                if (hold.marked, hold.open) != before and id(hold) not in new_holds
            ],
        )
        self._insert(
            KEY,
            [
                {
                    "budget": name,
                    "key": keyed.key,
                    "payload": keyed.payload,
                    "seq": keyed.seq,
                    "digest": keyed.digest,
                    "answer": keyed.answer,
                }
                for name, keyed in self._new_keyed
            ],
        )
        new_keyed = {id(keyed) for _, keyed in self._new_keyed}
        self._update(
            _UPDATE_KEY,
            [
                {"of": name, "at": key, "answer": keyed.answer}
                for (name, key), (keyed, before) in self._keyed.items()
                if keyed.answer != before and id(keyed) not in new_keyed
            ],
        )

    def _insert(self, table: Any, rows: list[dict[str, Any]]) -> None:
        if rows:
            self._connection.execute(_INSERTS[table], rows)

    def _update(self, statement: Any, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            if self._connection.execute(statement, row).rowcount != 1:
                raise LedgerCorrupt(f"{row['of']!r} changed under the write lock")

    def remember(self) -> None:
        """Keep what is durable now for later transactions of this process."""
        if len(self._store.prices) > _CACHED_PRICES:
            self._store.prices.clear()
        for (name, key), (asked, _, price) in self._kept.items():
            self._store.prices[name, asked] = (key, price)
        for name, (book, _, _) in self._books.items():
            self._store.seen[name] = (book.seq, book.head)


@contextmanager
def translated(url: URL) -> Iterator[None]:
    """Turn the driver's errors into ours."""
    try:
        yield
    except OperationalError as error:
        raise LedgerUnavailable(f"{url.database}: {error.orig}; nothing was charged") from error
    except DatabaseError as error:
        raise LedgerCorrupt(f"{url.database}: {error.orig}") from error
    except SQLAlchemyError as error:
        raise LedgerUnavailable(f"{url.database}: {error}; nothing was charged") from error


def _state(book: Book) -> dict[str, Any]:
    return {
        "seq": book.seq,
        "head": book.head,
        "time": book.time,
        "totals": pack_lanes(book.totals),
        "pending": json.dumps(book.pending, separators=(",", ":")),
    }
