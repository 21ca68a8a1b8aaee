"""Count in PostgreSQL and in DuckDB, and compare each count with the local scan's.

``local``       ``PrivateIndex.histogram``: NumPy over the rows in memory
``postgresql``  ``PgvectorCorpus.histogram``: pgvector with its defaults, beside an HNSW index on
                the same column
``duckdb``      ``DuckDBCorpus.histogram`` over a Parquet file

Clustered random unit vectors, three rows to a unit. The local scan answers 1,000 queries; the
engines answer some of them as a guard asks, in turn with the local scan so that a busy neighbor
slows all, and all of them by the same expressions, many in one scan. Equal means the same number
of units for every label. As a control, the HNSW index is asked as well.

Arguments: the number of rows, and how many queries the engines answer one by one.
"""

from __future__ import annotations

import resource
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter

import duckdb
import numpy as np
import psycopg
from charges import postgres

from retrieval import Corpus, PrivateIndex
from retrieval.grid import on_grid
from retrieval.pushdown import DuckDBCorpus, PgvectorCorpus, pgvector
from retrieval.pushdown import duckdb as in_duckdb

DIMENSIONS, QUERIES, CLUSTERS, BATCH, TOGETHER = 384, 1000, 200, 10_000, 100
LABELS = ("x", "y", "z")
THRESHOLDS = np.resize(np.float32([0.15, 0.4, 0.45, 0.5, 0.55]), QUERIES).tolist()
NAMED = {"vector": "embedding", "unit": "patient", "label": "topic"}
PUBLIC = {"public_labels": LABELS, "generation": "1"}
HNSW = "USING hnsw (embedding vector_ip_ops) WITH (m = 4, ef_construction = 8)"
SCAN = """
    SELECT n, label, count(*) FROM (
        SELECT n, min(topic) AS label FROM notes, queries
        WHERE embedding <#> query <= -threshold GROUP BY n, patient
    ) AS units GROUP BY n, label
"""
SCANS = """
    SELECT label, {counts} FROM (
        SELECT min(topic) AS label, {scores} FROM notes GROUP BY patient
    ) AS units GROUP BY label
"""
APPROXIMATE = """
    SELECT count(DISTINCT patient) FROM (
        SELECT * FROM notes ORDER BY embedding <#> %(query)s::vector LIMIT 40
    ) AS nearest WHERE embedding <#> %(query)s::vector <= -%(threshold)s::float8
"""


def near(centers: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    noise = rng.normal(size=centers.shape, scale=1.2 / np.sqrt(DIMENSIONS))
    vectors = centers + noise
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def chosen(count: int, rng: np.random.Generator) -> np.ndarray:
    centers = near(np.zeros((CLUSTERS, DIMENSIONS)), np.random.default_rng(0))
    return near(centers[rng.integers(0, CLUSTERS, count)], rng)


def batches(rows: int) -> Iterator[tuple[np.ndarray, list[str], list[str]]]:
    for start in range(0, rows, BATCH):
        rng = np.random.default_rng([1, start])
        owners = rng.integers(0, rows // 3, min(BATCH, rows - start))
        labels = [LABELS[owner % len(LABELS)] for owner in owners]
        yield chosen(len(owners), rng), [f"u{owner}" for owner in owners], labels


def local(rows: int) -> PrivateIndex:
    vectors, units, labels = np.empty((rows, DIMENSIONS), np.float32), [], []
    for some, owners, names in batches(rows):
        vectors[len(units) : len(units) + len(some)] = some
        units += owners
        labels += names
    return PrivateIndex(vectors, units=units, labels=labels, public_labels=LABELS)


def in_postgresql(rows: int, connection: psycopg.Connection) -> PgvectorCorpus:
    connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
    connection.execute("DROP TABLE IF EXISTS notes")
    pgvector.write(connection, "notes", batches(rows), **NAMED)
    connection.execute("SET maintenance_work_mem = '4GB'")
    connection.execute(f"CREATE INDEX ON notes {HNSW}")
    connection.commit()
    return PgvectorCorpus(connection, "notes", **NAMED, **PUBLIC)


def in_parquet(rows: int, connection: duckdb.DuckDBPyConnection, folder: Path) -> DuckDBCorpus:
    connection.execute("SET memory_limit = '6GB'")
    in_duckdb.write(connection, "written", batches(rows), **NAMED)
    connection.execute(f"COPY written TO '{folder}/notes.parquet'")
    connection.execute("DROP TABLE written")
    connection.read_parquet(f"{folder}/notes.parquet").create_view("notes")
    return DuckDBCorpus(connection, "notes", **NAMED, **PUBLIC)


@contextmanager
def timed(what: str) -> Iterator[None]:
    start = perf_counter()
    yield
    print(f"{what} in {perf_counter() - start:.0f} s", flush=True)


def one_by_one(
    corpora: dict[str, Corpus], queries: np.ndarray, single: int
) -> tuple[dict[str, list[float]], dict[str, dict[int, list[int]]]]:
    """Return the seconds and the counts of each query, by corpus."""
    seconds: dict[str, list[float]] = {kind: [] for kind in corpora}
    counts: dict[str, dict[int, list[int]]] = {kind: {} for kind in corpora}
    for at, query in enumerate(queries):
        for kind, corpus in corpora.items():
            if kind == "local" or at * single // QUERIES < (at + 1) * single // QUERIES:
                start = perf_counter()
                counts[kind][at] = corpus.histogram(query, THRESHOLDS[at]).tolist()
                seconds[kind].append(perf_counter() - start)
    return seconds, counts


def scanned_in_postgresql(
    connection: psycopg.Connection, queries: np.ndarray
) -> dict[int, list[int]]:
    connection.execute(
        f"CREATE TABLE queries (n int, query vector({DIMENSIONS}), threshold float8)"
    )
    with connection.cursor() as cursor:
        cursor.executemany(
            "INSERT INTO queries VALUES (%s, %s, %s)",
            [(at, str(query.tolist()), THRESHOLDS[at]) for at, query in enumerate(queries)],
        )
    connection.execute("ANALYZE queries; SET jit = off")
    connection.commit()
    counts = {at: [0] * len(LABELS) for at in range(QUERIES)}
    for at, label, count in connection.execute(SCAN).fetchall():
        counts[at][LABELS.index(label)] = count
    return counts


def scanned_in_duckdb(
    connection: duckdb.DuckDBPyConnection, queries: np.ndarray
) -> dict[int, list[int]]:
    counts = {}
    vector = f"FLOAT[{DIMENSIONS}]"
    for start in range(0, QUERIES, TOGETHER):
        asked = range(start, start + TOGETHER)
        statement = SCANS.format(
            counts=", ".join(f"count(*) FILTER (WHERE s{at})" for at in asked),
            scores=", ".join(
                f"bool_or(array_inner_product(embedding::{vector}, $q{at}::{vector}) >= $t{at})"
                f" AS s{at}"
                for at in asked
            ),
        )
        values = {f"q{at}": queries[at].tolist() for at in asked}
        values |= {f"t{at}": THRESHOLDS[at] for at in asked}
        found = connection.execute(statement, values).fetchall()
        by_label = {label: votes for label, *votes in found}
        for place, at in enumerate(asked):
            counts[at] = [by_label[label][place] for label in LABELS]
    return counts


def wrong_by_hnsw(
    connection: psycopg.Connection, queries: np.ndarray, exact: dict[int, list[int]]
) -> tuple[int, int]:
    """Return how many counts of at most 40 are wrong by the index, and how many there are."""
    connection.execute("SET enable_seqscan = off")
    wrong = small = 0
    for at, query in enumerate(queries):
        if 0 < sum(exact[at]) <= 40:
            values = {"query": str(query.tolist()), "threshold": THRESHOLDS[at]}
            ((count,),) = connection.execute(APPROXIMATE, values).fetchall()
            small += 1
            wrong += count != sum(exact[at])
    return wrong, small


def main(rows: int = 1_000_000, single: int = 12) -> None:
    queries = on_grid(chosen(QUERIES, np.random.default_rng(2)))
    with (
        tempfile.TemporaryDirectory(dir=Path.cwd(), prefix="bench-") as name,
        postgres() as url,
        psycopg.connect(url) as connection,
        duckdb.connect(f"{name}/written.duckdb") as other,
    ):
        corpora: dict[str, Corpus] = {}
        with timed("local: written, checked and opened"):
            corpora["local"] = local(rows)
        with timed("postgresql: written, indexed, checked and opened"):
            corpora["postgresql"] = in_postgresql(rows, connection)
        with timed("duckdb: written, checked and opened"):
            corpora["duckdb"] = in_parquet(rows, other, Path(name))
        ((heap, index),) = connection.execute(
            "SELECT pg_table_size('notes'), pg_indexes_size('notes')"
        ).fetchall()
        connection.commit()
        size = (Path(name) / "notes.parquet").stat().st_size
        print(
            f"{rows:,} rows x {DIMENSIONS}; heap {heap / 2**20:,.0f} MiB, HNSW index"
            f" {index / 2**20:,.0f} MiB, Parquet {size / 2**20:,.0f} MiB"
        )
        seconds, counts = one_by_one(corpora, queries, single)
        exact = counts["local"]
        found = {round(THRESHOLDS[at], 2): sum(exact[at]) for at in range(5)}
        print(f"units found by the first queries, by threshold: {found}")
        print(f"{'one by one':<12}{'queries':>8} {'equal':>8} {'p50 ms':>8} {'p99 ms':>8}")
        for kind, times in seconds.items():
            equal = sum(exact[at] == votes for at, votes in counts[kind].items())
            print(
                f"{kind:<12}{len(times):>8,} {equal:>8,}"
                f" {1e3 * median(times):>8.0f} {1e3 * quantiles(times, n=100)[-1]:>8.0f}",
                flush=True,
            )
        with timed(f"postgresql: {QUERIES:,} queries in one scan"):
            scanned = scanned_in_postgresql(connection, queries)
        print(f"    equal: {sum(exact[at] == votes for at, votes in scanned.items()):,}")
        wrong, small = wrong_by_hnsw(connection, queries, exact)
        print(
            f"asked of the HNSW index: {wrong:,} of {small:,} counts of at most 40 are wrong",
            flush=True,
        )
        with timed(f"duckdb: {QUERIES:,} queries, {TOGETHER} in a scan"):
            scanned = scanned_in_duckdb(other, queries)
        print(f"    equal: {sum(exact[at] == votes for at, votes in scanned.items()):,}")
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"this process: at most {memory:.1f} GiB")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
