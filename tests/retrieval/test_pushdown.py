"""Counts made inside PostgreSQL and DuckDB are those of the local scan, and no others."""

import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import duckdb
import numpy as np
import psycopg
import pytest

from accountant import Accountant
from dp import adaptive
from retrieval import InvalidIndex, InvalidQuery, PrivateIndex, ReleaseFailed, RetrievalGuard
from retrieval.grid import STEPS, on_grid
from retrieval.pushdown import DuckDBCorpus, PgvectorCorpus, Shards
from retrieval.pushdown import duckdb as duckdb_engine
from retrieval.pushdown import pgvector as pgvector_engine

ROWS, UNITS, DIMENSIONS, QUERIES = 20_000, 7_000, 48, 100
LABELS = ("x", "y", "z")
ODD = """patient"; DROP TABLE 'notes' -- %s %% {0} $1"""
"""A name that breaks any statement it is not quoted in."""
NAMED = {"vector": "embedding", "unit": "patient", "label": "topic"}
PUBLIC = {"public_labels": LABELS, "generation": "1"}


def near(centers, rng):
    vectors = centers + 0.8 * rng.normal(size=centers.shape) / np.sqrt(centers.shape[1])
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


class Rows:
    """Clustered vectors, about three of each unit, one label for each unit; and queries."""

    def __init__(self):
        rng = np.random.default_rng(0)
        centers = near(rng.normal(size=(40, DIMENSIONS)), rng)
        self.vectors = near(centers[rng.integers(0, 40, ROWS)], rng)
        self.owners = rng.integers(0, UNITS, ROWS)
        self.units = [f"u{owner}" for owner in self.owners]
        self.labels = [LABELS[owner % 3] for owner in self.owners]
        self.index = PrivateIndex(
            self.vectors, units=self.units, labels=self.labels, public_labels=LABELS
        )
        self.queries = on_grid(near(centers[rng.integers(0, 40, QUERIES)], rng))
        scores = on_grid(self.vectors) @ self.queries.T
        ranks = np.resize([0, 1, 30, 1000, 10_000], QUERIES)
        # Thresholds at which one row scores exactly as much; and all, and none.
        self.thresholds = -np.partition(-scores, [0, 1, 30, 1000, 10_000], axis=0)[
            ranks, range(QUERIES)
        ].astype(np.float64)
        self.thresholds[:2] = -1.0, 1.0
        self.expected = [self.index.histogram(*asked).tolist() for asked in self.asked()]

    def asked(self):
        return zip(self.queries, self.thresholds.tolist(), strict=True)

    def batches(self, chosen=slice(None)):
        for part in np.array_split(np.arange(ROWS)[chosen], 7):
            yield (
                self.vectors[part],
                [self.units[row] for row in part],
                [self.labels[row] for row in part],
            )


@pytest.fixture(scope="module")
def rows():
    return Rows()


@pytest.fixture
def local():
    with duckdb.connect() as connection:
        yield connection


@pytest.fixture
def connect(new_database):
    """Connect to a database with the extension."""
    url, opened = new_database().replace("+psycopg", ""), []

    def connect():
        opened.append(psycopg.connect(url))
        opened[-1].execute("CREATE EXTENSION IF NOT EXISTS vector")
        opened[-1].commit()
        return opened[-1]

    yield connect
    for connection in opened:
        connection.close()


def counted(corpus, rows):
    return [corpus.histogram(*asked).tolist() for asked in rows.asked()]


def asked_of_hnsw(connection, query, threshold):
    """The broken variant: which rows there are is asked of the approximate index."""
    nearest = "SELECT * FROM notes ORDER BY embedding <#> %(query)s::vector LIMIT 40"
    select = f"""SELECT topic, count(DISTINCT patient) FROM ({nearest}) AS n
        WHERE embedding <#> %(query)s::vector <= -%(threshold)s::float8 GROUP BY topic"""
    values = {"query": str(query.tolist()), "threshold": threshold}
    with connection.transaction():
        connection.execute("SET LOCAL enable_seqscan = off")
        assert "hnsw" in str(connection.execute(f"EXPLAIN {select}", values).fetchall())
        found = dict(connection.execute(select, values).fetchall())
    return [found.get(label, 0) for label in LABELS]


def test_postgresql_counts_as_the_local_scan_does_without_and_with_an_hnsw_index(rows, connect):
    connection = connect()
    pgvector_engine.write(connection, "notes", rows.batches(), **NAMED)
    corpus = PgvectorCorpus(connection, "notes", **NAMED, **PUBLIC)
    assert corpus.dimensions == DIMENSIONS
    assert counted(corpus, rows) == rows.expected
    connection.execute(
        "CREATE INDEX hnsw ON notes USING hnsw (embedding vector_ip_ops) WITH (m = 4, ef_construction = 8)"
    )
    connection.commit()
    assert counted(corpus, rows) == rows.expected
    small = [at for at, votes in enumerate(rows.expected) if sum(votes) <= 31]
    wrong = 0
    for at in small:
        found = asked_of_hnsw(connection, rows.queries[at], rows.thresholds[at])
        wrong += found != rows.expected[at]
    assert len(small) > 40
    assert wrong > 10


def test_duckdb_counts_as_the_local_scan_does_in_tables_and_in_parquet_files(rows, local, tmp_path):
    duckdb_engine.write(local, "notes", rows.batches(), **NAMED)
    corpus = DuckDBCorpus(local, "notes", **NAMED, **PUBLIC)
    assert corpus.dimensions == DIMENSIONS
    assert counted(corpus, rows) == rows.expected
    for half in range(2):
        local.execute(
            f"COPY (SELECT * FROM notes WHERE rowid % 2 = {half}) TO '{tmp_path}/{half}.parquet'"
        )
    local.execute(f"CREATE VIEW files AS SELECT * FROM read_parquet('{tmp_path}/*.parquet')")
    corpus = DuckDBCorpus(local, "files", **NAMED, **PUBLIC)
    assert counted(corpus, rows) == rows.expected


def test_shards_of_both_engines_add_up_to_the_local_scan(rows, connect, local):
    shards = []
    for place in range(4):
        engine, kind, connection = (
            (duckdb_engine, DuckDBCorpus, local),
            (pgvector_engine, PgvectorCorpus, connect()),
        )[place % 2]
        chosen = rows.owners % 4 == place
        engine.write(connection, f"part{place}", rows.batches(chosen), **NAMED)
        shards.append(kind(connection, f"part{place}", **NAMED, **PUBLIC))
    corpus = Shards(shards)
    assert counted(corpus, rows) == rows.expected
    counts = [corpus.count(*asked) for asked in islice(rows.asked(), 20)]
    assert counts == [sum(votes) for votes in rows.expected[:20]]
    assert corpus.generation == '["1", "1", "1", "1"]'
    assert [list(shard.units()) for shard in shards] == [
        sorted({f"u{owner}" for owner in rows.owners if owner % 4 == place}) for place in range(4)
    ]
    assert Shards(shards[1:]).count(rows.queries[0], -1.0) < counts[0] == len(rows.index.names)


def exact_scores(engine, connection, vectors, query):
    if engine is pgvector_engine:
        text = "SELECT -(v <#> %s::vector) FROM notes ORDER BY u::int"
        return [score for (score,) in connection.execute(text, [str(query.tolist())])]
    text = f"SELECT array_inner_product(v, $1::FLOAT[{len(query)}]) FROM notes ORDER BY u::INT"
    return [score for (score,) in connection.execute(text, [query.tolist()]).fetchall()]


@pytest.mark.parametrize("engine", [duckdb_engine, pgvector_engine])
def test_scores_of_the_engines_are_those_of_integers(engine, request):
    connection = request.getfixturevalue("local" if engine is duckdb_engine else "connect")
    connection = connection() if callable(connection) else connection
    rng = np.random.default_rng(1)
    for dimensions in (3, 37, 384, 1536):
        vectors = near(rng.normal(size=(500, dimensions)), rng)
        vectors[0] = np.eye(dimensions)[0]  # the largest sums
        units = [str(row) for row in range(500)]
        engine.write(connection, "notes", [(vectors, units, None)], vector="v", unit="u")
        steps = np.rint(on_grid(vectors) * np.float64(STEPS)).astype(np.int64)
        for row in (0, 1):
            scores = exact_scores(engine, connection, vectors, on_grid(vectors)[row])
            assert (np.array(scores) * STEPS**2).tolist() == (steps @ steps[row]).tolist()
        # The control: as given, off the grid, their last bits depend on the order of a sum.
        float64 = vectors.astype(np.float64) @ vectors[1]
        if dimensions >= 37:
            assert exact_scores(engine, connection, vectors, vectors[1]) != float64.tolist()
        connection.execute("DROP TABLE notes")


# --- what a table must be ---


def vector(*numbers):
    return str(list(numbers)) if numbers else None


GOOD = [
    (vector(0.5, 0.5), "a", "x"),
    (vector(0.25, 0.5), "a", "x"),
    (vector(-0.5, 0.5), "b", "z"),
]
FAULTS = {
    "no rows": [],
    "1 rows without a privacy unit": [*GOOD, (vector(0.5, 0.5), None, "x")],
    "2 rows without a privacy unit": [*GOOD, (vector(0.5, 0.5), "", "x"), (None, None, "x")],
    "1 rows whose vector is missing": [*GOOD, (None, "c", "x")],
    "1 rows whose vector is .* off the grid": [*GOOD, (vector(0.5, 1e-4), "c", "x")],
    "1 rows whose vector is .* longer": [*GOOD, (vector(1.0, 2.0**-12), "c", "x")],
    "1 rows whose label is missing": [*GOOD, (vector(0.5, 0.5), "c", None)],
    "1 rows whose label is .* not one": [*GOOD, (vector(0.5, 0.5), "c", "w")],
    "1 units with two labels": [*GOOD, (vector(0.5, 0.5), "b", "x")],
    "cannot be read": [*GOOD, (vector(0.5, 0.5, 0.5), "c", "x")],
}


@pytest.fixture(params=["duckdb", "pgvector"])
def opened(request):
    """Put rows into a table as they are, and open it."""
    if request.param == "duckdb":
        kind, connection = DuckDBCorpus, request.getfixturevalue("local")
        values, of_vectors = "(?, ?, ?)", "FLOAT[]"
    else:
        kind, connection = PgvectorCorpus, request.getfixturevalue("connect")()
        values, of_vectors = "(%s, %s, %s)", "vector"

    def opened(rows, **named):
        connection.execute("DROP TABLE IF EXISTS notes")
        connection.execute(f"CREATE TABLE notes (embedding {of_vectors}, patient text, topic text)")
        for row in rows:
            connection.execute(f"INSERT INTO notes VALUES {values}", row)
        connection.commit()
        return kind(connection, **({"table": "notes"} | NAMED | PUBLIC | named))

    opened.connection = connection
    return opened


def test_a_table_that_no_guarantee_can_be_given_for_is_not_opened(opened):
    assert opened(GOOD).histogram(np.float32([0.5, 0.5]), 0.5).tolist() == [1, 0, 0]
    for message, rows in FAULTS.items():
        with pytest.raises(InvalidIndex, match=message):
            opened(rows)
    for wrong in ({"table": "other"}, {"unit": "person"}, {"vector": "patient"}, {"schema": "s"}):
        with pytest.raises(InvalidIndex, match=r"cannot be read"):
            opened(GOOD, **wrong)
    for wrong in ({"generation": ""}, {"public_labels": ()}, {"public_labels": {"x", "z"}}):
        with pytest.raises(InvalidIndex):
            opened(GOOD, **wrong)


@pytest.mark.parametrize("bad", ["NaN", "Infinity", "NULL"])
def test_numbers_that_are_none_are_refused_as_postgresql_does(bad, local):
    local.execute("CREATE TABLE notes (v FLOAT[2], u VARCHAR)")
    local.execute(
        f"INSERT INTO notes VALUES ([0.5, 0.5], 'a'), ([0.5, {bad!r}::FLOAT], 'b')".replace(
            "'NULL'", "NULL"
        )
    )
    with pytest.raises(InvalidIndex, match=r"off the grid|cannot be read"):
        DuckDBCorpus(local, "notes", vector="v", unit="u", generation="1")


def test_without_labels_units_are_counted(opened):
    corpus = opened(GOOD, label=None, public_labels=())
    assert [corpus.count(np.float32([0.5, 0.5]), at) for at in (-1.0, 0.5, 0.75)] == [2, 1, 0]
    with pytest.raises(InvalidQuery, match=r"no labels"):
        corpus.histogram(np.float32([0.5, 0.5]), 0.5)


def test_a_unit_counts_once_even_where_a_second_label_was_written_later(opened):
    corpus = opened(GOOD)
    opened.connection.execute(f"INSERT INTO notes VALUES ('{vector(0.5, 0.5)}', 'a', 'z')")
    opened.connection.commit()
    assert corpus.histogram(np.float32([0.5, 0.5]), 0.25).tolist() == [1, 0, 0]
    # The control: grouped by unit and label, it counts twice.
    twice = "SELECT count(*) FROM (SELECT DISTINCT patient, topic FROM notes WHERE patient = 'a')"
    assert opened.connection.execute(f"{twice} AS pairs").fetchone() == (2,)


# --- writing ---


@pytest.fixture(params=[duckdb_engine, pgvector_engine], ids=["duckdb", "pgvector"])
def engine(request):
    """An engine's module, its corpus and a connection."""
    if request.param is duckdb_engine:
        return request.param, DuckDBCorpus, request.getfixturevalue("local")
    return request.param, PgvectorCorpus, request.getfixturevalue("connect")()


def test_names_are_quoted(engine):
    module, kind, connection = engine
    named = {"vector": ODD + "v", "unit": ODD + "u", "label": ODD + "l"}
    connection.execute("CREATE SCHEMA s")
    connection.commit()
    module.write(connection, ODD, [(np.eye(3), "abc", "xyz")], **named, schema="s")
    corpus = kind(connection, ODD, **named, **PUBLIC, schema="s")
    assert corpus.histogram(on_grid(np.eye(3, dtype=np.float32))[1], 0.5).tolist() == [0, 1, 0]
    assert list(corpus.units()) == ["a", "b", "c"]


def test_all_rows_are_written_or_none(engine):
    module, kind, connection = engine
    good = (np.eye(3), ["a", "b", "c"], ["x", "y", "z"])
    for bad, message in (
        ((2 * np.eye(3), ["a", "b", "c"], ["x", "y", "z"]), "L2 norm 1"),
        ((np.eye(2), ["a", "b"], ["x", "y"]), "2 dimensions, not 3"),
        ((np.eye(3), ["a", "b"], ["x", "y", "z"]), "2 privacy units"),
        ((np.eye(3), ["a", "b", ""], ["x", "y", "z"]), "row 5 has no privacy unit"),
        ((np.eye(3), ["a", "b", "c"], ["x", "y", None]), "row 5 has no label"),
        ((np.eye(3), ["a", "b", "c"], None), "0 labels"),
    ):
        with pytest.raises(InvalidIndex, match=message):
            module.write(connection, "notes", [good, bad], **NAMED)
        with pytest.raises(InvalidIndex, match=r"cannot be read"):
            kind(connection, "notes", **NAMED, **PUBLIC)
    with pytest.raises(InvalidIndex, match=r"no rows"):
        module.write(connection, "notes", [], **NAMED)
    module.write(connection, "notes", [good], **NAMED)
    with pytest.raises(InvalidIndex, match=r"cannot be written"):
        module.write(connection, "notes", [good], **NAMED)
    assert list(kind(connection, "notes", **NAMED, **PUBLIC).units()) == ["a", "b", "c"]


# --- shards ---


class Unchecked(DuckDBCorpus):
    """The broken variant: which units it has is not looked at."""

    def units(self):
        yield from ()


def test_a_unit_in_two_shards_is_refused_as_it_would_count_twice(local):
    for table, units in (("one", ["a", "b"]), ("two", ["c", "b"])):
        duckdb_engine.write(local, table, [(np.eye(2), units, "xy")], **NAMED)
    with pytest.raises(InvalidIndex, match=r"unit 'b' is in two shards"):
        Shards([DuckDBCorpus(local, table, **NAMED, **PUBLIC) for table in ("one", "two")])
    broken = Shards([Unchecked(local, table, **NAMED, **PUBLIC) for table in ("one", "two")])
    assert broken.histogram(on_grid(np.float32([[0, 1]]))[0], 0.5).tolist() == [0, 2, 0]


def test_units_come_in_the_order_of_their_code_points(engine):
    module, kind, connection = engine
    names = ["z", "Z", "\u00e9", "\uffff", "\U0001f600", "a\u0301", "a", "10", "9"]
    batch = (np.eye(len(names)), names, ["x"] * len(names))
    module.write(connection, "notes", [batch], **NAMED)
    assert list(kind(connection, "notes", **NAMED, **PUBLIC).units()) == sorted(names)


def test_shards_that_do_not_fit_together_are_refused(local, connect):
    for size in (2, 3):
        batch = (np.eye(size), [f"{size}{row}" for row in range(size)], "xyz"[:size])
        duckdb_engine.write(local, f"of{size}", [batch], **NAMED)
    small, large = (DuckDBCorpus(local, f"of{size}", **NAMED, **PUBLIC) for size in (2, 3))
    for unfit in ([], [small, large]):
        with pytest.raises(InvalidIndex, match=r"same dimensions"):
            Shards(unfit)
    connection = connect()
    pgvector_engine.write(connection, "notes", [(np.eye(2), "ab", "xy")], **NAMED)
    one, same = (PgvectorCorpus(connection, "notes", **NAMED, **PUBLIC) for _ in range(2))
    with pytest.raises(InvalidIndex, match=r"one of its own"):
        Shards([one, same])
    assert one.count(on_grid(np.float32([[0, 1]]))[0], 0.5) == 1


# --- as a guard's corpus ---


@pytest.fixture
def accountant(tmp_path):
    with Accountant.open(tmp_path / "ledger.db") as accountant:
        accountant.create_budget("b", adaptive(3.0, 1e-6), unit="patient", units=10_000)
        yield accountant


def test_a_guard_answers_from_it_what_is_made_of_counts(engine, rows, accountant):
    module, kind, connection = engine
    module.write(connection, "notes", rows.batches(), **NAMED)
    corpus = kind(connection, "notes", **NAMED, **PUBLIC)
    guard = RetrievalGuard(accountant, "b", corpus, unit="patient")
    query, exact = rows.queries[4], np.array(rows.expected[4])
    asked = {"threshold": float(rows.thresholds[4]), "noise_multiplier": 20.0}
    vote = guard.vote(query, **asked)
    assert np.abs(np.array(list(vote.counts.values())) - exact).max() < 200
    assert abs(guard.count(query, **asked).value - exact.sum()) < 200
    assert guard.anything(query, **asked, bar=1000)
    session = guard.above_threshold(
        threshold=asked["threshold"], bar=1000, positives=1, threshold_noise=5.0, query_noise=10.0
    )
    assert session.ask(query)
    assert accountant.statement("b").seq == session.seq
    with pytest.raises(InvalidQuery, match=rf"needs a PrivateIndex, not {kind.__name__}"):
        guard.select(query, {"a": query}, threshold=0.5, k=1, epsilon=0.1)


def test_a_lost_connection_is_an_error_after_payment_that_names_no_row(engine, accountant):
    module, kind, connection = engine
    module.write(connection, "notes", [(np.eye(3), ["Ann", "Bob", "Cid"], "xyz")], **NAMED)
    guard = RetrievalGuard(
        accountant, "b", kind(connection, "notes", **NAMED, **PUBLIC), unit="patient"
    )
    connection.close()
    with pytest.raises(ReleaseFailed, match=r"OperationalError|ConnectionException"):
        guard.count(np.eye(3)[0], threshold=0.5, noise_multiplier=20.0)
    assert accountant.statement("b").activities[0].uses == 1


def test_threads_that_share_a_corpus_get_the_counts_of_their_own_queries(engine, rows):
    module, kind, connection = engine
    module.write(connection, "notes", rows.batches(), **NAMED)
    corpus = kind(connection, "notes", **NAMED, **PUBLIC)
    start = threading.Barrier(8)

    def ask(at):
        start.wait()
        return corpus.histogram(rows.queries[at], float(rows.thresholds[at])).tolist()

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(ask, range(16))) == rows.expected[:16]


@pytest.mark.parametrize("name", ["statement_timeout", "transaction_timeout"])
def test_a_time_out_of_the_server_does_not_tell_how_long_a_query_took(name, rows, connect):
    connection = connect()
    if name == "transaction_timeout" and connection.info.server_version < 170_000:
        pytest.skip("PostgreSQL before 17")
    pgvector_engine.write(connection, "notes", rows.batches(), **NAMED)
    connection.execute(f"SET {name} = '5ms'")
    connection.commit()
    corpus = PgvectorCorpus(connection, "notes", **NAMED, **PUBLIC)
    assert corpus.histogram(rows.queries[0], -1.0).tolist() == rows.expected[0]
    with pytest.raises(psycopg.Error, match=r"timeout"):
        connection.execute("SELECT count(DISTINCT patient), pg_sleep(0.05) FROM notes")


# --- what equal units and labels are ---------------------------------------------------------------


def test_labels_that_differ_in_case_are_not_one_in_duckdb(local):
    """Else the spelling of one row would decide for the label of all that are called equal."""
    for collation in ("NOCASE", "C"):
        name = f"notes_{collation}"
        local.execute(f"CREATE TABLE {name} (v FLOAT[2], u VARCHAR, l VARCHAR COLLATE {collation})")
        many = "SELECT [1, 0]::FLOAT[2], 'u' || i, 'sport' FROM range(100) AS r(i)"
        local.execute(f"INSERT INTO {name} VALUES ([1, 0], 'first', 'Sport')")
        local.execute(f"INSERT INTO {name} {many}")
        columns = {"vector": "v", "unit": "u", "label": "l", "generation": "1"}
        with pytest.raises(InvalidIndex, match="1 rows whose label"):
            DuckDBCorpus(local, name, **columns, public_labels=["sport"])
        both = DuckDBCorpus(local, name, **columns, public_labels=["Sport", "sport"])
        assert both.histogram(np.float32([1, 0]), 0.5).tolist() == [1, 100]


@pytest.mark.parametrize("kind", ["DOUBLE", "DECIMAL(3, 1)", "TIMESTAMP", "BOOLEAN"])
def test_units_that_can_be_written_in_several_ways_are_refused_by_duckdb(local, kind):
    local.execute(f"CREATE TABLE notes AS SELECT [1, 0]::FLOAT[2] AS v, NULL::{kind} AS u")
    with pytest.raises(InvalidIndex, match="texts, integers or UUIDs"):
        DuckDBCorpus(local, "notes", vector="v", unit="u", generation="1")


@pytest.mark.parametrize("kind", ["numeric", "float8", "timestamptz"])
def test_units_that_can_be_written_in_several_ways_are_refused_by_postgresql(connect, kind):
    postgres = connect()
    postgres.execute(f"CREATE TABLE notes (v vector(2), u {kind})")
    postgres.execute("INSERT INTO notes VALUES ('[1,0]', NULL)")
    postgres.commit()
    with pytest.raises(InvalidIndex, match="texts, integers or UUIDs"):
        PgvectorCorpus(postgres, "notes", vector="v", unit="u", generation="1")


def test_an_integer_is_one_unit_in_whatever_shard_and_type(local):
    local.execute("CREATE TABLE a AS SELECT [1, 0]::FLOAT[2] AS v, 7::BIGINT AS u")
    local.execute("CREATE TABLE b AS SELECT [1, 0]::FLOAT[2] AS v, 7::TINYINT AS u")
    shards = [DuckDBCorpus(local, t, vector="v", unit="u", generation="1") for t in "ab"]
    with pytest.raises(InvalidIndex, match="'7' is in two shards"):
        Shards(shards)


# --- which table and which operators ---------------------------------------------------------------


def test_duckdb_reads_the_table_that_the_connection_sees(local):
    local.execute("CREATE SCHEMA s2; CREATE TABLE notes AS SELECT [1, 0]::FLOAT[2] AS v, 'a' AS u")
    local.execute("USE s2; CREATE TABLE notes AS SELECT [1, 0]::FLOAT[2] AS v, 'c' AS u")
    corpus = DuckDBCorpus(local, "notes", vector="v", unit="u", generation="1")
    assert list(corpus.units()) == ["c"]
    duckdb_engine.write(local, "more", [(np.eye(2), ["a", "b"], None)], vector="v", unit="u")
    assert local.execute("SELECT count(*) FROM s2.more").fetchone() == (2,)


def test_an_operator_ahead_on_the_search_path_is_not_used(connect):
    postgres = connect()
    pgvector_engine.write(postgres, "notes", [(np.eye(2), ["a", "b"], None)], vector="v", unit="u")
    postgres.execute("CREATE SCHEMA evil")
    postgres.execute(
        "CREATE FUNCTION evil.all(vector, vector) RETURNS float8 LANGUAGE sql AS 'SELECT -1.0::float8'"
    )
    postgres.execute(
        "CREATE OPERATOR evil.<#> (LEFTARG = vector, RIGHTARG = vector, FUNCTION = evil.all)"
    )
    postgres.execute("SET search_path = evil, public, pg_catalog")
    postgres.commit()
    shadowed = "SELECT count(*) FROM public.notes WHERE v <#> '[1,0]' <= -0.5"
    assert postgres.execute(shadowed).fetchone() == (2,)  # the control: it is used there
    postgres.commit()
    corpus = PgvectorCorpus(postgres, "notes", vector="v", unit="u", generation="1")
    assert corpus.count(np.float32([1, 0]), 0.5) == 1


def test_units_are_listed_whatever_form_the_connection_gives_rows(connect):
    postgres = connect()
    pgvector_engine.write(postgres, "notes", [(np.eye(2), ["a", "b"], None)], vector="v", unit="u")
    postgres.row_factory = psycopg.rows.dict_row
    corpus = PgvectorCorpus(postgres, "notes", vector="v", unit="u", generation="1")
    assert list(corpus.units()) == ["a", "b"]
