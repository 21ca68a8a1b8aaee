"""``epsledger run``: start a training script, and say afterwards what of it was guarded."""

from __future__ import annotations

import fcntl
import os
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import click

from accountant.marks import state_folder
from epsledger.errors import REFUSED, UNGUARDED
from epsledger.options import LEDGER, shown
from finetune.supervision import VARIABLE, heard


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option(
    "--name",
    help="Of the run: no second one of that name runs at the same time on this machine.",
)
@LEDGER
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run(name: str | None, ledger: str, command: tuple[str, ...]) -> None:
    """Start a training script and say afterwards what of it was guarded.

    It gets EPSLEDGER_LEDGER. Nothing is guarded by this: the script does that itself, with
    finetune.training_run. Exit code 5 if no guarded run was in it, 3 if the last one was refused,
    else the script's own. Signals are the script's to handle: it can save before it ends.
    """
    with tempfile.TemporaryDirectory() as folder, _alone(name) as locks:
        told = Path(folder) / "told"
        environment = {**os.environ, "EPSLEDGER_LEDGER": ledger, VARIABLE: str(told)}
        status = _wait(command, environment, locks)
        runs = heard(told)
        if VARIABLE in os.environ and runs:  # supervised itself
            with Path(os.environ[VARIABLE]).open("a", encoding="utf-8") as outer:
                outer.write(told.read_text(encoding="utf-8"))
    for each in runs:
        words = {
            "ended": f"{each.marked} of {each.uses} steps paid, the rest returned",
            "left": f"left by an error: all {each.uses} steps stay spent until it is resumed from"
            " its checkpoint",
            "lost": f"its process died: all {each.uses} steps stay spent until it is resumed from"
            " its checkpoint",
            "refused": "refused: it does not fit the budget",
        }[each.outcome]
        click.echo(f"{shown(ledger)}: budget {each.budget!r}: {words}", err=True)
    if runs and runs[-1].outcome == "refused":
        raise click.exceptions.Exit(REFUSED)
    if not any(each.marked or each.outcome == "lost" for each in runs):
        click.echo(
            f"{shlex.join(command)}: this run was not guarded: no step of a training_run was paid"
            " for in it, and nothing is known of its privacy",
            err=True,
        )
        raise click.exceptions.Exit(UNGUARDED)
    raise click.exceptions.Exit(status if status >= 0 else 128 - status)


def _wait(command: Sequence[str], environment: dict[str, str], locks: Sequence[int]) -> int:
    """Return the exit status of a command, which gets the signals that this process gets."""
    before: dict[signal.Signals, object] = {}
    # A terminal sends its interrupts to the script as well; the others are for this process alone.
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        before[signal.SIGINT] = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        try:
            script = subprocess.Popen(command, env=environment, pass_fds=locks)  # noqa: S603
        except OSError as error:
            raise click.ClickException(f"{command[0]}: {error.strerror}") from error
        for number in (signal.SIGTERM, signal.SIGHUP):
            before[number] = signal.signal(number, lambda got, _: script.send_signal(got))
        return script.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]


@contextmanager
def _alone(name: str | None) -> Iterator[tuple[int, ...]]:
    """Hold the name of the run; it is given back when the script, which inherits it, has ended."""
    if name is None:
        yield ()
        return
    folder = state_folder()
    if folder is None:
        raise click.UsageError("--name needs a folder for its lock: give EPSLEDGER_STATE one")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not name.isprintable() or "/" in name:
        raise click.UsageError(f"--name {name!r} must be printable, without a slash")
    with (folder / f"{name}.run").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise click.ClickException(f"run {name!r} is running on this machine") from error
        yield (lock.fileno(),)
