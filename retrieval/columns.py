"""The rows of an index as arrays, in order of their units: checked, joined, kept."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from retrieval.errors import InvalidIndex
from retrieval.grid import checked_rows, is_on_grid

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]
Positions = NDArray[np.intp]
_BLOCK = 10_000
"""Rows that are checked at once."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class Columns:
    """Rows and units. NOT private.

    Attributes:
        rows: Array of shape (rows, dimensions), on the grid, in order of their units.
        owners: The position of each row's unit.
        names: The name of each unit, sorted.
        labels: The label of each unit by its number, of shape (units,); (0,) without labels.
        pairs: Array of shape (pairs, 2), sorted: a unit, and the number of a term that it has.
    """

    rows: Floats
    owners: Positions
    names: tuple[str, ...]
    labels: Integers
    pairs: Integers


def checked(
    vectors: ArrayLike,
    *,
    units: Sequence[str],
    labels: Sequence[str] | None,
    public_labels: tuple[str, ...],
    terms: Sequence[Iterable[str]] | None,
    public_terms: tuple[str, ...],
) -> Columns:
    """Return columns from what a caller gives, one of each for a row.

    Raises:
        InvalidIndex: If a guarantee could not be given for them; it says why, to the owner.
    """
    rows = checked_rows(vectors)
    units = _column("units", units, len(rows))
    labels = None if labels is None else _column("labels", labels, len(rows))
    terms = None if terms is None else _column("terms", terms, len(rows))
    for row, unit in enumerate(units):
        if not isinstance(unit, str) or not unit:
            raise InvalidIndex(
                f"row {row} has no privacy unit: every row needs one, as text, not {unit!r}"
            )
        try:
            unit.encode()
        except UnicodeEncodeError as error:
            raise InvalidIndex(f"row {row}: UTF-8 cannot hold the unit {unit!r}") from error
    names = tuple(sorted(set(units)))
    owners = _places(units, names)
    return _ordered(
        rows,
        owners,
        names,
        _label_numbers(owners, names, labels, public_labels),
        _term_pairs(owners, terms, public_terms),
    )


def _column(name: str, column: Iterable[T], rows: int) -> tuple[T, ...]:
    if isinstance(column, str | bytes | AbstractSet | Mapping) or not isinstance(column, Iterable):
        raise InvalidIndex(
            f"{name} must be a list in the order of the vectors, not a {type(column).__name__}"
        )
    listed = tuple(column)
    if len(listed) != rows:
        raise InvalidIndex(f"{rows} vectors and {len(listed)} {name}: one of each")
    return listed


def joined(one: Columns, other: Columns) -> Columns:
    """Return the rows of both; a unit of both has the rows and the terms of both.

    Raises:
        InvalidIndex: If a unit has two labels.
    """
    names = tuple(sorted({*one.names, *other.names}))
    mine, theirs = _places(one.names, names), _places(other.names, names)
    labels = np.full(len(names) if len(one.labels) else 0, -1, np.int64)
    if len(labels):
        labels[theirs] = other.labels
        two = np.flatnonzero((labels[mine] != one.labels) & (labels[mine] >= 0))
        if len(two):
            raise InvalidIndex(
                f"unit {one.names[two[0]]!r} has two labels; give each unit one, or use terms"
            )
        labels[mine] = one.labels
    return _ordered(
        np.concatenate([one.rows, other.rows]),
        np.concatenate([mine[one.owners], theirs[other.owners]]),
        names,
        labels,
        np.concatenate([_moved(one.pairs, mine), _moved(other.pairs, theirs)]),
    )


def without(columns: Columns, units: Iterable[str]) -> Columns:
    """Return the rows of all other units.

    Raises:
        InvalidIndex: If none is left, or they are no list of names.
    """
    if isinstance(units, str) or not isinstance(units, Iterable):
        raise InvalidIndex(f"units must be a list of names, got {units!r}")
    gone = set(units)
    kept = np.array([name not in gone for name in columns.names], np.bool_)
    if not kept.any():
        raise InvalidIndex("no unit would be left")
    places, rows = np.cumsum(kept) - 1, kept[columns.owners]
    return Columns(
        columns.rows[rows],
        places[columns.owners[rows]],
        tuple(name for name in columns.names if name not in gone),
        columns.labels[kept] if len(columns.labels) else columns.labels,
        _moved(columns.pairs[kept[columns.pairs[:, 0]]], places),
    )


def save(columns: Columns, folder: Path) -> None:
    """Write the columns as files, durably."""
    for name in ("rows", "owners", "labels", "pairs"):
        with (folder / f"{name}.npy").open("wb") as file:
            np.save(file, getattr(columns, name))
            file.flush()
            os.fsync(file.fileno())
    write_json(folder / "names.json", columns.names)


def write_json(path: Path, value: object) -> None:
    """Write a value, durably."""
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())


def load(folder: Path, *, labels: int, terms: int) -> Columns:
    """Return the columns of :func:`save`; rows stay in their file, mapped into memory.

    Args:
        folder: Where they are.
        labels: How many public labels there are.
        terms: How many public terms there are.

    Raises:
        OSError: If a file cannot be read.
        ValueError: If a file is damaged, or of another index.
    """
    arrays = [
        np.load(folder / f"{name}.npy", mmap_mode="r" if name == "rows" else None)
        for name in ("rows", "owners", "labels", "pairs")
    ]
    names = tuple(json.loads((folder / "names.json").read_text(encoding="utf-8")))
    loaded = Columns(arrays[0], arrays[1], names, arrays[2], arrays[3])
    if not _fit(loaded, labels, terms):
        raise ValueError("its files do not belong together")
    if not all(map(is_on_grid, np.array_split(loaded.rows, len(loaded.rows) // _BLOCK + 1))):
        raise ValueError("its vectors are damaged: they are not on the grid")
    return loaded


def _fit(own: Columns, labels: int, terms: int) -> bool:
    units, pairs = len(own.names), own.pairs
    return (
        own.rows.ndim == 2
        and own.rows.dtype == np.float32
        and len(set(names := own.names)) == units
        and list(names) == sorted(names)
        and own.owners.shape == own.rows.shape[:1]
        and np.array_equal(np.unique(own.owners), np.arange(units))
        and bool((np.diff(own.owners) >= 0).all())
        and own.labels.shape == ((units,) if labels else (0,))
        and bool(((own.labels >= 0) & (own.labels < labels)).all())
        and pairs.shape == (len(pairs), 2)
        and bool(((pairs >= 0) & (pairs < (units, terms))).all())
    )


def _ordered(
    rows: Floats, owners: Positions, names: tuple[str, ...], labels: Integers, pairs: Integers
) -> Columns:
    order = np.argsort(owners, kind="stable")
    in_order = bool((np.diff(owners) >= 0).all())
    return Columns(
        rows if in_order else rows[order], owners[order], names, labels, np.unique(pairs, axis=0)
    )


def _places(units: Sequence[str], names: Sequence[str]) -> Positions:
    place = {name: position for position, name in enumerate(names)}
    return np.fromiter((place[unit] for unit in units), np.intp, len(units))


def _moved(pairs: Integers, places: Positions) -> Integers:
    return np.column_stack([places[pairs[:, 0]], pairs[:, 1]])


def _label_numbers(
    owners: Positions, names: Sequence[str], labels: Sequence[str] | None, public: tuple[str, ...]
) -> Integers:
    numbers = {label: number for number, label in enumerate(public)}
    found = np.full(0 if labels is None else len(names), -1, np.int64)
    for row, (owner, label) in enumerate(zip(owners, labels or (), strict=labels is not None)):
        if not isinstance(label, str) or label not in numbers:
            raise InvalidIndex(f"row {row} has the label {label!r}, not one of the public ones")
        if found[owner] not in (-1, numbers[label]):
            raise InvalidIndex(
                f"unit {names[owner]!r} has two labels; give each unit one, or use terms"
            )
        found[owner] = numbers[label]
    return found


def _term_pairs(
    owners: Positions, terms: Sequence[Iterable[str]] | None, public: tuple[str, ...]
) -> Integers:
    numbers = {term: number for number, term in enumerate(public)}
    for row, words in enumerate(terms or ()):
        if isinstance(words, str) or not isinstance(words, Iterable):
            raise InvalidIndex(f"the terms of row {row} must be a list of words")
    pairs = [
        (owner, numbers[term])
        for owner, words in zip(owners, terms or (), strict=terms is not None)
        for term in {word for word in words if isinstance(word, str)} & numbers.keys()
    ]
    return np.array(pairs, np.int64).reshape(-1, 2)
