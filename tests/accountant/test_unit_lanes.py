"""The private lanes of a per-unit filter: no unit is ever held to more, whatever happens.

Controls: a class that decides before it takes the lock overspends in the same race; without
high-water marks an older copy of the file is taken for the newest one.
"""

from __future__ import annotations

import logging
import os
import shutil
import sqlite3
import stat
import tempfile
import threading
import time
from collections import Counter
from contextlib import closing
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from accountant import (
    InvalidRequest,
    LedgerCorrupt,
    LedgerUnavailable,
    OutcomeUnknown,
    QueriesExhausted,
)
from accountant.stores import unit_lanes
from accountant.stores.unit_lanes import UnitLanes
from tests.accountant.lane_workers import (
    LIMIT,
    PRICE,
    PROCESSES,
    UNITS,
    Lazy,
    Unlocked,
    charge_on,
    charge_once_after_a_fork,
    on_a_full_disk,
    open_lanes,
)
from tests.strategies import examples

EACH = LIMIT // PRICE


@pytest.fixture
def path(tmp_path):
    return tmp_path / "lanes.db"


@pytest.fixture
def lanes(path):
    lanes = open_lanes(path)
    yield lanes
    lanes.close()


# --- against a dictionary -------------------------------------------------------------------------

names = st.sampled_from(["ann", "bob", "cleo", "dan", "eve", "Ωmega", "a\0b"])
steps = st.tuples(
    st.integers(0, 2),
    st.sampled_from(["add", "charge", "charge", "charge", "reopen"]),
    st.sets(names),
    st.integers(1, 9),
)
openings = map(str, count())


@examples(40)
@given(st.lists(steps, min_size=5, max_size=30), st.integers(1, 4))
def test_it_is_a_dictionary_of_sums(script, fold) -> None:
    """Three handles on one file, each brought up to date by its own charges."""
    spent: dict[str, int] = {}
    asked, opening = 0, f"model/{next(openings)}"

    def opened() -> UnitLanes:
        return open_lanes(file, opening=opening, limit=20, most_queries=12)

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(unit_lanes, "FOLD", fold)
        file = Path(folder, "lanes.db")
        handles = [opened() for _ in range(3)]
        for number, what, some, price in script:
            if what == "reopen":
                handles[number].close()
                handles[number] = opened()
                continue
            units = sorted(some)
            at = handles[number].lanes_of(units)
            spent |= {unit: 0 for unit in units if unit not in spent}
            if what == "add":
                continue
            if asked == 12:
                with pytest.raises(QueriesExhausted):
                    handles[number].charge(at, price)
                continue
            kept = handles[number].charge(at, price).tolist()
            asked += 1
            assert kept == [spent[unit] + price <= 20 for unit in units]
            for unit, paid in zip(units, kept, strict=True):
                spent[unit] += price * paid
            assert handles[number].queries == asked
        with closing(opened()) as again:
            assert totals(again) == spent
        for handle in handles:
            handle.close()


def totals(lanes: UnitLanes) -> dict[str, int]:
    """What every unit has spent, from the file as it is now."""
    with lanes._locked():
        return {unit: int(lanes._state.spent[lane]) for unit, lane in lanes._state.lane.items()}


# --- one handle -----------------------------------------------------------------------------------


def test_a_unit_that_was_removed_and_comes_back_finds_what_it_spent(path) -> None:
    with closing(open_lanes(path)) as lanes:
        at = lanes.lanes_of(["ann", "bob"])
        for _ in range(EACH):
            assert lanes.charge(at, PRICE).tolist() == [True, True]
    with closing(open_lanes(path)) as lanes:  # an index without ann
        bob, cleo = lanes.lanes_of(["bob", "cleo"])
        assert (bob, cleo) == (1, 2)
        assert lanes.charge(np.array([cleo, bob]), PRICE).tolist() == [True, False]
    with closing(open_lanes(path)) as lanes:  # and with her again
        again = lanes.lanes_of(["dan", "ann"])
        assert again.tolist() == [3, 0]
        assert lanes.charge(again, PRICE).tolist() == [True, False]


def test_every_query_counts_and_the_cap_holds(path) -> None:
    with closing(open_lanes(path, most_queries=3)) as lanes:
        at = lanes.lanes_of(["ann"])
        assert lanes.charge(at[:0], 1).tolist() == []  # nobody scores
        assert lanes.charge(at, LIMIT + 1).tolist() == [False]  # nobody has room
        assert lanes.charge(at, LIMIT).tolist() == [True]
        assert lanes.queries == 3
        with pytest.raises(QueriesExhausted, match="all 3 queries") as caught:
            lanes.charge(at, 1)
        assert caught.value.most_queries == 3
        assert lanes.queries == 3
    with closing(open_lanes(path, most_queries=3)) as lanes:
        assert lanes.queries == 3
        with pytest.raises(QueriesExhausted):
            lanes.charge(at, 1)


def test_exactly_the_limit_fits_also_the_largest(path) -> None:
    with closing(open_lanes(path, limit=2**62 - 1)) as lanes:
        at = lanes.lanes_of(["ann"])
        assert lanes.charge(at, 2**62 - 2).tolist() == [True]
        assert lanes.charge(at, 2).tolist() == [False]
        assert lanes.charge(at, 2**62 - 1).tolist() == [False]
        assert lanes.charge(at, 1).tolist() == [True]
        assert lanes.charge(at, 1).tolist() == [False]
        assert totals(lanes) == {"ann": 2**62 - 1}


@pytest.mark.parametrize("price", [0, -1, 1.0, True, None, "1", 2**62, float("nan")])
def test_prices(lanes, price) -> None:
    with pytest.raises(InvalidRequest, match="price must be a whole number"):
        lanes.charge(lanes.lanes_of(["ann"]), price)
    assert lanes.queries == 0


@pytest.mark.parametrize(
    ("at", "why"),
    [
        ([0, 0], "named twice"),
        ([2], "not one of this file"),
        ([-1], "not one of this file"),
        ([0.0], "whole numbers"),
        ([[0, 1]], "whole numbers"),
        ([True], "whole numbers"),
    ],
)
def test_lanes_that_are_none(lanes, at, why) -> None:
    lanes.lanes_of(["ann", "bob"])
    with pytest.raises(InvalidRequest, match=why):
        lanes.charge(np.array(at), 1)
    assert lanes.queries == 0
    assert lanes.charge(np.array([1, 0]), 1).all()


@pytest.mark.parametrize("units", [[""], ["ann", None], [1], [b"ann"]])
def test_units_that_are_none(lanes, units) -> None:
    with pytest.raises(InvalidRequest, match="has no id"):
        lanes.lanes_of(units)
    assert totals(lanes) == {}


def test_units_may_repeat(lanes) -> None:
    assert lanes.lanes_of(["ann", "bob", "ann", "ann"]).tolist() == [0, 1, 0, 0]
    assert lanes.lanes_of([]).shape == (0,)
    assert lanes.lanes_of(["ann"]).dtype == np.intp


@pytest.mark.parametrize(
    "changed", [{"opening": "ledger/news/8/0f"}, {"limit": LIMIT + 1}, {"most_queries": 10}]
)
def test_another_opening_limit_or_cap_is_refused(lanes, path, changed) -> None:
    with pytest.raises(InvalidRequest, match=f"not {next(iter(changed.values()))!r}"):
        open_lanes(path, **changed)
    assert lanes.queries == 0


def test_the_file_of_another_filter_is_no_older_copy(tmp_path) -> None:
    """Two filters are open on this machine, and their files are mixed up."""
    for number in (1, 2):
        with closing(open_lanes(tmp_path / f"{number}.db", opening=f"{number}")) as lanes:
            lanes.charge(lanes.lanes_of(["ann"]), PRICE)
    with pytest.raises(InvalidRequest, match="has the opening '2', not '1'"):
        open_lanes(tmp_path / "2.db", opening="1")
    with pytest.raises(InvalidRequest, match="opening"):
        open_lanes(tmp_path / "3.db", opening=None)


@pytest.mark.parametrize("name", ["limit", "most_queries"])
@pytest.mark.parametrize("value", [0, -1, 2**62, 1.5, True])
def test_limits_out_of_range(path, name, value) -> None:
    with pytest.raises(InvalidRequest, match=name):
        open_lanes(path, **{name: value})
    assert not path.exists()


def test_only_the_owner_can_read_it(lanes, path) -> None:
    lanes.charge(lanes.lanes_of(["ann"]), 1)
    files = sorted(path.parent.iterdir())
    assert [file.name for file in files] == ["lanes.db", "lanes.db-shm", "lanes.db-wal"]
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    lanes.close()
    path.chmod(0o640)
    with pytest.raises(LedgerUnavailable, match="chmod 600"):
        open_lanes(path)


def test_it_logs_nothing(lanes, caplog) -> None:
    caplog.set_level(logging.DEBUG)
    at = lanes.lanes_of(["ann", "bob"])
    for _ in range(EACH + 1):
        lanes.charge(at, PRICE)
    assert caplog.records == []


def test_commits_are_synced(lanes) -> None:
    lanes.charge(lanes.lanes_of(["ann"]), 1)
    for pragma, value in {"synchronous": 2, "journal_mode": "wal", "fullfsync": 1}.items():
        assert lanes._execute(f"PRAGMA {pragma}") == [(value,)]


def test_a_closed_one_says_so(lanes) -> None:
    lanes.close()
    lanes.close()
    with pytest.raises(LedgerUnavailable, match="closed"):
        lanes.charge(np.arange(0), 1)


def test_a_forked_child_may_not_use_it(lanes) -> None:
    at = lanes.lanes_of(["ann", "bob"])
    assert "before a fork" in charge_once_after_a_fork(lanes)
    assert lanes.charge(at, PRICE).all()
    assert lanes.queries == 1


def test_folding_keeps_the_file_small(path, monkeypatch) -> None:
    monkeypatch.setattr(unit_lanes, "FOLD", 10)
    with closing(open_lanes(path, limit=10**9)) as lanes:
        at = lanes.lanes_of([f"patient-{number}" for number in range(20_000)])
        sizes = []
        for _ in range(8):
            for _ in range(25):
                lanes.charge(at, 1)
            lanes._execute("PRAGMA wal_checkpoint(TRUNCATE)")
            sizes.append(path.stat().st_size)
        assert set(totals(lanes).values()) == {200}
    assert sizes[-1] < 1.1 * sizes[1]


# --- races ----------------------------------------------------------------------------------------


def told_in_threads(path: Path, kind: type[UnitLanes]) -> Counter[int]:
    """Let eight threads with two handles charge all they can; return how often each unit paid."""
    handles = [open_lanes(path, kind, opening=f"{path}") for _ in range(2)]
    at = handles[0].lanes_of(UNITS)
    told: list[int] = []
    start = threading.Barrier(8)

    def go(lanes: UnitLanes) -> None:
        start.wait()
        for _ in range(EACH // 4):
            told.extend(at[lanes.charge(at, PRICE)].tolist())

    threads = [threading.Thread(target=go, args=(handles[n % 2],)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for handle in handles:
        handle.close()
    return Counter(told)


def test_threads_pay_exactly_what_fits(path) -> None:
    assert set(told_in_threads(path, UnitLanes).values()) == {EACH}
    with closing(open_lanes(path, opening=f"{path}")) as lanes:
        assert set(totals(lanes).values()) == {LIMIT}


def test_control_that_threads_without_the_lock_overspend(tmp_path) -> None:
    most = [max(told_in_threads(tmp_path / f"{n}.db", Unlocked).values()) for n in range(3)]
    print(f"control: {most} queries of {EACH} that fit")
    assert max(most) > EACH


class Crowd:
    """Processes that charge one file."""

    def __init__(
        self,
        folder: Path,
        state: Path | str,
        kind: type[UnitLanes] = UnitLanes,
        *,
        asks: int = 30,
        limit: int = LIMIT,
        processes: int = 3,
    ) -> None:
        self.path, self.go = folder / "lanes.db", folder / "go"
        self.outs = [folder / f"out-{number}" for number in range(processes)]
        self.workers = [
            PROCESSES.Process(
                target=charge_on, args=(self.path, out, self.go, asks, kind, limit, str(state))
            )
            for out in self.outs
        ]
        for worker in self.workers:
            worker.start()
        self.wait(lambda: all(self.lines(out) for out in self.outs))
        self.go.touch()

    def wait(self, until) -> None:
        deadline = time.monotonic() + 60
        while not until():
            assert time.monotonic() < deadline
            assert not any(worker.exitcode for worker in self.workers)
            time.sleep(0.005)

    def lines(self, out: Path) -> list[str]:
        return out.read_text().split("\n")[:-1] if out.exists() else []

    def told(self) -> Counter[int]:
        """How often each unit paid, as the processes were told."""
        lines = (line for out in self.outs for line in self.lines(out) if line != "done")
        return Counter(unit for line in lines for unit in eval(line))  # noqa: S307

    def end(self) -> None:
        for worker in self.workers:
            worker.join()
            worker.close()


def test_processes_pay_exactly_what_fits(tmp_path, state) -> None:
    crowd = Crowd(tmp_path, state)
    crowd.wait(lambda: all("done" in crowd.lines(out) for out in crowd.outs))
    crowd.end()
    told = crowd.told()
    assert told == Counter(dict.fromkeys(range(len(UNITS)), EACH))
    with closing(open_lanes(crowd.path)) as lanes:
        assert totals(lanes) == {unit: PRICE * told[n] for n, unit in enumerate(UNITS)}
        assert lanes.queries == 90


def test_control_that_processes_without_the_lock_overspend(tmp_path, state) -> None:
    crowd = Crowd(tmp_path, state, Unlocked)
    crowd.wait(lambda: all("done" in crowd.lines(out) for out in crowd.outs))
    crowd.end()
    print(f"control: {max(crowd.told().values())} queries of {EACH} that fit")
    assert max(crowd.told().values()) > EACH
    with pytest.raises(LedgerCorrupt, match="above the limit"):
        open_lanes(crowd.path)


def test_many_make_the_file_at_once(tmp_path) -> None:
    for attempt in range(4):
        path, start, errors = tmp_path / f"{attempt}.db", threading.Barrier(6), []

        def go(path=path, start=start, errors=errors) -> None:
            start.wait()
            try:
                with closing(open_lanes(path, opening=f"{path}")) as lanes:
                    lanes.charge(lanes.lanes_of(["ann"]), PRICE)
            except Exception as error:  # noqa: BLE001
                errors.append(error)

        threads = [threading.Thread(target=go) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        with closing(open_lanes(path, opening=f"{path}")) as lanes:
            assert totals(lanes) == {"ann": 6 * PRICE}
        assert not list(tmp_path.glob("*.db.*"))


# --- kill -9 --------------------------------------------------------------------------------------


def kill_round(
    folder: Path, state: Path | str, kind: type[UnitLanes], queries: int, processes: int
):
    """Kill all after so many queries; return, over all units, what was told, spent and lost."""
    folder.mkdir()
    endless = PRICE * 10**6
    crowd = Crowd(folder, state, kind, asks=10**6, limit=endless, processes=processes)
    crowd.wait(lambda: sum(len(crowd.lines(out)) for out in crowd.outs) > queries)
    for worker in crowd.workers:
        worker.kill()
    crowd.end()
    told = crowd.told()
    with closing(open_lanes(crowd.path, limit=endless)) as lanes:
        found = totals(lanes)
        assert lanes.charge(lanes.lanes_of(UNITS), PRICE).all()
    paid = [found[unit] // PRICE for unit in UNITS]
    assert all(most <= told[n] + processes for n, most in enumerate(paid))
    return told.total(), sum(paid), sum(max(0, told[n] - most) for n, most in enumerate(paid))


@pytest.mark.parametrize("rounds", [2, pytest.param(40, marks=pytest.mark.long)])
def test_what_was_returned_is_there_after_kill_9(tmp_path, state, rounds, scale, monkeypatch):
    """Every second round goes past a fold."""
    choose = np.random.default_rng(rounds)
    told, paid, lost = 0, 0, 0
    for attempt in range(rounds * (scale if rounds > 2 else 1)):
        own = state / f"{attempt}"
        monkeypatch.setenv("EPSLEDGER_STATE", str(own))
        queries = int(choose.integers(10, 60)) + unit_lanes.FOLD * (attempt % 2)
        found = kill_round(tmp_path / f"{attempt}", own, UnitLanes, queries, 3)
        told, paid, lost = told + found[0], paid + found[1], lost + found[2]
    print(f"{rounds} rounds: {told} charges were returned, {paid} are there, {lost} are lost")
    assert lost == 0


def test_control_that_a_late_commit_loses_what_was_returned(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("EPSLEDGER_STATE", "")
    told, _, lost = kill_round(tmp_path / "lazy", "", Lazy, 40, 1)
    print(f"control: {told} charges were returned, {lost} are lost")
    assert lost > 0


# --- commits that fail ----------------------------------------------------------------------------


class FailingCommit(UnitLanes):
    """Raises at a commit, before or after it is done."""

    fails: str = ""

    def _execute(self, statement, values=()):
        failing = self.fails if statement == "COMMIT" else ""
        if failing == "before":
            raise sqlite3.OperationalError("disk I/O error")
        found = super()._execute(statement, values)
        if failing == "after":
            raise sqlite3.OperationalError("disk I/O error")
        return found


@pytest.mark.parametrize(("fails", "paid"), [("before", 0), ("after", 1)])
def test_a_commit_of_unknown_outcome_counts_if_it_was_done(path, fails, paid) -> None:
    with closing(open_lanes(path, FailingCommit)) as lanes:
        at = lanes.lanes_of(["ann"])
        lanes.charge(at, PRICE)
        lanes.fails = fails
        with pytest.raises(OutcomeUnknown, match="count it as spent"):
            lanes.charge(at, PRICE)
        lanes.fails = ""
        assert lanes.queries == 1 + paid
        assert totals(lanes) == {"ann": (1 + paid) * PRICE}
        assert [lanes.charge(at, PRICE)[0] for _ in range(EACH)].count(True) == EACH - 1 - paid


def test_a_full_disk(tmp_path, state) -> None:
    path, out = tmp_path / "lanes.db", tmp_path / "out"
    worker = PROCESSES.Process(target=on_a_full_disk, args=(path, out, str(state)))
    worker.start()
    worker.join()
    full, after = eval(out.read_text(), {"true": True, "false": False})  # noqa: S307
    assert full in ("LedgerUnavailable", "OutcomeUnknown")
    assert after == [True] * len(UNITS)
    with closing(open_lanes(path)) as lanes:
        assert lanes.queries in (1, 2)
        assert set(totals(lanes).values()) == {lanes.queries * PRICE}


def test_a_lock_that_is_not_had(lanes, path, monkeypatch) -> None:
    at = lanes.lanes_of(["ann"])
    lanes._execute("PRAGMA busy_timeout=1")
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(LedgerUnavailable, match="locked; nothing was charged"):
            lanes.charge(at, PRICE)
    assert lanes.charge(at, PRICE).all()
    assert lanes.queries == 1


# --- older copies, damage -------------------------------------------------------------------------


def copied(path: Path, to: Path) -> Path:
    with closing(sqlite3.connect(path)) as live, closing(sqlite3.connect(to)) as target:
        live.backup(target)
    to.chmod(0o600)
    return to


def put_back(copy: Path, path: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    shutil.copy(copy, path)


def with_older_copies(path: Path, tmp_path: Path) -> list[Path]:
    copies = []
    for number in range(4):
        with closing(open_lanes(path)) as lanes:
            lanes.charge(lanes.lanes_of(["ann", f"unit-{number // 2}"]), PRICE)
        copies.append(copied(path, tmp_path / f"copy-{number}.db"))
    return copies


def test_an_older_copy_is_refused(path, tmp_path) -> None:
    *older, newest = with_older_copies(path, tmp_path)
    for copy in older:
        put_back(copy, path)
        with pytest.raises(LedgerCorrupt, match="an older copy was put in its place"):
            open_lanes(path)
    put_back(newest, path)
    with closing(open_lanes(path)) as lanes:
        assert lanes.queries == 4


def test_control_that_an_older_copy_is_taken_without_marks(path, tmp_path, monkeypatch) -> None:
    older = with_older_copies(path, tmp_path)[0]
    put_back(older, path)
    monkeypatch.setenv("EPSLEDGER_STATE", "")
    with closing(open_lanes(path)) as lanes:
        assert lanes.queries == 1


def test_a_copy_that_went_on_further_is_refused(path, tmp_path, monkeypatch) -> None:
    older = with_older_copies(path, tmp_path)[0]
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("EPSLEDGER_STATE", str(tmp_path / "elsewhere"))
        with closing(open_lanes(older)) as lanes:
            for _ in range(9):
                lanes.charge(lanes.lanes_of(["bob"]), PRICE)
    put_back(older, path)
    with pytest.raises(LedgerCorrupt, match="on from a copy"):
        open_lanes(path)


def test_a_file_that_was_deleted_is_not_made_anew(path) -> None:
    with closing(open_lanes(path)):
        pass
    path.unlink()
    with pytest.raises(LedgerCorrupt, match="went back"):
        open_lanes(path)


def test_a_file_that_is_replaced_under_a_handle_is_noticed(lanes, path, tmp_path) -> None:
    at = lanes.lanes_of(["ann"])
    copy = copied(path, tmp_path / "copy.db")
    lanes.charge(at, PRICE)
    put_back(copy, path)
    with pytest.raises(LedgerUnavailable, match="moved, deleted or replaced"):
        lanes.charge(at, PRICE)


def test_what_other_handles_saw_binds_this_one(lanes, path, state) -> None:
    """The file goes back in place, by SQLite's own means, while a handle is open."""
    at = lanes.lanes_of(["ann"])
    lanes.charge(at, PRICE)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("DELETE FROM entry WHERE price > 0")
    with pytest.raises(LedgerCorrupt, match="went back"):
        lanes.charge(at, PRICE)
    shutil.rmtree(state)
    with pytest.raises(LedgerCorrupt, match="went back"):  # and what this one saw itself
        lanes.charge(at, PRICE)


DAMAGE = {
    "a body": "UPDATE body SET body = x'00ff' WHERE seq = 7",
    "a body of another form": "UPDATE body SET body = 'text' WHERE seq = 7",
    "a body that is gone": "DELETE FROM body WHERE seq = 7",
    "units that are gone": "DELETE FROM body WHERE seq = 2",
    "other units": 'UPDATE body SET body = \'["cleo", "dan"]\' WHERE seq = 2',
    "a price": "UPDATE entry SET price = 1 WHERE seq = 7",
    "a price of a folded one": "UPDATE entry SET price = 1 WHERE seq = 3",
    "a price that is none": "UPDATE entry SET price = 'x' WHERE seq = 7",
    "a negative price": "UPDATE entry SET price = -7 WHERE seq = 7",
    "a digest": "UPDATE entry SET digest = zeroblob(32) WHERE seq = 3",
    "a head": "UPDATE entry SET head = zeroblob(32) WHERE seq = 3",
    "an entry in the middle": "DELETE FROM entry WHERE seq = 4",
    "the first one": "DELETE FROM entry WHERE seq = 1",
    "all of them": "DELETE FROM entry",
    "the limit": "UPDATE body SET body = replace(body, '175', '999') WHERE seq = 1",
    "a snapshot": "UPDATE snapshot SET spent = zeroblob(16)",
    "no snapshot": "DELETE FROM snapshot",
    "a snapshot of another entry": "UPDATE snapshot SET seq = 5",
    "a short one": "UPDATE snapshot SET spent = substr(spent, 1, 8)",
    "a table": "DROP TABLE entry",
    "another table": "DROP TABLE body",
    "another program's": "PRAGMA application_id = 7",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_refused_also_without_marks(path, monkeypatch, damage) -> None:
    """Seven queries of two units: four are folded."""
    monkeypatch.setenv("EPSLEDGER_STATE", "")
    monkeypatch.setattr(unit_lanes, "FOLD", 4)
    with closing(open_lanes(path)) as lanes:
        at = lanes.lanes_of(["ann", "bob"])
        for _ in range(7):
            lanes.charge(at, PRICE)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(DAMAGE[damage])
    with pytest.raises(LedgerCorrupt):
        open_lanes(path)


def test_the_file_of_that_test_is_sound_without_damage(path, monkeypatch) -> None:
    monkeypatch.setattr(unit_lanes, "FOLD", 4)
    with closing(open_lanes(path)) as lanes:
        at = lanes.lanes_of(["ann", "bob"])
        for _ in range(7):
            lanes.charge(at, PRICE)
    with closing(sqlite3.connect(path)) as connection:
        bodies = connection.execute(
            "SELECT seq, body IS NULL FROM entry LEFT JOIN body USING (seq)"
        ).fetchall()
    assert bodies == [(1, 0), (2, 0), *((n, 1) for n in range(3, 7)), (7, 0), (8, 0), (9, 0)]
    with closing(open_lanes(path)) as lanes:
        assert totals(lanes) == {"ann": 7 * PRICE, "bob": 7 * PRICE}


@pytest.mark.parametrize("content", [b"", b"not a database" * 500, "half"])
def test_a_file_that_is_no_database_is_refused(path, content) -> None:
    with closing(open_lanes(path)):
        pass
    path.write_bytes(path.read_bytes()[:5000] if content == "half" else content)
    with pytest.raises(LedgerCorrupt):
        open_lanes(path)


def test_a_flipped_bit_is_found_or_changes_nothing(path, scale) -> None:
    with closing(open_lanes(path)) as lanes:
        at = lanes.lanes_of(UNITS)
        for _ in range(9):
            lanes.charge(at[::2], PRICE)
        spent = totals(lanes)
    sound, found = path.read_bytes(), 0
    choose = np.random.default_rng(6)
    for _ in range(100 * scale):
        damaged = bytearray(sound)
        damaged[choose.integers(len(sound))] ^= 1 << choose.integers(8)
        for suffix in ("-wal", "-shm"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)
        path.write_bytes(damaged)
        try:
            with closing(open_lanes(path)) as lanes:
                assert totals(lanes) == spent
        except (LedgerCorrupt, LedgerUnavailable):
            found += 1
    assert found > 10


# --- speed ----------------------------------------------------------------------------------------


@pytest.mark.long
def test_speed_with_a_million_units(path, capsys) -> None:
    """60,000 of them are charged at once; beside it a bare write and sync of as many bytes."""
    units = [f"patient-{number:08d}" for number in range(10**6)]
    with closing(open_lanes(path, limit=2**50)) as lanes:
        start = time.perf_counter()
        at = lanes.lanes_of(units)
        added = time.perf_counter() - start
        choose, wall, processor = np.random.default_rng(7), [], []
        for _ in range(600):
            scoring = at[choose.permutation(10**6)[:60_000]]
            start, used = time.perf_counter(), time.process_time()
            assert lanes.charge(scoring, 12345).all()
            wall.append(time.perf_counter() - start)
            processor.append(time.process_time() - used)
    start = time.perf_counter()
    with closing(open_lanes(path, limit=2**50)) as lanes:
        again = time.perf_counter() - start
        assert lanes.queries == 600
    file, synced = os.open(path.parent / "bare", os.O_CREAT | os.O_WRONLY), []
    for _ in range(100):
        start = time.perf_counter()
        os.write(file, bytes(125_000))
        os.fsync(file)
        synced.append(time.perf_counter() - start)
    os.close(file)
    with capsys.disabled():
        middle, high = (1e3 * np.quantile(wall, q) for q in (0.5, 0.95))
        print(
            f"\n10**6 lanes: made in {added:.1f} s, opened in {again:.1f} s; a charge of 60,000"
            f" takes {middle:.1f} ms, 95 % at most {high:.1f} ms, with a fold {1e3 * max(wall):.0f}"
            f" ms; processor {1e3 * np.median(processor):.1f} ms, mean"
            f" {1e3 * np.mean(processor):.1f} ms; bare sync {1e3 * np.median(synced):.1f} ms"
        )
    assert np.median(processor) < 0.010
