"""Counting in DuckDB: in its own tables, or through a view in Parquet files."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from retrieval.columns import Floats
from retrieval.errors import InvalidIndex
from retrieval.grid import STEPS
from retrieval.pushdown.tables import NO_LABEL, Batch, TableCorpus, prepared

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

_BATCH = 10_000
"""Names of units that are fetched at a time."""
_CREATE = "CREATE TABLE {table} ({vector} FLOAT[{dimensions}] NOT NULL{texts})"
_INSERT = "INSERT INTO {table} SELECT array_value({values}){texts} FROM epsledger_batch"
_FIRST = "SELECT len({vector}), typeof({unit}) FROM {table} WHERE {vector} IS NOT NULL LIMIT 1"
_ROWS = """
    SELECT {unit}::VARCHAR COLLATE C AS unit, {vector}::FLOAT[{dimensions}] AS vector,
        {label}::VARCHAR COLLATE C AS label
    FROM {table}
"""
"""Texts are compared by their code points, whatever the column or the database says: else one
row's spelling would decide for all that are called equal."""
_CHECK = """
    SELECT count(*), count(*) FILTER (WHERE low = high),
        coalesce(sum(n), 0)::BIGINT, coalesce(sum(with_unit), 0)::BIGINT,
        coalesce(sum(on_grid), 0)::BIGINT, coalesce(sum(with_label), 0)::BIGINT
    FROM (
        SELECT count(*) AS n,
            count(*) FILTER (WHERE unit <> '') AS with_unit,
            count(*) FILTER (
                WHERE list_bool_and([x * {steps} = round(x * {steps}) FOR x IN vector])
                AND array_inner_product(
                    vector::DOUBLE[{dimensions}], vector::DOUBLE[{dimensions}]
                ) <= 1
            ) AS on_grid,
            count(*) FILTER (WHERE list_contains($labels, label)) AS with_label,
            min(label) AS low, max(label) AS high
        FROM ({rows}) AS r GROUP BY unit
    ) AS units
"""
_COUNT = """
    SELECT label, count(*) FROM (
        SELECT min(label) AS label FROM ({rows}) AS r
        WHERE array_inner_product(vector, $query::FLOAT[{dimensions}]) >= $threshold::DOUBLE
        GROUP BY unit
    ) AS units GROUP BY label
"""
_UNITS = "SELECT DISTINCT unit FROM ({rows}) AS r ORDER BY 1"
_PATH = "SELECT current_setting('search_path')"


class DuckDBCorpus(TableCorpus):
    """A table or view of DuckDB, scored where it is; see :mod:`retrieval.pushdown`.

    Parquet files are opened through a view::

        CREATE VIEW notes AS SELECT * FROM read_parquet('notes/*.parquet')

    Opening it scans all rows once; so does every query, in a table several times faster.

    Args:
        connection: Of DuckDB. Queries run on cursors of it, which see no temporary tables.
        table: Name of the table or view.
        vector: Its column of vectors, on the grid: see :func:`write`.
        unit: Its column of privacy units.
        label: Its column of labels, of which a unit has one.
        public_labels: All labels there can be, fixed without looking at the corpus.
        schema: Where the table is, if not on the search path.
        generation: Public name of this version of the rows.

    Raises:
        InvalidIndex: If the table or a column cannot be read, or a row is not as it must be.

    >>> import duckdb
    >>> with duckdb.connect() as connection:
    ...     write(connection, "notes", [([[1, 0], [0, 1]], ["a", "b"], None)], vector="v", unit="u")
    ...     corpus = DuckDBCorpus(connection, "notes", vector="v", unit="u", generation="1")
    ...     corpus.count(np.float32([1, 0]), 0.5)
    1
    """

    def __init__(
        self,
        connection: DuckDBPyConnection,
        table: str,
        *,
        vector: str,
        unit: str,
        label: str | None = None,
        public_labels: Sequence[str] = (),
        schema: str | None = None,
        generation: str,
    ) -> None:
        import duckdb

        super().__init__(table, label=label, public_labels=public_labels, generation=generation)
        self._connection, self._path = connection, _path(connection)
        names = {
            "unit": _quoted(unit),
            "vector": _quoted(vector),
            "label": f"'{NO_LABEL}'" if label is None else _quoted(label),
            "table": _named(schema, table),
        }
        try:
            first = self._fetched(_FIRST.format(**names))
            self._dimensions: int = first[0][0] if first else 0
            kind = first[0][1] if first else "VARCHAR"
            sizes = {"dimensions": self._dimensions or 1, "steps": STEPS}
            rows = _ROWS.format(**names, **sizes)
            check, self._count, self._units = (
                text.format(rows=rows, **sizes) for text in (_CHECK, _COUNT, _UNITS)
            )
            (found,) = self._fetched(check, labels=self._labels)
        except duckdb.Error as error:
            raise InvalidIndex(f"the table {table!r} cannot be read: {error}") from error
        self._check(*found, kind=kind)

    @property
    def dimensions(self) -> int:
        """Of a vector."""
        return self._dimensions

    def units(self) -> Generator[str, None, None]:
        """Yield the names of the units once each, in order of their code points. NOT private."""
        with self._cursor() as cursor:
            cursor.execute(self._units)
            while names := cursor.fetchmany(_BATCH):
                yield from chain(*names)

    def _counted(self, query: Floats, threshold: float) -> list[tuple[Any, ...]]:
        return self._fetched(self._count, query=query.tolist(), threshold=threshold)

    def _fetched(self, statement: str, **values: object) -> list[tuple[Any, ...]]:
        with self._cursor() as cursor:
            return cursor.execute(statement, values).fetchall()

    def _cursor(self) -> DuckDBPyConnection:
        return _looking_at(self._connection.cursor(), self._path)


def write(
    connection: DuckDBPyConnection,
    table: str,
    batches: Iterable[Batch],
    *,
    vector: str,
    unit: str,
    label: str | None = None,
    schema: str | None = None,
) -> None:
    """Write rows to a new table, their vectors rounded to the grid. All or none.

    ``COPY notes TO 'notes.parquet'`` makes a Parquet file of the table.

    Args:
        connection: Of DuckDB.
        table: Name of the table.
        batches: Of rows: vectors of shape (rows, dimensions) and L2 norm 1, and the unit and the
            label of each.
        vector: Name of the column of vectors.
        unit: Name of the column of units.
        label: Name of the column of labels; None if rows have none.
        schema: Where the table will be, if not first on the search path.

    Raises:
        InvalidIndex: If a row is not as it must be, or the table is there already.

    >>> import duckdb
    >>> with duckdb.connect() as connection:
    ...     write(connection, "notes", [([[1, 0]], ["a"], ["x"])], vector="v", unit="u", label="l")
    ...     connection.sql("SELECT u, l FROM notes").fetchall()
    [('a', 'x')]
    """
    import duckdb

    source = prepared(batches, label)
    first = next(source)
    dimensions = first[0].shape[1]
    texts = [_quoted(column) for column in (unit, label) if column is not None]
    create = _CREATE.format(
        table=_named(schema, table),
        vector=_quoted(vector),
        dimensions=dimensions,
        texts="".join(f", {column} VARCHAR NOT NULL" for column in texts),
    )
    insert = _INSERT.format(
        table=_named(schema, table),
        values=", ".join(f"x{at}" for at in range(dimensions)),
        texts="".join(f", text{at}" for at in range(len(texts))),
    )
    with _looking_at(connection.cursor(), _path(connection)) as cursor:
        try:
            cursor.begin()
            cursor.execute(create)
            for rows, owners in chain([first], source):
                # DuckDB takes arrays of NumPy as columns, one-dimensional ones only.
                batch = {f"x{at}": column for at, column in enumerate(np.ascontiguousarray(rows.T))}
                batch |= {
                    f"text{at}": np.array(list(text), object) for at, text in enumerate(owners)
                }
                cursor.register("epsledger_batch", batch)
                cursor.execute(insert)
            cursor.commit()
        except duckdb.Error as error:
            raise InvalidIndex(f"the table {table!r} cannot be written: {error}") from error


def _path(connection: DuckDBPyConnection) -> str:
    """Return where a connection looks for tables: its cursors do not inherit it."""
    ((path,),) = connection.execute(_PATH).fetchall()
    return str(path)


def _looking_at(cursor: DuckDBPyConnection, path: str) -> DuckDBPyConnection:
    if path:
        cursor.execute("SET search_path = '{}'".format(path.replace("'", "''")))
    return cursor


def _named(schema: str | None, table: str) -> str:
    return ".".join(_quoted(name) for name in (schema, table) if name)


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
