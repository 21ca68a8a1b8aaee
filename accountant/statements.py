"""A statement: what a budget looks like at one moment, folded from its entries."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from operator import sub

from accountant.books import Hold
from accountant.budgets import Budget
from accountant.entries import HOLDS, SPENDS, Entry, Kind, unpack
from accountant.errors import LedgerCorrupt
from accountant.stores.rows import unpack_lanes
from accountant.stores.snapshot import Snapshot
from dp import Event, MalformedEvent, Price
from dp.codec import decode


@dataclass(frozen=True, slots=True)
class Line:
    """One entry, readable.

    Attributes:
        entry: The entry.
        event: Its event, or None where it has none.
        share: Used share of the limits after it, from 0 to 1.
    """

    entry: Entry
    event: Event | None
    share: float


@dataclass(frozen=True, slots=True)
class Activity:
    """What one activity came to.

    Attributes:
        name: Of the activity.
        uses: Uses charged, reserved and not returned.
        share: Their share of the limit of the lane with the most room left.
        refused: Operations turned down.
    """

    name: str
    uses: int
    share: float
    refused: int


@dataclass(frozen=True, slots=True)
class Statement:
    """One budget at one moment.

    The guarantee is the budget's (epsilon, delta) for its whole life, per privacy unit and
    neighboring relation, for everything that was charged here and nothing else. ``share`` is a
    part of the limits, not of epsilon.

    Attributes:
        budget: The promise.
        seq: Position of the last entry.
        head: Digest of the last entry, in hexadecimal.
        share: Used share of the limits, open reservations in full.
        lines: The entries, in order.
        activities: By name.
        refused: Operations turned down, pending ones included.
        open_reservations: (seq, uses, marked) of each.
        closed: Whether it admits nothing any more.
        spent: Each event that was charged or reserved and not returned, with its uses.
        superseded_by: Name of the budget that carries all of it, if there is one.
        unprotected: Reads outside the guarantee: of private data as it is.
    """

    budget: Budget
    seq: int
    head: str
    share: float
    lines: tuple[Line, ...]
    activities: tuple[Activity, ...]
    refused: int
    open_reservations: tuple[tuple[int, int, int], ...]
    spent: tuple[tuple[Event, int], ...]
    closed: bool = False
    superseded_by: str | None = None
    unprotected: int = 0


def read_statement(snapshot: Snapshot, name: str) -> Statement:
    """Return the statement of a budget.

    Raises:
        UnknownBudget: If there is none of that name.
        LedgerCorrupt: If its entries cannot be read; ``verify`` says more.
    """
    row = snapshot.row(name)
    budget = Budget.from_json(row.record)
    try:
        events = {stored.digest: decode(stored.encoded) for stored in snapshot.events(name)}
        prices = {stored.digest: unpack_lanes(stored.price) for stored in snapshot.events(name)}
        entries = [unpack(body) for _, body, _ in snapshot.entries(name)]
        pending = json.loads(row.pending)
        statement = _fold(budget, row.head.hex(), entries, events, prices, pending)
        return replace(statement, superseded_by=_successor(snapshot, name))
    except (
        MalformedEvent,
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        RecursionError,
    ) as error:
        raise LedgerCorrupt(f"budget {name!r} cannot be read; verify it: {error!r}") from error


def _successor(snapshot: Snapshot, name: str) -> str | None:
    for record in snapshot.records():
        with suppress(LedgerCorrupt):  # of another budget, whose statement says so
            other = Budget.from_json(record)
            if other.supersedes == name:
                return other.name
    return None


def _fold(
    budget: Budget,
    head: str,
    entries: Iterable[Entry],
    events: dict[bytes, Event],
    prices: dict[bytes, Price],
    pending: dict[str, list[int]],
) -> Statement:
    limits = budget.filter
    nothing = (0,) * len(limits.limits)
    totals, lines = nothing, []
    lanes: dict[str, Price] = {}
    uses: dict[str, int] = {}
    refused: dict[str, int] = {}
    spent: dict[bytes, int] = {}
    reserved: dict[int, tuple[str, Hold]] = {}

    def add(activity: str, event: bytes, change: Price, times: int) -> None:
        nonlocal totals
        totals = _added(totals, change)
        lanes[activity] = _added(lanes.get(activity, nothing), change)
        uses[activity] = uses.get(activity, 0) + times
        spent[event] = spent.get(event, 0) + times

    seq = 0
    for entry in entries:
        seq = entry.seq
        match entry.kind:
            case kind if kind in SPENDS or kind in HOLDS:
                charged = limits.charge(totals, prices[entry.event], entry.uses)
                add(entry.activity, entry.event, charged, entry.uses)
                if entry.kind in HOLDS:
                    hold = Hold(entry.seq, entry.event, entry.uses, "", charged)
                    reserved[entry.seq] = entry.activity, hold
            case Kind.MARK:
                reserved[entry.reservation][1].marked += entry.uses
            case Kind.SETTLE | Kind.VOID:
                activity, hold = reserved.pop(entry.reservation)
                kept = limits.part(hold.charged, prices[hold.event], hold.marked)
                change = tuple(map(sub, kept, hold.charged))
                add(activity, hold.event, change, hold.marked - hold.uses)
            case Kind.REFUSE:
                refused[entry.activity] = refused.get(entry.activity, 0) + entry.times
            case _:
                pass
        event = events.get(entry.event)
        lines.append(Line(entry, event, limits.share(totals)))
    for key, (times, _, _) in pending.items():
        activity = key.split(":", 2)[2]
        refused[activity] = refused.get(activity, 0) + times
    return Statement(
        budget,
        seq,
        head,
        limits.share(totals),
        tuple(lines),
        tuple(
            Activity(
                name,
                uses.get(name, 0),
                limits.share_of(lanes[name], totals) if name in lanes else 0.0,
                refused.get(name, 0),
            )
            for name in sorted(lanes.keys() | refused.keys())
        ),
        sum(refused.values()),
        tuple((seq, hold.uses, hold.marked) for seq, (_, hold) in reserved.items()),
        tuple((events[event], times) for event, times in spent.items() if times),
        any(line.entry.kind is Kind.CLOSE for line in lines),
        unprotected=sum(line.entry.kind is Kind.UNPROTECTED for line in lines),
    )


def _added(totals: Price, change: Iterable[int]) -> Price:
    return tuple(map(sum, zip(totals, change, strict=True)))
