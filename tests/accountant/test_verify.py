"""Verify: every edit of a stored field is found, and no clean ledger is accused.

Whoever owns the file can drop the triggers, so the tests do that first.
"""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import sqlite3
import tracemalloc
from contextlib import closing
from pathlib import Path

import pytest

from accountant import Accountant, Budget, BudgetExceeded, LedgerCorrupt, Verification
from accountant.entries import GENESIS, NO_EVENT, Entry, Kind, chain, pack
from accountant.ledger import decide
from accountant.requests import Charge
from dp import Gaussian, Laplace, NeighboringRelation, PoissonSampled, PureDP, adaptive, pure
from dp.codec import digest, encode

STEP = PoissonSampled(0.01, Gaussian(1.0))
TABLES = ("budget", "event", "entry", "reservation", "key")
UNCHAINED = {
    ("budget", "pending"),
    ("reservation", "holder"),
    ("key", "key"),
    ("key", "payload"),
    ("key", "answer"),
}
"""Columns whose honest-looking edits leave no trace: no entry covers them."""


@pytest.fixture(scope="module")
def ledger(tmp_path_factory, untrigger):
    """A closed ledger with everything in it, its triggers dropped."""
    location = tmp_path_factory.mktemp("ledger") / "ledger.db"
    ask = {"unit": "article", "activity": "survey"}
    with Accountant.open(location) as accountant:
        accountant.create_budget("news", adaptive(3.0, 1e-6), unit="article", units=1000)
        accountant.create_budget("tips", pure(10.0), unit="article")
        accountant.charge("news", Gaussian(50.0), uses=3, note="first", **ask)
        accountant.charge("news", Gaussian(60.0), key="answered", payload=b"q", **ask)
        accountant.keep_answer("news", "answered", b"spam")
        accountant.charge("news", Gaussian(60.0), key="waiting", **ask)
        with accountant.reserve("news", STEP, uses=9, **ask) as settled:
            settled.mark(4)
        accountant.reserve("news", STEP, uses=9, **ask).void()
        left_open = accountant.reserve("news", Gaussian(70.0), uses=5, **ask)
        for count in (3, 2):
            for _ in range(count):
                with pytest.raises(BudgetExceeded):
                    accountant.charge("news", Laplace(0.1), **ask)
            left_open.mark()
        accountant.charge("tips", PureDP(1.0), **ask)
        with pytest.raises(BudgetExceeded):
            accountant.charge("tips", PureDP(20.0), **ask)
        with pytest.raises(BudgetExceeded):
            accountant.charge("tips", PureDP(20.0), **ask)
    untrigger(location)
    return location


def verified(location: Path) -> Verification:
    with Accountant.open(location) as accountant:
        return accountant.verify()


@pytest.fixture
def tampered(ledger, tmp_path, query):
    """Return what verify says of a copy after some SQL."""
    count = iter(range(10**6))

    def check(*statements: str | tuple) -> Verification:
        copy = tmp_path / f"{next(count)}.db"
        shutil.copyfile(ledger, copy)
        for statement in statements:
            query(copy, *([statement] if isinstance(statement, str) else statement))
        try:
            return verified(copy)
        finally:
            copy.unlink()

    return check


def problems(verification: Verification) -> str:
    return "\n".join(
        [f"{c.budget}: {problem}" for c in verification.budgets for problem in c.problems]
        + [f"stray {name}" for name in verification.strays]
    )


def test_the_untouched_ledger_is_clean(ledger):
    verification = verified(ledger)
    assert verification.clean
    assert [checked.budget for checked in verification.budgets] == ["news", "tips"]
    assert verification.rollback == "not checked"
    with Accountant.open(ledger) as accountant:
        for checked in verification.budgets:
            statement = accountant.statement(checked.budget)
            assert (checked.entries, checked.head) == (statement.seq, statement.head)


def edited(value: object) -> list[object]:
    """Values that look like an honest one."""
    match value:
        case None:
            return [b"spam"]
        case bytes():
            flipped = [
                value[:at] + bytes([value[at] ^ bit]) + value[at + 1 :]
                for at, bit in [(0, 1), (len(value) // 2, 16), (len(value) - 1, 128)]
                if value
            ]
            return [*flipped, value[:-1], value + b"\x00", b""]
        case int():
            return [value + 1, value - 1, 1 - value, 2**62]
        case str():
            return [value + "x", ""]
    raise AssertionError(value)


def cells(location: Path, table: str):
    """Yield every stored field: column, rowid, value."""
    with closing(sqlite3.connect(location)) as connection:
        columns = [row[1] for row in connection.execute(f"PRAGMA table_info(epsledger_{table})")]
        rows = connection.execute(f"SELECT rowid, * FROM epsledger_{table}").fetchall()
    for rowid, *values in rows:
        for column, value in zip(columns, values, strict=True):
            yield column, rowid, value


@pytest.mark.parametrize("table", TABLES)
def test_every_edit_of_every_stored_field_is_found(ledger, tampered, table):
    missed, tried = [], 0
    for column, rowid, value in cells(ledger, table):
        if (table, column) in UNCHAINED or (table, column) == ("budget", "time"):
            continue
        others = [1 - value] if column == "open" else edited(value)
        # The last bit of a price may differ on another host; `test_a_price_a_little_lower`.
        for other in others[1:] if column == "price" else others:
            statement = f"UPDATE epsledger_{table} SET {column} = ? WHERE rowid = ?"
            try:
                verification = tampered((statement, other, rowid))
            except sqlite3.IntegrityError:
                continue  # the number of another row: not even the file takes it
            tried += 1
            if verification.clean:
                missed.append((column, rowid, value, other))
    assert tried >= 10
    assert not missed


def test_an_edit_of_the_budgets_time_is_found(tampered):
    assert not tampered("UPDATE epsledger_budget SET time = time - 5").clean


def test_the_columns_that_no_entry_covers_are_these(ledger, tampered):
    """Honest limit. A column that is found one day has to leave the list."""
    quiet = {
        ("budget", "pending"): "UPDATE epsledger_budget SET pending = '{}'",
        ("reservation", "holder"): "UPDATE epsledger_reservation SET holder = 'me'",
        ("key", "key"): "UPDATE epsledger_key SET key = key || '-2'",
        ("key", "payload"): "UPDATE epsledger_key SET payload = x'00'",
        ("key", "answer"): "UPDATE epsledger_key SET answer = x'00'",
    }
    assert quiet.keys() == UNCHAINED
    assert all(tampered(statement).clean for statement in quiet.values())
    assert tampered("DELETE FROM epsledger_key").clean


@pytest.mark.parametrize(
    "table",
    TABLES,
)
def test_values_of_another_type_are_problems_and_not_crashes(ledger, tampered, table):
    wrong = []
    for column, rowid, value in cells(ledger, table):
        if rowid > 5 or column == "time" or (column, value) == ("open", 1):
            continue  # whatever is true means open
        for other in ("text", b"\xff", -1, '{"a": 1}'):
            if type(other) is type(value) and (table, column) in UNCHAINED:
                continue
            statement = f"UPDATE epsledger_{table} SET {column} = ? WHERE rowid = ?"
            try:
                clean = tampered((statement, other, rowid)).clean
            except sqlite3.IntegrityError:
                continue
            except Exception as error:  # noqa: BLE001
                wrong.append((column, other, repr(error)))
            else:
                if clean and (table, column) not in UNCHAINED:
                    wrong.append((column, other, "not found"))
    assert not wrong


NEWS = "budget = 'news'"
ENTRY = "epsledger_entry"
SQL = [
    ("the first entry deleted", [f"DELETE FROM {ENTRY} WHERE seq = 1 AND {NEWS}"], "follows entry 0"),
    ("an entry in the middle deleted", [f"DELETE FROM {ENTRY} WHERE seq = 4 AND {NEWS}"], "entry 5: follows entry 3"),
    ("the last entry deleted", [f"DELETE FROM {ENTRY} WHERE {NEWS} AND seq = (SELECT max(seq) FROM {ENTRY} WHERE {NEWS})"], "the budget ends on entry"),
    ("the end cut off", [f"DELETE FROM {ENTRY} WHERE {NEWS} AND seq > 5"], "some are missing or were added"),
    ("the end cut off, and the row set back", [
        f"DELETE FROM {ENTRY} WHERE {NEWS} AND seq > 4",
        f"UPDATE epsledger_budget SET seq = 4, head = (SELECT digest FROM {ENTRY} WHERE {NEWS} AND seq = 4) WHERE name = 'news'",
    ], "the stored totals are not the sums"),
    ("all entries deleted", [f"DELETE FROM {ENTRY}"], "some are missing or were added"),
    ("two entries swapped", [
        f"UPDATE {ENTRY} SET seq = 1000 WHERE {NEWS} AND seq = 3",
        f"UPDATE {ENTRY} SET seq = 3 WHERE {NEWS} AND seq = 4",
        f"UPDATE {ENTRY} SET seq = 4 WHERE {NEWS} AND seq = 1000",
    ], "follows entry 2"),
    ("two bodies swapped", [
        f"UPDATE {ENTRY} SET body = (SELECT o.body FROM {ENTRY} o WHERE o.budget = 'news' AND o.seq = 7 - {ENTRY}.seq) WHERE {NEWS} AND seq IN (3, 4)",
    ], "its digest does not match"),
    ("an entry inserted", [f"INSERT INTO {ENTRY} SELECT budget, 1000, body, digest FROM {ENTRY} WHERE {NEWS} AND seq = 2"], "follows entry"),
    ("an entry repeated at the end", [f"INSERT INTO {ENTRY} SELECT budget, (SELECT max(seq) + 1 FROM {ENTRY} WHERE {NEWS}), body, digest FROM {ENTRY} WHERE {NEWS} AND seq = 2"], "its digest does not match"),
    ("an entry of another budget", [f"INSERT INTO {ENTRY} SELECT 'tips', 4, body, digest FROM {ENTRY} WHERE {NEWS} AND seq = 4"], "its digest does not match"),
    ("entries moved to a new name", [f"UPDATE {ENTRY} SET budget = 'ghost' WHERE {NEWS}"], "stray ghost"),
    ("a budget's row deleted", ["DELETE FROM epsledger_budget WHERE name = 'tips'"], "stray tips"),
    ("a budget renamed", ["UPDATE epsledger_budget SET name = 'olds' WHERE name = 'news'"], "is that of 'news'"),
    ("totals lowered to nothing", ["UPDATE epsledger_budget SET totals = zeroblob(length(totals))"], "the stored totals are not the sums"),
    ("an event deleted", ["DELETE FROM epsledger_event WHERE rowid = 1"], "is not stored"),
    ("a price of nothing", ["UPDATE epsledger_event SET price = zeroblob(length(price))"], "is not priced as"),
    ("a settled reservation opened", ["UPDATE epsledger_reservation SET open = 1"], "reservations are not those of the entries"),
    ("an open reservation closed", ["UPDATE epsledger_reservation SET open = 0"], "reservations are not those of the entries"),
    ("marks forgotten", ["UPDATE epsledger_reservation SET marked = 0"], "reservations are not those of the entries"),
    ("a reservation deleted", ["DELETE FROM epsledger_reservation WHERE open = 1"], "reservations are not those of the entries"),
    ("a reservation added", ["INSERT INTO epsledger_reservation SELECT budget, 2, event, uses, holder, charged, 0, 1, 0 FROM epsledger_reservation LIMIT 1"], "reservations are not those of the entries"),
    ("a key for a charge that never was", ["INSERT INTO epsledger_key SELECT budget, 'forged', payload, 99, digest, answer FROM epsledger_key LIMIT 1"], "key 'forged' refers to entry 99"),
    ("pending refusals in another form", ["UPDATE epsledger_budget SET pending = '{\"a:1:b\":[1,2]}'"], "pending refusals"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("statements", "words"), [pytest.param(*row[1:], id=row[0]) for row in SQL]
)
def test_edits_by_hand(tampered, statements, words):
    verification = tampered(*statements)
    assert not verification.clean
    assert words in problems(verification)


@pytest.mark.parametrize("part", [1e-3, 1e-6, 1e-8])
def test_a_price_a_little_lower(ledger, tampered, query, part):
    ((rowid, packed),) = query(
        ledger, "SELECT rowid, price FROM epsledger_event WHERE budget = 'tips' AND rowid IN (SELECT min(rowid) FROM epsledger_event WHERE budget = 'tips')"
    )  # fmt: skip
    price = int.from_bytes(packed, "little")
    lower = (price - int(price * part)).to_bytes(16, "little")
    found = problems(
        tampered(("UPDATE epsledger_event SET price = ? WHERE rowid = ?", lower, rowid))
    )
    assert "is not priced as PureDP" in found


def wider(record: dict, budget: Budget, *, limits: bool) -> Budget:
    generous = adaptive(300.0, 1e-4)
    changes = {"epsilon": 300.0, "delta": 1e-4}
    if limits:
        changes = {**changes, "limits": generous.limits}
    return dataclasses.replace(budget, filter=dataclasses.replace(budget.filter, **changes))


@pytest.mark.parametrize("limits", [False, True])
def test_a_budget_widened_afterwards(ledger, tampered, query, limits):
    """Also when its limits are widened with it: the OPEN entry holds the record's digest."""
    ((record,),) = query(ledger, "SELECT record FROM epsledger_budget WHERE name = 'news'")
    budget = wider(json.loads(record), Budget.from_json(record), limits=limits)
    statement = "UPDATE epsledger_budget SET record = ? WHERE name = 'news'"
    found = problems(tampered((statement, budget.to_json())))
    assert "news: entry 1: the budget's record is not the one that was opened" in found


def test_limits_widened_alone(ledger, tampered, query):
    ((record,),) = query(ledger, "SELECT record FROM epsledger_budget WHERE name = 'tips'")
    budget = Budget.from_json(record)
    (limit,) = budget.filter.limits
    doubled = dataclasses.replace(budget.filter, limits=(2 * limit,))
    statement = "UPDATE epsledger_budget SET record = ? WHERE name = 'tips'"
    found = problems(tampered((statement, dataclasses.replace(budget, filter=doubled).to_json())))
    assert "limits are wider than its epsilon and delta allow" in found


def test_a_record_in_another_form(ledger, tampered, query):
    ((record,),) = query(ledger, "SELECT record FROM epsledger_budget WHERE name = 'tips'")
    loose = json.dumps(json.loads(record), indent=1).encode()
    found = problems(
        tampered(("UPDATE epsledger_budget SET record = ? WHERE name = 'tips'", loose))
    )
    assert "not in canonical form" in found


FIT = PureDP(1.0)
DIGEST = digest(encode(FIT))


def forged(location: Path, entries: list[Entry], spent: int, holds: list[tuple] = ()) -> str:
    """Write a ledger of one pure budget of epsilon 3 whose chain is right in every link.

    It is what someone can do who rewrites everything: only the rules can contradict them.
    """
    budget = Budget("tips", "article", pure(3.0))
    (price,) = budget.filter.price(FIT)
    with Accountant.open(location):
        pass
    opened = Entry(Kind.OPEN, 1, 0, digest(budget.to_json()))
    head = GENESIS
    with closing(sqlite3.connect(location)) as connection, connection:
        for entry in [opened, *entries]:
            body = pack(entry)
            head = chain(head, body)
            connection.execute(
                "INSERT INTO epsledger_entry VALUES ('tips', ?, ?, ?)", (entry.seq, body, head)
            )
        connection.execute(
            "INSERT INTO epsledger_event VALUES ('tips', ?, ?, ?)",
            (DIGEST, encode(FIT), price.to_bytes(16, "little")),
        )
        connection.execute(
            "INSERT INTO epsledger_budget VALUES ('tips', ?, ?, ?, ?, ?, '{}', 0)",
            (
                budget.to_json(),
                len(entries) + 1,
                head,
                entries[-1].time,
                (spent * price).to_bytes(16, "little"),
            ),
        )
        for seq, uses, marked, is_open in holds:
            connection.execute(
                "INSERT INTO epsledger_reservation VALUES ('tips', ?, ?, ?, 'me', ?, ?, ?, 0)",
                (seq, DIGEST, uses, (uses * price).to_bytes(16, "little"), marked, is_open),
            )
    return problems(verified(location))


def entry(kind: Kind, seq: int, uses: int = 1, reservation: int = 0, **changes: object) -> Entry:
    time = {"time": 0, "event": DIGEST} | changes
    return Entry(kind, seq, uses=uses, reservation=reservation, activity="x", **time)


FORGED = [
    ("nothing wrong", [entry(Kind.CHARGE, 2, 2)], 2, [], ""),
    ("nothing wrong, with a reservation", [entry(Kind.RESERVE, 2, 2), entry(Kind.MARK, 3, 1, 2), entry(Kind.SETTLE, 4, 1, 2)], 1, [(2, 2, 1, 0)], ""),
    ("overspent", [entry(Kind.CHARGE, 2, 2), entry(Kind.CHARGE, 3, 1)], 3, [], "entry 3: exceeds the budget"),
    ("overspent for a while", [entry(Kind.RESERVE, 2, 2), entry(Kind.CHARGE, 3, 2), entry(Kind.SETTLE, 4, 0, 2)], 2, [(2, 2, 0, 0)], "entry 3: exceeds the budget"),
    ("marked beyond the uses", [entry(Kind.RESERVE, 2, 1), entry(Kind.MARK, 3, 2, 2)], 1, [(2, 1, 2, 1)], "marks more than reservation 2 has"),
    ("marked uses returned", [entry(Kind.RESERVE, 2, 2), entry(Kind.MARK, 3, 2, 2), entry(Kind.SETTLE, 4, 0, 2)], 0, [(2, 2, 0, 0)], "returns uses of reservation 2 that were marked"),
    ("voided after a mark", [entry(Kind.RESERVE, 2, 2), entry(Kind.MARK, 3, 1, 2), entry(Kind.VOID, 4, 1, 2)], 1, [(2, 2, 1, 0)], "returns uses of reservation 2 that were marked"),
    ("settled twice", [entry(Kind.RESERVE, 2, 2), entry(Kind.SETTLE, 3, 0, 2), entry(Kind.SETTLE, 4, 0, 2)], 0, [(2, 2, 0, 0)], "entry 4: there is no open reservation 2"),
    ("marked after the settlement", [entry(Kind.RESERVE, 2, 2), entry(Kind.SETTLE, 3, 0, 2), entry(Kind.MARK, 4, 1, 2)], 0, [(2, 2, 0, 0)], "entry 4: there is no open reservation 2"),
    ("settled what was never reserved", [entry(Kind.CHARGE, 2, 2), entry(Kind.SETTLE, 3, 0, 2)], 2, [], "entry 3: there is no open reservation 2"),
    ("settled for another event", [entry(Kind.RESERVE, 2, 2), entry(Kind.SETTLE, 3, 0, 2, event=NO_EVENT)], 0, [(2, 2, 0, 0)], "is not stored"),
    ("time runs back", [entry(Kind.CHARGE, 2, 1, time=9), entry(Kind.CHARGE, 3, 1, time=8)], 2, [], "entry 3: is older than the entry before"),
    ("opened twice", [entry(Kind.OPEN, 2)], 0, [], "entry 2: a chain has one OPEN entry, its first"),
    ("numbered past a gap", [entry(Kind.CHARGE, 3)], 1, [], "entry 3: follows entry 1"),
    ("an event that is not stored", [entry(Kind.CHARGE, 2, event=b"\x07" * 32)], 1, [], "is not stored"),
    ("a kind that is not known", [dataclasses.replace(entry(Kind.CHARGE, 2), kind=99)], 1, [], "entry 2: unreadable entry: 99 is not a valid Kind"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("entries", "spent", "holds", "words"), [pytest.param(*row[1:], id=row[0]) for row in FORGED]
)
def test_a_chain_that_is_right_in_every_link(location, entries, spent, holds, words):
    found = forged(location, entries, spent, holds)
    assert words in found
    assert bool(found) is bool(words)


def test_a_charge_without_an_event(location):
    assert forged(location, [entry(Kind.CHARGE, 2, event=NO_EVENT)], 1)


def test_a_budget_emptied_with_its_row_set_back(tampered):
    verification = tampered(
        f"DELETE FROM {ENTRY}",
        "DELETE FROM epsledger_reservation",
        "DELETE FROM epsledger_key",
        (
            "UPDATE epsledger_budget SET seq = 0, totals = zeroblob(length(totals)), head = ?",
            GENESIS,
        ),
    )
    assert not verification.clean


def random_ledger(location: Path, seed: int) -> None:
    choose = random.Random(seed)
    with Accountant.open(location) as accountant:
        accountant.create_budget("a", adaptive(choose.uniform(0.5, 8), 1e-6), unit="row")
        accountant.create_budget("b", pure(choose.uniform(0.5, 8)), unit="row")
        held, keys = [], iter(range(1000))
        for _ in range(30):
            event = choose.choice([Gaussian(30.0), Laplace(9.0), PureDP(0.4), STEP])
            ask = {"unit": "row", "activity": choose.choice("xyz"), "uses": choose.randint(1, 9)}
            name = choose.choice("ab")
            try:
                match choose.choice(["charge", "keyed", "reserve", "mark", "settle", "void"]):
                    case "charge":
                        accountant.charge(name, event, **ask)
                    case "keyed":
                        key = f"{next(keys)}"
                        accountant.charge(name, event, key=key, **ask)
                        accountant.keep_answer(name, key, b"yes")
                    case "reserve":
                        held.append(accountant.reserve(name, event, **ask))
                    case "mark" if held:
                        reservation = choose.choice(held)
                        if reservation.remaining:
                            reservation.mark(choose.randint(1, reservation.remaining))
                    case "settle" if held:
                        held.pop().settle()
                    case "void" if held and not held[-1].marked:
                        held.pop().void()
            except BudgetExceeded:
                pass


@pytest.mark.parametrize("ledgers", [15, pytest.param(200, marks=pytest.mark.long)])
def test_no_clean_ledger_is_accused(tmp_path, ledgers):
    refused = 0
    for seed in range(ledgers):
        location = tmp_path / f"{seed}.db"
        random_ledger(location, seed)
        with Accountant.open(location) as accountant:
            verification = accountant.verify()
            assert verification.clean, (seed, problems(verification))
            assert sum(checked.entries for checked in verification.budgets) > 5
            refused += sum(accountant.statement(name).refused for name in "ab")
    assert refused > ledgers


def test_an_older_copy_is_clean_and_said_not_to_be_checked_without_marks(tmp_path, monkeypatch):
    """Honest limit: nothing inside a file can tell that the file is an older one."""
    monkeypatch.setenv("EPSLEDGER_STATE", "")
    location = tmp_path / "ledger.db"
    with Accountant.open(location) as accountant:
        accountant.create_budget("tips", pure(3.0), unit="article")
        accountant.charge("tips", FIT, unit="article", activity="x")
    older = tmp_path / "older.db"
    shutil.copyfile(location, older)
    with Accountant.open(location) as accountant:
        accountant.charge("tips", FIT, unit="article", activity="x")
    older.replace(location)
    with Accountant.open(location) as accountant:
        verification = accountant.verify()
        assert verification.clean
        assert verification.rollback == "not checked"
        assert accountant.uses_that_fit("tips", FIT) == 1


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE epsledger_budget SET record = x'7b7d'",
        "UPDATE epsledger_budget SET pending = 'no'",
        "UPDATE epsledger_entry SET body = x'00' WHERE seq = 2",
        "UPDATE epsledger_event SET price = x'00'",
        "UPDATE epsledger_event SET encoded = x'7b7d'",
        "DELETE FROM epsledger_event",
        "DELETE FROM epsledger_entry WHERE seq = 8",
    ],
)
def test_a_statement_of_a_broken_ledger_is_an_error_of_ours(ledger, tmp_path, query, statement):
    copy = tmp_path / "copy.db"
    shutil.copyfile(ledger, copy)
    query(copy, statement)
    with Accountant.open(copy) as accountant, pytest.raises(LedgerCorrupt):
        accountant.statement("news")


def test_memory_is_flat_in_entries(tmp_path):
    peaks = []
    for entries in (5_000, 20_000):
        with Accountant.open(tmp_path / f"{entries}.db") as accountant:
            accountant.create_budget("tips", pure(1e6), unit="article")
            ask = Charge(("tips",), PureDP(1.0), 1, "article", NeighboringRelation.ADD_REMOVE, "x")
            with accountant._store.transaction(ask.names) as tx:
                for number in range(entries):
                    decide(tx, ask, number)
            tracemalloc.start()
            assert accountant.verify().clean
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    print(f"verify: at most {peaks[0]:,} bytes for 5,000 entries, {peaks[1]:,} for 20,000")
    assert peaks[1] < 1.3 * peaks[0]
