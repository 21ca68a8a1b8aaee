"""Rows of a PostgreSQL table with a column of the type ``vector`` or ``halfvec``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from retrieval.errors import InvalidIndex
from retrieval.stores.rows import BATCH, Batch, StoredRows, check_version, gather

if TYPE_CHECKING:
    import psycopg

TESTED = ("0",)
"""Major versions of the extension."""
_HEADER = 4
"""Bytes before the values in pgvector's binary format; the values are big-endian float32."""


def read(
    connection: psycopg.Connection[Any],
    table: str,
    *,
    vector: str,
    unit: str,
    label: str | None = None,
    schema: str | None = None,
    generation: str = "1",
) -> StoredRows:
    """Read all rows of a table, in one read-only transaction that sees one state of it.

    Args:
        connection: A psycopg connection that is not in a transaction.
        table: Name of the table or view.
        vector: Its column of vectors. ``halfvec`` and ``real[]`` are widened to float32.
        unit: Its column of privacy units.
        label: Its column of labels.
        schema: Where the table is, if not on the search path.
        generation: Public name of this version of the rows.

    Raises:
        UnsupportedStore: If the extension pgvector has another version.
        InvalidIndex: If the connection is in a transaction, the table or a column cannot be
            read, a policy hides rows, or a row has no vector, unit or label.

    >>> with psycopg.connect(url) as connection:                          # doctest: +SKIP
    ...     rows = read(connection, "notes", vector="embedding", unit="patient_id")
    """
    import psycopg
    from psycopg import sql
    from psycopg.rows import tuple_row

    if connection.info.transaction_status != psycopg.pq.TransactionStatus.IDLE:
        raise InvalidIndex(
            "the connection is in a transaction; commit it, or give a connection of its own, so"
            " that all rows are of one state"
        )
    source = sql.Identifier(*filter(None, (schema, table)))
    columns = sql.SQL(", ").join(sql.Identifier(column) for column in (unit, label or unit))
    rows = sql.SQL("SELECT vector_send({}::vector), {} FROM {}").format(
        sql.Identifier(vector), columns, source
    )
    try:
        with connection.transaction(), connection.cursor(row_factory=tuple_row) as cursor:
            cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
            cursor.execute("SET LOCAL row_security = off")  # fail rather than leave rows out
            cursor.execute("SELECT extversion FROM pg_extension WHERE extname = 'vector'")
            for (version,) in cursor.fetchall():
                check_version("pgvector", version, TESTED)
            cursor.execute(sql.SQL("SELECT count(*) FROM {}").format(source))
            ((count,),) = cursor.fetchall()
            with connection.cursor("epsledger_read", row_factory=tuple_row) as stream:
                stream.execute(rows)
                return gather(
                    _batches(stream),
                    count,
                    store=f"the table {table!r}",
                    unit=unit,
                    label=label,
                    generation=generation,
                )
    except psycopg.ProgrammingError as error:
        raise InvalidIndex(f"the table {table!r} cannot be read: {error}") from error


def _batches(stream: psycopg.ServerCursor[tuple[Any, ...]]) -> Iterator[Batch]:
    while rows := stream.fetchmany(BATCH):
        packed, units, labels = zip(*rows, strict=True)
        vectors = [
            None if value is None else np.frombuffer(value, ">f4", offset=_HEADER)
            for value in packed
        ]
        yield vectors, units, labels
