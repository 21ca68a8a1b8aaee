"""Reports: what a stranger needs to judge a privacy claim, from a statement and a verification."""

from __future__ import annotations

import io
import json
import os
from datetime import UTC, datetime
from pathlib import Path

from accountant import Statement, Verification
from reports.document import document
from reports.errors import ReportError

__all__ = ["ReportError", "document", "write_report"]


def write_report(statement: Statement, verification: Verification, folder: Path) -> dict[str, Path]:
    """Write the report of one budget: a self-contained page, its content as JSON, the plots.

    The guarantee, its unit and relation, and what it does not cover are in it, and so is what
    verify found. Each file appears whole or not at all.

    Args:
        statement: The budget, from ``Accountant.statement``.
        verification: From ``Accountant.verify``.
        folder: Where to write; created if it is missing, files of an earlier report replaced.

    Returns:
        The files: ``html``, ``json``, ``burn-down`` and ``activities``.

    Raises:
        ReportError: If the folder cannot be written, or an extra is not installed.
    """
    try:
        from reports.html import page
        from reports.plots import burn_down, spend_by_activity
    except ModuleNotFoundError as error:
        raise ReportError(
            f"{error.name} is missing; install it with: pip install 'epsledger[reports]'"
        ) from error
    content = document(statement, verification, now=datetime.now(UTC))
    plots = {}
    for name, plot in (("burn-down", burn_down), ("activities", spend_by_activity)):
        png = io.BytesIO()
        plot(content).savefig(png, format="png")
        plots[name] = png.getvalue()
    name = statement.budget.name
    files = {
        "html": (f"{name}.html", page(content, plots).encode()),
        "json": (f"{name}.json", json.dumps(content, indent=2, allow_nan=False).encode()),
        "burn-down": (f"{name}-burn-down.png", plots["burn-down"]),
        "activities": (f"{name}-activities.png", plots["activities"]),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return {what: _replace(folder / file, body) for what, (file, body) in files.items()}
    except OSError as error:
        raise ReportError(f"the report cannot be written to {folder}: {error}") from error


def _replace(path: Path, body: bytes) -> Path:
    """Write a file under another name first, so that a reader never sees half of it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(body)
        return partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
