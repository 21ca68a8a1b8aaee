"""Random sequences of calls on guards: nothing is looked at unpaid, and nothing is paid for twice.

The index sees every use of its private arrays, and at the first one of a call a second reader of
the ledger must find it paid for. Calls are all releases, by charge, by key and from leases, over
budgets that run out or are closed, with malformed arguments, crashes at each point between the
charge and the answer, new versions of the corpus, and guards of the wrong budget or unit.
"""

from __future__ import annotations

import random
import tempfile
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from accountant import Accountant, AccountantError, BudgetClosed
from accountant.entries import HOLDS, SPENDS
from accountant.reader import Reader
from dp import DPError, adaptive, sampling
from retrieval import Hashing, NoCorpusGuarantee, RetrievalError, RetrievalGuard
from tests.retrieval.calls import QUERY, RELEASES, ROWS, TOKENS, ask, small, watched
from tests.strategies import SCALE

WIDE, NARROW = adaptive(30.0, 1e-6), adaptive(3.0, 1e-6)
ERRORS = (AccountantError, RetrievalError, DPError)


class Crash(BaseException):
    """The process died, as far as the call is concerned."""


class Crashing(Accountant):
    """An accountant whose caller dies just after something became durable."""

    def __init__(self, store):
        super().__init__(store)
        self.crash, self.kept = None, []

    def charge(self, *args, **options):
        receipt = super().charge(*args, **options)
        if self.crash == "charged":
            raise Crash
        return receipt

    def keep_answer(self, budget, key, answer):
        if self.crash == "before it is kept":
            raise Crash
        super().keep_answer(budget, key, answer)
        self.kept.append(answer)
        if self.crash == "kept":
            raise Crash


MALFORMED = [
    {"query": QUERY * 2},
    {"query": QUERY[:3]},
    {"query": [np.nan] * 4},
    {"query": None},
    {"threshold": 1.5},
    {"threshold": np.nan},
    {"noise_multiplier": 0.0},
    {"noise_multiplier": 1e300},
    {"bar": 1.5},
    {"k": 9},
    {"k": 0},
    {"epsilon": -1.0},
    {"candidates": {}},
    {"candidates": {"bad": [0.0] * 4}},
    {"answers": {"yes", "no"}},
    {"most": 0},
    {"tokens": 0},
]
releases = st.sampled_from(list(RELEASES))
queries = st.integers(0, 2)
keys = st.none() | st.sampled_from(["key 1", "key 2"])
crashes = st.sampled_from([None] * 6 + ["charged", "looked", "before it is kept", "kept"])


class Calls(RuleBasedStateMachine):
    """The guard under test, and what a second reader must find in the ledger."""

    kind: type[RetrievalGuard] = RetrievalGuard
    seen: ClassVar[Counter] = Counter()

    def __init__(self):
        super().__init__()
        self.stack = ExitStack()
        self.drawn, self.raws = Counter(), 0
        self.activity, self.looks, self.crash = None, 0, None
        self.leases, self.session = [], None
        self.generation, self.closed = 1, False

    @initialize(
        sqlite=st.sampled_from([False] * 15 + [True]),
        budget=st.sampled_from([WIDE, NARROW]),
        hashing=st.sampled_from([None, Hashing(bits=1, tables=3)]),
    )
    def open(self, sqlite, budget, hashing):
        if sqlite:
            folder = self.stack.enter_context(tempfile.TemporaryDirectory())
            self.accountant = self.stack.enter_context(Crashing.open(f"{folder}/ledger.db"))
            self.books = self.stack.enter_context(Reader.open(f"{folder}/ledger.db"))
        else:
            self.accountant = self.stack.enter_context(Crashing.open("memory:"))
            self.books = Reader(self.accountant._store)
        self.accountant.create_budget("b", budget, unit="person")
        self.index, self.budget = watched(small(hashing), self.look), "b"
        self.new_guard()
        self.seen["in files" if sqlite else "in memory"] += 1

    def new_guard(self):
        self.guard = self.kind(self.accountant, "b", self.index, unit="person")
        self.answered = {}

    # --- what is watched --------------------------------------------------------------------------

    def look(self):
        """Called at each use of the private arrays: at a call's first, its charge is durable."""
        if not self.looks:
            assert self.activity is not None, "the corpus was looked at outside of a call"
            now = self.books.statement("b")
            if self.activity == "raw":
                assert now.unprotected == self.raws + 1, "looked before the read was recorded"
            else:
                paid = self.uses(now)[self.activity]
                assert paid > self.drawn[self.activity], f"{self.activity}: looked before it paid"
        self.looks += 1
        if self.crash == "looked":
            raise Crash

    def uses(self, statement):
        return Counter({each.name.split("/")[1]: each.uses for each in statement.activities})

    def call(self, activity, function, crash=None):
        """The answer or the error, whether it was looked, and the ledger before and after."""
        before = self.books.statement("b")
        self.activity, self.looks = activity, 0
        self.crash = self.accountant.crash = crash
        try:
            answer = function()
        except (*ERRORS, Crash) as error:
            answer = error
        self.activity = self.crash = self.accountant.crash = None
        return answer, bool(self.looks), before, self.books.statement("b")

    def nothing_happened(self, looked, before, after):
        assert not looked
        assert (self.uses(after), after.unprotected) == (self.uses(before), before.unprotected)

    # --- calls ------------------------------------------------------------------------------------

    @rule(asks=st.lists(st.tuples(releases, queries, keys, st.booleans(), crashes), max_size=5))
    def ask(self, asks):
        for each in asks:
            self.ask_one(*each)

    def ask_one(self, release, query, key, lease, crash):
        guard = self.leases[-1][1] if lease and self.leases else self.guard
        options = {} if key is None or not RELEASES[release][1] else {"key": key}
        answer, looked, before, after = self.call(
            release, lambda: ask(guard, release, ROWS[query], **options), crash
        )
        self.seen[type(answer).__name__] += 1
        if isinstance(answer, Crash):
            charged = (self.uses(after) - self.uses(before))[release]
            assert looked or (crash == "charged" and charged == 1) or (options and not charged)
            whole = TOKENS if release == "generate" else 1  # a reservation that is left is spent
            self.drawn[release] += whole if looked else charged
        elif isinstance(answer, ERRORS):
            self.nothing_happened(looked, before, after)
        elif answer.replayed:
            self.nothing_happened(looked, before, after)
            first = replace(answer, replayed=False)
            released = self.answered.get((release, query), [])
            assert first in released or first.to_json() in self.accountant.kept
        else:
            assert looked, f"{release} answered without looking"
            entry = after.lines[answer.seq - 1].entry
            assert entry.kind in SPENDS | HOLDS
            assert entry.activity == f"retrieval/{release}"
            assert options or not RELEASES[release][1] or (release, query) not in self.answered
            used = len(answer.tokens) + answer.ended if release == "generate" else 1
            self.drawn[release] += used
            assert self.uses(after)[release] >= self.drawn[release], "an answer is not paid for"
            self.answered.setdefault((release, query), []).append(answer)

    @precondition(lambda self: self.answered)
    @rule(which=st.integers(0, 23), lease=st.booleans())
    def ask_again(self, which, lease):
        """An equal question without a key is free, also when nothing is left."""
        release, query = list(self.answered)[which % len(self.answered)]
        if RELEASES[release][1]:
            guard = self.leases[-1][1] if lease and self.leases else self.guard
            answer, *rest = self.call(release, lambda: ask(guard, release, ROWS[query]))
            self.nothing_happened(*rest)
            assert replace(answer, replayed=False) in self.answered[release, query]
            self.seen["replayed"] += 1

    @rule(release=releases, change=st.sampled_from(MALFORMED), lease=st.booleans())
    def ask_malformed(self, release, change, lease):
        if change.keys() <= {"query", *RELEASES[release][0]}:
            guard = self.leases[-1][1] if lease and self.leases else self.guard
            answer, *rest = self.call(release, lambda: ask(guard, release, **change))
            assert isinstance(answer, RetrievalError | DPError)
            self.nothing_happened(*rest)

    @rule(release=releases, wrong=st.sampled_from([("c", "person"), ("b", "household")]))
    def ask_a_wrong_guard(self, release, wrong):
        guard = self.kind(self.accountant, wrong[0], self.index, unit=wrong[1])
        answer, *rest = self.call(release, lambda: ask(guard, release))
        assert isinstance(answer, AccountantError)
        self.nothing_happened(*rest)

    @rule(reason=st.sampled_from([None, "", "ticket 7"]), crash=crashes)
    def raw(self, reason, crash):
        answer, looked, before, after = self.call(
            "raw", lambda: self.guard.raw(QUERY, k=2, reason=reason), crash
        )
        if looked:
            self.raws += 1
            assert after.unprotected == self.raws
        else:
            self.nothing_happened(looked, before, after)
            assert isinstance(answer, BudgetClosed if reason else NoCorpusGuarantee)

    @rule(positives=st.integers(1, 2), crash=crashes)
    def open_session(self, positives, crash):
        noise = {"threshold_noise": 4.0, "query_noise": 4.0}
        answer, looked, before, after = self.call(
            "above_threshold",
            lambda: self.guard.above_threshold(threshold=0.5, bar=2, positives=positives, **noise),
            crash,
        )
        assert not looked
        if isinstance(answer, ERRORS):
            self.nothing_happened(looked, before, after)
        else:
            assert self.uses(after) - self.uses(before) == {"above_threshold": 1}
            self.drawn["above_threshold"] += 1
            self.session = None if isinstance(answer, Crash) else answer

    @precondition(lambda self: self.session is not None)
    @rule(query=st.sampled_from([*ROWS[:3], QUERY * 2]))
    def ask_the_session(self, query):
        left = self.session.left
        self.drawn["above_threshold"] -= 1  # its session paid for it
        answer, looked, before, after = self.call(
            "above_threshold", lambda: self.session.ask(query)
        )
        self.drawn["above_threshold"] += 1
        self.nothing_happened(False, before, after)
        if isinstance(answer, ERRORS):
            assert not looked
            assert not left or query[0] == 2
        else:
            assert looked
            assert self.session.left == left - answer

    # --- what else happens ------------------------------------------------------------------------

    @rule()
    def lease(self):
        if not self.leases:
            context = self.guard.leased()
            self.leases.append((context, context.__enter__()))

    @precondition(lambda self: self.leases)
    @rule()
    def end_the_lease(self):
        context, _ = self.leases.pop()
        context.__exit__(None, None, None)

    @rule()
    def change_the_corpus(self):
        self.end_all_leases()
        self.generation += 1
        self.looks, self.activity = 1, "none"  # a look of the owner's
        changed = small(self.index.hashing, "other").without(
            ["eve"], generation=f"{self.generation}"
        )
        self.index = watched(changed, self.look)
        self.new_guard()

    @precondition(lambda self: not self.closed and self.generation > 1)
    @rule()
    def close_the_budget(self):
        self.accountant.close_budget("b")
        self.closed = True

    def end_all_leases(self):
        while self.leases:
            self.end_the_lease()

    def teardown(self):
        with self.stack:
            if hasattr(self, "guard"):
                self.end_all_leases()
                assert self.uses(self.books.statement("b")) == self.drawn, "paid for more or less"
                assert self.books.verify().clean


class LooksFirst(RetrievalGuard):
    """Broken: it draws the answer, and then pays for it."""

    def _answer(self, question, _, draw):
        answer = draw(0)
        return replace(answer, seq=self._payments.pay(question).seq)


class NeverPays(RetrievalGuard):
    """Broken: it answers from the entry of somebody else."""

    def _answer(self, *asked):
        return asked[-1](1)


class PaysForReplays(RetrievalGuard):
    """Broken: an equal question is charged, and drawn, again."""

    def _answer(self, question, kind, draw):
        self._released.clear()
        return super()._answer(question, kind, draw)


class RedrawsForKeys(RetrievalGuard):
    """Broken: a retry with a key is drawn again, for the charge of the first time."""

    def _answer(self, question, _, draw):
        return replace(draw(self._payments.pay(question).seq), replayed=question.key is not None)


def run(machine, sequences, **options):
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=sequences,
            stateful_step_count=12,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            **options,
        ),
    )


def gauss(size, scale):
    return np.array([random.gauss(0, scale) for _ in range(size)])


@pytest.fixture(autouse=True)
def repeatable(monkeypatch):
    """Noise that Hypothesis seeds, no block that depends on the clock, no wait for lost answers."""
    monkeypatch.setattr(sampling, "gaussian", gauss)
    monkeypatch.setattr(sampling, "gumbel", gauss)
    monkeypatch.setattr(sampling, "discrete_laplace", lambda scale: round(random.gauss(0, scale)))
    monkeypatch.setattr("accountant.reservations._BLOCK_SECONDS", 1e9)
    monkeypatch.setattr("accountant.accountant._WAIT_SECONDS", 0.0)


@pytest.mark.parametrize("sequences", [200, pytest.param(20_000, marks=pytest.mark.long)])
def test_any_sequence_of_calls_pays_first_and_once(sequences):
    Calls.seen.clear()
    run(Calls, sequences * SCALE, derandomize=SCALE == 1)
    print(f"sequences and calls: {dict(Calls.seen)}")


@pytest.mark.parametrize("broken", [LooksFirst, NeverPays, PaysForReplays, RedrawsForKeys])
def test_the_control_is_caught(broken):
    machine = type("Broken", (Calls,), {"kind": broken})
    with pytest.raises(AssertionError):
        run(machine, 200, phases=[Phase.generate], derandomize=True)
