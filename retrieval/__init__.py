"""Guarded retrieval: answer questions about a private corpus, each charged before it is read."""

from retrieval.answers import Centroid, Count, Generation, Presence, Selection, Vote
from retrieval.errors import InvalidIndex, InvalidQuery, NoCorpusGuarantee, RetrievalError
from retrieval.guard import RetrievalGuard
from retrieval.hashing import Hashing
from retrieval.index import Corpus, PrivateIndex
from retrieval.sessions import AboveThreshold

__all__ = [
    "AboveThreshold",
    "Centroid",
    "Corpus",
    "Count",
    "Generation",
    "Hashing",
    "InvalidIndex",
    "InvalidQuery",
    "NoCorpusGuarantee",
    "Presence",
    "PrivateIndex",
    "RetrievalError",
    "RetrievalGuard",
    "Selection",
    "Vote",
]
