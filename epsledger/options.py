"""What the commands share: where the ledger is, and tables of plain text."""

from __future__ import annotations

from datetime import UTC, datetime

import click
from rich.table import Table
from rich.text import Text

from accountant import Accountant
from accountant.stores import ledger_url

LEDGER = click.option(
    "--ledger",
    default="epsledger.db",
    show_default=True,
    envvar="EPSLEDGER_LEDGER",
    help="The ledger: an SQLite file, or a URL such as postgresql://user@host/database.",
)


def existing(ledger: str) -> Accountant:
    """Open a ledger that is there: a mistyped path must not become an empty ledger."""
    return Accountant.open(ledger, create=False)


def shown(ledger: str) -> str:
    """Return what to call a ledger: without its password."""
    return ledger_url(ledger).render_as_string() if "://" in ledger else ledger


def moment(time: int) -> str:
    """Return the label of an entry, microseconds since 1970, as a date.

    >>> moment(0)
    '1970-01-01 00:00:00'
    >>> moment(2**64 - 1)
    '18446744073709551615 us'
    """
    try:
        return f"{datetime.fromtimestamp(time / 1e6, UTC):%Y-%m-%d %H:%M:%S}"
    except (ValueError, OverflowError, OSError):
        return f"{time} us"


def add_row(table: Table, *cells: object) -> None:
    """Add a row of plain text: what callers wrote is not markup, nor always text."""
    table.add_row(*(Text(str(cell)) for cell in cells))
