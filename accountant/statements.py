"""A statement: what a budget looks like at one moment, folded from its entries."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass

from accountant.budgets import Budget
from accountant.entries import NO_EVENT, Entry, Kind, unpack
from accountant.errors import LedgerCorrupt
from accountant.stores.schema import unpack_lanes
from accountant.stores.snapshot import Snapshot
from dp import Event, Filter, MalformedEvent, Price
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
        epsilon_if_fixed: Epsilon at the budget's delta if the operations had been fixed in
            advance; not a guarantee for operations chosen after seeing outputs.
    """

    budget: Budget
    seq: int
    head: str
    share: float
    lines: tuple[Line, ...]
    activities: tuple[Activity, ...]
    refused: int
    open_reservations: tuple[tuple[int, int, int], ...]
    epsilon_if_fixed: float


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
        entries = [unpack(stored.body) for stored in snapshot.entries(name)]
        return _fold(budget, row.head.hex(), entries, events, prices, json.loads(row.pending))
    except (MalformedEvent, LookupError, TypeError, ValueError) as error:
        raise LedgerCorrupt(f"budget {name!r} cannot be read; verify it: {error!r}") from error


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
    reserved: dict[int, tuple[Entry, int]] = {}

    def add(activity: str, event: bytes, before: int, after: int) -> None:
        nonlocal totals
        old, new = (limits.charge(prices[event], n) for n in (before, after))
        change = [b - a for a, b in zip(old, new, strict=True)]
        totals = _added(totals, change)
        lanes[activity] = _added(lanes.get(activity, nothing), change)
        uses[activity] = uses.get(activity, 0) + after - before

    seq = 0
    for entry in entries:
        seq = entry.seq
        match entry.kind:
            case Kind.CHARGE:
                add(entry.activity, entry.event, 0, entry.uses)
            case Kind.RESERVE:
                add(entry.activity, entry.event, 0, entry.uses)
                reserved[entry.seq] = (entry, 0)
            case Kind.MARK:
                opened, marked = reserved[entry.reservation]
                reserved[entry.reservation] = (opened, marked + entry.uses)
            case Kind.SETTLE | Kind.VOID:
                opened, marked = reserved.pop(entry.reservation)
                add(opened.activity, opened.event, opened.uses, marked)
            case Kind.REFUSE:
                refused[entry.activity] = refused.get(entry.activity, 0) + entry.times
            case Kind.OPEN:
                pass
        event = events.get(entry.event) if entry.event != NO_EVENT else None
        lines.append(Line(entry, event, limits.share(totals)))
    for key, (times, _, _) in pending.items():
        activity = key.split(":", 2)[2]
        refused[activity] = refused.get(activity, 0) + times
    fullest = _roomiest(limits, totals)
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
                lanes[name][fullest] / limits.limits[fullest] if name in lanes else 0.0,
                refused.get(name, 0),
            )
            for name in sorted(lanes.keys() | refused.keys())
        ),
        sum(refused.values()),
        tuple((seq, opened.uses, marked) for seq, (opened, marked) in reserved.items()),
        limits.epsilon_if_fixed(totals),
    )


def _added(totals: Price, change: Iterable[int]) -> Price:
    return tuple(map(sum, zip(totals, change, strict=True)))


def _roomiest(limits: Filter, totals: Price) -> int:
    """Return the witness with the smallest used share, among those that can admit anything."""
    lanes = range(len(totals))
    usable = [at for at in lanes if limits.limits[at] > 0 and limits.lanes[at] != "delta"]
    spending = [at for at in usable if totals[at]] or usable
    return min(spending, key=lambda at: totals[at] / limits.limits[at])
