"""Requests: what can be asked of a ledger, as frozen values that are checked when they are made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from accountant.budgets import Budget, label, of_type
from accountant.errors import InvalidRequest
from dp import Event, Filter, NeighboringRelation, NonPrivate, validate
from dp.accountings import limits_hold

WHOLE_LEDGER = ""
"""What a request that looks at all budgets locks; no budget has that name."""

Uses = tuple[tuple[Event, int], ...]
"""Events, each with its number of uses."""
Holds = tuple[tuple[str, int], ...]
"""What one reservation holds: in each budget, the ``seq`` of its entry."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """Proof that something is in the ledger.

    Attributes:
        budget: Name of the budget.
        seq: Position of the entry in the budget's chain.
        digest: Digest of the entry, 32 bytes in hexadecimal.
        answer: The stored answer where this is the replay of a key, else None.
        uses: How many uses the entry is about.
        linked: The receipts in the other budgets that the same operation was charged to.
    """

    budget: str
    seq: int
    digest: str
    answer: bytes | None = None
    uses: int = 0
    linked: tuple[Receipt, ...] = ()


@dataclass(frozen=True, slots=True)
class Open:
    """Ask for a new budget, with what was spent before there was a ledger."""

    budget: Budget
    imported: Uses = ()

    def __post_init__(self) -> None:
        of_type(Budget, budget=self.budget)
        limits = self.budget.filter
        if Filter.from_record(limits.to_record()) != limits or not limits_hold(limits):
            raise InvalidRequest(
                f"budget {self.budget.name!r}: its limits are not those of its epsilon and delta;"
                " make the filter with dp.pure, dp.adaptive or dp.planned"
            )
        for event, uses in self.imported:
            of_type(Event, event=event)
            validate.count(uses=uses)

    @property
    def names(self) -> frozenset[str]:
        """What it locks."""
        others = {self.budget.supersedes, self.budget.quota_of} - {None}
        return frozenset({WHOLE_LEDGER, self.budget.name, *others})  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Close:
    """Ask that a budget admits nothing any more."""

    budget: str
    note: str = ""

    def __post_init__(self) -> None:
        label(budget=self.budget)
        if self.note != "":
            label(note=self.note)

    @property
    def names(self) -> frozenset[str]:
        """What it locks."""
        return frozenset({self.budget})


@dataclass(frozen=True, slots=True)
class Ask:
    """Ask to run an event: the common part of everything that spends.

    ``budgets``: all that it is charged to, all or none; the first gives the receipt.
    """

    budgets: tuple[str, ...]
    event: Event
    uses: int
    unit: str
    relation: NeighboringRelation
    activity: str
    note: str = ""

    def __post_init__(self) -> None:
        _named_once(self.budgets)
        of_type(Event, event=self.event)
        validate.count(uses=self.uses)
        label(unit=self.unit)
        of_type(NeighboringRelation, relation=self.relation)
        label(activity=self.activity)
        if self.note != "":
            label(note=self.note)

    @property
    def names(self) -> frozenset[str]:
        """What it locks."""
        return frozenset(self.budgets)


@dataclass(frozen=True, slots=True)
class Unprotected:
    """Ask to record one read of private data as it is. It spends nothing: no price covers it.

    ``note``: the reason. There is no sensitivity, so it is about no neighboring relation.
    """

    event: ClassVar[Event] = NonPrivate()
    uses: ClassVar[int] = 1
    budgets: tuple[str, ...]
    unit: str
    activity: str
    note: str

    def __post_init__(self) -> None:
        _named_once(self.budgets)
        label(unit=self.unit)
        label(activity=self.activity)
        label(note=self.note)

    @property
    def names(self) -> frozenset[str]:
        """What it locks."""
        return frozenset(self.budgets)


def _named_once(budgets: tuple[str, ...]) -> None:
    of_type(tuple, budgets=budgets)
    for budget in budgets:
        label(budget=budget)
    if not budgets or len(set(budgets)) < len(budgets):
        raise InvalidRequest(f"budgets must be named once each, got {budgets!r}")


@dataclass(frozen=True, slots=True)
class Charge(Ask):
    """Ask to spend at once. ``payload`` is a digest of everything that the answer depends on."""

    key: str | None = None
    payload: bytes = b""

    def __post_init__(self) -> None:
        Ask.__post_init__(self)
        of_type(bytes, payload=self.payload)
        if self.key is not None:
            label(key=self.key)


@dataclass(frozen=True, slots=True)
class Correct(Ask):
    """Ask to record a spend that was missed; it is recorded even where it does not fit."""

    @property
    def names(self) -> frozenset[str]:
        """What it locks: all, for a budget that supersedes one of these must have it, too."""
        return frozenset({WHOLE_LEDGER, *self.budgets})


@dataclass(frozen=True, slots=True)
class Reserve(Ask):
    """Ask to put uses aside for ``holder``, who marks each durably."""

    holder: str = ""


@dataclass(frozen=True, slots=True)
class Borrow(Reserve):
    """Ask for a block of a lease: at most ``uses``, fewer as the limit comes near.

    Its holder marks in memory, and says how many when it settles.
    """


@dataclass(frozen=True, slots=True)
class _OfHolder:
    """What only the holder of a reservation may ask."""

    holds: Holds
    holder: str

    def __post_init__(self) -> None:
        for hold in self.holds:
            label(budget=hold[0])
            of_type(int, seq=hold[1])
            validate.count(seq=hold[1])
        if not self.holds or len(self.names) < len(self.holds):
            raise InvalidRequest(f"holds must name each budget once, got {self.holds!r}")
        label(holder=self.holder)

    @property
    def names(self) -> frozenset[str]:
        """What it locks."""
        return frozenset(name for name, _ in self.holds)


@dataclass(frozen=True, slots=True)
class Mark(_OfHolder):
    """Take ``uses`` uses of a reservation; durable before they touch data."""

    uses: int = 1

    def __post_init__(self) -> None:
        _OfHolder.__post_init__(self)
        validate.count(uses=self.uses)


@dataclass(frozen=True, slots=True)
class Settle(_OfHolder):
    """Return the uses of a reservation that were never marked, and end it.

    ``marked``: how many uses of a lease were marked in memory; they are recorded first.
    """

    marked: int = 0

    def __post_init__(self) -> None:
        _OfHolder.__post_init__(self)
        if self.marked:
            validate.count(marked=self.marked)


@dataclass(frozen=True, slots=True)
class Void(_OfHolder):
    """End a reservation before its first mark."""


@dataclass(frozen=True, slots=True)
class Adopt(_OfHolder):
    """Take over an open reservation of the event, whoever holds it; they are shut out."""

    event: Event

    def __post_init__(self) -> None:
        _OfHolder.__post_init__(self)
        of_type(Event, event=self.event)


@dataclass(frozen=True, slots=True)
class Answer:
    """Keep the released answer of a charge with a key, to be returned on a retry."""

    budget: str
    key: str
    answer: bytes = field(repr=False)

    def __post_init__(self) -> None:
        label(budget=self.budget)
        label(key=self.key)
        of_type(bytes, answer=self.answer)

    @property
    def names(self) -> frozenset[str]:
        """What it locks."""
        return frozenset({self.budget})


@dataclass(frozen=True, slots=True)
class Anchor:
    """Keep a signed checkpoint in the ledger, too."""

    note: str

    @property
    def names(self) -> frozenset[str]:
        """What it locks."""
        return frozenset({WHOLE_LEDGER})


Request = (
    Anchor
    | Open
    | Close
    | Unprotected
    | Charge
    | Correct
    | Reserve
    | Borrow
    | Mark
    | Settle
    | Void
    | Adopt
    | Answer
)
