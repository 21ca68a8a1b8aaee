"""Records of a Chroma collection."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from retrieval.stores.rows import BATCH, Batch, StoredRows, changed, check_version, gather

if TYPE_CHECKING:
    from chromadb import Collection

TESTED = ("1",)
"""Major versions of chromadb."""


def read(
    collection: Collection, *, unit: str, label: str | None = None, generation: str = "1"
) -> StoredRows:
    """Read all records of a collection.

    In the space ``cosine`` Chroma keeps vectors normalized and multiplies them by their norms
    again, so that they differ from those added in the last bits. A record that is updated
    under the same id while it is read is not noticed: stop the writers.

    Args:
        collection: A collection of a local, embedded or remote client.
        unit: Key of the metadata that holds the privacy unit.
        label: Key of the metadata that holds the label.
        generation: Public name of this version of the records.

    Raises:
        UnsupportedStore: If chromadb has another version.
        InvalidIndex: If a record has no vector, unit or label, or records were added or deleted
            meanwhile.

    >>> import chromadb
    >>> collection = chromadb.EphemeralClient().create_collection(
    ...     "notes", embedding_function=None)
    >>> collection.add(["1"], embeddings=[[0, 1]], metadatas=[{"patient": "ann"}])
    >>> read(collection, unit="patient").units
    ['ann']
    """
    import chromadb

    check_version("chromadb", chromadb.__version__, TESTED)
    store = f"the collection {collection.name!r}"
    ids = _ids(collection)
    rows = gather(
        _batches(collection, ids, unit, label or unit),
        len(ids),
        store=store,
        unit=unit,
        label=label,
        generation=generation,
    )
    if _ids(collection) != ids:
        raise changed(store, "it has other ids after than before")
    return rows


def _ids(collection: Collection) -> list[str]:
    pages = (
        collection.get(include=[], limit=BATCH, offset=start)["ids"]
        for start in range(0, collection.count(), BATCH)
    )
    return [id for page in pages for id in page]


def _batches(collection: Collection, ids: list[str], unit: str, label: str) -> Iterator[Batch]:
    for start in range(0, len(ids), BATCH):
        some = collection.get(ids[start : start + BATCH], include=["embeddings", "metadatas"])
        metadata = [record or {} for record in some["metadatas"] or []]
        yield (
            some["embeddings"],
            [record.get(unit) for record in metadata],
            [record.get(label) for record in metadata],
        )
