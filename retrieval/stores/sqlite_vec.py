"""Rows of a table of sqlite-vec, through the caller's connection."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, Protocol

import numpy as np

from retrieval.errors import InvalidIndex, UnsupportedStore
from retrieval.stores.rows import BATCH, Batch, StoredRows, check_version, gather

TESTED = ("0",)
"""Major versions of sqlite-vec."""


class Connection(Protocol):
    """A connection of ``sqlite3`` or ``apsw`` that yields rows as tuples."""

    def execute(self, sql: str, parameters: Any = ..., /) -> Iterable[Any]:
        """Run one statement and return its rows."""


def read(
    connection: Connection,
    table: str,
    *,
    vector: str,
    unit: str,
    label: str | None = None,
    metadata: str | None = None,
    on: tuple[str, str] = ("rowid", "rowid"),
    generation: str = "1",
) -> StoredRows:
    """Read all rows of a table by one statement, which sees one state of the database.

    Args:
        connection: A connection that has loaded sqlite-vec.
        table: A ``vec0`` table, or an ordinary one with vectors as float32 blobs.
        vector: Its column of vectors.
        unit: The column of privacy units, of ``metadata`` if that is given, else of ``table``.
        label: The column of labels, in the same table as ``unit``.
        metadata: A table with one row for each vector.
        on: The columns of ``table`` and of ``metadata`` that say which rows belong together.
        generation: Public name of this version of the rows.

    Raises:
        UnsupportedStore: If sqlite-vec has another version, or the vectors are ``int8`` or bits.
        InvalidIndex: If a column is missing, a row has no vector, unit or label, or not one
            row of metadata.

    >>> import apsw, sqlite_vec
    >>> connection = apsw.Connection(":memory:")
    >>> connection.enable_load_extension(True)
    >>> connection.load_extension(sqlite_vec.loadable_path())
    >>> _ = connection.execute(
    ...     "CREATE VIRTUAL TABLE notes USING vec0(embedding float[2], patient text)")
    >>> _ = connection.execute("INSERT INTO notes (embedding, patient) VALUES ('[0, 1]', 'ann')")
    >>> read(connection, "notes", vector="embedding", unit="patient").units
    ['ann']
    """
    ((version,),) = connection.execute("SELECT vec_version()")
    check_version("sqlite-vec", version, TESTED)
    owners = metadata or table
    _check_columns(connection, table, [vector, *(on[:1] if metadata else ())])
    _check_columns(connection, owners, [unit, label or unit, *(on[1:] if metadata else ())])
    source = f"{_quoted(table)} AS v"
    if metadata:
        source += f" LEFT JOIN {_quoted(metadata)} AS m ON m.{_quoted(on[1])} = v.{_quoted(on[0])}"
    # Every column with its table: SQLite reads an unknown "name" alone as a string.
    stored = f"v.{_quoted(vector)}"
    columns = ", ".join(
        [f"iif({stored} IS NULL, NULL, vec_type({stored})), {stored}"]
        + [f"{'m' if metadata else 'v'}.{_quoted(name)}" for name in (unit, label or unit)]
    )
    ((count,),) = connection.execute(f"SELECT count(*) FROM {_quoted(table)}")  # noqa: S608 - quoted
    ((joined,),) = connection.execute(f"SELECT count(*) FROM {source}")  # noqa: S608 - quoted
    if joined != count:
        raise InvalidIndex(
            f"the table {table!r} has {count} rows and {joined} with their metadata: some have"
            f" several rows in {metadata!r}; keep one for each vector"
        )
    rows = connection.execute(f"SELECT {columns} FROM {source}")  # noqa: S608 - quoted
    return gather(
        _batches(iter(rows), table),
        count,
        store=f"the table {table!r}",
        unit=unit,
        label=label,
        generation=generation,
    )


def _batches(rows: Iterator[tuple[Any, ...]], table: str) -> Iterator[Batch]:
    while some := list(islice(rows, BATCH)):
        kinds, blobs, units, labels = zip(*some, strict=True)
        if other := {kind for kind in kinds if kind not in {"float32", None}}:
            raise UnsupportedStore(
                f"the table {table!r} has vectors of type {', '.join(other)}, which have lost"
                " precision; name the column of float32 vectors"
            )
        vectors = [
            np.frombuffer(blob, "<f4") if isinstance(blob, bytes) else None for blob in blobs
        ]
        yield vectors, units, labels


def _check_columns(connection: Connection, table: str, columns: list[str]) -> None:
    known = {
        name for (name,) in connection.execute("SELECT name FROM pragma_table_info(?)", (table,))
    }
    missing = set(columns) - known - {"rowid"}
    if missing:
        raise InvalidIndex(
            f"the table {table!r} has no column {', '.join(sorted(missing))}; it has"
            f" {', '.join(sorted(known)) or 'none, for there is no such table'}"
        )


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
