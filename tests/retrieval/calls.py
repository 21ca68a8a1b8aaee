"""A small corpus, a call of every release, and an index that sees each look at its arrays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np

from retrieval import Hashing, PrivateIndex
from retrieval.ensembles import Sampler

ROWS = np.array(
    [[1, 0, 0, 0], [0.6, 0.8, 0, 0], [0.8, 0, 0.6, 0], [0, 0.6, 0.8, 0], [0, 0, 0, 1], [0.5] * 4]
)
UNITS = ["ann", "bob", "bob", "cat", "dan", "eve"]
LABELS = ["ill", "well", "well", "ill", "well", "ill"]
TERMS = [["fever", "cough"], ["cough"], [], ["fever", "rash"], ["rash"], ["other"]]
QUERY = ROWS[0]
PUBLIC = {"first": ROWS[0], "second": ROWS[1], "third": ROWS[3]}


def small(hashing: Hashing | None = None, generation: str = "1") -> PrivateIndex:
    """Six rows of five units."""
    return PrivateIndex(
        ROWS,
        units=UNITS,
        labels=LABELS,
        public_labels=["ill", "well"],
        terms=TERMS,
        public_terms=["fever", "cough", "rash"],
        hashing=hashing,
        generation=generation,
    )


class Words:
    """A language model of four tokens, the last of which ends a text."""

    end = 3

    def begin(self, prompt: str) -> Callable[[int | None], np.ndarray]:
        return lambda before: np.float32([len(prompt), 1, 2, (before or 0) + 2])

    def decode(self, tokens: Any) -> str:
        return " ".join(map(str, tokens))


NOISY = {"threshold": 0.5, "noise_multiplier": 4.0}
TOKENS = 3
RELEASES: dict[str, tuple[dict[str, Any], bool]] = {
    "vote": (NOISY, True),
    "count": (NOISY, True),
    "anything": (NOISY | {"bar": 3}, True),
    "centroid": (NOISY, True),
    "select": ({"candidates": PUBLIC, "threshold": 0.5, "k": 2, "epsilon": 0.5}, True),
    "keywords": ({"threshold": 0.5, "k": 2, "epsilon": 0.5}, True),
    "answer_vote": (
        NOISY | {"answer": lambda _: "yes", "answers": ["yes", "no"], "most": 2},
        False,
    ),
    "generate": (
        {
            "model": Words(),
            "prompt": lambda unit: unit or "",
            "threshold": 0.5,
            "most": 2,
            "tokens": TOKENS,
            "sampler": Sampler(clip=1.0, divisor=8.0),
        },
        False,
    ),
}
"""What each release is asked with, and whether equal questions are replayed."""


def ask(guard: Any, release: str, query: Any = QUERY, **changed: Any) -> Any:
    """Ask one release, with its arguments of the table but for those that are changed."""
    return getattr(guard, release)(query, **RELEASES[release][0] | changed)


class Seen(np.ndarray):
    """An array that calls ``look`` whenever its elements are used; its shape may be read."""

    look: Callable[[], None]

    def __array_ufunc__(self, ufunc, method, *inputs, **options):
        self.look()
        return getattr(ufunc, method)(*map(_plain, inputs), **options)

    def __array_function__(self, function, types, inputs, options):
        self.look()
        return function(*(_plain(each) for each in inputs), **options)

    def __getitem__(self, at):
        self.look()
        return _plain(self)[at]

    def __array_finalize__(self, other):
        self.look = getattr(other, "look", None)


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value))
    return value.view(np.ndarray) if isinstance(value, Seen) else value


def watched(index: PrivateIndex, look: Callable[[], None]) -> PrivateIndex:
    """Let every use of the index's private arrays call ``look``."""

    def seen(array: np.ndarray) -> Seen:
        view = array.view(Seen)
        view.look = look
        return view

    own = index._columns
    arrays = {field.name: getattr(own, field.name) for field in fields(own)}
    arrays = {name: seen(one) for name, one in arrays.items() if isinstance(one, np.ndarray)}
    index._columns = replace(own, **arrays)
    if index._tables is not None:
        index._tables._orders = list(map(seen, index._tables._orders))
        index._tables._sorted = list(map(seen, index._tables._sorted))
    return index
