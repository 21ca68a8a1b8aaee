"""The commands that keep a ledger: quotas, closing, corrections, anchors, backup, doctor."""

from __future__ import annotations

import secrets
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import psycopg
import pytest
from click.testing import CliRunner
from opentelemetry import metrics
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from sqlalchemy import event, make_url

from accountant import Accountant, BudgetExceeded, LedgerCorrupt, LedgerUnavailable
from accountant.notes import VerifierKey
from accountant.telemetry import Watch
from dp import PureDP, pure
from epsledger.cli import main

GOLDEN = Path(__file__).parents[1] / "golden" / "ledger-1.sql"
ASK = {"unit": "article", "activity": "survey"}


@pytest.fixture
def run(location):
    def run(*words, code=0, ledger=location):
        options = [] if ledger is None else ["--ledger", str(ledger)]
        result = CliRunner().invoke(main, [*map(str, words), *options])
        assert result.exit_code == code, result.output
        return result.output

    return run


@pytest.fixture
def tips(run, location):
    run("budget", "create", "tips", "--epsilon", 10, "--unit", "article", "--dataset", "sha256:aa")
    return location


def charge(location, names="tips"):
    with Accountant.open(location) as accountant:
        return accountant.charge(names, PureDP(1.0), **ASK)


def test_quotas(run, tips):
    assert "charge both together" in run("budget", "quota", "team", "--of", "tips", "--epsilon", 2)
    charge(tips, ("tips", "team"))
    assert "a quota of tips" in run("budget", "show", "team")
    run("budget", "quota", "x", "--of", "absent", "--epsilon", 2, code=1)
    run("budget", "quota", "y", "--of", "tips", "--epsilon", 2, "--delta", "1e-6")


def test_a_closed_budget(run, tips):
    assert "closed by entry 2" in run("budget", "close", "tips", "--note", "consent withdrawn")
    assert "is closed" in run("budget", "close", "tips", code=1)
    assert "admits nothing" in run("budget", "show", "tips")
    assert "closed" in run("budget", "list")


def test_superseding_and_importing(run, tips):
    charge(tips)
    spent = '{"kind": "PureDP", "epsilon": 1.0}'
    more = ("--unit", "article", "--dataset", "sha256:aa", "--epsilon", 12)
    assert "budget 'tips' is about the same" in run("budget", "create", "new", *more, code=1)
    run("budget", "create", "new", *more, "--supersedes", "tips", "--import", spent, 2)
    shown = run("budget", "show", "new")
    assert "supersedes tips" in shown
    assert "used 25.00%" in shown
    run("ledger", "verify")


def test_a_correction(run, tips):
    said = run(
        "budget", "correct", "tips", "--pure-epsilon", 4, "--activity", "old script", "--uses", 2
    )
    assert "80.00% used" in said
    run(
        "budget",
        "create",
        "tips-2",
        "--epsilon",
        20,
        "--unit",
        "article",
        "--supersedes",
        "tips",
        *("--dataset", "sha256:aa"),
    )
    another = ("--pure-epsilon", 4, "--activity", "another")
    assert "correct both" in run("budget", "correct", "tips", *another, code=1)
    assert run("budget", "correct", "tips", "tips-2", *another).count("recorded as entry") == 2
    assert "exceeds the budget" in run("ledger", "verify", code=4)


def test_fingerprints(run, tmp_path):
    files = []
    for name in ("a", "b", "key"):
        (tmp_path / name).write_text(name)
        files.append(tmp_path / name)
    plain = run("budget", "fingerprint", *files[:2], ledger=None)
    assert plain.startswith("sha256:")
    assert run("budget", "fingerprint", *files[1::-1], ledger=None) == plain
    keyed = run("budget", "fingerprint", *files[:2], "--key-file", files[2], ledger=None)
    assert keyed.startswith("hmac-sha256:")


def test_anchors(run, tips, tmp_path, state):
    anchors = tmp_path / "anchors"
    key = run("anchor", "new-key", ledger=None).splitlines()[-1]
    VerifierKey.from_text(key)
    assert (state / "key").stat().st_mode & 0o077 == 0
    assert "exists" in run("anchor", "new-key", ledger=None, code=1)
    run("anchor", "publish", "--to", anchors)
    backup = tmp_path / "older.db"
    run("ledger", "backup", backup)
    charge(tips)
    run("anchor", "publish", "--to", anchors)
    assert "checked against 2 anchors" in run("ledger", "verify", "--anchor", anchors, "--key", key)
    said = run("ledger", "verify", "--anchor", anchors, "--key", key, code=4, ledger=backup)
    assert "rolled back" in said
    assert "prove nothing" in run("ledger", "verify", "--anchor", anchors, code=2)
    run("anchor", "new-key", "--key", tmp_path / "next", ledger=None)
    new = run("anchor", "rotate", "--new-key", tmp_path / "next", "--to", anchors).split()[-1]
    run("anchor", "publish", "--key", tmp_path / "next", "--to", anchors)
    for trusted in (key, new):
        run("ledger", "verify", "--anchor", anchors, "--key", trusted)
    assert "it was replaced by" in run("anchor", "publish", "--to", anchors, code=1)
    both = ("--anchor", anchors, "--anchor", anchors)
    assert "clean" in run("ledger", "verify", *both, "--key", key)


def test_a_lost_key(run, tips, tmp_path):
    anchors = tmp_path / "anchors"
    key = run("anchor", "new-key", ledger=None).splitlines()[-1]
    run("anchor", "publish", "--to", anchors)
    run("anchor", "new-key", "--key", tmp_path / "next", ledger=None)
    lost = VerifierKey.from_text(key).hash
    said = run("anchor", "rotate", "--new-key", tmp_path / "next", "--lost", lost, "--to", anchors)
    new = said.split()[-1]
    check = ("ledger", "verify", "--anchor", anchors, "--key", key)
    assert "declared lost" in run(*check, code=1)
    run(*check, "--vouched", new)
    run("ledger", "verify", "--anchor", anchors, "--key", new)


def test_a_backup_is_whole_and_a_plain_copy_of_a_live_ledger_is_found(run, tips, tmp_path):
    with Accountant.open(tips) as accountant:
        for _ in range(5):
            accountant.charge("tips", PureDP(1.0), **ASK)
        accountant.backup(tmp_path / "backup.db")
        with pytest.raises(LedgerUnavailable, match="never overwrites"):
            accountant.backup(tmp_path / "backup.db")
        with pytest.raises(LedgerUnavailable, match="no backup was made"):
            accountant.backup(tmp_path / "absent" / "backup.db")
        accountant.charge("tips", PureDP(1.0), **ASK)
    assert sorted(path.name for path in tmp_path.glob("backup*")) == ["backup.db"]
    with closing(sqlite3.connect(tmp_path / "backup.db")) as connection:
        ((entries,),) = connection.execute("SELECT count(*) FROM epsledger_entry")
    assert entries == 6
    backup = Accountant.open(tmp_path / "backup.db")
    with backup as accountant, pytest.raises(LedgerCorrupt, match="went back"):
        accountant.charge("tips", PureDP(1.0), **ASK)
    # A process of its own, since copying a file that is open here would drop its locks.
    program = f"""
import shutil, sys
from accountant import Accountant
from dp import PureDP
accountant = Accountant.open({str(tips)!r})
accountant.charge("tips", PureDP(1.0), unit="article", activity="survey")
import os, subprocess
subprocess.run(["cp", {str(tips)!r}, {str(tmp_path / "plain.db")!r}], check=True)
os._exit(0)
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    with Accountant.open(tmp_path / "plain.db") as accountant:
        assert not accountant.verify().clean
        with pytest.raises(LedgerCorrupt, match="went back"):
            accountant.charge("tips", PureDP(1.0), **ASK)


def test_migrating(run, location):
    with closing(sqlite3.connect(location)) as connection:
        connection.executescript(GOLDEN.read_text())
    assert "epsledger ledger migrate" in run("budget", "list", code=1)
    assert "migrated to schema 2" in run("ledger", "migrate")
    assert "up to date" in run("ledger", "migrate")
    run("ledger", "verify")


def test_the_doctor(run, tips, tmp_path, monkeypatch):
    said = run("doctor", code=1)
    assert "LOOK anchor: no checkpoint was ever signed" in said
    assert said.count("ok  ") == 9
    run("anchor", "new-key", ledger=None)
    run("anchor", "publish", "--to", tmp_path / "anchors")
    assert "LOOK" not in run("doctor")
    tips.chmod(0o666)
    assert "LOOK permissions" in run("doctor", code=1)
    tips.chmod(0o600)
    monkeypatch.setenv("EPSLEDGER_STATE", "")
    assert "LOOK marks" in run("doctor", code=1)
    monkeypatch.setattr("accountant.doctor.file_system", lambda _: "nfs4")
    monkeypatch.setattr("accountant.stores.sqlite.file_system", lambda _: "nfs4")
    assert "LOOK opening" in run("doctor", code=1)
    assert "no ledger" in run("doctor", code=1, ledger=tmp_path / "absent.db")


def test_a_network_file_system_is_refused(location, monkeypatch):
    monkeypatch.setattr("accountant.stores.sqlite.file_system", lambda _: "nfs4")
    with pytest.raises(LedgerUnavailable, match="nfs4 file system"):
        Accountant.open(location)
    assert not location.exists()
    monkeypatch.setenv("EPSLEDGER_NETWORK_FILES", "1")
    Accountant.open(location).close()


def test_a_role_that_cannot_rewrite(new_database, run):
    """The SQL that is printed, tried as that role."""
    url, role = make_url(new_database()), f"app_{secrets.token_hex(4)}"
    plain = url.set(drivername="postgresql").render_as_string(hide_password=False)
    location = url.render_as_string(hide_password=False)
    Accountant.open(location).close()
    with psycopg.connect(plain, autocommit=True) as connection:
        connection.execute(f"CREATE ROLE {role}")
        connection.execute(run("ledger", "role", role, ledger=None))
    try:
        with Accountant.open(location) as accountant:
            store = accountant._store

            def become(connection, _record):
                connection.execute(f"SET ROLE {role}")
                connection.commit()

            store.engine.dispose()
            event.listen(store.engine, "connect", become)
            accountant.create_budget("tips", pure(10.0), unit="article")
            accountant.charge("tips", PureDP(1.0), key="k", **ASK)
            accountant.keep_answer("tips", "k", b"spam")
            accountant.reserve("tips", PureDP(1.0), uses=2, **ASK).mark()
            accountant.record_unprotected("tips", **ASK, note="ticket 7")
            assert accountant.statement("tips").unprotected == 1
            assert accountant.verify().clean
            for statement in (
                "DELETE FROM epsledger_entry",
                "UPDATE epsledger_entry SET seq = 1",
                "UPDATE epsledger_event SET price = encoded",
                "ALTER TABLE epsledger_entry DISABLE TRIGGER ALL",
                "TRUNCATE epsledger_entry",
            ):
                with (
                    pytest.raises((LedgerUnavailable, LedgerCorrupt), match=r"permission|owner"),
                    store.transaction(frozenset()),
                ):
                    store._driver.execute(statement)
    finally:
        with psycopg.connect(plain, autocommit=True) as connection:
            connection.execute(f"DROP OWNED BY {role}")
            connection.execute(f"DROP ROLE {role}")


def test_what_is_used_is_warned_of_and_measured(location, caplog):
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader])
    with Accountant.open(location) as accountant:
        watch = accountant._writer._watch
        old = metrics.get_meter
        metrics.get_meter = provider.get_meter
        try:
            watch.__init__()
        finally:
            metrics.get_meter = old
        assert isinstance(watch, Watch)
        accountant.create_budget("tips", pure(10.1), unit="article")
        for _ in range(10):
            accountant.charge("tips", PureDP(1.0), **ASK)
        for _ in range(3):
            with pytest.raises(BudgetExceeded):
                accountant.charge("tips", PureDP(1.0), **ASK)
    warned = [record.getMessage() for record in caplog.records if "used" in record.getMessage()]
    assert warned == [f"budget 'tips': {share}% of the limits are used" for share in (59, 89, 99)]
    found = {}
    for resource in reader.get_metrics_data().resource_metrics:
        for scope in resource.scope_metrics:
            for metric in scope.metrics:
                (point,) = metric.data.data_points
                found[metric.name] = getattr(point, "value", None) or point.count
    assert found["epsledger.refusals"] == 3
    assert found["epsledger.charges"] == 10
    assert 0 < found["epsledger.remaining"] < 0.02
    assert found["epsledger.commit.duration"] >= 12
    provider.shutdown()


def test_copies_are_not_made_of_other_stores(tmp_path):
    memory = Accountant.open("memory:")
    with memory as accountant, pytest.raises(LedgerUnavailable, match="pg_dump"):
        accountant.backup(tmp_path / "x.db")
