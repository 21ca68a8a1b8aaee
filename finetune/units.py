"""The privacy unit of fine-tuning: units that own several rows, and rows that hold several units.

DP-SGD samples rows and clips the gradient of each, so what it protects is one row. A document cut
into chunks and an author of many messages own several rows; a sequence that is packed holds parts
of several documents. A :class:`UnitMap` says which rows hold something of which unit, and then
there are two sound ways to a guarantee for a unit:

* sample units: :class:`OneRowPerUnit` makes each unit one row, and the budget's unit is the unit;
* sample rows and pay for the group: :class:`CappedRows` bounds the rows of a unit, the budget's
  unit is the row, and :func:`unit_guarantee` says what that is worth for a unit. It is much less.

>>> authors = ["ann", "bob", "ann", "ann"]
>>> rows = ["a1", "b1", "a2", "a3"]
>>> units = UnitMap.of(rows, authors)
>>> units.most_rows, units.check_units(1300)
(3, 1300)
>>> drawn = OneRowPerUnit(rows, units)
>>> len(drawn), drawn[1]
(2, 'b1')

How many units there are, how many rows each has, and the ids are private; the numbers that a
plan and a report show are declared ones, and are checked without being told.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from torch.utils.data import Dataset

from dp import Filter, InvalidParameter, NeighboringRelation, NothingFits, validate
from dp.readings import group, lifetime_delta
from finetune.distributed import as_on_rank_0
from finetune.errors import UnitIdsInvalid
from finetune.unit_map import Rows, UnitMap

_OS = secrets.SystemRandom()

_USELESS = 1000.0
"""An epsilon beyond it is no answer."""


class OneRowPerUnit(Dataset[Any]):
    """A map-style dataset with one row for each unit, drawn from its rows at every access.

    Guarantee: with Poisson sampling of this dataset and one clipped gradient for each of its
    rows, the privacy unit is the unit and the relation is add/remove of a whole unit, at the plan's
    own price, however many rows a unit has (user-level sampling: Charles et al., "Fine-Tuning
    Large Language Models with User-Level Differential Privacy", 2024; McMahan et al., 2018).

    Why the draw costs nothing: suppose that what was drawn for every unit were published. Given
    that, a step is the Poisson subsampled Gaussian mechanism, in which a unit adds one vector of at
    most the clipping norm, or nothing; so it has the plan's price. The draws themselves are alike
    with and without a unit, because each depends on its own unit alone, and keeping them back is
    post-processing. A draw that looked at other units (to balance topics, to leave out what is
    near to another's rows) would break this, and so would a seed that is used for anything else;
    here every access asks the operating system, in worker processes too.

    Not covered: a unit that gains or loses single rows (that replaces the unit: a group of 2),
    units that share rows or were put under several ids, and a ``join`` that looks elsewhere.

    Args:
        rows: Map-style dataset.
        units: Of these rows, none of them shared.
        most: Most rows of a unit that one access draws, without replacement.
        join: Makes one row of a list of 1 to ``most`` rows in the order of the dataset, for
            instance by concatenation and cutting to length, or by stacking them along a new first
            dimension. Needed where ``most`` is above 1.

    Raises:
        UnitIdsInvalid: If the map is of other rows, or rows are shared.
        InvalidParameter: If ``most`` is below 1, or ``join`` is needed.

    >>> rows = [[1], [2], [3], [9]]
    >>> units = UnitMap.of(rows, ["ann", "ann", "ann", "bob"])
    >>> OneRowPerUnit(rows, units, most=3, join=lambda several: sum(several, []))[0]
    [1, 2, 3]
    """

    def __init__(
        self,
        rows: Rows,
        units: UnitMap,
        *,
        most: int = 1,
        join: Callable[[list[Any]], Any] | None = None,
    ) -> None:
        _check_owned(rows, units)
        if validate.count(most=most) > 1 and join is None:
            raise InvalidParameter("join", join, f"a function that makes one row of {most}")
        self._rows, self._most, self._join = rows, most, join
        self._owned = tuple(units.rows_of.values())

    def __len__(self) -> int:
        return len(self._owned)

    def __getitem__(self, index: int) -> Any:
        """Draw from the rows of a unit."""
        mine = self._owned[index]
        drawn = sorted(_OS.sample(mine, min(self._most, len(mine))))
        return self._joined(drawn)

    def example_of(self, index: int) -> Any:
        """Return the first rows of a unit, and not a draw: what two processes can compare."""
        return self._joined(self._owned[index][: self._most])

    def _joined(self, drawn: Sequence[int]) -> Any:
        rows = [self._rows[row] for row in drawn]
        return rows[0] if self._join is None else self._join(rows)


class CappedRows(Dataset[Any]):
    """A map-style dataset of rows, with at most so many of each unit; the others are dropped.

    The rows are chosen uniformly by the operating system when this is made, whatever is in
    them, and anew by a process that resumes.

    On several processes, all of them make it, after ``init_process_group``; rank 0 chooses.

    Guarantee: one unit is at most ``most`` steps between neighboring datasets of rows. With Poisson
    sampling of the rows the budget's unit is the row, and a unit, which moves the clipped sum of
    a step by up to ``most`` clipping norms, has what :func:`unit_guarantee` says and no more. It
    has that only if every operation of the budget reads rows with this cap.

    Args:
        rows: Map-style dataset.
        units: Of these rows, none of them shared.
        most: Most rows of a unit; a public number.

    Attributes:
        units: The map of the rows that were kept.
        dropped: How many were not; private.

    Raises:
        UnitIdsInvalid: If the map is of other rows, or rows are shared.
        InvalidParameter: If ``most`` is below 1.

    >>> rows = ["a1", "a2", "a3", "b1"]
    >>> capped = CappedRows(rows, UnitMap.of(rows, ["ann", "ann", "ann", "bob"]), most=2)
    >>> len(capped), capped.dropped, capped.units.check_group(2)
    (3, 1, 2)
    """

    def __init__(self, rows: Rows, units: UnitMap, *, most: int) -> None:
        _check_owned(rows, units)
        validate.count(most=most)
        kept = as_on_rank_0(
            {
                row: unit
                for unit, mine in units.rows_of.items()
                for row in _OS.sample(mine, min(most, len(mine)))
            }
        )
        self._rows, self._kept = rows, sorted(kept)
        self.units = UnitMap.of(self, (kept[row] for row in self._kept))
        self.dropped = units.rows - len(kept)

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Any:
        """Return a row that was kept."""
        return self._rows[self._kept[index]]


def _check_owned(rows: Rows, units: UnitMap) -> None:
    if len(rows) != units.rows:
        raise UnitIdsInvalid("the map is of another number of rows; make it of these")
    if units.shared:
        raise UnitIdsInvalid(
            "holds several units, so no draw is one unit's own; put one unit in each row",
            min(units.shared),
        )


# --- what rows are worth for units --------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class UnitGuarantee:
    """What a budget whose unit is the row guarantees to a unit that owns several.

    Attributes:
        epsilon: For one unit, in nats.
        delta: For one unit.
        size: Most steps between neighboring datasets of rows that a unit takes.
        row_epsilon: The point of the budget's curve that gives it: epsilon for one row.
        row_delta: And its delta.
    """

    epsilon: float
    delta: float
    size: int
    row_epsilon: float
    row_delta: float

    def __str__(self) -> str:
        """Return the guarantee in words, its figures rounded up."""
        return (
            f"a unit of at most {self.size} rows (a shared one counts twice) is protected with"
            f" epsilon {_up(self.epsilon)} at delta {self.delta!r}: group privacy under add/remove,"
            f" {self.size} times the epsilon {_up(self.row_epsilon)} of one row"
        )


def unit_guarantee(budget: Filter, *, size: int, delta: float | None = None) -> UnitGuarantee:
    """Convert the guarantee of a budget whose unit is the row to units of several rows.

    The least epsilon that the chain of neighbors gives (:func:`dp.readings.group`) over all points
    of the budget's own curve (:func:`dp.readings.lifetime_delta`), to 1e-6 of it and rounded up. It
    holds for the budget's whole life and for adaptively chosen operations, under add/remove of
    a whole unit whose removal takes at most ``size`` steps between neighboring datasets of rows. It
    is an upper bound and not tight: drawing units instead of rows gives a unit far more.

    Args:
        budget: Its limits.
        size: A public number: what ``check_group`` of all rows returned. The cap of
            :class:`CappedRows` will do only if every operation of the budget reads capped rows.
        delta: For one unit; the budget's own, unless given.

    Raises:
        InvalidParameter: If the relation is not add/remove, or a number is outside its domain.
        NothingFits: If no point of the curve has an epsilon at that delta. A delta that does not
            fall with epsilon, like the part that ``adaptive`` sets aside for operations with a
            delta of their own, grows by exp(epsilon) for each further row.

    >>> from dp import adaptive, pure
    >>> print(unit_guarantee(pure(0.5), size=3))
    a unit of at most 3 rows (a shared one counts twice) is protected with epsilon 1.5 at delta...
    >>> unit_guarantee(adaptive(2.0, 1e-5), size=8)
    Traceback (most recent call last):
    dp.errors.NothingFits: ...
    """
    validate.count(size=size)
    if budget.relation is not NeighboringRelation.ADD_REMOVE:
        raise InvalidParameter("relation", budget.relation.value, "add_remove, to add rows up")
    delta = budget.delta if delta is None else validate.delta(delta=delta)

    def row_delta(epsilon: float) -> float:
        own = budget.delta if epsilon >= budget.epsilon else 1.0
        return min(own, lifetime_delta(budget, epsilon))

    def enough(epsilon: float) -> bool:
        return group(epsilon, row_delta(epsilon), size=size)[1] * (1 + 1e-9) <= delta

    tried = (budget.epsilon * 2 ** (eighth / 8) for eighth in range(-24, 65))
    tried = (epsilon for epsilon in tried if 1e-6 <= epsilon <= _USELESS / size)
    low = high = next(tried, math.inf)
    while high < math.inf and not enough(high):
        low, high = high, next(tried, math.inf)
    if high < math.inf:
        for _ in range(20):
            middle = (low + high) / 2
            low, high = (low, middle) if enough(middle) else (middle, high)
        return UnitGuarantee(_product(size, high), delta, size, high, row_delta(high))
    raise NothingFits(
        f"{budget} for one row says nothing about a unit of {size} rows at delta {delta!r}: sample"
        " units with OneRowPerUnit, keep fewer rows, or spend less on this budget"
    )


def _product(size: int, epsilon: float) -> float:
    """Return the product as a float that is not below it."""
    exact = size * Fraction(epsilon)
    nearest = float(exact)
    return nearest if nearest >= exact else math.nextafter(nearest, math.inf)


def _up(epsilon: float) -> str:
    return f"{math.ceil(epsilon * 1e4) / 1e4:.4f}".rstrip("0").rstrip(".")
