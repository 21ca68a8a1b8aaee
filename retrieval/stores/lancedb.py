"""Rows of a LanceDB table, of one version of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from retrieval.errors import InvalidIndex
from retrieval.stores.rows import BATCH, Batch, StoredRows, changed, check_version, gather

if TYPE_CHECKING:
    from lancedb.table import Table

TESTED = ("0",)
"""Major versions of lancedb."""


def read(table: Table, *, vector: str, unit: str, label: str | None = None) -> StoredRows:
    """Read all rows of a LanceDB table; its version is the generation.

    Args:
        table: A table. One that follows its writers (``read_consistency_interval``) must not be
            written to meanwhile; ``table.checkout(table.version)`` holds it still.
        vector: The column of vectors: lists of one fixed size, of floats.
        unit: The column of privacy units.
        label: The column of labels.

    Raises:
        UnsupportedStore: If lancedb has another version.
        InvalidIndex: If a column is missing, ``vector`` is of another type, a row has no
            vector, unit or label, or the table is at another version after reading.

    >>> import lancedb
    >>> table = lancedb.connect("memory://").create_table(
    ...     "notes", [{"embedding": [0.0, 1.0], "patient": "ann"}])
    >>> rows = read(table, vector="embedding", unit="patient")
    >>> rows.units, rows.generation
    (['ann'], '1')
    """
    import lancedb
    import pyarrow.types

    check_version("lancedb", lancedb.__version__, TESTED)
    store = f"the table {table.name!r}"
    columns = list(dict.fromkeys([vector, unit, label or unit]))
    missing = [column for column in columns if column not in table.schema.names]
    if missing:
        raise InvalidIndex(f"{store} has no column {', '.join(missing)}; name one that it has")
    kind = table.schema.field(vector).type
    if not (pyarrow.types.is_fixed_size_list(kind) and pyarrow.types.is_floating(kind.value_type)):
        raise InvalidIndex(
            f"the column {vector!r} of {store} has the type {kind}, not a list of floats of one"
            " fixed size; name a column of vectors"
        )
    version = table.version
    rows = gather(
        _batches(table, columns, vector, unit, label or unit),
        table.count_rows(),
        store=store,
        unit=unit,
        label=label,
        generation=str(version),
    )
    if table.version != version:
        raise changed(store, f"version {version} before and {table.version} after")
    return rows


def _batches(
    table: Table, columns: list[str], vector: str, unit: str, label: str
) -> Iterator[Batch]:
    for batch in table.search().select(columns).to_batches(batch_size=BATCH):
        vectors = batch.column(vector)
        if vectors.null_count:
            raise InvalidIndex(
                f"{vectors.null_count} rows of the table {table.name!r} have no vector; embed"
                " them or delete them"
            )
        values = vectors.flatten().to_numpy(zero_copy_only=False)
        yield (
            values.reshape(len(vectors), -1),
            batch.column(unit).to_pylist(),
            batch.column(label).to_pylist(),
        )
