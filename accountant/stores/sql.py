"""The SQL store: SQLite through SQLAlchemy Core. The only file that talks to a database.

A write transaction starts with ``BEGIN IMMEDIATE``: with the default of SQLAlchemy and SQLModel
on SQLite, two threads read the same totals and overspend without an error. ``synchronous=FULL``
makes a commit survive a power cut.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import (
    URL,
    Connection,
    Engine,
    bindparam,
    create_engine,
    event,
    insert,
    make_url,
    select,
    update,
)
from sqlalchemy.exc import ArgumentError, DatabaseError, OperationalError, SQLAlchemyError

from accountant.budgets import Budget
from accountant.errors import (
    LedgerCorrupt,
    LedgerUnavailable,
    OutcomeUnknown,
    SchemaMismatch,
    UnknownBudget,
)
from accountant.ledger import Book, Hold, Keyed
from accountant.stores.schema import (
    APPLICATION_ID,
    BUDGET,
    ENTRY,
    EVENT,
    KEY,
    METADATA,
    RESERVATION,
    SCHEMA_VERSION,
    pack_lanes,
    unpack_lanes,
)
from accountant.stores.snapshot import Snapshot
from dp import Event, Price
from dp.codec import digest, encode

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
_PATIENCE_SECONDS = 30


class SqlStore:
    """A ledger in an SQLite file.

    Args:
        location: Path of the file, or an ``sqlite:///`` URL. A missing file is created.

    Raises:
        LedgerUnavailable: If it cannot be opened or is some other program's database.
        LedgerCorrupt: If it is not a database.
        SchemaMismatch: If another schema version wrote it.
    """

    def __init__(self, location: str | Path) -> None:
        self.url = _url(location)
        self._process = os.getpid()
        self.engine = create_engine(self.url)
        event.listen(self.engine, "connect", _configure)
        event.listen(self.engine, "begin", _begin)
        self._writer = self.engine.execution_options(ledger_write=True)
        self._connection: Connection | None = None
        # What is durable and immutable, or must not go back, remembered between transactions.
        self.prices: dict[tuple[str, Event], tuple[bytes, Price]] = {}
        self.budgets: dict[str, tuple[bytes, Budget]] = {}
        self.seen: dict[str, tuple[int, bytes]] = {}
        with _translated(self.url):
            self._path = _prepare(self.engine, self._writer)
            self._file = _identity(self._path)

    @contextmanager
    def transaction(self) -> Iterator[SqlTransaction]:
        """Hold the write lock; write back and commit on leaving, or roll back.

        For one thread at a time: the writer thread of the accountant.

        Raises:
            LedgerUnavailable: If the lock was not had or a write failed; nothing was charged.
            OutcomeUnknown: If the commit failed.
        """
        with _translated(self.url):
            if self._connection is None:
                self._connection = self._writer.connect()
            connection = self._connection
            transaction = connection.begin()
        try:
            self._check_file()
            tx = SqlTransaction(self, connection)
            yield tx
            with _translated(self.url):
                tx.write_back()
        except BaseException:
            self._roll_back(transaction)
            raise
        try:
            transaction.commit()
        except BaseException as error:
            self._discard()
            raise OutcomeUnknown(
                f"{self.url.database}: the commit failed ({error}); count it as spent"
            ) from error
        tx.remember()

    def _roll_back(self, transaction: Any) -> None:
        try:
            transaction.rollback()
        except SQLAlchemyError:
            self._discard()

    def _discard(self) -> None:
        """Close a connection that may still be in its transaction; the next one is new."""
        if self._connection is not None:
            self._connection.invalidate()
            self._connection.close()
            self._connection = None

    @contextmanager
    def snapshot(self) -> Iterator[Snapshot]:
        """Read one consistent state; writers are not held up."""
        self.check_process()
        with _translated(self.url), self.engine.connect() as connection, connection.begin():
            self._check_file()
            yield Snapshot(connection, self.check_not_back)

    def check_not_back(self, row: Any) -> None:
        """Raise if a budget's row is older than one that this process has seen.

        Raises:
            LedgerCorrupt: If an older copy of the ledger was put in its place.
        """
        seen = self.seen.get(row.name)
        if seen is not None and (row.seq < seen[0] or (row.seq == seen[0] and row.head != seen[1])):
            raise LedgerCorrupt(
                f"budget {row.name!r} went back to entry {row.seq} after entry {seen[0]} was seen"
            )

    def _check_file(self) -> None:
        """Raise if the file at the ledger's path is no longer the one that is open."""
        if _identity(self._path) != self._file:
            raise LedgerUnavailable(
                f"{self._path} was moved, deleted or replaced while it was open; open it again"
            )

    def check_process(self) -> None:
        """Raise in a forked child: it must not use the parent's connections, nor its locks."""
        if os.getpid() != self._process:
            raise LedgerUnavailable(
                "this ledger was opened before a fork; open it again in the child process"
            )

    def close(self) -> None:
        """Close every connection; in a forked child, touch none of the parent's."""
        if os.getpid() != self._process:
            return
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        self.engine.dispose()


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
        with _translated(self._store.url):
            row = self._connection.execute(select(BUDGET).where(BUDGET.c.name == budget)).first()
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
        query = select(EVENT.c.price).where(EVENT.c.budget == budget, EVENT.c.digest == event)
        with _translated(self._store.url):
            packed = self._connection.execute(query).scalar()
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
            query = select(RESERVATION).where(
                RESERVATION.c.budget == budget, RESERVATION.c.seq == reservation
            )
            with _translated(self._store.url):
                row = self._connection.execute(query).first()
            if row is None:
                return None
            hold = Hold(row.seq, row.event, row.uses, row.holder, row.marked, row.open)
            self._holds[key] = (hold, (hold.marked, hold.open))
        return self._holds[key][0]

    def add_hold(self, budget: str, hold: Hold) -> None:
        """Add a new reservation."""
        self._holds[budget, hold.seq] = (hold, (hold.marked, hold.open))
        self._new_holds.append((budget, hold))

    def keyed(self, budget: str, key: str) -> Keyed | None:
        """Return the charge that was made under a key, or None."""
        if (budget, key) not in self._keyed:
            query = select(KEY).where(KEY.c.budget == budget, KEY.c.key == key)
            with _translated(self._store.url):
                row = self._connection.execute(query).first()
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
            self._connection.execute(insert(table), rows)

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


def _state(book: Book) -> dict[str, Any]:
    return {
        "seq": book.seq,
        "head": book.head,
        "time": book.time,
        "totals": pack_lanes(book.totals),
        "pending": json.dumps(book.pending, separators=(",", ":")),
    }


def _url(location: str | Path) -> URL:
    if isinstance(location, str) and "://" in location:
        try:
            url = make_url(location)
        except ArgumentError as error:
            raise LedgerUnavailable(f"{location!r} is neither a path nor a URL") from error
        if url.drivername not in ("sqlite", "sqlite+pysqlite"):
            raise LedgerUnavailable(f"{url.render_as_string()}: only sqlite:/// ledgers so far")
    else:
        url = URL.create("sqlite", database=str(location))
    if not url.database or url.database == ":memory:":
        raise LedgerUnavailable("a ledger must outlive its process: name a file")
    return url


def _configure(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # the driver starts no transaction of its own
    # A tampered value must reach verify, not fail in the driver.
    connection.text_factory = lambda raw: raw.decode("utf-8", "surrogateescape")
    connection.execute("PRAGMA busy_timeout=30000")
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if tables and application != APPLICATION_ID:
        raise LedgerUnavailable("this is a database of another program, not a ledger")
    mode = _turn_to_wal(connection)
    if mode != "wal":
        raise LedgerUnavailable(f"SQLite answered journal mode {mode!r} instead of 'wal'")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("PRAGMA fullfsync=1")


def _turn_to_wal(connection: Any) -> str:
    """Return the journal mode; SQLite does not wait by itself while others open the same file."""
    patience = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            (mode,) = connection.execute("PRAGMA journal_mode=WAL").fetchone()
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > patience:
                raise
            time.sleep(0.01)
        else:
            return str(mode)


def _begin(connection: Connection) -> None:
    write = connection.get_execution_options().get("ledger_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")


def _prepare(engine: Engine, writer: Engine) -> str:
    """Make an empty file a ledger, check the schema version, and return the file's path."""
    with engine.connect() as connection:
        path = str(connection.exec_driver_sql("PRAGMA database_list").one()[2])
        if _is_ledger(connection, path):
            return path
    with writer.begin() as connection:
        if not _is_ledger(connection, path):
            METADATA.create_all(connection, checkfirst=False)
            connection.exec_driver_sql(f"PRAGMA application_id={APPLICATION_ID}")
            connection.exec_driver_sql(f"PRAGMA user_version={SCHEMA_VERSION}")
    return path


def _is_ledger(connection: Connection, path: str) -> bool:
    """Return False if the file is empty; raise if another schema version wrote it."""
    if not connection.exec_driver_sql("SELECT count(*) FROM sqlite_master").scalar():
        return False
    version = connection.exec_driver_sql("PRAGMA user_version").scalar()
    if version != SCHEMA_VERSION:
        raise SchemaMismatch(
            f"{path} has ledger schema {version}, this epsledger reads {SCHEMA_VERSION};"
            " use the version that wrote it"
        )
    return True


def _identity(path: str) -> tuple[int, int] | None:
    try:
        found = Path(path).stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


@contextmanager
def _translated(url: URL) -> Iterator[None]:
    """Turn the driver's errors into ours."""
    try:
        yield
    except OperationalError as error:
        raise LedgerUnavailable(f"{url.database}: {error.orig}; nothing was charged") from error
    except DatabaseError as error:
        raise LedgerCorrupt(f"{url.database}: {error.orig}") from error
