"""An exact index of private vectors in which a unit's score depends on that unit alone.

Approximate indexes do not have that property, nor have floating-point products: removing one row
changes which other rows are found, or the last bits of their scores, and with that the
sensitivity of everything computed from them. See :mod:`retrieval.grid`.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from accountant.notes import fsync_folder
from retrieval import columns
from retrieval.columns import Columns, Floats, Integers, Positions
from retrieval.errors import InvalidIndex, InvalidQuery
from retrieval.grid import STEPS, check_kernel
from retrieval.hashing import Hashing, HashTables

_FORMAT = 1
_TIES = secrets.token_bytes(16)
_BLOCK = 4096
"""Rows that are added up at once."""


class Corpus(Protocol):
    """What a guard can count in. What it counts is NOT private: only a guard may release it.

    Adding or removing one unit changes one count by one, whatever the corpus.
    """

    @property
    def dimensions(self) -> int:
        """Of a vector."""

    @property
    def public_labels(self) -> tuple[str, ...]:
        """All labels there can be; none if units have no labels."""

    @property
    def generation(self) -> str:
        """Name of this version of the corpus."""

    def histogram(self, query: Floats, threshold: float) -> Integers:
        """Return how many units of each label have a row that scores at least the threshold.

        Args:
            query: Array of shape (dimensions,), on the grid.
            threshold: Cosine similarity; a float32 number.

        Returns:
            Array of shape (labels,).
        """

    def count(self, query: Floats, threshold: float) -> int:
        """Return how many units have a row that scores at least the threshold."""


@dataclass(frozen=True, slots=True, eq=False)
class Retrieved:
    """Units with a row that scores at least a threshold. NOT private.

    Attributes:
        units: Positions of the units in the index.
        rows: The best row of each.
        scores: Its score.
    """

    units: Positions
    rows: Positions
    scores: Floats

    def cut(self, kept: NDArray[np.bool_] | Positions) -> Retrieved:
        """Return some of them, by mask or by place."""
        return Retrieved(self.units[kept], self.rows[kept], self.scores[kept])


class PrivateIndex:
    """Vectors of a private corpus, grouped by privacy unit.

    Rows with the same unit (chunks, duplicates) count once: a unit's score is its best row's.

    Args:
        vectors: Array of shape (rows, dimensions), float32, of L2 norm 1.
        units: The privacy unit of each row.
        labels: The label of each row; all rows of a unit must have the same.
        public_labels: All labels there can be, fixed without looking at the corpus.
        terms: The words of each row; those that are not public terms count for nothing.
        public_terms: The vocabulary of ``RetrievalGuard.keywords``, fixed likewise.
        hashing: Which rows a query looks at; all if None.
        generation: Name of this version of the corpus; change it whenever the corpus changes.
            Declared, not hashed: a digest of private rows in the ledger would confirm guesses.

    Attributes:
        public_labels: As given.
        public_terms: As given.
        hashing: As given.
        generation: As given.

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
        labels: Sequence[str] | None = None,
        public_labels: Sequence[str] = (),
        terms: Sequence[Iterable[str]] | None = None,
        public_terms: Sequence[str] = (),
        hashing: Hashing | None = None,
        generation: str = "1",
    ) -> None:
        self.public_labels = public_column("labels", labels, public_labels)
        self.public_terms = public_column("terms", terms, public_terms)
        self.hashing = hashing
        self.generation = checked_name(generation)
        self._columns = columns.checked(
            vectors,
            units=units,
            labels=labels,
            public_labels=self.public_labels,
            terms=terms,
            public_terms=self.public_terms,
        )
        self._tables = HashTables(hashing, self._columns.rows) if hashing else None

    @property
    def dimensions(self) -> int:
        """Of a vector."""
        return int(self._columns.rows.shape[1])

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the units, in the order of their positions. NOT private."""
        return self._columns.names

    # --- versions and files -----------------------------------------------------------------------

    def joined(self, other: PrivateIndex, *, generation: str) -> Self:
        """Return an index of the rows of both. A unit of both has the rows of both.

        Raises:
            InvalidIndex: If their public lists or dimensions differ, a unit has two labels, or the
                generation is not a new one.
        """
        ours = (self.dimensions, self.public_labels, self.public_terms)
        if ours != (other.dimensions, other.public_labels, other.public_terms):
            raise InvalidIndex("the indexes differ in dimensions, public labels or public terms")
        if generation == other.generation:
            raise InvalidIndex(f"generation {generation!r} is the other index's; name a new one")
        return self._changed(columns.joined(self._columns, other._columns), generation)

    def without(self, units: Iterable[str], *, generation: str) -> Self:
        """Return an index without these units; those that it does not have are ignored.

        Their spend is not returned: what was released about them stays released.

        Raises:
            InvalidIndex: If no unit is left, or the generation is not a new one.
        """
        return self._changed(columns.without(self._columns, units), generation)

    def save(self, folder: str | Path) -> None:
        """Write the index to a new folder. It holds private data as it is: keep it with the corpus.

        Raises:
            InvalidIndex: If the folder is there.
        """
        folder = Path(folder)
        new = folder.with_name(folder.name + ".new")
        for name in (folder, new):
            if name.exists():
                raise InvalidIndex(f"{name} is there already; remove it, or name a new folder")
        try:
            new.mkdir(mode=0o700)
        except OSError as error:
            raise InvalidIndex(f"{folder} cannot be written: {error}") from error
        columns.save(self._columns, new)
        record = {
            "format": _FORMAT,
            "public_labels": self.public_labels,
            "public_terms": self.public_terms,
            "hashing": asdict(self.hashing) if self.hashing else None,
            "generation": self.generation,
        }
        columns.write_json(new / "index.json", record)
        fsync_folder(new / "index.json")
        new.rename(folder)
        fsync_folder(folder)

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """Return the index of a folder; its vectors stay in their file, mapped into memory.

        Raises:
            InvalidIndex: If it is none, or of another version.
        """
        folder = Path(folder)
        try:
            record = _record(folder)
            labels, terms = tuple(record["public_labels"]), tuple(record["public_terms"])
            hashing = Hashing(**record["hashing"]) if record["hashing"] else None
            generation = checked_name(record["generation"])
            own = columns.load(folder, labels=len(labels), terms=len(terms))
        except (EOFError, LookupError, OSError, TypeError, ValueError) as error:
            raise InvalidIndex(
                f"{folder} is no index that can be read; build it again: {error!r}"
            ) from error
        check_kernel(own.rows.shape[1])
        return cls._made(
            own, public_labels=labels, public_terms=terms, hashing=hashing, generation=generation
        )

    def _changed(self, own: Columns, generation: str) -> Self:
        if checked_name(generation) == self.generation:
            raise InvalidIndex(f"generation {generation!r} is this one; name a new one")
        return self._made(
            own,
            public_labels=self.public_labels,
            public_terms=self.public_terms,
            hashing=self.hashing,
            generation=generation,
        )

    @classmethod
    def _made(cls, own: Columns, *, hashing: Hashing | None, **public: object) -> Self:
        index = cls.__new__(cls)
        tables = HashTables(hashing, own.rows) if hashing else None
        index.__dict__ |= public | {"_columns": own, "hashing": hashing, "_tables": tables}
        return index

    # --- what a guard computes with: NOT private --------------------------------------------------

    def histogram(self, query: Floats, threshold: float) -> Integers:
        """Return how many units of each label score at least the threshold; see :class:`Corpus`."""
        return self.labels_of(self.retrieved(query, threshold))

    def count(self, query: Floats, threshold: float) -> int:
        """Return how many units score at least the threshold."""
        return len(self.retrieved(query, threshold).units)

    def retrieved(self, query: Floats, threshold: float) -> Retrieved:
        """Return the units that score at least the threshold, each with its best row."""
        if self._tables is None:
            scores = self._columns.rows @ query
            hits = np.flatnonzero(scores >= np.float32(threshold))
            scores = scores[hits]
        else:
            hits = self._tables.candidates(query)
            scores = self._columns.rows[hits] @ query
            above = scores >= np.float32(threshold)
            hits, scores = hits[above], scores[above]
        owners = self._columns.owners[hits]
        if len(self.names) < len(self._columns.rows):
            order = np.lexsort((hits, -scores, owners))
            order = order[np.flatnonzero(np.diff(owners[order], prepend=-1))]
            owners, hits, scores = owners[order], hits[order], scores[order]
        return Retrieved(owners, hits, scores)

    def top(self, found: Retrieved, most: int) -> Retrieved:
        """Return at most so many, best first. Equal scores are ordered by a keyed hash of the unit.

        Removing a unit that is among them brings in one other: two of them change, not one.
        """
        if len(found.units) > most:
            least = np.partition(found.scores, -most)[-most]
            found = found.cut(found.scores >= least)
        digests = [_place_among_equals(name) for name in self.names_of(found)]
        order = sorted(range(len(digests)), key=lambda at: (-found.scores[at], digests[at]))
        return found.cut(np.array(order[:most], np.intp))

    def labels_of(self, found: Retrieved) -> Integers:
        """Return how many of the units have each label: array of shape (labels,).

        Raises:
            InvalidQuery: If the index has no labels.
        """
        if not self.public_labels:
            raise InvalidQuery("this index has no labels; build it with labels and public_labels")
        return np.bincount(self._columns.labels[found.units], minlength=len(self.public_labels))

    def terms_of(self, found: Retrieved) -> Integers:
        """Return how many of the units have each public term: array of shape (terms,)."""
        owners, terms = self._columns.pairs.T
        own = _ranges(
            np.searchsorted(owners, found.units), np.searchsorted(owners, found.units + 1)
        )
        return np.bincount(terms[own], minlength=len(self.public_terms))

    def nearest(self, found: Retrieved, candidates: Floats) -> Integers:
        """Return how many of the units are nearest to each candidate, by their best rows.

        Args:
            found: The units.
            candidates: Array of shape (candidates, dimensions), on the grid. Of equally near ones
                the first counts.
        """
        counts = np.zeros(len(candidates), np.int64)
        for start in range(0, len(found.rows), _BLOCK):
            scores = self._columns.rows[found.rows[start : start + _BLOCK]] @ candidates.T
            counts += np.bincount(np.argmax(scores, axis=1), minlength=len(candidates))
        return counts

    def total(self, found: Retrieved) -> Integers:
        """Return the sum of the units' best rows, in steps of the grid: shape (dimensions,)."""
        total = np.zeros(self.dimensions, np.int64)
        for start in range(0, len(found.rows), _BLOCK):
            steps = self._columns.rows[found.rows[start : start + _BLOCK]] * np.float32(STEPS)
            total += steps.astype(np.int64).sum(axis=0)
        return total

    def names_of(self, found: Retrieved) -> list[str]:
        """Return the names of the units."""
        return [self.names[unit] for unit in found.units]


def _record(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    if record["format"] != _FORMAT:
        raise ValueError("another version of epsledger wrote it")
    return record


def _place_among_equals(name: str) -> bytes:
    """Return the unit's place among others: a function of its name and this process's secret."""
    return hashlib.blake2b(name.encode(), key=_TIES, digest_size=16).digest()


def _ranges(starts: Positions, ends: Positions) -> Positions:
    """Return the integers of all ranges, one after another."""
    sizes = ends - starts
    offsets = np.repeat(starts - np.cumsum(sizes) + sizes, sizes)
    positions: Positions = offsets + np.arange(len(offsets))
    return positions


def public_column(
    name: str, column: Sequence[object] | None, public: Sequence[str]
) -> tuple[str, ...]:
    """Return what a column may hold, as it was listed; nothing where there is no such column.

    Raises:
        InvalidIndex: If it is no public list.
    """
    if column is None and public is not None and not len(public):
        return ()
    if not isinstance(public, Sequence | np.ndarray) or isinstance(public, str) or public is column:
        raise InvalidIndex(
            f"public_{name} must be a list that was written down without looking at the rows: which"
            f" {name} occur is private"
        )
    listed = tuple(public)
    if not listed or len(set(listed)) < len(listed) or not all(isinstance(x, str) for x in listed):
        raise InvalidIndex(f"public_{name} must be distinct texts, and at least one")
    if column is None:
        raise InvalidIndex(f"public_{name} are given together with the {name} of the rows")
    return listed


def checked_name(generation: str) -> str:
    """Return the name of a version of a corpus.

    Raises:
        InvalidIndex: If it is none.
    """
    if not isinstance(generation, str) or not generation:
        raise InvalidIndex(f"generation must be a name, got {generation!r}")
    return generation
