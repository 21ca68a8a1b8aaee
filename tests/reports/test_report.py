"""Reports of real ledgers: figures, schema, escaping, tampering, and where they are written."""

import json
import re
import sqlite3
import struct
from datetime import UTC, datetime
from importlib.resources import files

import jsonschema
import pytest
from jinja2 import Environment

from accountant import Accountant, BudgetExceeded
from dp import Gaussian, Laplace, PoissonSampled, PureDP, adaptive, planned, pure
from reports import ReportError, document, write_report
from reports.html import page

SCHEMA = json.loads((files("reports") / "schema" / "report-1.json").read_text())
STEP = PoissonSampled(0.01, Gaussian(1.0))
NO_PLOTS = {"burn-down": b"", "activities": b""}


@pytest.fixture
def accountant(tmp_path):
    with Accountant.open(tmp_path / "ledger.db") as accountant:
        accountant.create_budget("news", adaptive(3.0, 1e-6), unit="article", units=1000)
        yield accountant


@pytest.fixture
def spent(accountant):
    with accountant.reserve("news", STEP, uses=100, unit="article", activity="training") as run:
        run.mark(60)
    for _ in range(5):
        accountant.charge("news", Gaussian(50.0), unit="article", activity="vote", uses=20)
    for _ in range(3):
        with pytest.raises(BudgetExceeded):
            accountant.charge("news", Gaussian(1.0), unit="article", activity="<b>bold</b>")
    return accountant


def content(accountant, name="news"):
    return document(accountant.statement(name), accountant.verify(), now=datetime.now(UTC))


def test_figures_are_those_of_the_ledger(spent):
    report = content(spent)
    limits = spent.budget("news").filter
    totals = tuple(
        60 * step + 100 * vote
        for step, vote in zip(limits.price(STEP), limits.price(Gaussian(50.0)), strict=True)
    )
    assert report["spend"]["share"] == pytest.approx(limits.share(totals), rel=1e-9)
    assert sum(a["share"] for a in report["spend"]["activities"]) == pytest.approx(
        limits.share(totals), rel=1e-9
    )
    assert report["events"] == [
        {"event": repr(Gaussian(50.0)), "activity": "vote", "uses": 100},
        {"event": repr(STEP), "activity": "training", "uses": 60},
    ]
    assert report["refusals"]["total"] == 3
    assert report["spend"]["open_reservations"] == []
    assert report["burn_down"][-1]["share"] == report["spend"]["share"]
    assert [row["kind"] for row in report["operations"]] == [
        *("open", "reserve", "settle"), *["charge"] * 5, "refuse"
    ]  # fmt: skip
    assert report["verification"]["clean"]
    assert report["verification"]["same_state"]
    assert report["verification"]["rollback"].startswith("checked against what this machine")


def test_the_claim_names_unit_relation_and_parameters(spent):
    claim = content(spent)["guarantee"]
    for words in ("(3.0, 1e-06)", "adding or removing one article", "for its whole life", "chosen"):
        assert words in claim


def test_the_document_follows_its_schema_and_the_schema_is_strict(spent):
    report = content(spent)
    jsonschema.validate(report, SCHEMA)
    for broken in (report | {"more": 1}, {k: v for k, v in report.items() if k != "not_covered"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, SCHEMA)


@pytest.mark.parametrize("limits", [pure(1.0), adaptive(0.1, 1e-9)])
def test_an_unspent_budget(accountant, tmp_path, limits):
    accountant.create_budget("empty", limits, unit="patient")
    report = content(accountant, "empty")
    jsonschema.validate(report, SCHEMA)
    assert report["spend"]["share"] == 0
    written = write_report(accountant.statement("empty"), accountant.verify(), tmp_path / "out")
    assert json.loads(written["json"].read_text())["budget"]["name"] == "empty"


def test_a_pure_budget_that_is_used_up(accountant):
    accountant.create_budget("pure", pure(1.5), unit="patient")
    accountant.charge("pure", PureDP(1.0), unit="patient", activity="a")
    assert content(accountant, "pure")["spend"]["share"] == pytest.approx(1 / 1.5, rel=1e-6)


def test_many_entries_are_thinned_but_keep_both_ends(accountant):
    for _ in range(1200):
        accountant.charge("news", Gaussian(1000.0), unit="article", activity="vote")
    points = content(accountant)["burn_down"]
    assert len(points) <= 502
    assert (points[0]["seq"], points[-1]["seq"]) == (1, 1201)


def test_the_page_stands_alone(spent, tmp_path):
    written = write_report(spent.statement("news"), spent.verify(), tmp_path / "deep" / "er")
    page = written["html"].read_text()
    assert "<script" not in page
    assert "http" not in page
    assert len(re.findall(r'src="data:image/png;base64,[A-Za-z0-9+/=]{1000,}"', page)) == 2
    assert "if the operations had been fixed in advance" in page
    for words in json.loads(written["json"].read_text())["not_covered"]:
        assert words in page
    assert "anonymous" not in page
    for name in ("burn-down", "activities"):
        header = written[name].read_bytes()[:24]
        assert header[:8] == b"\x89PNG\r\n\x1a\n"
        assert min(struct.unpack(">II", header[16:24])) > 100


def test_what_callers_wrote_is_escaped(spent, tmp_path):
    page = write_report(spent.statement("news"), spent.verify(), tmp_path)["html"].read_text()
    assert "&lt;b&gt;bold&lt;/b&gt;" in page
    assert "<b>" not in page
    assert "<b>" in Environment(autoescape=False).from_string("{{ x }}").render(x="<b>")  # noqa: S701


def test_reads_outside_the_guarantee_are_counted_and_each_is_listed(spent):
    before = content(spent)
    assert (before["unprotected"]["total"], before["unprotected"]["reads"]) == (0, [])
    for reason in ("ticket 7", "<b>audit</b>"):
        spent.record_unprotected("news", unit="article", activity="raw", note=reason)
    report = content(spent)
    jsonschema.validate(report, SCHEMA)
    reads = report["unprotected"]["reads"]
    assert report["unprotected"]["total"] == len(reads) == 2
    assert [(read["activity"], read["reason"]) for read in reads] == [
        ("raw", "ticket 7"),
        ("raw", "<b>audit</b>"),
    ]
    lines = spent.statement("news").lines[-2:]
    assert [read["seq"] for read in reads] == [line.entry.seq for line in lines]
    for line, read in zip(lines, reads, strict=True):
        assert datetime.fromisoformat(read["time"]).timestamp() == line.entry.time // 10**6
    for member in ("spend", "events", "guarantee"):
        assert report[member] == before[member]
    assert report["refusals"]["total"] == 3
    assert not any(point["refusal"] for point in report["burn_down"][-2:])
    assert [row["kind"] for row in report["operations"][-2:]] == ["unprotected"] * 2
    shown = page(report, NO_PLOTS)
    assert "<h2>Reads outside the guarantee: 2</h2>" in shown
    assert report["unprotected"]["meaning"] in shown
    assert "ticket 7" in shown
    assert "&lt;b&gt;audit" in shown
    assert "<b>" not in shown


def test_more_reads_than_the_last_operations_are_all_listed(accountant):
    for number in range(250):
        accountant.record_unprotected("news", unit="article", activity="raw", note=f"{number}")
    reads = content(accountant)["unprotected"]["reads"]
    assert [read["reason"] for read in reads] == [f"{number}" for number in range(250)]


def test_a_report_without_reads_says_so(spent):
    shown = page(content(spent), NO_PLOTS)
    assert "<h2>Reads outside the guarantee: 0</h2>" in shown
    assert "saw private data" not in shown


def test_a_tampered_ledger_is_shouted(spent, tmp_path):
    with sqlite3.connect(tmp_path / "ledger.db") as database:
        database.execute("DROP TRIGGER epsledger_entry_update")
        database.execute("UPDATE epsledger_entry SET digest = zeroblob(32) WHERE seq = 5")
    database.close()
    page = write_report(spent.statement("news"), spent.verify(), tmp_path)["html"].read_text()
    assert page.index("Do not rely on this report") < page.index("<h2>Guarantee")
    assert "entry 5" in page


def test_a_clean_ledger_is_not_shouted(spent, tmp_path):
    page = write_report(spent.statement("news"), spent.verify(), tmp_path)["html"].read_text()
    assert "Do not rely" not in page


def test_a_folder_that_cannot_be_written_is_named_and_leaves_nothing(spent, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with pytest.raises(ReportError, match="file"):
        write_report(spent.statement("news"), spent.verify(), blocked)
    assert blocked.read_text() == "in the way"


def test_an_earlier_report_is_replaced_whole(spent, tmp_path):
    first = write_report(spent.statement("news"), spent.verify(), tmp_path / "out")
    before = first["json"].read_text()
    spent.charge("news", Gaussian(500.0), unit="article", activity="more")
    again = write_report(spent.statement("news"), spent.verify(), tmp_path / "out")
    assert again == first
    assert again["json"].read_text() != before
    assert len(list((tmp_path / "out").iterdir())) == 4


def test_a_report_of_a_plan(tmp_path):
    with Accountant.open(tmp_path / "plan.db") as accountant:
        limits = planned(3.0, 1e-6, slots=[(STEP, 200), (Laplace(20.0), 5)])
        accountant.create_budget("plan", limits, unit="article")
        accountant.charge("plan", Laplace(20.0), uses=7, unit="article", activity="x")
        accountant.charge("plan", Gaussian(50.0), uses=100, unit="article", activity="x")
        report = content(accountant, "plan")
        written = write_report(accountant.statement("plan"), accountant.verify(), tmp_path)
    assert report["budget"]["committed"] == [
        {"event": repr(STEP), "uses": 200},
        {"event": repr(Laplace(20.0)), "uses": 5},
    ]
    fixed = report["spend"]["if_fixed_in_advance"]
    assert fixed["epsilon_pld_low"] <= fixed["epsilon_pld"] < fixed["epsilon_renyi"] < 3.0
    page = next(path for path in written.values() if path.suffix == ".html").read_text()
    assert "up to 200 uses of PoissonSampled" in page
    assert "by privacy loss distributions" in page


def test_a_superseding_budget_and_a_quota_say_so(tmp_path):
    with Accountant.open("memory:") as accountant:
        ask = {"unit": "article", "activity": "survey"}
        accountant.create_budget("old", pure(5.0), unit="article", dataset="sha256:aa")
        accountant.charge("old", PureDP(1.0), **ask)
        accountant.create_budget(
            "new", pure(8.0), unit="article", dataset="sha256:aa", supersedes="old"
        )
        accountant.create_quota("team", pure(2.0), of="new")
        accountant.charge(("new", "team"), PureDP(1.0), **ask)
        reports = {}
        for name in ("old", "new", "team"):
            written = write_report(accountant.statement(name), accountant.verify(), tmp_path / name)
            reports[name] = json.loads(written["json"].read_text()), written["html"].read_text()
    assert reports["old"][0]["budget"]["closed"]
    assert "it admits nothing any more" in reports["old"][1]
    assert reports["new"][0]["budget"]["supersedes"] == "old"
    assert "without regard to what had been released" in reports["new"][0]["guarantee"]
    assert "Those under old, which it supersedes, are in that budget" in reports["new"][1]
    assert reports["team"][0]["guarantee"].startswith("None by itself")
    assert "sha256:aa" in reports["new"][1]
