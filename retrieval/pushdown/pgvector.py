"""Counting in PostgreSQL with the extension pgvector: exact, by parallel sequential scan."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from retrieval.columns import Floats
from retrieval.errors import InvalidIndex
from retrieval.grid import STEPS
from retrieval.pushdown.tables import NO_LABEL, Batch, TableCorpus, prepared

if TYPE_CHECKING:
    import psycopg
    from psycopg import sql

_BATCH = 10_000
"""Names of units that are fetched at a time."""
_ROUNDS = 1.5 * 2**23 / STEPS
"""Added to a float32 number of at most 1 and taken away again, it rounds to the grid: between
2**11 and 2**12 float32 numbers are one step apart."""
_SETTINGS = """
    SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY;
    SET LOCAL enable_indexscan = off;
    SET LOCAL enable_indexonlyscan = off;
    SET LOCAL enable_bitmapscan = off;
    SET LOCAL parallel_setup_cost = 0;
    SET LOCAL parallel_tuple_cost = 0;
    SET LOCAL jit = off;
    SET LOCAL row_security = off;
    SELECT set_config(name, '0', true) FROM pg_settings
    WHERE name IN ('statement_timeout', 'transaction_timeout')
"""
"""Planned at its default costs, a scan of large rows is not parallel. JIT compiles for longer than
it saves. A policy that hides rows becomes an error. No time-outs: whether one fires depends on
private rows; servers before version 17 have only the first."""
_PLACE = """
    SELECT n.nspname, c.relname, (
        SELECT quote_ident(v.nspname) FROM pg_catalog.pg_extension AS e
        JOIN pg_catalog.pg_namespace AS v ON v.oid = e.extnamespace WHERE e.extname = 'vector'
    )
    FROM pg_catalog.pg_class AS c JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
    WHERE c.oid = pg_catalog.to_regclass(%(name)s)
"""
"""Where the table and the extension are. Queries look nowhere else: a function or an operator of
the same name, ahead on the search path, would run on private rows."""
_PATH = "SELECT pg_catalog.set_config('search_path', %s, true)"
_ROWS = """
    SELECT {unit}::text COLLATE "C" AS unit, pg_typeof({unit})::text AS kind,
        {vector}::vector AS vector, {label}::text COLLATE "C" AS label
    FROM {table}
"""
"""Texts are compared by their code points, whatever the column says: else one row's spelling would
decide for all that are called equal."""
_FIRST = "SELECT vector_dims(vector), kind FROM ({rows}) AS r WHERE vector IS NOT NULL LIMIT 1"
_CHECK = """
    SELECT count(*), count(*) FILTER (WHERE low = high),
        coalesce(sum(n), 0)::bigint, coalesce(sum(with_unit), 0)::bigint,
        coalesce(sum(on_grid), 0)::bigint, coalesce(sum(with_label), 0)::bigint
    FROM (
        SELECT count(*) AS n,
            count(*) FILTER (WHERE unit <> '') AS with_unit,
            count(*) FILTER (
                WHERE (vector + %(rounds)s::vector) - %(rounds)s::vector = vector
                AND vector_norm(vector) <= 1
            ) AS on_grid,
            count(*) FILTER (WHERE label = ANY(%(labels)s)) AS with_label,
            min(label) AS low, max(label) AS high
        FROM ({rows}) AS r GROUP BY unit
    ) AS units
"""
_COUNT = """
    SELECT label, count(*) FROM (
        SELECT min(label) AS label FROM ({rows}) AS r
        WHERE vector <#> %(query)s::vector <= -(%(threshold)s::float8)
        GROUP BY unit
    ) AS units GROUP BY label
"""
_UNITS = "SELECT DISTINCT unit FROM ({rows}) AS r ORDER BY 1"


class PgvectorCorpus(TableCorpus):
    """A table of PostgreSQL whose rows are scored where they are; see :mod:`retrieval.pushdown`.

    Opening it scans the table once. Every query is one read-only transaction that scans all of it.

    Args:
        connection: A psycopg connection that nothing else uses.
        table: Name of the table or view.
        vector: Its column of vectors, on the grid: see :func:`write`.
        unit: Its column of privacy units.
        label: Its column of labels, of which a unit has one.
        public_labels: All labels there can be, fixed without looking at the corpus.
        schema: Where the table is, if not on the search path.
        generation: Public name of this version of the rows.

    Raises:
        InvalidIndex: If the connection is in a transaction, the table or a column cannot be read,
            a policy hides rows, or a row is not as it must be.

    >>> connection = psycopg.connect(url)                                 # doctest: +SKIP
    >>> corpus = PgvectorCorpus(connection, "notes", vector="embedding", unit="patient",
    ...                         generation="2025-06")                     # doctest: +SKIP
    """

    def __init__(
        self,
        connection: psycopg.Connection[Any],
        table: str,
        *,
        vector: str,
        unit: str,
        label: str | None = None,
        public_labels: Sequence[str] = (),
        schema: str | None = None,
        generation: str,
    ) -> None:
        import psycopg
        from psycopg import sql

        super().__init__(table, label=label, public_labels=public_labels, generation=generation)
        self._connection, self._lock, self._path = connection, threading.RLock(), ""
        try:
            called = _named(schema, table).as_string(connection)
            place = self._fetched(sql.SQL(_PLACE).format(), name=called)
            if not place or not place[0][2]:
                raise InvalidIndex(
                    f"the table {called} cannot be read: there is none, or no extension vector"
                )
            *found_at, extension = place[0]
            self._path = f"pg_catalog, {extension}"
            rows = sql.SQL(_ROWS).format(
                unit=_with_values(unit),
                vector=_with_values(vector),
                label=sql.Literal(NO_LABEL) if label is None else _with_values(label),
                table=_with_values(*found_at),
            )
            first, check, self._count, self._units = (
                sql.SQL(text).format(rows=rows) for text in (_FIRST, _CHECK, _COUNT, _UNITS)
            )
            seen = self._fetched(first)
            self._dimensions: int = seen[0][0] if seen else 0
            kind = seen[0][1] if seen else "text"
            rounds = _text(np.full(self._dimensions or 1, _ROUNDS))
            ((found),) = self._fetched(check, rounds=rounds, labels=self._labels)
        except (psycopg.ProgrammingError, psycopg.DataError) as error:
            raise InvalidIndex(f"the table {table!r} cannot be read: {error}") from error
        self._check(*found, kind=kind)

    @property
    def dimensions(self) -> int:
        """Of a vector."""
        return self._dimensions

    def units(self) -> Generator[str, None, None]:
        """Yield the names of the units once each, in order of their code points. NOT private."""
        from psycopg.rows import tuple_row

        open_stream = self._connection.cursor
        with self._reading(), open_stream("epsledger_units", row_factory=tuple_row) as stream:
            stream.execute(self._units, {})
            while names := stream.fetchmany(_BATCH):
                yield from chain(*names)

    def _counted(self, query: Floats, threshold: float) -> list[tuple[Any, ...]]:
        return self._fetched(self._count, query=_text(query), threshold=threshold)

    def _fetched(self, statement: sql.Composed, **values: object) -> list[tuple[Any, ...]]:
        from psycopg.rows import tuple_row

        with self._reading(), self._connection.cursor(row_factory=tuple_row) as cursor:
            return cursor.execute(statement, values).fetchall()

    @contextmanager
    def _reading(self) -> Iterator[None]:
        from psycopg.pq import TransactionStatus

        with self._lock:
            status = self._connection.info.transaction_status
            if status not in {TransactionStatus.IDLE, TransactionStatus.UNKNOWN}:
                raise InvalidIndex("the connection is in a transaction; give one of its own")
            with self._connection.transaction():
                self._connection.execute(_SETTINGS, prepare=False)
                if self._path:
                    self._connection.execute(_PATH, [self._path])
                yield


def write(
    connection: psycopg.Connection[Any],
    table: str,
    batches: Iterable[Batch],
    *,
    vector: str,
    unit: str,
    label: str | None = None,
    schema: str | None = None,
) -> None:
    """Write rows to a new table, their vectors rounded to the grid. All or none.

    Args:
        connection: A psycopg connection to a database with the extension.
        table: Name of the table.
        batches: Of rows: vectors of shape (rows, dimensions) and L2 norm 1, and the unit and the
            label of each.
        vector: Name of the column of vectors.
        unit: Name of the column of units.
        label: Name of the column of labels; None if rows have none.
        schema: Where the table will be, if not first on the search path.

    Raises:
        InvalidIndex: If a row is not as it must be, or the table is there already.

    >>> write(connection, "notes", batches, vector="embedding", unit="patient")  # doctest: +SKIP
    """
    import psycopg
    from psycopg import sql

    source = prepared(batches, label)
    first = next(source)
    dimensions = first[0].shape[1]
    header = np.array([dimensions, 0], ">i2").tobytes()  # pgvector's binary format
    texts = [sql.Identifier(column) for column in (unit, label) if column is not None]
    create = sql.SQL("CREATE TABLE {} ({} vector({}) NOT NULL, {})").format(
        _named(schema, table),
        sql.Identifier(vector),
        sql.Literal(dimensions),
        sql.SQL(", ").join(sql.SQL("{} text NOT NULL").format(column) for column in texts),
    )
    copy = sql.SQL("COPY {} FROM STDIN (FORMAT BINARY)").format(_named(schema, table))
    try:
        with connection.transaction(), connection.cursor() as cursor:
            cursor.execute(create)
            with cursor.copy(copy) as stream:
                for rows, columns in chain([first], source):
                    for row, *values in zip(rows.astype(">f4"), *columns, strict=True):
                        stream.write_row((header + row.tobytes(), *values))
    except (psycopg.ProgrammingError, psycopg.DataError) as error:
        raise InvalidIndex(f"the table {table!r} cannot be written: {error}") from error


def _named(*names: str | None) -> sql.Identifier:
    from psycopg import sql

    return sql.Identifier(*filter(None, names))


def _with_values(*names: str | None) -> sql.Identifier:
    """Return a name for a statement that is given values, in which psycopg reads %% as %."""
    return _named(*(name and name.replace("%", "%%") for name in names))


def _text(vector: Floats) -> str:
    """Return the vector as pgvector reads it; numbers of the grid are exact in decimal."""
    return str(vector.tolist())
