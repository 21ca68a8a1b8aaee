"""A tutorial of Opacus, and how little its guarded version changes."""

import ast
import difflib
import subprocess
import sys
from pathlib import Path

from accountant import Accountant
from dp import adaptive

EXAMPLES = Path(__file__).parents[2] / "examples"


def statements(name: str) -> list[str]:
    """Return the statements of a script in order, of compound ones the head."""
    found: list[str] = []

    def visit(body: list[ast.stmt]) -> None:
        for each in body:
            inner = getattr(each, "body", [])
            text = ast.unparse(each)
            found.append(text.split("\n")[0] if inner else text)
            visit(inner)

    visit(ast.parse((EXAMPLES / name).read_text()).body[1:])  # without the docstring
    return found


def test_the_guarded_version_changes_few_statements():
    bare, guarded = statements("opacus_script.py"), statements("guarded_script.py")
    diff = list(difflib.ndiff(bare, guarded))
    added = [line for line in diff if line.startswith("+ ")]
    removed = [line for line in diff if line.startswith("- ")]
    print(f"{len(removed)} statements removed, {len(added)} added: {added}")
    assert len(removed) <= 4
    assert len(added) <= 5


def test_the_guarded_version_runs_and_is_paid_for(tmp_path):
    with Accountant.open(tmp_path / "ledger.db") as accountant:
        accountant.create_budget("tickets", adaptive(8.0, 1e-6), unit="row", units=2000)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(EXAMPLES / "guarded_script.py")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.stdout == "trained\n", done.stderr
    with Accountant.open(tmp_path / "ledger.db") as accountant:
        assert sum(uses for _, uses in accountant.statement("tickets").spent) == 20
