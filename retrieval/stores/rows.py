"""What every reader returns, and the checks that all of them share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from numbers import Integral
from typing import Any
from uuid import UUID

import numpy as np
from numpy.typing import ArrayLike, NDArray

from retrieval.errors import InvalidIndex, UnsupportedStore
from retrieval.grid import norms

BATCH = 1000
"""Rows asked of a store at a time."""

Batch = tuple[Any, Iterable[object], Iterable[object]]
"""Vectors, units and labels of some rows; the labels are not looked at where none are read."""


@dataclass(frozen=True, slots=True, eq=False)
class StoredRows:
    """All rows of a store: PRIVATE, so that its representation shows only the generation.

    Attributes:
        vectors: float32 array of shape (rows, dimensions), as stored, of any norm.
        units: The privacy unit of each row.
        labels: The label of each row, or None where no label was asked for.
        generation: Name of this version of the rows: the store's own if it has one, else the
            caller's.
    """

    vectors: NDArray[np.float32] = field(repr=False)
    units: list[str] = field(repr=False)
    labels: list[str] | None = field(repr=False)
    generation: str


def normalized(vectors: ArrayLike) -> NDArray[np.float32]:
    """Return the vectors divided by their L2 norms, for stores that keep them unnormalized.

    Each row is computed from that row alone, in float64, and rounded to float32.

    Args:
        vectors: Array of shape (rows, dimensions).

    Returns:
        float32 array of the same shape.

    Raises:
        InvalidIndex: If a vector is zero, or has a value that is not finite.

    >>> normalized([[3, 4], [0, 2]]).tolist()
    [[0.6000000238418579, 0.800000011920929], [0.0, 1.0]]
    """
    rows = np.asarray(vectors)
    if rows.ndim != 2:
        raise InvalidIndex(f"vectors must have shape (rows, dimensions), got {rows.shape}")
    unit = np.empty(rows.shape, dtype=np.float32)
    wrong = 0
    for start in range(0, len(rows), BATCH):
        block = rows[start : start + BATCH].astype(np.float64)
        usable = np.isfinite(block).all(axis=1) & block.any(axis=1)
        wrong += int(np.count_nonzero(~usable))
        block[~usable] = 1
        unit[start : start + BATCH] = block / norms(block)[:, None]
    if wrong:
        raise InvalidIndex(
            f"{wrong} of {len(rows)} vectors are zero or not finite and have no direction;"
            " embed their texts again, or leave those rows out"
        )
    return unit


def gather(
    batches: Iterable[Batch],
    count: int,
    *,
    store: str,
    unit: str,
    label: str | None,
    generation: str,
) -> StoredRows:
    """Put the batches of a store into one array, allocated once.

    Args:
        batches: All rows of the store.
        count: How many rows the store says it has.
        store: What the store is called in errors.
        unit: Field that the units are from.
        label: Field that the labels are from; None reads no labels.
        generation: Name of this version of the rows.

    Raises:
        InvalidIndex: If a row has no vector, unit or label, the dimensions differ, or there
            are more or fewer rows than ``count``.
    """
    vectors = np.empty((0, 0), dtype=np.float32)
    units: list[str] = []
    labels: list[str] = []
    for some, owners, names in batches:
        block = _block(some, store, len(units))
        if not units:
            vectors = np.empty((count, block.shape[1]), dtype=np.float32)
        if block.shape[1] != vectors.shape[1]:
            raise InvalidIndex(
                f"{store} has vectors of {vectors.shape[1]} and of {block.shape[1]} dimensions;"
                " keep one embedding model in it"
            )
        end = len(units) + len(block)
        if end <= count:
            vectors[len(units) : end] = block
        if label is not None:
            labels += _names(names, label, store, len(units))
        units += _names(owners, unit, store, len(units))
    if len(units) != count:
        raise changed(store, f"{count} rows were counted and {len(units)} read")
    if not count:
        raise InvalidIndex(f"{store} has no rows")
    return StoredRows(vectors, units, None if label is None else labels, generation)


def changed(store: str, difference: str) -> InvalidIndex:
    """Return the error of a store that was written to while it was read."""
    return InvalidIndex(
        f"{store} changed while being read: {difference}; stop what writes to it and read again"
    )


def check_version(store: str, found: str, tested: Sequence[str]) -> None:
    """Refuse a version of a store that the reader has not been tested with.

    Args:
        store: Name of the store or its client.
        found: Its version, as it reports that.
        tested: Major versions that are known to return vectors as they were stored.

    Raises:
        UnsupportedStore: If the major version is another.

    >>> check_version("chromadb", "2.0.1", ["1"])
    Traceback (most recent call last):
    retrieval.errors.UnsupportedStore: chromadb 2.0.1 has not been tested, only ...
    """
    if found.removeprefix("v").split(".", maxsplit=1)[0] not in tested:
        raise UnsupportedStore(
            f"{store} {found} has not been tested, only major version {', '.join(tested)};"
            " install that, or give PrivateIndex the vectors and units yourself"
        )


def check_entries(count: int, **given: Sequence[str] | Mapping[int, str] | None) -> None:
    """Refuse sequences that do not have one entry for each of ``count`` rows."""
    for name, values in given.items():
        if values is not None and not isinstance(values, Mapping) and len(values) != count:
            raise InvalidIndex(
                f"the index has {count} rows and {name} has {len(values)} entries; give one for"
                " each row, or a mapping from ids"
            )


def installed(package: str, extra: str) -> str:
    """Return the version of an installed package.

    Raises:
        ImportError: If it is not installed; names the extra that installs it.

    >>> installed("no-such-store", "qdrant")
    Traceback (most recent call last):
    ImportError: no-such-store is missing; install it with: pip install 'epsledger[qdrant]'
    """
    try:
        return version(package)
    except PackageNotFoundError as error:
        raise ImportError(
            f"{package} is missing; install it with: pip install 'epsledger[{extra}]'"
        ) from error


def by_id(
    values: Sequence[str] | Mapping[int, str], ids: Sequence[int], field: str
) -> Iterator[str]:
    """Return the value of each id, for indexes that keep ids but no metadata.

    Raises:
        InvalidIndex: If an id has no value.
    """
    for id in ids:
        if id not in (values if isinstance(values, Mapping) else range(len(values))):
            raise InvalidIndex(f"id {id} of the index has no entry in {field}; add it")
        yield values[id]


def _block(vectors: Any, store: str, start: int) -> NDArray[np.float32]:
    try:
        block = np.asarray(vectors, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise InvalidIndex(
            f"rows of {store} from row {start} on have no vector, or vectors of different"
            f" dimensions; embed them again with one model: {error}"
        ) from error
    if block.ndim != 2:
        raise InvalidIndex(
            f"rows of {store} from row {start} on do not have one dense vector each,"
            f" but values of shape {block.shape[1:]}"
        )
    return block


def _names(values: Iterable[object], field: str, store: str, start: int) -> Iterator[str]:
    for row, value in enumerate(values, start):
        if isinstance(value, bool) or value == "" or not isinstance(value, str | Integral | UUID):
            raise InvalidIndex(
                f"row {row} of {store} has {value!r} in {field!r}: every row needs a text,"
                " a whole number or a UUID there"
            )
        yield str(value)
