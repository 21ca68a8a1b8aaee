"""An exact index of private vectors in which a unit's score depends on that unit alone.

Approximate indexes and matrix-vector products of a linear algebra library do not have that
property: removing one row changes which other rows are found, or the last bits of their
scores, and with that the sensitivity of everything computed from them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from retrieval.errors import InvalidIndex, InvalidQuery

NORM_TOLERANCE = 1e-3
"""How far a vector's L2 norm may be from 1."""


class PrivateIndex:
    """Vectors of a private corpus, grouped by privacy unit, each unit with one public label.

    Rows with the same unit (chunks, duplicates) count once: a unit's score is its best row's.

    Args:
        vectors: Array of shape (rows, dimensions), float32, of L2 norm 1.
        units: The privacy unit of each row.
        labels: The label of each row; all rows of a unit must have the same.
        public_labels: All labels there can be, fixed without looking at the corpus.
        generation: Name of this version of the corpus; change it whenever the corpus changes.
            Declared, not hashed: a digest of private rows in the ledger would confirm guesses.

    Attributes:
        public_labels: As given.
        generation: As given.
        dimensions: Of a vector.

    Raises:
        InvalidIndex: On anything that a guarantee could not be given for.

    >>> index = PrivateIndex([[1, 0], [0, 1], [1, 0]], units=["a", "b", "a"],
    ...                      labels=["x", "y", "x"], public_labels=["x", "y"])
    >>> index.dimensions
    2
    """

    def __init__(
        self,
        vectors: ArrayLike,
        *,
        units: Sequence[str],
        labels: Sequence[str],
        public_labels: Sequence[str],
        generation: str = "1",
    ) -> None:
        rows = _checked_vectors(vectors)
        if not len(units) == len(labels) == len(rows):
            raise InvalidIndex(
                f"{len(rows)} vectors, {len(units)} units and {len(labels)} labels: one of each"
            )
        if not public_labels or len(set(public_labels)) != len(public_labels):
            raise InvalidIndex("public_labels must be distinct, and at least one")
        codes = {label: code for code, label in enumerate(public_labels)}
        label_of: dict[str, int] = {}
        for row, (unit, label) in enumerate(zip(units, labels, strict=True)):
            if not isinstance(unit, str) or not unit:
                raise InvalidIndex(f"row {row} has no privacy unit: every row needs one")
            if label not in codes:
                raise InvalidIndex(f"row {row} has the label {label!r}, not one of the public ones")
            if label_of.setdefault(unit, codes[label]) != codes[label]:
                raise InvalidIndex(f"unit {unit!r} has two labels; give each unit one")
        positions = {unit: position for position, unit in enumerate(sorted(label_of))}
        owner = np.array([positions[unit] for unit in units])
        order = np.argsort(owner, kind="stable")
        self.public_labels = tuple(public_labels)
        self.generation = generation
        self.dimensions = rows.shape[1]
        self._rows = np.ascontiguousarray(rows[order])
        self._starts = np.flatnonzero(np.diff(owner[order], prepend=-1))
        self._labels = np.array([label_of[unit] for unit in sorted(label_of)])

    def histogram(self, query: NDArray[np.float32], threshold: float) -> NDArray[np.int64]:
        """Return how many units of each label score at least ``threshold``: NOT private.

        Adding or removing one unit changes one count by one, whatever the corpus: L2
        sensitivity 1. Only a guard may show anything derived from it.

        Args:
            query: Array of shape (dimensions,), float32.
            threshold: Cosine similarity from which a unit votes; public.

        Returns:
            Array of shape (labels,).
        """
        votes = self._labels[self._scores(query) >= np.float32(threshold)]
        counts: NDArray[np.int64] = np.bincount(votes, minlength=len(self.public_labels))
        return counts

    def _scores(self, query: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return each unit's best score; row by row, so that no row's bits depend on another."""
        scores: NDArray[np.float32] = np.maximum.reduceat(
            np.vecdot(self._rows, query), self._starts
        )
        return scores


def checked_query(query: ArrayLike, dimensions: int) -> NDArray[np.float32]:
    """Return the query as float32 of shape (dimensions,) and norm 1.

    Raises:
        InvalidQuery: If it is anything else.
    """
    try:
        vector = np.asarray(query, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise InvalidQuery(f"the query is not a vector of numbers: {error}") from error
    if vector.shape != (dimensions,):
        raise InvalidQuery(f"the query has shape {vector.shape}, the index needs ({dimensions},)")
    norm = float(np.linalg.norm(vector.astype(np.float64)))
    if not abs(norm - 1) <= NORM_TOLERANCE:
        raise InvalidQuery(f"the query has L2 norm {norm:g}, not 1; normalise it")
    return np.ascontiguousarray(vector)


def _checked_vectors(vectors: ArrayLike) -> NDArray[np.float32]:
    rows = np.asarray(vectors, dtype=np.float32)
    if rows.ndim != 2 or not rows.size:
        raise InvalidIndex(f"vectors must have shape (rows, dimensions), got {rows.shape}")
    norms = np.linalg.norm(rows.astype(np.float64), axis=1)
    wrong = np.flatnonzero(~(np.abs(norms - 1) <= NORM_TOLERANCE))
    if len(wrong):
        raise InvalidIndex(
            f"{len(wrong)} vectors do not have L2 norm 1, the first is row {wrong[0]}"
            f" with {norms[wrong[0]]:g}; normalise them"
        )
    return rows
