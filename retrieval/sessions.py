"""AboveThreshold: which queries find enough units, paid for once, answers of no for free."""

from __future__ import annotations

import threading
from collections.abc import Callable

from numpy.typing import ArrayLike

from dp import SparseVector, sampling
from retrieval.errors import InvalidQuery


class AboveThreshold:
    """A session that was paid for; get one from :meth:`RetrievalGuard.above_threshold`.

    One noisy bar for the whole session, and fresh noise for every count: discrete Laplace, drawn
    exactly. Only yes and no are released. Adding a unit moves all counts up or none, which halves
    the noise of a query (Lyu, Su, Li 2017, Theorem 5). It belongs to one process and ends with it.

    Attributes:
        seq: The ledger entry that paid for it.
        left: How many answers of yes are left.
    """

    def __init__(
        self, seq: int, event: SparseVector, bar: int, count: Callable[[ArrayLike], int]
    ) -> None:
        self.seq, self.left = seq, event.positives
        self._event, self._count = event, count
        self._bar = bar + sampling.discrete_laplace(event.threshold_noise)
        self._lock = threading.Lock()

    def ask(self, query: ArrayLike) -> bool:
        """Say whether about as many units as the bar are found.

        Args:
            query: Vector of shape (dimensions,) and L2 norm 1.

        Raises:
            InvalidQuery: If the query is malformed, or no answer of yes is left; the corpus was
                not read.
        """
        with self._lock:
            if not self.left:
                raise InvalidQuery("this session has said yes as often as was paid for")
            noisy = self._count(query) + sampling.discrete_laplace(self._event.query_noise)
            found = noisy >= self._bar
            self.left -= found
            return found
