"""How an answer is paid for: by a charge of its own, from a lease, or by the units it is about.

A guard pays before it looks at the corpus. All three are durable before anything is released.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from accountant import (
    Accountant,
    InvalidRequest,
    KeyReused,
    Lease,
    ReleaseUnknown,
    ReservationError,
)
from accountant.accountant import Budgets
from accountant.errors import QueriesExhausted
from accountant.stores.lane_state import LARGEST
from accountant.stores.unit_lanes import UnitLanes
from dp import Event, InvalidParameter, PerUnitFilter
from dp.filters import unit_limit, unit_price
from retrieval.columns import Positions
from retrieval.errors import InvalidQuery


@dataclass(frozen=True, slots=True)
class Question:
    """What is paid for.

    Attributes:
        event: What will run.
        activity: What it is for.
        note: Public parameters, for the ledger.
        payload: Digest of everything that the answer depends on besides the event.
        key: Idempotency key, or None.
    """

    event: Event
    activity: str
    note: str
    payload: bytes
    key: str | None = None


@dataclass(frozen=True, slots=True)
class Paid:
    """Proof of payment: the entry, and the answer kept for the question's key, if there is one."""

    seq: int
    answer: bytes | None = None


Marks = tuple[int, Callable[[], object]]
"""The ledger entry that reserved uses, and what marks one of them."""


class Payments(Protocol):
    """A way to pay."""

    def pay(self, question: Question) -> Paid:
        """Pay, or raise before the corpus is looked at."""

    def many(self, question: Question, uses: int) -> AbstractContextManager[Marks]:
        """Put uses aside, or raise; give the entry, and what pays for one of them."""

    def keep(self, question: Question, answer: bytes) -> None:
        """Keep the released answer for a retry, if the question has a key."""

    def admitted(self, units: Positions, question: Question) -> NDArray[np.bool_] | None:
        """Return which of the units take part, None for all; durable before it returns."""


class Charges:
    """Each answer is charged by itself, about half a millisecond each."""

    def __init__(self, accountant: Accountant, budget: Budgets, unit: str) -> None:
        self.accountant, self.budget, self.unit = accountant, budget, unit

    def pay(self, question: Question) -> Paid:
        """Charge the budget."""
        receipt = self.accountant.charge(
            self.budget,
            question.event,
            unit=self.unit,
            activity=question.activity,
            note=question.note,
            key=question.key,
            payload=question.payload,
        )
        return Paid(receipt.seq, receipt.answer)

    @contextmanager
    def many(self, question: Question, uses: int) -> Iterator[Marks]:
        """Reserve; what was not marked is returned."""
        with self.accountant.reserve(
            self.budget,
            question.event,
            uses=uses,
            unit=self.unit,
            activity=question.activity,
            note=question.note,
        ) as reservation:
            yield reservation.receipt.seq, reservation.mark

    def keep(self, question: Question, answer: bytes) -> None:
        """Keep it in the ledger."""
        if question.key is not None:
            self.accountant.keep_answer(self.budget, question.key, answer)

    def admitted(self, units: Positions, question: Question) -> None:
        """All of them."""


class Leases:
    """Answers are paid for from blocks of uses, about a microsecond each; a crash loses a block."""

    def __init__(self, charges: Charges) -> None:
        self._charges, self._open = charges, ExitStack()
        self._leases: dict[tuple[Event, str], Lease] = {}
        self._lock = threading.Lock()
        self._ended = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Return the uses that were never marked; after an error they stay spent."""
        with self._lock:
            self._ended = True
        self._open.__exit__(kind, error, traceback)

    def pay(self, question: Question) -> Paid:
        """Mark one use."""
        if question.key is not None:
            raise InvalidQuery("a lease takes no keys: ask the guard that it was made from")
        kind = (question.event, question.activity)
        with self._lock:
            if self._ended:
                raise ReservationError("these leases have ended; ask the guard for new ones")
            if kind not in self._leases:
                self._leases[kind] = self._open.enter_context(
                    self._charges.accountant.lease(
                        self._charges.budget,
                        question.event,
                        unit=self._charges.unit,
                        activity=question.activity,
                    )
                )
            lease = self._leases[kind]
        return Paid(lease.mark())

    def many(self, question: Question, uses: int) -> AbstractContextManager[Marks]:
        """Reserve, as without a lease."""
        return self._charges.many(question, uses)

    def keep(self, question: Question, answer: bytes) -> None:
        """Nothing is kept."""

    def admitted(self, units: Positions, question: Question) -> None:
        """All of them."""


class UnitsPay:
    """Queries cost the dataset nothing: the units that they are about pay, from lanes of their own.

    Each unit is held to the mu of the one charge that opened the filter. What a query costs a unit
    is a function of this unit, the query and released answers: nothing if it scores below the
    threshold, else the event's price. All that score are charged, before any cut to the best ones;
    those without room are left out, silently, before anything else is computed from them
    (Feldman, Zrnic 2021; Koskela, Tobaben, Honkela 2023).
    """

    def __init__(self, lanes: UnitLanes, seq: int, names: Sequence[str]) -> None:
        self._lanes, self._seq = lanes, seq
        self._at = lanes.lanes_of(names)

    def pay(self, question: Question) -> Paid:
        """Check that a query is left, which is public."""
        if question.key is not None:
            raise InvalidQuery("a per-unit filter takes no keys: ask the guard it was made from")
        unit_price(question.event)
        if self._lanes.queries >= self._lanes.most_queries:
            raise QueriesExhausted(self._lanes.most_queries)
        return Paid(self._seq)

    @contextmanager
    def many(self, question: Question, uses: int) -> Iterator[Marks]:
        """Check likewise; the units pay for all uses at once, and nothing is returned."""
        yield self.pay(question).seq, lambda: uses

    def keep(self, question: Question, answer: bytes) -> None:
        """Nothing is kept."""

    def admitted(self, units: Positions, question: Question) -> NDArray[np.bool_]:
        """Charge the units; return which had room. Durable, and private."""
        return self._lanes.charge(self._at[units], unit_price(question.event))

    def close(self) -> None:
        """Close the lanes."""
        self._lanes.close()


def units_that_pay(
    charges: Charges, path: Path, names: Sequence[str], *, name: str, mu: float, queries: int
) -> UnitsPay:
    """Open a per-unit filter, with one charge to the budget; or go on with the one of that name.

    The charge's key is the filter's name, and its payload the identity of the file: no other file,
    and no file that was made anew, can take its place.

    Raises:
        InvalidRequest: If the file is not the one that the filter was opened with.
        AccountantError: As for ``Accountant.charge``.
    """
    event, limit = PerUnitFilter(mu), unit_limit(mu)
    if not 0 < limit < LARGEST:
        raise InvalidParameter("mu", mu, "from 1e-5 to 2000")
    opening = f"{charges.accountant.ledger}/{charges.budget}/{name}"
    lanes = UnitLanes(path, opening=opening, limit=limit, most_queries=queries)
    question = Question(
        event,
        "retrieval/per_unit",
        f"{name}: at most {queries} queries",
        bytes.fromhex(lanes.identity),
        f"per-unit filter {name}",
    )
    try:
        try:
            paid = charges.pay(question)
        except ReleaseUnknown:  # charged before a crash; what units spent since is in the file
            charges.keep(question, b"open")
            paid = charges.pay(question)
        if paid.answer is None:
            charges.keep(question, b"open")
        return UnitsPay(lanes, paid.seq, names)
    except KeyReused as error:
        lanes.close()
        raise InvalidRequest(
            f"{path} is not the file that the per-unit filter {name!r} was opened with: put that"
            " one back, or open another filter under another name"
        ) from error
    except BaseException:
        lanes.close()
        raise
