"""Processes that charge one file of lanes until they are told to stop, or killed.

Each writes down what it was told before it goes on: a line is one ``write`` to a file opened for
appending, and so survives the death of the process. A class of its own is the control: it decides
by what it read before it takes the lock.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from accountant.errors import LedgerError
from accountant.stores.unit_lanes import UnitLanes

PROCESSES = get_context("forkserver")
PROCESSES.set_forkserver_preload([__name__])
UNITS = [f"patient-{number}" for number in range(40)]
PRICE, LIMIT = 7, 7 * 25
"""A unit has room for 25 queries."""


def open_lanes(path: Path, kind: type[UnitLanes] = UnitLanes, **terms: object) -> UnitLanes:
    terms = {"opening": "ledger/news/7/0f", "limit": LIMIT, "most_queries": 10**6} | terms
    return kind(path, **terms)


class Unlocked(UnitLanes):
    """Control: reads under the lock, lets it go, and writes what it had decided."""

    def charge(self, lanes, price):
        with self._locked():
            room = self._state.spent[lanes] <= self.limit - price
        time.sleep(3e-3)
        with self._locked():
            paid = np.zeros(len(self._state.spent), bool)
            paid[lanes[room]] = True
            self._append(self._state.spend(price, paid, lanes[room]))
        return room

    def _check_limit(self):
        """Not that it notices what it did."""


class Lazy(UnitLanes):
    """Control: answers at once and commits 1,000 charges later, as a buffered file would."""

    _kept = 0

    def _begin(self):
        self._marks = None  # they would give it away when it is opened again
        if not self._kept:
            super()._begin()

    def _commit(self):
        self._kept += bool(self._state.queries)
        if self._kept in (0, 1000):
            super()._commit()
            self._kept = 0


def charge_on(
    path: Path, out: Path, go: Path, asks: int, kind: type[UnitLanes], limit: int, state: str
) -> None:
    """Charge random units so many times; write down which had room, each time."""
    os.environ["EPSLEDGER_STATE"] = state
    choose = np.random.default_rng(os.getpid())
    lanes = open_lanes(path, kind, limit=limit)
    at = lanes.lanes_of(UNITS)
    file = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(file, b"[]\n")
    while not go.exists():
        time.sleep(1e-3)
    for _ in range(asks):
        scoring = np.flatnonzero(choose.random(len(at)) < 0.8)
        kept = lanes.charge(at[scoring], PRICE)
        os.write(file, json.dumps(scoring[kept].tolist()).encode() + b"\n")
    os.write(file, b"done\n")
    lanes.close()


def on_a_full_disk(path: Path, out: Path, state: str) -> None:
    """Charge while files may not grow, and again when they may; write what was raised and kept."""
    os.environ["EPSLEDGER_STATE"] = state
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    lanes, said = open_lanes(path), []
    at = lanes.lanes_of(UNITS)
    for most in (0, resource.RLIM_INFINITY):
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
        try:
            said.append(lanes.charge(at, PRICE).tolist())
        except LedgerError as error:
            said.append(type(error).__name__)
    out.write_text(json.dumps(said))


def charge_once_after_a_fork(lanes: UnitLanes) -> str:
    """Return what a forked child was told; its parent goes on."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            lanes.charge(np.arange(2), PRICE)
            told = "charged"
        except LedgerError as error:
            told = str(error)
        lanes.close()
        os.write(writer, told.encode())
        os._exit(0)
    os.waitpid(child, 0)
    told = os.read(reader, 1000).decode()
    os.close(reader)
    os.close(writer)
    return told
