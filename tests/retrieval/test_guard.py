"""The guard: no answer without a durable charge, no look at the corpus without one either."""

import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
from scipy import stats

from accountant import (
    Accountant,
    BudgetExceeded,
    KeyReused,
    ReleaseUnknown,
    ReservationError,
    UnitMismatch,
    UnknownBudget,
)
from dp import Gaussian, InvalidParameter, SparseVector, adaptive
from retrieval import (
    AboveThreshold,
    InvalidQuery,
    NoCorpusGuarantee,
    PrivateIndex,
    ReleaseFailed,
    RetrievalGuard,
    SessionEnded,
)
from retrieval.grid import on_grid


class Watched(PrivateIndex):
    """An index that counts how often it was read, and checks that each time was paid for."""

    reads = 0
    accountant = None

    def retrieved(self, query, threshold):
        self.reads += 1
        if self.accountant is not None:
            assert self.accountant.statement("b").activities[0].uses == self.reads
        return super().retrieved(query, threshold)


@pytest.fixture
def accountant(tmp_path):
    with Accountant.open(tmp_path / "ledger.db") as accountant:
        accountant.create_budget("b", adaptive(3.0, 1e-6), unit="article", units=300)
        yield accountant


@pytest.fixture
def index(accountant):
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(300, 16)).astype(np.float32) + 1
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return Watched(
        vectors,
        units=[f"u{row}" for row in range(300)],
        labels=["x" if row % 4 else "y" for row in range(300)],
        public_labels=["x", "y", "z"],
    )


@pytest.fixture
def guard(accountant, index):
    return RetrievalGuard(accountant, "b", index, unit="article")


QUERY, BASIS = np.full(16, 0.25), np.eye(16)[0]


def queries():
    """Different questions, without an end."""
    rng = np.random.default_rng(7)
    while True:
        query = rng.normal(size=16) + 2
        yield query / np.linalg.norm(query)


def test_a_vote_is_paid_for_before_the_corpus_is_read(accountant, index, guard):
    index.accountant = accountant
    for query in islice(queries(), 5):
        vote = guard.vote(query, threshold=0.3, noise_multiplier=20.0)
    assert index.reads == 5
    assert vote.seq == accountant.statement("b").seq
    assert sorted(vote.counts) == ["x", "y", "z"]
    assert vote.winner == max(vote.counts, key=vote.counts.get)


def test_the_control_that_reads_first_is_caught(accountant, index):
    """The watched index must fail a guard that scores before it charges."""
    index.accountant = accountant
    accountant.charge("b", _event(), unit="article", activity="retrieval/vote")
    index.histogram(on_grid(QUERY[None])[0], 0.3)
    with pytest.raises(AssertionError):
        index.histogram(on_grid(QUERY[None])[0], 0.3)


def _event():
    return Gaussian(20.0)


def test_it_answers_until_the_budget_refuses_and_reads_nothing_after(accountant, index, guard):
    fit = accountant.uses_that_fit("b", _event())
    answered = 0
    with pytest.raises(BudgetExceeded) as refusal:
        for query in queries():
            guard.vote(query, threshold=0.3, noise_multiplier=20.0)
            answered += 1
    assert answered == index.reads == fit
    assert refusal.value.remaining == 0
    for shift in range(10):
        with pytest.raises(BudgetExceeded):
            guard.vote(np.roll(BASIS, shift), threshold=0.3, noise_multiplier=20.0)
    assert index.reads == fit
    assert accountant.statement("b").refused == 11
    assert accountant.verify().clean


def test_the_noise_is_the_charged_one(accountant, index, guard):
    exact = index.histogram(on_grid(QUERY[None])[0], 0.3)
    asked = {"threshold": 0.3, "noise_multiplier": 15.0}
    accountant.create_budget("wide", adaptive(1000.0, 1e-6), unit="article")
    guard = RetrievalGuard(accountant, "wide", index, unit="article")
    noise = np.array(
        [
            np.array(list(guard.vote(QUERY, **asked, key=f"{n}").counts.values())) - exact
            for n in range(700)
        ]
    ).ravel()

    def fits(sigma):
        spread = noise + np.random.default_rng(1).uniform(-0.5, 0.5, noise.size)
        return stats.kstest(spread, "norm", args=(0, sigma)).pvalue > 1e-6

    assert fits(15.0)
    assert not fits(15.0 * 0.7)
    assert not fits(15.0 * 1.5)


def test_labels_get_noise_of_their_own(accountant, index):
    accountant.create_budget("wide", adaptive(1000.0, 1e-6), unit="article")
    guard = RetrievalGuard(accountant, "wide", index, unit="article")
    asked = {"threshold": 0.3, "noise_multiplier": 15.0}
    answers = [guard.vote(QUERY, **asked, key=f"{n}") for n in range(400)]
    counts = np.array([list(answer.counts.values()) for answer in answers])
    # Of 400 pairs, an independent correlation passes 0.3 with probability 1e-9; one draw has 1.
    assert np.abs(np.corrcoef(counts.T)[np.triu_indices(3, 1)]).max() < 0.3


def test_a_key_belongs_to_one_version_of_the_corpus(accountant, guard):
    asked = {"threshold": 0.3, "noise_multiplier": 20.0, "key": "q-1"}
    guard.vote(QUERY, **asked)
    changed = PrivateIndex(
        [QUERY], units=["u"], labels=["x"], public_labels=["x", "y", "z"], generation="2"
    )
    with pytest.raises(KeyReused):
        RetrievalGuard(accountant, "b", changed, unit="article").vote(QUERY, **asked)


def test_a_key_returns_the_same_answer_uncharged(accountant, index, guard):
    first = guard.vote(QUERY, threshold=0.3, noise_multiplier=20.0, key="q-1")
    seq = accountant.statement("b").seq
    again = guard.vote(QUERY, threshold=0.3, noise_multiplier=20.0, key="q-1")
    assert again == replace(first, replayed=True)
    assert (accountant.statement("b").seq, index.reads) == (seq, 1)


@pytest.mark.parametrize(
    "change",
    [{"threshold": 0.4}, {"noise_multiplier": 21.0}, {"query": np.roll([1.0] + [0] * 15, 3)}],
)
def test_a_key_with_another_question_is_an_error(guard, index, change):
    asked = {"query": QUERY, "threshold": 0.3, "noise_multiplier": 20.0, "key": "q-1"}
    guard.vote(**asked)
    with pytest.raises(KeyReused):
        guard.vote(**(asked | change))
    assert index.reads == 1


def test_an_answer_that_was_lost_is_not_drawn_again(accountant, index, guard, monkeypatch):
    monkeypatch.setattr("accountant.accountant._WAIT_SECONDS", 0.05)

    def crash(*_):
        raise OSError("row 7 is SECRET")

    with monkeypatch.context() as patched:
        patched.setattr(index, "retrieved", crash)
        with pytest.raises(ReleaseFailed, match="OSError") as failure:
            guard.vote(QUERY, threshold=0.3, noise_multiplier=20.0, key="q-1")
    said = "".join(traceback.format_exception(failure.value))
    assert "SECRET" not in said
    assert failure.value.__context__ is failure.value.__cause__ is None
    assert accountant.statement("b").activities[0].uses == 1
    with pytest.raises(ReleaseUnknown):
        guard.vote(QUERY, threshold=0.3, noise_multiplier=20.0, key="q-1")


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"query": QUERY * 2}, InvalidQuery, "norm 2"),
        ({"query": np.full(16, np.nan)}, InvalidQuery, "norm nan"),
        ({"query": np.zeros(16)}, InvalidQuery, "norm 0"),
        ({"query": np.full(4, 0.5)}, InvalidQuery, r"shape \(4,\)"),
        ({"threshold": 1.5}, InvalidQuery, "threshold"),
        ({"threshold": "0.5"}, InvalidQuery, "threshold"),
        ({"query": "headline"}, InvalidQuery, "not a vector of numbers"),
        ({"query": [[1.0], [1.0, 2.0]]}, InvalidQuery, "not a vector of numbers"),
        ({"noise_multiplier": 1e16}, InvalidQuery, "at most"),
        ({"threshold": float("nan")}, InvalidQuery, "threshold"),
        ({"noise_multiplier": float("nan")}, InvalidParameter, "noise_multiplier"),
        ({"noise_multiplier": 0.0}, InvalidParameter, "noise_multiplier"),
    ],
)
def test_a_malformed_query_charges_nothing(accountant, index, guard, change, error, words):
    before = accountant.statement("b")
    with pytest.raises(error, match=words):
        guard.vote(**({"query": QUERY, "threshold": 0.3, "noise_multiplier": 20.0} | change))
    assert accountant.statement("b") == before
    assert index.reads == 0


def test_a_guard_for_another_unit_or_budget_answers_nothing(accountant, index):
    for budget, unit, error in (("b", "author", UnitMismatch), ("c", "article", UnknownBudget)):
        with pytest.raises(error):
            RetrievalGuard(accountant, budget, index, unit=unit).vote(
                QUERY, threshold=0.3, noise_multiplier=20.0
            )
    assert index.reads == 0


def two_votes(accountant, labels, public_labels):
    rows = np.eye(2)
    index = PrivateIndex(rows, units=["a", "b"], labels=labels, public_labels=public_labels)
    return RetrievalGuard(accountant, "b", index, unit="article")


def test_a_key_belongs_to_one_list_of_labels(accountant):
    asked = {"threshold": 0.3, "noise_multiplier": 20.0, "key": "q-1"}
    two_votes(accountant, ["x", "y"], ["x", "y"]).vote([1, 0], **asked)
    with pytest.raises(KeyReused):
        two_votes(accountant, ["y", "x"], ["y", "x"]).vote([1, 0], **asked)


def test_what_is_replayed_is_not_what_a_caller_made_of_it(guard):
    asked = {"query": QUERY, "threshold": 0.3, "noise_multiplier": 20.0}
    first = guard.vote(**asked)
    before = dict(first.counts)
    first.counts["x"] = -99
    assert guard.vote(**asked).counts == before


def test_leases_that_ended_pay_for_nothing_more(accountant, guard):
    with guard.leased() as fast:
        fast.count(QUERY, threshold=0.3, noise_multiplier=20.0)
    spent = accountant.statement("b").spent
    for noise in (20.0, 21.0):  # of a kind that was leased, and of a new one
        with pytest.raises(ReservationError, match="ended"):
            fast.count(BASIS, threshold=0.3, noise_multiplier=noise)
    assert accountant.statement("b").spent == spent
    assert not accountant.statement("b").open_reservations


def test_threads_ask_at_once_and_each_answer_is_paid(accountant, guard, index):
    asked = {"threshold": 0.3, "noise_multiplier": 90.0}
    rows = list(islice(queries(), 80))
    with guard.leased() as fast, ThreadPoolExecutor(8) as pool:
        ways = [fast, guard] * 40
        counts = list(pool.map(lambda way, row: way.count(row, **asked).seq, ways, rows))
    assert len(counts) == accountant.statement("b").activities[0].uses == 80
    assert accountant.verify().clean


@pytest.mark.parametrize("answer", [None, "yes"])
def test_what_cannot_be_called_is_refused_before_it_is_paid(accountant, guard, answer):
    with pytest.raises(InvalidQuery, match="must be a function"):
        guard.answer_vote(QUERY, answer, ["yes"], threshold=0.3, noise_multiplier=20.0, most=3)
    assert not accountant.statement("b").spent


async def later(_):
    return "yes"


def test_what_must_be_awaited_is_refused_before_it_is_paid(accountant, guard):
    with pytest.raises(InvalidQuery, match="awaited"):
        guard.answer_vote(QUERY, later, ["yes"], threshold=0.3, noise_multiplier=20.0, most=3)
    assert not accountant.statement("b").spent


def test_a_raw_read_needs_more_than_blanks_as_a_reason(accountant, guard, index):
    for reason in (None, "", "  "):
        with pytest.raises(NoCorpusGuarantee):
            guard.raw(QUERY, k=2, reason=reason)
    assert index.reads == accountant.statement("b").unprotected == 0
    assert guard.raw(QUERY, k=2, reason="ticket 7: support may read") == guard.raw(
        QUERY, k=2, reason="again"
    )
    assert accountant.statement("b").unprotected == 2
    assert not accountant.statement("b").spent


def test_threads_that_ask_a_session_at_once_get_no_yes_too_many():
    start = threading.Barrier(8)

    def count(_):
        start.wait()  # all have found an answer of yes left
        return 10**6

    event = SparseVector(1.0, 1.0, 1, monotone=True)
    session = AboveThreshold(1, event, 5, count)

    def ask(_):
        try:
            return session.ask(QUERY)
        except SessionEnded:
            return False

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(ask, range(8))) == 1
    assert session.left == 0
