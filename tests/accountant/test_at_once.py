"""Threads, forks, signals and broken connections: nobody is held up, nothing is spent twice."""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import suppress

import psycopg
import pytest
from sqlalchemy import make_url

from accountant import (
    Accountant,
    BudgetExceeded,
    DatasetCovered,
    LedgerUnavailable,
    OutcomeUnknown,
    ReservationError,
)
from accountant import writer as writer_module
from accountant.ledger import decide
from accountant.requests import Charge
from dp import Laplace, NeighboringRelation, PureDP, adaptive, pure
from tests.accountant.ledgers import ALICE, ASK, LIMITS, TENTH, in_one_batch, plain, spent

ADD_REMOVE = NeighboringRelation.ADD_REMOVE


def test_the_price_in_a_budget_that_was_refused(books, location):
    half = PureDP(0.5)
    outcomes = in_one_batch(
        location,
        lambda: books.create_budget(
            "x", adaptive(1.0, 1e-6), unit="article", imported=[(half, 100)]
        ),
        lambda: books.create_budget("x", LIMITS, unit="article"),
        lambda: books.charge("x", half, **ASK),
    )
    assert isinstance(outcomes[0], BudgetExceeded)
    assert spent(books, half, "x") == 1
    assert books.verify().clean


def test_reading_while_the_same_process_charges(books):
    done = threading.Event()

    def spend():
        while not done.is_set():
            books.charge("d", PureDP(1e-9), **ASK)

    threads = [threading.Thread(target=spend) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(60):
            assert books.verify().clean
            books.statement("d")
            books.checkpoint(ALICE)
    finally:
        done.set()
        for thread in threads:
            thread.join()


def test_a_defect_of_one_request_is_not_the_others(books, location, monkeypatch):
    def broken(tx, request, now):
        if isinstance(request.event, Laplace):
            raise ZeroDivisionError(request.event)
        return decide(tx, request, now)

    monkeypatch.setattr(writer_module, "decide", broken)
    outcomes = in_one_batch(
        location,
        lambda: books.charge("d", TENTH, **ASK),
        lambda: books.charge("d", TENTH, **ASK),
        lambda: books.charge("d", Laplace(50.0), **ASK),
        lambda: books.charge("d", TENTH, **ASK),
    )
    assert isinstance(outcomes[2], ZeroDivisionError)
    assert sorted(outcomes[at].seq for at in (0, 1, 3)) == [2, 3, 4]


def test_whoever_holds_the_turn_for_ever(books, location):
    folder = os.open(location.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        began = time.monotonic()
        assert books.charge("d", TENTH, **ASK).seq == 2
        assert time.monotonic() - began < 30
    finally:
        os.close(folder)


def test_a_fork_while_a_lease_refills(books):
    lease = books.lease("d", PureDP(1e-9), block=1, **ASK)
    done = threading.Event()

    def mark():
        while not done.is_set():
            lease.mark()

    thread = threading.Thread(target=mark)
    thread.start()
    try:
        for _ in range(10):
            child = os.fork()
            if not child:
                for use in (lease.mark, lease.close):
                    try:
                        use()
                    except ReservationError:
                        continue
                    os._exit(1)
                os._exit(0)
            deadline = time.monotonic() + 60
            while not (ended := os.waitpid(child, os.WNOHANG))[0]:
                if time.monotonic() > deadline:
                    os.kill(child, signal.SIGKILL)
                time.sleep(0.005)
            assert os.waitstatus_to_exitcode(ended[1]) == 0
    finally:
        done.set()
        thread.join()
    lease.close()


_SAME_NUMBER = """
import ctypes, os, sys
from accountant import Accountant, AccountantError
from dp import PureDP
accountant = Accountant.open(sys.argv[1])
lease = accountant.lease("d", PureDP(1e-6), unit="article", activity="survey")
for _ in range(300):
    lease.mark()
assert os.getpid() == 1 and lease._left
if ctypes.CDLL(None).unshare(0x20000000):
    sys.exit(2)
child = os.fork()
if not child:
    assert os.getpid() == 1
    for use in (lease.mark, lambda: accountant.charge("d", PureDP(1e-6), unit="article", activity="x")):
        try:
            use()
        except AccountantError:
            continue
        os._exit(1)
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="needs root")
def test_a_child_with_the_number_of_its_parent(books, location):
    done = subprocess.run(
        ["unshare", "--pid", "--fork", sys.executable, "-c", _SAME_NUMBER, location],
        check=False,
        capture_output=True,
        timeout=60,
    )
    if done.returncode == 2 or b"unshare failed" in done.stderr:
        pytest.skip("no process namespaces here")
    assert done.returncode == 0, done.stderr


_INTERRUPTED = """
import random, signal, sys, time
from accountant import Accountant
from dp import PureDP

class Interrupt(BaseException):
    pass

def interrupt(*_):
    raise Interrupt

accountant = Accountant.open(sys.argv[1])
signal.signal(signal.SIGALRM, interrupt)
released, interrupts, end = 0, 0, time.monotonic() + 60
while interrupts < int(sys.argv[2]) and time.monotonic() < end:
    try:
        signal.setitimer(signal.ITIMER_REAL, random.random() * 0.003)
        while True:
            accountant.charge("d", PureDP(1e-9), unit="article", activity="survey")
            released += 1
    except Interrupt:
        interrupts += 1
signal.setitimer(signal.ITIMER_REAL, 0)
accountant.close()
print(released, interrupts)
"""


def test_interrupts_at_any_time(books, location):
    done = subprocess.run(
        [sys.executable, "-c", _INTERRUPTED, location, "600"],
        check=True,
        capture_output=True,
        timeout=120,
        text=True,
    )
    released, interrupts = map(int, done.stdout.split())
    print(f"{interrupts} interrupts: {released} released, {books.statement('d').lines[-1]}")
    assert interrupts > 100
    assert books.statement("d").spent[0][1] >= released
    assert books.verify().clean


@pytest.mark.parametrize("level", ["read committed", "repeatable read", "serializable"])
def test_one_budget_for_one_dataset_at_any_isolation(new_database, level):
    location = new_database()
    url = make_url(location).set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(url, autocommit=True) as admin:
        database = make_url(location).database
        admin.execute(f"ALTER DATABASE {database} SET default_transaction_isolation = '{level}'")
    clients = [Accountant.open(location) for _ in range(2)]
    with psycopg.connect(url) as other:
        other.execute("SELECT * FROM epsledger_ledger FOR UPDATE")
        outcomes = {}

        def create(number):
            try:
                clients[number].create_budget(
                    f"n{number}", LIMITS, unit="article", dataset="sha256:1"
                )
            except DatasetCovered:
                outcomes[number] = "covered"
            else:
                outcomes[number] = "created"

        threads = [threading.Thread(target=create, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        time.sleep(0.5)
        other.rollback()
        for thread in threads:
            thread.join()
    for client in clients:
        client.close()
    assert sorted(outcomes.values()) == ["covered", "created"]


def test_reading_after_a_commit_that_failed(books, monkeypatch):
    def fail():
        raise sqlite3.OperationalError("disk I/O error")

    books.charge("d", TENTH, **ASK)
    with monkeypatch.context() as broken:
        broken.setattr(books._store, "_commit", fail)
        with pytest.raises(OutcomeUnknown):
            books.charge("d", TENTH, **ASK)
    assert books.statement("d").seq == 2
    assert books.charge("d", TENTH, **ASK).seq == 3


def test_reading_before_the_first_write_keeps_the_isolation(new_database):
    """The pool gives back a connection that was read from at the isolation of its engine."""
    location = new_database()
    with psycopg.connect(plain(location), autocommit=True) as admin:
        database = make_url(location).database
        admin.execute(
            f"ALTER DATABASE {database} SET default_transaction_isolation = 'serializable'"
        )
    with Accountant.open(location) as accountant:
        assert accountant.budgets() == []
        accountant.create_budget("d", LIMITS, unit="article")
        driver = accountant._store._driver
        assert driver.execute("SHOW transaction_isolation").fetchone() == ("read committed",)
        driver.rollback()


def test_a_reader_that_loses_its_connection_is_its_own_problem(new_database):
    with Accountant.open(new_database()) as accountant:
        accountant.create_budget("d", pure(1e3), unit="article")
        accountant.charge("d", TENTH, **ASK)
        store = accountant._store
        with (
            pytest.raises(LedgerUnavailable),
            store.snapshot() as snapshot,
        ):
            backend = "SELECT pg_backend_pid()"
            (pid,) = snapshot._connection.exec_driver_sql(backend).one()
            store._driver.execute("SELECT pg_terminate_backend(%s)", (pid,))
            store._driver.commit()
            before = store._connection
            snapshot.row("d")
        assert store._connection is before
        assert accountant.charge("d", TENTH, **ASK).seq == 3


def test_an_event_that_is_long_to_price_holds_nobody_up(books, location):
    """It is priced before its request waits for the lock."""
    books.create_budget("e", LIMITS, unit="article")
    books.charge("d", TENTH, **ASK)
    slow, started, served = threading.Event(), threading.Event(), []

    class Slow(PureDP):
        def __hash__(self):
            return hash(self.epsilon)

    price = type(LIMITS).price

    def waiting(self, event):
        if isinstance(event, Slow):
            started.set()
            assert slow.wait(60)
            event = PureDP(event.epsilon)
        return price(self, event)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(LIMITS), "price", waiting)

        def ask():
            with suppress(Exception):
                books.charge("d", Slow(0.1), **ASK)

        thread = threading.Thread(target=ask)
        thread.start()
        assert started.wait(60)
        served.append(books.charge("e", TENTH, **ASK))
        slow.set()
        thread.join()
    assert served


def test_a_signal_that_closes_the_lease_it_interrupted(books):
    lease = books.lease("d", PureDP(1e-4), **ASK)
    submit, said = books._writer.submit, []

    def interrupted(request):
        with pytest.raises(ReservationError, match="signal handler") as refusal:
            lease.close()
        said.append(refusal.value)
        return submit(request)

    books._writer.submit = interrupted
    lease.mark()
    books._writer.submit = submit
    lease.close()
    assert said
    assert books.verify().clean


def test_asking_after_closing(books):
    books.close()
    with pytest.raises(LedgerUnavailable, match="closed; open the ledger again"):
        books.charge("d", TENTH, **ASK)
    with suppress(LedgerUnavailable):
        books.statement("d")


def test_a_writer_that_does_not_end_keeps_its_ledger_open(books, monkeypatch):
    monkeypatch.setattr(writer_module, "PATIENCE_SECONDS", 0.2)
    begin, go_on = books._store._begin, threading.Event()
    monkeypatch.setattr(books._store, "_begin", lambda names: go_on.wait(60) and begin(names))
    ask = books._writer.enqueue(Charge(("d",), TENTH, 1, "article", ADD_REMOVE, "survey"))
    time.sleep(0.05)
    books.close()
    assert not ask.done()
    go_on.set()
    assert ask.result(60).seq == 2


def test_the_event_loop_prices_nothing_ahead(books, monkeypatch):
    monkeypatch.setattr(writer_module, "price_ahead", lambda *_: pytest.fail("priced"))
    assert asyncio.run(books.acharge("d", TENTH, **ASK)).seq == 2
