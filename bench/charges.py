"""Time durable charges on SQLite: ours, the floor under it, and a commit for each charge.

``ours``           ``Accountant.charge``: prices, checks 19 lanes, chains, commits; one writer
                   thread commits for all that wait
``floor``          bare ``sqlite3``: BEGIN IMMEDIATE, insert a row, add to a counter, COMMIT
``commit each``    bare ``sqlite3``, 16 threads with a connection each, a commit for each charge

All in WAL mode with ``synchronous=FULL``, on the file system of the current folder. The kinds
alternate in each repetition, and medians over the repetitions are printed, so that a busy
neighbor slows all of them. Charges run for a fixed time; a latency is that of one charge.
Percentiles are over charges: where a few threads get all the turns, look at the worst.
"""

from __future__ import annotations

import sqlite3
import tempfile
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter

from accountant import Accountant
from dp import Gaussian, adaptive

SECONDS, REPETITIONS, ENTRIES = 0.6, 7, 20_000
ASK = {"unit": "article", "activity": "bench"}
EVENT = Gaussian(1e5)


def connected(location: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(location, isolation_level=None)
    for pragma in ("busy_timeout=30000", "journal_mode=WAL", "synchronous=FULL", "fullfsync=1"):
        connection.execute(f"PRAGMA {pragma}")
    return connection


def during(seconds: float, charge: Callable[[], object]) -> list[float]:
    """Return the latency of every charge that started in this time."""
    latencies, now = [], perf_counter()
    end = now + seconds
    while now < end:
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


def ours(folder: Path, threads: int) -> tuple[float, ...]:
    with Accountant.open(folder / "ours.db") as accountant:
        accountant.create_budget("news", adaptive(8.0, 1e-6), unit="article")
        accountant.charge("news", EVENT, **ASK)

        def loop() -> list[float]:
            return during(SECONDS, lambda: accountant.charge("news", EVENT, **ASK))

        return in_threads(threads, lambda: loop)


def bare(folder: Path, threads: int) -> tuple[float, ...]:
    location = folder / "bare.db"
    with closing(connected(location)) as connection:
        connection.execute("CREATE TABLE entry (seq INTEGER PRIMARY KEY, body BLOB)")
        connection.execute("CREATE TABLE budget (spent INTEGER)")
        connection.execute("INSERT INTO budget VALUES (0)")

    def make() -> Callable[[], list[float]]:
        connection = connected(location)

        def charge() -> None:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("INSERT INTO entry (body) VALUES (?)", (bytes(100),))
            connection.execute("UPDATE budget SET spent = spent + 1")
            connection.execute("COMMIT")

        def loop() -> list[float]:
            with closing(connection):
                return during(SECONDS, charge)

        return loop

    return in_threads(threads, make)


KINDS: dict[str, Callable[[Path], tuple[float, ...]]] = {
    "floor, 1 thread": lambda folder: bare(folder, 1),
    "ours, 1 thread": lambda folder: ours(folder, 1),
    "ours, 16 threads": lambda folder: ours(folder, 16),
    "commit each, 16 threads": lambda folder: bare(folder, 16),
}


def verified(folder: Path) -> float:
    """Return entries verified a second."""
    with Accountant.open(folder / "verified.db") as accountant:
        accountant.create_budget("news", adaptive(8.0, 1e-6), unit="article")

        def charge() -> None:
            for _ in range(ENTRIES // 16):
                accountant.charge("news", EVENT, **ASK)

        threads = [threading.Thread(target=charge) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        rates = []
        for _ in range(3):
            began = perf_counter()
            verification = accountant.verify()
            rates.append(verification.budgets[0].entries / (perf_counter() - began))
            assert verification.clean  # noqa: S101
        return median(rates)


def main() -> None:
    figures: dict[str, list[tuple[float, ...]]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix="bench-") as name:
        for repetition in range(REPETITIONS):
            for kind, measure in KINDS.items():
                folder = Path(name) / f"{repetition}-{kind.replace(', ', '-').replace(' ', '-')}"
                folder.mkdir()
                figures[kind].append(measure(folder))
        rate = verified(Path(name))
    print(f"medians of {REPETITIONS} alternating repetitions of {SECONDS} s, current folder's disk")
    heads = f"{'charges/s':>10} {'p50 ms':>8} {'p99 ms':>8} {'worst ms':>9}"
    print(f"{'SQLite, WAL, synchronous=FULL':<36} {heads}")
    for kind, runs in figures.items():
        charges, p50, p99, worst = map(median, zip(*runs, strict=True))
        print(f"{kind:<36} {charges:>10,.0f} {p50:>8.2f} {p99:>8.2f} {worst:>9.1f}")
    each = figures["commit each, 16 threads"]
    pairs = zip(figures["ours, 16 threads"], each, strict=True)
    ratio = median(one[0] / other[0] for one, other in pairs)
    print(f"ours over commit each, 16 threads: {ratio:.1f}x (median of paired ratios)")
    print(f"{'verify':<36} {rate:>10,.0f} entries/s")


if __name__ == "__main__":
    main()
