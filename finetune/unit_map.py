"""Which rows hold something of which privacy unit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

from dp import validate
from finetune.errors import DeclaredExceeded, UnitIdsInvalid


class Rows(Protocol):
    """A map-style dataset."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True, slots=True, repr=False)
class UnitMap:
    """Which rows hold something of which unit; make one with :meth:`of` or :meth:`packed`.

    Two ids are one unit if they are equal: ``"Ann"`` and ``"ann "`` are two.

    Attributes:
        rows: Number of rows.
        rows_of: The positions of each unit's rows, in ascending order; private.
    """

    rows: int
    rows_of: Mapping[Hashable, tuple[int, ...]]

    @classmethod
    def of(cls, rows: Rows, ids: Iterable[Any] | None) -> UnitMap:
        """Map rows that belong to one unit each, as chunks belong to the document they are of.

        Args:
            rows: The dataset; only its length is read.
            ids: One for each row, in the order of the rows: texts or whole numbers, or tuples of
                them; arrays and tensors are read as numbers.

        Raises:
            UnitIdsInvalid: If an id is missing (None, NaN, blank), cannot be compared by value, or
                is of another type than the others; if there are more or fewer ids than rows; or
                if there are no rows.

        >>> documents = {"d1": "to be or not", "d2": "to be"}
        >>> chunks = [(name, word) for name, text in documents.items() for word in text.split()]
        >>> units = UnitMap.of(chunks, (name for name, _ in chunks))
        >>> units.most_rows, units.group_size
        (4, 4)
        """
        return cls._checked(rows, None if ids is None else ((each,) for each in ids))

    @classmethod
    def packed(cls, rows: Rows, ids: Iterable[Collection[Any]] | None) -> UnitMap:
        """Map rows that hold parts of several units: let what packs tokens carry their ids along.

        A unit that crosses a boundary is in two rows. A packed row does not disappear with one of
        its units, it changes, and that is two steps between neighbors, one row less and one more.

        What is compared is this dataset, and the same without the unit's own rows and with its
        places in packed rows left blank. Where other units would move up into these places, as
        they do when all documents are joined and cut into blocks, one unit changes every row after
        it, and no number of this map bounds that. Let the place of a unit depend on nothing but
        the unit: a row, or a bin of several that is then cut off, chosen by a hash of its id.

        Args:
            rows: The dataset; only its length is read.
            ids: For each row the ids of all units in it, repeated or not.

        Raises:
            UnitIdsInvalid: As :meth:`of`; or if a row comes with no id, or not with several.

        >>> tokens = ["a"] * 5 + ["b"] * 5
        >>> blocks = [tokens[at : at + 4] for at in range(0, 10, 4)]
        >>> units = UnitMap.packed(blocks, blocks)
        >>> units.rows_of, units.shared, units.group_size
        ({'a': (0, 1), 'b': (1, 2)}, frozenset({1}), 3)
        """
        return cls._checked(rows, None if ids is None else map(_several, ids))

    @classmethod
    def _checked(cls, rows: Rows, ids: Iterable[Iterable[Any]] | None) -> UnitMap:
        if not len(rows):
            raise UnitIdsInvalid("the dataset has no rows; there is nothing to train on")
        if ids is None:
            raise UnitIdsInvalid("there are no unit ids; give one for each row")
        found: dict[Hashable, list[int]] = {}
        kinds: set[type] = set()
        row = -1
        for row, held in enumerate(ids):
            mine = dict.fromkeys(_checked_id(each, row, kinds) for each in held)
            if not mine:
                raise UnitIdsInvalid("holds no unit; leave it out, or name the units in it", row)
            for unit in mine:
                found.setdefault(unit, []).append(row)
        if row + 1 != len(rows):
            more = "more" if row + 1 > len(rows) else "fewer"
            raise UnitIdsInvalid(
                f"there are {more} ids than rows; give the ids of these rows, in their order"
            )
        return cls(len(rows), {unit: tuple(places) for unit, places in found.items()})

    @property
    def most_rows(self) -> int:
        """In how many rows a unit is at most; private."""
        return max(map(len, self.rows_of.values()))

    @property
    def shared(self) -> frozenset[int]:
        """The rows that hold several units; private."""
        held = Counter(row for mine in self.rows_of.values() for row in mine)
        return frozenset(row for row, units in held.items() if units > 1)

    @property
    def group_size(self) -> int:
        """Most steps between neighboring datasets of rows that one unit takes; private.

        One for each row of its own, two for each row that it shares.
        """
        shared = self.shared
        return max(sum(1 + (row in shared) for row in mine) for mine in self.rows_of.values())

    def check_units(self, declared: int) -> int:
        """Return a public bound on the number of units, for ``TrainingPlan.for_units``.

        Raises:
            DeclaredExceeded: If there are more. That this was raised is itself not private:
                declare a bound that holds for whatever the data may be.
        """
        if len(self.rows_of) > validate.count(declared=declared):
            raise DeclaredExceeded(
                "units", declared, "declare a public bound that holds, or leave units out"
            )
        return declared

    def check_group(self, declared: int) -> int:
        """Return a public bound on :attr:`group_size`; 1 is what training by rows assumes.

        Raises:
            DeclaredExceeded: If a unit takes more, as for :meth:`check_units`.
        """
        if self.group_size > validate.count(declared=declared):
            raise DeclaredExceeded(
                "rows of one unit (one that it shares counts twice)",
                declared,
                "sample units with OneRowPerUnit, or keep fewer rows with CappedRows",
            )
        return declared


def _several(held: Any) -> Iterable[Any]:
    """Return the ids of a packed row; a text would be read as the ids of its letters."""
    if isinstance(held, str | bytes) or not isinstance(held, Iterable):
        raise UnitIdsInvalid(
            f"a packed row comes with a collection of ids, got {type(held).__name__};"
            " of rows with one id each make UnitMap.of"
        )
    return held


def _checked_id(value: Any, row: int, kinds: set[type]) -> Hashable:
    plain = _plain(value)
    parts = plain if isinstance(plain, tuple) else (plain,)
    if any(isinstance(part, tuple) for part in parts):
        raise UnitIdsInvalid("its unit id is a tuple of tuples; use a flat one", row)
    if not parts or any(map(_missing, parts)):
        raise UnitIdsInvalid("its unit id is missing; give it one, or leave the row out", row)
    if not all(map(_has_value, parts)):
        raise UnitIdsInvalid(
            f"its unit id, of type {type(value).__name__}, cannot be looked up by its value;"
            " use a text or a whole number",
            row,
        )
    if any(isinstance(part, float) for part in parts):
        raise UnitIdsInvalid("its unit id is a float, and two may round to one", row)
    kinds.add(type(plain) if plain is not parts else tuple(map(type, parts)))  # type: ignore[arg-type]
    if len(kinds) > 1:
        names = " and ".join(sorted(getattr(kind, "__name__", str(kind)) for kind in kinds))
        raise UnitIdsInvalid(f"ids are of types {names}; 7 and '7' would be two units", row)
    return cast(Hashable, plain)


def _plain(value: Any) -> Any:
    """Return an id without tensors and array scalars: equal tensors have different hashes."""
    plain = value.tolist() if hasattr(value, "tolist") else value
    return tuple(map(_plain, plain)) if isinstance(plain, tuple) else plain


def _has_value(part: Any) -> bool:
    equal: Any = type(part).__eq__
    try:
        hash(part)
    except TypeError:
        return False
    return equal is not object.__eq__


def _missing(part: Any) -> bool:
    if part is None or (isinstance(part, str | bytes) and not part.strip()):
        return True
    try:
        return bool(part != part)  # noqa: PLR0124 - NaN
    except TypeError:  # NA of pandas
        return True
