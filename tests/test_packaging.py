"""What is shipped, and what importing it pulls in."""

import subprocess
import sys
import tomllib
import zipfile
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("accountant", "dp", "epsledger", "finetune", "reports", "retrieval")


def imported_by(statement):
    code = f"import sys; {statement}; print(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import dp", {"sqlmodel", "sqlalchemy", "torch", "click", "matplotlib"}),
        ("import accountant", {"torch", "opacus", "matplotlib", "click", "jinja2"}),
        ("import finetune", {"torch", "opacus"}),
        ("import retrieval", {"torch", "opacus", "matplotlib", "click"}),
        (
            "from retrieval.stores import chroma, faiss, lancedb, pgvector, qdrant, sqlite_vec",
            {"chromadb", "lancedb", "pgvector", "psycopg", "pyarrow", "qdrant_client"},
        ),
        ("import retrieval.adapters", {"langchain_core", "llama_index", "haystack"}),
        ("import reports", {"matplotlib", "jinja2", "torch"}),
        ("import epsledger.cli", {"torch", "opacus", "matplotlib", "jinja2", "transformers"}),
    ],
)
def test_imports_stay_light(statement, absent):
    assert not imported_by(statement) & absent


def test_the_control_import_is_seen():
    assert "torch" in imported_by("from finetune import training_run")


def test_the_wheel_holds_the_listed_packages_only(tmp_path):
    name = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import hatchling.build as b; print(b.build_wheel({str(tmp_path)!r}))",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()[-1]
    with zipfile.ZipFile(tmp_path / name) as wheel:
        files = wheel.namelist()
    top = {file.split("/")[0] for file in files if ".dist-info" not in file}
    assert top == set(PACKAGES)
    assert all(f"{package}/py.typed" in files for package in PACKAGES)
    assert "reports/templates/report.html.j2" in files
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert sorted(listed["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]) == sorted(
        PACKAGES
    )


def test_all_packages_come_from_one_place():
    places = {Path(import_module(package).__file__).parent.parent for package in PACKAGES}
    assert len(places) == 1


def test_no_machine_path_is_tracked():
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split("\0")
    if not any(tracked):
        pytest.skip("not a git checkout")
    homes = ("/" + "work/", "/" + "root/", "/" + "home/")
    for name in filter(None, tracked):
        text = (ROOT / name).read_text(errors="ignore") if (ROOT / name).is_file() else ""
        assert not any(home in text for home in homes), name
