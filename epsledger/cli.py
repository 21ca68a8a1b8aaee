"""The command ``epsledger``: each sub-command is a thin shell over one public function."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from accountant import Accountant
from dp import (
    Event,
    Gaussian,
    Laplace,
    NeighboringRelation,
    NothingFits,
    PoissonSampled,
    PureDP,
    adaptive,
    planned,
    pure,
)
from dp.accountings import merged
from dp.codec import read_event
from epsledger.errors import CONTRADICTION, REFUSED, told
from reports import write_report

_LEDGER = click.option(
    "--ledger",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("epsledger.db"),
    show_default=True,
    envvar="EPSLEDGER_LEDGER",
    help="The ledger's SQLite file.",
)


def _event_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--uses", type=int, default=1, show_default=True, help="How many uses."),
        click.option("--event", "written", metavar="EVENT", help="Any event, as JSON."),
        click.option("--pure-epsilon", type=float, help="Any mechanism of this pure epsilon."),
        click.option("--laplace", type=float, help="Laplace noise: scale over L1 sensitivity."),
        click.option(
            "--sampling-probability", type=float, help="On a fresh Poisson sample of the units."
        ),
        click.option(
            "--gaussian", type=float, help="Gaussian noise: noise multiplier over L2 sensitivity."
        ),
    ):
        command = option(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="epsledger")
def main() -> None:
    """Keep the privacy budget of an LLM pipeline: one budget per dataset, charged before use."""


@main.group()
def budget() -> None:
    """Create, list and show budgets."""


@budget.command("create")
@click.argument("name")
@click.option("--epsilon", type=float, required=True, help="For the dataset's whole life, in nats.")
@click.option("--delta", type=float, default=0.0, show_default=True, help="0 for a pure budget.")
@click.option("--unit", required=True, help="Who is protected, for instance 'article'.")
@click.option("--units", type=int, help="How many units there are, if that is public.")
@click.option(
    "--relation",
    type=click.Choice([relation.value for relation in NeighboringRelation]),
    default=NeighboringRelation.ADD_REMOVE.value,
    show_default=True,
    help="Which two datasets count as neighbors.",
)
@click.option(
    "--expect",
    metavar="EVENT",
    help="One use of the expected workload, as JSON; anything else can still be charged.",
)
@click.option(
    "--slot",
    "slots",
    type=(str, int),
    multiple=True,
    metavar="EVENT USES",
    help="Commit to USES of an event, as JSON: planned accounting, the tightest.",
)
@_LEDGER
def create(
    name: str,
    epsilon: float,
    delta: float,
    unit: str,
    units: int | None,
    relation: str,
    expect: str | None,
    slots: tuple[tuple[str, int], ...],
    ledger: Path,
) -> None:
    """Create a budget; it never changes afterwards.

    An EVENT is written as in the ledger, for instance '{"kind": "PoissonSampled",
    "sampling_probability": 0.01, "event": {"kind": "Gaussian", "noise_multiplier": 1.0}}'.
    """
    if expect and slots:
        raise click.UsageError("give --expect or --slot, not both")
    if (expect or slots) and not delta:
        raise click.UsageError("--expect and --slot need a --delta")
    with told():
        neighbors = NeighboringRelation(relation)
        if slots:
            committed = [(read_event(event), uses) for event, uses in slots]
            limits = planned(epsilon, delta, slots=committed, relation=neighbors)
        elif delta:
            expected = read_event(expect) if expect else None
            limits = adaptive(epsilon, delta, relation=neighbors, expect=expected)
        else:
            limits = pure(epsilon, relation=neighbors)
        with Accountant.open(ledger) as accountant:
            accountant.create_budget(name, limits, unit=unit, units=units)
    click.echo(f"{name}: {limits} per {unit} under {relation}, in {ledger}")


@budget.command("list")
@_LEDGER
def list_budgets(ledger: Path) -> None:
    """List all budgets and how much of each is used."""
    table = Table("budget", "unit", "epsilon", "delta", "used", "refused")
    with told(), _existing(ledger) as accountant:
        for name in accountant.budgets():
            statement = accountant.statement(name)
            limits = statement.budget.filter
            _add_row(
                table,
                name,
                statement.budget.unit,
                repr(limits.epsilon),
                repr(limits.delta),
                f"{statement.share:.1%}",
                str(statement.refused),
            )
    Console().print(table)


@budget.command("show")
@click.argument("name")
@_LEDGER
def show(name: str, ledger: Path) -> None:
    """Show one budget: its guarantee and what each activity used of it."""
    with told(), _existing(ledger) as accountant:
        statement = accountant.statement(name)
    limits = statement.budget.filter
    click.echo(
        f"{name}: {limits} for life, per {statement.budget.unit}"
        f" under {limits.relation}, {limits.accounting} accounting {limits.version}"
    )
    spent = dict(merged(statement.spent))
    for event, uses in limits.committed:
        click.echo(f"fixed at creation: {uses} uses of {event!r}, {spent.get(event, 0)} used")
    click.echo(
        f"used {statement.share:.2%} of the limits in {statement.seq} entries,"
        f" {statement.refused} refused"
    )
    table = Table("activity", "uses", "share of the limit", "refused")
    for activity in statement.activities:
        _add_row(
            table, activity.name, str(activity.uses), f"{activity.share:.2%}", str(activity.refused)
        )
    Console().print(table)


@main.command()
@click.argument("name")
@_event_options
@_LEDGER
def plan(name: str, uses: int, ledger: Path, written: str | None, **event: float | None) -> None:
    """Say what an operation would cost and how many fit; spends nothing."""
    with told(), _existing(ledger) as accountant:
        asked, with_noise = _event(written, **event)
        fit = accountant.uses_that_fit(name, asked)
        share = accountant.share_after(name, [(asked, uses)])
        click.echo(f"{uses} x {asked!r}")
        if share is None:
            click.echo(f"  does not fit; at most {fit} fit now")
        else:
            click.echo(
                f"  fits, and {share:.1%} of the limits would be used; at most {fit} fit now"
            )
        if with_noise is not None:
            try:
                noise = accountant.smallest_noise(name, with_noise, uses=uses)
                shown = f"{noise * (1 + 1e-5):.6g}"  # rounded up: what is shown fits
                click.echo(f"  the smallest noise multiplier for {uses} uses is {shown}")
            except NothingFits:
                click.echo(f"  no noise makes {uses} uses fit")
    if uses > fit:
        raise click.exceptions.Exit(REFUSED)


@main.group()
def ledger() -> None:
    """Read and verify the ledger."""


@ledger.command("log")
@click.argument("name")
@click.option("--last", type=int, default=20, show_default=True, help="How many entries.")
@_LEDGER
def log(name: str, last: int, ledger: Path) -> None:
    """Print the last entries of a budget."""
    with told(), _existing(ledger) as accountant:
        statement = accountant.statement(name)
    table = Table("seq", "time (UTC)", "kind", "uses", "event", "activity", "used after")
    for line in statement.lines[-last:]:
        entry = line.entry
        when = datetime.fromtimestamp(entry.time / 1e6, UTC)
        _add_row(
            table,
            str(entry.seq),
            f"{when:%Y-%m-%d %H:%M:%S}",
            entry.kind.name.lower() + (f" x{entry.times}" if entry.times > 1 else ""),
            str(entry.uses or ""),
            repr(line.event) if line.event else "",
            entry.activity,
            f"{line.share:.2%}",
        )
    Console().print(table)


@ledger.command("verify")
@_LEDGER
def verify(ledger: Path) -> None:
    """Replay every entry and compare: chain, prices, sums, limits. Exit code 4 if not clean."""
    with told(), _existing(ledger) as accountant:
        found = accountant.verify()
    for checked in found.budgets:
        state = "clean" if not checked.problems else f"{len(checked.problems)} problems"
        click.echo(
            f"{checked.budget}: {checked.entries} entries, head {checked.head[:16]}, {state}"
        )
        for problem in checked.problems:
            click.echo(f"  {problem}", err=True)
    for stray in found.strays:
        click.echo(f"rows of a budget that does not exist: {stray!r}", err=True)
    click.echo(f"rollback: {found.rollback}")
    if not found.clean:
        raise click.exceptions.Exit(CONTRADICTION)


@main.command()
@click.argument("name")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("report"),
    show_default=True,
    help="Folder for the HTML, the JSON and the plots.",
)
@_LEDGER
def report(name: str, out: Path, ledger: Path) -> None:
    """Write the compliance report of a budget: HTML, JSON and plots."""
    with told(), _existing(ledger) as accountant:
        written = write_report(accountant.statement(name), accountant.verify(), out)
    for path in written.values():
        click.echo(path)


@main.command()
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("out"),
    show_default=True,
    help="Folder for the ledger and the report; the demo's earlier files in it are replaced.",
)
def demo(out: Path) -> None:
    """Run the whole path on BBC News: budget, DP-SGD, votes, refusal, kill, report."""
    with told():
        from epsledger.demo import run

        run(out)


def _add_row(table: Table, *cells: str) -> None:
    """Add a row of plain text: what callers wrote is not markup."""
    table.add_row(*map(Text, cells))


def _existing(ledger: Path) -> Accountant:
    """Open a ledger that is there: a mistyped path must not become an empty ledger."""
    if not ledger.exists():
        raise click.ClickException(
            f"no ledger at {ledger}; give --ledger or EPSLEDGER_LEDGER, or create a budget first"
        )
    return Accountant.open(ledger)


def _event(
    written: str | None,
    *,
    gaussian: float | None,
    sampling_probability: float | None,
    laplace: float | None,
    pure_epsilon: float | None,
) -> tuple[Event, Callable[[float], Event] | None]:
    """Return the event of the options, and how to build it with another noise multiplier."""
    given = {
        "--gaussian": gaussian,
        "--laplace": laplace,
        "--pure-epsilon": pure_epsilon,
        "--event": written,
    }
    if sum(value is not None for value in given.values()) != 1:
        raise click.UsageError(f"give exactly one of {', '.join(given)}")

    def sampled(event: Event) -> Event:
        return (
            event if sampling_probability is None else PoissonSampled(sampling_probability, event)
        )

    if written is not None:
        return sampled(read_event(written)), None
    if gaussian is not None:
        return sampled(Gaussian(gaussian)), lambda noise: sampled(Gaussian(noise))
    if laplace is not None:
        return sampled(Laplace(laplace)), lambda noise: sampled(Laplace(noise))
    return sampled(PureDP(pure_epsilon or 0.0)), None
