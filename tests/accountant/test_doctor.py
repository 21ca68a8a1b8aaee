"""The doctor, and opening: what is missing is said, and nothing is made where none was asked for."""

from __future__ import annotations

import sqlite3
import threading
from contextlib import closing

import pytest
from click.testing import CliRunner
from sqlalchemy import event as sqlalchemy_event
from sqlalchemy import make_url, text

from accountant import Accountant, LedgerUnavailable, UnknownBudget
from accountant.doctor import examine
from epsledger.cli import main
from tests.accountant.ledgers import ALICE, ASK, LIMITS, TENTH


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
