"""Group commit: many asks in one transaction, and each gets its own answer."""

from __future__ import annotations

import sqlite3

import pytest

from accountant import (
    BudgetExceeded,
    LedgerCorrupt,
    OutcomeUnknown,
    Receipt,
    UnitMismatch,
    UnknownBudget,
)
from dp import Gaussian, PureDP, Repeated
from tests.accountant.ledgers import in_one_batch

ASK = {"unit": "article", "activity": "survey"}


def test_every_ask_of_a_batch_gets_its_own_answer(accountant, location):
    outcomes = in_one_batch(
        location,
        lambda: accountant.charge("tips", PureDP(4.0), **ASK),
        lambda: accountant.charge("absent", PureDP(4.0), **ASK),
        lambda: accountant.charge("tips", PureDP(4.0), **ASK),
        lambda: accountant.charge("tips", PureDP(4.0), **ASK),
        lambda: accountant.charge("news", Gaussian(50.0), **ASK),
        lambda: accountant.charge("tips", PureDP(1.0), **ASK),
    )
    kinds = [Receipt, UnknownBudget, Receipt, BudgetExceeded, Receipt, Receipt]
    assert [type(outcome) for outcome in outcomes] == kinds
    assert [outcome.seq for outcome in outcomes if isinstance(outcome, Receipt)] == [2, 3, 2, 5]
    assert len({line.entry.time for line in accountant.statement("tips").lines[1:]}) == 1
    assert accountant.verify().clean


def test_a_whole_reservation_in_one_batch_with_others(accountant, location, totals_of):
    reservation = accountant.reserve("tips", PureDP(1.0), uses=5, **ASK)
    outcomes = in_one_batch(
        location,
        reservation.mark,
        reservation.mark,
        reservation.settle,
        lambda: accountant.charge("tips", PureDP(1.0), uses=7, **ASK),
        reservation.mark,
    )
    assert [type(outcome).__name__ for outcome in outcomes] == ["Receipt"] * 4 + [
        "ReservationError"
    ]
    assert totals_of(location, "tips") == (
        9 * accountant.budget("tips").filter.price(PureDP(1.0))[0],
    )
    assert accountant.verify().clean


def test_closing_finishes_what_is_queued(accountant, location):
    outcomes = in_one_batch(
        location,
        lambda: accountant.charge("tips", PureDP(1.0), **ASK),
        lambda: accountant.charge("tips", PureDP(1.0), **ASK),
        accountant.close,
    )
    assert [type(outcome) for outcome in outcomes] == [Receipt, Receipt, type(None)]


@pytest.mark.parametrize("denied", [{"COMMIT"}, {"COMMIT", "ROLLBACK"}])
def test_a_commit_that_fails_is_unknown_to_all_and_the_next_goes_on(
    accountant, location, digest_of, denied
):
    """SQLite itself turns the statement down: its authorizer is asked before each."""
    accountant.charge("tips", PureDP(1.0), **ASK)
    before = digest_of(location)
    connection = accountant._store._connection.driver_connection
    connection.set_authorizer(
        lambda action, what, *_: (
            sqlite3.SQLITE_DENY
            if action == sqlite3.SQLITE_TRANSACTION and what in denied
            else sqlite3.SQLITE_OK
        )
    )
    outcomes = in_one_batch(location, *[lambda: accountant.charge("tips", PureDP(1.0), **ASK)] * 3)
    assert [type(outcome) for outcome in outcomes] == [OutcomeUnknown] * 3
    assert "count it as spent" in str(outcomes[0])
    assert digest_of(location) == before
    assert accountant.charge("tips", PureDP(1.0), **ASK).seq == 3
    assert accountant.verify().clean


def test_a_bad_ask_does_not_fail_the_others_of_its_batch(accountant, location):
    ask = {"budget": "news", "event": PureDP(0.1), **ASK}
    outcomes = in_one_batch(
        location,
        lambda: accountant.charge(**ask),
        lambda: accountant.charge(**(ask | {"event": Repeated(Gaussian(50.0), 2**40)})),
        lambda: accountant.charge(**(ask | {"unit": "author"})),
        lambda: accountant.charge(**ask),
    )
    assert [type(outcome) for outcome in outcomes] == [
        Receipt,
        BudgetExceeded,
        UnitMismatch,
        Receipt,
    ]


def test_a_budget_that_went_back_does_not_stop_the_others_of_its_batch(accountant, location):
    accountant.charge("tips", PureDP(1.0), **ASK)
    seq, head = accountant._store.remembered.seen["tips"]
    accountant._store.remembered.seen["tips"] = (seq + 1, head)
    outcomes = in_one_batch(
        location,
        lambda: accountant.charge("news", Gaussian(50.0), **ASK),
        lambda: accountant.charge("tips", PureDP(1.0), **ASK),
        lambda: accountant.charge("news", Gaussian(50.0), **ASK),
    )
    assert [type(outcome) for outcome in outcomes] == [Receipt, LedgerCorrupt, Receipt]
