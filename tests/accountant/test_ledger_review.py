"""What a review of the ledger broke, each with the script that broke it."""

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
from contextlib import closing, suppress

import psycopg
import pytest
from click.testing import CliRunner
from sqlalchemy import event as sqlalchemy_event
from sqlalchemy import make_url, text

from accountant import (
    Accountant,
    AnchorInvalid,
    AnchorUnavailable,
    BudgetClosed,
    BudgetExceeded,
    DatasetCovered,
    InvalidRequest,
    KeyReused,
    LedgerCorrupt,
    LedgerUnavailable,
    OutcomeUnknown,
    ReservationError,
    UnknownBudget,
)
from accountant import writer as writer_module
from accountant.anchors import read_notes
from accountant.doctor import examine
from accountant.ledger import decide
from accountant.notes import Signer
from accountant.requests import Charge
from accountant.stores.postgres import role_statements
from accountant.stores.transaction import Transaction
from dp import Gaussian, Laplace, NeighboringRelation, PureDP, adaptive, planned, pure
from epsledger.cli import main
from tests.accountant.test_writer import in_one_batch

ASK = {"unit": "article", "activity": "survey"}
TENTH = PureDP(0.1)
LIMITS = pure(1.001)
ADD_REMOVE = NeighboringRelation.ADD_REMOVE
ALICE, BOB = Signer("alice", bytes(32)), Signer("bob", bytes(range(32)))


@pytest.fixture
def books(location):
    with Accountant.open(location) as accountant:
        accountant.create_budget("d", LIMITS, unit="article", dataset="sha256:1")
        yield accountant


def put_back(older, location):
    for suffix in ("", "-wal", "-shm"):
        location.with_name(location.name + suffix).unlink(missing_ok=True)
    shutil.copy(older, location)


def spent(accountant, event=TENTH, budget="d"):
    """Charge one by one until it is refused; return how many were charged."""
    for charged in range(100):
        try:
            accountant.charge(budget, event, **ASK)
        except BudgetExceeded:
            return charged
    return 100


def test_a_ledger_from_before_a_budget_was_made(location, tmp_path):
    with Accountant.open(location) as accountant:
        accountant.create_budget("other", LIMITS, unit="article")
        accountant.backup(tmp_path / "older.db")
        accountant.create_budget("d", LIMITS, unit="article", dataset="sha256:1")
        accountant.charge("d", TENTH, uses=9, **ASK)
    put_back(tmp_path / "older.db", location)
    with Accountant.open(location) as accountant:
        verification = accountant.verify()
        assert not verification.clean
        assert "went back to entry 0" in verification.budgets[0].problems[0]
        for name in ("d", "d-2"):
            with pytest.raises(LedgerCorrupt, match="'d' went back to entry 0"):
                accountant.create_budget(name, LIMITS, unit="article", dataset="sha256:1")
        with pytest.raises(LedgerCorrupt, match="went back"):
            accountant.checkpoint(ALICE)
        assert accountant.charge("other", TENTH, **ASK).seq == 2


_GO_ON = """
import sys
from accountant import Accountant
from dp import PureDP
with Accountant.open(sys.argv[1]) as accountant:
    for _ in range(12):
        accountant.charge("d", PureDP(0.001), unit="article", activity="elsewhere")
"""


def test_a_fork_that_went_past_what_a_running_process_saw(books, location, tmp_path, monkeypatch):
    books.backup(tmp_path / "older.db")
    for _ in range(5):
        books.charge("d", TENTH, **ASK)
    # The same file, as a failover is the same address; clients elsewhere go on with it.
    with (
        closing(sqlite3.connect(tmp_path / "older.db")) as older,
        closing(sqlite3.connect(location)) as now,
    ):
        older.backup(now)
    environment = {**os.environ, "EPSLEDGER_STATE": str(tmp_path / "elsewhere")}
    subprocess.run([sys.executable, "-c", _GO_ON, location], env=environment, check=True)
    for _ in range(2):
        with pytest.raises(LedgerCorrupt, match="on from a copy"):
            books.charge("d", TENTH, **ASK)
    assert not books.verify().clean


def test_a_postgres_failover_that_went_past_what_a_running_process_saw(
    new_database, tmp_path, postgres_server
):
    location, copy = new_database(), f"copy_{os.getpid()}"
    name = make_url(location).database
    server = make_url(postgres_server).set(drivername="postgresql")

    def alone(*statements):
        with psycopg.connect(server.render_as_string(False), autocommit=True) as admin:
            for statement in statements:
                admin.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    " WHERE datname IN (%s, %s)",
                    (name, copy),
                )
                time.sleep(0.2)
                admin.execute(statement)

    with Accountant.open(location) as accountant:
        accountant.create_budget("d", LIMITS, unit="article")
        alone(f"CREATE DATABASE {copy} TEMPLATE {name}")
        for _ in range(6):
            with suppress(LedgerUnavailable):  # the first finds its connection gone
                accountant.charge("d", TENTH, **ASK)
        alone(f"DROP DATABASE {name}", f"ALTER DATABASE {copy} RENAME TO {name}")
        environment = {**os.environ, "EPSLEDGER_STATE": str(tmp_path / "elsewhere")}
        subprocess.run([sys.executable, "-c", _GO_ON, location], env=environment, check=True)
        for _ in range(2):
            with suppress(LedgerUnavailable), pytest.raises(LedgerCorrupt, match="from a copy"):
                accountant.charge("d", TENTH, **ASK)
        with pytest.raises(LedgerCorrupt, match="from a copy"):
            accountant.charge("d", TENTH, **ASK)
        assert not accountant.verify().clean


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


def test_a_correction_reaches_what_supersedes(books):
    books.create_budget("d2", LIMITS, unit="article", dataset="sha256:1", supersedes="d")
    with pytest.raises(InvalidRequest, match="superseded by 'd2'"):
        books.correct("d", TENTH, uses=5, **ASK)
    books.correct(("d", "d2"), TENTH, uses=5, **ASK)
    assert spent(books, budget="d2") == 5
    assert books.verify().clean


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


def test_publishers_with_keys_of_their_own(books, tmp_path):
    places = tmp_path / "alice", tmp_path / "bob"
    for _ in range(2):
        for signer, place in zip((ALICE, BOB), places, strict=True):
            books.checkpoint(signer, to=[place])
    for signer, place in zip((ALICE, BOB), places, strict=True):
        found = books.verify([read_notes(place)], key=signer.verifier_key)
        assert (found.clean, found.rollback[:22]) == (True, "checked against 2 anch")


def test_a_key_that_was_replaced_signs_no_more(books, tmp_path):
    places = tmp_path / "one", tmp_path / "other"
    books.checkpoint(ALICE, to=places)
    line = f"key {BOB.verifier_key.to_text()}"
    books.checkpoint(ALICE, BOB, to=places, lines=[line])
    with pytest.raises(AnchorInvalid, match="replaced by bob"):
        books.checkpoint(ALICE, to=places)
    books.checkpoint(BOB, to=places)
    for signer in (ALICE, BOB):
        assert books.verify(map(read_notes, places), key=signer.verifier_key).clean


def test_a_series_is_not_one_note(books):
    note = books.checkpoint(ALICE)
    with pytest.raises(InvalidRequest, match="anchors must be"):
        books.verify([note], key=ALICE.verifier_key)


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


def test_doctor_sees_what_is_missing(books, location):
    books.checkpoint(ALICE)
    books.close()
    with closing(sqlite3.connect(location)) as connection:
        connection.execute("DROP TRIGGER epsledger_checkpoint_update")
        connection.execute("UPDATE epsledger_checkpoint SET note = 'x\n\n— n a\n'")
        connection.commit()
    found = {finding.what: finding for finding in examine(location)}
    assert not found["triggers"].ok
    assert "epsledger_checkpoint_update" in found["triggers"].detail
    assert "cannot be read" in found["anchor"].detail


def test_doctor_waits_for_every_lock(new_database):
    location = new_database()
    with Accountant.open(location) as accountant:
        accountant.create_budget("d", LIMITS, unit="article")
        assert not accountant._store.missing_triggers()
        with accountant._store.engine.connect() as other:
            other.execute(text("SELECT * FROM epsledger_budget FOR UPDATE"))
            release = threading.Timer(1.5, other.rollback)
            release.start()
            lock = {finding.what: finding for finding in examine(location)}["lock"]
            release.join()
        assert not lock.ok


@pytest.mark.parametrize("form", ["{}", "sqlite:///{}"])
def test_nothing_is_made_where_a_ledger_was_expected(tmp_path, form):
    location = form.format(tmp_path / "mistyped.db")
    with pytest.raises(LedgerUnavailable, match="no ledger at"):
        Accountant.open(location, create=False)
    assert not examine(location)[0].ok
    (tmp_path / "mistyped.db").touch()
    with pytest.raises(LedgerUnavailable, match="no ledger at"):
        Accountant.open(location, create=False)


def test_nothing_is_made_in_another_database(new_database):
    location = new_database()
    with pytest.raises(LedgerUnavailable, match="no ledger at"):
        Accountant.open(location, create=False)
    Accountant.open(location).close()
    Accountant.open(location, create=False).close()


def test_a_stored_answer_outlives_its_budget(books):
    books.charge("d", TENTH, key="k", **ASK)
    books.keep_answer("d", "k", b"seven")
    books.close_budget("d")
    assert books.charge("d", TENTH, key="k", **ASK).answer == b"seven"
    with pytest.raises(BudgetClosed):
        books.charge("d", TENTH, key="other", **ASK)


# --- the second review ---------------------------------------------------------------------------


def test_looking_at_a_copy_changes_nothing(books, tmp_path, monkeypatch):
    copy = tmp_path / "copy.db"
    books.backup(copy)
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("EPSLEDGER_STATE", str(tmp_path / "elsewhere"))
        with Accountant.open(copy) as other:
            other.charge("d", TENTH, **ASK)
    assert {finding.what for finding in examine(copy)} >= {"lock", "clock", "anchor"}
    books.charge("d", TENTH, **ASK)
    books.close()
    with Accountant.open(books._store.place) as again:
        again.charge("d", TENTH, **ASK)


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


def test_a_rotation_that_failed_at_one_place_is_done_again(books, tmp_path):
    place = tmp_path / "anchors"
    books.checkpoint(ALICE, to=[place])
    line = f"key {BOB.verifier_key.to_text()}"
    with pytest.raises(AnchorUnavailable):
        books.checkpoint(ALICE, BOB, to=["command:false", place], lines=[line])
    books.checkpoint(ALICE, BOB, to=[place], lines=[line])
    books.checkpoint(BOB, to=[place])
    for signer in (ALICE, BOB):
        assert books.verify([read_notes(place)], key=signer.verifier_key).clean


def test_a_file_that_cannot_take_the_note_is_found_before_it_is_stored(books, tmp_path):
    place = tmp_path / "anchors"
    place.write_text("epsledger/cut off\n1\n")
    with pytest.raises(AnchorInvalid, match="no whole note"):
        books.checkpoint(ALICE, to=[place])
    with books._store.snapshot() as snapshot:
        assert not snapshot.checkpoints()


def test_a_key_that_was_replaced_in_a_place_that_did_not_go_back(location, tmp_path, monkeypatch):
    place, older = tmp_path / "anchors", tmp_path / "older.db"
    with Accountant.open(location) as accountant:
        accountant.create_budget("d", LIMITS, unit="article")
        accountant.checkpoint(ALICE, to=[place])
        accountant.backup(older)
        line = f"key {BOB.verifier_key.to_text()}"
        accountant.checkpoint(ALICE, BOB, to=[place], lines=[line])
    with Accountant.open(older) as accountant, pytest.raises(AnchorInvalid, match="replaced"):
        accountant.checkpoint(ALICE, to=[place])


def test_a_lost_key_stops_verify_in_the_ledger_too(books):
    books.checkpoint(ALICE)
    lines = [f"key {BOB.verifier_key.to_text()}", f"lost {ALICE.verifier_key.hash}"]
    books.checkpoint(BOB, lines=lines)
    with pytest.raises(AnchorInvalid, match="declared lost"):
        books.verify(key=ALICE.verifier_key)
    assert books.verify(key=ALICE.verifier_key, vouched=[BOB.verifier_key]).clean


def test_nobody_replaces_the_key_of_another(books):
    books.checkpoint(ALICE)
    lines = [f"key {BOB.verifier_key.to_text()}", f"lost {ALICE.verifier_key.hash}"]
    books.checkpoint(BOB, lines=lines)
    books.checkpoint(ALICE)
    with pytest.raises(AnchorInvalid, match="further lines"):
        books.checkpoint(BOB, lines=["\u2014 alice x"])


def test_the_ledgers_own_checkpoints_say_nothing_of_rollback(books, monkeypatch):
    books.charge("d", TENTH, **ASK)
    note = books.checkpoint(ALICE)
    books.close()
    monkeypatch.setenv("EPSLEDGER_STATE", "")
    with Accountant.open(books._store.place) as again:
        assert again.verify(key=ALICE.verifier_key).rollback == "not checked"
        found = again.verify([[note]], key=ALICE.verifier_key)
        assert found.rollback == "checked against 1 anchor"


def test_doctor_of_a_ledger_that_went_back(location, tmp_path):
    older = tmp_path / "older.db"
    with Accountant.open(location) as accountant:
        accountant.create_budget("d", LIMITS, unit="article")
        accountant.backup(older)
        accountant.charge("d", TENTH, **ASK)
    put_back(older, location)
    found = {finding.what: finding for finding in examine(location)}
    assert found["schema"].ok
    assert "went back" in found["clock"].detail
    assert str(found["marks"].detail).endswith(".marks")


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


def test_a_link_that_is_pointed_elsewhere(tmp_path):
    for name in ("a", "b"):
        with Accountant.open(tmp_path / f"{name}.db") as accountant:
            accountant.create_budget(name, LIMITS, unit="article")
    link = tmp_path / "current.db"
    link.symlink_to(tmp_path / "a.db")
    with Accountant.open(link) as accountant:
        link.unlink()
        link.symlink_to(tmp_path / "b.db")
        assert accountant.budgets() == ["a"]
        with pytest.raises(UnknownBudget):
            accountant.charge("b", TENTH, **ASK)
        assert accountant.charge("a", TENTH, **ASK).seq == 2


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


def test_passwords_are_not_shown(new_database):
    url = make_url(new_database()).set(username="postgres", password="hunter2")  # noqa: S106
    location = url.render_as_string(hide_password=False)
    made = CliRunner().invoke(
        main, ["budget", "create", "d", "--epsilon", "1", "--unit", "a", "--ledger", location]
    )
    assert made.exit_code == 0, made.output
    assert "hunter2" not in made.output


def test_an_empty_file_stays_empty(tmp_path):
    (tmp_path / "empty.db").touch()
    examine(tmp_path / "empty.db")
    assert not (tmp_path / "empty.db").stat().st_size


# --- the third review ----------------------------------------------------------------------------


def test_what_another_process_saw_binds_one_that_was_open_before(location, tmp_path):
    """Two clients of one machine; the ledger goes back after what only the second one saw."""
    older = tmp_path / "older.db"
    with Accountant.open(location) as first:
        first.create_budget("d", LIMITS, unit="article")
        first.backup(older)
        with Accountant.open(location) as second:
            for _ in range(8):
                second.charge("d", TENTH, **ASK)
        with closing(sqlite3.connect(older)) as copy, closing(sqlite3.connect(location)) as live:
            copy.backup(live)
        assert not first.verify().clean
        with pytest.raises(LedgerCorrupt, match=r"went back to entry 1, .* after entry 9"):
            first.charge("d", TENTH, **ASK)


def test_what_another_process_saw_binds_in_postgres(new_database):
    location = new_database()
    with Accountant.open(location) as first:
        first.create_budget("d", LIMITS, unit="article")
        with Accountant.open(location) as second:
            for _ in range(3):
                second.charge("d", TENTH, **ASK)
        with psycopg.connect(plain(location)) as owner:
            owner.execute("ALTER TABLE epsledger_entry DISABLE TRIGGER USER")
            owner.execute("ALTER TABLE epsledger_budget DISABLE TRIGGER USER")
            owner.execute("DELETE FROM epsledger_entry WHERE seq > 1")
            owner.execute(
                "UPDATE epsledger_budget SET seq = 1, head = e.digest, totals = %s"
                " FROM epsledger_entry e",
                (bytes(16),),
            )
        with pytest.raises(LedgerCorrupt, match=r"went back to entry 1, .* after entry 4"):
            first.charge("d", TENTH, **ASK)


def test_who_only_verifies_remembers_too(books, location, tmp_path, monkeypatch):
    older = tmp_path / "older.db"
    books.backup(older)
    books.charge("d", TENTH, **ASK)
    books.close()
    monkeypatch.setenv("EPSLEDGER_STATE", str(tmp_path / "auditor"))
    with Accountant.open(location) as auditor:
        assert auditor.verify().rollback == "not checked"
    put_back(older, location)
    with Accountant.open(location) as auditor:
        assert not auditor.verify().clean


def plain(location: str) -> str:
    url = make_url(location).set(drivername="postgresql")
    return url.render_as_string(hide_password=False)


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


def test_two_budgets_over_one_dataset_are_found(books, monkeypatch):
    monkeypatch.setattr(type(books.budget("d")), "covers", lambda *_: False)
    books.create_budget("e", LIMITS, unit="article", dataset="sha256:1")
    monkeypatch.undo()
    problems = [problem for each in books.verify().budgets for problem in each.problems]
    assert problems == ["entry 1: budget 'd' is about the same dataset"]


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


def test_a_backup_touches_no_other_file(books, tmp_path):
    users = tmp_path / "copy.db.part"
    users.write_text("mine")
    books.backup(tmp_path / "copy.db")
    assert users.read_text() == "mine"
    with pytest.raises(LedgerUnavailable, match="never overwrites"):
        books.backup(tmp_path / "copy.db")
    ledgers = [path.name for path in tmp_path.iterdir() if "copy" in path.name]
    assert sorted(ledgers) == ["copy.db", "copy.db.part"]


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


def test_a_checkpoint_that_would_spoil_a_place(books, location, tmp_path):
    place, elsewhere = tmp_path / "anchors", tmp_path / "elsewhere"
    books.checkpoint(ALICE, to=[place])
    line = f"key {BOB.verifier_key.to_text()}"
    with pytest.raises(AnchorInvalid, match=r"the last key is alice\+.*, and not deadbeef"):
        books.checkpoint(BOB, to=[place], lines=[line, "lost deadbeef"])
    with pytest.raises(AnchorInvalid, match=r"the last key is alice\+.*; sign with it, or rotate"):
        books.checkpoint(BOB, to=[place])
    with Accountant.open(tmp_path / "other.db") as other:
        other.create_budget("d", LIMITS, unit="article")
        with pytest.raises(AnchorInvalid, match=f"anchors of ledger {books._store.ledger}"):
            other.checkpoint(ALICE, to=[place])
    lost = f"lost {ALICE.verifier_key.hash}"
    books.checkpoint(BOB, to=[place, elsewhere], lines=[line, lost])
    books.checkpoint(BOB, to=[place, elsewhere], lines=[line, lost])  # done again
    books.checkpoint(BOB, to=[place, elsewhere])
    key, vouched = ALICE.verifier_key, [BOB.verifier_key]
    assert books.verify([read_notes(place)], key=key, vouched=vouched).clean


def test_a_checkpoint_that_was_not_published_is_not_in_the_ledger(books, location, tmp_path):
    with pytest.raises(AnchorUnavailable):
        books.checkpoint(ALICE, to=[tmp_path / "no such folder" / "anchors"])
    (found,) = (each for each in examine(location) if each.what == "anchor")
    assert not found.ok
    assert "no checkpoint was ever signed" in found.detail


def test_doctor_reads_the_pragmas_back_and_knows_a_network(books, location, monkeypatch):
    store = books._store
    assert store.warnings() == []
    sqlalchemy_event.listen(
        store.engine, "checkout", lambda driver, *_: driver.execute("PRAGMA synchronous=OFF")
    )
    assert store.warnings() == ["SQLite answers synchronous=0 and must answer 2"]
    monkeypatch.setenv("EPSLEDGER_NETWORK_FILES", "1")
    monkeypatch.setattr("accountant.doctor.file_system", lambda _: "nfs4")
    (found,) = (each for each in examine(location) if each.what == "file system")
    assert not found.ok


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


def test_recovery_to_the_letter(books, location, tmp_path, monkeypatch):
    """docs/recovery.md, "went back": the old files away, all three; the copy in; the mark away."""
    copy, away = tmp_path / "copy.db", tmp_path / "away"
    books.charge("d", TENTH, **ASK)
    books.backup(copy)
    process = subprocess.run(  # a crash leaves a write-ahead log behind
        [sys.executable, "-c", CRASH, str(location)], check=False, capture_output=True
    )
    assert process.returncode == -signal.SIGKILL
    books.close()
    run = CliRunner()
    away.mkdir()
    for path in location.parent.glob(f"{location.name}*"):
        path.rename(away / path.name)
    shutil.copy(copy, location)
    refused = run.invoke(main, ["ledger", "verify", "--ledger", str(location)])
    assert refused.exit_code == 4
    assert "went back" in refused.output
    books._store.remembered.marks.path.unlink()
    spent = ["--event", '{"kind": "PureDP", "epsilon": 0.1}', "--uses", "3"]
    correct = ["budget", "correct", "d", *spent, "--activity", "recovery"]
    assert run.invoke(main, [*correct, "--ledger", str(location)]).exit_code == 0
    assert run.invoke(main, ["ledger", "verify", "--ledger", str(location)]).exit_code == 0


CRASH = """
import os, signal, sys
from accountant import Accountant
from dp import PureDP
accountant = Accountant.open(sys.argv[1])
for _ in range(3):
    accountant.charge("d", PureDP(0.1), unit="article", activity="survey")
os.kill(os.getpid(), signal.SIGKILL)
"""


# --- the fourth review ---------------------------------------------------------------------------


def test_a_mark_that_could_not_be_written_accuses_nobody(books, monkeypatch):
    """The slot that it was meant for is the next budget's."""
    pwrite, full = os.pwrite, [True]

    def sometimes(file, content, at):
        if full and full.pop():
            raise OSError(28, "No space left on device")
        return pwrite(file, content, at)

    monkeypatch.setattr(os, "pwrite", sometimes)
    for name in ("x", "y", "z"):
        books.create_budget(name, LIMITS, unit="article")
    for name in ("x", "z", "y", "x", "d"):
        books.charge(name, TENTH, **ASK)
    assert books.verify().clean


def test_a_marks_file_that_is_cut_off_in_use_accuses_nobody(books):
    for name in ("x", "y"):
        books.create_budget(name, LIMITS, unit="article")
    os.truncate(books._store.remembered.marks.path, 0)
    books.create_budget("z", LIMITS, unit="article")
    for name in ("x", "y", "z", "x", "d"):
        books.charge(name, TENTH, **ASK)
    assert books.verify().clean
    assert books._store.remembered.marks.read()["x"][0] == 3


def test_a_slot_that_another_process_gave_to_another_budget_accuses_nobody(books, location):
    books.create_budget("x", LIMITS, unit="article")
    os.truncate(books._store.remembered.marks.path, 0)
    with Accountant.open(location) as second:
        second.create_budget("z", LIMITS, unit="article")
        for _ in range(3):
            second.charge("z", TENTH, **ASK)
    for name in ("d", "x", "z"):
        books.charge(name, TENTH, **ASK)
    assert books.verify().clean


def test_whoever_holds_the_marks_holds_nobody_up(books, monkeypatch):
    books.create_budget("x", LIMITS, unit="article")
    with books._store.remembered.marks.path.open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        monkeypatch.setattr("accountant.marks._PATIENCE_SECONDS", 30)
        started = time.monotonic()
        assert books.statement("x").seq == 1
        books.charge("x", TENTH, **ASK)
        assert time.monotonic() - started < 30
        monkeypatch.setattr("accountant.marks._PATIENCE_SECONDS", 0.2)
        books.create_budget("y", LIMITS, unit="article")  # goes without a mark
        assert time.monotonic() - started < 60
    books.charge("y", TENTH, **ASK)
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
