"""What the engines share: how rows are prepared, checked when a table is opened, and counted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike

from retrieval.columns import Floats, Integers
from retrieval.errors import InvalidIndex, InvalidQuery
from retrieval.grid import checked_rows
from retrieval.index import checked_name, public_column

Batch = tuple[ArrayLike, Sequence[str], Sequence[str] | None]
"""Vectors, units and labels of some rows; no labels where the table has no column for them."""

NO_LABEL = ""
"""Stands in the statements for the label of every unit where there are no labels."""

_KINDS = {"text", "varchar", "character varying", "uuid", "tinyint", "smallint", "integer"} | {
    *("bigint", "hugeint", "utinyint", "usmallint", "uinteger", "ubigint", "uhugeint")
}
"""Types of which equal values have one text."""

_MUST = (
    "rows without a privacy unit: every row needs one, as text",
    "rows whose vector is missing, off the grid or longer than 1; store vectors by write()",
    "rows whose label is missing or not one of the public ones",
    "units with two labels; give each unit one",
)


class TableCorpus(ABC):
    """A table or view with a row for each vector; see :class:`retrieval.Corpus`.

    A unit counts once, for one label, whatever is in the table: adding or removing its rows changes
    one count by one.

    Attributes:
        table: Name of the table.
        public_labels: As given.
        generation: As given.
    """

    def __init__(
        self, table: str, *, label: str | None, public_labels: Sequence[str], generation: str
    ) -> None:
        self.table = table
        self.public_labels = public_column("labels", label, public_labels)
        self.generation = checked_name(generation)

    @property
    @abstractmethod
    def dimensions(self) -> int:
        """Of a vector."""

    @abstractmethod
    def units(self) -> Generator[str, None, None]:
        """Yield the names of the units once each, in order of their code points. NOT private."""

    @abstractmethod
    def _counted(self, query: Floats, threshold: float) -> list[tuple[str, int]]:
        """Return how many units score at least the threshold, by label, as the engine counts."""

    def histogram(self, query: Floats, threshold: float) -> Integers:
        """Return how many units of each label score at least the threshold; see ``Corpus``."""
        if not self.public_labels:
            raise InvalidQuery("this corpus has no labels; open it with label and public_labels")
        counts = dict(self._counted(query, threshold))
        return np.array([counts.get(label, 0) for label in self.public_labels], np.int64)

    def count(self, query: Floats, threshold: float) -> int:
        """Return how many units score at least the threshold."""
        return sum(count for _, count in self._counted(query, threshold))

    @property
    def _labels(self) -> list[str]:
        return list(self.public_labels) or [NO_LABEL]

    def _check(self, units: int, one_label: int, rows: int, *good: int, kind: str) -> None:
        """Check what the engine found, in the order of the statements' columns.

        Args:
            units: How many there are.
            one_label: How many of them have one label.
            rows: How many there are.
            good: How many of them have a unit, a vector on the grid, a public label.
            kind: Of the column of units, as the engine calls it.
        """
        if kind.lower() not in _KINDS:
            raise InvalidIndex(
                f"the units of the table {self.table!r} are of the type {kind}, in which equal"
                " units can be written in several ways; they must be texts, integers or UUIDs"
            )
        if not rows:
            raise InvalidIndex(f"the table {self.table!r} has no rows; write them first")
        for right, of, what in zip(
            (*good, one_label), (rows, rows, rows, units), _MUST, strict=True
        ):
            if right < of:
                raise InvalidIndex(f"the table {self.table!r} has {of - right} {what}")


def prepared(
    batches: Iterable[Batch], label: str | None
) -> Iterator[tuple[Floats, list[Sequence[str]]]]:
    """Yield vectors on the grid, and their units and labels, checked.

    Args:
        batches: Of rows; vectors have L2 norm 1.
        label: The column of labels, None if there is none.

    Raises:
        InvalidIndex: If a row is anything else; it says which.
    """
    start, dimensions = 0, None
    for vectors, units, labels in batches:
        rows = checked_rows(vectors)
        dimensions = dimensions or rows.shape[1]
        if rows.shape[1] != dimensions:
            raise InvalidIndex(
                f"rows from row {start} on have {rows.shape[1]} dimensions, not {dimensions}"
            )
        texts = [units, *([] if label is None else [labels or ()])]
        for name, column in zip(("privacy unit", "label"), texts, strict=False):
            if len(column) != len(rows):
                raise InvalidIndex(f"{len(rows)} vectors and {len(column)} {name}s: one of each")
            for row, text in enumerate(column, start):
                if not isinstance(text, str) or not text:
                    raise InvalidIndex(f"row {row} has no {name}: every row needs one, as text")
                try:
                    text.encode()
                except UnicodeEncodeError as error:
                    raise InvalidIndex(f"row {row}: UTF-8 cannot hold {text!r}") from error
        yield rows, texts
        start += len(rows)
    if not start:
        raise InvalidIndex("there are no rows to write")
