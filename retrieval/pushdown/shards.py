"""One corpus of several, each with units of its own: their counts add up."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from heapq import merge
from itertools import pairwise
from typing import Protocol, TypeVar

import numpy as np

from retrieval.columns import Floats, Integers
from retrieval.errors import InvalidIndex
from retrieval.index import Corpus

T = TypeVar("T")


class Shard(Corpus, Protocol):
    """A corpus that names its units."""

    def units(self) -> Generator[str, None, None]:
        """Yield the names of the units once each, in order of their code points. NOT private."""


class Shards:
    """A corpus whose units are spread over shards, each of them in one. They count side by side.

    Args:
        shards: The parts, such as a :class:`~retrieval.pushdown.DuckDBCorpus` on each machine.
            Every PostgreSQL shard needs its own connection.

    Attributes:
        dimensions: Of all shards.
        public_labels: Of all shards.
        generation: Of all shards, together.

    Raises:
        InvalidIndex: If there is none, they differ in dimensions or public labels, or a unit is in
            two of them: it would count twice.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._shards = tuple(shards)
        kinds = {(shard.dimensions, shard.public_labels) for shard in self._shards}
        if len(kinds) != 1:
            raise InvalidIndex("shards must have the same dimensions and public labels, in order")
        ((self.dimensions, self.public_labels),) = kinds
        self.generation = json.dumps([shard.generation for shard in self._shards])
        with ExitStack() as streams:
            names = [streams.enter_context(closing(shard.units())) for shard in self._shards]
            for last, name in pairwise(merge(*names)):
                if name <= last:
                    raise InvalidIndex(
                        f"unit {name!r} is in two shards, or they do not list units in order; put"
                        " all rows of a unit in one shard"
                    )

    def histogram(self, query: Floats, threshold: float) -> Integers:
        """Return how many units of each label score at least the threshold; see ``Corpus``."""
        counts: Integers = np.sum(self._each(lambda at: at.histogram(query, threshold)), axis=0)
        return counts

    def count(self, query: Floats, threshold: float) -> int:
        """Return how many units score at least the threshold."""
        return sum(self._each(lambda at: at.count(query, threshold)))

    def _each(self, ask: Callable[[Shard], T]) -> list[T]:
        with ThreadPoolExecutor(len(self._shards)) as threads:
            return list(threads.map(ask, self._shards))
