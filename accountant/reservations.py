"""A reservation: uses put aside before a long run, taken one by one, the rest returned."""

from __future__ import annotations

import logging
from types import TracebackType
from typing import NoReturn, Self

from accountant.errors import ReservationError
from accountant.ledger import Mark, Receipt, Settle, Void
from accountant.writer import Writer
from dp import Event

_LOG = logging.getLogger(__name__)


class Reservation:
    """The live handle of a reservation; get one from ``Accountant.reserve``.

    As a context manager it settles on a normal exit. When the block raises, nothing is returned:
    the reservation stays open and counts in full.

    Attributes:
        budget: Name of the budget.
        event: One use.
        uses: How many uses were reserved.
        marked: How many of them were taken.
        receipt: The ledger entry that reserved them.
    """

    def __init__(
        self, writer: Writer, receipt: Receipt, event: Event, uses: int, holder: str
    ) -> None:
        self.budget, self.event, self.uses, self.receipt = receipt.budget, event, uses, receipt
        self.marked = 0
        self._writer, self._holder, self._open = writer, holder, True

    @property
    def remaining(self) -> int:
        """Uses that can still be marked."""
        return self.uses - self.marked if self._open else 0

    def mark(self, uses: int = 1) -> Receipt:
        """Take uses; return when that is durable. Only then may they touch private data.

        Raises:
            ReservationError: If fewer are left, or the reservation has ended.
        """
        receipt = self._writer.submit(Mark(self.budget, self.receipt.seq, self._holder, uses))
        self.marked += uses
        return receipt

    def settle(self) -> Receipt:
        """Return the uses that were never marked, and end the reservation."""
        receipt = self._writer.submit(Settle(self.budget, self.receipt.seq, self._holder))
        self._open = False
        return receipt

    def void(self) -> Receipt:
        """End the reservation before its first mark; it then cost nothing."""
        receipt = self._writer.submit(Void(self.budget, self.receipt.seq, self._holder))
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
