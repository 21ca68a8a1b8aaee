"""Checkpoints that are signed and published: whose key is valid in which place."""

from __future__ import annotations

import pytest

from accountant import Accountant, AnchorInvalid, AnchorUnavailable, InvalidRequest
from accountant.anchors import read_notes
from accountant.doctor import examine
from tests.accountant.ledgers import ALICE, BOB, LIMITS


def test_publishers_with_keys_of_their_own(books, tmp_path):
    places = tmp_path / "alice", tmp_path / "bob"
    for _ in range(2):
        for signer, place in zip((ALICE, BOB), places, strict=True):
            books.checkpoint(signer, to=[place])
    for signer, place in zip((ALICE, BOB), places, strict=True):
        found = books.verify([read_notes(place)], key=signer.verifier_key)
        assert (found.clean, found.rollback[:22]) == (True, "checked against 2 anch")


def test_a_key_that_was_replaced_signs_no_more(books, tmp_path):
    places = tmp_path / "one", tmp_path / "other"
    books.checkpoint(ALICE, to=places)
    line = f"key {BOB.verifier_key.to_text()}"
    books.checkpoint(ALICE, BOB, to=places, lines=[line])
    with pytest.raises(AnchorInvalid, match="replaced by bob"):
        books.checkpoint(ALICE, to=places)
    books.checkpoint(BOB, to=places)
    for signer in (ALICE, BOB):
        assert books.verify(map(read_notes, places), key=signer.verifier_key).clean


def test_a_series_is_not_one_note(books):
    note = books.checkpoint(ALICE)
    with pytest.raises(InvalidRequest, match="anchors must be"):
        books.verify([note], key=ALICE.verifier_key)


def test_a_rotation_that_failed_at_one_place_is_done_again(books, tmp_path):
    place = tmp_path / "anchors"
    books.checkpoint(ALICE, to=[place])
    line = f"key {BOB.verifier_key.to_text()}"
    with pytest.raises(AnchorUnavailable):
        books.checkpoint(ALICE, BOB, to=["command:false", place], lines=[line])
    books.checkpoint(ALICE, BOB, to=[place], lines=[line])
    books.checkpoint(BOB, to=[place])
    for signer in (ALICE, BOB):
        assert books.verify([read_notes(place)], key=signer.verifier_key).clean


def test_a_file_that_cannot_take_the_note_is_found_before_it_is_stored(books, tmp_path):
    place = tmp_path / "anchors"
    place.write_text("epsledger/cut off\n1\n")
    with pytest.raises(AnchorInvalid, match="no whole note"):
        books.checkpoint(ALICE, to=[place])
    with books._store.snapshot() as snapshot:
        assert not snapshot.checkpoints()


def test_a_key_that_was_replaced_in_a_place_that_did_not_go_back(location, tmp_path, monkeypatch):
    place, older = tmp_path / "anchors", tmp_path / "older.db"
    with Accountant.open(location) as accountant:
        accountant.create_budget("d", LIMITS, unit="article")
        accountant.checkpoint(ALICE, to=[place])
        accountant.backup(older)
        line = f"key {BOB.verifier_key.to_text()}"
        accountant.checkpoint(ALICE, BOB, to=[place], lines=[line])
    with Accountant.open(older) as accountant, pytest.raises(AnchorInvalid, match="replaced"):
        accountant.checkpoint(ALICE, to=[place])


def test_a_lost_key_stops_verify_in_the_ledger_too(books):
    books.checkpoint(ALICE)
    lines = [f"key {BOB.verifier_key.to_text()}", f"lost {ALICE.verifier_key.hash}"]
    books.checkpoint(BOB, lines=lines)
    with pytest.raises(AnchorInvalid, match="declared lost"):
        books.verify(key=ALICE.verifier_key)
    assert books.verify(key=ALICE.verifier_key, vouched=[BOB.verifier_key]).clean


def test_nobody_replaces_the_key_of_another(books):
    books.checkpoint(ALICE)
    lines = [f"key {BOB.verifier_key.to_text()}", f"lost {ALICE.verifier_key.hash}"]
    books.checkpoint(BOB, lines=lines)
    books.checkpoint(ALICE)
    with pytest.raises(AnchorInvalid, match="further lines"):
        books.checkpoint(BOB, lines=["\u2014 alice x"])


def test_a_checkpoint_that_would_spoil_a_place(books, location, tmp_path):
    place, elsewhere = tmp_path / "anchors", tmp_path / "elsewhere"
    books.checkpoint(ALICE, to=[place])
    line = f"key {BOB.verifier_key.to_text()}"
    with pytest.raises(AnchorInvalid, match=r"the last key is alice\+.*, and not deadbeef"):
        books.checkpoint(BOB, to=[place], lines=[line, "lost deadbeef"])
    with pytest.raises(AnchorInvalid, match=r"the last key is alice\+.*; sign with it, or rotate"):
        books.checkpoint(BOB, to=[place])
    with Accountant.open(tmp_path / "other.db") as other:
        other.create_budget("d", LIMITS, unit="article")
        with pytest.raises(AnchorInvalid, match=f"anchors of ledger {books._store.ledger}"):
            other.checkpoint(ALICE, to=[place])
    lost = f"lost {ALICE.verifier_key.hash}"
    books.checkpoint(BOB, to=[place, elsewhere], lines=[line, lost])
    books.checkpoint(BOB, to=[place, elsewhere], lines=[line, lost])  # done again
    books.checkpoint(BOB, to=[place, elsewhere])
    key, vouched = ALICE.verifier_key, [BOB.verifier_key]
    assert books.verify([read_notes(place)], key=key, vouched=vouched).clean


def test_a_checkpoint_that_was_not_published_is_not_in_the_ledger(books, location, tmp_path):
    with pytest.raises(AnchorUnavailable):
        books.checkpoint(ALICE, to=[tmp_path / "no such folder" / "anchors"])
    (found,) = (each for each in examine(location) if each.what == "anchor")
    assert not found.ok
    assert "no checkpoint was ever signed" in found.detail
