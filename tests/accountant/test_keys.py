"""Idempotency keys: at most one charge and at most one draw of noise for each."""

from __future__ import annotations

import threading

import pytest

from accountant import (
    Accountant,
    BudgetExceeded,
    InvalidRequest,
    KeyReused,
    ReleaseUnknown,
)
from dp import PureDP, Repeated


def ask(accountant: Accountant, key: str | None = "q-1", **changes: object):
    request = {
        "budget": "tips",
        "event": PureDP(1.0),
        "uses": 1,
        "unit": "article",
        "activity": "vote",
        "payload": b"question, dataset version 3",
    }
    return accountant.charge(**{**request, **changes}, key=key)


def test_a_replay_returns_the_stored_answer_and_spends_nothing(accountant, location, digest_of):
    first = ask(accountant)
    assert first.answer is None
    accountant.keep_answer("tips", "q-1", b"spam")
    before = digest_of(location)
    for _ in range(3):
        replay = ask(accountant)
        assert (replay.seq, replay.digest, replay.answer) == (first.seq, first.digest, b"spam")
    assert digest_of(location) == before


def test_a_replay_is_the_same_after_reopening_and_when_the_budget_is_full(accountant, location):
    first = ask(accountant)
    accountant.keep_answer("tips", "q-1", b"")
    ask(accountant, None, uses=8)
    accountant.close()
    with Accountant.open(location) as reopened:
        assert ask(reopened).digest == first.digest
        assert ask(reopened, note="a note is no part of the request").answer == b""
        assert ask(reopened, event=Repeated(PureDP(1.0), 1)).answer == b""


@pytest.mark.parametrize(
    "change",
    [
        {"payload": b"another question"},
        {"payload": b""},
        {"uses": 2},
        {"event": PureDP(0.5)},
        {"activity": "another"},
    ],
)
@pytest.mark.parametrize("answered", [True, False])
def test_the_key_of_another_request_is_an_error(accountant, location, digest_of, change, answered):
    ask(accountant)
    if answered:
        accountant.keep_answer("tips", "q-1", b"spam")
    before = digest_of(location)
    with pytest.raises(KeyReused) as error:
        ask(accountant, **change)
    assert error.value.key == "q-1"
    assert digest_of(location) == before


def test_charged_but_never_answered_is_not_drawn_again(
    accountant, location, digest_of, monkeypatch
):
    monkeypatch.setattr("accountant.accountant._WAIT_SECONDS", 0.1)
    ask(accountant)
    before = digest_of(location)
    with pytest.raises(ReleaseUnknown) as error:
        ask(accountant)
    assert error.value.key == "q-1"
    assert digest_of(location) == before
    accountant.keep_answer("tips", "q-1", b"late")
    assert ask(accountant).answer == b"late"


def test_a_refused_ask_keeps_no_key(accountant):
    with pytest.raises(BudgetExceeded):
        ask(accountant, uses=20)
    with pytest.raises(InvalidRequest, match="no charge waits"):
        accountant.keep_answer("tips", "q-1", b"spam")
    assert ask(accountant).answer is None


def test_an_answer_is_stored_once(accountant, location, digest_of):
    ask(accountant)
    accountant.keep_answer("tips", "q-1", b"spam")
    before = digest_of(location)
    for budget, key in [("tips", "q-1"), ("tips", "q-2"), ("news", "q-1"), ("absent", "q-1")]:
        with pytest.raises(InvalidRequest, match="no charge waits"):
            accountant.keep_answer(budget, key, b"ham")
    assert digest_of(location) == before


def test_keys_belong_to_one_budget(accountant):
    first = ask(accountant)
    assert ask(accountant, budget="news").budget == "news"
    assert first.budget == "tips"


def test_no_key_means_no_replay(accountant):
    assert [ask(accountant, None).seq for _ in range(3)] == [2, 3, 4]


def test_of_many_equal_asks_at_once_one_is_charged(accountant, location, totals_of, monkeypatch):
    monkeypatch.setattr("accountant.accountant._WAIT_SECONDS", 0.1)
    outcomes, start = [], threading.Barrier(8)

    def go() -> None:
        start.wait()
        try:
            outcomes.append(ask(accountant).seq)
        except ReleaseUnknown:
            outcomes.append(None)

    threads = [threading.Thread(target=go) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes, key=str) == [2] + [None] * 7
    assert totals_of(location, "tips") == accountant.budget("tips").filter.price(PureDP(1.0))
