"""Holds, keys, corrections and successors that reach several budgets."""

from __future__ import annotations

import os
import signal

import psycopg
import pytest

from accountant import Accountant, BudgetClosed, InvalidRequest, KeyReused, ReservationError
from dp import Gaussian, Laplace, PureDP, planned
from tests.accountant.ledgers import ALICE, ASK, LIMITS, TENTH, spent


def test_a_hold_that_is_named_twice(books):
    books.create_quota("q", LIMITS, of="d")
    books.charge("d", TENTH, uses=5, **ASK)
    held = books.reserve(("d", "q"), TENTH, uses=4, **ASK)
    for holds in (
        (held.holds[0], held.holds[0]),
        (),
        (("d",),),
        (("d", 2**70),),
        (("\ud800", 2),),
        (("d", "2"),),
    ):
        with pytest.raises((InvalidRequest, ValueError), match=r"hold|seq|budget"):
            books.adopt(holds, TENTH)
    books.adopt([list(hold) for hold in held.holds], TENTH).settle()
    assert spent(books) == 5
    assert books.verify().clean


def test_parts_of_two_reservations_are_not_one(books):
    books.create_budget("e", LIMITS, unit="article")
    first = books.reserve(("d", "e"), TENTH, uses=2, **ASK)
    second = books.reserve(("d", "e"), TENTH, uses=2, **ASK)
    with pytest.raises(ReservationError, match="another one"):
        books.adopt((first.holds[0], second.holds[1]), TENTH)


def test_a_correction_reaches_what_supersedes(books):
    books.create_budget("d2", LIMITS, unit="article", dataset="sha256:1", supersedes="d")
    with pytest.raises(InvalidRequest, match="superseded by 'd2'"):
        books.correct("d", TENTH, uses=5, **ASK)
    books.correct(("d", "d2"), TENTH, uses=5, **ASK)
    assert spent(books, budget="d2") == 5
    assert books.verify().clean


def test_a_correction_beyond_a_plan_is_one_contradiction(books):
    survey = Gaussian(10.0)
    for name, event, uses in (("p", Laplace(0.1), 1), ("q", survey, 100_000)):
        books.create_budget(name, planned(2.0, 1e-6, slots=[(survey, 5)]), unit="article")
        books.correct(name, event, uses=uses, **ASK)
    for checked in books.verify().budgets[1:]:
        (problem,) = checked.problems
        assert "the guarantee does not hold" in problem


def test_a_lost_lease_is_carried_over_in_full(books, location):
    child = os.fork()
    if not child:
        with Accountant.open(location) as accountant:
            accountant.lease("d", TENTH, block=2, **ASK).mark()
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    books.create_budget("d2", LIMITS, unit="article", dataset="sha256:1", supersedes="d")
    assert spent(books, budget="d2") == 9
    assert books.verify().clean


def test_budgets_are_sorted_whatever_the_database_sorts_by(new_database):
    collation = "LOCALE 'C' LOCALE_PROVIDER icu ICU_LOCALE 'en-US'"
    try:
        location = new_database(f"TEMPLATE template0 {collation}")
    except psycopg.errors.FeatureNotSupported:
        pytest.skip("this server has no other collation")
    with Accountant.open(location) as accountant:
        for budget in ("abc", "News"):
            accountant.create_budget(budget, LIMITS, unit="article")
        assert accountant.budgets() == ["News", "abc"]
        accountant.checkpoint(ALICE)


def test_an_answer_to_all_that_was_charged(books):
    books.create_quota("q", LIMITS, of="d")
    books.charge(["d", "q"], TENTH, key="k", **ASK)
    books.keep_answer(["d", "q"], "k", b"seven")
    assert books.charge(["d", "q"], TENTH, key="k", **ASK).answer == b"seven"


@pytest.mark.parametrize("budget", [None, 7, "\ud800", ""])
def test_an_answer_to_what_is_no_budget(books, budget):
    with pytest.raises((InvalidRequest, TypeError)):
        books.keep_answer(budget, "k", b"")
    assert books.charge("d", TENTH, **ASK).seq == 2


def test_a_stored_answer_outlives_its_budget(books):
    books.charge("d", TENTH, key="k", **ASK)
    books.keep_answer("d", "k", b"seven")
    books.close_budget("d")
    assert books.charge("d", TENTH, key="k", **ASK).answer == b"seven"
    with pytest.raises(BudgetClosed):
        books.charge("d", TENTH, key="other", **ASK)


def test_a_key_with_its_budgets_in_another_order(books):
    books.create_budget("e", LIMITS, unit="article")
    books.charge(("d", "e"), TENTH, key="k", **ASK)
    books.keep_answer(("d", "e"), "k", b"seven")
    with pytest.raises(KeyReused):
        books.charge(("e", "d"), TENTH, key="k", **ASK)
    assert books.charge(("d", "e"), TENTH, key="k", **ASK).answer == b"seven"


def test_no_quota_under_a_closed_budget(books):
    books.close_budget("d")
    with pytest.raises(BudgetClosed):
        books.create_quota("q", LIMITS, of="d")


def test_a_key_is_known_in_every_budget_it_was_charged_to(books):
    books.create_quota("team", LIMITS, of="d")
    first = books.charge(("d", "team"), TENTH, key="k", **ASK)
    books.keep_answer("d", "k", b"seven")
    again = books.charge(("d", "team"), TENTH, key="k", **ASK)
    assert (again.seq, again.answer) == (first.seq, b"seven")
    assert [each.digest for each in again.linked] == [each.digest for each in first.linked]
    for budgets in (("team", "d"), ("d",)):
        with pytest.raises(KeyReused):
            books.charge(budgets, TENTH, key="k", **ASK)
    books.create_budget("e", LIMITS, unit="article")
    with pytest.raises(KeyReused):
        books.charge(("e", "d", "team"), TENTH, key="k", **ASK)
    assert books.verify().clean


def test_the_first_commit_of_a_process_warns_too(location, caplog):
    with Accountant.open(location) as accountant:
        accountant.create_budget("d", LIMITS, unit="article")
    with Accountant.open(location) as accountant:
        accountant.charge("d", PureDP(0.97), **ASK)
        accountant.create_budget("e", LIMITS, unit="article", imported=[(PureDP(0.6), 1)])
    assert "budget 'd': 97%" in caplog.text
    assert "budget 'e': 60%" in caplog.text
