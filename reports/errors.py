"""Errors of reports.

::

    ReportError   a report cannot be made or written; nothing is left half written
"""

from __future__ import annotations


class ReportError(Exception):
    """A report cannot be made or written; what was there before is untouched."""
