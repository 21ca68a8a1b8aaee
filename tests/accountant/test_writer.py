"""Group commit: many asks in one transaction, and each gets its own answer."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from accountant import (
    BudgetExceeded,
    LedgerCorrupt,
    OutcomeUnknown,
    Receipt,
    UnitMismatch,
    UnknownBudget,
)
from accountant.writer import Writer
from dp import Gaussian, PureDP, Repeated

ASK = {"unit": "article", "activity": "survey"}


def in_one_batch(location: Path, *calls: Callable[[], object]) -> list[object]:
    """Hold the write lock until every call waits in the queue; return their outcomes in order."""
    outcomes: dict[int, object] = {}

    def go(number: int) -> None:
        try:
            outcomes[number] = calls[number]()
        except Exception as error:  # noqa: BLE001
            outcomes[number] = error

    queued: list[str] = []

    def noting(name: str) -> Callable[..., object]:
        method = getattr(Writer, name)

        def noted(*given: object) -> object:
            if name == "close":  # which does not return meanwhile
                queued.append(name)
                return method(*given)
            done = method(*given)
            queued.append(name)
            return done

        return noted

    threads = [threading.Thread(target=go, args=(number,)) for number in range(len(calls))]
    with (
        pytest.MonkeyPatch.context() as patch,
        closing(sqlite3.connect(location, isolation_level=None)) as other,
    ):
        for name in ("enqueue", "close"):
            patch.setattr(Writer, name, noting(name))
        other.execute("BEGIN IMMEDIATE")
        deadline = time.monotonic() + 25  # before SQLite gives up
        for number, thread in enumerate(threads, 1):
            thread.start()
            while len(queued) < number:
                assert time.monotonic() < deadline, f"call {number} is not in the queue"
                time.sleep(0.001)
        assert not outcomes
        other.execute("ROLLBACK")
        for thread in threads:
            thread.join()
    return [outcomes[number] for number in range(len(calls))]


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
