"""Readers of stores: all rows, bit for bit, of one state of the store, or an error."""

import re
from contextlib import closing
from datetime import timedelta
from uuid import uuid4

import apsw
import faiss
import hnswlib
import numpy as np
import psycopg
import pyarrow as pa
import pytest
import sqlite_vec
from pgvector.psycopg import register_vector
from qdrant_client import QdrantClient, models
from safetensors import safe_open

from epsledger.demo.encoder import _model_folder
from retrieval import InvalidIndex, PrivateIndex
from retrieval.stores import StoredRows, UnsupportedStore, normalized
from retrieval.stores import chroma as chroma_store
from retrieval.stores import faiss as faiss_store
from retrieval.stores import hnswlib as hnswlib_store
from retrieval.stores import lancedb as lancedb_store
from retrieval.stores import pgvector as pgvector_store
from retrieval.stores import qdrant as qdrant_store
from retrieval.stores import sqlite_vec as sqlite_vec_store
from retrieval.stores.rows import gather

DIMENSIONS = 384
LABELS = ["x", "y", "z"]
ODD = 'patient"; DROP TABLE notes; --'
"""A name that breaks any SQL it is not quoted in."""


@pytest.fixture(scope="module")
def real():
    """10,000 rows of MiniLM's word embeddings, of 997 units with a label each."""
    with safe_open(_model_folder() / "model.safetensors", framework="numpy") as weights:
        words = weights.get_slice("embeddings.word_embeddings.weight")[2000:12000]
    owners = [row % 997 for row in range(len(words))]
    return StoredRows(
        normalized(words),
        [f"u{owner}" for owner in owners],
        [LABELS[owner % 3] for owner in owners],
        "1",
    )


@pytest.fixture(scope="module")
def few(real):
    return first(real, 8)


def first(rows, count):
    return StoredRows(rows.vectors[:count], rows.units[:count], rows.labels[:count], "1")


def without_unit(rows):
    return StoredRows(rows.vectors, [None, *rows.units[1:]], rows.labels, "1")


def canonical(rows):
    """All rows in an order of their own, since stores promise none."""
    bits = (vector.tobytes() for vector in rows.vectors)
    return sorted(zip(rows.units, rows.labels, bits, strict=True))


def mappings(rows):
    """Units and labels by id, without those that are missing."""
    units = {row: unit for row, unit in enumerate(rows.units) if unit is not None}
    return {"units": units, "labels": dict(enumerate(rows.labels))}


def faiss_index(rows, factory="Flat", ids=None):
    index = faiss.index_factory(DIMENSIONS, factory, faiss.METRIC_INNER_PRODUCT)
    index.train(rows.vectors)
    if ids is None:
        index.add(rows.vectors)
    else:
        index.add_with_ids(rows.vectors, ids)
    return index


def through_faiss(rows, request):
    return faiss_store.read(faiss_index(rows), **mappings(rows))


def hnswlib_index(rows, space="ip"):
    index = hnswlib.Index(space, DIMENSIONS)
    index.init_index(len(rows.vectors), M=4, ef_construction=8)
    index.add_items(rows.vectors, num_threads=1)
    return index


def through_hnswlib(rows, request):
    return hnswlib_store.read(hnswlib_index(rows), **mappings(rows))


def payloads(rows):
    return [
        {"label": label} | ({} if unit is None else {"unit": unit})
        for unit, label in zip(rows.units, rows.labels, strict=True)
    ]


@pytest.fixture
def qdrant():
    with closing(QdrantClient(":memory:")) as client:
        yield client


def fill_qdrant(client, rows, **options):
    options = {"size": DIMENSIONS, "distance": models.Distance.DOT} | options
    client.create_collection("notes", models.VectorParams(**options))
    client.upload_collection(
        "notes", rows.vectors, payload=payloads(rows), ids=range(len(rows.vectors))
    )


def through_qdrant(rows, request):
    client = request.getfixturevalue("qdrant")
    fill_qdrant(client, rows)
    return qdrant_store.read(client, "notes", unit="unit", label="label")


@pytest.fixture
def new_collection():
    import chromadb

    client = chromadb.EphemeralClient()
    made = []

    def new(rows, space="ip"):
        name = f"notes-{len(made)}"
        made.append(name)
        collection = client.create_collection(
            name,
            embedding_function=None,
            configuration={"hnsw": {"space": space, "ef_construction": 8, "max_neighbors": 4}},
        )
        for start in range(0, len(rows.units), 5000):
            part = slice(start, start + 5000)
            collection.add(
                ids=[str(row) for row in range(len(rows.units))[part]],
                embeddings=rows.vectors[part],
                metadatas=payloads(rows)[part],
            )
        return collection

    yield new
    for name in made:
        client.delete_collection(name)


def through_chroma(rows, request):
    collection = request.getfixturevalue("new_collection")(rows)
    return chroma_store.read(collection, unit="unit", label="label")


def arrow(rows):
    values = pa.array(np.ravel(rows.vectors))
    return pa.table(
        {
            "embedding": pa.FixedSizeListArray.from_arrays(values, DIMENSIONS),
            "unit": rows.units,
            "label": rows.labels,
        }
    )


@pytest.fixture
def lance(tmp_path):
    import lancedb

    return lancedb.connect(tmp_path / "lance", read_consistency_interval=timedelta(0))


def through_lancedb(rows, request):
    table = request.getfixturevalue("lance").create_table("notes", arrow(rows))
    return lancedb_store.read(table, vector="embedding", unit="unit", label="label")


@pytest.fixture
def postgres(new_database):
    """A connection to a database with the extension, and the URL to make more."""
    url = new_database().replace("+psycopg", "")
    with psycopg.connect(url) as connection:
        connection.execute("CREATE EXTENSION vector")
        connection.commit()
        register_vector(connection)
        connection.commit()
        yield connection, url


def fill_postgres(connection, rows, unit="unit"):
    name = psycopg.sql.Identifier(unit)
    create = psycopg.sql.SQL("CREATE TABLE notes (embedding vector, {} text, label text)")
    copy = psycopg.sql.SQL("COPY notes FROM STDIN (FORMAT BINARY)")
    connection.execute(create.format(name))
    with connection.cursor().copy(copy) as stream:
        stream.set_types(["vector", "text", "text"])
        for row in zip(rows.vectors, rows.units, rows.labels, strict=True):
            stream.write_row(row)
    connection.commit()


def through_pgvector(rows, request):
    connection, _ = request.getfixturevalue("postgres")
    fill_postgres(connection, rows)
    return pgvector_store.read(connection, "notes", vector="embedding", unit="unit", label="label")


@pytest.fixture
def sqlite():
    with closing(apsw.Connection(":memory:")) as connection:
        connection.enable_load_extension(True)
        connection.load_extension(sqlite_vec.loadable_path())
        yield connection


def fill_sqlite(connection, rows):
    connection.execute(
        f"CREATE VIRTUAL TABLE notes USING vec0(embedding float[{DIMENSIONS}], +unit text, +label text)"
    )
    bits = (vector.tobytes() for vector in rows.vectors)
    with connection:
        connection.executemany(
            "INSERT INTO notes (embedding, unit, label) VALUES (?, ?, ?)",
            zip(bits, rows.units, rows.labels, strict=True),
        )


def through_sqlite_vec(rows, request):
    connection = request.getfixturevalue("sqlite")
    fill_sqlite(connection, rows)
    return sqlite_vec_store.read(
        connection, "notes", vector="embedding", unit="unit", label="label"
    )


THROUGH = {
    chroma_store: through_chroma,
    faiss_store: through_faiss,
    hnswlib_store: through_hnswlib,
    lancedb_store: through_lancedb,
    pgvector_store: through_pgvector,
    qdrant_store: through_qdrant,
    sqlite_vec_store: through_sqlite_vec,
}
every_store = pytest.mark.parametrize(
    "store", THROUGH, ids=lambda store: store.__name__.rpartition(".")[2]
)


@every_store
@pytest.mark.parametrize("count", [2500, pytest.param(10_000, marks=pytest.mark.long)])
def test_real_vectors_come_back_bit_for_bit_and_give_the_same_index(store, count, real, request):
    real = first(real, count)
    rows = THROUGH[store](real, request)
    assert rows.vectors.dtype == np.float32
    assert canonical(rows) == canonical(real)
    direct, stored = (
        PrivateIndex(
            some.vectors,
            units=some.units,
            labels=some.labels,
            public_labels=LABELS,
            generation=some.generation,
        )
        for some in (real, rows)
    )
    for query in real.vectors[:3]:
        histogram = direct.histogram(query, 0.3)
        assert histogram.sum()
        assert stored.histogram(query, 0.3).tolist() == histogram.tolist()


@every_store
def test_a_row_without_a_unit_is_refused(store, few, request):
    with pytest.raises(InvalidIndex, match=r"unit"):
        THROUGH[store](without_unit(few), request)


@every_store
def test_an_untested_version_is_refused_and_named(store, few, request, monkeypatch):
    monkeypatch.setattr(store, "TESTED", ("99",))
    with pytest.raises(UnsupportedStore, match=r"has not been tested, only major version 99"):
        THROUGH[store](few, request)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_more_or_fewer_rows_than_were_counted_are_refused(count):
    named = {"store": "the table", "unit": "unit", "label": None, "generation": "1"}
    batch = ([[1.0, 0.0], [0.0, 1.0]], ["a", "b"], [])
    assert gather([batch], 2, **named).units == ["a", "b"]
    with pytest.raises(InvalidIndex, match=rf"{count} rows were counted and 2 read"):
        gather([batch], count, **named)
    with pytest.raises(InvalidIndex, match=r"has no rows"):
        gather([], 0, **named)


@pytest.mark.parametrize("unit", ["", None, True, 1.5, b"a", ["a"]])
def test_only_texts_whole_numbers_and_uuids_name_a_unit(unit):
    named = {"store": "the table", "unit": "unit", "label": None, "generation": "1"}
    person = uuid4()
    rows = gather([([[1.0]] * 3, ["a", np.int64(7), person], [])], 3, **named)
    assert rows.units == ["a", "7", str(person)]
    with pytest.raises(InvalidIndex, match=r"row 1 of the table has .* in 'unit'"):
        gather([([[1.0]] * 2, ["a", unit], [])], 2, **named)


def test_rows_do_not_show_in_logs(few):
    assert repr(few) == "StoredRows(generation='1')"


def test_labels_are_read_only_where_they_are_named(few, sqlite):
    fill_sqlite(sqlite, few)
    assert sqlite_vec_store.read(sqlite, "notes", vector="embedding", unit="unit").labels is None


# Norms


def test_vectors_without_a_direction_are_counted():
    with pytest.raises(InvalidIndex, match=r"3 of 4 vectors"):
        normalized([[0, 0], [np.nan, 1], [np.inf, 1], [1, 1]])


def bits_that_depend_on_other_rows(normalize, vectors):
    return np.count_nonzero(normalize(vectors)[1:] != normalize(vectors[1:]))


def test_normalization_of_a_row_depends_on_that_row_alone(real):
    vectors = real.vectors[:2001] * np.float32(3.7)
    assert not bits_that_depend_on_other_rows(normalized, vectors)
    # The control divides by the largest norm, as scaling a whole corpus does.
    vectors[0] *= 2
    assert bits_that_depend_on_other_rows(lambda v: v / np.linalg.norm(v, axis=1).max(), vectors)


# FAISS and hnswlib


@pytest.mark.parametrize("factory", ["IVF8,Flat", "HNSW8", "IDMap,Flat", "IDMap2,Flat"])
def test_indexes_that_keep_the_vectors_are_read(factory, real):
    rows = first(real, 1500)
    ids = None if factory == "HNSW8" else np.arange(1500)[::-1] * 7 + 3
    named = {
        name: dict(zip(range(1500) if ids is None else ids.tolist(), values, strict=True))
        for name, values in {"units": rows.units, "labels": rows.labels}.items()
    }
    assert canonical(faiss_store.read(faiss_index(rows, factory, ids), **named)) == canonical(rows)


@pytest.mark.parametrize(
    ("factory", "kind"),
    [
        ("PQ4x4np", "IndexPQ"),
        ("SQ8", "IndexScalarQuantizer"),
        ("IVF8,SQ8", "IndexIVFScalarQuantizer"),
        ("IVF8,PQ4x4np", "IndexIVFPQ"),
        ("L2norm,Flat", "IndexPreTransform"),
        ("IDMap,SQ8", "IndexIDMap over IndexScalarQuantizer"),
    ],
)
def test_indexes_that_lose_the_vectors_are_refused_by_name(factory, kind, real):
    rows = first(real, 400)
    index = faiss_index(rows, factory, np.arange(400) if "IDMap" in factory else None)
    with pytest.raises(UnsupportedStore, match=rf"^{kind} does not return"):
        faiss_store.read(index, units=rows.units)


def test_control_a_quantizer_lets_one_row_change_the_others(real):
    vectors = real.vectors[:400].copy()
    vectors[0] = 1
    rows, fewer = (StoredRows(some, [], [], "1") for some in (vectors, vectors[1:]))
    changed = faiss_index(rows, "SQ8").reconstruct_n(1, 399) != faiss_index(fewer, "SQ8").reconstruct_n(0, 399)  # fmt: skip
    assert changed.any()
    assert not np.any(faiss_index(rows).reconstruct_n(1, 399) != vectors[1:])


@pytest.mark.parametrize(
    ("store", "build"), [(faiss_store, faiss_index), (hnswlib_store, hnswlib_index)]
)
def test_a_sequence_of_another_length_is_refused(store, build, few):
    for units in (few.units[1:], [*few.units, "u"]):
        with pytest.raises(InvalidIndex, match=r"has 8 rows and units has \d entries"):
            store.read(build(few), units=units)


def test_negative_ids_do_not_count_from_the_end(few):
    index = faiss_index(few, "IDMap,Flat", np.arange(8) - 1)
    with pytest.raises(InvalidIndex, match=r"id -1 of the index has no entry in units"):
        faiss_store.read(index, units=few.units)


def test_deleted_items_of_hnswlib_are_refused(few):
    index = hnswlib_index(few)
    index.mark_deleted(3)
    with pytest.raises(InvalidIndex, match=r"marked as deleted"):
        hnswlib_store.read(index, units=few.units)


def test_a_brute_force_index_of_hnswlib_is_refused(few):
    with pytest.raises(UnsupportedStore, match=r"BFIndex"):
        hnswlib_store.read(hnswlib.BFIndex("ip", DIMENSIONS), units=few.units)


# Chroma and Qdrant


class Meanwhile:
    """A real store, in which something else happens just after one call of one method."""

    def __init__(self, store, method, happens, call=1):
        self._store, self._method, self._happens = store, method, happens
        self._left = call

    def __getattr__(self, name):
        found = getattr(self._store, name)
        if name != self._method:
            return found

        def called(*values, **options):
            result = found(*values, **options)
            self._left -= 1
            if self._left == 0:
                self._happens()
            return result

        return called


@pytest.mark.parametrize("call", [1, 2])
def test_chroma_that_changes_while_being_read_is_refused(call, few, new_collection):
    collection = new_collection(few)

    def swap():
        collection.add(ids=["new"], embeddings=few.vectors[:1], metadatas=[{"unit": "new"}])
        collection.delete(["7"])

    with pytest.raises(InvalidIndex, match=r"changed while being read"):
        chroma_store.read(Meanwhile(collection, "get", swap, call), unit="unit")
    assert collection.count() == 8  # so that counting alone would not have shown it


def test_control_chroma_that_does_not_change_is_read(few, new_collection):
    collection = new_collection(few)
    chroma_store.read(Meanwhile(collection, "get", collection.count), unit="unit")


def test_chroma_returns_cosine_vectors_but_for_the_last_bits(few, new_collection):
    doubled = StoredRows(few.vectors * 2, few.units, few.labels, "1")
    rows = chroma_store.read(new_collection(doubled, "cosine"), unit="unit")
    np.testing.assert_allclose(rows.vectors, doubled.vectors, rtol=1e-6)


@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_qdrant_that_changes_while_being_read_is_refused(call, real, qdrant):
    fill_qdrant(qdrant, first(real, 1200))

    def swap():
        new = models.PointStruct(id=5000, vector=real.vectors[0].tolist(), payload={"unit": "new"})
        qdrant.upsert("notes", [new])
        qdrant.delete("notes", [7])

    with pytest.raises(InvalidIndex, match=r"changed while being read"):
        qdrant_store.read(Meanwhile(qdrant, "scroll", swap, call), "notes", unit="unit")
    assert qdrant.count("notes").count == 1200  # so that counting alone would not have shown it


def test_control_qdrant_that_does_not_change_is_read(real, qdrant):
    fill_qdrant(qdrant, first(real, 1200))
    rows = qdrant_store.read(Meanwhile(qdrant, "scroll", qdrant.info), "notes", unit="unit")
    assert len(rows.units) == 1200


def test_qdrant_types_that_lose_the_vectors_are_refused(few, qdrant):
    fill_qdrant(qdrant, few, datatype=models.Datatype.TURBO4)
    with pytest.raises(UnsupportedStore, match=r"as turbo4"):
        qdrant_store.read(qdrant, "notes", unit="unit")


def test_one_of_several_named_vectors_of_qdrant_is_read(qdrant):
    size = models.VectorParams(size=2, distance=models.Distance.DOT)
    several = size.model_copy(
        update={"multivector_config": models.MultiVectorConfig(comparator="max_sim")}
    )
    qdrant.create_collection("notes", {"title": size, "text": size, "tokens": several})
    vectors = {"title": [0.0, 1.0], "text": [1.0, 0.0], "tokens": [[1.0, 0.0], [0.0, 1.0]]}
    qdrant.upsert("notes", [models.PointStruct(id=1, vector=vectors, payload={"unit": "u"})])
    rows = qdrant_store.read(qdrant, "notes", unit="unit", vector="text")
    assert rows.vectors.tolist() == [[1.0, 0.0]]
    for name, error in {"": "no dense vector", "tokens": "one dense vector each"}.items():
        with pytest.raises(InvalidIndex, match=error):
            qdrant_store.read(qdrant, "notes", unit="unit", vector=name)
    qdrant.upsert("notes", [models.PointStruct(id=2, vector={}, payload={"unit": "v"})])
    with pytest.raises(InvalidIndex, match=r"no vector"):
        qdrant_store.read(qdrant, "notes", unit="unit", vector="text")


# LanceDB


def test_a_lance_table_is_read_at_its_version(few, lance):
    table = lance.create_table("notes", arrow(first(few, 5)))
    table.add(arrow(few))
    table.checkout(1)
    rows = lancedb_store.read(table, vector="embedding", unit="unit", label="label")
    assert (canonical(rows), rows.generation) == (canonical(first(few, 5)), "1")
    table.checkout_latest()
    rows = lancedb_store.read(table, vector="embedding", unit="unit")
    assert (len(rows.units), rows.generation) == (13, "2")


def test_a_lance_table_that_follows_its_writers_is_refused_if_they_write(few, lance):
    table = lance.create_table("notes", arrow(few))

    def swap():
        lance.open_table("notes").delete("unit = 'u7'")
        lance.open_table("notes").add(arrow(first(few, 1)))

    names = {"vector": "embedding", "unit": "unit"}
    with pytest.raises(InvalidIndex, match=r"version 1 before and 3 after"):
        lancedb_store.read(Meanwhile(table, "count_rows", swap), **names)
    assert table.count_rows() == 8  # so that counting alone would not have shown it
    lancedb_store.read(Meanwhile(table, "count_rows", table.count_rows), **names)  # the control


def test_missing_columns_and_vectors_of_lance_are_refused(few, lance):
    table = lance.create_table("notes", arrow(few))
    for names, error in [
        ({"vector": "embedding", "unit": "person"}, "no column person"),
        ({"vector": "unit", "unit": "unit"}, "not a list of floats"),
    ]:
        with pytest.raises(InvalidIndex, match=error):
            lancedb_store.read(table, **names)
    table.add([{"unit": "u", "label": "x", "embedding": None}])
    with pytest.raises(InvalidIndex, match=r"1 rows .* have no vector"):
        lancedb_store.read(table, vector="embedding", unit="unit")


# pgvector


def renaming(url):
    """A cursor before whose statement another connection has renamed all units."""

    class Renaming(psycopg.ServerCursor):
        def execute(self, query, *values):
            with psycopg.connect(url) as other:
                other.execute("UPDATE notes SET unit = unit || '!'")
            return super().execute(query, *values)

    return Renaming


class NoSnapshot(psycopg.Cursor):
    """The broken variant: it reads each statement's own state."""

    def execute(self, query, *values):
        return self if "REPEATABLE" in str(query) else super().execute(query, *values)


@pytest.mark.parametrize("autocommit", [False, True])
def test_pgvector_is_read_as_of_one_moment(autocommit, few, postgres):
    connection, url = postgres
    fill_postgres(connection, few)
    connection.autocommit = autocommit
    connection.server_cursor_factory = renaming(url)
    rows = pgvector_store.read(connection, "notes", vector="embedding", unit="unit", label="label")
    assert canonical(rows) == canonical(few)
    connection.cursor_factory = NoSnapshot
    rows = pgvector_store.read(connection, "notes", vector="embedding", unit="unit")
    assert sorted(rows.units) == sorted(f"{unit}!!" for unit in few.units)


def test_names_are_quoted_in_postgres(few, postgres):
    connection, _ = postgres
    fill_postgres(connection, few, ODD)
    rows = pgvector_store.read(
        connection, "notes", vector="embedding", unit=ODD, schema="public", label="label"
    )
    assert canonical(rows) == canonical(few)
    for table, unit in [(ODD, ODD), ("notes", "person")]:
        with pytest.raises(InvalidIndex, match=r"cannot be read"):
            pgvector_store.read(connection, table, vector="embedding", unit=unit)


def test_an_open_transaction_is_refused(few, postgres):
    connection, _ = postgres
    fill_postgres(connection, few)
    connection.execute("SELECT 1")
    with pytest.raises(InvalidIndex, match=r"in a transaction"):
        pgvector_store.read(connection, "notes", vector="embedding", unit="unit")


def test_mixed_dimensions_and_missing_vectors_of_pgvector_are_refused(few, postgres):
    connection, _ = postgres
    fill_postgres(connection, few)
    for value in ("NULL", "'[1,2]'"):
        connection.execute(f"INSERT INTO notes VALUES ({value}, 'u', 'x')")
        connection.commit()
        with pytest.raises(InvalidIndex, match=r"no vector, or vectors of different dimensions"):
            pgvector_store.read(connection, "notes", vector="embedding", unit="unit")
        connection.execute("DELETE FROM notes WHERE unit = 'u'")


def test_rows_that_a_policy_hides_are_not_left_out(few, postgres):
    connection, _ = postgres
    fill_postgres(connection, few)
    connection.execute("ALTER TABLE notes ENABLE ROW LEVEL SECURITY")
    connection.execute("CREATE POLICY reader_of_some ON notes USING (unit <> 'u7')")
    connection.execute("CREATE ROLE reader_of_some")
    connection.execute("GRANT SELECT ON notes TO reader_of_some")
    connection.execute("SET ROLE reader_of_some")
    connection.commit()
    ((seen,),) = connection.execute("SELECT count(*) FROM notes").fetchall()
    connection.commit()
    with pytest.raises(InvalidIndex, match=r"row-level security"):
        pgvector_store.read(connection, "notes", vector="embedding", unit="unit")
    assert seen == 7  # the control: an ordinary SELECT leaves the row out
    connection.execute("RESET ROLE")
    connection.execute("DROP OWNED BY reader_of_some")
    connection.execute("DROP ROLE reader_of_some")
    connection.commit()


# sqlite-vec


def test_metadata_may_be_in_a_table_of_its_own_and_names_are_quoted(few, sqlite):
    quoted = ODD.replace('"', '""')
    sqlite.execute(f"CREATE VIRTUAL TABLE vectors USING vec0(id text primary key, v float[{DIMENSIONS}])")  # fmt: skip
    sqlite.execute(f'CREATE TABLE "{quoted}" (note, "{quoted}", label)')
    for row, vector in enumerate(few.vectors):
        sqlite.execute("INSERT INTO vectors VALUES (?, ?)", (str(row), vector.tobytes()))
        sqlite.execute(
            f'INSERT INTO "{quoted}" VALUES (?, ?, ?)', (str(row), few.units[row], few.labels[row])
        )
    names = {"vector": "v", "unit": ODD, "label": "label", "metadata": ODD, "on": ("id", "note")}
    assert canonical(sqlite_vec_store.read(sqlite, "vectors", **names)) == canonical(few)
    with pytest.raises(InvalidIndex, match=r"no column person"):
        sqlite_vec_store.read(sqlite, "vectors", **names | {"unit": "person"})
    sqlite.execute(f"INSERT INTO \"{quoted}\" VALUES ('3', 'another', 'x')")
    with pytest.raises(InvalidIndex, match=r"8 rows and 9 with their metadata"):
        sqlite_vec_store.read(sqlite, "vectors", **names)
    sqlite.execute(f"DELETE FROM \"{quoted}\" WHERE note = '3'")
    with pytest.raises(InvalidIndex, match=re.escape(f"None in {ODD!r}")):
        sqlite_vec_store.read(sqlite, "vectors", **names | {"label": None})


def test_a_misspelled_column_is_an_error_though_sqlite_reads_it_as_text(few, sqlite):
    fill_sqlite(sqlite, few)
    with pytest.raises(InvalidIndex, match=r"no column person; it has embedding, label"):
        sqlite_vec_store.read(sqlite, "notes", vector="embedding", unit="person")
    assert sqlite.execute('SELECT "person" FROM notes').fetchall() == [("person",)] * 8  # control


def test_vectors_of_sqlite_vec_that_lost_precision_are_refused(sqlite):
    sqlite.execute("CREATE VIRTUAL TABLE notes USING vec0(whole int8[8], bits bit[8], unit text)")
    sqlite.execute(
        "INSERT INTO notes (whole, bits, unit)"
        " VALUES (vec_int8('[1,2,3,4,5,6,7,8]'), vec_bit(X'01'), 'u')"
    )
    for vector, kind in {"whole": "int8", "bits": "bit"}.items():
        with pytest.raises(UnsupportedStore, match=rf"vectors of type {kind}"):
            sqlite_vec_store.read(sqlite, "notes", vector=vector, unit="unit")


@pytest.mark.parametrize("other", ["NULL", "vec_f32('[1,2]')", "'[1,2]'"])
def test_an_ordinary_table_is_read_but_not_with_rows_of_another_kind(other, few, sqlite):
    sqlite.execute("CREATE TABLE notes (v, unit, label)")
    for row in zip((v.tobytes() for v in few.vectors), few.units, few.labels, strict=True):
        sqlite.execute("INSERT INTO notes VALUES (?, ?, ?)", row)
    rows = sqlite_vec_store.read(sqlite, "notes", vector="v", unit="unit", label="label")
    assert canonical(rows) == canonical(few)
    sqlite.execute(f"INSERT INTO notes VALUES ({other}, 'u', 'x')")
    with pytest.raises(InvalidIndex, match=r"no vector, or vectors of different dimensions"):
        sqlite_vec_store.read(sqlite, "notes", vector="v", unit="unit")
