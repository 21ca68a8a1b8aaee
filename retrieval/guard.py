"""The guard of a query path: charge, then score, then noise, then release.

What it never returns: texts, identifiers, scores or ranks of private rows. Noise on the query,
or on scores, followed by raw results has no corpus privacy at any noise level: whatever comes
out verbatim was in the corpus.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from accountant import Accountant
from dp import Gaussian, sampling
from retrieval.errors import InvalidQuery
from retrieval.index import PrivateIndex, checked_query

_MOST_NOISE = 1e15  # counts are released as 64-bit integers


@dataclass(frozen=True, slots=True)
class Vote:
    """A released answer. Anything computed from it is free (post-processing).

    Attributes:
        winner: The label with the largest noisy count.
        counts: Noisy number of voting units by public label; may be negative.
        margin: Between the largest two noisy counts. With noise of standard deviation s, the
            winner of two is right with 95 % where the true margin is at least 2.33 s.
        seq: The ledger entry that paid for it.
    """

    winner: str
    counts: dict[str, int]
    margin: int
    seq: int


class RetrievalGuard:
    """Answers queries about a private corpus, each paid for before the corpus is read.

    Guarantee: everything it ever returns, together with whatever else is charged to the same
    budget, is (epsilon, delta)-DP under adding or removing one unit of the index. The queries,
    the embedding model, the threshold and the list of labels are taken as public. It does not
    protect the query, nor anything from whoever runs the index.

    Args:
        accountant: Of the ledger.
        budget: Name of the budget.
        index: The private corpus.
        unit: The privacy unit that the index is grouped by; it must be the budget's.
    """

    def __init__(
        self, accountant: Accountant, budget: str, index: PrivateIndex, *, unit: str
    ) -> None:
        self._accountant, self._budget, self._index, self._unit = accountant, budget, index, unit

    def vote(
        self,
        query: ArrayLike,
        *,
        threshold: float,
        noise_multiplier: float,
        key: str | None = None,
    ) -> Vote:
        """Let every unit that scores at least ``threshold`` vote for its label; add noise.

        Each unit votes at most once, so the histogram has L2 sensitivity 1 under add/remove, and
        one Gaussian release pays for all of it. The noisy counts are rounded to integers, which
        is post-processing.

        Args:
            query: Vector of shape (dimensions,) and L2 norm 1.
            threshold: Cosine similarity in [-1, 1]; fixed without looking at the corpus.
            noise_multiplier: Standard deviation of the noise, in votes.
            key: Idempotency key: the same key and query return the same answer, uncharged.

        Raises:
            InvalidQuery: If the query is malformed; nothing was charged.
            BudgetExceeded: If it does not fit; the corpus was not read.
            AccountantError: As for ``Accountant.charge``.
        """
        vector = checked_query(query, self._index.dimensions)
        if not isinstance(threshold, int | float) or not -1.0 <= threshold <= 1.0:
            raise InvalidQuery(f"threshold must be a cosine in [-1, 1], got {threshold!r}")
        event = Gaussian(noise_multiplier)
        if event.noise_multiplier > _MOST_NOISE:
            raise InvalidQuery(f"noise_multiplier must be at most {_MOST_NOISE:g} votes")
        receipt = self._accountant.charge(
            self._budget,
            event,
            unit=self._unit,
            activity="retrieval/vote",
            note=f"threshold={threshold:g}",
            key=key,
            payload=self._payload(vector, threshold),
        )
        if receipt.answer is not None:
            return Vote(**json.loads(receipt.answer))
        votes = self._index.histogram(vector, threshold)
        noise = sampling.gaussian(len(votes), event.noise_multiplier)
        answer = self._release(np.rint(votes + noise).astype(np.int64), receipt.seq)
        if key is not None:
            self._accountant.keep_answer(self._budget, key, json.dumps(asdict(answer)).encode())
        return answer

    def _payload(self, vector: NDArray[np.float32], threshold: float) -> bytes:
        parts = (self._index.generation.encode(), repr(float(threshold)).encode(), vector.tobytes())
        return hashlib.sha256(b"\x00".join(parts)).digest()

    def _release(self, counts: NDArray[np.int64], seq: int) -> Vote:
        noisy = dict(zip(self._index.public_labels, map(int, counts), strict=True))
        ranked = sorted(noisy.values(), reverse=True)
        margin = ranked[0] - ranked[1] if len(ranked) > 1 else ranked[0]
        return Vote(max(noisy, key=lambda label: noisy[label]), noisy, margin, seq)
