"""How an answer is paid for: by a charge of its own, from a lease, or by the units it is about.

A guard pays before it looks at the corpus. All three are durable before anything is released.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from accountant import Accountant, Lease
from accountant.accountant import Budgets
from dp import Event
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

    def close(self) -> None:
        """Return what was not used."""


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

    def close(self) -> None:
        """Nothing is open."""


class Leases:
    """Answers are paid for from blocks of uses, about a microsecond each; a crash loses a block."""

    def __init__(self, charges: Charges) -> None:
        self._charges = charges
        self._leases: dict[tuple[Event, str], Lease] = {}
        self._lock = threading.Lock()

    def pay(self, question: Question) -> Paid:
        """Mark one use."""
        if question.key is not None:
            raise InvalidQuery("a lease takes no keys: ask the guard that it was made from")
        with self._lock:
            lease = self._leases.get((question.event, question.activity))
            if lease is None:
                lease = self._charges.accountant.lease(
                    self._charges.budget,
                    question.event,
                    unit=self._charges.unit,
                    activity=question.activity,
                )
                self._leases[question.event, question.activity] = lease
        return Paid(lease.mark())

    def many(self, question: Question, uses: int) -> AbstractContextManager[Marks]:
        """Reserve, as without a lease."""
        return self._charges.many(question, uses)

    def keep(self, question: Question, answer: bytes) -> None:
        """Nothing is kept."""

    def admitted(self, units: Positions, question: Question) -> None:
        """All of them."""

    def close(self) -> None:
        """Return the uses that were never marked."""
        for lease in self._leases.values():
            lease.close()
