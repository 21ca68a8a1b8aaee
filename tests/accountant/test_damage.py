"""Rows, triggers and spends that were tampered with are found, and are their own budget's problem."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing

import psycopg
import pytest
from click.testing import CliRunner
from sqlalchemy import make_url

from accountant import Accountant, LedgerCorrupt
from accountant.doctor import examine
from accountant.stores.postgres import role_statements
from accountant.stores.transaction import Transaction
from dp import PureDP, pure
from epsledger.cli import main
from tests.accountant.ledgers import ALICE, ASK, LIMITS, TENTH, in_one_batch, plain


def test_a_spend_that_is_not_carried_over_is_found(books, monkeypatch):
    books.charge("d", TENTH, uses=5, **ASK)
    books.charge("d", PureDP(0.01), **ASK)
    carried = Transaction.spent
    for name, part in (("whole", slice(None)), ("part", slice(1)), ("none", slice(0))):
        monkeypatch.setattr(
            Transaction, "spent", lambda self, book, part=part: carried(self, book)[part]
        )
        books.create_budget(
            name,
            pure(2.0),
            unit="article",
            dataset="sha256:1",
            supersedes={"whole": "d", "part": "whole", "none": "part"}[name],
        )
    problems = {checked.budget: checked.problems for checked in books.verify().budgets}
    assert not problems["d"]
    assert not problems["whole"]
    assert problems["part"] == ("entry 1: not all that 'whole' spent is carried over",)
    assert problems["none"] == ("entry 1: not all that 'part' spent is carried over",)


def test_triggers_that_do_something_else(new_database):
    location = new_database()
    url = make_url(location).set(drivername="postgresql").render_as_string(hide_password=False)
    with Accountant.open(location) as accountant:
        store = accountant._store
        assert not store.missing_triggers()
        with psycopg.connect(url, autocommit=True) as owner:
            owner.execute("DROP TRIGGER epsledger_entry_delete ON epsledger_entry")
            assert store.missing_triggers() == ["epsledger_entry_delete"]
            owner.execute(
                "CREATE OR REPLACE FUNCTION epsledger_append_only() RETURNS trigger"
                " LANGUAGE plpgsql AS $$ BEGIN RETURN NEW; END $$"
            )
            assert len(store.missing_triggers()) > 10


def test_a_row_of_another_type_is_its_own_budgets_problem(books, location, untrigger):
    books.create_budget("e", LIMITS, unit="article")
    books.close()
    untrigger(location)
    with closing(sqlite3.connect(location)) as connection:
        connection.execute("UPDATE epsledger_budget SET totals = 7 WHERE name = 'd'")
        connection.commit()
    with Accountant.open(location) as again:
        outcomes = in_one_batch(
            location,
            lambda: again.charge("d", TENTH, **ASK),
            lambda: again.charge("d", TENTH, **ASK),
            lambda: again.charge("e", TENTH, **ASK),
        )
    assert isinstance(outcomes[1], LedgerCorrupt)
    assert outcomes[2].seq == 2
    assert examine(location)


def test_two_budgets_over_one_dataset_are_found(books, monkeypatch):
    monkeypatch.setattr(type(books.budget("d")), "covers", lambda *_: False)
    books.create_budget("e", LIMITS, unit="article", dataset="sha256:1")
    monkeypatch.undo()
    problems = [problem for each in books.verify().budgets for problem in each.problems]
    assert problems == ["entry 1: budget 'd' is about the same dataset"]


REWRITES = {
    "budget": (
        "totals = decode(repeat('00', 16), 'hex')",
        "head = decode(repeat('00', 32), 'hex')",
        "record = 'x'",
        "name = 'other'",
        "seq = 1",
        "closed = true",
    ),
    "reservation": ("budget = 'other'", "event = 'x'", "charged = 'x'", "uses = 99", "marked = 0"),
    "key": ("key = 'other'", "seq = 5", "digest = 'x'", "payload = 'x'", "budget = 'other'"),
    "entry": ("body = 'x'",),
    "event": ("price = 'x'",),
    "checkpoint": ("note = 'x'",),
    "ledger": ("id = 'x'",),
}


@pytest.mark.parametrize("granted", [True, False], ids=["as the role", "as the owner"])
def test_what_is_written_is_not_rewritten(new_database, granted):
    location = new_database()
    role = f'r-"{os.urandom(4).hex()}'
    with Accountant.open(location) as accountant:
        accountant.create_budget("d", LIMITS, unit="article")
        accountant.charge("d", TENTH, key="k", **ASK)
        accountant.reserve("d", TENTH, uses=2, **ASK).mark()
        accountant.checkpoint(ALICE)
    name = role.replace('"', '""')
    with psycopg.connect(plain(location), autocommit=True) as owner:
        if granted:
            owner.execute(f'CREATE ROLE "{name}"')
            owner.execute(role_statements(role))
            owner.execute(f'SET ROLE "{name}"')
        for table, changes in REWRITES.items():
            for change in changes:
                with pytest.raises(psycopg.Error, match=r"append-only|permission denied"):
                    owner.execute(f"UPDATE epsledger_{table} SET {change}")
            with pytest.raises(psycopg.Error, match=r"append-only|permission denied"):
                owner.execute(f"DELETE FROM epsledger_{table}")
        owner.execute("RESET ROLE")
        if granted:
            owner.execute(f'DROP OWNED BY "{name}"')
            owner.execute(f'DROP ROLE "{name}"')
    with Accountant.open(location) as accountant:
        assert accountant.verify().clean
        accountant.charge("d", TENTH, **ASK)


DEEP = "[" * 100_000 + "]" * 100_000
CORRUPTIONS = (
    "UPDATE epsledger_budget SET pending = '[]'",
    f"UPDATE epsledger_budget SET pending = '{DEEP}'",
    f"UPDATE epsledger_budget SET record = CAST('{DEEP}' AS BLOB)",
    "UPDATE epsledger_budget SET head = 'text'",
    "UPDATE epsledger_budget SET name = x'00ff' WHERE name = 'e'",
    "UPDATE epsledger_entry SET budget = x'00ff' WHERE budget = 'd'",
    "UPDATE epsledger_event SET budget = 'stray'; UPDATE epsledger_reservation SET budget = x'00'",
    "UPDATE epsledger_checkpoint SET note = x'00ff'",
    "UPDATE epsledger_checkpoint SET note = 7",
)


@pytest.mark.parametrize("corruption", CORRUPTIONS, ids=lambda text: text[:55])
def test_no_corruption_ends_in_a_traceback(books, location, untrigger, corruption):
    books.create_budget("e", LIMITS, unit="article")
    books.charge("d", TENTH, **ASK)
    books.reserve("d", TENTH, uses=2, **ASK)
    books.checkpoint(ALICE)
    books.close()
    untrigger(location)
    with closing(sqlite3.connect(location)) as connection:
        connection.executescript(corruption)
    key = ALICE.verifier_key.to_text()
    for command, codes in (
        (("ledger", "verify", "--key", key), (4, 1)),
        (("ledger", "verify"), (4, 0) if "checkpoint" in corruption else (4,)),
        (("budget", "list"), (0, 1)),
        (("budget", "show", "d"), (0, 1)),
        (("ledger", "log", "d"), (0, 1)),
        (("doctor",), (0, 1)),
    ):
        done = CliRunner().invoke(main, [*command, "--ledger", str(location)])
        assert isinstance(done.exception, SystemExit | None), (command, done.exception)
        assert done.exit_code in codes, (command, done.output)


def test_pending_refusals_too_deep_to_read_are_their_own_budgets(books, location, untrigger):
    books.create_budget("e", LIMITS, unit="article")
    books.close()
    untrigger(location)
    with closing(sqlite3.connect(location)) as connection, connection:
        connection.execute("UPDATE epsledger_budget SET pending = ? WHERE name = 'd'", (DEEP,))
    with Accountant.open(location) as again:
        outcomes = in_one_batch(
            location,
            lambda: again.charge("e", TENTH, **ASK),
            lambda: again.charge("d", TENTH, **ASK),
            lambda: again.charge("e", TENTH, **ASK),
        )
    assert isinstance(outcomes[1], LedgerCorrupt)
    assert {outcomes[0].seq, outcomes[2].seq} == {2, 3}


def test_a_broken_record_is_its_own_budgets(books, location, untrigger):
    books.create_budget("e", LIMITS, unit="article")
    books.close_budget("e")
    books.close()
    untrigger(location)
    with closing(sqlite3.connect(location)) as connection, connection:
        connection.execute("UPDATE epsledger_budget SET record = x'00' WHERE name = 'd'")
    with Accountant.open(location) as again:
        assert again.statement("e").superseded_by is None
        with pytest.raises(LedgerCorrupt):
            again.statement("d")
