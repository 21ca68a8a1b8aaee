"""Released answers, as frozen values. Anything computed from them is free (post-processing)."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What all answers say of themselves.

    Attributes:
        seq: The ledger entry that paid for it.
        replayed: Whether it is the answer to an equal question from before, free of charge.
    """

    seq: int
    replayed: bool = False

    def to_json(self) -> bytes:
        """Return the answer as it is kept for a retry."""
        return json.dumps({each.name: getattr(self, each.name) for each in fields(self)}).encode()

    @classmethod
    def from_json(cls, kept: bytes) -> Self:
        """Return the answer that was kept: a replay."""
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in json.loads(kept).items()
        }
        return cls(**(fields | {"replayed": True}))


@dataclass(frozen=True, slots=True, kw_only=True)
class Vote(Answer):
    """A noisy vote over public labels or answers.

    Attributes:
        counts: Noisy number of voting units by public label; may be negative.
        noise: Standard deviation of the noise on each, in votes.
    """

    counts: dict[str, int]
    noise: float

    @property
    def winner(self) -> str:
        """The label with the largest noisy count."""
        return max(self.counts, key=lambda label: self.counts[label])

    @property
    def margin(self) -> int:
        """Between the largest two noisy counts.

        With noise of standard deviation s, the winner of two is right with 95 % where the true
        margin is at least 2.33 s.
        """
        first, *others = sorted(self.counts.values(), reverse=True)
        return first - others[0] if others else first


@dataclass(frozen=True, slots=True, kw_only=True)
class Count(Answer):
    """A noisy number of units; may be negative.

    Attributes:
        value: The number.
        noise: Standard deviation of the noise on it, in units.
    """

    value: int
    noise: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Presence(Answer):
    """Whether there is anything on a question.

    Attributes:
        value: The noisy number of units.
        bar: From which number there is.
        noise: Standard deviation of the noise on the number, in units.
    """

    value: int
    bar: int
    noise: float

    @property
    def anything(self) -> bool:
        """Whether the noisy number reaches the bar."""
        return self.value >= self.bar


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection(Answer):
    """Items of a public list, best first, without their counts.

    Attributes:
        items: The selected ones.
    """

    items: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Centroid(Answer):
    """The noisy sum of the best rows of the units that a question finds.

    Attributes:
        vector: Its coordinates; not of norm 1.
    """

    vector: tuple[float, ...]

    def nearest(self, public_vectors: NDArray[np.float32], *, k: int = 1) -> NDArray[np.intp]:
        """Return the k PUBLIC vectors with the largest inner products, best first.

        Args:
            public_vectors: Array of shape (vectors, dimensions).
            k: How many.
        """
        order: NDArray[np.intp] = np.argsort(public_vectors @ np.array(self.vector))[::-1][:k]
        return order


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation(Answer):
    """Text that was generated token by token.

    Attributes:
        tokens: As the model numbers them, without the end token.
        text: The same, decoded.
        ended: Whether the model ended it, before the most tokens that were asked for.
    """

    tokens: tuple[int, ...]
    text: str
    ended: bool
