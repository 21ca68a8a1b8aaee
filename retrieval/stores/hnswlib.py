"""Rows of an hnswlib index, which keeps vectors and integer ids but no metadata."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from retrieval.errors import InvalidIndex, UnsupportedStore
from retrieval.stores.rows import (
    BATCH,
    Batch,
    StoredRows,
    by_id,
    check_entries,
    check_version,
    gather,
    installed,
)

if TYPE_CHECKING:
    import hnswlib

TESTED = ("0",)
"""Major versions of hnswlib."""


def read(
    index: hnswlib.Index,
    *,
    units: Sequence[str] | Mapping[int, str],
    labels: Sequence[str] | Mapping[int, str] | None = None,
    generation: str = "1",
) -> StoredRows:
    """Read all rows of an hnswlib index.

    In the space ``cosine`` hnswlib has normalized the vectors, and returns those.

    Args:
        index: An ``hnswlib.Index`` without deleted items. A ``BFIndex`` cannot return vectors.
        units: The privacy unit of each id (hnswlib calls ids labels). A sequence must have as
            many entries as the index has rows.
        labels: The label of each id, likewise.
        generation: Public name of this version of the rows.

    Raises:
        UnsupportedStore: If hnswlib has another version, or the index cannot return vectors.
        InvalidIndex: If an id has no unit or label, or an item was marked as deleted.

    >>> import hnswlib, numpy
    >>> index = hnswlib.Index("ip", 2)
    >>> index.init_index(2)
    >>> index.add_items(numpy.eye(2), [10, 20])
    >>> rows = read(index, units={10: "ann", 20: "bob"})
    >>> sorted(zip(rows.units, rows.vectors.tolist()))
    [('ann', [1.0, 0.0]), ('bob', [0.0, 1.0])]
    """
    check_version("hnswlib", installed("hnswlib", "hnswlib"), TESTED)
    if not hasattr(index, "get_items"):
        raise UnsupportedStore(
            f"{type(index).__name__} of hnswlib cannot return its vectors; give PrivateIndex the"
            " vectors that it was built from"
        )
    check_entries(index.element_count, units=units, labels=labels)
    return gather(
        _batches(index, units, labels),
        index.element_count,
        store="the index",
        unit="units",
        label=None if labels is None else "labels",
        generation=generation,
    )


def _batches(
    index: hnswlib.Index,
    units: Sequence[str] | Mapping[int, str],
    labels: Sequence[str] | Mapping[int, str] | None,
) -> Iterator[Batch]:
    ids = sorted(index.get_ids_list())
    for start in range(0, len(ids), BATCH):
        some = ids[start : start + BATCH]
        try:
            vectors = index.get_items(some)
        except RuntimeError as error:
            raise InvalidIndex(
                f"the index has items that were marked as deleted: {error}; build it anew without"
            ) from error
        yield vectors, by_id(units, some, "units"), by_id(labels or {}, some, "labels")
