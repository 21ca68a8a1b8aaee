"""A ledger that went back, or on from a copy, is seen by who saw it before; nobody else is accused."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing, suppress

import psycopg
import pytest
from click.testing import CliRunner
from sqlalchemy import make_url

from accountant import Accountant, LedgerCorrupt, LedgerUnavailable
from accountant.doctor import examine
from epsledger.cli import main
from tests.accountant.ledgers import ALICE, ASK, LIMITS, TENTH, plain, put_back


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


def test_a_backup_touches_no_other_file(books, tmp_path):
    users = tmp_path / "copy.db.part"
    users.write_text("mine")
    books.backup(tmp_path / "copy.db")
    assert users.read_text() == "mine"
    with pytest.raises(LedgerUnavailable, match="never overwrites"):
        books.backup(tmp_path / "copy.db")
    ledgers = [path.name for path in tmp_path.iterdir() if "copy" in path.name]
    assert sorted(ledgers) == ["copy.db", "copy.db.part"]


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
