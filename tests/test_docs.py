"""Docs that execute: README's blocks, the examples, and every command documented."""

import math
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from dp import (
    ZCDP,
    ApproximateDP,
    BandedMatrixFactorization,
    DiscreteGaussian,
    DiscreteLaplace,
    ExponentialMechanism,
    FixedSizeSampled,
    Gaussian,
    GumbelTopK,
    Laplace,
    NeighboringRelation,
    NonPrivate,
    NothingFits,
    PermuteAndFlip,
    PerUnitFilter,
    PoissonSampled,
    ProposeTestRelease,
    PureDP,
    RandomizedResponse,
    RepeatAndSelect,
    RepeatAndSelectPoisson,
    ReportNoisyMax,
    ShuffledEpoch,
    SparseVector,
    TreeAggregation,
    UnsupportedEvent,
    planned,
)
from dp.costs import cost
from dp.rows import ROWS, table
from epsledger.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
TRIED = {"guarded_script"}  # by tests/finetune/test_tutorial.py, with its charge
EXAMPLES = [each for each in sorted((ROOT / "examples").glob("*.py")) if each.stem not in TRIED]


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def run(arguments, folder):
    return subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda p: p.stem)
def test_examples_run(example, tmp_path):
    done = run([str(example)], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_readme_snippets_run_in_order_in_one_session(tmp_path):
    done = run(["-c", "\n".join(blocks("python"))], tmp_path)
    assert done.returncode == 0, done.stderr


def test_readme_commands_run(tmp_path):
    for line in "".join(blocks("console")).splitlines():
        if line.startswith("$ epsledger "):
            done = run(["-m", "epsledger", *line.split()[2:]], tmp_path)
            assert done.returncode == 0, f"{line}: {done.stderr}"


TYPICAL = [
    Gaussian(5.0),
    DiscreteGaussian(5.0),
    Laplace(5.0),
    DiscreteLaplace(5.0),
    PureDP(0.1),
    ApproximateDP(0.1, 1e-9),
    ZCDP(0.01),
    RandomizedResponse(0.1, 5),
    ExponentialMechanism(0.1),
    GumbelTopK(0.1, 3),
    ReportNoisyMax(0.1),
    PermuteAndFlip(0.1),
    SparseVector(50.0, 50.0, 2),
    ProposeTestRelease(0.1, 0.1, 1e-9),
    PerUnitFilter(0.2),
    PoissonSampled(0.1, PureDP(0.1)),
    FixedSizeSampled(10, 100, PureDP(0.1)),
    ShuffledEpoch(PureDP(0.1)),
    TreeAggregation(20.0, 100),
    BandedMatrixFactorization(20.0, (1.0, 0.5), 3),
    RepeatAndSelect(PureDP(0.1), 1.0, 0.1),
    RepeatAndSelectPoisson(Gaussian(5.0), 10.0),
    NonPrivate(),
]


def commands(group, prefix=()):
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*prefix, name))
        else:
            yield " ".join((*prefix, name)), command


@pytest.mark.parametrize(("name", "command"), list(commands(main)))
def test_every_command_has_help_and_is_in_the_readme(name, command):
    assert command.help
    assert all(option.help for option in command.params if isinstance(option, click.Option))
    assert f"epsledger {name}" in README


def test_docs_link_only_to_files_that_exist():
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md")]:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_page_of_prices_is_the_table():
    page = (ROOT / "docs" / "prices.md").read_text()
    assert page.endswith("\n\n" + table())


def test_the_table_says_what_the_code_does():
    """A cell says "refused" exactly where that accounting refuses a typical event of the row."""
    relations = {kind: row.relations[0] for kind, row in ROWS.items()}
    for event in TYPICAL:
        row, relation = ROWS[type(event)], relations[type(event)]
        bounds = cost(event, relation)
        assert bool(row.mu_squared) == (bounds.mu_squared < math.inf), event
        assert bool(row.epsilon) == (bounds.epsilon < math.inf), event
        assert bool(row.renyi) == (bounds.renyi(8) < math.inf), event
        assert bool(row.delta) >= (bounds.delta > 0), event
        try:
            planned(8.0, 1e-6, slots=[(event, 1)], relation=relation)
        except (NothingFits, UnsupportedEvent):
            assert not row.slot, event
        else:
            assert row.slot, event
        for other in set(NeighboringRelation) - set(row.relations):
            with pytest.raises(UnsupportedEvent, match=row.refused):
                cost(event, other)
    assert {type(event) for event in TYPICAL} == set(ROWS)
