"""Errors of reports.

::

    ReportError   a report cannot be made or written; nothing is left half written
"""

from __future__ import annotations

from dp.errors import FactualError


class ReportError(FactualError):
    """A report cannot be made or written; what was there before is untouched."""
