"""Released answers as documents: words for a language model's prompt, the guarantee beside them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from numpy.typing import ArrayLike

from retrieval.answers import Answer, Count, Generation, Presence, Selection, Vote
from retrieval.guard import RetrievalGuard
from retrieval.questions import Guarantee

Embed = Callable[[str], ArrayLike]
"""Takes the text of a query; returns its vector, of shape (dimensions,) and L2 norm 1."""
Ask = Callable[[RetrievalGuard, ArrayLike], Answer]
"""Asks the guard about a vector, for instance
``partial(RetrievalGuard.vote, threshold=0.3, noise_multiplier=10.0)``."""
Metadata = dict[str, Any]


def documents(
    guard: RetrievalGuard,
    query: str,
    *,
    embed: Embed,
    ask: Ask,
    passages: Mapping[str, str] | None = None,
) -> list[tuple[str, Metadata]]:
    """Ask the guard; return its answer as texts with metadata, and nothing else of the corpus.

    Args:
        guard: Answers, or refuses.
        query: Not protected: it is the asker's, and taken as public.
        embed: Returns the vector of the query.
        ask: Asks the guard about it.
        passages: PUBLIC texts by label or item, fixed without looking at the corpus: those of a
            vote's winner or a selection's items follow the answer.

    Returns:
        One text and its metadata, the same for an answer of nothing; then the public passages.

    Raises:
        AccountantError: Refusals, as the guard raises them.
        InvalidQuery: If the query is malformed; nothing was charged.
    """
    guarantee = guard.guarantee()
    answer = ask(guard, embed(query))
    text, metadata = released(answer, guarantee)
    public = passages or {}
    return [
        (text, metadata),
        *((public[name], metadata | {"item": name}) for name in _named(answer) if name in public),
    ]


def released(answer: Answer, guarantee: Guarantee) -> tuple[str, Metadata]:
    """Return the answer in plain words, and its values with the guarantee as metadata.

    >>> from dp import NeighboringRelation
    >>> guarantee = Guarantee(epsilon=3.0, delta=1e-6, unit="article",
    ...                       relation=NeighboringRelation.ADD_REMOVE, budgets=("news",))
    >>> text, metadata = released(Vote(seq=7, counts={"x": 3, "y": 41}, noise=10.0), guarantee)
    >>> print(text)  # doctest: +NORMALIZE_WHITESPACE
    On this question, units of a private corpus vote: about 41 for 'y', about 3 for 'x'. A unit is
    one article. Noise of standard deviation 10 was added to each number: differences below 23 may
    be noise.
    >>> metadata["winner"], metadata["epsilon"], metadata["neighboring"], metadata["protects"]
    ('y', 3.0, 'add_remove', 'corpus')
    """
    metadata = {
        "release": type(answer).__name__.lower(),
        **json.loads(answer.to_json()),
        "epsilon": guarantee.epsilon,
        "delta": guarantee.delta,
        "unit": guarantee.unit,
        "neighboring": guarantee.relation.value,
        "budget": ", ".join(guarantee.budgets),
        "protects": "corpus",
    }
    if isinstance(answer, Vote):
        metadata["winner"] = answer.winner
    if isinstance(answer, Presence):
        metadata["anything"] = answer.anything
    return _in_words(answer, f"A unit is one {guarantee.unit}."), metadata


def _in_words(answer: Answer, unit: str) -> str:
    match answer:
        case Vote():
            ordered = sorted(answer.counts.items(), key=lambda vote: -vote[1])
            votes = ", ".join(f"{_about(count)} for {name!r}" for name, count in ordered)
            return (
                f"On this question, units of a private corpus vote: {votes}. {unit} Noise of"
                f" standard deviation {answer.noise:g} was added to each number: differences below"
                f" {2.33 * answer.noise:.0f} may be noise."
            )
        case Count():
            return (
                f"On this question, a private corpus has {_about(answer.value)} units. {unit}"
                f" Noise of standard deviation {answer.noise:g} was added to the number."
            )
        case Presence():
            held = "reaches" if answer.anything else "does not reach"
            return (
                f"On this question, a private corpus has {_about(answer.value)} units, which"
                f" {held} the bar of {answer.bar}. {unit}"
                f" Noise of standard deviation {answer.noise:g} was added to the number."
            )
        case Selection():
            items = ", ".join(map(repr, answer.items))
            return (
                "Of a public list, these have most units of a private corpus on this question,"
                f" best first: {items}. {unit} They were selected with noise."
            )
        case Generation():
            return answer.text
        case _:
            return f"Of a private corpus, this was released: {answer.to_json().decode()}. {unit}"


def _about(count: int) -> str:
    return f"about {max(count, 0)}"


def _named(answer: Answer) -> tuple[str, ...]:
    match answer:
        case Vote():
            return (answer.winner,)
        case Selection():
            return answer.items
        case _:
            return ()
