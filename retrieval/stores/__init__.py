"""Readers of vector stores: they take all rows out, and never ask the store to search.

An approximate search changes which rows it finds when another row is removed, so no guarantee
holds for its results. Each reader here returns the stored vectors, and the exact index is
built from those::

    from retrieval.stores import chroma

    rows = chroma.read(collection, unit="patient_id", label="topic")
    PrivateIndex(rows.vectors, units=rows.units, labels=rows.labels, public_labels=[...],
                 generation=rows.generation)

There is one module per store: ``chroma``, ``faiss``, ``hnswlib``, ``lancedb``, ``pgvector``,
``qdrant`` and ``sqlite_vec``. Each is given the store's own object.
"""

from retrieval.errors import UnsupportedStore
from retrieval.stores.rows import StoredRows, normalized

__all__ = ["StoredRows", "UnsupportedStore", "normalized"]
