"""The commands that keep a ledger: read, verify, back up, migrate, examine, anchor."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from accountant import Accountant, Verification
from accountant.anchors import read_notes
from accountant.doctor import examine
from accountant.marks import state_folder
from accountant.notes import VerifierKey, new_key, read_key
from accountant.stores import ledger_url
from accountant.stores.migrations import migrate
from epsledger.errors import CONTRADICTION, told
from epsledger.options import LEDGER, add_row, existing, moment, shown


@click.group()
def ledger() -> None:
    """Read, verify, back up and migrate the ledger."""


@ledger.command("log")
@click.argument("name")
@click.option("--last", type=int, default=20, show_default=True, help="How many entries.")
@LEDGER
def log(name: str, last: int, ledger: str) -> None:
    """Print the last entries of a budget."""
    with told(), existing(ledger) as accountant:
        statement = accountant.statement(name)
    table = Table("seq", "time (UTC)", "kind", "uses", "event", "activity", "used after")
    for line in statement.lines[-last:]:
        entry = line.entry
        add_row(
            table,
            str(entry.seq),
            moment(entry.time),
            entry.kind.name.lower() + (f" x{entry.times}" if entry.times > 1 else ""),
            str(entry.uses or ""),
            repr(line.event) if line.event else "",
            entry.activity,
            f"{line.share:.2%}",
        )
    Console().print(table)


def evidence(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say what a ledger is verified against."""
    for option in (
        click.option("--vouched", multiple=True, help="A verifier key that replaced a lost one."),
        click.option("--key", help="The verifier key that is trusted, of 'anchor new-key'."),
        click.option(
            "--anchor",
            "anchors",
            type=click.Path(dir_okay=False, path_type=Path),
            multiple=True,
            help="A file that anchors were published to; repeatable.",
        ),
    ):
        command = option(command)
    return command


def verified(
    accountant: Accountant, anchors: tuple[Path, ...], key: str | None, vouched: tuple[str, ...]
) -> Verification:
    """Verify a ledger against what :func:`evidence` named."""
    if anchors and not key:
        raise click.UsageError("anchors prove nothing without the --key that signed them")
    trusted = VerifierKey.from_text(key) if key else None
    keys = [VerifierKey.from_text(each) for each in vouched]
    return accountant.verify(map(read_notes, anchors), key=trusted, vouched=keys)


@ledger.command("verify")
@evidence
@LEDGER
def verify(ledger: str, **evidence: Any) -> None:
    """Replay every entry and compare: chain, prices, sums, limits. Exit code 4 if not clean."""
    with told(), existing(ledger) as accountant:
        found = verified(accountant, **evidence)
    for checked in found.budgets:
        state = "clean" if not checked.problems else f"{len(checked.problems)} problems"
        click.echo(
            f"{checked.budget}: {checked.entries} entries, head {checked.head[:16]}, {state}"
            f", reads outside the guarantee: {checked.unprotected}"
        )
        for problem in checked.problems:
            click.echo(f"  {problem}", err=True)
    for stray in found.strays:
        click.echo(f"rows of a budget that does not exist: {stray!r}", err=True)
    for problem in found.anchors:
        click.echo(problem, err=True)
    click.echo(f"rollback: {found.rollback}")
    if not found.clean:
        raise click.exceptions.Exit(CONTRADICTION)


@ledger.command("backup")
@click.argument("to", type=click.Path(dir_okay=False, path_type=Path))
@LEDGER
def backup(to: Path, ledger: str) -> None:
    """Copy the ledger to a new file while it is in use. Never copy the file itself."""
    with told(), existing(ledger) as accountant:
        accountant.backup(to)
    click.echo(f"{shown(ledger)}: copied to {to}; docs/recovery.md says when it may be put back")


@ledger.command("migrate")
@LEDGER
def migrate_ledger(ledger: str) -> None:
    """Bring a ledger to this version's schema. Stop every process that has it open first."""
    with told():
        done = migrate(ledger_url(ledger))
    click.echo(f"{ledger}: " + (f"migrated to schema {done[-1]}" if done else "up to date"))


@ledger.command("role")
@click.argument("role")
def role_sql(role: str) -> None:
    """Print SQL for PostgreSQL: let an application's role read and append, and not rewrite."""
    with told():
        from accountant.stores.postgres import role_statements

        click.echo(role_statements(role), nl=False)


@click.command()
@LEDGER
def doctor(ledger: str) -> None:
    """Look at where the ledger is kept: file system, durability, disk, clock, anchors."""
    found = examine(ledger)
    for finding in found:
        click.echo(f"{'ok  ' if finding.ok else 'LOOK'} {finding.what}: {finding.detail}")
    if not all(finding.ok for finding in found):
        raise click.exceptions.Exit(1)


@click.group()
def anchor() -> None:
    """Sign checkpoints of the ledger and publish them where its owner cannot change them."""


_KEY = click.option(
    "--key",
    "key_file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The key's file.  [default: key in the folder of EPSLEDGER_STATE]",
)
_TO = click.option(
    "--to",
    multiple=True,
    required=True,
    help="A file to append to, or 'command:...' that reads it; repeatable.",
)


@anchor.command("new-key")
@_KEY
@click.option("--name", default="epsledger", show_default=True, help="Of the key.")
def anchor_new_key(key_file: Path | None, name: str) -> None:
    """Make a key outside the ledger's folder, and print its verifier key: give that away."""
    with told():
        path = _key_file(key_file)
        with suppress(OSError):  # whatever is in its way, making the key says so
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        signer = new_key(path, name)
    click.echo(f"the secret key is in {path}", err=True)
    click.echo(signer.verifier_key.to_text())


@anchor.command("publish")
@_KEY
@_TO
@LEDGER
def anchor_publish(key_file: Path | None, to: tuple[str, ...], ledger: str) -> None:
    """Sign the last entry of every budget and publish it."""
    with told(), existing(ledger) as accountant:
        accountant.checkpoint(read_key(_key_file(key_file)), to=to)
    click.echo(f"{shown(ledger)}: anchored in {', '.join(to)}")


@anchor.command("rotate")
@_KEY
@click.option(
    "--new-key",
    "new_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    required=True,
    help="The new key's file, from 'anchor new-key --key FILE'.",
)
@click.option(
    "--lost", help="Hash of the old key, the 8 digits in its verifier key, if it is lost."
)
@_TO
@LEDGER
def anchor_rotate(
    key_file: Path | None, new_file: Path, lost: str | None, to: tuple[str, ...], ledger: str
) -> None:
    """Change the key. Both sign; if the old one is lost, others must be told the new one."""
    with told(), existing(ledger) as accountant:
        new = read_key(new_file)
        lines = [f"key {new.verifier_key.to_text()}"]
        signers = [new]
        if lost:
            lines.append(f"lost {lost}")
        else:
            signers.insert(0, read_key(_key_file(key_file)))
        accountant.checkpoint(*signers, to=to, lines=lines)
    click.echo(f"from the next checkpoint on only this key counts: {new.verifier_key.to_text()}")


def _key_file(given: Path | None) -> Path:
    folder = state_folder()
    if given is None and folder is None:
        raise click.UsageError("give --key, or EPSLEDGER_STATE a folder")
    return given or (folder or Path()) / "key"
