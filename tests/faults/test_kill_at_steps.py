"""``kill -9`` at every step of every operation: it happened as a whole, or not at all.

A step is a call of the store: taking the lock, a read, a write, the commit, the high-water mark,
and the answer. After a death at any of them the ledger verifies, what was told a caller is in it,
an open reservation counts in full, and the next writer goes on.

Control: an operation that releases before it charges is seen to have released without a charge.
"""

from __future__ import annotations

import itertools
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from accountant import Accountant, LedgerError
from accountant.entries import Kind, unpack
from accountant.stores import ledger_url
from accountant.stores.migrations import migrate
from dp import PureDP, pure

ONE = PureDP(1.0)
ASK = {"unit": "article", "activity": "survey"}
GOLDEN = Path(__file__).parents[1] / "golden" / "ledger-1.sql"
WROTE = {
    "charge": Kind.CHARGE,
    "broken-charge": Kind.CHARGE,
    "quota": Kind.CHARGE,
    "key": Kind.CHARGE,
    "reserve": Kind.RESERVE,
    "mark": Kind.MARK,
    "settle": Kind.SETTLE,
    "void": Kind.VOID,
    "adopt": Kind.ADOPT,
    "close": Kind.CLOSE,
    "correct": Kind.CORRECT,
    "supersede": Kind.CLOSE,
    "checkpoint": None,
}
numbers = itertools.count()


def state(location):
    """Return the kinds of entries of each budget, and the totals."""
    with Accountant.open(location) as accountant:
        verification = accountant.verify()
        assert verification.clean, verification
        kinds, totals = {}, {}
        with accountant._store.snapshot() as snapshot:
            for name in snapshot.budgets():
                kinds[name] = [unpack(body).kind for _, body, _ in snapshot.entries(name)]
                totals[name] = snapshot.row(name).totals
            checkpoints = snapshot.checkpoints()
    return kinds, totals, checkpoints


def prepared(place, operation: str) -> tuple[str, list]:
    """Return a ledger in which the operation can be carried out, and the reservation it holds."""
    location = place()
    holds = []
    with Accountant.open(location) as accountant:
        accountant.create_budget("tips", pure(20.0), unit="article", dataset="d")
        accountant.create_quota("team", pure(20.0), of="tips")
        accountant.charge("tips", ONE, **ASK)
        if operation in ("mark", "settle", "void", "adopt"):
            reservation = accountant.reserve("tips", ONE, uses=5, **ASK)
            if operation != "void":
                reservation.mark()
            holds = [list(hold) for hold in reservation.holds]
    return location, holds


def begun(workers, lines_of, folder, location, operation: str, step: int, **more):
    """Start the operation in a process that dies at a step (0: none).

    Return a function that waits for it and returns what it said: others can be prepared meanwhile.
    """
    folder = folder / f"run-{next(numbers)}"
    folder.mkdir()
    worker, out = workers.send(
        folder, f"step-{operation}", location=str(location), step=step, **more
    )

    def ended() -> list[str]:
        workers.gone(worker)
        lines = lines_of(out)
        shutil.rmtree(folder)
        return lines

    return ended


def every_step(workers, lines_of, folder, place, operation: str, times: int, **more) -> int:
    location, holds = prepared(place, operation)
    before = state(location)  # of all that are prepared
    lines = begun(workers, lines_of, folder, location, operation, 0, holds=holds, **more)()
    steps = sum(line.startswith("step") for line in lines)
    assert any(line.startswith("done") for line in lines), lines
    after = state(location)
    assert (after[0], after[2]) != (before[0], before[2])
    running = []
    for step in [step for step in range(1, steps + 1) for _ in range(times)]:
        location, holds = prepared(place, operation)
        ended = begun(workers, lines_of, folder, location, operation, step, holds=holds, **more)
        running.append((step, location, ended))
    for step, location, ended in running:
        lines = ended()
        assert sum(line.startswith("step") for line in lines) == step, lines
        found = state(location)
        adopted = [Kind.ADOPT] if operation in ("mark", "settle", "void") else []
        untouched = {name: list(kinds) for name, kinds in before[0].items()}
        untouched["tips"] += adopted
        happened = (found[0], len(found[2])) == (after[0], len(after[2]))
        if happened:
            assert found[1] == after[1]
        else:
            assert (found[0], found[1], found[2]) == (untouched, before[1], before[2]), lines
        released = any(line.startswith("done") or "released" in line for line in lines)
        assert happened or not released, f"released without a charge: {lines}"
        with Accountant.open(location) as accountant:  # the next writer goes on
            name = "next" if "next" in accountant.budgets() else "tips"
            if not accountant.statement(name).closed:
                accountant.charge(name, ONE, **ASK)
    return steps


@pytest.fixture
def sqlite_place(tmp_path):
    return lambda: str(tmp_path / f"{next(numbers)}.db")


OPERATIONS = [name for name in WROTE if not name.startswith("broken")]


def report(operation, steps, times):
    print(f"{operation}: killed {times} times at each of {steps} steps; whole or not at all")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_whole_or_not_at_all(workers, lines_of, tmp_path, sqlite_place, operation):
    steps = every_step(workers, lines_of, tmp_path, sqlite_place, operation, 1)
    report(operation, steps, 1)
    assert steps > 12


@pytest.mark.long
@pytest.mark.parametrize("operation", OPERATIONS)
def test_whole_or_not_at_all_at_length(workers, lines_of, tmp_path, sqlite_place, operation, scale):
    steps = every_step(workers, lines_of, tmp_path, sqlite_place, operation, 20 * scale)
    report(operation, steps, 20 * scale)


@pytest.mark.parametrize(
    ("operation", "times"),
    [("quota", 1), *(pytest.param(each, 3, marks=pytest.mark.long) for each in OPERATIONS)],
)
def test_whole_or_not_at_all_in_postgres(
    workers, lines_of, tmp_path, new_database, operation, times
):
    steps = every_step(workers, lines_of, tmp_path, new_database, operation, times)
    report(f"PostgreSQL, {operation}", steps, times)


def test_the_control_is_seen_to_release_without_a_charge(workers, lines_of, tmp_path, sqlite_place):
    with pytest.raises(AssertionError, match="released without a charge"):
        every_step(workers, lines_of, tmp_path, sqlite_place, "broken-charge", 1)


def migrations(workers, lines_of, folder, times: int, operation: str = "migrate") -> int:
    """Kill a migration at each step; return how many there are."""

    def old(name):
        location = folder / name
        with closing(sqlite3.connect(location)) as connection:
            connection.executescript(GOLDEN.read_text())
        return location

    lines = begun(workers, lines_of, folder, old("dry.db"), operation, 0)()
    steps = sum(line.startswith("step") for line in lines)
    expected = state(folder / "dry.db")
    running = []
    for number, step in enumerate(s for s in range(1, steps + 1) for _ in range(times)):
        location = old(f"{number}.db")
        ended = begun(workers, lines_of, folder, location, operation, step)
        running.append((step, location, ended))
    for step, location, ended in running:
        lines = ended()
        assert sum(line.startswith("step") for line in lines) == step
        migrate(ledger_url(location))
        assert state(location) == expected
        location.unlink()
    return steps


@pytest.mark.parametrize("times", [1, pytest.param(20, marks=pytest.mark.long)])
def test_a_migration_is_whole_or_can_be_done_again(workers, lines_of, tmp_path, times):
    steps = migrations(workers, lines_of, tmp_path, times)
    report("migrate", steps, times)
    assert steps > 20


def test_the_control_is_left_half_migrated(workers, lines_of, tmp_path):
    with pytest.raises((LedgerError, AssertionError)) as caught:
        migrations(workers, lines_of, tmp_path, 1, "broken-migrate")
    print(f"control, a migration without a transaction: {caught.value}"[:150])
