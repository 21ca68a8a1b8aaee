"""Reads outside the guarantee: recorded for ever, they spend nothing and are no refusals."""

from __future__ import annotations

import enum
import shutil
from dataclasses import replace

import pytest

from accountant import (
    Accountant,
    BudgetClosed,
    BudgetExceeded,
    InvalidRequest,
    LedgerCorrupt,
    UnitMismatch,
    UnknownBudget,
)
from accountant import entries as entries_module
from accountant import statements as statements_module
from accountant import verify as verify_module
from accountant.entries import GENESIS, KIND_AT, SPENDS, Entry, Kind, chain, pack, unpack
from accountant.notes import Signer
from dp import Gaussian, NeighboringRelation, NonPrivate, PureDP, adaptive, planned, pure
from dp.codec import digest, encode

ASK = {"unit": "article", "activity": "survey"}
READ = {"unit": "article", "activity": "retrieval/raw", "note": "ticket 7"}
ONE = PureDP(1.0)


def problems(verification):
    return [problem for checked in verification.budgets for problem in checked.problems]


def test_a_read_is_an_entry_with_its_reason_and_changes_no_lane(accountant, location, totals_of):
    accountant.charge("news", Gaussian(50.0), **ASK)
    before, was = totals_of(location, "news"), accountant.statement("news")
    receipt = accountant.record_unprotected("news", **READ)
    statement = accountant.statement("news")
    assert totals_of(location, "news") == before
    for what in ("share", "activities", "spent", "refused", "open_reservations"):
        assert getattr(statement, what) == getattr(was, what)
    assert (was.unprotected, statement.unprotected) == (0, 1)
    line = statement.lines[-1]
    assert (line.entry.seq, statement.head) == (receipt.seq, receipt.digest)
    assert (line.entry.kind, line.entry.uses, line.event) == (Kind.UNPROTECTED, 1, NonPrivate())
    assert (line.entry.activity, line.entry.note) == ("retrieval/raw", "ticket 7")
    (news, _) = accountant.verify().budgets
    assert (news.entries, news.unprotected, news.problems) == (3, 1, ())


def test_counting_reads_as_spends_would_be_found(accountant, monkeypatch):
    """Control: the lanes that are stored are not those of a version that charges reads."""
    accountant.record_unprotected("news", **READ)
    assert accountant.statement("news").spent == ()
    charged = SPENDS | {Kind.UNPROTECTED}
    monkeypatch.setattr(statements_module, "SPENDS", charged)
    monkeypatch.setattr(verify_module, "SPENDS", charged)
    assert accountant.statement("news").spent == ((NonPrivate(), 1),)
    assert "the stored totals are not the sums of the entries" in problems(accountant.verify())


@pytest.mark.parametrize(
    "limits",
    [
        pure(1.5),
        pure(1.5, relation=NeighboringRelation.REPLACE_ONE),
        adaptive(1.5, 1e-6),
        planned(1.5, 1e-6, slots=[(ONE, 1)]),
    ],
)
def test_a_read_fits_whatever_is_left_and_takes_nothing_of_it(accountant, limits):
    accountant.create_budget("b", limits, unit="article")
    ask = ASK | {"relation": limits.relation}
    accountant.record_unprotected("b", **READ)
    fit = accountant.uses_that_fit("b", ONE)
    accountant.charge("b", ONE, uses=fit, **ask)
    with pytest.raises(BudgetExceeded):
        accountant.charge("b", NonPrivate(), **ask)
    for _ in range(2):
        accountant.record_unprotected("b", **READ)
    statement = accountant.statement("b")
    assert (fit, statement.unprotected, statement.refused) == (1, 3, 1)
    assert statement.spent == ((ONE, 1),)
    assert accountant.verify().clean


@pytest.mark.parametrize("note", ["", "x" * 201, "two\nlines", None, 7])
def test_a_read_without_a_reason_is_not_recorded(accountant, note):
    with pytest.raises(InvalidRequest, match="note must be"):
        accountant.record_unprotected("news", **READ | {"note": note})
    assert accountant.statement("news").seq == 1


def test_what_a_charge_refuses_of_a_budget_a_read_does_too(accountant, location, digest_of):
    accountant.create_quota("team", pure(2.0), of="tips")
    accountant.create_budget("old", pure(2.0), unit="article")
    accountant.close_budget("old")
    before = digest_of(location)
    for names, error in (
        ("old", BudgetClosed),
        (("news", "old"), BudgetClosed),
        ("absent", UnknownBudget),
        (("news", "absent"), UnknownBudget),
        ("team", InvalidRequest),
        (("news", "news"), InvalidRequest),
        ((), InvalidRequest),
    ):
        with pytest.raises(error):
            accountant.record_unprotected(names, **READ)
    with pytest.raises(UnitMismatch, match="'author'"):
        accountant.record_unprotected("news", **READ | {"unit": "author"})
    assert digest_of(location) == before


def test_reads_stay_with_the_superseded_budget_and_are_not_carried_as_spend(accountant):
    accountant.create_budget("a", pure(5.0), unit="article", dataset="d")
    accountant.charge("a", ONE, **ASK)
    accountant.record_unprotected("a", **READ)
    accountant.create_budget("b", pure(8.0), unit="article", dataset="d", supersedes="a")
    assert accountant.statement("b").spent == ((ONE, 1),)
    assert [accountant.statement(name).unprotected for name in "ab"] == [1, 0]
    assert accountant.verify().clean


# --- tampering ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory, untrigger):
    """A closed ledger, its triggers dropped: OPEN, CHARGE, UNPROTECTED."""
    location = tmp_path_factory.mktemp("ledger") / "ledger.db"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EPSLEDGER_STATE", "")
        with Accountant.open(location) as accountant:
            accountant.create_budget("tips", pure(10.0), unit="article")
            accountant.charge("tips", ONE, **ASK)
            accountant.record_unprotected("tips", **READ)
    untrigger(location)
    return location


@pytest.fixture
def kept(written, location, monkeypatch):
    """A copy of it that no machine remembers."""
    monkeypatch.setenv("EPSLEDGER_STATE", "")
    shutil.copyfile(written, location)
    return location


def found(location):
    with Accountant.open(location) as accountant:
        return problems(accountant.verify())


def rewrite(location, query, **changes: object) -> None:
    """Change the read, and write the whole chain anew: right in every link."""
    head = GENESIS
    for seq, stored in query(location, "SELECT seq, body FROM epsledger_entry ORDER BY seq"):
        entry = unpack(stored)
        body = pack(replace(entry, **changes) if seq == 3 else entry)
        head = chain(head, body)
        update = "UPDATE epsledger_entry SET body = ?, digest = ? WHERE seq = ?"
        query(location, update, body, head, seq)
    query(location, "UPDATE epsledger_budget SET head = ?", head)


def test_every_changed_byte_of_a_read_is_found_and_so_is_its_end_cut_off(kept, query):
    ((body,),) = query(kept, "SELECT body FROM epsledger_entry WHERE seq = 3")
    statement = "UPDATE epsledger_entry SET body = ? WHERE seq = 3"
    with Accountant.open(kept) as accountant:
        for at in range(len(body)):
            query(kept, statement, body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :])
            assert problems(accountant.verify())
        query(kept, statement, body)
        assert not problems(accountant.verify())
    query(kept, "DELETE FROM epsledger_entry WHERE seq = 3")
    assert (
        "entry 3: the budget ends on entry 3 and the entries on 2: some are missing or were added"
        in found(kept)
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, ""),
        ({"uses": 2}, "entry 3: is not one read outside the guarantee, with its reason"),
        ({"note": ""}, "entry 3: is not one read outside the guarantee, with its reason"),
        ({"event": digest(encode(ONE))}, "entry 3: is not one read outside the guarantee"),
        ({"event": bytes(32)}, "is not stored"),
        ({"kind": Kind.CHARGE}, "entry 3: exceeds the budget"),
    ],
)
def test_a_chain_rebuilt_around_another_read_is_contradicted_by_the_rules(
    kept, query, changes, words
):
    """Control: the first, which changes nothing, is clean."""
    rewrite(kept, query, **changes)
    assert words in "\n".join(found(kept))
    assert bool(found(kept)) is bool(words)


def test_a_charge_passed_off_as_a_read_is_found(kept, query):
    rewrite(kept, query, kind=Kind.CHARGE, event=digest(encode(ONE)))
    assert "the stored totals are not the sums of the entries" in found(kept)
    query(kept, "UPDATE epsledger_budget SET totals = ?", bytes(16))
    rewrite(kept, query, kind=Kind.UNPROTECTED)
    assert "entry 3: is not one read outside the guarantee, with its reason" in found(kept)


def test_a_read_after_the_close_is_found(kept, query):
    rewrite(kept, query, kind=Kind.CLOSE, uses=0)
    query(kept, "UPDATE epsledger_budget SET closed = 1")
    assert not found(kept)
    ((head,),) = query(kept, "SELECT head FROM epsledger_budget")
    body = pack(Entry(Kind.UNPROTECTED, 4, 2**60, digest(encode(NonPrivate())), 1, note="x"))
    query(
        kept,
        "INSERT INTO epsledger_entry VALUES ('tips', 4, ?, ?)",
        body,
        head := chain(head, body),
    )
    query(kept, "UPDATE epsledger_budget SET seq = 4, time = ?, head = ?", 2**60, head)
    assert found(kept) == ["entry 4: the budget was closed before"]


def test_a_read_passed_off_as_a_refusal_by_whoever_rewrites_all_is_found_by_an_anchor(kept, query):
    signer = Signer("anchor", bytes(32))
    with Accountant.open(kept) as accountant:
        note = accountant.checkpoint(signer)
    rewrite(kept, query, kind=Kind.REFUSE)
    assert not found(kept)  # honest limit: nothing inside a file tells
    with Accountant.open(kept) as accountant:
        assert accountant.verify([[note]], key=signer.verifier_key).anchors


# --- versions -----------------------------------------------------------------------------------


def test_the_number_that_is_stored_is_13():
    body = pack(Entry(Kind.UNPROTECTED, 2, 0))
    assert body[KIND_AT] == Kind.UNPROTECTED == 13


def test_a_version_that_does_not_know_reads_refuses_to_read_and_skips_none(kept, monkeypatch):
    older = enum.IntEnum("Kind", {kind.name: int(kind) for kind in Kind if kind < 13})
    with Accountant.open(kept) as accountant:
        assert accountant.verify().clean
        monkeypatch.setattr(entries_module, "Kind", older)
        monkeypatch.setattr(entries_module, "_KINDS", {int(kind): kind for kind in older})
        with pytest.raises(LedgerCorrupt, match="13 is not a valid Kind"):
            accountant.statement("tips")
        assert any("13 is not a valid Kind" in problem for problem in problems(accountant.verify()))
