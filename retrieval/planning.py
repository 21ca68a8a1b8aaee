"""Planning before the first query: noise, how many queries fit, how much support answers need.

Nothing here reads the corpus or spends budget. Margins that go in must be public: of a public
corpus, of made-up rows, or from answers that were paid for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.polynomial.hermite_e import hermegauss
from scipy.optimize import brentq
from scipy.special import ndtr

from accountant import Reader
from accountant.accountant import Budgets
from dp import Gaussian, validate
from retrieval.errors import InvalidQuery

SHARES = (1.0, 0.9, 0.8, 0.7, 0.6)
"""Shares of the best two labels that the winner has, for :meth:`QueryPlan.support`."""
_NODES, _WEIGHTS = hermegauss(80)


@dataclass(frozen=True, slots=True)
class QueryPlan:
    """What a number of votes or counts would come to.

    Attributes:
        queries: How many.
        noise_multiplier: Standard deviation of the noise, in votes.
        fit: How many would fit now.
        share: Used share of the limits after them, or None if they do not fit.
        confidence: With which the figures below hold.
        margin: Lead over its rivals from which the winner is right.
        count_error: A count is off by at most so many units.
        bar: From which number of units :meth:`RetrievalGuard.anything` says yes where there is
            nothing in at most one of a thousand answers; it is found where there is twice as much.
    """

    queries: int
    noise_multiplier: float
    fit: int
    share: float | None
    confidence: float
    margin: float
    count_error: float
    bar: int

    def support(self) -> dict[float, int]:
        """Return how many units must vote for the winner and its rival, by the winner's share.

        >>> from dp import adaptive
        >>> from accountant import Accountant
        >>> with Accountant.open("memory:") as books:
        ...     _ = books.create_budget("news", adaptive(3.0, 1e-6), unit="article")
        ...     plan_queries(books, "news", 100, noise_multiplier=16.0).support()
        {1.0: 38, 0.9: 47, 0.8: 63, 0.7: 94, 0.6: 187}
        """
        return {share: math.ceil(self.margin / (2 * share - 1) - 1e-9) for share in SHARES}


def plan_queries(
    reader: Reader,
    budget: Budgets,
    queries: int,
    *,
    noise_multiplier: float | None = None,
    confidence: float = 0.95,
    rivals: int = 1,
) -> QueryPlan:
    """Say what so many votes or counts would come to; spends nothing.

    Args:
        reader: Of the ledger.
        budget: Name of the budget, or several that would be charged together.
        queries: How many.
        noise_multiplier: Standard deviation of the noise; if None, the least with which they fit.
        confidence: Of the margin and the count's error.
        rivals: So many labels may have as many votes as the second.

    Raises:
        NothingFits: If no noise is enough.
        InvalidQuery: If the confidence is not between 0.5 and 1.
    """
    uses = validate.count(queries=queries)
    if not 0.5 < confidence < 1:
        raise InvalidQuery(f"confidence must be between 0.5 and 1, got {confidence!r}")
    names = [budget] if isinstance(budget, str) else list(budget)
    if noise_multiplier is None:
        noise_multiplier = max(reader.smallest_noise(name, Gaussian, uses=uses) for name in names)
    event = Gaussian(noise_multiplier)
    fit = min(reader.uses_that_fit(name, event) for name in names)
    shares = [reader.share_after(name, [(event, uses)]) for name in names]
    sigma = event.noise_multiplier
    return QueryPlan(
        uses,
        sigma,
        fit,
        None if None in shares else max(share for share in shares if share is not None),
        confidence,
        margin(sigma, confidence=confidence, rivals=rivals),
        -_quantile((1 - confidence) / 2) * sigma,
        math.ceil(-_quantile(1e-3) * sigma),
    )


def margin(noise_multiplier: float, *, confidence: float = 0.95, rivals: int = 1) -> float:
    """Return the lead over each of its rivals from which the winner is right, in votes.

    Args:
        noise_multiplier: Standard deviation of the noise, in votes.
        confidence: Probability that the winner is right.
        rivals: So many labels with equally many votes.

    >>> round(margin(10.0), 1)
    23.3
    """
    low, high = -40.0, 80.0  # standard deviations
    lead = brentq(lambda lead: _winner(lead, rivals) - confidence, low, high, xtol=1e-9)
    return float(lead) * noise_multiplier


def winner_accuracy(margins: Sequence[float], *, noise_multiplier: float, rivals: int = 1) -> float:
    """Return how often the noisy winner is the true one, expected over questions.

    Args:
        margins: The lead of each question's winner over the next label, in votes; public.
        noise_multiplier: Standard deviation of the noise, in votes.
        rivals: How many labels are as close as the next one; the more, the lower the figure.

    >>> round(winner_accuracy([0.0, 1e6], noise_multiplier=10.0), 6)
    0.75
    """
    leads = np.asarray(margins, np.float64) / noise_multiplier
    return float(np.mean([_winner(lead, rivals) for lead in leads]))


def _winner(lead: float, rivals: int) -> float:
    """Return the probability that a normal variate plus the lead is above all of its rivals'."""
    return float(_WEIGHTS @ ndtr(lead + _NODES) ** rivals / _WEIGHTS.sum())


def _quantile(probability: float) -> float:
    return float(brentq(lambda x: ndtr(x) - probability, -40.0, 40.0, xtol=1e-12))
