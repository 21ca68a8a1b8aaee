"""A power cut at any moment: what was acknowledged is in the ledger.

A ledger is charged while every write, truncation and sync of its files is recorded. Then the
machine "loses power" at a random point of the record: what was synced is on the disk, and of the
rest each write is there, missing, or torn at a sector of 512 bytes, whatever came after it. The
ledger is opened on what is left. (That a new file's name is in its folder is taken for granted.)

Control: the same with ``synchronous=NORMAL`` loses acknowledged charges.
"""

from __future__ import annotations

import random
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from accountant import Accountant
from accountant.entries import GENESIS, chain
from dp import PureDP, pure
from tests.faults.vfs import Watched, accountant_on

ASK = {"unit": "article", "activity": "survey"}
SECTOR = 512


class Record:
    """What SQLite did to the files, and after how much of it each entry was acknowledged."""

    def __init__(self, location: Path) -> None:
        self.calls: list[tuple[str, str, int, bytes]] = []
        self.told: list[tuple[int, int, str]] = []
        self.location = location
        self.start: dict[str, bytes] = {}

    def watch(self, call: str, file: str, offset: int, data: bytes) -> None:
        if call in ("write", "truncate", "sync", "delete"):
            self.calls.append((call, Path(file).name, offset, data))

    def tell(self, receipt) -> None:
        self.told.append((len(self.calls), receipt.seq, receipt.digest))


def recorded(folder: Path, *pragmas: str) -> Record:
    location = folder / "ledger.db"
    with Accountant.open(location) as accountant:
        accountant.create_budget("tips", pure(1e4), unit="article")
    record = Record(location)
    record.start = {location.name: location.read_bytes()}
    vfs = Watched(f"recorded-{folder.name}", record.watch)
    with accountant_on(location, vfs.named, "wal_autocheckpoint=25", *pragmas) as accountant:
        for turn in range(60):
            record.tell(
                accountant.charge("tips", PureDP(1.0), note="x" * (turn * 7 % 190) or "-", **ASK)
            )
            if turn % 5 == 0:
                reservation = accountant.reserve("tips", PureDP(0.5), uses=3, **ASK)
                record.tell(reservation.receipt)
                record.tell(reservation.mark())
                record.tell(reservation.settle())
    vfs.unregister()
    return record


def after_a_cut(record: Record, at: int, choose: random.Random) -> dict[str, bytearray]:
    """Return the files as a power cut after ``at`` calls may leave them."""
    synced = {}
    for index, (call, file, _, _) in enumerate(record.calls[:at]):
        if call == "sync":
            synced[file] = index
    files = {name: bytearray(content) for name, content in record.start.items()}
    mood = choose.random()
    for index, (call, file, offset, data) in enumerate(record.calls[:at]):
        durable = index <= synced.get(file, -1)
        if not durable and choose.random() < mood:
            continue
        content = files.setdefault(file, bytearray())
        if call == "write":
            if not durable and choose.random() < 0.3:  # torn: some of its sectors
                for start in range(0, len(data), SECTOR):
                    if choose.random() < 0.5:
                        _write(content, offset + start, data[start : start + SECTOR])
            else:
                _write(content, offset, data)
        elif call == "truncate":
            del content[offset:]
        elif call == "delete":
            files.pop(file, None)
    return files


def _write(content: bytearray, offset: int, data: bytes) -> None:
    if len(content) < offset:
        content.extend(bytes(offset - len(content)))
    content[offset : offset + len(data)] = data


def missing(record: Record, at: int, choose: random.Random, folder: Path) -> int:
    """Cut the power; return how many acknowledged entries are lost, all if it cannot be read."""
    for old in folder.iterdir():
        old.unlink()
    for name, content in after_a_cut(record, at, choose).items():
        (folder / name).write_bytes(content)
    acknowledged = {seq: digest for when, seq, digest in record.told if when <= at}
    try:
        with closing(sqlite3.connect(folder / record.location.name)) as connection:
            rows = connection.execute(
                "SELECT seq, body, digest FROM epsledger_entry WHERE budget = 'tips' ORDER BY seq"
            ).fetchall()
            ((seq, head),) = connection.execute("SELECT seq, head FROM epsledger_budget")
    except sqlite3.DatabaseError:
        return len(acknowledged) or 1
    previous = GENESIS
    for number, (at_seq, body, digest) in enumerate(rows, 1):
        if at_seq != number or chain(previous, body) != digest:
            return len(acknowledged) or 1
        previous = digest
    if (seq, head) != (len(rows), previous):
        return len(acknowledged) or 1
    stored = {number: digest.hex() for number, _, digest in rows}
    return sum(stored.get(number) != digest for number, digest in acknowledged.items())


def cuts(tmp_path: Path, states: int, seed: int, *pragmas: str) -> tuple[int, int]:
    """Return of how many cuts something was lost, and how many entries at worst."""
    (tmp_path / "recorded").mkdir()
    (tmp_path / "cut").mkdir()
    record = recorded(tmp_path / "recorded", *pragmas)
    assert len(record.told) == 60 + 12 * 3
    choose, losses = random.Random(seed), []
    for number in range(states):
        at = choose.randint(0, len(record.calls))
        losses.append(missing(record, at, choose, tmp_path / "cut"))
        if number % 50 == 0 and not losses[-1] and not pragmas:
            with Accountant.open(tmp_path / "cut" / record.location.name) as accountant:
                assert accountant.verify().clean
                accountant.charge("tips", PureDP(1.0), **ASK)
    return sum(map(bool, losses)), max(losses)


@pytest.mark.parametrize("states", [1000, pytest.param(20_000, marks=pytest.mark.long)])
def test_a_power_cut_loses_nothing_acknowledged(tmp_path, states, scale, monkeypatch):
    monkeypatch.setenv("EPSLEDGER_STATE", "")
    states *= scale if states > 1000 else 1
    lossy, _ = cuts(tmp_path, states, seed=1)
    print(f"{states} states after a power cut, {lossy} lost something acknowledged")
    assert lossy == 0


def test_the_control_loses_what_it_acknowledged(tmp_path, monkeypatch):
    monkeypatch.setenv("EPSLEDGER_STATE", "")
    lossy, worst = cuts(tmp_path, 300, 2, "synchronous=NORMAL")
    print(f"control, synchronous=NORMAL: {lossy} of 300 states lost up to {worst} entries")
    assert lossy > 50
