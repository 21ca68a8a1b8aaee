"""Errors of guarded retrieval.

::

    RetrievalError
    ├── InvalidIndex        vectors, units or labels that no guarantee can be given for
    ├── InvalidQuery        a query that cannot be answered as asked; nothing was charged
    ├── NoCorpusGuarantee   a read of private rows as they are, without a stated reason
    ├── ReleaseFailed       the corpus could not be read; it was paid for, nothing is released
    ├── SessionEnded        a session has given all the answers that were paid for
    └── UnsupportedStore    a vector store whose rows cannot be read as they were stored
"""

from __future__ import annotations

from dp.errors import FactualError


class RetrievalError(FactualError):
    """Base class of every error raised by :mod:`retrieval`."""


class InvalidIndex(RetrievalError, ValueError):
    """The index cannot be built: what is wrong is named, for the owner of the data only."""


class InvalidQuery(RetrievalError, ValueError):
    """The query is malformed. Decided from the query alone; nothing was charged."""


class NoCorpusGuarantee(RetrievalError):
    """Rows as they are have no guarantee at any noise level. Nothing was read."""


class ReleaseFailed(RetrievalError):
    """Something failed between payment and release. What it was may be private: see the log."""


class SessionEnded(RetrievalError):
    """No answer of yes is left of a session. Public: it depends on released answers alone."""


class UnsupportedStore(RetrievalError, ValueError):
    """The store's version is not tested, or its kind of index does not keep the vectors."""
