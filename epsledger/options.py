"""What the commands share: where the ledger is, and tables of plain text."""

from __future__ import annotations

from pathlib import Path

import click
from rich.table import Table
from rich.text import Text

from accountant import Accountant

LEDGER = click.option(
    "--ledger",
    default="epsledger.db",
    show_default=True,
    envvar="EPSLEDGER_LEDGER",
    help="The ledger: an SQLite file, or a URL such as postgresql://user@host/database.",
)


def existing(ledger: str) -> Accountant:
    """Open a ledger that is there: a mistyped path must not become an empty ledger."""
    if "://" not in ledger and not Path(ledger).exists():
        raise click.ClickException(
            f"no ledger at {ledger}; give --ledger or EPSLEDGER_LEDGER, or create a budget first"
        )
    return Accountant.open(ledger)


def add_row(table: Table, *cells: str) -> None:
    """Add a row of plain text: what callers wrote is not markup."""
    table.add_row(*map(Text, cells))
