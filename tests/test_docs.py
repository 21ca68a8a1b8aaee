"""Docs that execute: README's blocks, the examples, and every command documented."""

import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from epsledger.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


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


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.stem)
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
