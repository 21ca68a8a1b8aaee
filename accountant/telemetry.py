"""What an operator watches: shares used, refusals, and how long commits take.

Crossing 50, 80 or 95 % of a budget is a warning in the log of this module, always. With
``opentelemetry-api`` installed (the extra ``telemetry``) there are metrics as well, of whatever
provider the application set up: ``epsledger.charges``, ``epsledger.refusals``,
``epsledger.remaining`` and ``epsledger.commit.duration``. No query, event or note is in them.
OpenTelemetry's handler for :mod:`logging` exports the warnings.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from accountant.books import Book
from accountant.entries import HOLDS, SPENDS

_LOG = logging.getLogger(__name__)
THRESHOLDS = (0.5, 0.8, 0.95)
"""Used shares of the limits that are worth a warning."""


class Watch:
    """Tells of every commit. For the writer thread."""

    def __init__(self) -> None:
        self._meter = _meter()
        if self._meter is not None:
            self._charges = self._meter.create_counter(
                "epsledger.charges", unit="{entry}", description="charges, reservations and leases"
            )
            self._refusals = self._meter.create_counter(
                "epsledger.refusals", unit="{ask}", description="operations turned down"
            )
            self._remaining = self._meter.create_gauge(
                "epsledger.remaining",
                unit="1",
                description="share of a budget that is left",
            )
            self._duration = self._meter.create_histogram(
                "epsledger.commit.duration", unit="s", description="of one durable commit"
            )

    def committed(self, books: Iterable[Book], refused: Iterable[str], seconds: float) -> None:
        """Take note of one commit.

        Args:
            books: The budgets that it was about, as they are now.
            refused: The budget of each operation that it turned down.
            seconds: How long it took.
        """
        for book in books:
            name, limits = book.budget.name, book.budget.filter
            share = limits.share(book.totals)
            if share >= THRESHOLDS[0] and book.totals != book.before:
                before = limits.share(book.before) if book.before else 0.0
                if any(before < threshold <= share for threshold in THRESHOLDS):
                    _LOG.warning("budget %r: %.0f%% of the limits are used", name, 100 * share)
            if self._meter is not None:
                spent = sum(entry.kind in SPENDS | HOLDS for entry, _, _ in book.appended)
                self._remaining.set(1.0 - share, {"budget": name})
                self._charges.add(spent, {"budget": name})
        if self._meter is not None:
            self._duration.record(seconds)
            for name in refused:
                self._refusals.add(1, {"budget": name})


def _meter() -> Any:
    try:
        from opentelemetry import metrics
    except ModuleNotFoundError:
        return None
    return metrics.get_meter("epsledger")
