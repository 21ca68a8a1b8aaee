"""Opening and closing: reopening, two accountants, forks, triggers."""

from __future__ import annotations

import os
import sqlite3
import time
import warnings

import pytest

from accountant import (
    Accountant,
    BudgetExceeded,
    BudgetExists,
    LedgerCorrupt,
    LedgerUnavailable,
)
from dp import Gaussian, PureDP, adaptive

ASK = {"unit": "article", "activity": "survey"}


def test_everything_is_there_after_reopening(accountant, location, digest_of):
    accountant.charge("news", Gaussian(50.0), uses=3, **ASK)
    reservation = accountant.reserve("tips", PureDP(1.0), uses=4, **ASK)
    reservation.mark()
    with pytest.raises(BudgetExceeded):
        accountant.charge("tips", PureDP(9.0), **ASK)
    statements = [accountant.statement(name) for name in accountant.budgets()]
    accountant.close()
    before = digest_of(location)
    for reopen in (location, str(location), f"sqlite:///{location}"):
        with Accountant.open(reopen) as reopened:
            assert [reopened.statement(name) for name in reopened.budgets()] == statements
            assert reopened.verify().clean
    assert digest_of(location) == before
    with Accountant.open(location) as reopened, pytest.raises(BudgetExists):
        reopened.create_budget("news", adaptive(3.0, 1e-6), unit="article")


def test_one_file_is_left_after_closing(accountant, location):
    accountant.charge("news", Gaussian(50.0), **ASK)
    accountant.close()
    assert [path.name for path in location.parent.iterdir()] == [location.name]


def test_two_accountants_on_one_file_share_the_budget(accountant, location):
    with Accountant.open(location) as other:
        seqs = [
            through.charge("tips", PureDP(1.0), **ASK).seq
            for _ in range(4)
            for through in (accountant, other)
        ]
        assert seqs == list(range(2, 10))
        accountant.charge("tips", PureDP(1.0), **ASK)
        with pytest.raises(BudgetExceeded):
            other.charge("tips", PureDP(1.0), **ASK)
        assert accountant.statement("tips") == other.statement("tips")
        other.create_budget("new", adaptive(1.0, 1e-6), unit="article")
        assert accountant.charge("new", Gaussian(50.0), **ASK).seq == 2
        assert other.verify().clean


def test_use_after_close(accountant):
    reservation = accountant.reserve("tips", PureDP(1.0), uses=4, **ASK)
    accountant.close()
    accountant.close()
    calls = [
        lambda: accountant.charge("tips", PureDP(1.0), **ASK),
        lambda: accountant.create_budget("x", adaptive(1.0, 1e-6), unit="article"),
        lambda: accountant.reserve("tips", PureDP(1.0), uses=1, **ASK),
        lambda: accountant.keep_answer("tips", "k", b""),
        reservation.mark,
        reservation.settle,
        reservation.void,
    ]
    for call in calls:
        with pytest.raises(LedgerUnavailable, match="closed; open the ledger again"):
            call()
    assert reservation.marked == 0


def in_a_fork(act) -> str:
    """Run ``act`` in a forked child; return what it raised or returned. Never hangs."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the fork is what is tested
        child = os.fork()
    if child == 0:
        try:
            answer = f"returned {act()!r}"
        except BaseException as error:  # noqa: BLE001
            answer = f"{type(error).__name__}: {error}"
        os.write(writing, answer.encode())
        os._exit(0)
    os.close(writing)
    deadline = time.monotonic() + 60
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, 9)
            os.waitpid(child, 0)
            os.close(reading)
            return "hung"
        time.sleep(0.01)
    with os.fdopen(reading, "rb") as pipe:
        return pipe.read().decode()


def test_use_after_fork(accountant, location):
    reservation = accountant.reserve("tips", PureDP(1.0), uses=4, **ASK)
    reservation.mark()
    accountant.statement("tips")
    calls = [
        lambda: accountant.charge("tips", PureDP(1.0), **ASK),
        lambda: accountant.create_budget("x", adaptive(1.0, 1e-6), unit="article"),
        lambda: accountant.statement("tips"),
        accountant.verify,
        reservation.mark,
        reservation.settle,
    ]
    for call in calls:
        answer = in_a_fork(call)
        assert answer.startswith("LedgerUnavailable: ")
        assert "opened before a fork" in answer
    assert in_a_fork(accountant.close) == "returned None"
    # A child may open the ledger for itself, and the parent goes on with what it held.
    assert "seq=4" in in_a_fork(
        lambda: Accountant.open(location).charge("tips", PureDP(1.0), **ASK)
    )
    reservation.mark()
    reservation.settle()
    assert accountant.charge("tips", PureDP(1.0), **ASK).seq == 7
    assert accountant.verify().clean


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE epsledger_entry SET body = x'00'",
        "UPDATE epsledger_entry SET seq = seq + 100",
        "DELETE FROM epsledger_entry",
        "UPDATE epsledger_event SET price = x'00'",
        "DELETE FROM epsledger_event",
        "DELETE FROM epsledger_budget",
        "UPDATE epsledger_budget SET name = 'other'",
        "UPDATE epsledger_budget SET record = x'7b7d'",
        "UPDATE epsledger_budget SET seq = seq - 1",
        "DELETE FROM epsledger_reservation",
        "UPDATE epsledger_reservation SET uses = uses - 1",
        "UPDATE epsledger_reservation SET marked = marked - 1",
        "UPDATE epsledger_reservation SET open = 1 WHERE open = 0",
        "UPDATE epsledger_key SET answer = x'00'",
        "UPDATE epsledger_key SET payload = x'00' WHERE answer IS NULL",
    ],
)
def test_triggers_stop_accidents(accountant, location, query, digest_of, statement):
    accountant.charge("tips", PureDP(1.0), key="answered", **ASK)
    accountant.keep_answer("tips", "answered", b"spam")
    accountant.charge("news", Gaussian(50.0), key="waiting", **ASK)
    with accountant.reserve("tips", PureDP(1.0), uses=2, **ASK) as reservation:
        reservation.mark()
    before = digest_of(location)
    if "key SET answer" in statement:
        statement += " WHERE answer IS NOT NULL"
    with pytest.raises(sqlite3.IntegrityError, match="the ledger is append-only"):
        query(location, statement)
    assert digest_of(location) == before


def test_a_live_accountant_refuses_a_ledger_that_went_back(accountant, location, query):
    """Restored in place, as a backup program does; the file as such is a clean, older ledger."""
    older = location.with_name("older.db")
    accountant.charge("tips", PureDP(1.0), **ASK)
    with Accountant.open(location) as other:
        query(location, "VACUUM INTO ?", str(older))
        accountant.charge("tips", PureDP(1.0), **ASK)
        live, copy = sqlite3.connect(location), sqlite3.connect(older)
        copy.backup(live)
        live.close()
        copy.close()
        with pytest.raises(
            LedgerCorrupt, match=r"went back to entry 2, .* after entry 3 .* was seen"
        ):
            accountant.charge("tips", PureDP(1.0), **ASK)
        assert not other.verify().clean  # though it had not seen the last entry itself
        assert other.verify().rollback.endswith("of 2 of 2 budgets")


def test_a_file_replaced_under_a_live_accountant(accountant, location):
    accountant.charge("tips", PureDP(1.0), **ASK)
    for path in location.parent.iterdir():
        path.unlink()
    with pytest.raises((LedgerUnavailable, LedgerCorrupt)):
        accountant.charge("tips", PureDP(1.0), **ASK)
