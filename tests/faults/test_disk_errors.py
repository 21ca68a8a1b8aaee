"""The disk fails at the n-th call, once or from then on: refused or charged, never in between.

Every call that SQLite makes to open, read, write, truncate and sync its files fails in turn, with
an input/output error or a full disk. Whatever was told a caller must be so: a receipt is in the
ledger; after an error that says "nothing was charged" nothing was; after ``OutcomeUnknown`` it
may be either. Then the disk works again, and so must the ledger.

Control: a store that swallows the error of a commit tells receipts of nothing.
"""

from __future__ import annotations

import errno
import itertools
import shutil
import sqlite3
from contextlib import suppress

import pytest

from accountant import Accountant, LedgerError, OutcomeUnknown
from dp import PureDP, pure
from tests.faults.vfs import ApswStore, Watched, disk_error

ASK = {"unit": "article", "activity": "survey"}
CALLS = ("open", "read", "write", "truncate", "sync")


class Disk:
    """Fails the n-th call, or the n-th and all later ones, while it is switched on."""

    def __init__(self, fail_at: int, code: int, *, sticky: bool) -> None:
        self.fail_at, self.code, self.sticky = fail_at, code, sticky
        self.count, self.on = 0, False

    def watch(self, call: str, *_: object) -> None:
        if not self.on or call not in CALLS:
            return
        self.count += 1
        if self.count == self.fail_at or (self.sticky and self.count > self.fail_at > 0):
            raise disk_error(self.code if call == "write" else errno.EIO)


class Swallowing(ApswStore):
    """Control: goes on after a commit that failed."""

    def _commit(self) -> None:
        with suppress(sqlite3.Error):
            super()._commit()


def asked(accountant: Accountant, told: list) -> None:
    """Charge, reserve, mark, settle; keep what each was told."""

    def tell(act):
        try:
            receipt = act()
        except OutcomeUnknown:
            told.append(("unknown", None))
        except LedgerError:
            told.append(("nothing", None))
        else:
            told.append(("receipt", receipt))
            return receipt

    for turn in range(4):
        tell(lambda: accountant.charge("tips", PureDP(1.0), **ASK))
        if turn % 2 == 0:
            held = []
            with suppress(LedgerError):
                held.append(accountant.reserve("tips", PureDP(0.5), uses=4, **ASK))
            for reservation in held:
                tell(reservation.mark)
                tell(reservation.settle)


def failing(tmp_path, template, number, store=ApswStore, **fault) -> tuple[int, int]:
    """Let one call fail; return how many calls there were, and how many receipts are of nothing."""
    folder = tmp_path / f"{number}"
    folder.mkdir()
    location = shutil.copyfile(template, folder / "ledger.db")
    disk, told = Disk(**fault), []
    vfs = Watched(f"failing-{number}", disk.watch)
    books = store(location, vfs.named, "wal_autocheckpoint=5")
    accountant = Accountant(books)
    disk.on = True
    asked(accountant, told)
    disk.on = False
    with suppress(LedgerError):
        accountant.charge("tips", PureDP(0.25), **ASK)  # the disk works again
    with suppress(LedgerError, sqlite3.Error):
        accountant.close()
    del books, accountant
    with Accountant.open(location) as accountant:
        assert accountant.verify().clean
        with accountant._store.snapshot() as snapshot:
            stored = {seq: digest.hex() for seq, _, digest in snapshot.entries("tips")}
        ones = sum(
            times for event, times in accountant.statement("tips").spent if event == PureDP(1.0)
        )
        accountant.charge("tips", PureDP(1.0), **ASK)
    lost = sum(
        stored.get(receipt.seq) != receipt.digest for what, receipt in told if what == "receipt"
    )
    charged = sum(
        what == "receipt" and receipt.uses == 1 and receipt.seq in stored for what, receipt in told
    )
    if store is ApswStore:
        unknown = sum(what == "unknown" for what, _ in told)
        assert ones <= 4
        assert charged >= ones - unknown
    shutil.rmtree(folder)
    return disk.count, lost


@pytest.fixture
def template(tmp_path):
    location = tmp_path / "template.db"
    with Accountant.open(location) as accountant:
        accountant.create_budget("tips", pure(100.0), unit="article")
    return location


FAULTS = list(itertools.product((errno.EIO, errno.ENOSPC), (False, True)))


@pytest.mark.parametrize("every", [20, pytest.param(1, marks=pytest.mark.long)])
def test_refused_or_charged(tmp_path, template, every, monkeypatch):
    monkeypatch.setenv("EPSLEDGER_STATE", "")
    calls, _ = failing(tmp_path, template, "dry", fail_at=0, code=errno.EIO, sticky=False)
    runs = 0
    for code, sticky in FAULTS:
        for at in range(1 + runs % every, calls + 1, every):
            _, lost = failing(tmp_path, template, f"{runs}", fail_at=at, code=code, sticky=sticky)
            assert lost == 0, (at, code, sticky)
            runs += 1
    print(f"{runs} runs in which one of {calls} file calls failed: 0 receipts of nothing")
    assert calls > 60


def test_the_control_gives_receipts_of_nothing(tmp_path, template, monkeypatch):
    monkeypatch.setenv("EPSLEDGER_STATE", "")
    lost = 0
    for at in range(1, 60):
        with suppress(LedgerError, AssertionError):
            lost += failing(
                tmp_path, template, f"{at}", Swallowing, fail_at=at, code=errno.EIO, sticky=True
            )[1]
    print(f"control, swallowed errors: {lost} receipts of nothing")
    assert lost > 0
