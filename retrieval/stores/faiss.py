"""Rows of a FAISS index, which keeps vectors and ids but no metadata.

Only indexes that hold the vectors themselves are read. Product and scalar quantizers return
approximations that were fitted to all rows, so that one row's bits depend on the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from retrieval.errors import UnsupportedStore
from retrieval.stores.rows import BATCH, StoredRows, by_id, check_entries, check_version, gather

if TYPE_CHECKING:
    import faiss

TESTED = ("1",)
"""Major versions of faiss."""
_FLAT = ("IndexFlat", "IndexFlatIP", "IndexFlatL2")


def read(
    index: faiss.Index,
    *,
    units: Sequence[str] | Mapping[int, str],
    labels: Sequence[str] | Mapping[int, str] | None = None,
    generation: str = "1",
) -> StoredRows:
    """Read all rows of a FAISS index.

    Args:
        index: An ``IndexFlat``, ``IndexFlatIP``, ``IndexFlatL2``, ``IndexHNSWFlat`` or
            ``IndexIVFFlat``, the first three also within an ``IndexIDMap``.
        units: The privacy unit of each id; the ids of an index without its own are positions.
            A sequence must have as many entries as the index has rows.
        labels: The label of each id, likewise.
        generation: Public name of this version of the rows.

    Raises:
        UnsupportedStore: If the index does not keep the vectors, or FAISS has another version.
        InvalidIndex: If an id has no unit, or no label where labels are given.

    >>> import faiss, numpy
    >>> index = faiss.IndexFlatIP(2)
    >>> index.add(numpy.eye(2, dtype=numpy.float32))
    >>> rows = read(index, units=["ann", "bob"])
    >>> rows.units, rows.vectors.tolist()
    (['ann', 'bob'], [[1.0, 0.0], [0.0, 1.0]])
    """
    import faiss

    check_version("faiss", faiss.__version__, TESTED)
    check_entries(index.ntotal, units=units, labels=labels)
    return gather(
        (
            (
                vectors,
                by_id(units, ids, "units"),
                by_id({} if labels is None else labels, ids, "labels"),
            )
            for vectors, ids in _rows(faiss.downcast_index(index))
        ),
        index.ntotal,
        store="the index",
        unit="units",
        label=None if labels is None else "labels",
        generation=generation,
    )


def _rows(index: Any) -> Iterator[tuple[Any, list[int]]]:
    """Return the vectors of some rows and their ids, until all have been returned."""
    import faiss

    kind = type(index).__name__
    if kind in _FLAT:
        for start in range(0, index.ntotal, BATCH):
            size = min(BATCH, index.ntotal - start)
            yield index.reconstruct_n(start, size), list(range(start, start + size))
    elif kind == "IndexHNSWFlat":
        yield from _rows(faiss.downcast_index(index.storage))
    elif kind in {"IndexIDMap", "IndexIDMap2"}:
        inner = faiss.downcast_index(index.index)
        if type(inner).__name__ not in _FLAT:
            raise _refused(f"{kind} over {type(inner).__name__}")
        ids = faiss.vector_to_array(index.id_map).tolist()
        for vectors, places in _rows(inner):
            yield vectors, [ids[place] for place in places]
    elif kind == "IndexIVFFlat":
        # From the lists, and not by reconstruct_n: with ids that are not 0, 1, 2, ... that
        # leaves rows of its result unset.
        for cell in range(index.nlist):
            if size := index.invlists.list_size(cell):
                codes = index.invlists.get_codes(cell)
                vectors = faiss.rev_swig_ptr(codes, size * index.code_size).view(np.float32)
                ids = faiss.rev_swig_ptr(index.invlists.get_ids(cell), size)
                yield vectors.reshape(size, index.d), ids.tolist()
    else:
        raise _refused(kind)


def _refused(kind: str) -> UnsupportedStore:
    return UnsupportedStore(
        f"{kind} does not return vectors as they were added; give an IndexFlat, IndexHNSWFlat or"
        " IndexIVFFlat on the CPU, or give PrivateIndex the vectors that the index was built from"
    )
