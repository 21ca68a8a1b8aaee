"""AboveThreshold: which queries find enough units, paid for once, answers of no for free."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import NoReturn

from numpy.typing import ArrayLike

from accountant.forks import process
from dp import SparseVector, sampling
from retrieval.errors import InvalidQuery, SessionEnded


class AboveThreshold:
    """A session that was paid for; get one from :meth:`RetrievalGuard.above_threshold`.

    One noisy bar for the whole session, and fresh noise for every count: discrete Laplace, drawn
    exactly. Only yes and no are released. Adding a unit moves no count down, which halves the noise
    of a query (Lyu, Su, Li 2017, Theorem 5). It belongs to one process and ends with it.

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
        self._lock, self._process = threading.Lock(), process()

    def ask(self, query: ArrayLike) -> bool:
        """Say whether about as many units as the bar are found.

        Args:
            query: Vector of shape (dimensions,) and L2 norm 1.

        Raises:
            InvalidQuery: If the query is malformed, or another process paid for the session; the
                corpus was not read.
            SessionEnded: If no answer of yes is left; the corpus was not read.
        """
        if process() != self._process:  # before the lock: a fork may have copied it taken
            raise InvalidQuery("another process paid for this session; pay for one in this process")
        self._check_left()
        noisy = self._count(query) + sampling.discrete_laplace(self._event.query_noise)
        with self._lock:
            self._check_left()  # others may have asked meanwhile
            found = noisy >= self._bar
            self.left -= found
            return found

    def _check_left(self) -> None:
        if not self.left:
            raise SessionEnded(
                "this session has said yes as often as was paid for; pay for another one with"
                " guard.above_threshold"
            )

    def __reduce__(self) -> NoReturn:
        raise InvalidQuery("a session says yes as often as was paid for: no copies")
