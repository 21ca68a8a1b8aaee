"""The command ``epsledger``: each sub-command is a thin shell over one public function."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from accountant import Accountant, LedgerCorrupt, fingerprint
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
from epsledger.errors import REFUSED, told
from epsledger.keeping import anchor, doctor, evidence, ledger, verified
from epsledger.options import LEDGER as _LEDGER
from epsledger.options import add_row as _add_row
from epsledger.options import existing as _existing
from epsledger.options import shown as _shown
from epsledger.running import run
from reports import write_report
from retrieval import QueryPlan, plan_queries


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


main.add_command(ledger)
main.add_command(run)
main.add_command(anchor)
main.add_command(doctor)


@main.group()
def budget() -> None:
    """Create, list, show, correct and close budgets."""


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
@click.option("--dataset", help="Fingerprint of the dataset; see 'budget fingerprint'.")
@click.option(
    "--lineage", multiple=True, help="Fingerprint of a dataset that it was made from; repeatable."
)
@click.option("--supersedes", help="The budget that this one replaces, spend carried over.")
@click.option(
    "--import",
    "imported",
    type=(str, int),
    multiple=True,
    metavar="EVENT USES",
    help="What was spent before there was a ledger; repeatable.",
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
    dataset: str | None,
    lineage: tuple[str, ...],
    supersedes: str | None,
    imported: tuple[tuple[str, int], ...],
    ledger: str,
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
            accountant.create_budget(
                name,
                limits,
                unit=unit,
                units=units,
                dataset=dataset,
                lineage=lineage,
                supersedes=supersedes,
                imported=[(read_event(event), uses) for event, uses in imported],
            )
    click.echo(f"{name}: {limits} per {unit} under {relation}, in {_shown(ledger)}")


@budget.command("quota")
@click.argument("name")
@click.option("--of", required=True, help="The dataset's budget that this is a share of.")
@click.option("--epsilon", type=float, required=True, help="In nats.")
@click.option("--delta", type=float, default=0.0, show_default=True, help="0 for a pure quota.")
@_LEDGER
def quota(name: str, of: str, epsilon: float, delta: float, ledger: str) -> None:
    """Create a quota for a team, tenant or application: a limit, and no guarantee."""
    with told(), _existing(ledger) as accountant:
        relation = accountant.budget(of).filter.relation
        limits = (
            adaptive(epsilon, delta, relation=relation)
            if delta
            else pure(epsilon, relation=relation)
        )
        accountant.create_quota(name, limits, of=of)
    click.echo(f"{name}: a quota of {limits} of {of}; charge both together")


@budget.command("close")
@click.argument("name")
@click.option("--note", default="", help="Why.")
@_LEDGER
def close(name: str, note: str, ledger: str) -> None:
    """Admit nothing under a budget any more. It cannot be opened again."""
    with told(), _existing(ledger) as accountant:
        receipt = accountant.close_budget(name, note=note)
    click.echo(f"{name}: closed by entry {receipt.seq}")


@budget.command("correct")
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@_event_options
@click.option("--activity", required=True, help="What it was for.")
@click.option("--note", default="", help="Why it was missed.")
@_LEDGER
def correct(
    names: tuple[str, ...],
    uses: int,
    activity: str,
    note: str,
    ledger: str,
    written: str | None,
    **event: float | None,
) -> None:
    """Record a spend that was missed, even where it does not fit. Nothing lowers a spend.

    Name every budget that it is charged to: of a superseded one also what carries its spend.
    """
    with told(), _existing(ledger) as accountant:
        asked, _ = _event(written, **event)
        budget = accountant.budget(names[0])
        receipt = accountant.correct(
            names,
            asked,
            uses=uses,
            unit=budget.unit,
            relation=budget.filter.relation,
            activity=activity,
            note=note,
        )
        for each in (receipt, *receipt.linked):
            share = accountant.statement(each.budget).share
            done = f"{uses} x {asked!r} recorded as entry {each.seq}"
            click.echo(f"{each.budget}: {done}; {share:.2%} used")


@budget.command("fingerprint")
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False))
@click.option("--key-file", type=click.Path(exists=True, dir_okay=False), help="With a secret.")
def fingerprint_files(files: tuple[str, ...], key_file: str | None) -> None:
    """Print a fingerprint of a dataset: each file is one record, in any order."""
    key = Path(key_file).read_bytes() if key_file else b""
    click.echo(fingerprint((Path(file).read_bytes() for file in files), key=key))


@budget.command("list")
@_LEDGER
def list_budgets(ledger: str) -> None:
    """List all budgets and how much of each is used."""
    table = Table("budget", "unit", "epsilon", "delta", "used", "refused")
    with told(), _existing(ledger) as accountant:
        broken = []
        for name in accountant.budgets():
            try:
                statement = accountant.statement(name)
            except LedgerCorrupt as error:
                broken.append(str(error))
                continue
            limits = statement.budget.filter
            _add_row(
                table,
                name,
                statement.budget.unit,
                repr(limits.epsilon),
                repr(limits.delta),
                f"{statement.share:.1%}" + (" closed" if statement.closed else ""),
                str(statement.refused),
            )
    Console().print(table)
    if broken:
        raise click.ClickException("\n".join(broken))


@budget.command("show")
@click.argument("name")
@_LEDGER
def show(name: str, ledger: str) -> None:
    """Show one budget: its guarantee and what each activity used of it."""
    with told(), _existing(ledger) as accountant:
        statement = accountant.statement(name)
    limits = statement.budget.filter
    click.echo(
        f"{name}: {limits} for life, per {statement.budget.unit}"
        f" under {limits.relation}, {limits.accounting} accounting {limits.version}"
    )
    if statement.closed:
        click.echo("closed: it admits nothing any more")
    for word, other in (
        ("dataset", statement.budget.dataset),
        ("made from", ", ".join(statement.budget.lineage)),
        ("supersedes", statement.budget.supersedes),
        ("superseded by", statement.superseded_by),
        ("a quota of", statement.budget.quota_of),
    ):
        if other:
            click.echo(f"{word} {other}")
    spent = dict(merged(statement.spent))
    for event, uses in limits.committed:
        click.echo(f"fixed at creation: {uses} uses of {event!r}, {spent.get(event, 0)} used")
    click.echo(
        f"used {statement.share:.2%} of the limits in {statement.seq} entries,"
        f" {statement.refused} refused"
    )
    click.echo(f"reads outside the guarantee: {statement.unprotected}")
    table = Table("activity", "uses", "share of the limit", "refused")
    for activity in statement.activities:
        _add_row(
            table, activity.name, str(activity.uses), f"{activity.share:.2%}", str(activity.refused)
        )
    Console().print(table)


@main.command()
@click.argument("name")
@_event_options
@click.option(
    "--queries", type=int, help="So many votes or counts, with --gaussian or the least noise."
)
@_LEDGER
def plan(
    name: str,
    uses: int,
    queries: int | None,
    ledger: str,
    written: str | None,
    **event: float | None,
) -> None:
    """Say what an operation would cost and how many fit; spends nothing."""
    if queries is not None:
        noise = event.pop("gaussian")
        if uses != 1 or written is not None or any(value is not None for value in event.values()):
            raise click.UsageError("--queries goes with --gaussian alone, or with nothing")
        with told(), _existing(ledger) as accountant:
            planned_queries = plan_queries(accountant, name, queries, noise_multiplier=noise)
        _show_queries(planned_queries)
        if planned_queries.share is None:
            raise click.exceptions.Exit(REFUSED)
        return
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


def _show_queries(plan: QueryPlan) -> None:
    noise = f"{plan.noise_multiplier:.6g}"
    if float(noise) < plan.noise_multiplier:
        noise = f"{plan.noise_multiplier * (1 + 1e-5):.6g}"  # rounded up: what is shown fits
    click.echo(f"{plan.queries} votes or counts with noise of standard deviation {noise}")
    if plan.share is None:
        click.echo(f"  do not fit; at most {plan.fit} fit now")
    else:
        click.echo(f"  fit, and {plan.share:.1%} of the limits would be used; {plan.fit} fit now")
    click.echo(
        f"  {plan.confidence:.0%} sure: a winner {plan.margin:.1f} votes ahead,"
        f" a count to within {plan.count_error:.1f}; a bar of {plan.bar} for 'anything on this?'"
    )
    table = Table("the winner's share of the best two", "units that must vote")
    for share, units in plan.support().items():
        _add_row(table, f"{share:.0%}", str(units))
    Console().print(table)


@main.command()
@click.argument("name")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("report"),
    show_default=True,
    help="Folder for the HTML, the JSON and the plots.",
)
@evidence
@_LEDGER
def report(name: str, out: Path, ledger: str, **evidence: Any) -> None:
    """Write the compliance report of a budget: HTML, JSON and plots."""
    with told(), _existing(ledger) as accountant:
        verification = verified(accountant, **evidence)
        written = write_report(accountant.statement(name), verification, out)
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
