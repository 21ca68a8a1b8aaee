"""Many ask at once for the last uses: exactly those that fit are admitted.

Control: the obvious implementation on SQLModel, in SQLAlchemy's default transaction on SQLite,
under the same function. Two of its threads read the same sum, and it overspends without an error.
"""

from __future__ import annotations

import sqlite3
import threading
from contextlib import closing
from pathlib import Path

import pytest

from accountant import Accountant
from dp import PureDP, pure

FITTING = 50
CREATE_SPEND = (
    "CREATE TABLE spend (id INTEGER PRIMARY KEY, epsilon FLOAT NOT NULL, race INTEGER NOT NULL)"
)


def race(workers, lines_of, wait, folder: Path, mode: str, *, processes: int, threads: int):
    """Let all ask at once; return how many were told yes, told no, and are stored."""
    outs = workers.start(folder, mode, processes=processes, threads=threads, asks=20)
    wait(lambda: all("done" in lines_of(out) for out in outs.values()))
    lines = [line.split()[0] for out in outs.values() for line in lines_of(out)]
    errors = [line for out in outs.values() for line in lines_of(out) if line.startswith("error")]
    assert not errors
    return lines.count("charged"), lines.count("refused")


def of_ours(workers, lines_of, wait, folder: Path, **crowd: int):
    location = folder / "ledger.db"
    with Accountant.open(location) as accountant:
        accountant.create_budget("tips", pure(FITTING + 0.5), unit="article")
    told = race(workers, lines_of, wait, folder, "asks", **crowd)
    with Accountant.open(location) as accountant:
        assert accountant.verify().clean
        statement = accountant.statement("tips")
        charged = sum(line.entry.kind.name == "CHARGE" for line in statement.lines)
        assert accountant.uses_that_fit("tips", PureDP(1.0)) == 0
    assert (charged, statement.refused) == told
    return told


def of_control(workers, lines_of, wait, folder: Path, **crowd: int):
    with closing(sqlite3.connect(folder / "ledger.db")) as connection:
        connection.execute(CREATE_SPEND)
    return race(workers, lines_of, wait, folder, "broken_asks", **crowd)


CROWDS = [{"processes": 1, "threads": 8}, {"processes": 4, "threads": 4}]


@pytest.mark.parametrize("crowd", CROWDS, ids=["threads", "processes"])
def test_exactly_what_fits_is_admitted(workers, lines_of, wait, tmp_path, crowd):
    asked = crowd["processes"] * crowd["threads"] * 20
    told = of_ours(workers, lines_of, wait, tmp_path, **crowd)
    print(f"ours {crowd}: {told[0]} admitted, {told[1]} refused, of {asked}")
    assert told == (FITTING, asked - FITTING)


@pytest.mark.parametrize("crowd", CROWDS, ids=["threads", "processes"])
def test_the_control_overspends(workers, lines_of, wait, tmp_path, crowd):
    admitted = []
    for attempt in range(40):
        folder = tmp_path / f"{attempt}"
        folder.mkdir()
        admitted.append(of_control(workers, lines_of, wait, folder, **crowd)[0])
        if admitted[-1] > FITTING:
            break
    print(f"control {crowd}: {admitted} admitted of a cap of {FITTING}")
    assert max(admitted) > FITTING


@pytest.mark.long
def test_races_at_length(workers, lines_of, wait, tmp_path, scale):
    for attempt in range(10 * scale):
        for number, crowd in enumerate(CROWDS):
            asked = crowd["processes"] * crowd["threads"] * 20
            folder = tmp_path / f"{attempt}-{number}"
            (folder / "control").mkdir(parents=True)
            told = of_ours(workers, lines_of, wait, folder, **crowd)
            control = of_control(workers, lines_of, wait, folder / "control", **crowd)
            print(f"ours {told[0]}, control {control[0]} of a cap of {FITTING}: {crowd}")
            assert told == (FITTING, asked - FITTING)


def last_units(workers, lines_of, wait, folder: Path, races: int, mode: str, *, threads: int):
    """Let 32 processes race for one unit after another; return how many won each race."""
    outs = workers.start(folder, mode, processes=32, threads=threads, asks=races)
    wait(lambda: all("done" in lines_of(out) for out in outs.values()), 60 + 2 * races)
    lines = [line.split() for out in outs.values() for line in lines_of(out)]
    assert not [line for line in lines if line[0] == "error"]
    asked = [int(line[1]) for line in lines if line[0] in ("charged", "refused")]
    assert len(asked) == races * 32 * threads
    wins = [int(line[1]) for line in lines if line[0] == "charged"]
    return [wins.count(number) for number in range(races)]


@pytest.mark.parametrize("races", [5, pytest.param(200, marks=pytest.mark.long)])
def test_one_of_many_wins_the_last_unit(workers, lines_of, wait, tmp_path, races, scale):
    races *= scale if races > 5 else 1
    with Accountant.open(tmp_path / "ledger.db") as accountant:
        for number in range(races):
            accountant.create_budget(f"tips{number}", pure(1.5), unit="article")
    won = last_units(workers, lines_of, wait, tmp_path, races, "last_units", threads=8)
    with Accountant.open(tmp_path / "ledger.db") as accountant:
        assert accountant.verify().clean
    print(f"{races} races of 32 processes x 8 threads for the last unit: one winner in each")
    assert won == [1] * races


def test_the_control_gives_the_last_unit_away_twice(workers, lines_of, wait, tmp_path):
    with closing(sqlite3.connect(tmp_path / "ledger.db")) as connection:
        connection.execute(CREATE_SPEND)
    won = last_units(workers, lines_of, wait, tmp_path, 10, "broken_last_units", threads=1)
    print(f"control: winners of the last unit {won}")
    assert max(won) > 1


def test_threads_that_share_a_reservation_mark_exactly_its_uses(tmp_path):
    """Control: none; the count in the handle itself is for reading only."""
    with Accountant.open(tmp_path / "ledger.db") as accountant:
        accountant.create_budget("tips", pure(50.5), unit="article")
        reservation = accountant.reserve(
            "tips", PureDP(1.0), uses=50, unit="article", activity="training"
        )
        outcomes = []

        def mark() -> None:
            for _ in range(20):
                try:
                    outcomes.append(reservation.mark().seq)
                except Exception as error:  # noqa: BLE001
                    outcomes.append(type(error).__name__)

        threads = [threading.Thread(target=mark) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert outcomes.count("ReservationError") == 110
        assert len(set(outcomes)) == 51
        assert accountant.statement("tips").open_reservations == ((2, 50, 50),)
        assert accountant.verify().clean


def test_many_open_a_new_file_at_once(tmp_path):
    errors = []

    def go(location: Path, start: threading.Barrier) -> None:
        start.wait()
        try:
            Accountant.open(location).close()
        except Exception as error:  # noqa: BLE001
            errors.append(str(error))

    for attempt in range(30):
        start = threading.Barrier(6)
        threads = [
            threading.Thread(target=go, args=(tmp_path / f"{attempt}.db", start)) for _ in range(6)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors
