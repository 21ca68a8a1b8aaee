"""Sub-linear scans by random hyperplanes that do not depend on the data.

A row is looked at if it is on the query's side of every hyperplane of some table. That is a
function of the row, the query and a public seed, so that a unit's score still depends on the unit
alone: what an approximate index that was built from the rows cannot say. What is lost is recall.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dp import validate
from dp.errors import InvalidParameter
from retrieval.grid import on_grid

_MOST_BITS = 62


@dataclass(frozen=True, slots=True)
class Hashing:
    """Which rows a query looks at.

    Attributes:
        bits: Hyperplanes of a table: rows are looked at about 2**bits times less often.
        tables: Independent tables; a row is looked at if any of them says so.
        seed: Public, and chosen without looking at the corpus.

    >>> hashing = Hashing(bits=4, tables=16)
    >>> [round(hashing.recall(cosine), 2) for cosine in (0.3, 0.5, 0.7, 0.9)]
    [0.89, 0.97, 1.0, 1.0]
    """

    bits: int
    tables: int
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("bits", "tables"):
            validate.count(**{name: getattr(self, name)})
        if self.bits > _MOST_BITS:
            raise InvalidParameter("bits", self.bits, f"at most {_MOST_BITS}")
        if not isinstance(self.seed, int) or self.seed < 0:
            raise InvalidParameter("seed", self.seed, "an integer of at least 0")

    def recall(self, cosine: float) -> float:
        """Return the share of rows at this cosine that are looked at (Charikar 2002).

        At cosine 0 it is the share of all rows where few are alike: what a query costs.
        """
        same_side = 1 - math.acos(cosine) / math.pi
        return float(1 - (1 - same_side**self.bits) ** self.tables)


class HashTables:
    """The rows of one index, by the side of the hyperplanes that they are on."""

    def __init__(self, hashing: Hashing, rows: NDArray[np.float32]) -> None:
        shape = (hashing.tables * hashing.bits, rows.shape[1])
        planes = np.random.default_rng(hashing.seed).normal(size=shape).astype(np.float32)
        self._planes, self._bits = on_grid(planes), hashing.bits
        codes = self._codes(rows)
        self._orders = [np.argsort(column, kind="stable") for column in codes]
        self._sorted = [column[order] for column, order in zip(codes, self._orders, strict=True)]

    def candidates(self, query: NDArray[np.float32]) -> NDArray[np.intp]:
        """Return the rows to look at, in order."""
        found = []
        for code, order, column in zip(
            self._codes(query[None])[:, 0], self._orders, self._sorted, strict=True
        ):
            start, end = np.searchsorted(column, code), np.searchsorted(column, code, "right")
            found.append(order[start:end])
        return np.unique(np.concatenate(found))

    def _codes(self, rows: NDArray[np.float32]) -> NDArray[np.int64]:
        """Return the sides as bits, of shape (tables, rows). Products on the grid are exact."""
        places = np.int64(1) << np.arange(self._bits, dtype=np.int64)
        codes: NDArray[np.int64] = np.stack(
            [
                (rows @ planes.T >= 0) @ places
                for planes in self._planes.reshape(-1, self._bits, rows.shape[1])
            ]
        )
        return codes
