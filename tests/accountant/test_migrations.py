"""Ledgers of every schema version, as they were written: kept, migrated, or refused by name."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from accountant import Accountant, BudgetExceeded, LedgerUnavailable, SchemaMismatch
from accountant.stores import ledger_url
from accountant.stores.migrations import migrate
from accountant.stores.schema import SCHEMA_VERSION
from dp import Gaussian, PoissonSampled, PureDP

GOLDEN = Path(__file__).parents[1] / "golden"
VERSIONS = range(1, SCHEMA_VERSION + 1)
STEP = PoissonSampled(0.01, Gaussian(1.0))
ASK = {"unit": "article", "activity": "survey"}


@pytest.fixture
def golden(tmp_path):
    def of(version):
        location = tmp_path / f"ledger-{version}.db"
        with closing(sqlite3.connect(location)) as connection:
            connection.executescript((GOLDEN / f"ledger-{version}.sql").read_text())
        return location

    return of


@pytest.mark.parametrize("version", VERSIONS)
def test_a_golden_ledger_is_worth_the_same_to_the_bit(golden, version):
    location = golden(version)
    if version < SCHEMA_VERSION:
        with pytest.raises(SchemaMismatch, match="epsledger ledger migrate"):
            Accountant.open(location)
    assert migrate(ledger_url(location)) == tuple(range(version + 1, SCHEMA_VERSION + 1))
    assert migrate(ledger_url(location)) == ()
    expected = json.loads((GOLDEN / f"ledger-{version}.json").read_text())
    with Accountant.open(location) as accountant:
        assert accountant.verify().clean
        assert accountant._store.missing_triggers() == []
        assert accountant.budgets() == sorted(expected)
        with accountant._store.snapshot() as snapshot:
            for name, state in expected.items():
                row = snapshot.row(name)
                assert {"seq": row.seq, "head": row.head.hex(), "totals": row.totals.hex()} == state
                accountant.statement(name)


def test_a_migrated_ledger_goes_on(golden):
    location = golden(1)
    migrate(ledger_url(location))
    with Accountant.open(location) as accountant:
        assert accountant.statement("news").open_reservations == ((47, 50, 4),)
        adopted = accountant.adopt((("news", 47),), STEP)
        assert (adopted.marked, adopted.remaining) == (4, 46)
        adopted.settle()
        replay = accountant.charge("tips", PureDP(0.5), key="k1", payload=b"q1", **ASK)
        assert replay.answer == b"answer one"
        with pytest.raises(BudgetExceeded):
            accountant.charge("tips", PureDP(1.0), uses=100, **ASK)
        accountant.create_quota("team", accountant.budget("tips").filter, of="tips")
        accountant.charge(("tips", "team"), PureDP(0.5), **ASK)
        accountant.close_budget("mail")
        assert accountant.verify().clean


def layout(location):
    with closing(sqlite3.connect(location)) as connection:
        tables = [
            name
            for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        ]
        columns = {
            table: sorted(
                (name, kind.replace("BIGINT", "INTEGER"), required, key)
                for _, name, kind, required, _, key in connection.execute(
                    f"PRAGMA table_info({table})"
                )
            )
            for table in tables
        }
        triggers = sorted(
            connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'")
        )
    return columns, triggers


def test_a_migrated_ledger_has_the_layout_of_a_new_one(golden, tmp_path):
    location, new = golden(1), tmp_path / "new.db"
    migrate(ledger_url(location))
    Accountant.open(new).close()
    assert layout(location) == layout(new)


@pytest.mark.parametrize("version", [0, SCHEMA_VERSION + 1, 99])
def test_an_unknown_version_is_refused_and_left_alone(accountant, location, query, version):
    accountant.close()
    query(location, f"PRAGMA user_version={version}")
    before = location.read_bytes()
    with pytest.raises(SchemaMismatch, match=f"ledger schema {version}") as caught:
        Accountant.open(location)
    assert (caught.value.found, caught.value.expected) == (version, SCHEMA_VERSION)
    with pytest.raises(SchemaMismatch):
        migrate(ledger_url(location))
    assert location.read_bytes() == before


def test_a_live_accountant_notices_a_migration(accountant, location, query):
    accountant.charge("tips", PureDP(0.5), **ASK)
    query(location, "PRAGMA user_version=99")
    with pytest.raises(SchemaMismatch):
        accountant.charge("tips", PureDP(0.5), **ASK)
    query(location, f"PRAGMA user_version={SCHEMA_VERSION}")
    accountant.charge("tips", PureDP(0.5), **ASK)


def test_a_ledger_in_use_is_not_migrated(golden, monkeypatch):
    location = golden(1)
    monkeypatch.setattr("accountant.stores.sqlite._BUSY_MILLISECONDS", 100)
    monkeypatch.setattr("accountant.stores.sqlite._PATIENCE_SECONDS", 0.1)
    with closing(sqlite3.connect(location, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(LedgerUnavailable, match="not migrated"):
            migrate(ledger_url(location))
        other.execute("ROLLBACK")
    assert migrate(ledger_url(location))


def test_what_is_no_ledger_is_not_migrated(tmp_path):
    with closing(sqlite3.connect(tmp_path / "other.db")) as connection:
        connection.execute("CREATE TABLE mine (x)")
    with pytest.raises(LedgerUnavailable, match="another program"):
        migrate(ledger_url(tmp_path / "other.db"))
