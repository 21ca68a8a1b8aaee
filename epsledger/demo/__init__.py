"""The main job end to end on real text: one budget, a fine-tune, votes, a refusal, a report."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

import click

from accountant import Accountant, AccountantError, BudgetExceeded, Statement
from dp import Gaussian
from reports import write_report

if TYPE_CHECKING:
    from epsledger.demo.pipeline import Outcome


class DemoError(AccountantError):
    """The demo did not show what it is there to show."""


def run(out: Path) -> None:
    """Run the demo and print its summary.

    Args:
        out: Folder for the ledger and the report; what an earlier demo left there is replaced.

    Raises:
        DemoError: If a spend did not survive the kill, or any other check fails.
        ImportError: If the demo's packages are not installed.
    """
    started = time.monotonic()
    ledger = out / "ledger.db"
    report = out / "report"
    for old in (ledger, ledger.with_name("ledger.db-wal"), ledger.with_name("ledger.db-shm")):
        old.unlink(missing_ok=True)
    for folder in (report, out / "state"):
        shutil.rmtree(folder, ignore_errors=True)
    os.environ.setdefault("EPSLEDGER_STATE", str((out / "state").resolve()))
    out.mkdir(parents=True, exist_ok=True)

    outcome = _work_and_be_killed(ledger)
    with Accountant.open(ledger) as accountant:
        statement, refused_again = _check_survival(accountant, outcome)
        verification = accountant.verify()
        _require(verification.clean, "verify found a contradiction")
        written = write_report(statement, verification, report)
    _check_report(written["json"], written["html"], statement)
    click.echo(_summary(outcome, statement, refused_again, written["html"]))
    click.echo(f"  {time.monotonic() - started:.0f} s in all")


def _work_and_be_killed(ledger: Path) -> Outcome:
    """Run the pipeline in a process of its own and kill it with SIGKILL after its report."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_pipeline, args=(ledger, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        answer = ours.recv()
    except EOFError:
        answer = DemoError("the pipeline's process died; its own message is above")
    process.kill()
    process.join()
    if isinstance(answer, BaseException):
        raise answer
    outcome: Outcome = answer
    return outcome


def _pipeline(ledger: Path, parent: Connection) -> None:
    """Work, report, and wait for the kill; nothing is closed or flushed."""
    try:
        from epsledger.demo.pipeline import work

        parent.send(work(ledger))
    except ImportError as error:
        parent.send(ImportError(f"{error}; pip install 'epsledger[demo]'"))
    while True:
        time.sleep(60)


def _check_survival(accountant: Accountant, outcome: Outcome) -> tuple[Statement, BudgetExceeded]:
    """Ask once more after the kill: the spend must still be there, and the refusal with it."""
    from epsledger.demo.pipeline import BUDGET, UNIT, VOTE_NOISE

    before = accountant.statement(BUDGET)
    _require(before.seq >= outcome.seq, "acknowledged entries are gone")
    votes = sum(a.uses for a in before.activities if a.name == "retrieval/vote")
    _require(votes == outcome.answered, "the ledger has another number of votes than were answered")
    try:
        accountant.charge(
            BUDGET, Gaussian(VOTE_NOISE), unit=UNIT, activity="retrieval/vote", note="after kill -9"
        )
    except BudgetExceeded as refused:
        return accountant.statement(BUDGET), refused
    raise DemoError("the budget admitted a query after the kill that it had refused before")


def _check_report(document: Path, page: Path, statement: Statement) -> None:
    content = json.loads(document.read_text())
    _require(statement.head in json.dumps(content), "the JSON report is not of this ledger")
    _require(statement.head in page.read_text(), "the HTML report is not of this ledger")


def _summary(outcome: Outcome, statement: Statement, refused: BudgetExceeded, page: Path) -> str:
    limits = statement.budget.filter
    shares = {activity.name: activity.share for activity in statement.activities}
    return f"""
epsledger demo: BBC News, {outcome.records} records of {statement.budget.units} articles, one budget
  guarantee   {limits} for life, per {statement.budget.unit}, \
{limits.relation}, adaptive operations
  used        {statement.share:.1%} of the limits: training {shares["training"]:.1%}, \
votes {shares["retrieval/vote"]:.1%}

  accuracy on held-out articles      private   not private   majority
    fine-tuned topic classifier        {outcome.private_accuracy:.3f}         \
{outcome.plain_accuracy:.3f}      {outcome.majority:.3f}
    label vote on headlines            {outcome.private_vote:.3f}         \
{outcome.plain_vote:.3f}      {outcome.majority:.3f}

  fine-tune   {statement.activities[-1].uses} DP-SGD steps, each in the ledger before its batch
  queries     {outcome.answered} answered, then: {outcome.refusal}
  kill -9     process killed and ledger reopened: every entry there, verify clean,
              the next query refused again ({refused.remaining} would fit)
  times       encode {outcome.seconds["encode"]:.0f} s, train {outcome.seconds["train"]:.0f} s, \
votes {outcome.seconds["votes"]:.1f} s
  report      {page}"""


def _require(holds: bool, otherwise: str) -> None:  # noqa: FBT001
    if not holds:
        raise DemoError(otherwise)
