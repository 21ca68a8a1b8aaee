"""Reservations: reserve, mark, settle or void; what happens when nobody settles."""

from __future__ import annotations

import copy
import logging
import pickle

import pytest

from accountant import Accountant, BudgetExceeded, Reservation, ReservationError
from dp import Gaussian, InvalidParameter, PoissonSampled, PureDP

ASK = {"unit": "article", "activity": "training"}
STEP = PoissonSampled(0.01, Gaussian(1.0))


def price_of(accountant: Accountant, budget: str, event: object) -> tuple[int, ...]:
    return accountant.budget(budget).filter.price(event)


def capped(accountant: Accountant, budget: str, event: object, uses: int) -> tuple[int, ...]:
    """What so many uses add, written out once more."""
    limits = accountant.budget(budget).filter.limits
    prices = price_of(accountant, budget, event)
    return tuple(
        min(uses * price, max(limit, -1) + 1) for price, limit in zip(prices, limits, strict=True)
    )


def test_the_whole_life_of_a_reservation(accountant, location, totals_of):
    def spent(uses: int) -> bool:
        return totals_of(location, "news") == capped(accountant, "news", STEP, uses)

    reservation = accountant.reserve("news", STEP, uses=100, **ASK)
    assert (reservation.uses, reservation.marked, reservation.remaining) == (100, 0, 100)
    assert spent(100)
    for _ in range(30):
        reservation.mark()
    reservation.mark(uses=12)
    assert (reservation.marked, reservation.remaining) == (42, 58)
    assert spent(100)
    assert accountant.statement("news").open_reservations == ((2, 100, 42),)
    reservation.settle()
    assert spent(42)
    assert reservation.remaining == 0
    assert accountant.statement("news").open_reservations == ()
    assert accountant.verify().clean


@pytest.mark.parametrize("marked", [0, 1, 4, 5])
def test_settling_returns_exactly_the_unmarked_uses(accountant, location, totals_of, marked):
    (price,) = price_of(accountant, "tips", PureDP(1.0))
    accountant.charge("tips", PureDP(1.0), **ASK)
    before = accountant.uses_that_fit("tips", PureDP(1.0))
    with accountant.reserve("tips", PureDP(1.0), uses=5, **ASK) as reservation:
        assert accountant.uses_that_fit("tips", PureDP(1.0)) == before - 5
        for _ in range(marked):
            reservation.mark()
    assert totals_of(location, "tips") == ((1 + marked) * price,)
    assert accountant.uses_that_fit("tips", PureDP(1.0)) == before - marked


def test_settling_gives_back_what_a_capped_lane_was_charged(accountant, location, totals_of):
    """A lane that cannot bound the event stops one above its limit; another spend still counts."""
    other = accountant.charge("news", PureDP(0.01), uses=3, **ASK)
    assert other.seq == 2
    before = totals_of(location, "news")
    accountant.reserve("news", STEP, uses=50, **ASK).settle()
    assert totals_of(location, "news") == before


def test_voiding_costs_nothing_and_only_before_the_first_mark(accountant, location, totals_of):
    before = totals_of(location, "news")
    reservation = accountant.reserve("news", STEP, uses=10, **ASK)
    reservation.void()
    assert totals_of(location, "news") == before
    assert reservation.remaining == 0
    reservation = accountant.reserve("news", STEP, uses=10, **ASK)
    reservation.mark()
    with pytest.raises(ReservationError, match="settle it instead"):
        reservation.void()
    assert totals_of(location, "news") == capped(accountant, "news", STEP, 10)
    reservation.settle()
    assert totals_of(location, "news") == capped(accountant, "news", STEP, 1)


def test_more_marks_than_uses_are_refused(accountant, location, digest_of):
    reservation = accountant.reserve("news", STEP, uses=3, **ASK)
    reservation.mark(2)
    before = digest_of(location)
    with pytest.raises(ReservationError, match="1 of 3 uses left, 2 asked"):
        reservation.mark(2)
    assert digest_of(location) == before
    reservation.mark()
    with pytest.raises(ReservationError, match="0 of 3 uses left"):
        reservation.mark()
    for uses in (0, -1, 2**53, 1.0, True):
        with pytest.raises(InvalidParameter):
            reservation.mark(uses)
    assert reservation.marked == 3


@pytest.mark.parametrize("end", ["settle", "void"])
@pytest.mark.parametrize("then", ["mark", "settle", "void"])
def test_an_ended_reservation_does_nothing_more(accountant, location, digest_of, end, then):
    reservation = accountant.reserve("news", STEP, uses=3, **ASK)
    getattr(reservation, end)()
    before = digest_of(location)
    with pytest.raises(ReservationError, match="no open reservation 2"):
        getattr(reservation, then)()
    assert digest_of(location) == before


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_forfeits(accountant, location, totals_of, caplog, error):
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(error),
        accountant.reserve("news", STEP, uses=20, **ASK) as reservation,
    ):
        reservation.mark(3)
        raise error
    assert totals_of(location, "news") == capped(accountant, "news", STEP, 20)
    assert accountant.statement("news").open_reservations == ((2, 20, 3),)
    assert error.__name__ in caplog.text
    assert "20" in caplog.text
    assert accountant.verify().clean


def test_a_block_that_ends_its_reservation_itself(accountant, location, totals_of):
    with accountant.reserve("news", STEP, uses=20, **ASK) as reservation:
        reservation.mark(3)
        reservation.settle()
    assert totals_of(location, "news") == capped(accountant, "news", STEP, 3)
    with accountant.reserve("news", STEP, uses=20, **ASK) as reservation:
        reservation.void()
    assert totals_of(location, "news") == capped(accountant, "news", STEP, 3)


def test_a_reservation_that_does_not_fit_takes_nothing(accountant, location, totals_of):
    with pytest.raises(BudgetExceeded) as refusal:
        accountant.reserve("tips", PureDP(1.0), uses=10, **ASK)
    assert (refusal.value.requested, refusal.value.remaining) == (10, 9)
    assert totals_of(location, "tips") == (0,)
    assert accountant.statement("tips").open_reservations == ()


def test_an_open_reservation_leaves_no_room_for_others(accountant):
    reservation = accountant.reserve("tips", PureDP(1.0), uses=9, **ASK)
    with pytest.raises(BudgetExceeded):
        accountant.charge("tips", PureDP(1.0), **ASK)
    reservation.settle()
    accountant.charge("tips", PureDP(1.0), **ASK)


@pytest.mark.parametrize("act", ["mark", "settle", "void"])
def test_only_the_holder(accountant, location, digest_of, act):
    reservation = accountant.reserve("news", STEP, uses=3, **ASK)
    thief = Reservation(
        accountant._writer,
        reservation.receipt,
        STEP,
        uses=3,
        holds=reservation.holds,
        holder="someone else",
    )
    before = digest_of(location)
    with pytest.raises(ReservationError, match="another holder"):
        getattr(thief, act)()
    assert digest_of(location) == before


def test_a_reservation_cannot_be_copied_or_pickled(accountant):
    reservation = accountant.reserve("news", STEP, uses=3, **ASK)
    for duplicate in (copy.copy, pickle.dumps):
        with pytest.raises(ReservationError, match="belongs to the process"):
            duplicate(reservation)
    assert reservation.mark().seq == 3


def test_a_reservation_cannot_be_copied_deeply(accountant):
    reservation = accountant.reserve("news", STEP, uses=3, **ASK)
    with pytest.raises(ReservationError, match="belongs to the process"):
        copy.deepcopy(reservation)


def test_reservations_are_independent(accountant, location, totals_of):
    first = accountant.reserve("tips", PureDP(1.0), uses=4, **ASK)
    second = accountant.reserve("tips", PureDP(1.0), uses=4, **ASK)
    first.mark(2)
    second.mark(1)
    first.settle()
    (price,) = price_of(accountant, "tips", PureDP(1.0))
    assert totals_of(location, "tips") == (6 * price,)
    assert accountant.statement("tips").open_reservations == ((3, 4, 1),)
    second.settle()
    assert totals_of(location, "tips") == (3 * price,)


def test_an_open_reservation_survives_its_accountant(location, accountant):
    accountant.reserve("tips", PureDP(1.0), uses=4, **ASK).mark()
    accountant.close()
    with Accountant.open(location) as reopened:
        assert reopened.uses_that_fit("tips", PureDP(1.0)) == 5
        assert reopened.statement("tips").open_reservations == ((2, 4, 1),)
