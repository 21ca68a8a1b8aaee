"""Small ledgers: what is asked of them, who signs, and many asks in one transaction."""

from __future__ import annotations

import shutil
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import make_url

from accountant import BudgetExceeded
from accountant.notes import Signer
from accountant.writer import Writer
from dp import PureDP, pure

ASK = {"unit": "article", "activity": "survey"}
TENTH = PureDP(0.1)
LIMITS = pure(1.001)
ALICE, BOB = Signer("alice", bytes(32)), Signer("bob", bytes(range(32)))


def put_back(older, location):
    for suffix in ("", "-wal", "-shm"):
        location.with_name(location.name + suffix).unlink(missing_ok=True)
    shutil.copy(older, location)


def spent(accountant, event=TENTH, budget="d"):
    """Charge one by one until it is refused; return how many were charged."""
    for charged in range(100):
        try:
            accountant.charge(budget, event, **ASK)
        except BudgetExceeded:
            return charged
    return 100


def plain(location: str) -> str:
    url = make_url(location).set(drivername="postgresql")
    return url.render_as_string(hide_password=False)


def in_one_batch(location: Path, *calls: Callable[[], object]) -> list[object]:
    """Hold the write lock until every call waits in the queue; return their outcomes in order."""
    outcomes: dict[int, object] = {}

    def go(number: int) -> None:
        try:
            outcomes[number] = calls[number]()
        except Exception as error:  # noqa: BLE001
            outcomes[number] = error

    queued: list[str] = []

    def noting(name: str) -> Callable[..., object]:
        method = getattr(Writer, name)

        def noted(*given: object) -> object:
            if name == "close":  # which does not return meanwhile
                queued.append(name)
                return method(*given)
            done = method(*given)
            queued.append(name)
            return done

        return noted

    threads = [threading.Thread(target=go, args=(number,)) for number in range(len(calls))]
    with (
        pytest.MonkeyPatch.context() as patch,
        closing(sqlite3.connect(location, isolation_level=None)) as other,
    ):
        for name in ("enqueue", "close"):
            patch.setattr(Writer, name, noting(name))
        other.execute("BEGIN IMMEDIATE")
        deadline = time.monotonic() + 25  # before SQLite gives up
        for number, thread in enumerate(threads, 1):
            thread.start()
            while len(queued) < number:
                assert time.monotonic() < deadline, f"call {number} is not in the queue"
                time.sleep(0.001)
        assert not outcomes
        other.execute("ROLLBACK")
        for thread in threads:
            thread.join()
    return [outcomes[number] for number in range(len(calls))]
