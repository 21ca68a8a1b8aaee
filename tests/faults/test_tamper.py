"""One bit anywhere in what the ledger keeps: verify finds it, and names the first bad entry.

Left out is what nothing in the ledger can vouch for: its identity (an anchor does), the secret
of a reservation's holder, refusals not yet written as an entry, and the words of idempotency
keys with their answers. Control: without the chain the flips of notes and times go unseen.
"""

from __future__ import annotations

import itertools
import random
import re
import sqlite3
from collections import Counter
from contextlib import closing

import pytest

from accountant import Accountant, AccountantError, BudgetExceeded
from accountant import verify as verify_module
from accountant.notes import Signer
from dp import Gaussian, PoissonSampled, PureDP, adaptive, planned, pure

STEP = PoissonSampled(0.01, Gaussian(1.0))
ASK = {"unit": "article", "activity": "survey"}
SIGNER = Signer("tamper-test", bytes(32))
PROTECTED = {
    "entry": ("budget", "seq", "body", "digest"),
    "event": ("budget", "digest", "encoded", "price"),
    "budget": ("name", "record", "seq", "head", "time", "totals", "closed"),
    "reservation": ("budget", "seq", "event", "uses", "charged", "marked", "open", "lease"),
    "key": ("budget", "seq", "digest"),
    "checkpoint": ("number", "note"),
}


@pytest.fixture
def ledger(location):
    with Accountant.open(location) as accountant:
        accountant.create_budget("tips", pure(20.0), unit="article", dataset="d")
        accountant.create_budget("news", adaptive(3.0, 1e-6), unit="article")
        accountant.create_budget("mail", planned(3.0, 1e-6, slots=((STEP, 9),)), unit="article")
        accountant.create_quota("team", pure(3.0), of="tips")
        accountant.charge(("tips", "team"), PureDP(0.5), note="noted", **ASK)
        accountant.charge("tips", PureDP(0.5), key="k", **ASK)
        accountant.keep_answer("tips", "k", b"spam")
        accountant.charge(("tips", "team"), PureDP(0.25), key="k2", **ASK)
        accountant.charge("news", Gaussian(50.0), uses=3, **ASK)
        with accountant.reserve("mail", STEP, uses=9, **ASK) as reservation:
            reservation.mark(4)
        open_ = accountant.reserve(("news", "tips"), PureDP(0.01), uses=5, **ASK)
        open_.mark()
        accountant.adopt(open_.holds, open_.event)
        with accountant.lease("tips", PureDP(1e-4), **ASK) as lease:
            for _ in range(20):
                lease.mark()
        for uses in (50, 60):
            with pytest.raises(BudgetExceeded):
                accountant.charge("tips", PureDP(1.0), uses=uses, **ASK)
        accountant.correct("tips", PureDP(0.5), **ASK)
        accountant.close_budget("mail")
        accountant.checkpoint(SIGNER)
        accountant.charge("tips", PureDP(0.5), **ASK)
        accountant.checkpoint(SIGNER)
    return location


def flipped(value, choose):
    """Return the value with one bit the other way round, of the type that it had."""
    if isinstance(value, int):
        return value ^ (1 << choose.randrange(40))
    raw = bytearray(value.encode() if isinstance(value, str) else value)
    if not raw:
        return b"\x01"
    raw[choose.randrange(len(raw))] ^= 1 << choose.randrange(8)
    return bytes(raw).decode("utf-8", "surrogateescape") if isinstance(value, str) else bytes(raw)


def flips(ledger, count: int, seed: int):
    """Flip bits one after another; return how many were found, and of how many the entry was named."""
    choose, found, named, entries = random.Random(seed), 0, 0, 0
    missed = []
    with (
        Accountant.open(ledger) as accountant,
        closing(sqlite3.connect(ledger, isolation_level=None)) as raw,
    ):
        raw.execute("PRAGMA synchronous=OFF")
        for (name,) in raw.execute(
            "SELECT name FROM sqlite_master WHERE type = 'trigger'"
        ).fetchall():
            raw.execute(f"DROP TRIGGER {name}")
        assert accountant.verify(key=SIGNER.verifier_key).clean
        cells = []
        for table, columns in PROTECTED.items():
            for row in raw.execute(f"SELECT rowid, * FROM epsledger_{table}").fetchall():
                names = [
                    "rowid",
                    *(c[1] for c in raw.execute(f"PRAGMA table_info(epsledger_{table})")),
                ]
                cells += [
                    (table, column, row[0], dict(zip(names, row, strict=True)))
                    for column in columns
                ]
        for _ in range(count):
            table, column, rowid, row = choose.choice(cells)
            update = f"UPDATE OR REPLACE epsledger_{table} SET {column} = ? WHERE rowid = ?"
            value = flipped(row[column], choose)
            if column == "note":  # not the names of the keys: a note by another key proves nothing
                text, end = row[column].split("\n\n")
                value = flipped(text, choose) + "\n\n" + end
            if column == "price":  # its last bits are within what another host may round to
                raw_price = bytearray(row[column])
                lane = choose.randrange(len(raw_price) // 16)
                raw_price[16 * lane + 12] ^= 1 << choose.randrange(8)
                value = bytes(raw_price)
            if column in ("open", "lease", "closed"):  # any other number than 0 is true
                value = 1 - row[column]
            if isinstance(value, str):
                value = value.encode("utf-8", "surrogateescape")
                update = update.replace("= ? WHERE", "= CAST(? AS TEXT) WHERE")
            backup = raw.execute(f"SELECT rowid, * FROM epsledger_{table}").fetchall()
            raw.execute(update, (value, rowid))
            try:
                verification = accountant.verify(key=SIGNER.verifier_key)
                clean = verification.clean
            except AccountantError:  # a checkpoint that does not open
                clean = False
            raw.execute("BEGIN")
            raw.execute(f"DELETE FROM epsledger_{table}")
            names = ", ".join(
                ["rowid", *(c[1] for c in raw.execute(f"PRAGMA table_info(epsledger_{table})"))]
            )
            marks = ", ".join("?" * len(backup[0]))
            raw.executemany(f"INSERT INTO epsledger_{table} ({names}) VALUES ({marks})", backup)
            raw.execute("COMMIT")
            found += not clean
            if clean:
                missed.append((table, column, row["rowid"]))
            if table == "entry":
                entries += 1
                problems = [
                    p for c in verification.budgets if c.budget == row["budget"] for p in c.problems
                ]
                numbers = [int(n) for p in problems for n in re.findall(r"^entry (\d+)", p)]
                if column in ("body", "digest"):
                    named += numbers[:1] == [row["seq"]] == [min(numbers, default=0)]
                else:  # it is missing at its place
                    followed = f"follows entry {row['seq'] - 1}" in str(problems[:1])
                    named += followed or (bool(numbers) and min(numbers) <= row["seq"] + 1)
        assert accountant.verify(key=SIGNER.verifier_key).clean
    return found, named, entries, missed


@pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=pytest.mark.long)])
def test_every_flipped_bit_is_found(ledger, count, monkeypatch):
    monkeypatch.setenv("EPSLEDGER_STATE", "")
    found, named, entries, missed = flips(ledger, count, seed=count)
    print(
        f"{found} of {count} flipped bits found, {named} of {entries} flipped entries named first"
    )
    assert not missed
    assert found == count
    assert named == entries


QUIET = {
    ("key", "delete"),
    ("key", "swap"),
    ("key", "truncate"),
    ("checkpoint", "truncate"),
    ("checkpoint", "swap"),
}
"""What leaves no trace: a lost key costs budget, and checkpoints are in their anchors."""


def edits(table: str, names: list[str], rows: list[tuple]):
    """Yield every row deleted, copied under another key, swapped with the next, and the end cut."""
    key = {"budget": 1, "checkpoint": 1}.get(table, 2)
    for at, row in enumerate(rows):
        last = at == len(rows) - 1
        yield "truncate" if last and table == "checkpoint" else "delete", rows[:at] + rows[at + 1 :]
        moved = row[key - 1]
        other = moved + 1000 if isinstance(moved, int) else moved + type(moved)(moved[:1])
        yield "insert", [*rows, (*row[: key - 1], other, *row[key:])]
    for at, (one, two) in enumerate(itertools.pairwise(rows)):
        swapped = [(*one[:key], *two[key:]), (*two[:key], *one[key:])]
        if swapped != [one, two]:
            yield "swap", rows[:at] + swapped + rows[at + 2 :]
    for kept in range(len(rows)):
        yield "truncate", rows[:kept]


@pytest.mark.parametrize("table", PROTECTED)
def test_every_row_deleted_inserted_swapped_and_cut_off(ledger, monkeypatch, untrigger, table):
    monkeypatch.setenv("EPSLEDGER_STATE", "")
    untrigger(ledger)
    found, missed = Counter(), Counter()
    with (
        Accountant.open(ledger) as accountant,
        closing(sqlite3.connect(ledger, isolation_level=None)) as raw,
    ):
        names = [each[1] for each in raw.execute(f"PRAGMA table_info(epsledger_{table})")]
        rows = raw.execute(f"SELECT * FROM epsledger_{table} ORDER BY 1, 2").fetchall()
        insert = f"INSERT INTO epsledger_{table} VALUES ({', '.join('?' * len(names))})"

        def put(content: list[tuple]) -> None:
            raw.execute("BEGIN")
            raw.execute(f"DELETE FROM epsledger_{table}")
            raw.executemany(insert, content)
            raw.execute("COMMIT")

        for what, content in edits(table, names, rows):
            put(content)
            try:
                clean = accountant.verify(key=SIGNER.verifier_key).clean
            except AccountantError:
                clean = False
            (missed if clean else found)[what] += 1
        put(rows)
        assert accountant.verify(key=SIGNER.verifier_key).clean
    print(f"{table}: found {dict(found)}, not found {dict(missed)}")
    assert {(table, what) for what in missed} <= QUIET
    assert sum(found.values()) > 2


class AnyDigest(bytes):
    """A digest that equals every other."""

    __hash__ = bytes.__hash__

    def __eq__(self, other):
        return True

    def __ne__(self, other):
        return False


def test_the_control_without_the_chain_misses_flips(ledger, monkeypatch):
    monkeypatch.setenv("EPSLEDGER_STATE", "")
    monkeypatch.setattr(verify_module, "chain", lambda *_: AnyDigest(32))
    found, _, _, missed = flips(ledger, 60, seed=4)
    print(f"control, no chain: {found} of 60 flipped bits found")
    assert {table for table, _, _ in missed} == {"entry"}
