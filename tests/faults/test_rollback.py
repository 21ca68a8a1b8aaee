"""A ledger that is put back to an older state, or copied so that both go on.

Found by what this machine's clients saw, or by an anchor; control: with neither, the older ledger
is clean, and verify says that rollback was not checked.
"""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing

import pytest

from accountant import Accountant, LedgerCorrupt
from accountant.anchors import read_notes
from accountant.notes import Signer
from dp import PureDP, pure

ONE, ASK = PureDP(1.0), {"unit": "article", "activity": "survey"}
SIGNER = Signer("rollback-test", bytes(range(32)))


def copy(location, to):
    """Copy a ledger as a backup program does, write-ahead log included."""
    with closing(sqlite3.connect(location)) as live, closing(sqlite3.connect(to)) as target:
        live.backup(target)


def restore(snapshot, location):
    for name in (location.name, f"{location.name}-wal", f"{location.name}-shm"):
        location.with_name(name).unlink(missing_ok=True)
    shutil.copyfile(snapshot, location)


@pytest.fixture(params=[25, pytest.param(100, marks=pytest.mark.long)])
def snapshots(request, tmp_path):
    """A ledger with older states of itself, and an anchor of each end."""
    location, older = tmp_path / "ledger.db", []
    with Accountant.open(location) as accountant:
        accountant.create_budget("tips", pure(1e4), unit="article")
        accountant.create_budget("news", pure(1e4), unit="article")
    for number in range(request.param):
        snapshot = tmp_path / f"older-{number}.db"
        copy(location, snapshot)
        older.append(snapshot)
        with Accountant.open(location) as accountant:
            accountant.charge(("tips", "news")[number % 3 == 0], ONE, **ASK)
            accountant.checkpoint(SIGNER, to=[tmp_path / "anchors"])
    return location, older


def test_every_older_state_is_found_by_what_this_machine_saw(snapshots, digest_of):
    location, older = snapshots
    found = 0
    for snapshot in older:
        restore(snapshot, location)
        with Accountant.open(location) as accountant:
            assert not accountant.verify().clean
            before = digest_of(location)
            refused = 0
            for name in ("tips", "news"):
                try:
                    accountant.charge(name, ONE, **ASK)
                except LedgerCorrupt as error:
                    refused += "went back" in str(error)
            assert refused
            if refused == 2:
                assert digest_of(location) == before
            found += 1
    print(f"{found} of {len(older)} older states found by high-water marks")
    assert found == len(older)


def test_every_older_state_is_found_by_an_anchor(snapshots, tmp_path, monkeypatch):
    location, older = snapshots
    monkeypatch.setenv("EPSLEDGER_STATE", "")  # another machine
    notes, key = read_notes(tmp_path / "anchors"), SIGNER.verifier_key
    assert len(notes) == len(older)
    found = 0
    for snapshot in older:
        with Accountant.open(snapshot) as accountant:
            assert accountant.verify().clean
            assert accountant.verify().rollback == "not checked"
            verification = accountant.verify([notes], key=key)
            found += not verification.clean
            assert any("rolled back" in problem for problem in verification.anchors)
    print(f"{found} of {len(older)} older states found by an anchor, 0 without")
    assert found == len(older)
    with Accountant.open(location) as accountant:
        verification = accountant.verify([notes], key=key)
        assert verification.clean
        assert verification.rollback == f"checked against {len(older)} anchors"


def test_two_copies_that_both_go_on(tmp_path, monkeypatch):
    location, other = tmp_path / "ledger.db", tmp_path / "other.db"
    with Accountant.open(location) as accountant:
        accountant.create_budget("tips", pure(1e4), unit="article")
    copy(location, other)
    with Accountant.open(location) as accountant:
        accountant.charge("tips", ONE, **ASK)
        accountant.checkpoint(SIGNER, to=[tmp_path / "anchors"])
    monkeypatch.setenv("EPSLEDGER_STATE", str(tmp_path / "elsewhere"))
    with Accountant.open(other) as accountant:  # on another machine
        for _ in range(3):
            accountant.charge("tips", ONE, **ASK)
        verification = accountant.verify(
            [read_notes(tmp_path / "anchors")], key=SIGNER.verifier_key
        )
        assert any("rewritten or forked" in problem for problem in verification.anchors)
    monkeypatch.undo()
    monkeypatch.setenv("EPSLEDGER_STATE", str(tmp_path / "elsewhere"))
    with Accountant.open(location) as accountant, pytest.raises(LedgerCorrupt, match="went back"):
        accountant.charge("tips", ONE, **ASK)


def test_a_copy_that_went_on_further_than_what_was_seen(tmp_path, state):
    """The mark is at entry 2, the fork at entry 4: its entry 2 is another one."""
    location, other = tmp_path / "ledger.db", tmp_path / "other.db"
    with Accountant.open(location) as accountant:
        accountant.create_budget("tips", pure(1e4), unit="article")
    copy(location, other)
    with Accountant.open(location) as accountant:
        accountant.charge("tips", ONE, **ASK)
    (marks,) = state.iterdir()
    seen = marks.read_bytes()
    with Accountant.open(other) as accountant:
        with pytest.raises(LedgerCorrupt, match="went back"):
            accountant.charge("tips", ONE, **ASK)
        marks.unlink()
    with Accountant.open(other) as accountant:
        for _ in range(3):
            accountant.charge("tips", ONE, note="elsewhere", **ASK)
    marks.write_bytes(seen)
    with Accountant.open(other) as accountant, pytest.raises(LedgerCorrupt, match="from a copy"):
        accountant.charge("tips", ONE, **ASK)
