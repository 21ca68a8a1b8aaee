"""Points of a Qdrant collection, local or on a server.

A quantized collection keeps the original vectors beside the quantized ones and returns the
originals, so it can be read. The data types ``turbo*`` keep no originals: they are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from retrieval.errors import InvalidIndex, UnsupportedStore
from retrieval.stores.rows import (
    BATCH,
    Batch,
    StoredRows,
    changed,
    check_version,
    gather,
    installed,
)

if TYPE_CHECKING:
    from qdrant_client import QdrantClient

TESTED = ("1",)
"""Major versions of the client and the server."""
_EACH_ON_ITS_OWN = {None, "float32", "float16", "uint8"}
"""Data types in which a stored vector depends on that vector alone."""


def read(
    client: QdrantClient,
    collection: str,
    *,
    unit: str,
    label: str | None = None,
    vector: str = "",
    generation: str = "1",
) -> StoredRows:
    """Read all points of a collection.

    With the distance ``Cosine`` Qdrant has normalized the vectors, and returns those. A point
    that is updated under the same id while it is read is not noticed: stop the writers.

    Args:
        client: A ``QdrantClient``.
        collection: Name of the collection.
        unit: Key of the payload that holds the privacy unit; not a path.
        label: Key of the payload that holds the label.
        vector: Name of the vector, where points have several.
        generation: Public name of this version of the points.

    Raises:
        UnsupportedStore: If the client or server has another version, or the vectors are kept
            in a data type that loses them.
        InvalidIndex: If the collection has no such vector, a point has no dense vector, unit
            or label, or points were added or deleted meanwhile.

    >>> from qdrant_client import QdrantClient, models
    >>> client = QdrantClient(":memory:")
    >>> _ = client.create_collection(
    ...     "notes", models.VectorParams(size=2, distance=models.Distance.COSINE))
    >>> _ = client.upsert(
    ...     "notes", [models.PointStruct(id=1, vector=[0, 1], payload={"patient": "ann"})])
    >>> read(client, "notes", unit="patient").units
    ['ann']
    """
    check_version("qdrant-client", installed("qdrant-client", "qdrant"), TESTED)
    check_version("the Qdrant server", client.info().version, TESTED)
    store = f"the collection {collection!r}"
    kinds = client.get_collection(collection).config.params.vectors or {}
    kind = (kinds if isinstance(kinds, dict) else {"": kinds}).get(vector)
    if kind is None:
        raise InvalidIndex(f"{store} has no dense vector named {vector!r}; name one with vector=")
    if kind.datatype not in _EACH_ON_ITS_OWN:
        raise UnsupportedStore(
            f"{store} keeps its vectors as {kind.datatype.value}, which loses them; give"
            " PrivateIndex the vectors that it was built from"
        )
    ids = _ids(client, collection)
    rows = gather(
        _batches(client, collection, vector, unit, label or unit),
        len(ids),
        store=store,
        unit=unit,
        label=label,
        generation=generation,
    )
    if _ids(client, collection) != ids:
        raise changed(store, "it has other ids after than before")
    return rows


def _ids(client: QdrantClient, collection: str) -> list[object]:
    pages = _pages(client, collection, with_payload=False, with_vectors=False)
    return [point.id for points in pages for point in points]


def _batches(
    client: QdrantClient, collection: str, vector: str, unit: str, label: str
) -> Iterator[Batch]:
    vectors = [vector] if vector else True
    for points in _pages(client, collection, with_payload=[unit, label], with_vectors=vectors):
        payloads = [point.payload or {} for point in points]
        yield (
            [p.vector.get(vector) if isinstance(p.vector, dict) else p.vector for p in points],
            [payload.get(unit) for payload in payloads],
            [payload.get(label) for payload in payloads],
        )


def _pages(client: QdrantClient, collection: str, **what: Any) -> Iterator[list[Any]]:
    points, offset = client.scroll(collection, limit=BATCH, **what)
    while points:
        yield points
        if offset is None:
            return
        points, offset = client.scroll(collection, limit=BATCH, offset=offset, **what)
