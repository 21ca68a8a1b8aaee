"""Answers in words: one call of a language model for each retrieved unit, and a private mean.

[1] Amin, Bie, Kong, Kurakin, Ponomareva, Syed, Terzis, Vassilvitskii, "Private prediction for
    large-scale synthetic text generation" (2024), arXiv:2407.12108.
[2] Vinod, Pillutla, Thakurta, "InvisibleInk: high-utility and low-cost text generation with
    differential privacy" (2025), arXiv:2507.02974 (clipping of differences, public support).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from dp import ExponentialMechanism, sampling, validate
from retrieval.errors import InvalidQuery, ReleaseFailed

_LOG = logging.getLogger(__name__)
_FINE = 2.0**20
"""Steps between 0 and the clipping norm: what is summed are integers, in any order the same."""
T = TypeVar("T")
U = TypeVar("U")

Logits = NDArray[np.float32] | NDArray[np.float64]
Continuation = Callable[[int | None], NDArray[np.float32]]
"""Takes the token before (None at first); returns the next one's logits, of shape (vocabulary,)."""


class LanguageModel(Protocol):
    """A model that continues prompts; what it says of one must not depend on other prompts.

    That excludes batches of prompts: their products differ in the last bits with what else is in
    the batch. It excludes limits that prompts share, too (of a rate, a time or a memory): whether a
    call fails must not depend on the other units.
    """

    @property
    def end(self) -> int | None:
        """The token that ends a text, if there is one."""

    def begin(self, prompt: str) -> Continuation:
        """Return what continues this prompt."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens."""


@dataclass(frozen=True, slots=True)
class Sampler:
    """How the next token is drawn from one public and many private distributions [1, 2].

    The logits are l + sum over units of clip(l_u - l, -clip, clip) / divisor, with l those of the
    public prompt; the token is drawn with probability proportional to exp(logits / temperature).

    Attributes:
        clip: Most that a unit may move a logit, times the divisor.
        divisor: Public and fixed: how many units are expected, never how many were found.
        temperature: Of the softmax.
        top_k: Only tokens whose PUBLIC logit is within 2 * clip / divisor of the k-th largest are
            drawn; all if None.

    >>> Sampler(clip=2.0, divisor=32).event
    ExponentialMechanism(epsilon=0.25)
    """

    clip: float
    divisor: float
    temperature: float = 1.0
    top_k: int | None = None

    def __post_init__(self) -> None:
        for name in ("clip", "divisor", "temperature"):
            validate.positive(**{name: getattr(self, name)})
        if self.top_k is not None:
            validate.count(top_k=self.top_k)

    @property
    def event(self) -> ExponentialMechanism:
        """What one token costs: a unit that leaves takes its part back, and another brings one."""
        return ExponentialMechanism(4 * self.clip / self.divisor / self.temperature)

    def draw(self, public: Logits, private: Iterable[NDArray[np.float32]]) -> int:
        """Return the next token.

        Args:
            public: Logits of the public prompt, of shape (vocabulary,).
            private: Those of each unit's prompt; where they are no numbers, they change nothing.

        Raises:
            InvalidQuery: If the public ones are no logits.
        """
        scores = self.scores(public, private)
        return int(np.argmax(scores + sampling.gumbel(len(scores), 1.0)))

    def scores(self, public: Logits, private: Iterable[NDArray[np.float32]]) -> NDArray[np.float64]:
        """Return what tokens are drawn by: with probability proportional to exp(score).

        Args and errors as for :meth:`draw`. NOT private.
        """
        base = checked_logits(public)
        total = np.zeros(len(base), np.int64)
        contribution = or_none(partial(self._contribution, base))
        for steps in map(contribution, private):
            if steps is not None:
                total += steps
        # The largest is moved to 0: where base is large, rounding would move more than a unit may.
        moved = base - base.max() + total * (self.clip / self.divisor / _FINE)
        if self.top_k is not None and self.top_k < len(base):
            least = np.partition(base, -self.top_k)[-self.top_k] - 2 * self.clip / self.divisor
            moved[base < least] = -math.inf
        with np.errstate(over="ignore"):
            scores: NDArray[np.float64] = moved / self.temperature
        return scores

    def _contribution(
        self, base: NDArray[np.float64], logits: NDArray[np.float32]
    ) -> NDArray[np.int64]:
        """Return a unit's clipped difference, in steps: a function of this unit alone."""
        own = np.asarray(logits, np.float64)
        if own.shape != base.shape:
            return np.zeros(len(base), np.int64)
        with np.errstate(invalid="ignore", over="ignore"):
            difference = np.nan_to_num((own - base) / self.clip, nan=0.0)
        return np.rint(np.clip(difference, -1, 1) * _FINE).astype(np.int64)


def checked_logits(public: Logits) -> NDArray[np.float64]:
    """Return the logits of a public prompt.

    Raises:
        InvalidQuery: If they are not those of tokens; -inf is one that is never drawn.

    >>> checked_logits(np.float32([0.5, -np.inf]))
    array([ 0.5, -inf])
    """
    try:
        base = np.array(public, np.float64)  # a copy: a model may use its buffer again
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidQuery(f"the public logits are not an array of numbers: {error}") from error
    if base.ndim != 1 or np.isnan(base).any() or not np.isfinite(base.max(initial=-math.inf)):
        raise InvalidQuery(f"the public logits, of shape {base.shape}, are not those of tokens")
    return base


def or_none(function: Callable[[T], U]) -> Callable[[T], U | None]:
    """Return the function, with None for what it raises: whether it fails on a unit is private.

    The owner finds the error in the log at level debug. Memory that runs out is another thing: it
    would make what others say depend on this unit, and ends the release.
    """

    def guarded(unit: T) -> U | None:
        try:
            return function(unit)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is private
            exhausted = isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__
            _LOG.debug("a unit's answer failed, and does not count", exc_info=True)
        if exhausted:
            raise ReleaseFailed(
                "a model ran out of memory, which one unit can do to the others; it was paid for,"
                " and nothing is released: ask fewer units, or shorter prompts"
            )
        return None

    return guarded


def ballots(
    answers: Sequence[str], answer: Callable[[str], str | None], units: Sequence[str]
) -> NDArray[np.int64]:
    """Return how many units answer what, of shape (answers,); anything else is no vote."""
    place = {text: at for at, text in enumerate(answers)}
    given = [text for text in map(or_none(answer), units) if isinstance(text, str)]
    votes = np.array([place[text] for text in given if text in place], np.intp)
    return np.bincount(votes, minlength=len(answers))


def begun(model: LanguageModel, public: str) -> tuple[Continuation, NDArray[np.float64]]:
    """Return what continues the public prompt, and its first logits: before anything is paid for.

    Raises:
        InvalidQuery: If they are not those of tokens.
    """
    base = model.begin(public)
    return base, checked_logits(base(None))


def generated(
    model: LanguageModel,
    sampler: Sampler,
    public: tuple[Continuation, NDArray[np.float64]],
    private: Callable[[], Sequence[str]],
    mark: Callable[[], object],
    most: int,
) -> tuple[tuple[int, ...], bool]:
    """Return tokens, each marked before private data is touched for it, and whether they ended.

    Args:
        model: Continues the prompts.
        sampler: Draws each token.
        public: A prompt without private data, :func:`begun`.
        private: Returns one prompt of each unit.
        mark: Pays for one token.
        most: Of tokens.
    """
    base, logits = public
    drawn: list[int] = []
    own: list[Callable[[int | None], NDArray[np.float32] | None]] = []
    while True:
        mark()
        if not drawn:
            prompts = map(or_none(model.begin), private())
            own = [or_none(step) for step in prompts if step is not None]
        before = drawn[-1] if drawn else None
        heard = (step(before) for step in own)
        token = sampler.draw(logits, (each for each in heard if each is not None))
        if token == model.end:
            return tuple(drawn), True
        drawn.append(token)
        if len(drawn) == most:
            return tuple(drawn), False
        logits = checked_logits(base(token))
