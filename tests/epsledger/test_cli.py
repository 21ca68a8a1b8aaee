"""The command: each sub-command on a real ledger, its output, its exit code."""

import json
import re
import sqlite3

import pytest
from click.testing import CliRunner

from accountant import Accountant
from dp import Gaussian
from epsledger.cli import main


@pytest.fixture
def ledger(tmp_path):
    return tmp_path / "ledger.db"


@pytest.fixture
def call(ledger, monkeypatch):
    monkeypatch.setenv("EPSLEDGER_LEDGER", str(ledger))
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words, code=0):
        result = CliRunner().invoke(main, words)
        assert result.exit_code == code, result.output
        return result.output

    return run


@pytest.fixture
def news(call):
    call("budget", "create", "news", "--epsilon", "3", "--delta", "1e-6", "--unit", "article")
    return call


def charge(ledger, uses=1):
    with Accountant.open(ledger) as accountant:
        accountant.charge("news", Gaussian(50.0), unit="article", activity="survey", uses=uses)


def test_create_list_show(news, ledger):
    charge(ledger, 95)
    assert "article" in news("budget", "list")
    shown = news("budget", "show", "news")
    assert "(3.0, 1e-06)-DP for life, per article under add_remove, adaptive accounting 1" in shown
    assert "survey" in shown
    assert "9.97%" in shown


def test_pure_budget(call):
    told = call(
        "budget", "create", "p", "--epsilon", "1", "--unit", "patient", "--relation", "replace_one"
    )
    assert "(1.0, 0.0)-DP per patient under replace_one" in told


STEP = json.dumps(
    {
        "kind": "PoissonSampled",
        "sampling_probability": 0.01,
        "event": {"kind": "Gaussian", "noise_multiplier": 1},
    }
)


def test_a_plan_committed_to(call):
    create = ("budget", "create", "b", "--epsilon", "3", "--delta", "1e-6", "--unit", "a")
    call(
        *create, "--slot", STEP, "500", "--slot", '{"kind": "Laplace", "noise_multiplier": 9}', "7"
    )
    shown = call("budget", "show", "b")
    assert "planned accounting 1" in shown
    assert "fixed at creation: 7 uses of Laplace(noise_multiplier=9.0), 0 used" in shown
    assert "at most 500 fit now" in call("plan", "b", "--event", STEP, "--uses", "500")
    assert "at most 500 fit now" in call("plan", "b", "--event", STEP, "--uses", "501", code=3)
    assert "fits, and" in call("plan", "b", "--gaussian", "50")


def test_a_workload_expected(call):
    create = ("budget", "create", "b", "--epsilon", "1", "--delta", "1e-6", "--unit", "a")
    call(*create, "--expect", STEP)
    words = ("--gaussian", "1", "--sampling-probability", "0.01")
    assert "at most 94 fit now" in call("plan", "b", *words)


def test_plan_spends_nothing_and_says_what_fits(news, ledger):
    before = ledger.read_bytes()
    told = news("plan", "news", "--gaussian", "50", "--uses", "952")
    assert "at most 952 fit" in told
    assert "smallest noise multiplier for 952 uses is 49.98" in told
    told = news("plan", "news", "--gaussian", "50", "--uses", "953", code=3)
    assert "does not fit" in told
    news("plan", "news", "--gaussian", "1", "--sampling-probability", "0.01", "--uses", "1500")
    news("plan", "news", "--laplace", "10")
    news("plan", "news", "--pure-epsilon", "0.1")
    assert ledger.read_bytes() == before


def test_log(news, ledger):
    charge(ledger, 7)
    told = news("ledger", "log", "news")
    assert "open" in told
    assert "charge" in told
    assert "Gaussian(noise_multiplier=50.0)" in told


def test_reads_outside_the_guarantee_are_shown(news, ledger):
    assert "reads outside the guarantee: 0" in news("budget", "show", "news")
    with Accountant.open(ledger) as accountant:
        accountant.record_unprotected("news", unit="article", activity="raw", note="ticket 7")
    shown = news("budget", "show", "news")
    assert "reads outside the guarantee: 1" in shown
    assert "0 refused" in shown
    line = next(line for line in news("ledger", "log", "news").splitlines() if "raw" in line)
    assert "unprotected" in line
    assert "NonPrivate()" in line
    assert "clean, reads outside the guarantee: 1" in news("ledger", "verify")


def test_verify_clean_and_tampered(news, ledger):
    charge(ledger, 7)
    told = news("ledger", "verify")
    assert "news: 2 entries" in told
    assert "clean" in told
    assert "rollback: checked against what this machine saw" in told
    with sqlite3.connect(ledger) as database:
        database.execute("DROP TRIGGER epsledger_entry_update")
        database.execute("UPDATE epsledger_entry SET body = body || x'00' WHERE seq = 2")
    database.close()
    assert "entry 2" in news("ledger", "verify", code=4)


def test_report(news, ledger, tmp_path):
    charge(ledger, 7)
    told = news("report", "news", "--out", str(tmp_path / "report"))
    assert len(told.split()) == 4
    (document,) = (tmp_path / "report").glob("*.json")
    json.loads(document.read_text())


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["budget", "create", "news", "--epsilon", "1", "--unit", "a"], 1, "exists"),
        (["budget", "create", "x", "--epsilon", "nan", "--unit", "a"], 1, "epsilon must be"),
        (["budget", "create", "x y", "--epsilon", "1", "--unit", "a"], 1, "budget name"),
        (["budget", "create", "x", "--epsilon", "1", "--unit", "a", "--expect", STEP], 2, "delta"),
        (
            [
                "budget",
                "create",
                "x",
                "--epsilon",
                "1",
                "--delta",
                "1e-6",
                "--unit",
                "a",
                "--expect",
                STEP,
                "--slot",
                STEP,
                "1",
            ],
            2,
            "not both",
        ),
        (
            [
                "budget",
                "create",
                "x",
                "--epsilon",
                "1",
                "--delta",
                "1e-6",
                "--unit",
                "a",
                "--slot",
                "{",
                "1",
            ],
            1,
            "not a readable event",
        ),
        (
            [
                "budget",
                "create",
                "x",
                "--epsilon",
                "1",
                "--delta",
                "1e-6",
                "--unit",
                "a",
                "--slot",
                STEP,
                "9999",
            ],
            1,
            "nothing fits",
        ),
        (["plan", "news", "--event", "[]"], 1, "not a readable event"),
        (
            [
                "budget",
                "create",
                "x",
                "--epsilon",
                "1",
                "--delta",
                "0.01",
                "--units",
                "100",
                "--unit",
                "a",
            ],
            1,
            "below 1/units",
        ),
        (["budget", "show", "nope"], 1, "no budget 'nope'"),
        (["plan", "news"], 2, "exactly one of"),
        (["plan", "news", "--gaussian", "1", "--laplace", "1"], 2, "exactly one of"),
        (["plan", "news", "--gaussian", "-1"], 1, "noise_multiplier must be"),
        (
            ["plan", "news", "--gaussian", "1", "--sampling-probability", "1.5"],
            1,
            "sampling_probability must be",
        ),
        (["report", "nope"], 1, "no budget 'nope'"),
        (["ledger", "verify", "--ledger", "missing/ledger.db"], 1, "no ledger at"),
    ],
)
def test_bad_calls_say_what_is_wrong(news, words, code, message):
    assert message in news(*words, code=code)


def test_what_callers_wrote_is_not_markup(news, ledger):
    with Accountant.open(ledger) as accountant:
        accountant.charge("news", Gaussian(50.0), unit="article", activity="[/b][red]x[/red]")
    assert "[/b][red]x[/red]" in news("budget", "show", "news")
    assert "[/b][red]x[/red]" in news("ledger", "log", "news")


def test_parameters_and_noise_are_never_shown_too_small(call):
    told = call(
        "budget",
        "create",
        "odd",
        "--epsilon",
        "8.0000049",
        "--delta",
        "1.0000049e-6",
        "--unit",
        "a",
    )
    assert "(8.0000049, 1.0000049e-06)-DP" in told
    for uses in range(1, 60, 7):
        told = call("plan", "odd", "--gaussian", "500", "--uses", str(uses))
        (noise,) = re.findall(r"smallest noise multiplier for \d+ uses is (\S+)", told)
        call("plan", "odd", "--gaussian", noise, "--uses", str(uses))


def test_a_mistyped_path_creates_no_ledger(call, ledger):
    call("budget", "list", code=1)
    assert not ledger.exists()
