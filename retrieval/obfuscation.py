"""Noise on the query: protects who asks, from whoever runs the index. The corpus: not at all."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from accountant import Accountant
from accountant.accountant import Budgets
from dp import Gaussian, NeighboringRelation, sampling
from retrieval.grid import STEPS, checked_query


@dataclass(frozen=True, slots=True)
class ObfuscatedQuery:
    """A query with noise on it.

    Attributes:
        vector: Its coordinates; not of norm 1. Searching with it is post-processing.
        seq: The ledger entry that paid for it.
        protects: Who is protected.
        corpus_guarantee: What it promises about the documents that are found: nothing.
    """

    vector: tuple[float, ...]
    seq: int
    protects: str = "asker"
    corpus_guarantee: None = None


def obfuscate_query(
    accountant: Accountant, budget: Budgets, query: ArrayLike, *, noise_multiplier: float
) -> ObfuscatedQuery:
    """Add Gaussian noise to a query before it is sent to an index that others run.

    The unit is one query, and the relation is replacing it by any other: vectors of norm 1 are at
    most 2 apart, so the noise has standard deviation 2 * noise_multiplier in each coordinate. At a
    noise that leaves useful results, epsilon is in the hundreds (README, "Figures"); and what is
    found with it, texts or names, has no guarantee for the corpus at any noise.

    Args:
        accountant: Of the asker's ledger.
        budget: The asker's budget, with unit ``query`` and relation replace_one.
        query: Vector of shape (dimensions,) and L2 norm 1.
        noise_multiplier: Standard deviation of the noise over 2.

    Raises:
        InvalidQuery: If the query is malformed; nothing was charged.
        AccountantError: As for ``Accountant.charge``.

    >>> from dp import adaptive
    >>> with Accountant.open("memory:") as books:
    ...     limits = adaptive(8.0, 1e-6, relation=NeighboringRelation.REPLACE_ONE)
    ...     _ = books.create_budget("me", limits, unit="query")
    ...     obfuscate_query(books, "me", [0.6, 0.8], noise_multiplier=1.0).protects
    'asker'
    """
    vector = checked_query(query)
    event = Gaussian(noise_multiplier)
    receipt = accountant.charge(
        budget,
        event,
        unit="query",
        relation=NeighboringRelation.REPLACE_ONE,
        activity="retrieval/obfuscate_query",
    )
    noise = sampling.gaussian(len(vector), 2 * event.noise_multiplier * STEPS)
    steps = np.rint(vector.astype(np.float64) * STEPS + noise)
    return ObfuscatedQuery(tuple((steps / STEPS).tolist()), receipt.seq)
