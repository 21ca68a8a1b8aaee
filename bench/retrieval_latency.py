"""Time guarded queries beside a plain exact scan and FAISS's flat index, in turns, in one run.

One thread each, as `make bench` sets it.

Random unit vectors of 384 dimensions; about 1 % of the units are found. The plain scan is
what any exact vote needs: one matrix product, a comparison and a count by label.
"""

from __future__ import annotations

import gc
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import faiss
import numpy as np
from numpy.typing import NDArray

from accountant import Accountant
from dp import adaptive
from retrieval import PrivateIndex, RetrievalGuard

DIMENSIONS, LABELS, SHARE = 384, 10, 0.01
QUERIES, TURN = 200, 20


def unit_vectors(rows: int, rng: np.random.Generator) -> NDArray[np.float32]:
    vectors = rng.standard_normal((rows, DIMENSIONS), np.float32)
    for start in range(0, rows, 100_000):
        block = vectors[start : start + 100_000]
        block /= np.linalg.norm(block, axis=1, keepdims=True)
    return vectors


def measured(rows: int, folder: Path) -> None:
    rng = np.random.default_rng(0)
    vectors, queries = unit_vectors(rows, rng), unit_vectors(QUERIES + 1, rng)
    threshold = float(np.quantile(vectors[:100_000] @ queries[0], 1 - SHARE))
    labels = rng.integers(0, LABELS, rows)
    names = [f"label {label}" for label in range(LABELS)]
    index = PrivateIndex(
        vectors,
        units=[f"{row:07}" for row in range(rows)],
        labels=[names[label] for label in labels],
        public_labels=names,
    )
    flat = faiss.IndexFlatIP(DIMENSIONS)
    flat.add(vectors)
    faiss.omp_set_num_threads(1)
    accountant = Accountant.open(folder / f"{rows}.db")
    accountant.create_budget("b", adaptive(1e6, 1e-6), unit="row")
    guard = RetrievalGuard(accountant, "b", index, unit="row")
    asked = {"threshold": threshold, "noise_multiplier": 50.0}

    def plain(query: NDArray[np.float32]) -> object:
        return np.bincount(labels[vectors @ query >= np.float32(threshold)], minlength=LABELS)

    with (
        guard.leased() as leased,
        guard.per_unit(folder / f"{rows}.units", name="u", mu=10.0, queries=10**6) as units,
    ):
        ways: dict[str, Callable[[NDArray[np.float32]], object]] = {
            "plain exact scan": plain,
            "FAISS flat, top 64": lambda q: flat.search(q[None], 64),
            "FAISS flat, range": lambda q: flat.range_search(q[None], threshold),
            "guard, a charge each": lambda q: guard.vote(q, **asked),
            "guard, leased": lambda q: leased.vote(q, **(asked | {"noise_multiplier": 51.0})),
            "guard, per unit": lambda q: units.vote(q, **(asked | {"noise_multiplier": 52.0})),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        gc.collect()
        for way in ways.values():
            way(queries[QUERIES])  # to warm up
        for first in range(0, QUERIES, TURN):
            for name, way in ways.items():
                for query in queries[first : first + TURN]:
                    start = perf_counter()
                    way(query)
                    times[name].append(perf_counter() - start)
    print(f"{rows:,} x {DIMENSIONS}, {SHARE:.0%} found, {QUERIES} queries each, in turns of {TURN}")
    base = np.array(times["plain exact scan"])
    for name, spent in times.items():
        p50, p99 = np.quantile(spent, [0.5, 0.99]) * 1e3
        ratio = np.median(np.array(spent) / base)
        over = np.median(np.array(spent) - base) * 1e3
        print(f"  {name:<22} p50 {p50:8.2f} ms  p99 {p99:8.2f} ms  {ratio:5.2f}x  {over:+7.2f} ms")
    accountant.close()


def main() -> None:
    with tempfile.TemporaryDirectory(dir=".") as folder:
        for rows in map(int, sys.argv[1:] or ("100000", "1000000")):
            measured(rows, Path(folder))


if __name__ == "__main__":
    main()
