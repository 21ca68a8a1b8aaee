"""Guarded retrieval: answer questions about a private corpus, each charged before it is read."""

from retrieval.errors import InvalidIndex, InvalidQuery, RetrievalError
from retrieval.guard import RetrievalGuard, Vote
from retrieval.index import PrivateIndex

__all__ = [
    "InvalidIndex",
    "InvalidQuery",
    "PrivateIndex",
    "RetrievalError",
    "RetrievalGuard",
    "Vote",
]
