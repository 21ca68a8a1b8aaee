"""Counting inside a database: only the counts leave it, to be noised. For corpora beyond memory.

The engine computes each row's exact score, keeps the units with a row at or above the threshold,
and counts them by label::

    from retrieval.pushdown import DuckDBCorpus, duckdb

    duckdb.write(connection, "notes", batches, vector="embedding", unit="patient", label="topic")
    corpus = DuckDBCorpus(connection, "notes", vector="embedding", unit="patient", label="topic",
                          public_labels=[...], generation="2025-06")
    guard = RetrievalGuard(accountant, "notes", corpus, unit="patient")

Such a guard has the releases that are made of counts: ``vote``, ``count``, ``anything`` and
``above_threshold``. The counts are those of a :class:`~retrieval.PrivateIndex` of the same rows,
because scores on the grid are exact in any order (:mod:`retrieval.grid`). No approximate index is
asked, also where there is one. Counts of several tables, on several machines, add up in
:class:`Shards`.

What the owner sees to:

- Rows do not change under a corpus. Changed rows are opened again, under a new ``generation``:
  remembered answers are those of a generation, and the checks are made when it is opened.
- No time-outs whose firing the asker can see. How long a query takes depends on private rows, and
  so does whether it takes too long. An error of the engine comes after payment: a
  ``ReleaseFailed`` that says nothing of it.
"""

from retrieval.pushdown.duckdb import DuckDBCorpus
from retrieval.pushdown.pgvector import PgvectorCorpus
from retrieval.pushdown.shards import Shard, Shards

__all__ = ["DuckDBCorpus", "PgvectorCorpus", "Shard", "Shards"]
