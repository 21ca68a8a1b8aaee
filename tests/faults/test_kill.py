"""``kill -9`` at random moments: what was acknowledged is in the ledger, and nothing is overspent.

Four processes charge one ledger and write down each receipt before they go on. One of them, or
all, are killed; the others must go on; then the ledger is opened again and compared with what
was written down. Control: a store that answers at once and commits 25 transactions later loses
acknowledged charges under the same function.
"""

from __future__ import annotations

import random
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

from accountant import Accountant, BudgetExceeded
from accountant.entries import Kind
from dp import PureDP, pure

ONE = PureDP(1.0)


class Outcome(NamedTuple):
    """What one round came to."""

    acknowledged: int
    lost: int
    spent: int
    clean: bool
    went_on: bool


def kill_some(workers, lines_of, wait, folder: Path, mode: str, choose: random.Random):
    """Start four writers, kill one or all at a random moment; return all lines and who went on."""
    outs = workers.start(folder, mode, processes=4, threads=2, asks=10**6)

    def told(of) -> int:
        return sum(len(lines_of(outs[worker])) for worker in of)

    wait(lambda: told(outs) > 12)
    time.sleep(choose.uniform(0, 0.1))
    victims = list(outs) if choose.random() < 0.5 else choose.sample(list(outs), 1)
    for victim in victims:
        workers.kill(victim)
    others = [worker for worker in outs if worker not in victims]
    before = told(others)
    if others:
        wait(lambda: told(others) > before or all("full" in lines_of(outs[w]) for w in others))
    for worker in others:
        workers.kill(worker)
    lines = [line for out in outs.values() for line in lines_of(out)]
    return lines, not others or told(others) > before or "full" in lines


def kill_round(
    workers, lines_of, wait, query, folder: Path, mode: str, seed: int, *, fitting: int
) -> Outcome:
    choose = random.Random(seed)
    folder.mkdir()
    location = folder / "ledger.db"
    with Accountant.open(location) as accountant:
        accountant.create_budget("tips", pure(fitting + 0.5), unit="article")
    lines, went_on = kill_some(workers, lines_of, wait, folder, mode, choose)
    assert not [line for line in lines if line.startswith("error")]
    with Accountant.open(location) as accountant:
        clean = accountant.verify().clean
        statement = accountant.statement("tips")
        remaining = accountant.uses_that_fit("tips", ONE)
        if remaining:
            accountant.charge("tips", ONE, unit="article", activity="after")
        else:
            with pytest.raises(BudgetExceeded):
                accountant.charge("tips", ONE, unit="article", activity="after")
    entries = [line.entry for line in statement.lines]
    stored = dict(query(location, "SELECT seq, hex(digest) FROM epsledger_entry"))
    marks = Counter(e.reservation for e in entries for _ in range(e.uses) if e.kind is Kind.MARK)
    settled = {e.reservation for e in entries if e.kind is Kind.SETTLE}
    told = [line.split() for line in lines if line not in ("ready", "full", "done")]
    told_marks = Counter(int(seq) for what, seq, _ in told if what == "marked")
    lost = sum(max(0, count - marks[seq]) for seq, count in told_marks.items())
    for what, seq, digest in told:
        if what in ("charged", "reserved"):
            lost += stored.get(int(seq), "").lower() != digest
        elif what == "settled":
            lost += int(seq) not in settled
    spent = sum(e.uses for e in entries if e.kind is Kind.CHARGE)
    for e in entries:
        if e.kind is Kind.RESERVE:
            spent += marks[e.seq] if e.seq in settled else e.uses
    assert spent + remaining == fitting  # what is open counts in full
    shutil.rmtree(folder)
    return Outcome(len(told), lost, spent, clean, went_on)


def kill_rounds(workers, lines_of, wait, query, tmp_path, mode: str, rounds: int) -> None:
    told = 0
    for seed in range(rounds):
        fitting = 60 if seed % 3 == 0 else 5000
        outcome = kill_round(
            workers, lines_of, wait, query, tmp_path / f"{seed}", mode, seed, fitting=fitting
        )
        assert outcome.lost == 0
        assert outcome.spent <= fitting
        assert outcome.clean
        assert outcome.went_on
        told += outcome.acknowledged
    print(f"{mode}: {rounds} rounds of kill -9, {told} acknowledged, 0 lost")


@pytest.mark.parametrize(("mode", "rounds"), [("charges", 20), ("reservations", 12)])
def test_nothing_acknowledged_is_lost(workers, lines_of, wait, query, tmp_path, mode, rounds):
    kill_rounds(workers, lines_of, wait, query, tmp_path, mode, rounds)


@pytest.mark.long
@pytest.mark.parametrize("mode", ["charges", "reservations"])
def test_nothing_acknowledged_is_lost_at_length(
    workers, lines_of, wait, query, tmp_path, mode, scale
):
    kill_rounds(workers, lines_of, wait, query, tmp_path, mode, 200 * scale)


@pytest.mark.parametrize("mode", ["broken_charges", "broken_reservations"])
def test_the_control_loses_what_it_acknowledged(workers, lines_of, wait, query, tmp_path, mode):
    lost = []
    for seed in range(10):
        outcome = kill_round(
            workers, lines_of, wait, query, tmp_path / f"{seed}", mode, seed, fitting=10**5
        )
        lost.append(outcome.lost)
        if len(lost) >= 3 and any(lost):
            break
    print(f"{mode}: lost {lost} in {len(lost)} rounds of kill -9")
    assert any(lost)
