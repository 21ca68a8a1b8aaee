"""How every question takes its course: check, pay, look at the corpus, draw, remember."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn, Self, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from accountant import Accountant, AccountantError
from accountant.accountant import Budgets
from dp import DPError, Event, NeighboringRelation
from retrieval.answers import Answer
from retrieval.errors import InvalidQuery, ReleaseFailed, RetrievalError
from retrieval.grid import checked_query, checked_threshold
from retrieval.index import Corpus, PrivateIndex, Retrieved
from retrieval.payments import Charges, Leases, Payments, Question, units_that_pay
from retrieval.planning import QueryPlan, plan_queries

_LOG = logging.getLogger(__name__)
_REMEMBERED = 1024
"""Most released answers that a guard keeps in memory, for equal questions."""
A = TypeVar("A", bound=Answer)
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Guarantee:
    """What holds for all that a guard ever returns, with all else that its budgets pay for.

    Attributes:
        epsilon: In nats; the largest, where the budgets of several datasets pay together.
        delta: Likewise.
        unit: The privacy unit.
        relation: Which datasets are neighbors.
        budgets: Names of the datasets' budgets, without quotas.
    """

    epsilon: float
    delta: float
    unit: str
    relation: NeighboringRelation
    budgets: tuple[str, ...]


class PaidQuestions:
    """What all releases of a guard share; :class:`RetrievalGuard` has the releases."""

    def __init__(
        self, accountant: Accountant, budget: Budgets, index: Corpus, *, unit: str
    ) -> None:
        self._charges = Charges(accountant, budget, unit)
        self._payments: Payments = self._charges
        self._index = index
        self._public = json.dumps([index.generation, index.dimensions, *_public(index)])
        self._released: OrderedDict[tuple[Event, bytes], bytes] = OrderedDict()
        self._lock = threading.Lock()

    def plan(
        self, queries: int, *, noise_multiplier: float | None = None, confidence: float = 0.95
    ) -> QueryPlan:
        """Say what so many votes or counts would come to; see :func:`plan_queries`.

        Spends nothing and reads nothing of the corpus.
        """
        return plan_queries(
            self._charges.accountant,
            self._charges.budget,
            queries,
            noise_multiplier=noise_multiplier,
            confidence=confidence,
            rivals=max(1, len(self._index.public_labels) - 1),
        )

    def guarantee(self) -> Guarantee:
        """Return what holds for everything this guard ever returns, as the ledger has it.

        Raises:
            AccountantError: If there is no such budget, or the ledger cannot be read.
        """
        read, charged = self._charges.accountant.budget, self._charges.budget
        names = (charged,) if isinstance(charged, str) else charged
        owners = sorted({budget.quota_of or budget.name for budget in map(read, names)})
        budgets = [read(name) for name in owners]
        return Guarantee(
            epsilon=max(budget.filter.epsilon for budget in budgets),
            delta=max(budget.filter.delta for budget in budgets),
            unit=budgets[0].unit,
            relation=budgets[0].filter.relation,
            budgets=tuple(owners),
        )

    # --- other ways to pay ------------------------------------------------------------------------

    @contextmanager
    def leased(self) -> Iterator[Self]:
        """Answer at a high rate: pay from blocks of uses that are marked in memory.

        What was not used is returned at the end. A crash, or an error that leaves the block,
        forfeits at most a block of each kind. Takes no keys.
        """
        with Leases(self._charges) as payments:
            yield self._paying(payments, self._released)

    @contextmanager
    def per_unit(self, path: str | Path, *, name: str, mu: float, queries: int) -> Iterator[Self]:
        """Let the units that a query is about pay for it, each from a budget of its own.

        Opening it is ONE charge to the budget: mu for every unit. After that queries cost the
        budget nothing; a unit that has paid as much as it may is left out of everything,
        silently, so that answers decay as units run out. Who has run out is private: it is in no
        entry, error or report, and neither is how many. Best where questions are spread over many
        topics.

        Closing the budget does not end it: it was charged, and ends with its cap.

        Under ``planned`` it takes mu squared of the Gaussian lane. Releases are those that are
        Gaussian DP: all but :meth:`RetrievalGuard.above_threshold`, which charges the budget.

        Args:
            path: Of the file that holds what units have spent. It is as private as the corpus:
                keep it with it, and never put an older copy in its place.
            name: Of the filter; the same name, mu and cap go on with it.
            mu: Gaussian-DP parameter that every unit is held to: room for (mu * noise)**2 votes or
                counts of a noise.
            queries: The most there may ever be; public. Put it where answers would still be good.

        Raises:
            BudgetExceeded: If the budget has no room for mu.
            InvalidRequest: If the file is missing, or is of another filter.
            AccountantError: As for ``Accountant.charge``.
        """
        names = self._own_index("per_unit").names
        payments = units_that_pay(
            self._charges, Path(path), names, name=name, mu=mu, queries=queries
        )
        with closing(payments):
            yield self._paying(payments, OrderedDict())  # what it answers is not what others do

    def _paying(
        self, payments: Payments, released: OrderedDict[tuple[Event, bytes], bytes]
    ) -> Self:
        guard = type(self).__new__(type(self))
        guard.__dict__ |= self.__dict__ | {"_payments": payments, "_released": released}
        return guard

    def __reduce__(self) -> NoReturn:
        raise RetrievalError("a guard belongs to the process that opened its ledger: no copies")

    # --- common parts -----------------------------------------------------------------------------

    def _checked(self, query: ArrayLike, threshold: float) -> tuple[NDArray[np.float32], float]:
        return checked_query(query, self._index.dimensions), checked_threshold(threshold)

    def _own_index(self, release: str) -> PrivateIndex:
        if not isinstance(self._index, PrivateIndex):
            raise InvalidQuery(f"{release} needs a PrivateIndex, not {type(self._index).__name__}")
        return self._index

    def _question(
        self,
        event: Event,
        release: str,
        vector: NDArray[np.float32],
        key: str | None,
        **public: object,
    ) -> Question:
        parameters = json.dumps([release, self._public, public], sort_keys=True)
        note = ", ".join(
            f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
            for name, value in public.items()
        )
        payload = hashlib.sha256(parameters.encode() + b"\x00" + vector.tobytes()).digest()
        return Question(event, f"retrieval/{release}", note, payload, key)

    def _answer(self, question: Question, kind: type[A], draw: Callable[[int], A]) -> A:
        """Pay and draw, unless an equal question has an answer. Whether it has is public."""
        asked = (question.event, question.payload)
        if question.key is None:
            with self._lock:
                known = self._released.get(asked)
                if known is not None:
                    self._released.move_to_end(asked)
            if known is not None:
                _LOG.debug("%s: replayed", question.activity)
                return kind.from_json(known)
        paid = self._payments.pay(question)
        if paid.answer is not None:
            return kind.from_json(paid.answer)
        answer = self._looked(question, lambda: draw(paid.seq))
        kept = answer.to_json()
        self._payments.keep(question, kept)
        with self._lock:
            self._released[asked] = kept
            if len(self._released) > _REMEMBERED:
                self._released.popitem(last=False)
        return answer

    def _looked(self, question: Question, look: Callable[[], T]) -> T:
        """Return what looking at the corpus gives. What else it raises may be private."""
        try:
            return look()
        except (AccountantError, DPError, RetrievalError):
            raise
        except Exception as error:  # noqa: BLE001 - a driver's message may quote rows
            kind = type(error).__name__
            _LOG.debug("%s failed", question.activity, exc_info=True)
        raise ReleaseFailed(
            f"{question.activity} was paid for and failed ({kind}); nothing is released, and the"
            " error is logged at level debug, for it may hold private data"
        )

    def _retrieved(
        self, vector: NDArray[np.float32], threshold: float, question: Question
    ) -> Retrieved:
        found = self._own_index(question.activity).retrieved(vector, threshold)
        admitted = self._payments.admitted(found.units, question)
        return found if admitted is None else found.cut(admitted)


def _public(index: Corpus) -> list[object]:
    """Return what is public of a corpus and decides what its answers mean, as JSON."""
    if not isinstance(index, PrivateIndex):
        return [index.public_labels]
    hashing = asdict(index.hashing) if index.hashing else None
    return [index.public_labels, index.public_terms, hashing]
