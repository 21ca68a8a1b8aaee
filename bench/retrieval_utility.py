"""What guarded retrieval is worth on BBC News: headlines ask, bodies answer, by MiniLM embeddings.

Each article's headline asks an index that does not have the article (ten folds). Every release is
drawn by the guard and paid for in a ledger; budgets here are wide, and what one of some epsilon
would take is counted beside it. Embeddings are computed once, into out/bbc-embeddings.npz.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from accountant import Accountant
from dp import Event, Gaussian, GumbelTopK, adaptive, planned, uses_that_fit
from epsledger.demo.corpus import TOPICS, Article, load_articles
from epsledger.demo.encoder import encode
from retrieval import PrivateIndex, RetrievalGuard
from retrieval.grid import on_grid

DELTA, FOLDS, THRESHOLD = 1e-6, 10, 0.2
WORDS, KEYWORD_QUESTIONS = 2000, 300
KEPT = Path("out/bbc-embeddings.npz")


def embedded() -> tuple[list[Article], NDArray[np.float32], NDArray[np.float32]]:
    """Return the articles, and the vectors of their bodies and headlines."""
    articles = load_articles()
    if not KEPT.exists():
        torch.set_num_threads(1)
        KEPT.parent.mkdir(exist_ok=True)
        bodies = encode([one.body for one in articles], lambda _: None).embeddings
        headlines = encode([one.headline for one in articles], lambda _: None, 32).embeddings
        np.savez(KEPT, bodies=bodies, headlines=headlines)
    with np.load(KEPT) as kept:
        return articles, kept["bodies"], kept["headlines"]


ARTICLES, BODIES, HEADLINES = embedded()
TOPIC = np.array([TOPICS.index(one.topic) for one in ARTICLES])
UNITS = sorted({one.unit for one in ARTICLES})
FOLD_OF_UNIT = dict(
    zip(UNITS, np.random.default_rng(0).integers(0, FOLDS, len(UNITS)), strict=True)
)
FOLD = np.array([FOLD_OF_UNIT[one.unit] for one in ARTICLES])
TERMS = [set(re.findall(r"[a-z]{4,}", one.body.lower())) for one in ARTICLES]
# A public word list is written down beforehand; the frequent words of the corpus stand in for it.
VOCABULARY = [word for word, _ in Counter(w for t in TERMS for w in t).most_common(WORDS)]


def index(rows: NDArray[np.bool_], **more: object) -> PrivateIndex:
    """Return an index of some articles."""
    at = np.flatnonzero(rows)
    return PrivateIndex(
        BODIES[at],
        units=[ARTICLES[i].unit for i in at],
        labels=[ARTICLES[i].topic for i in at],
        public_labels=TOPICS,
        terms=[TERMS[i] for i in at],
        public_terms=VOCABULARY,
        **more,
    )


INDEXES = [index(fold != FOLD) for fold in range(FOLDS)]


def guards(accountant: Accountant, name: str) -> list[RetrievalGuard]:
    """Return a guard of each fold's index, under a budget that does not run out."""
    accountant.create_budget(name, adaptive(1e6, DELTA), unit="article")
    return [RetrievalGuard(accountant, name, own, unit="article") for own in INDEXES]


def served(event: Event) -> Iterator[int]:
    """Return how many such queries fit into (1, 3, 10; 1e-6): default, expect and planned each."""
    for epsilon in (1.0, 3.0, 10.0):
        for budget in (
            adaptive(epsilon, DELTA),
            adaptive(epsilon, DELTA, expect=event),
            planned(epsilon, DELTA, slots=[(Gaussian(1e6), 1)]),
        ):
            yield uses_that_fit(budget, (0,) * len(budget.limits), event)


def votes(accountant: Accountant) -> None:
    """Print the accuracy of votes by noise, and how many are served."""
    plain = [
        TOPICS[int(INDEXES[f].histogram(q, THRESHOLD).argmax())]
        for f, q in zip(FOLD, on_grid(HEADLINES), strict=True)
    ]
    found = [INDEXES[f].count(q, THRESHOLD) for f, q in zip(FOLD, on_grid(HEADLINES), strict=True)]
    print(f"vote, threshold {THRESHOLD}, median of {np.median(found):.0f} units found;")
    print(f"  without noise {np.mean([TOPICS.index(p) for p in plain] == TOPIC):.3f}")
    print("  sigma accuracy | served within (epsilon, 1e-6): default, expect, planned")
    print("                 |       epsilon 1            epsilon 3            epsilon 10")
    for sigma in (2.0, 5.0, 10.0, 20.0, 40.0):
        own = guards(accountant, f"votes-{sigma:g}")
        winners = [
            TOPICS.index(own[f].vote(q, threshold=THRESHOLD, noise_multiplier=sigma).winner)
            for f, q in zip(FOLD, HEADLINES, strict=True)
        ]
        counts = list(served(Gaussian(sigma)))
        shown = "  ".join(" ".join(f"{c:>6,}" for c in counts[at : at + 3]) for at in (0, 3, 6))
        print(f"  {sigma:>5g}    {np.mean(winners == TOPIC):.3f} | {shown}")


def per_unit(accountant: Accountant, folder: Path) -> None:
    """Print how votes decay when units pay, over all headlines, in one index."""
    print("per unit, sigma 10, threshold 0.3, all 2,225 headlines in turn (own article included)")
    print("  epsilon   mu     first 500  middle 500  last 500 | global budget answers")
    order = np.random.default_rng(1).permutation(len(ARTICLES))
    for epsilon in (1.0, 3.0, 10.0):
        limits = planned(epsilon, DELTA, slots=[(Gaussian(1e6), 1)])
        alone = uses_that_fit(limits, (0,) * len(limits.limits), Gaussian(10.0))
        mu = math.sqrt(alone) / 10 * (1 - 1e-6)
        name = f"units-{epsilon:g}"
        accountant.create_budget(name, limits, unit="article")
        guard = RetrievalGuard(accountant, name, index(FOLD >= 0), unit="article")
        with guard.per_unit(folder / name, name=name, mu=mu, queries=len(order)) as many:
            right = np.array(
                [
                    many.vote(HEADLINES[at], threshold=0.3, noise_multiplier=10.0).winner
                    == ARTICLES[at].topic
                    for at in order
                ]
            )
        parts = [right[:500].mean(), right[862:1362].mean(), right[-500:].mean()]
        shown = "       ".join(f"{part:.3f}" for part in parts)
        print(f"  {epsilon:>7g}  {mu:.3f}    {shown}    | {alone:,}")


def others(accountant: Accountant) -> None:
    """Print what selections, presence and keywords are worth."""
    own = guards(accountant, "others")
    names = {topic: BODIES[(t == TOPIC) & (FOLD == 0)].mean(0) for t, topic in enumerate(TOPICS)}
    candidates = {topic: v / np.linalg.norm(v) for topic, v in names.items()}
    asking = np.flatnonzero(FOLD == 1)
    print("select 1 of 5 public topic vectors (made of fold 0), headlines of fold 1")
    for epsilon in (0.1, 0.3, 1.0):
        picked = [
            own[FOLD[at]]
            .select(HEADLINES[at], candidates, threshold=THRESHOLD, k=1, epsilon=epsilon)
            .items[0]
            for at in asking
        ]
        right = np.mean([TOPICS.index(p) for p in picked] == TOPIC[asking])
        counts = " ".join(f"{count:,}" for count in served(GumbelTopK(epsilon, 1)))
        print(f"  epsilon {epsilon:>4g} a selection: {right:.3f} | served: {counts}")
    print(
        "anything: a corpus without sport, bar 40, threshold 0.3; yes for (sport, other) headlines"
    )
    lacking = RetrievalGuard(
        accountant, "others", index(TOPICS.index("sports") != TOPIC), unit="article"
    )
    full = RetrievalGuard(accountant, "others", index(FOLD != 1, generation="2"), unit="article")
    sport = [at for at in asking if ARTICLES[at].topic == "sports"]
    rest = [at for at in asking if ARTICLES[at].topic != "sports"]
    for sigma in (5.0, 10.0, 20.0):
        shown = []
        for name, guard, rows in (
            ("lacking, sport", lacking, sport),
            ("full, sport", full, sport),
            ("full, other", full, rest),
        ):
            yes = [
                guard.anything(
                    HEADLINES[at], threshold=0.3, bar=math.ceil(3.1 * sigma), noise_multiplier=sigma
                ).anything
                for at in rows
            ]
            shown.append(f"{name} {np.mean(yes):.3f}")
        print(f"  sigma {sigma:>3g}, bar {math.ceil(3.1 * sigma):>3}: " + ", ".join(shown))
    print(f"keywords: 5 of {WORDS:,} words, share of the best five's count that is kept")
    asked = asking[:KEYWORD_QUESTIONS]
    for epsilon in (0.5, 1.0, 2.0):
        kept = []
        for at in asked:
            guard, own_index = own[FOLD[at]], INDEXES[FOLD[at]]
            items = guard.keywords(HEADLINES[at], threshold=THRESHOLD, k=5, epsilon=epsilon).items
            counts = own_index.terms_of(
                own_index.retrieved(on_grid(HEADLINES[at][None])[0], THRESHOLD)
            )
            best = np.sort(counts)[-5:].sum()
            kept.append(sum(counts[VOCABULARY.index(word)] for word in items) / max(1, best))
        print(f"  epsilon {epsilon:>3g} a word: {np.mean(kept):.3f}")
    print("centroid: topics of the 5 nearest of 200 public articles (fold 2), by noise")
    public = np.flatnonzero(FOLD == 2)
    alone = _topics_of_nearest(HEADLINES[asked], public, TOPIC[asked])
    print(f"  the query alone {alone:.3f}")
    for sigma in (0.5, 2.0, 5.0):
        vectors = [
            own[FOLD[at]]
            .centroid(HEADLINES[at], threshold=THRESHOLD, noise_multiplier=sigma)
            .vector
            for at in asked
        ]
        right = _topics_of_nearest(np.array(vectors), public, TOPIC[asked])
        print(f"  sigma {sigma:>3g}: {right:.3f}")


def _topics_of_nearest(
    vectors: NDArray[np.floating], public: NDArray[np.intp], topics: NDArray[np.intp]
) -> float:
    nearest = np.argsort(-(vectors @ BODIES[public].T), axis=1)[:, :5]
    return float(np.mean(TOPIC[public[nearest]] == topics[:, None]))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, Accountant.open("memory:") as accountant:
        votes(accountant)
        others(accountant)
        per_unit(accountant, Path(folder))


if __name__ == "__main__":
    main()
