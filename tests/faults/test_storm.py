"""Over-budget storms, and forks, pickles and clones of what a process holds."""

from __future__ import annotations

import copy
import os
import pickle
import threading
import traceback
from contextlib import suppress

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from accountant import Accountant, BudgetExceeded, LedgerUnavailable, ReservationError, ledger
from accountant import reservations as reservations_module
from dp import PureDP, pure

ONE, ASK = PureDP(1.0), {"unit": "article", "activity": "survey"}


def storm(location, asks: int, touch) -> tuple[int, int]:
    """Ask a used-up budget from 8 threads while another is charged; return refused and served."""
    refused, served = [], []
    with Accountant.open(location) as accountant:
        accountant.create_budget("full", pure(1.5), unit="article")
        accountant.create_budget("free", pure(1e5), unit="article")
        accountant.charge("full", ONE, **ASK)
        entries = accountant.statement("full").seq
        over = threading.Event()

        def ask(number: int) -> None:
            for turn in range(asks // 8):
                try:
                    accountant.charge("full", ONE, uses=1 + (number * turn) % 200, **ASK)
                    touch()
                except BudgetExceeded:
                    refused.append(1)

        def serve() -> None:
            while not over.is_set():
                accountant.charge("free", ONE, **ASK)
                served.append(1)

        crowd = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
        other = threading.Thread(target=serve)
        for thread in (*crowd, other):
            thread.start()
        for thread in crowd:
            thread.join()
        over.set()
        other.join()
        statement = accountant.statement("full")
        assert accountant.verify().clean
        assert statement.refused == len(refused)
        assert statement.seq - entries <= 65  # 64 kinds are told apart, the rest share a count
    return len(refused), len(served)


@pytest.mark.parametrize("asks", [8_000, pytest.param(100_000, marks=pytest.mark.long)])
def test_a_storm_is_refused_counted_and_leaves_a_short_log(location, asks):
    touched = []
    refused, served = storm(location, asks, lambda: touched.append(1))
    print(
        f"storm: {refused} of {asks} refused and counted, {len(touched)} touched data, {served} served"
    )
    assert refused == asks
    assert not touched
    assert served > asks / 100


def test_the_control_touches_data_before_it_asks(location):
    touched = []
    with Accountant.open(location) as accountant:
        accountant.create_budget("full", pure(0.5), unit="article")
        for _ in range(20):
            touched.append(1)
            with suppress(BudgetExceeded):
                accountant.charge("full", ONE, **ASK)
    print(f"control, data first: {len(touched)} of 20 refused asks touched data")
    assert touched


def test_the_control_writes_every_refusal(location, monkeypatch):
    monkeypatch.setattr(ledger, "MAX_TALLIES", 10**9)
    with pytest.raises(AssertionError, match=r"assert \(\d+ - \d+\) <= 65"):
        storm(location, 4000, int)


def in_child(act) -> str:
    """Fork, run, and return what the child said."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(write, f"returned {act()!r}".encode()[:4000])
        except BaseException as error:  # noqa: BLE001
            os.write(write, f"{type(error).__name__}: {error}".encode()[:4000] or b"?")
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as said:
        words = said.read()
    os.waitpid(child, 0)
    return words


@pytest.fixture
def holder(location):
    with Accountant.open(location) as accountant:
        accountant.create_budget("tips", pure(1000.0), unit="article")
        with accountant.lease("tips", ONE, **ASK, block=64) as lease:
            for _ in range(30):
                lease.mark()
            assert lease._left > 0  # a block is in hand
            yield accountant, lease


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_cannot_spend_what_its_parent_holds(holder):
    accountant, lease = holder
    reservation = accountant.reserve("tips", ONE, uses=5, **ASK)
    assert in_child(lease.mark).startswith("ReservationError: this lease belongs to another")
    assert in_child(lease.close).startswith("ReservationError")
    for act in (
        reservation.mark,
        reservation.settle,
        lambda: accountant.charge("tips", ONE, **ASK),
        lambda: accountant.statement("tips"),
        lambda: accountant.lease("tips", ONE, **ASK).mark(),
    ):
        assert in_child(act).startswith("LedgerUnavailable: this ledger was opened before a fork")
    assert in_child(accountant.close) == "returned None"
    lease.mark()
    reservation.settle()
    accountant.charge("tips", ONE, **ASK)
    assert accountant.verify().clean


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_control_spends_one_use_in_parent_and_child(holder, monkeypatch):
    _, lease = holder
    monkeypatch.setattr(reservations_module, "process", lambda: lease._process)
    left = lease._left
    assert in_child(lease.mark).startswith("returned")
    lease.mark()
    print(f"control, a lease that knows no process: use {left} of its block taken twice")
    assert lease._left == left - 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_child_does_not_keep_the_turn_when_its_parent_dies(location, workers, lines_of, wait):
    """The turn is a lock on an open folder, which a forked child would keep open."""
    with Accountant.open(location) as accountant:
        accountant.create_budget("tips", pure(1000.0), unit="article")
        store = accountant._store
        assert store._turn >= 0
        assert in_child(lambda: store._turn) == "returned -1"


def test_a_lease_cannot_be_copied(holder):
    _, lease = holder
    for act in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises((ReservationError, TypeError), match=r"belongs to the process|pickle"):
            act(lease)
    lease.mark()


class Spending(Dataset):
    """A dataset that marks in the workers of its loader: what must not be."""

    def __init__(self, lease) -> None:
        self.lease = lease

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index):
        self.lease.mark()
        return torch.zeros(1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_workers_of_a_loader_cannot_mark(holder):
    _, lease = holder
    before = lease.marked
    batches = iter(DataLoader(Spending(lease), num_workers=1, multiprocessing_context="fork"))
    with pytest.raises(ReservationError, match="another process"):
        list(batches)
    batches._shutdown_workers()  # as long as they answer: later it would wait for 5 s
    assert lease.marked == before


def test_a_clone_of_the_machine_settles_at_most_once(holder, monkeypatch):
    """A restored image of a process holds the same block: its second settling is refused.

    What a clone marks in memory before that is not seen: at most one block. The boot id tells a
    clone that was booted apart.
    """
    accountant, lease = holder
    clone = object.__new__(type(lease))
    clone.__dict__.update(lease.__dict__, _lock=threading.RLock())
    lease.close()
    with pytest.raises(ReservationError, match="no open reservation"):
        clone.close()
    other = accountant.lease("tips", ONE, **ASK)
    other.mark()
    monkeypatch.setattr(reservations_module, "boot", lambda: "another boot")
    with pytest.raises(ReservationError, match="another process or boot"):
        for _ in range(100):
            other.mark()
    with pytest.raises(ReservationError, match="another process or boot"):
        other.close()


def test_a_ledger_in_memory_is_not_shared_with_a_child():
    with Accountant.open("memory:") as accountant:
        accountant.create_budget("tips", pure(1.0), unit="article")
        child = os.fork()
        if not child:
            try:
                accountant.statement("tips")
            except LedgerUnavailable:
                os._exit(0)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
