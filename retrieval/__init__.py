"""Guarded retrieval: answer questions about a private corpus, each charged before it is read."""

from retrieval.answers import Answer, Centroid, Count, Generation, Presence, Selection, Vote
from retrieval.ensembles import LanguageModel, Sampler
from retrieval.errors import (
    InvalidIndex,
    InvalidQuery,
    NoCorpusGuarantee,
    ReleaseFailed,
    RetrievalError,
    SessionEnded,
    UnsupportedStore,
)
from retrieval.guard import RetrievalGuard
from retrieval.hashing import Hashing
from retrieval.index import Corpus, PrivateIndex
from retrieval.obfuscation import ObfuscatedQuery, obfuscate_query
from retrieval.planning import QueryPlan, margin, plan_queries, winner_accuracy
from retrieval.questions import Guarantee
from retrieval.sessions import AboveThreshold

__all__ = [
    "AboveThreshold",
    "Answer",
    "Centroid",
    "Corpus",
    "Count",
    "Generation",
    "Guarantee",
    "Hashing",
    "InvalidIndex",
    "InvalidQuery",
    "LanguageModel",
    "NoCorpusGuarantee",
    "ObfuscatedQuery",
    "Presence",
    "PrivateIndex",
    "QueryPlan",
    "ReleaseFailed",
    "RetrievalError",
    "RetrievalGuard",
    "Sampler",
    "Selection",
    "SessionEnded",
    "UnsupportedStore",
    "Vote",
    "margin",
    "obfuscate_query",
    "plan_queries",
    "winner_accuracy",
]
