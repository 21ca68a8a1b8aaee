"""What every store must do, and that all do the same to the byte.

The rules are one piece of code; a store only keeps their state. So the same requests at the same
times must leave the same chains, totals and answers in memory, in SQLite and in PostgreSQL.
"""

from __future__ import annotations

import itertools
import random
import threading

import pytest

from accountant import (
    Accountant,
    AccountantError,
    BudgetClosed,
    BudgetExceeded,
    BudgetExists,
    DatasetCovered,
    InvalidRequest,
    KeyReused,
    LedgerCorrupt,
    ReservationError,
    UnitMismatch,
    UnknownBudget,
)
from accountant.entries import Kind, unpack
from dp import Gaussian, Laplace, PoissonSampled, PureDP, adaptive, planned, pure

KINDS = ("memory", "sqlite", "postgres")
ASK = {"unit": "article", "activity": "survey"}
ONE, STEP = PureDP(1.0), PoissonSampled(0.01, Gaussian(1.0))


@pytest.fixture
def place(request, tmp_path):
    """Return a location for a kind of store."""

    def of(kind):
        if kind == "postgres":
            return request.getfixturevalue("new_database")()
        return "memory:" if kind == "memory" else tmp_path / f"{kind}.db"

    return of


@pytest.fixture(params=KINDS)
def books(request, place):
    with Accountant.open(place(request.param)) as accountant:
        accountant.create_budget("news", adaptive(3.0, 1e-6), unit="article")
        accountant.create_budget("tips", pure(10.0), unit="article")
        yield accountant
        assert accountant.verify().clean


def entries(accountant, budget):
    with accountant._store.snapshot() as snapshot:
        return [unpack(body) for _, body, _ in snapshot.entries(budget)]


def test_exactly_what_fits_is_admitted_to_many_threads(books):
    told = []

    def ask():
        for _ in range(5):
            try:
                books.charge("tips", ONE, **ASK)
                told.append("charged")
            except BudgetExceeded:
                told.append("refused")

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (told.count("charged"), told.count("refused")) == (9, 31)
    assert books.statement("tips").refused == 31


def test_a_second_accountant_sees_the_charges_of_the_first(place, books):
    if type(books._store).__name__ == "MemoryStore":
        pytest.skip("a ledger in memory has one process")
    location = books._store.url.render_as_string(hide_password=False)
    with Accountant.open(location) as other:
        for turn in range(4):
            (books, other)[turn % 2].charge("tips", ONE, **ASK)
        assert other.uses_that_fit("tips", ONE) == books.uses_that_fit("tips", ONE) == 5


def test_reservations(books):
    reservation = books.reserve("news", STEP, uses=10, **ASK)
    reservation.mark(4)
    with pytest.raises(ReservationError, match="6 of 10 uses left, 7 asked"):
        reservation.mark(7)
    reservation.settle()
    with pytest.raises(ReservationError, match="no open reservation"):
        reservation.mark()
    assert dict(books.statement("news").spent) == {STEP: 4}
    books.reserve("news", STEP, uses=3, **ASK).void()
    assert dict(books.statement("news").spent) == {STEP: 4}


def test_adoption_shuts_the_old_holder_out(books):
    lost = books.reserve("news", STEP, uses=10, **ASK)
    lost.mark(3)
    with pytest.raises(ReservationError, match="another event"):
        books.adopt(lost.holds, Gaussian(3.0))
    found = books.adopt(lost.holds, STEP)
    assert (found.uses, found.marked, found.remaining) == (10, 3, 7)
    for act in (lost.mark, lost.settle, lost.void):
        with pytest.raises(ReservationError, match="another holder"):
            act()
    found.mark(2)
    found.settle()
    assert dict(books.statement("news").spent) == {STEP: 5}
    assert [entry.kind for entry in entries(books, "news")][2:] == [
        Kind.MARK,
        Kind.ADOPT,
        Kind.MARK,
        Kind.SETTLE,
    ]


def test_a_lease_is_never_adopted(books):
    lease = books.lease("tips", ONE, **ASK)
    lease.mark()
    with pytest.raises(ReservationError, match="is a lease"):
        books.adopt(lease._holds, ONE)
    lease.close()
    assert books.uses_that_fit("tips", ONE) == 8


def test_a_lease_gives_every_use_and_no_more(books):
    events = Laplace(100.0)
    fit = books.uses_that_fit("tips", events)
    taken = 0
    lease = books.lease("tips", events, **ASK, block=64)
    with pytest.raises(BudgetExceeded):
        while True:
            lease.mark()
            taken += 1
    assert taken == fit
    lease.close()
    assert books.uses_that_fit("tips", events) == 0
    assert dict(books.statement("tips").spent) == {events: fit}


def test_what_a_lease_did_not_use_comes_back(books):
    with books.lease("tips", Laplace(100.0), **ASK, block=64) as lease:
        for _ in range(100):
            lease.mark()
    assert dict(books.statement("tips").spent) == {Laplace(100.0): 100}
    with pytest.raises(ReservationError, match="has ended"):
        lease.mark()
    forfeit = books.lease("tips", Laplace(100.0), **ASK)
    with pytest.raises(ZeroDivisionError), forfeit:
        for _ in range(10):
            forfeit.mark()
        raise ZeroDivisionError
    assert dict(books.statement("tips").spent)[Laplace(100.0)] >= 110


def test_a_quota_is_charged_with_its_budget_or_not_at_all(books):
    books.create_quota("team", pure(3.0), of="tips")
    with pytest.raises(InvalidRequest, match="guarantees nothing by itself"):
        books.charge("team", ONE, **ASK)
    receipt = books.charge(("tips", "team"), ONE, **ASK)
    assert [each.budget for each in (receipt, *receipt.linked)] == ["tips", "team"]
    books.charge(("tips", "team"), ONE, **ASK)
    with pytest.raises(BudgetExceeded, match="'team'"):
        books.charge(("tips", "team"), ONE, **ASK)
    assert books.uses_that_fit("tips", ONE) == 7
    assert books.statement("tips").refused == 0
    assert books.statement("team").refused == 1
    first, second = entries(books, "tips")[1], entries(books, "team")[1]
    assert (first.chains, second.link.hex()) == (2, receipt.digest)


def test_several_datasets_and_a_quota_at_once_with_a_reservation(books):
    books.create_quota("team", adaptive(1.0, 1e-7), of="news")
    both = books.reserve(("news", "tips", "team"), PureDP(0.1), uses=5, **ASK)
    both.mark(2)
    both.settle()
    for name in ("news", "tips", "team"):
        assert dict(books.statement(name).spent) == {PureDP(0.1): 2}
    lost = books.reserve(("news", "team"), PureDP(0.1), uses=2, **ASK)
    for part in lost.holds:
        with pytest.raises(ReservationError, match="held in 2 budgets; name all of them"):
            books.adopt((part,), PureDP(0.1))
    books.adopt(lost.holds, PureDP(0.1)).void()
    with books.lease(("news", "team"), PureDP(0.01), **ASK) as lease:
        for _ in range(20):
            lease.mark()
    assert dict(books.statement("team").spent) == {PureDP(0.1): 2, PureDP(0.01): 20}


def test_a_read_outside_the_guarantee_is_in_every_chain_and_in_no_lane(books):
    books.create_quota("team", pure(3.0), of="tips")
    receipt = books.record_unprotected(("tips", "team"), **ASK, note="ticket 7")
    assert [each.budget for each in (receipt, *receipt.linked)] == ["tips", "team"]
    first, second = entries(books, "tips")[1], entries(books, "team")[1]
    assert (first.kind, second.kind) == (Kind.UNPROTECTED, Kind.UNPROTECTED)
    assert (first.chains, second.link.hex()) == (2, receipt.digest)
    for name, fit in (("tips", 9), ("team", 2)):
        statement = books.statement(name)
        assert (statement.unprotected, statement.refused, statement.spent) == (1, 0, ())
        assert (statement.share, books.uses_that_fit(name, ONE)) == (0.0, fit)


@pytest.mark.parametrize("names", [(), ("tips", "tips"), ("tips", 3), ("tips", "absent")])
def test_budgets_that_cannot_be_charged_together(books, names):
    with pytest.raises((InvalidRequest, UnknownBudget)):
        books.charge(names, ONE, **ASK)
    assert books.uses_that_fit("tips", ONE) == 9


def test_a_quota_of_another_unit_a_quota_or_nothing(books):
    with pytest.raises(UnknownBudget):
        books.create_quota("team", pure(1.0), of="absent")
    books.create_quota("team", pure(1.0), of="tips")
    with pytest.raises(InvalidRequest, match="is a quota"):
        books.create_quota("part", pure(1.0), of="team")


def test_closed_is_closed(books):
    reservation = books.reserve("tips", ONE, uses=3, **ASK)
    reservation.mark()
    books.close_budget("tips", note="consent withdrawn")
    for act in (
        lambda: books.charge("tips", ONE, **ASK),
        lambda: books.reserve("tips", ONE, uses=1, **ASK),
        reservation.mark,
        lambda: books.close_budget("tips"),
        lambda: books.lease("tips", ONE, **ASK).mark(),
    ):
        with pytest.raises(BudgetClosed, match="'tips' is closed"):
            act()
    reservation.settle()
    statement = books.statement("tips")
    assert statement.closed
    assert dict(statement.spent) == {ONE: 1}


def test_a_second_budget_over_the_same_dataset(books):
    books.create_budget("a", pure(5.0), unit="article", dataset="sha256:aa")
    for more in (
        {"dataset": "sha256:aa"},
        {"dataset": "sha256:bb", "lineage": ["sha256:aa"]},
    ):
        with pytest.raises(DatasetCovered, match="budget 'a' is about the same dataset"):
            books.create_budget("b", pure(5.0), unit="article", **more)
    books.close_budget("a")
    with pytest.raises(DatasetCovered):
        books.create_budget("b", pure(5.0), unit="article", dataset="sha256:aa")
    books.create_budget("c", pure(5.0), unit="article", dataset="sha256:cc")


def test_superseding_carries_the_spend_over(books):
    books.create_budget("a", pure(5.0), unit="article", dataset="sha256:aa")
    books.charge("a", ONE, uses=2, **ASK)
    open_ = books.reserve("a", PureDP(0.5), uses=4, **ASK)
    more = {"unit": "article", "dataset": "sha256:aa", "supersedes": "a"}
    with pytest.raises(InvalidRequest, match="open reservations"):
        books.create_budget("b", pure(8.0), **more)
    open_.mark()
    open_.settle()
    with pytest.raises(BudgetExceeded):
        books.create_budget("b", pure(2.0), **more)
    with pytest.raises(UnitMismatch):
        books.create_budget("b", pure(8.0), **{**more, "unit": "author"})
    with pytest.raises(InvalidRequest, match="fingerprints"):
        books.create_budget("b", pure(8.0), **{**more, "dataset": "sha256:dd"})
    assert books.budgets() == ["a", "news", "tips"]
    books.create_budget("b", adaptive(8.0, 1e-6), **more)
    assert dict(books.statement("b").spent) == {ONE: 2, PureDP(0.5): 1}
    assert books.statement("a").closed
    with pytest.raises(BudgetClosed):
        books.charge("a", ONE, **ASK)
    with pytest.raises(DatasetCovered, match="'b'"):
        books.create_budget("c", pure(8.0), **more)
    books.create_budget("c", pure(8.0), **{**more, "supersedes": "b"})
    assert books.uses_that_fit("c", ONE) == 5


def test_spend_from_before_the_ledger_is_imported_with_the_budget(books):
    books.create_budget("a", pure(5.0), unit="article", imported=[(ONE, 2), (PureDP(0.5), 1)])
    assert books.uses_that_fit("a", ONE) == 2
    with pytest.raises(BudgetExceeded, match="6 x"):
        books.create_budget("b", pure(5.0), unit="article", imported=[(ONE, 6)])
    with pytest.raises(UnknownBudget):
        books.statement("b")


def test_a_correction_is_recorded_even_where_it_does_not_fit(place):
    for kind in KINDS:
        with Accountant.open(place(kind)) as books:
            books.create_budget("a", pure(3.5), unit="article")
            books.correct("a", ONE, uses=2, **ASK)
            assert books.verify().clean
            books.close_budget("a")
            books.correct("a", ONE, uses=2, **ASK)
            (checked,) = books.verify().budgets
            (problem,) = checked.problems
            assert problem.startswith("entry 4: exceeds the budget")
            assert books.uses_that_fit("a", ONE) == 0


def test_keys(books):
    ask = {**ASK, "key": "k", "payload": b"q"}
    first = books.charge("tips", ONE, **ask)
    books.keep_answer("tips", "k", b"spam")
    again = books.charge("tips", ONE, **ask)
    assert (again.seq, again.digest, again.answer) == (first.seq, first.digest, b"spam")
    for other in ({"payload": b"r"}, {"uses": 2}, {"activity": "x"}):
        with pytest.raises(KeyReused):
            books.charge("tips", ONE, **{**ask, **other})
    with pytest.raises(BudgetExists):
        books.create_budget("tips", pure(1.0), unit="article")


def test_a_request_waits_for_the_answer_of_one_with_its_key(books, monkeypatch):
    monkeypatch.setattr("accountant.accountant._WAIT_SECONDS", 60.0)
    ask = {**ASK, "key": "k", "payload": b"q"}
    books.charge("tips", ONE, **ask)
    timer = threading.Timer(0.2, books.keep_answer, ("tips", "k", b"spam"))
    timer.start()
    assert books.charge("tips", ONE, **ask).answer == b"spam"
    timer.join()


def script(seed):
    """Yield random requests; each is a function of the accountant."""
    choose = random.Random(seed)
    events = [PureDP(0.1), PureDP(0.25), Gaussian(60.0), Laplace(20.0), STEP]
    handles = []
    yield lambda a: a.create_budget(
        "p", planned(3.0, 1e-6, slots=((STEP, 30),)), unit="article", dataset="d"
    )
    yield lambda a: a.create_quota("q", pure(4.0), of="tips")

    def keep(a, budget, event, uses):
        handles.append(a.reserve(budget, event, uses=uses, **ASK))

    def act(a, what):
        if handles:
            handle = handles.pop(choose.randrange(len(handles)))
            what(a, handle)

    for _ in range(60):
        event, uses = choose.choice(events), choose.randint(1, 6)
        budget = choose.choice(["news", "tips", "p", ("tips", "q"), ("news", "tips")])
        marks, key = choose.randint(1, 5), f"k{choose.randint(0, 3)}"
        yield choose.choice(
            [
                lambda a, b=budget, e=event, u=uses: a.charge(b, e, uses=u, **ASK),
                lambda a, b=budget, e=event: a.charge(b, e, **ASK),
                lambda a, b=budget, e=event, k=key: a.charge(b, e, key=k, **ASK).answer,
                lambda a, k=key: a.keep_answer("tips", k, b"answer"),
                lambda a, b=budget, e=event, u=uses: keep(a, b, e, u),
                lambda a, m=marks: act(a, lambda _, h: (h.mark(m), handles.append(h))),
                lambda a: act(a, lambda _, h: h.settle()),
                lambda a: act(a, lambda _, h: h.void()),
                lambda a: act(a, lambda a, h: handles.append(a.adopt(h.holds, h.event))),
                lambda a, e=event: a.correct("news", e, **ASK) and None,
                lambda a, b=budget: a.record_unprotected(b, **ASK, note="ticket 7"),
            ]
        )
    yield lambda a: a.create_budget(
        "s", planned(4.0, 1e-6, slots=((STEP, 40),)), unit="article", dataset="d", supersedes="p"
    )


def played(location, seed, monkeypatch):
    """Run a script; return what every request came to, and every chain, row and total."""
    clock = itertools.count(1)
    monkeypatch.setattr("accountant.writer.time.time_ns", lambda: next(clock) * 1000)
    monkeypatch.setattr("accountant.accountant._WAIT_SECONDS", -1.0)
    told = []
    with Accountant.open(location) as accountant:
        accountant.create_budget("news", adaptive(3.0, 1e-6), unit="article")
        accountant.create_budget("tips", pure(10.0), unit="article")
        for request in script(seed):
            try:
                told.append(repr(request(accountant)))
            except AccountantError as error:
                told.append(f"{type(error).__name__}: {error}")
        problems = [
            problem
            for checked in accountant.verify().budgets
            for problem in checked.problems
            if "exceeds the budget" not in problem
        ]
        assert not problems
        state = []
        with accountant._store.snapshot() as snapshot:
            for name in snapshot.budgets():
                state.append(tuple(snapshot.row(name)))
                state.append([tuple(row) for row in snapshot.entries(name)])
                state.append(sorted(tuple(row) for row in snapshot.events(name)))
                rows = sorted(snapshot.reservations(name))
                state.append([[*row[:4], *row[5:]] for row in rows])  # the holder is random
                state.append(sorted(tuple(row) for row in snapshot.keys(name)))
                state.append(sorted(snapshot.spent(name)))
    return told, state


@pytest.mark.parametrize("seed", range(6))
def test_all_stores_keep_the_same_to_the_byte(place, tmp_path, seed, monkeypatch):
    plays = {kind: played(place(kind), seed, monkeypatch) for kind in KINDS}
    assert plays["sqlite"] == plays["memory"]
    assert plays["postgres"] == plays["memory"]
    assert sum("Receipt" in told for told in plays["memory"][0]) > 4


@pytest.mark.parametrize("ledgers", [10, pytest.param(1000, marks=pytest.mark.long)])
def test_verify_raises_no_false_alarm(ledgers, monkeypatch):
    """``played`` verifies at its end; a correction beyond the budget is no false alarm."""
    entries = 0
    for seed in range(100, 100 + ledgers):
        _, state = played("memory:", seed, monkeypatch)
        entries += sum(row[2] for row in state if isinstance(row, tuple))
        monkeypatch.undo()
    print(f"{ledgers} random ledgers of {entries} entries in all: no false alarm")


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_triggers_refuse_what_is_not_appended(place, kind):
    location = place(kind)
    with Accountant.open(location) as accountant:
        accountant.create_budget("tips", pure(10.0), unit="article")
        accountant.charge("tips", ONE, **ASK, key="k")
        accountant.keep_answer("tips", "k", b"spam")
        accountant.reserve("tips", ONE, uses=2, **ASK).mark()
        accountant.close_budget("tips")
        for statement in (
            "UPDATE epsledger_entry SET seq = 9 WHERE seq = 1",
            "DELETE FROM epsledger_entry",
            "UPDATE epsledger_event SET price = encoded",
            "DELETE FROM epsledger_event",
            "UPDATE epsledger_budget SET record = head",
            "UPDATE epsledger_budget SET seq = 1",
            "UPDATE epsledger_budget SET closed = (1 = 0)",
            "DELETE FROM epsledger_budget",
            "UPDATE epsledger_reservation SET marked = 0",
            "UPDATE epsledger_reservation SET uses = 9",
            "DELETE FROM epsledger_reservation",
            "UPDATE epsledger_key SET answer = payload",
            "UPDATE epsledger_ledger SET id = 'x'",
            "DELETE FROM epsledger_ledger",
        ):
            with (
                pytest.raises(LedgerCorrupt, match="append-only"),
                accountant._store.transaction(frozenset()),
            ):
                if kind == "postgres":
                    accountant._store._driver.execute(statement)
                else:
                    accountant._store._execute(statement, ())
        assert accountant.verify().clean
