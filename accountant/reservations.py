"""Reservations and leases: uses put aside before a run, taken one by one, the rest returned."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from types import TracebackType
from typing import Any, NoReturn, Self

from accountant.errors import ReservationError
from accountant.forks import process
from accountant.requests import Borrow, Holds, Mark, Receipt, Settle, Void
from accountant.writer import Writer
from dp import Event

_LOG = logging.getLogger(__name__)
_BLOCK_SECONDS = 0.05
"""A block of a lease lasts about this long at the rate of the one before."""


class Reservation:
    """The live handle of a reservation; get one from ``Accountant.reserve`` or ``adopt``.

    As a context manager it settles on a normal exit. When the block raises, nothing is returned:
    the reservation stays open and counts in full. It belongs to the process that made it.

    Attributes:
        budget: Name of the first budget.
        event: One use.
        uses: How many uses were reserved.
        marked: How many of them were taken.
        receipt: The ledger entry that reserved, or adopted, them.
        holds: What a later process needs to adopt it: (budget, seq) in each budget.
    """

    def __init__(
        self,
        writer: Writer,
        receipt: Receipt,
        event: Event,
        *,
        uses: int,
        holds: Holds,
        holder: str,
        marked: int = 0,
    ) -> None:
        self.budget, self.event, self.uses, self.receipt = receipt.budget, event, uses, receipt
        self.holds, self.marked = holds, marked
        self._writer, self._holder, self._open = writer, holder, True

    @property
    def remaining(self) -> int:
        """Uses that can still be marked."""
        return self.uses - self.marked if self._open else 0

    def mark(self, uses: int = 1) -> Receipt:
        """Take uses; return when that is durable. Only then may they touch private data.

        Raises:
            ReservationError: If fewer are left, it has ended, or another process adopted it.
        """
        receipt = self._writer.submit(Mark(self.holds, self._holder, uses))
        self.marked += uses
        return receipt

    def settle(self) -> Receipt:
        """Return the uses that were never marked, and end the reservation."""
        receipt = self._writer.submit(Settle(self.holds, self._holder))
        self._open = False
        return receipt

    def void(self) -> Receipt:
        """End the reservation before its first mark; it then cost nothing."""
        receipt = self._writer.submit(Void(self.holds, self._holder))
        self._open = False
        return receipt

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self._open:
            return
        if error is None:
            self.settle()
        else:
            _LOG.warning(
                "budget %r: reservation %d was left by %s; all its %d uses stay spent",
                self.budget,
                self.receipt.seq,
                type(error).__name__,
                self.uses,
            )

    def __reduce__(self) -> NoReturn:
        raise ReservationError("a reservation belongs to the process that made it: no copies")


class Lease:
    """Uses of one event, marked in memory; get one from ``Accountant.lease``.

    Uses are reserved durably in blocks and marked in memory, so that a mark costs less than a
    microsecond, and a commit is needed once a block. As a context manager it closes on a normal
    exit; what a crash, a fork or an exception leaves of a block stays spent. Blocks shrink to
    single uses as the budget runs out. What is left of a block when its budget is closed was
    charged before, and can still be taken. Safe to share between threads.

    Attributes:
        event: One use.
        marked: How many uses were taken.
    """

    def __init__(self, writer: Writer, ask: Borrow) -> None:
        self.event, self.marked = ask.event, 0
        self._writer, self._ask = writer, ask
        self._process, self._boot = process(), boot()
        self._lock = threading.RLock()
        self._holds: Holds = ()
        self._granted = self._left = 0
        self._began = 0.0
        self._open = True

    def mark(self) -> int:
        """Take one use. It is in the ledger; private data may be touched.

        Returns:
            The ``seq`` of the entry that reserved it, in the first of the budgets.

        Raises:
            BudgetExceeded: If no use is left in the budget.
            ReservationError: If the lease has ended, or belongs to another process.
        """
        if process() != self._process:  # before the lock: a fork may have copied it taken
            self._check_owner()
        with self._not_within():
            if not self._left:
                self._refill()
            self._left -= 1
            self.marked += 1
            return self._holds[0][1]

    def close(self) -> None:
        """Return the uses that were never marked, and end the lease."""
        if not self._open:
            return
        self._check_owner()
        with self._not_within():
            if self._open:
                self._settle()
                self._open = False

    def _refill(self) -> None:
        self._check_owner()
        now = time.monotonic()
        if self._granted:
            rate = self._granted / max(now - self._began, 1e-6)
            wanted = min(int(rate * _BLOCK_SECONDS), 4 * self._granted, self._ask.uses)
        else:
            wanted = 1
        self._settle()
        holder = secrets.token_hex(16)
        ask = replace(self._ask, uses=max(1, wanted), holder=holder)
        receipt = self._writer.submit(ask)
        self._holds = holds_of(receipt)
        self._ask = replace(self._ask, holder=holder)
        self._granted = self._left = receipt.uses
        self._began = now

    def _settle(self) -> None:
        """End the block in hand, its uses recorded exactly. A failure leaves all of it spent."""
        holds, marked = self._holds, self._granted - self._left
        self._holds, self._granted, self._left = (), 0, 0
        if holds:
            self._writer.submit(Settle(holds, self._ask.holder, marked))

    def _not_within(self) -> AbstractContextManager[Any]:
        """Return the lock; raise in a signal handler that interrupted its holder in this thread."""
        if self._lock._is_owned():  # type: ignore[attr-defined]  # noqa: SLF001 - as Condition does
            raise ReservationError("a signal handler cannot use the lease that it interrupted")
        return self._lock

    def _check_owner(self) -> None:
        if not self._open:
            raise ReservationError("this lease has ended; ask for another one")
        if (process(), boot()) != (self._process, self._boot):
            raise ReservationError(
                "this lease belongs to another process or boot; ask for one in this process"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()

    def __reduce__(self) -> NoReturn:
        raise ReservationError("a lease belongs to the process that made it: no copies")


def holds_of(receipt: Receipt) -> Holds:
    """Return what the receipt of a reservation holds in each budget."""
    return tuple((each.budget, each.seq) for each in (receipt, *receipt.linked))


def _read_boot() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:  # noqa: PTH123
            return file.read()
    except OSError:
        return ""


boot: Callable[[], str] = _read_boot
"""Return what identifies this boot of the machine, where the system tells."""
