"""Refusals: every one is counted, a storm of them stays small, and none changes the totals."""

from __future__ import annotations

import threading

import pytest

from accountant import Accountant, BudgetExceeded
from accountant.entries import Kind
from accountant.ledger import MAX_TALLIES
from dp import Gaussian, PureDP

TOO_MUCH = PureDP(50.0)


def refuse(accountant: Accountant, event: object = TOO_MUCH, *, uses: int = 1, activity: str = "x"):
    with pytest.raises(BudgetExceeded):
        accountant.charge("tips", event, uses=uses, unit="article", activity=activity)


def entries(accountant: Accountant) -> list:
    return [line.entry for line in accountant.statement("tips").lines]


def test_a_refusal_is_an_entry_and_changes_no_total(accountant, location, totals_of):
    accountant.charge("tips", PureDP(1.0), unit="article", activity="x")
    before = totals_of(location, "tips")
    refuse(accountant, uses=3, activity="probe")
    assert totals_of(location, "tips") == before
    statement = accountant.statement("tips")
    last = statement.lines[-1]
    assert (last.entry.kind, last.entry.uses, last.entry.activity) == (Kind.REFUSE, 3, "probe")
    assert last.event == TOO_MUCH
    assert statement.refused == 1


def test_a_thousand_equal_refusals_are_two_entries_and_all_are_counted(accountant):
    for _ in range(1000):
        refuse(accountant)
    statement = accountant.statement("tips")
    assert (statement.refused, statement.seq) == (1000, 2)
    accountant.charge("tips", PureDP(1.0), unit="article", activity="x")
    statement = accountant.statement("tips")
    assert (statement.refused, statement.seq) == (1000, 4)
    assert [line.entry.times for line in statement.lines] == [1, 1, 999, 1]
    times = statement.lines[2].entry
    assert statement.lines[1].entry.time <= times.first <= times.time
    assert accountant.verify().clean


def test_refusals_of_many_threads_and_accountants_are_all_counted(accountant, location):
    with Accountant.open(location) as other:

        def storm(through: Accountant, activity: str) -> None:
            for _ in range(50):
                refuse(through, activity=activity)

        threads = [
            threading.Thread(target=storm, args=(through, activity))
            for through in (accountant, other)
            for activity in ("a", "b", "c")
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        statement = other.statement("tips")
    assert statement.refused == 300
    assert {line.name: line.refused for line in statement.activities} == dict.fromkeys("abc", 100)
    assert statement.seq == 4


def test_the_count_survives_closing(accountant, location):
    for _ in range(10):
        refuse(accountant)
    accountant.close()
    with Accountant.open(location) as reopened:
        for _ in range(10):
            refuse(reopened)
        assert reopened.statement("tips").refused == 20
        reopened.charge("tips", PureDP(1.0), unit="article", activity="x")
        assert reopened.statement("tips").refused == 20
        assert reopened.verify().clean


def test_distinct_refusals_are_kept_apart_up_to_a_bound(accountant):
    distinct = MAX_TALLIES + 40
    for _ in range(3):
        for uses in range(1, distinct + 1):
            refuse(accountant, uses=uses)
    statement = accountant.statement("tips")
    assert statement.refused == 3 * distinct
    assert statement.seq == 1 + MAX_TALLIES
    accountant.charge("tips", PureDP(1.0), unit="article", activity="x")
    statement = accountant.statement("tips")
    assert statement.refused == 3 * distinct
    assert statement.seq <= 1 + 2 * MAX_TALLIES + 1 + 1
    assert accountant.verify().clean


def test_another_entry_starts_the_tallies_anew(accountant):
    for _ in range(3):
        for _ in range(5):
            refuse(accountant)
        accountant.charge("tips", PureDP(1.0), unit="article", activity="x")
    kinds = [entry.kind.name for entry in entries(accountant)]
    assert kinds == ["OPEN"] + ["REFUSE", "REFUSE", "CHARGE"] * 3
    assert accountant.statement("tips").refused == 15


def test_refusals_of_other_events_uses_and_activities_are_not_equal(accountant):
    asks = [(TOO_MUCH, 1, "x"), (TOO_MUCH, 2, "x"), (PureDP(60.0), 1, "x"), (TOO_MUCH, 1, "y")]
    for event, uses, activity in asks * 2:
        refuse(accountant, event, uses=uses, activity=activity)
    assert accountant.statement("tips").seq == 1 + len(asks)
    accountant.charge("tips", PureDP(1.0), unit="article", activity="x")
    tallies = [entry for entry in entries(accountant) if entry.kind is Kind.REFUSE]
    assert [entry.times for entry in tallies] == [1] * 8
    assert tallies[0].event == tallies[4].event


def test_an_activity_with_colons_is_counted_as_itself(accountant):
    for _ in range(3):
        refuse(accountant, activity="a:b:c")
    assert [(line.name, line.refused) for line in accountant.statement("tips").activities] == [
        ("a:b:c", 3)
    ]


def test_an_activity_that_looks_like_the_shared_tally(accountant):
    refuse(accountant, Gaussian(0.01), activity="x:0:other")
    accountant.charge("tips", PureDP(1.0), unit="article", activity="x")
    assert accountant.verify().clean


def test_a_refused_reservation_is_counted_too(accountant):
    with pytest.raises(BudgetExceeded):
        accountant.reserve("tips", PureDP(1.0), uses=100, unit="article", activity="training")
    (line,) = accountant.statement("tips").activities
    assert (line.name, line.refused, line.uses, line.share) == ("training", 1, 0, 0.0)
