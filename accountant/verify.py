"""Verify: the check of a ledger against itself.

Everything is replayed from the stored entries alone: every digest of every chain, every price
from its event, every lane, every limit at every prefix, every reservation, every operation that
was charged to several budgets, every spend that a superseding budget carries. The lanes are then
added up a second time, by the database, from other rows. What neither can see: that the ledger as
a whole is an older copy of itself. That needs a mark or an anchor outside it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from operator import add, sub

from accountant.anchors import Checkpoint, compare
from accountant.books import Hold
from accountant.budgets import Budget
from accountant.entries import (
    CARRIES,
    GENESIS,
    HOLDS,
    NO_EVENT,
    SPENDS,
    Entry,
    Kind,
    chain,
    unpack,
)
from accountant.errors import LedgerCorrupt
from accountant.requests import Unprotected
from accountant.stores.rows import BudgetRow, unpack_lanes
from accountant.stores.snapshot import Snapshot
from dp import DPError, Price
from dp.accountings import limits_hold
from dp.codec import decode, digest, encode

_UNPROTECTED = digest(encode(Unprotected.event))


@dataclass(frozen=True, slots=True)
class Checked:
    """What verify found in one budget.

    Attributes:
        budget: Its name.
        entries: How many entries were replayed.
        head: Digest that the replay ended on, in hexadecimal.
        problems: What is wrong, the first bad entry first; empty if it is clean.
        unprotected: How many of the entries are reads outside the guarantee.
    """

    budget: str
    entries: int
    head: str
    problems: tuple[str, ...]
    unprotected: int = 0


@dataclass(frozen=True, slots=True)
class Verification:
    """What verify found in a ledger.

    Attributes:
        budgets: By name.
        strays: Rows that belong to no budget.
        anchors: In what the ledger contradicts its anchors.
        rollback: What was compared outside the ledger, or ``not checked``.
    """

    budgets: tuple[Checked, ...]
    strays: tuple[str, ...]
    anchors: tuple[str, ...]
    rollback: str

    @property
    def clean(self) -> bool:
        """Whether nothing contradicts anything."""
        return (
            not self.strays
            and not self.anchors
            and not any(checked.problems for checked in self.budgets)
        )


@dataclass(slots=True)
class _Replayed:
    totals: Price
    seq: int = 0
    head: bytes = GENESIS
    time: int = 0
    closed: bool = False
    unprotected: int = 0
    prices: dict[bytes, Price] = field(default_factory=dict)
    spends: dict[int, bytes] = field(default_factory=dict)
    reserved: dict[int, Hold] = field(default_factory=dict)
    spent: Counter[bytes] = field(default_factory=Counter)
    carried: Counter[bytes] = field(default_factory=Counter)


class _Across:
    """What several chains must agree on.

    Of an operation charged to several budgets each chain must have its part, or none. A budget
    that supersedes another must have all that was spent there, with its later corrections. No two
    budgets are about the same dataset.
    """

    def __init__(self) -> None:
        self._expected: dict[bytes, tuple[str, int, Kind, int]] = {}
        self._found: dict[bytes, list[tuple[str, int, Kind]]] = {}
        self._replayed: dict[str, tuple[Budget, _Replayed]] = {}

    def add(self, budget: str, entry: Entry, digest: bytes) -> None:
        """Note an entry that is linked."""
        if entry.link != NO_EVENT:
            self._found.setdefault(entry.link, []).append((budget, entry.seq, entry.kind))
        else:
            self._expected[digest] = (budget, entry.seq, entry.kind, entry.chains)

    def end(self, budget: Budget, replayed: _Replayed) -> None:
        """Note what a whole chain came to."""
        self._replayed[budget.name] = budget, replayed

    def problems(self) -> Iterator[tuple[str, str]]:
        """Yield (budget, problem) for every part that is missing or added."""
        for new, replayed in self._replayed.values():
            old = self._replayed.get(new.supersedes or "")
            if old is not None and not old[1].spent <= replayed.carried:
                yield new.name, f"entry 1: not all that {new.supersedes!r} spent is carried over"
        replaced = {new.supersedes for new, _ in self._replayed.values()}
        current = [
            budget
            for budget, _ in self._replayed.values()
            if budget.quota_of is None and budget.name not in replaced
        ]
        for one, other in combinations(current, 2):
            if one.covers(other):
                yield other.name, f"entry 1: budget {one.name!r} is about the same dataset"
        for link, others in self._found.items():
            if link not in self._expected:
                for budget, seq, _ in others:
                    yield budget, f"entry {seq}: its operation's first entry is missing"
        for first, (budget, seq, kind, chains) in self._expected.items():
            others = self._found.get(first, [])
            names = {name for name, _, _ in others}
            if len(others) != chains - 1 or len({budget, *names}) != chains:
                yield budget, f"entry {seq}: {len(others) + 1} of {chains} chains have it"
            elif any(other is not kind for _, _, other in others):
                yield budget, f"entry {seq}: another kind of entry is linked to it"


def verify(
    snapshot: Snapshot, anchored: Sequence[Checkpoint] = (), own: Sequence[Checkpoint] = ()
) -> Verification:
    """Replay the whole ledger, and compare it with checkpoints.

    Args:
        snapshot: Of the ledger.
        anchored: Checkpoints that were kept elsewhere.
        own: Those that the ledger kept. They went back with it, if it went back.
    """
    across = _Across()
    checked = [_verify_budget(snapshot, name, across) for name in snapshot.budgets()]
    amiss: dict[str, list[str]] = {}
    for budget, problem in across.problems():
        amiss.setdefault(budget, []).append(problem)
    checked = [
        replace(each, problems=(*each.problems, *amiss.get(each.budget, ()))) for each in checked
    ]
    known = sum(each.budget in snapshot.seen for each in checked)
    anchors = [
        problem
        for checkpoint in (*anchored, *own)
        for problem in (
            compare(checkpoint, snapshot.read_digest)
            if checkpoint.ledger == snapshot.ledger
            else (f"the anchor is about ledger {checkpoint.ledger}, not {snapshot.ledger}",)
        )
    ]
    kept = snapshot.checkpoints()
    numbers = [number for number, _ in kept]
    if not all(isinstance(note, str) for _, note in kept):
        anchors.append("one of the ledger's own checkpoints is not a text")
    if numbers != list(range(1, len(numbers) + 1)):
        anchors.append(f"the ledger's own checkpoints are numbered {numbers}")
    against = [f"{len(anchored)} anchor{'s' * (len(anchored) > 1)}"] if anchored else []
    if known:
        against.append(f"what this machine saw last of {known} of {len(checked)} budgets")
    rollback = f"checked against {' and '.join(against)}" if against else "not checked"
    return Verification(tuple(checked), tuple(snapshot.strays()), tuple(anchors), rollback)


def _verify_budget(snapshot: Snapshot, name: str, across: _Across) -> Checked:
    replayed = _Replayed(())
    problems: list[str] = []
    try:
        row = snapshot.row(name)
        budget = Budget.from_json(row.record)
        replayed.totals = (0,) * len(budget.filter.limits)
        for problem in _problems(snapshot, budget, row, replayed, across):
            problems.append(problem)  # noqa: PERF402 - those before an error count
        across.end(budget, replayed)
        problems.extend(_mismatches(snapshot, budget, row, replayed))
    except (
        LedgerCorrupt,
        DPError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        RecursionError,
    ) as error:
        said = str(error) if isinstance(error, LedgerCorrupt | DPError) else repr(error)
        problems.append(f"entry {replayed.seq + 1}: {said}")
    return Checked(name, replayed.seq, replayed.head.hex(), tuple(problems), replayed.unprotected)


def _problems(
    snapshot: Snapshot, budget: Budget, row: BudgetRow, replayed: _Replayed, across: _Across
) -> Iterator[str]:
    limits, name, prices = budget.filter, budget.name, replayed.prices
    reserved = replayed.reserved
    if name != row.name:
        yield f"the record of budget {row.name!r} is that of {name!r}"
    if budget.to_json() != row.record:
        yield "the budget's record is not in canonical form"
    if not limits_hold(limits):
        yield "the budget's limits are wider than its epsilon and delta allow"
    for stored in snapshot.events(name):
        event, price = decode(stored.encoded), unpack_lanes(stored.price)
        if digest(stored.encoded) != stored.digest:
            yield f"event {stored.digest.hex()} is not the one of that digest"
        elif not limits.price_holds(event, price):
            yield f"event {stored.digest.hex()} is not priced as {event!r}"
        prices[stored.digest] = price
    keyed = {key.seq for key in snapshot.keys(name)}
    for seq, body, head in snapshot.entries(name):
        if not isinstance(seq, int) or not isinstance(head, bytes):
            yield f"entry {seq}: its seq or digest is of another type"
            return
        entry = unpack(body)
        if entry.seq != seq or seq != replayed.seq + 1:
            yield f"entry {seq}: follows entry {replayed.seq}"
        if chain(replayed.head, body) != head:
            yield f"entry {seq}: its digest does not match; it or the one before was changed"
        if entry.time < replayed.time:
            yield f"entry {seq}: is older than the entry before"
        kind = entry.kind
        if (kind is Kind.OPEN) != (replayed.seq == 0):
            yield f"entry {seq}: a chain has one OPEN entry, its first"
        replayed.seq, replayed.head, replayed.time = seq, head, entry.time
        if entry.chains or entry.link != NO_EVENT:
            across.add(name, entry, head)
        if kind in SPENDS or kind in HOLDS:
            if entry.event not in prices:
                yield f"entry {seq}: its event {entry.event.hex()} is not stored"
                continue
            if replayed.closed and kind is not Kind.CORRECT:
                yield f"entry {seq}: the budget was closed before"
            charged = limits.charge(replayed.totals, prices[entry.event], entry.uses)
            replayed.totals = tuple(map(add, replayed.totals, charged))
            replayed.spent[entry.event] += entry.uses
            if kind in CARRIES:
                replayed.carried[entry.event] += entry.uses
            if kind in HOLDS:
                lease = kind is Kind.LEASE
                reserved[seq] = Hold(seq, entry.event, entry.uses, "", charged, lease=lease)
            elif seq in keyed:
                replayed.spends[seq] = head
            if not limits.admits(replayed.totals):
                yield f"entry {seq}: exceeds the budget; the guarantee does not hold"
        elif kind is Kind.OPEN:
            if entry.event != digest(row.record):
                yield f"entry {seq}: the budget's record is not the one that was opened"
        elif kind is Kind.CLOSE:
            if replayed.closed:
                yield f"entry {seq}: the budget was closed before"
            replayed.closed = True
        elif kind is Kind.REFUSE:
            if entry.event not in prices and entry.event != NO_EVENT:
                yield f"entry {seq}: its event {entry.event.hex()} is not stored"
        elif entry.event not in prices:
            yield f"entry {seq}: its event {entry.event.hex()} is not stored"
        elif kind is Kind.UNPROTECTED:
            replayed.unprotected += 1
            if replayed.closed:
                yield f"entry {seq}: the budget was closed before"
            if (entry.event, entry.uses) != (_UNPROTECTED, Unprotected.uses) or not entry.note:
                yield f"entry {seq}: is not one read outside the guarantee, with its reason"
        else:
            hold = reserved.get(entry.reservation)
            if hold is None or not hold.open or hold.event != entry.event:
                yield f"entry {seq}: there is no open reservation {entry.reservation} of its event"
                continue
            if kind is Kind.MARK:
                if replayed.closed and not hold.lease:
                    yield f"entry {seq}: the budget was closed before"
                hold.marked += entry.uses
                if hold.marked > hold.uses:
                    yield f"entry {seq}: marks more than reservation {hold.seq} has"
                continue
            if entry.uses != hold.marked or (kind is Kind.VOID and hold.marked):
                yield f"entry {seq}: returns uses of reservation {hold.seq} that were marked"
                continue
            if kind is Kind.ADOPT:
                if hold.lease:
                    yield f"entry {seq}: adopts a lease"
                continue
            hold.open = False
            replayed.spent[hold.event] -= hold.uses - hold.marked
            kept = limits.part(hold.charged, prices[hold.event], hold.marked)
            change = map(sub, kept, hold.charged)
            replayed.totals = tuple(map(add, replayed.totals, change))


def _mismatches(
    snapshot: Snapshot, budget: Budget, row: BudgetRow, replayed: _Replayed
) -> Iterator[str]:
    """Compare what the entries came to with what is stored beside them."""
    name, prices = budget.name, replayed.prices
    if not replayed.seq:
        yield "entry 1: there is none; its OPEN entry is missing"
    if row.time != replayed.time:
        yield "the stored time is not that of the last entry"
    if bool(row.closed) != replayed.closed:
        yield "the entries do not say whether it is closed as the budget's row does"
    if (row.seq, row.head) != (replayed.seq, replayed.head):
        yield (
            f"entry {replayed.seq + 1}: the budget ends on entry {row.seq}"
            f" and the entries on {replayed.seq}: some are missing or were added"
        )
    totals = unpack_lanes(row.totals)
    if totals != replayed.totals:
        yield "the stored totals are not the sums of the entries"
    holds = snapshot.reservations(name)
    stored_holds = {
        held.seq: (
            held.event,
            held.uses,
            unpack_lanes(held.charged),
            held.marked,
            bool(held.open),
            bool(held.lease),
        )
        for held in holds
    }
    replayed_holds = {
        seq: (hold.event, hold.uses, hold.charged, hold.marked, hold.open, hold.lease)
        for seq, hold in replayed.reserved.items()
    }
    if stored_holds != replayed_holds:
        yield "the stored reservations are not those of the entries"
    spent = [(each.event, each.uses, each.times) for each in snapshot.spent(name)]
    spent += [(held.event, held.uses if held.open else held.marked, 1) for held in holds]
    known = [(prices[event], uses, times) for event, uses, times in spent if event in prices]
    if len(known) < len(spent) or budget.filter.sums(known, totals) != totals:
        yield "the stored totals are not what the database adds up"
    for key in snapshot.keys(name):
        if replayed.spends.pop(key.seq, None) != key.digest:
            yield f"key {key.key!r} refers to entry {key.seq}, which is not its charge"
    pending = json.loads(row.pending)
    if any(len(tally) != 3 or min(tally) < 0 for tally in pending.values()):
        yield "the pending refusals are unreadable"
