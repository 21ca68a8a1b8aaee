"""Errors of the books.

::

    AccountantError
    ├── BudgetExceeded        a refusal: the operation does not fit; it is in the ledger
    ├── UnknownBudget         no budget of that name (also a LookupError)
    ├── BudgetExists          the name is taken; budgets are immutable (also a ValueError)
    ├── BudgetClosed          it was closed, and admits nothing any more
    ├── DatasetCovered        another budget is about the same dataset (also a ValueError)
    ├── InvalidRequest        a request that cannot be recorded (also a ValueError)
    │   ├── UnitMismatch      the operation protects another unit or relation than the budget
    │   └── KeyReused         the idempotency key belongs to another request
    ├── QueriesExhausted      a per-unit filter has answered as many queries as it may
    ├── ReleaseUnknown        the key was charged, but its answer was never stored
    ├── ReservationError      a reservation used by the wrong process or at the wrong time
    └── LedgerError           the ledger itself
        ├── LedgerUnavailable it cannot be opened, locked or written; nothing was charged
        ├── OutcomeUnknown    the commit failed midway; counted as spent, release nothing
        ├── LedgerCorrupt     it contradicts itself
        ├── AnchorInvalid     a key, note or checkpoint that cannot be trusted
        ├── AnchorUnavailable a key or an anchor cannot be read or written
        └── SchemaMismatch    it was written by another schema version

Each error carries its facts as attributes; exit codes are the command's business.
"""

from __future__ import annotations

from dp import Event, NeighboringRelation
from dp.errors import FactualError


class AccountantError(FactualError):
    """Base class of every error raised by :mod:`accountant`."""


class BudgetExceeded(AccountantError):
    """The operation does not fit; no private data may be touched for it.

    Attributes:
        budget: Name of the budget.
        event: One use of what was asked.
        requested: How many uses were asked.
        remaining: How many uses of this event would still fit.
        advice: Which budget would take it, where this one could not even when it was new.
    """

    def __init__(
        self, budget: str, event: Event, requested: int, remaining: int, advice: str = ""
    ) -> None:
        super().__init__(
            f"budget {budget!r}: {requested} x {event!r} refused, {remaining} would fit"
            + (f"; {advice}" if advice else "")
        )
        self.budget, self.event = budget, event
        self.requested, self.remaining, self.advice = requested, remaining, advice


class UnknownBudget(AccountantError, LookupError):
    """No budget of that name is in the ledger.

    Attributes:
        budget: The name.
    """

    def __init__(self, budget: str) -> None:
        super().__init__(f"no budget {budget!r} in this ledger; create it first")
        self.budget = budget


class BudgetExists(AccountantError, ValueError):
    """The name is taken, and a budget never changes.

    Attributes:
        budget: The name.
    """

    def __init__(self, budget: str) -> None:
        super().__init__(f"budget {budget!r} exists; budgets are immutable, choose another name")
        self.budget = budget


class BudgetClosed(AccountantError):
    """The budget was closed; nothing runs under it any more.

    Attributes:
        budget: The name.
    """

    def __init__(self, budget: str) -> None:
        super().__init__(
            f"budget {budget!r} is closed; ask its owner, or use the budget that supersedes it"
        )
        self.budget = budget


class DatasetCovered(AccountantError, ValueError):
    """A second budget over the same data would give it a second promise.

    Attributes:
        budget: The name of the new budget.
        other: The name of the budget that is about that data.
    """

    def __init__(self, budget: str, other: str) -> None:
        super().__init__(
            f"budget {budget!r}: budget {other!r} is about the same dataset; charge that one, or"
            f" create this one with supersedes={other!r}, which carries its spend over"
        )
        self.budget, self.other = budget, other


class InvalidRequest(AccountantError, ValueError):
    """A request cannot be recorded as it is; nothing was written."""


class UnitMismatch(InvalidRequest):
    """The operation is about another privacy unit or relation than the budget.

    Attributes:
        budget: Name of the budget.
        expected: (unit, relation) of the budget.
        given: (unit, relation) of the operation.
    """

    def __init__(
        self,
        budget: str,
        expected: tuple[str, NeighboringRelation],
        given: tuple[str, NeighboringRelation],
    ) -> None:
        super().__init__(
            f"budget {budget!r} protects one {expected[0]!r} under {expected[1]},"
            f" the operation one {given[0]!r} under {given[1]}"
        )
        self.budget, self.expected, self.given = budget, expected, given


class KeyReused(InvalidRequest):
    """An idempotency key came back with another request.

    Attributes:
        key: The key.
    """

    def __init__(self, key: str) -> None:
        super().__init__(f"key {key!r} was used for another request; use a new key")
        self.key = key


class QueriesExhausted(AccountantError):
    """A per-unit filter has answered as many queries as its cap says; a public number.

    Attributes:
        most_queries: The cap.
    """

    def __init__(self, most_queries: int) -> None:
        super().__init__(
            f"all {most_queries} queries of this per-unit filter are used up; open another one,"
            " which is a new charge to the budget"
        )
        self.most_queries = most_queries


class ReleaseUnknown(AccountantError):
    """The key was charged but no answer is stored: a second draw would be a second release.

    Attributes:
        key: The key.
    """

    def __init__(self, key: str) -> None:
        super().__init__(
            f"key {key!r} was charged and its answer was lost or is still being computed;"
            " ask again later, or with a new key and a new charge"
        )
        self.key = key


class ReservationError(AccountantError):
    """A reservation was used by another process, after its end, or beyond its uses."""


class LedgerError(AccountantError):
    """The ledger cannot do its work."""


class LedgerUnavailable(LedgerError):
    """The ledger cannot be opened, locked or written; nothing was charged."""


class OutcomeUnknown(LedgerError):
    """The commit failed midway. It counts as spent, and nothing may be released for it."""


class LedgerCorrupt(LedgerError):
    """The ledger contradicts itself; run ``epsledger ledger verify``."""


class AnchorInvalid(LedgerError):
    """A key, a signed note or a checkpoint cannot be trusted as it is.

    Attributes:
        what: What it is about.
        reason: Why, and what to do about it.
    """

    def __init__(self, what: str, reason: str) -> None:
        super().__init__(f"{what}: {reason}")
        self.what, self.reason = what, reason


class AnchorUnavailable(LedgerError):
    """A key or an anchor cannot be read or written; the ledger itself was not touched.

    Attributes:
        target: The file or command.
        reason: Why, and what to do about it.
    """

    def __init__(self, target: str, reason: str) -> None:
        super().__init__(f"{target}: {reason}")
        self.target, self.reason = target, reason


class SchemaMismatch(LedgerError):
    """The ledger was written by another schema version of epsledger.

    Attributes:
        place: The ledger.
        found: Its schema version.
        expected: The version that this epsledger reads and writes.
    """

    def __init__(self, place: str, found: int, expected: int) -> None:
        super().__init__(
            f"{place} has ledger schema {found}, this epsledger writes {expected}; "
            + (
                "stop every process that has it open, then run: epsledger ledger migrate"
                if found < expected
                else "use the epsledger that wrote it, or a newer one"
            )
        )
        self.place, self.found, self.expected = place, found, expected
