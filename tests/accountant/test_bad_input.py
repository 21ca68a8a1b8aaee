"""Bad calls: each raises a named error that says what is wrong, and leaves the ledger as it was.

One table. A row is a name, what is called, the error, words that its message must contain, and
how many refusals the call may add to the ledger (0 nearly everywhere: a refused ask is recorded,
an invalid one is not).
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pickle
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from sqlalchemy import event

import accountant as package
from accountant import (
    Accountant,
    BudgetExceeded,
    BudgetExists,
    InvalidRequest,
    KeyReused,
    LedgerCorrupt,
    LedgerUnavailable,
    OutcomeUnknown,
    ReleaseUnknown,
    ReservationError,
    SchemaMismatch,
    UnitMismatch,
    UnknownBudget,
)
from dp import (
    Composed,
    Gaussian,
    InvalidParameter,
    Laplace,
    NeighboringRelation,
    NonPrivate,
    NothingFits,
    PoissonSampled,
    PureDP,
    Repeated,
    TreeAggregation,
    UnsupportedEvent,
    adaptive,
    pure,
)

REPLACE = NeighboringRelation.REPLACE_ONE
STEP = PoissonSampled(0.01, Gaussian(1.0))
PAGE = 4096


class World(NamedTuple):
    """What a bad call finds: an open ledger, and a folder with room for other files."""

    accountant: Accountant
    location: Path
    ended: Any
    waiting: Any

    def charge(self, event: Any = None, **changes: Any) -> object:
        ask = {"budget": "news", "unit": "article", "activity": "survey"} | changes
        return self.accountant.charge(event=Gaussian(50.0) if event is None else event, **ask)

    def create(self, name: str = "new", filter: Any = None, **changes: Any) -> object:
        filter = adaptive(1.0, 1e-6) if filter is None else filter
        return self.accountant.create_budget(name, filter, **({"unit": "article"} | changes))

    def other(self, name: str = "other.db") -> Path:
        return self.location.with_name(name)


def copy_of(world: World, *statements: str) -> Path:
    """A second ledger beside the first, changed by SQL and closed."""
    copy = world.other()
    with closing(sqlite3.connect(world.location)) as connection:
        connection.execute("VACUUM INTO ?", (str(copy),))
    with closing(sqlite3.connect(copy)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
        for statement in statements:
            connection.execute(statement)
        connection.commit()
    return copy


def open_untouched(location: Path | str, file: Path | None = None) -> None:
    """Open a ledger; whatever is raised, the file must be what it was, byte for byte."""
    file = Path(location) if file is None else file
    before = file.read_bytes()
    try:
        Accountant.open(location).close()
    finally:
        assert file.read_bytes() == before


def foreign(world: World) -> None:
    with closing(sqlite3.connect(world.other())) as connection:
        connection.execute("CREATE TABLE recipes (name TEXT)")
        connection.commit()
    open_untouched(world.other())


def foreign_rows(world: World) -> None:
    with closing(sqlite3.connect(world.other())) as connection:
        connection.execute("CREATE TABLE recipes (name TEXT)")
        connection.commit()
    Accountant.open(world.other())


def text(world: World) -> None:
    world.other().write_bytes(b"not a database, but longer than the header of one. " * 40)
    open_untouched(world.other())


def holed(world: World) -> None:
    """Overwrite pages in the middle of a closed ledger, then read all of it."""
    with Accountant.open(world.other()) as fresh:
        fresh.create_budget("news", adaptive(3.0, 1e-6), unit="article")
        for _ in range(150):
            fresh.charge("news", Gaussian(500.0), unit="article", activity="survey")
    pages = world.other().stat().st_size // PAGE
    with world.other().open("r+b") as file:
        for page in range(pages // 3, 2 * pages // 3):
            file.seek(page * PAGE)
            file.write(b"\xa5" * PAGE)
    with Accountant.open(world.other()) as broken:
        broken.verify()


def read_only(world: World) -> None:
    # As root a file without write permission can be written; SQLite's own switch holds for root too.
    with Accountant.open(copy_of(world)) as locked:
        engine = locked._store.engine
        engine.dispose()
        event.listen(engine, "connect", lambda driver, _: driver.execute("PRAGMA query_only=1"))
        assert locked.statement("news").seq > 1
        locked.charge("news", Gaussian(50.0), unit="article", activity="survey")


def full_disk(world: World) -> None:
    with pytest.MonkeyPatch.context() as patch:  # the copy goes past what was seen of the ledger
        patch.setenv("EPSLEDGER_STATE", "")
        on_a_full_disk(world)


def on_a_full_disk(world: World) -> None:
    copy_of(world)
    program = Path(__file__).with_name("full_disk.py")
    done = subprocess.run(
        [sys.executable, str(program), str(world.other())],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    (kind, message), (then, _) = json.loads(done.stdout)
    assert then == "nothing"  # with room again, the same accountant goes on
    with Accountant.open(world.other()) as again:
        assert again.statement("tips").seq == world.accountant.statement("tips").seq + 1
        assert again.verify().clean
    raise getattr(package, kind)(message)


def refilled(world: World, **limits: object) -> object:
    return world.create(filter=dataclasses.replace(adaptive(1.0, 1e-6), **limits))


class Bad(NamedTuple):
    name: str
    call: Callable[[World], object]
    error: type[Exception] | tuple[type[Exception], ...]
    words: str
    refusals: int = 0


TABLE = [
    # Noise, probabilities, counts
    Bad("NaN noise", lambda w: w.charge(Gaussian(math.nan)), InvalidParameter, "noise_multiplier must be a finite number, got nan"),
    Bad("infinite noise", lambda w: w.charge(Gaussian(math.inf)), InvalidParameter, "noise_multiplier must be a finite number, got inf"),
    Bad("negative noise", lambda w: w.charge(Gaussian(-1.0)), InvalidParameter, "noise_multiplier must be positive"),
    Bad("no noise", lambda w: w.charge(Gaussian(0.0)), InvalidParameter, "noise_multiplier must be positive"),
    Bad("subnormal noise", lambda w: w.charge(Laplace(5e-324)), InvalidParameter, "not subnormal"),
    Bad("noise in words", lambda w: w.charge(Gaussian("1.0")), InvalidParameter, "noise_multiplier must be a number, got '1.0'"),
    Bad("a yes for a number", lambda w: w.charge(PureDP(True)), InvalidParameter, "epsilon must be a number, got True"),
    Bad("sampling above 1", lambda w: w.charge(PoissonSampled(1.5, Gaussian(1.0))), InvalidParameter, "sampling_probability must be in (0, 1], got 1.5"),
    Bad("sampling nothing", lambda w: w.charge(PoissonSampled(0, Gaussian(1.0))), InvalidParameter, "sampling_probability must be in (0, 1], got 0"),
    Bad("NaN sampling", lambda w: w.charge(PoissonSampled(math.nan, Gaussian(1.0))), InvalidParameter, "sampling_probability must be a finite number"),
    Bad("no uses", lambda w: w.charge(uses=0), InvalidParameter, "uses must be an integer from 1 to 2**53 - 1, got 0"),
    Bad("fewer than no uses", lambda w: w.charge(uses=-3), InvalidParameter, "uses must be an integer"),
    Bad("half a use", lambda w: w.charge(uses=0.5), InvalidParameter, "uses must be an integer"),
    Bad("uses beyond counting", lambda w: w.charge(uses=2**53), InvalidParameter, "uses must be an integer from 1 to 2**53 - 1"),
    Bad("huge uses", lambda w: w.charge(uses=2**53 - 1), BudgetExceeded, "9007199254740991 x Gaussian(noise_multiplier=50.0) refused", 1),
    Bad("huge uses of what has no price", lambda w: w.charge(NonPrivate(), uses=2**53 - 1), BudgetExceeded, "0 would fit", 1),
    Bad("a huge repetition", lambda w: w.charge(Repeated(Gaussian(50.0), 2**40)), BudgetExceeded, "0 would fit", 1),
    Bad("a repetition that overflows", lambda w: w.charge(Repeated(Repeated(Gaussian(1.0), 2**50), 2**50)), InvalidParameter, "count must be an integer"),
    Bad("nothing composed", lambda w: w.charge(Composed(())), InvalidParameter, "at least one event"),
    Bad("not an event", lambda w: w.charge("Gaussian(50.0)"), (InvalidRequest, UnsupportedEvent, InvalidParameter), "event"),
    Bad("no event inside", lambda w: w.charge(Repeated("Gaussian", 2)), InvalidParameter, "an event of dp.events"),
    # Budgets
    Bad("an unknown budget", lambda w: w.charge(budget="absent"), UnknownBudget, "no budget 'absent' in this ledger; create it first"),
    Bad("a statement of an unknown budget", lambda w: w.accountant.statement("absent"), UnknownBudget, "'absent'"),
    Bad("an existing budget", lambda w: w.create("news"), BudgetExists, "budget 'news' exists; budgets are immutable"),
    Bad("a budget without a name", lambda w: w.create(""), InvalidRequest, "budget name '' must be 1 to 64"),
    Bad("a budget named like a path", lambda w: w.create("../news"), InvalidRequest, "letters, digits"),
    Bad("a name too long", lambda w: w.create("n" * 65), InvalidRequest, "must be 1 to 64"),
    Bad("a unit without a name", lambda w: w.create(unit=""), InvalidRequest, "unit must be 1 to 200 printable"),
    Bad("not a filter", lambda w: w.create(filter=1.0), (InvalidRequest, InvalidParameter), "filter"),
    Bad("limits wider than epsilon allows", lambda w: refilled(w, limits=(10**12,) * 19), (InvalidRequest, InvalidParameter), "limits"),
    Bad("weights above one", lambda w: refilled(w, weights=(0.5,) * 19), (InvalidRequest, InvalidParameter), "weights"),
    Bad("delta 0 in adaptive", lambda w: w.create(filter=adaptive(1.0, 0.0)), InvalidParameter, "delta must be in [1e-15, 0.1], got 0.0"),
    Bad("NaN delta", lambda w: w.create(filter=adaptive(1.0, math.nan)), InvalidParameter, "delta must be a finite number"),
    Bad("delta of 1 over the units", lambda w: w.create(filter=adaptive(1.0, 1e-3), units=1000), InvalidParameter, "delta must be below 1/units = 1/1000"),
    Bad("no units", lambda w: w.create(units=0), InvalidParameter, "units must be an integer"),
    Bad("infinite epsilon", lambda w: w.create(filter=adaptive(math.inf, 1e-6)), InvalidParameter, "epsilon must be a finite number, got inf"),
    Bad("infinite pure epsilon", lambda w: w.create(filter=pure(math.inf)), InvalidParameter, "epsilon must be a finite number, got inf"),
    Bad("epsilon 0", lambda w: w.create(filter=pure(0)), InvalidParameter, "epsilon must be in [1e-6, 1e6]"),
    # Units and relations
    Bad("another unit", lambda w: w.charge(unit="author"), UnitMismatch, "protects one 'article' under add_remove, the operation one 'author'"),
    Bad("another relation", lambda w: w.charge(relation=REPLACE), UnitMismatch, "under replace_one"),
    Bad("Poisson under replace-one", lambda w: w.charge(STEP, budget="rows", relation=REPLACE), UnsupportedEvent, "needs a budget under add_remove"),
    Bad("a tree on a sample", lambda w: w.charge(PoissonSampled(0.1, TreeAggregation(1.0, 8))), UnsupportedEvent, "cannot be priced"),
    # Labels and keys
    Bad("no activity", lambda w: w.charge(activity=""), InvalidRequest, "activity must be 1 to 200 printable characters, got ''"),
    Bad("an unprintable activity", lambda w: w.charge(activity="sur\x1b[2Jvey"), InvalidRequest, "activity must be 1 to 200 printable"),
    Bad("an activity too long", lambda w: w.charge(activity="a" * 201), InvalidRequest, "activity must be 1 to 200"),
    Bad("an activity of bytes", lambda w: w.charge(activity=b"survey"), InvalidRequest, "activity must be 1 to 200"),
    Bad("a note of two lines", lambda w: w.charge(note="one\ntwo"), InvalidRequest, "note must be 1 to 200 printable"),
    Bad("an empty key", lambda w: w.charge(key=""), InvalidRequest, "key must be 1 to 200 printable"),
    Bad("a reused key", lambda w: w.charge(key="answered", payload=b"another"), KeyReused, "key 'answered' was used for another request"),
    Bad("a key without its answer", lambda w: w.charge(key="waiting"), ReleaseUnknown, "'waiting' was charged and its answer was lost"),
    Bad("a second answer", lambda w: w.accountant.keep_answer("news", "answered", b"2"), InvalidRequest, "no charge waits for an answer under key 'answered'"),
    Bad("a payload of text", lambda w: w.charge(key="new", payload="question"), (InvalidRequest, InvalidParameter), "payload"),
    Bad("an answer of text", lambda w: w.accountant.keep_answer("news", "waiting", "spam"), (InvalidRequest, InvalidParameter), "answer"),
    # Reservations
    Bad("a pickled reservation", lambda w: pickle.dumps(w.waiting), ReservationError, "belongs to the process that made it"),
    Bad("a mark after the settlement", lambda w: w.ended.mark(), ReservationError, "no open reservation"),
    Bad("a second settlement", lambda w: w.ended.settle(), ReservationError, "no open reservation"),
    Bad("marks beyond the uses", lambda w: w.waiting.mark(6), ReservationError, "has 5 of 5 uses left, 6 asked"),
    Bad("no marks", lambda w: w.waiting.mark(0), InvalidParameter, "uses must be an integer"),
    Bad("a reservation that does not fit", lambda w: w.accountant.reserve("tips", PureDP(1.0), uses=99, unit="article", activity="x"), BudgetExceeded, "99 x PureDP(epsilon=1.0) refused", 1),
    Bad("noise that cannot be enough", lambda w: w.accountant.smallest_noise("tips", Gaussian, uses=5), NothingFits, "5 uses"),
    # Files
    Bad("not a database", text, LedgerCorrupt, "file is not a database"),
    Bad("pages overwritten", holed, LedgerCorrupt, "database disk image is malformed"),
    Bad("a foreign database", foreign_rows, LedgerUnavailable, "is a database of another program, not a ledger"),
    Bad("a foreign database, to the byte", foreign, LedgerUnavailable, "is a database of another program"),
    Bad("an older schema", lambda w: open_untouched(copy_of(w, "PRAGMA user_version=0")), SchemaMismatch, "has ledger schema 0"),
    Bad("a newer schema", lambda w: open_untouched(copy_of(w, "PRAGMA user_version=999")), SchemaMismatch, "has ledger schema 999"),
    Bad("a read-only ledger", read_only, LedgerUnavailable, "readonly database; nothing was charged"),
    Bad("a full disk", full_disk, (LedgerUnavailable, OutcomeUnknown), "other.db"),
    Bad("no such folder", lambda w: Accountant.open(w.other("absent") / "ledger.db"), LedgerUnavailable, "unable to open database file"),
    Bad("a folder", lambda w: Accountant.open(w.location.parent), LedgerUnavailable, "unable to open database file"),
    Bad("no file named", lambda _: Accountant.open(""), LedgerUnavailable, "must outlive its process: name a file"),
    Bad("in memory", lambda _: Accountant.open("sqlite://"), LedgerUnavailable, "must outlive its process: name a file"),
    Bad("in memory, by its name", lambda _: Accountant.open("sqlite:///:memory:"), LedgerUnavailable, "must outlive its process: name a file"),
    Bad("in memory, as a URI", lambda _: Accountant.open("sqlite:///file::memory:?uri=true"), LedgerUnavailable, "name the file alone"),
    Bad("a file without locks, as a URI", lambda w: Accountant.open(f"sqlite:///file:{w.location}?nolock=1&uri=true"), LedgerUnavailable, "could turn its locks off"),
    Bad("an SQLite URI for a path", lambda _: Accountant.open("file:ledger.db"), LedgerUnavailable, "name the file alone"),
    Bad("another database", lambda _: Accountant.open("mysql://me:secret@host/books"), LedgerUnavailable, "mysql://me:***@host/books: a ledger is kept in sqlite:/// or postgresql+psycopg://"),
    Bad("not a URL", lambda _: Accountant.open("://"), LedgerUnavailable, "://"),
    Bad("an unknown driver", lambda _: Accountant.open("sqlite+absent:///ledger.db"), LedgerUnavailable, "absent"),
]  # fmt: skip


@pytest.fixture
def world(accountant, location, monkeypatch):
    monkeypatch.setattr("accountant.accountant._WAIT_SECONDS", 0.1)  # for the lost answer
    accountant.create_budget("rows", adaptive(3.0, 1e-6, relation=REPLACE), unit="article")
    ask = {"unit": "article", "activity": "survey"}
    accountant.charge("news", Gaussian(50.0), key="answered", **ask)
    accountant.keep_answer("news", "answered", b"spam")
    accountant.charge("news", Gaussian(50.0), key="waiting", **ask)
    with accountant.reserve("news", STEP, uses=5, **ask) as ended:
        ended.mark()
    return World(accountant, location, ended, accountant.reserve("news", STEP, uses=5, **ask))


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param(
            row,
            id=row.name,
        )
        for row in TABLE
    ],
)
def test_bad_calls(world, digest_of, bad, totals_of):
    def state() -> tuple:
        statements = [world.accountant.statement(name) for name in world.accountant.budgets()]
        totals = [totals_of(world.location, name) for name in world.accountant.budgets()]
        return totals, sum(statement.refused for statement in statements)

    digest, (totals, refused) = digest_of(world.location), state()
    with pytest.raises(Exception) as caught:  # noqa: PT011
        bad.call(world)
    assert isinstance(caught.value, bad.error), repr(caught.value)
    assert bad.words in str(caught.value)
    assert state() == (totals, refused + bad.refusals)
    assert (digest_of(world.location) == digest) is (bad.refusals == 0)
    assert world.accountant.verify().clean


def test_the_table_is_long_enough():
    assert len({row.name for row in TABLE}) == len(TABLE) >= 20


def test_a_ledger_goes_on_after_every_bad_call(world):
    for row in TABLE:
        if row.call is not full_disk:
            with pytest.raises(row.error):
                row.call(world)
            world.other().unlink(missing_ok=True)
    assert world.accountant.charge("news", Gaussian(50.0), unit="article", activity="x").seq
    assert world.accountant.verify().clean
