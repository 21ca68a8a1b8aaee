"""Processes that charge until they are told to stop, or killed.

One server process imports everything once and forks a worker for each line on its standard
input, so that a round of four fresh processes costs milliseconds. The server itself never opens
a ledger. A worker is given by a JSON object:

``mode``      what its threads do: a function of this file
``location``  the ledger
``out``       file to which each line is written *before* the thread goes on: what the caller
              of the package was told. A line is one ``write`` to a file opened for appending,
              and so survives the death of the process (not that of the host).
``threads``   how many; ``asks``: how many asks each; ``go``: file whose appearance starts them
``bytes``     to how much a file may grow (``RLIMIT_FSIZE``: the kernel refuses the write)

The modes whose name begins with ``broken`` are controls: deliberate mistakes that the tests
must notice.
"""

from __future__ import annotations

import json
import logging
import os
import random
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from sqlalchemy import MetaData
from sqlalchemy.orm import registry
from sqlmodel import Field, Session, SQLModel, create_engine, func, select

from accountant import Accountant, BudgetExceeded
from accountant.notes import Signer
from accountant.stores import ledger_url, migrations
from accountant.stores.migrations import migrate
from accountant.stores.sqlite import SqliteStore
from dp import PureDP, pure

ASK = {"unit": "article", "activity": "survey"}
ONE, NOTHING = PureDP(1.0), PureDP(1e-6)
RACE_SECONDS = 0.35
"""From the start of one race to the next."""
LAZY = 25
"""How many transactions the lazy store keeps before it commits."""


class LazyStore(SqliteStore):
    """Control: answers at once and commits later, as a buffered ledger would."""

    _kept = 0

    def _begin(self, names: frozenset[str]) -> None:
        if self._kept == 0:
            super()._begin(names)

    def _commit(self) -> None:
        self._kept += 1
        if self._kept == LAZY:
            super()._commit()
            self._kept = 0


def lazy(location: str) -> Accountant:
    store = LazyStore(ledger_url(location))
    store.remembered.marks = None  # they would give it away when it is opened again
    return Accountant(store)


class Base(SQLModel, registry=registry(metadata=MetaData())):
    """Tables of the control only."""


class Spend(Base, table=True):
    """Control: the table of the obvious implementation."""

    __tablename__: ClassVar[str] = "spend"
    id: int | None = Field(default=None, primary_key=True)
    epsilon: float
    race: int = 0


class Obvious:
    """Control: read the sum, compare, insert; SQLAlchemy's default transaction on SQLite."""

    def __init__(self, location: str, limit: float = 50.5) -> None:
        self._limit = limit
        self._engine = create_engine(f"sqlite:///{location}", connect_args={"timeout": 60})
        Spend.metadata.create_all(self._engine)

    def charge(self, race: int = 0) -> int | None:
        """Return the row's number, or None if refused."""
        with Session(self._engine) as session:
            of_race = select(func.sum(Spend.epsilon)).where(Spend.race == race)
            spent = session.exec(of_race).one() or 0.0
            if spent + 1.0 > self._limit:
                return None
            row = Spend(epsilon=1.0, race=race)
            session.add(row)
            session.commit()
            return row.id


Say = Callable[[str], None]


def asks(accountant: Accountant, say: Say, count: int) -> None:
    """Ask a fixed number of times, over the end of the budget."""
    for _ in range(count):
        try:
            receipt = accountant.charge("tips", ONE, **ASK)
            say(f"charged {receipt.seq} {receipt.digest}")
        except BudgetExceeded:
            say("refused")


def broken_asks(obvious: Obvious, say: Say, count: int) -> None:
    """Ask the obvious implementation as often."""
    for _ in range(count):
        row = obvious.charge()
        say("refused" if row is None else f"charged {row} -")


def at_the_moment(task_moment: float, number: int) -> None:
    """Wait until the race of this number starts, for all processes alike."""
    time.sleep(max(0.0, task_moment + number * RACE_SECONDS - time.time()))


def last_units(accountant: Accountant, say: Say, count: int) -> None:
    """Race for the last unit of one budget after another, all at the same moments."""
    moment = float(Path(os.environ["EPSLEDGER_RACE"]).read_text())
    for number in range(count):
        at_the_moment(moment, number)
        try:
            accountant.charge(f"tips{number}", ONE, **ASK)
            say(f"charged {number} -")
        except BudgetExceeded:
            say(f"refused {number} -")


def broken_last_units(obvious: Obvious, say: Say, count: int) -> None:
    """Control: the obvious implementation, with a sum for each race."""
    moment = float(Path(os.environ["EPSLEDGER_RACE"]).read_text())
    for number in range(count):
        at_the_moment(moment, number)
        won = obvious.charge(number) is not None
        say(f"{'charged' if won else 'refused'} {number} -")


def charges(accountant: Accountant, say: Say, count: int) -> None:
    """Charge until refused, then wait to be killed."""
    try:
        for _ in range(count):
            receipt = accountant.charge("tips", ONE, **ASK)
            say(f"charged {receipt.seq} {receipt.digest}")
    except BudgetExceeded:
        say("full")


def reservations(accountant: Accountant, say: Say, count: int) -> None:
    """Reserve, mark one by one, settle most of the time; until refused."""
    choose = random.Random(os.getpid() * 1009 + threading.get_ident())
    try:
        for _ in range(count):
            reservation = accountant.reserve("tips", ONE, uses=12, **ASK)
            seq = reservation.receipt.seq
            say(f"reserved {seq} {reservation.receipt.digest}")
            for _ in range(choose.randint(0, 12)):
                reservation.mark()
                say(f"marked {seq} -")
            if choose.random() < 0.8:
                reservation.settle()
                say(f"settled {seq} -")
    except BudgetExceeded:
        say("full")


def quotas(accountant: Accountant, say: Say, count: int) -> None:
    """Charge the budget and two quotas together until refused."""
    try:
        for _ in range(count):
            receipt = accountant.charge(("tips", "team", "app"), ONE, **ASK)
            say(f"charged {receipt.seq} {receipt.digest}")
    except BudgetExceeded:
        say("full")


def broken_quotas(accountant: Accountant, say: Say, count: int) -> None:
    """Control: charge one after another."""
    try:
        for _ in range(count):
            receipt = accountant.charge("tips", ONE, **ASK)
            accountant.charge(("tips", "team"), NOTHING, **ASK)
            accountant.charge(("tips", "app"), NOTHING, **ASK)
            say(f"charged {receipt.seq} {receipt.digest}")
    except BudgetExceeded:
        say("full")


def leases(accountant: Accountant, say: Say, count: int) -> None:
    """Mark a lease in memory until refused; say how many blocks there were."""
    lease = accountant.lease("tips", ONE, **ASK, block=64)
    try:
        for _ in range(count):
            lease.mark()
            say("leased 0 -")
    except BudgetExceeded:
        lease.close()
        say("full")


MODES: dict[str, tuple[Callable, Callable]] = {
    "asks": (Accountant.open, asks),
    "broken_asks": (Obvious, broken_asks),
    "last_units": (Accountant.open, last_units),
    "broken_last_units": (lambda location: Obvious(location, 1.5), broken_last_units),
    "charges": (Accountant.open, charges),
    "broken_charges": (lazy, charges),
    "quotas": (Accountant.open, quotas),
    "broken_quotas": (Accountant.open, broken_quotas),
    "leases": (Accountant.open, leases),
    "reservations": (Accountant.open, reservations),
    "broken_reservations": (lazy, reservations),
}


def work(task: dict) -> None:
    """Run one worker to its end."""
    out = os.open(task["out"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def say(line: str) -> None:
        os.write(out, f"{line}\n".encode())

    os.environ["EPSLEDGER_STATE"] = task["state"]
    os.environ["EPSLEDGER_RACE"] = task["go"]
    make, loop = MODES[task["mode"]]
    books = make(task["location"])
    say("ready")
    while not Path(task["go"]).exists():
        time.sleep(0.001)

    if task["bytes"]:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (task["bytes"], task["bytes"]))

    def run() -> None:
        try:
            loop(books, say, task["asks"])
        except Exception as error:  # noqa: BLE001
            say(f"error {type(error).__name__} {error}".replace("\n", " "))

    threads = [threading.Thread(target=run) for _ in range(task["threads"])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    say("done")
    if task["mode"] not in ("asks", "broken_asks", "last_units", "broken_last_units"):
        signal.pause()


class Steps:
    """Counts the labelled steps of one operation, and dies at one of them."""

    def __init__(self, die_at: int, out: int) -> None:
        self._die_at, self._out, self.count = die_at, out, 0

    def __call__(self, label: str) -> None:
        self.count += 1
        os.write(self._out, f"step {self.count} {label}\n".encode())
        if self.count == self._die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(self, store: object, *names: str) -> None:
        """Make each call of these methods two steps: before it, and after it."""
        for name in names:
            setattr(store, name, self._stepped(name, getattr(store, name)))

    def _stepped(self, name: str, method: Callable) -> Callable:
        def stepped(*args: object) -> object:
            what = args[0] if args and isinstance(args[0], str) else ""
            self(f"before {name} {what[:40]}")
            result = method(*args)
            self(f"after {name} {what[:40]}")
            return result

        return stepped


def operate(task: dict) -> None:
    """Open a ledger, and carry out one operation that may die at a step."""
    os.environ["EPSLEDGER_STATE"] = task["state"]
    out = os.open(task["out"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    steps, what = Steps(task["step"], out), task["mode"].removeprefix("step-")
    if what in ("migrate", "broken-migrate"):
        from sqlalchemy import Engine, event

        if what == "broken-migrate":  # control: each statement by itself
            migrations.start = lambda _: None
        event.listen(Engine, "before_cursor_execute", lambda *args: steps(f"before {args[2][:40]}"))
        event.listen(Engine, "commit", lambda _: steps("before commit"))
        migrate(ledger_url(task["location"]), steps)
        steps("after")
        os.write(out, b"done\n")
        return
    accountant = Accountant.open(task["location"])
    store = accountant._store
    holds = [tuple(hold) for hold in task["holds"]]
    ask = {"unit": "article", "activity": "survey"}
    if what in ("mark", "settle", "void"):
        held = accountant.adopt(holds, ONE)
    steps.around(store, "_begin", "_execute", "_execute_many", "_commit")
    if store.remembered.marks is not None:
        steps.around(store.remembered.marks, "raise_to")
    done = {
        "charge": lambda: accountant.charge("tips", ONE, **ask),
        "broken-charge": lambda: (steps("released"), accountant.charge("tips", ONE, **ask)),
        "quota": lambda: accountant.charge(("tips", "team"), ONE, **ask),
        "key": lambda: accountant.charge("tips", ONE, key="k", **ask),
        "reserve": lambda: accountant.reserve("tips", ONE, uses=3, **ask),
        "mark": lambda: held.mark(2),
        "settle": lambda: held.settle(),  # noqa: PLW0108 - there may be none
        "void": lambda: held.void(),  # noqa: PLW0108
        "adopt": lambda: accountant.adopt(holds, ONE),
        "close": lambda: accountant.close_budget("tips"),
        "correct": lambda: accountant.correct("tips", ONE, **ask),
        "supersede": lambda: accountant.create_budget(
            "next", pure(50.0), unit="article", dataset="d", supersedes="tips"
        ),
        "checkpoint": lambda: accountant.checkpoint(Signer("test", bytes(32))),
    }[what]()
    os.write(out, f"done {getattr(done, 'seq', 0)}\n".encode())
    steps("released")


def serve() -> None:
    """Fork a worker for each line; print its process id."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel collects the dead
    logging.disable(logging.WARNING)  # shares that are nearly used up, thousands of times
    for line in sys.stdin:
        worker = os.fork()
        if worker == 0:
            try:
                task = json.loads(line)
                (operate if task["mode"].startswith("step-") else work)(task)
            finally:
                os._exit(0)
        print(worker, flush=True)


if __name__ == "__main__":
    serve()
