"""Verify: the check of a ledger against itself.

Everything is replayed from the stored entries alone: every digest of every chain, every price
from its event, every lane, every limit at every prefix, every reservation. What this cannot
see: that the ledger as a whole is an older copy of itself. That needs an anchor outside it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from operator import sub
from typing import Any

from accountant.budgets import Budget
from accountant.entries import GENESIS, NO_EVENT, Kind, chain, unpack
from accountant.errors import LedgerCorrupt
from accountant.ledger import Hold
from accountant.stores.schema import unpack_lanes
from accountant.stores.snapshot import Snapshot
from dp import DPError, Price
from dp.accountings import limits_hold
from dp.codec import decode, digest


@dataclass(frozen=True, slots=True)
class Checked:
    """What verify found in one budget.

    Attributes:
        budget: Its name.
        entries: How many entries were replayed.
        head: Digest that the replay ended on, in hexadecimal.
        problems: What is wrong, the first bad entry first; empty if it is clean.
    """

    budget: str
    entries: int
    head: str
    problems: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Verification:
    """What verify found in a ledger.

    Attributes:
        budgets: By name.
        strays: Rows that belong to no budget.
        rollback: Whether an older copy would have been noticed.
    """

    budgets: tuple[Checked, ...]
    strays: tuple[str, ...]
    rollback: str = "not checked"

    @property
    def clean(self) -> bool:
        """Whether nothing contradicts anything."""
        return not self.strays and not any(checked.problems for checked in self.budgets)


@dataclass(slots=True)
class _Replayed:
    totals: Price
    seq: int = 0
    head: bytes = GENESIS
    time: int = 0


def verify(snapshot: Snapshot) -> Verification:
    """Replay the whole ledger."""
    return Verification(
        tuple(_verify_budget(snapshot, name) for name in snapshot.budgets()),
        tuple(snapshot.strays()),
    )


def _verify_budget(snapshot: Snapshot, name: str) -> Checked:
    replayed = _Replayed(())
    try:
        row = snapshot.row(name)
        budget = Budget.from_json(row.record)
        replayed.totals = (0,) * len(budget.filter.limits)
        problems = list(_problems(snapshot, budget, row, replayed))
    except (LedgerCorrupt, DPError, ValueError, TypeError, LookupError, AttributeError) as error:
        problems = [f"entry {replayed.seq + 1}: {error}"]
    return Checked(name, replayed.seq, replayed.head.hex(), tuple(problems))


def _problems(snapshot: Snapshot, budget: Budget, row: Any, replayed: _Replayed) -> Iterator[str]:
    limits, name = budget.filter, budget.name
    if name != row.name:
        yield f"the record of budget {row.name!r} is that of {name!r}"
    if budget.to_json() != row.record:
        yield "the budget's record is not in canonical form"
    if not limits_hold(limits):
        yield "the budget's limits are wider than its epsilon and delta allow"
    prices: dict[bytes, Price] = {}
    for stored in snapshot.events(name):
        event, price = decode(stored.encoded), unpack_lanes(stored.price)
        if digest(stored.encoded) != stored.digest:
            yield f"event {stored.digest.hex()} is not the one of that digest"
        elif not limits.price_holds(event, price):
            yield f"event {stored.digest.hex()} is not priced as {event!r}"
        prices[stored.digest] = price
    charges: dict[int, bytes] = {}
    reserved: dict[int, Hold] = {}
    for stored in snapshot.entries(name):
        at = f"entry {stored.seq}"
        if not isinstance(stored.seq, int) or not isinstance(stored.digest, bytes):
            yield f"{at}: its seq or digest is of another type"
            return
        entry = unpack(stored.body)
        if entry.seq != stored.seq or entry.seq != replayed.seq + 1:
            yield f"{at}: follows entry {replayed.seq}"
        if chain(replayed.head, stored.body) != stored.digest:
            yield f"{at}: its digest does not match; it or the one before was changed"
        if entry.time < replayed.time:
            yield f"{at}: is older than the entry before"
        if (entry.kind is Kind.OPEN) != (replayed.seq == 0):
            yield f"{at}: a chain has one OPEN entry, its first"
        replayed.seq, replayed.head, replayed.time = stored.seq, stored.digest, entry.time
        if entry.kind is Kind.OPEN:
            if entry.event != digest(row.record):
                yield f"{at}: the budget's record is not the one that was opened"
            continue
        nameless = entry.kind is Kind.REFUSE and entry.event == NO_EVENT
        if entry.event not in prices and not nameless:
            yield f"{at}: its event {entry.event.hex()} is not stored"
            continue
        if entry.kind in (Kind.CHARGE, Kind.RESERVE):
            charges[entry.seq] = stored.digest
            charged = limits.charge(replayed.totals, prices[entry.event], entry.uses)
            replayed.totals = _moved(charged, replayed.totals)
            if entry.kind is Kind.RESERVE:
                reserved[entry.seq] = Hold(entry.seq, entry.event, entry.uses, "", charged)
            if not limits.admits(replayed.totals):
                yield f"{at}: exceeds the budget"
        elif entry.kind in (Kind.MARK, Kind.SETTLE, Kind.VOID):
            hold = reserved.get(entry.reservation)
            if hold is None or not hold.open or hold.event != entry.event:
                yield f"{at}: there is no open reservation {entry.reservation} of its event"
                continue
            if entry.kind is Kind.MARK:
                hold.marked += entry.uses
                if hold.marked > hold.uses:
                    yield f"{at}: marks more than reservation {hold.seq} has"
                continue
            hold.open = False
            if entry.uses != hold.marked or (entry.kind is Kind.VOID and hold.marked):
                yield f"{at}: returns uses of reservation {hold.seq} that were marked"
                continue
            kept = limits.part(hold.charged, prices[entry.event], hold.marked)
            change = tuple(map(sub, kept, hold.charged))
            replayed.totals = _moved(change, replayed.totals)
    yield from _mismatches(snapshot, budget, row, replayed, reserved, charges)


def _mismatches(
    snapshot: Snapshot,
    budget: Budget,
    row: Any,
    replayed: _Replayed,
    reserved: dict[int, Hold],
    charges: dict[int, bytes],
) -> Iterator[str]:
    """Compare what the entries came to with what is stored beside them."""
    name = budget.name
    if not replayed.seq:
        yield "entry 1: there is none; its OPEN entry is missing"
    if row.time != replayed.time:
        yield "the stored time is not that of the last entry"
    if (row.seq, row.head) != (replayed.seq, replayed.head):
        yield (
            f"entry {replayed.seq + 1}: the budget ends on entry {row.seq}"
            f" and the entries on {replayed.seq}: some are missing or were added"
        )
    if unpack_lanes(row.totals) != replayed.totals:
        yield "the stored totals are not the sums of the entries"
    stored_holds = {
        held.seq: (held.event, held.uses, unpack_lanes(held.charged), held.marked, held.open)
        for held in snapshot.reservations(name)
    }
    replayed_holds = {
        seq: (hold.event, hold.uses, hold.charged, hold.marked, hold.open)
        for seq, hold in reserved.items()
    }
    if stored_holds != replayed_holds:
        yield "the stored reservations are not those of the entries"
    for key in snapshot.keys(name):
        if charges.get(key.seq) != key.digest:
            yield f"key {key.key!r} refers to entry {key.seq}, which is not its charge"
    pending = json.loads(row.pending)
    if any(len(tally) != 3 or min(tally) < 0 for tally in pending.values()):
        yield "the pending refusals are unreadable"


def _moved(change: Price, totals: Price) -> Price:
    return tuple(map(sum, zip(change, totals, strict=True)))
