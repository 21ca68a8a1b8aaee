"""Privacy filters: what may still be run, decided on integers.

A :class:`Filter` turns every event into a price, a tuple of non-negative integers with one
*lane* each. Lanes add up and have limits; no float ever decides. The sums include the event
being admitted. :mod:`dp.accountings` makes filters and says why each of them is sound:

``pure``
    One lane, the sum of pure epsilons. An event fits while the lane does.
``adaptive``
    A delta lane and witness lanes: pure epsilon, mu squared, Renyi orders, and uses of the expected
    event. An event fits while the delta lane and SOME witness fit.
``planned``
    A lane for each slot, which counts its uses, and a mu-squared lane. A use of a slot's event
    takes one of the slot's uses while there are any; after that, and for any other event, it pays
    mu squared. An event fits while all lanes do.

Rounding: a price is ``ceil(r * 2**40 * (1 + 1e-9)) + 1``, a limit the floor with the signs
turned; the delta lane counts in units of 2**-62, lanes that count uses in uses. A price is for one
use, and n uses cost exactly n times as much.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import repeat
from operator import add, le, mul
from typing import Any, cast

from dp import validate
from dp.codec import from_json, to_json
from dp.costs import cost
from dp.errors import InvalidParameter, UnsupportedEvent
from dp.events import Atomic, Event, parts
from dp.rows import Cost
from dp.units import NeighboringRelation

Price = tuple[int, ...]
"""What an event costs a budget: one non-negative integer for each lane."""

NEVER = 1 << 96
"""The price of what a lane cannot bound: above every limit, and it still adds up in 128 bits."""

ORDERS = (2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 32, 48, 64)
"""Renyi orders of the witnesses of accounting version 1."""

SLACK = 1e-9
"""Relative; prices are rounded up and limits down by it."""

_SCALE_BITS, _DELTA_BITS = 40, 62
DELTA, EPSILON, MU_SQUARED, USES = "delta", "epsilon", "mu_squared", "uses"
"""Names of lanes; a Renyi order is a lane of its own, and so is ``uses 1``, ``uses 2``, ..."""


@dataclass(frozen=True, slots=True)
class Filter:
    """The frozen limits of one budget and the prices that count against them.

    Attributes:
        accounting: ``pure``, ``adaptive`` or ``planned``.
        version: Pricing version; a stored budget is priced by its own for ever.
        epsilon: The epsilon that holds for the budget's whole life, in nats.
        delta: The delta that holds for the budget's whole life.
        relation: The neighboring relation that sensitivities refer to.
        lanes: Names of the lanes.
        weights: The share of the converted delta that each lane was given; 0 where it needs none.
        limits: One integer for each lane; negative where the lane can admit nothing.
        slots: The atomic events that lanes count the uses of, in the order of these lanes.

    >>> from dp import Gaussian, Repeated, pure
    >>> pure(1.0).price(Repeated(Gaussian(1.0), 2)) == (NEVER,)
    True
    """

    accounting: str
    version: int
    epsilon: float
    delta: float
    relation: NeighboringRelation
    lanes: tuple[str, ...]
    weights: tuple[float, ...]
    limits: tuple[int, ...]
    slots: tuple[Atomic, ...] = ()
    _caps: Price = field(init=False, repr=False, compare=False)
    _beyond: Price = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_caps", tuple(max(limit, -1) + 1 for limit in self.limits))
        beyond: Price = ()
        if self.accounting == "planned":
            beyond = tuple(self.quantize(cost(slot, self.relation))[-1] for slot in self.slots)
        object.__setattr__(self, "_beyond", beyond)

    def __str__(self) -> str:
        """Return the promise with its exact parameters, for instance ``(8.0, 1e-06)-DP``."""
        return f"({self.epsilon!r}, {self.delta!r})-DP"

    @property
    def committed(self) -> tuple[tuple[Atomic, int], ...]:
        """The events whose uses a lane counts, each with the most uses that the lane admits."""
        limits = zip(self.lanes, self.limits, strict=True)
        counted = [limit for lane, limit in limits if lane.startswith(USES)]
        return tuple(zip(self.slots, counted, strict=True))

    def price(self, event: Event) -> Price:
        """Return what one use of the event costs: one integer for each lane, at most NEVER.

        Raises:
            UnsupportedEvent: If no price is proved under this budget's relation.
        """
        total = (0,) * len(self.lanes)
        for part, uses in parts(event).items():
            total = tuple(map(add, total, (uses * price for price in self._atomic(part))))
        return tuple(min(price, NEVER) for price in total)

    def _atomic(self, event: Atomic) -> Price:
        price = self.quantize(cost(event, self.relation))
        if event not in self.slots:
            return price
        own = self.lanes.index(f"{USES} {self.slots.index(event) + 1}")
        if self.accounting == "planned":
            return tuple(int(at == own) for at in range(len(price)))
        return (*price[:own], 1, *price[own + 1 :])

    def quantize(self, bounds: Cost) -> Price:
        """Return the integer price of a release from its real-valued costs, rounded up.

        A cost that is NaN, negative or infinite is :data:`NEVER`; so are all of a release with a
        delta where there is no delta lane. A release like this is no use of a slot: it takes none
        of a plan's, and ends a witness that counts them.
        """
        if bounds.delta and DELTA not in self.lanes:
            bounds = Cost(lambda _: math.inf)
        elsewhere = 0 if self.accounting == "planned" else NEVER
        return tuple(
            elsewhere if lane.startswith(USES) else _in_lane(lane, bounds) for lane in self.lanes
        )

    def price_holds(self, event: Event, stored: Price) -> bool:
        """Say whether a stored price is this filter's price of the event.

        The mathematics library of another host may round differently; half of the slack that
        every price carries (1e-9 of it) is allowed for that.
        """
        return len(stored) == len(self.lanes) and all(
            2 * abs(kept - own) * 10**9 <= own
            for kept, own in zip(stored, self.price(event), strict=True)
        )

    def charge(self, totals: Price, price: Price, uses: int) -> Price:
        """Return what ``uses`` uses add to each lane on top of the totals.

        ``min(uses * price, limit + 1)``: the cap keeps a lane that cannot bound the event from
        growing; once above its limit it stays above. Under ``planned`` uses of a slot first take
        what the slot has left.

        >>> from dp import pure
        >>> pure(1.0).charge((0,), (2**39,), 1)
        (549755813888,)
        """
        if not self._beyond:
            return tuple(map(min, map(mul, price, repeat(uses)), self._caps))
        rooms = (max(limit - total, 0) for limit, total in zip(self.limits, totals, strict=True))
        return self._beyond_slots(price, uses, rooms)

    def part(self, charged: Price, price: Price, uses: int) -> Price:
        """Return what is left of a contribution when only ``uses`` of its uses were made.

        Recomputed from ``uses``, never subtracted from.
        """
        if not self._beyond:
            return self.charge((), price, uses)
        return self._beyond_slots(price, uses, charged)

    def sums(self, spent: Iterable[tuple[Price, int, int]], totals: Price) -> Price:
        """Return what the lanes must hold after these spends, in whatever order they came.

        Args:
            spent: (price, uses, times): how often that many uses of an event were spent at once.
            totals: What the lanes are said to hold. Only the lanes of slots are taken from it,
                for which uses found a slot free depends on the order, and a lane above its limit.

        >>> from dp import pure
        >>> pure(1.0).sums([((2**30,), 3, 2)], (0,))
        (6442450944,)
        """
        if not self._beyond:
            lanes = (0,) * len(self.limits)
            for price, uses, times in spent:
                lanes = tuple(
                    map(add, lanes, map(mul, self.charge((), price, uses), repeat(times)))
                )
            return lanes
        asked = [0] * len(self.limits)
        for price, uses, times in spent:
            asked = [
                sum(both) for both in zip(asked, (uses * times * p for p in price), strict=True)
            ]
        taken = totals[:-1]
        over = (a - t for a, t in zip(asked[:-1], taken, strict=True))
        rest = asked[-1] + sum(map(mul, over, self._beyond))
        if min(rest, totals[-1]) > self.limits[-1]:
            rest = totals[-1]  # above the limit: each charge was capped by itself
        return (*taken, rest)

    def _beyond_slots(self, price: Price, uses: int, rooms: Iterable[int]) -> Price:
        asked = [uses * each for each in price]
        taken = [min(*both) for both in zip(asked[:-1], rooms, strict=False)]
        beyond = asked[-1] + sum(
            (wanted - got) * each
            for wanted, got, each in zip(asked[:-1], taken, self._beyond, strict=True)
        )
        return (*taken, min(beyond, self._caps[-1]))

    def admits(self, totals: Price) -> bool:
        """Say whether lanes at these totals are within the guarantee."""
        if self.accounting == "adaptive":
            return totals[0] <= self.limits[0] and any(map(le, totals[1:], self.limits[1:]))
        return all(map(le, totals, self.limits))

    def after(self, totals: Price, price: Price, uses: int) -> Price:
        """Return the totals with ``uses`` uses at this price on top."""
        return tuple(map(add, totals, self.charge(totals, price, uses)))

    def uses_that_fit(self, totals: Price, price: Price) -> int:
        """Return the largest number of uses at this price that still fits on top of the totals.

        >>> from dp import Gaussian, pure
        >>> budget = pure(1.0)
        >>> budget.uses_that_fit((0,), budget.price(Gaussian(1.0)))
        0
        """
        if self._beyond:
            too_many = range(1, validate.MAX_COUNT + 1)
            return bisect_left(
                too_many, 1, key=lambda uses: not self.admits(self.after(totals, price, uses))
            )
        rooms = [
            _room(total, cost, limit)
            for total, cost, limit in zip(totals, price, self.limits, strict=True)
        ]
        room = min(rooms[0], max(rooms[1:])) if self.lanes[0] == DELTA else min(rooms)
        return min(room, validate.MAX_COUNT)

    def advice(self, price: Price) -> str:
        """Say which budget would take an event that this one could not take when it was new.

        >>> from dp import Gaussian, pure
        >>> pure(1.0).advice(pure(1.0).price(Gaussian(1.0)))
        'it needs a budget with a delta'
        """
        if self.admits(self.after((0,) * len(self.lanes), price, 1)):
            return ""
        if self.accounting == "planned" and price[-1] >= NEVER:
            return "it is neither a slot nor Gaussian DP: it needs an adaptive budget"
        if self.accounting == "pure" and price[0] >= NEVER:
            return "it needs a budget with a delta"
        if self.accounting == "adaptive" and min(price[1:]) < NEVER:
            return (
                "it never fits this one: more noise, or a new budget that expects it"
                " (dp.adaptive with expect=) or commits to it (dp.planned)"
            )
        return "one use is beyond the whole budget"

    def share(self, totals: Price) -> float:
        """Return the used share of the limits, from 0 to 1: for reading, it decides nothing.

        Under ``adaptive`` that of the witness with the most room, or of the delta lane if that
        one has less; under ``planned`` the mean over the lanes.
        """
        return self.share_of(totals, totals)

    def share_of(self, contribution: Price, totals: Price) -> float:
        """Return the share of the limits that one contribution to the totals takes."""
        shares = [
            (part / limit if limit > 0 else math.inf * part if part else 0.0)
            for part, limit in zip(contribution, self.limits, strict=True)
        ]
        if self.accounting == "planned":
            return math.fsum(shares) / len(shares)
        if self.accounting == "pure":
            return shares[0]
        usable = [at for at, limit in enumerate(self.limits) if at and limit > 0]
        roomiest = min(usable, key=lambda at: totals[at] / self.limits[at], default=0)
        return max(shares[0], shares[roomiest])

    def to_record(self) -> dict[str, Any]:
        """Return the JSON object that freezes this filter in a ledger."""
        return {
            "accounting": self.accounting,
            "version": self.version,
            "epsilon": self.epsilon,
            "delta": self.delta,
            "relation": self.relation.value,
            "lanes": list(self.lanes),
            "weights": list(self.weights),
            "limits": [str(limit) for limit in self.limits],
            "slots": [to_json(slot) for slot in self.slots],
        }

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Filter:
        """Return the filter that :meth:`to_record` froze.

        Raises:
            InvalidParameter: If this version of epsledger cannot price by it.
        """
        known = (record.get("accounting"), record.get("version"))
        if known not in (("pure", 1), ("adaptive", 1), ("planned", 1)):
            raise InvalidParameter(
                "accounting", known, "pure 1, adaptive 1 or planned 1; upgrade epsledger"
            )
        try:
            stored = cls(
                accounting=record["accounting"],
                version=record["version"],
                epsilon=validate.epsilon(epsilon=record["epsilon"]),
                delta=float(record["delta"]),
                relation=NeighboringRelation(record["relation"]),
                lanes=tuple(record["lanes"]),
                weights=tuple(map(float, record["weights"])),
                limits=tuple(int(str(limit)) for limit in record["limits"]),
                slots=tuple(cast("Atomic", from_json(slot)) for slot in record["slots"]),
            )
        except (LookupError, TypeError, ValueError) as error:
            raise InvalidParameter("record", record, f"a filter's record ({error})") from error
        stored._check_shape()
        return stored

    def _check_shape(self) -> None:
        if self.accounting == "pure":
            if self.delta != 0:
                raise InvalidParameter("delta", self.delta, "0 under pure accounting")
        else:
            validate.delta(delta=self.delta)
        if self.lanes != lanes(self.accounting, len(self.slots)):
            raise InvalidParameter("lanes", self.lanes, f"those of {self.accounting} accounting 1")
        if len(self.slots) > {"pure": 0, "adaptive": 1}.get(self.accounting, len(self.slots)):
            raise InvalidParameter("slots", self.slots, f"fewer under {self.accounting} accounting")
        if any(parts(slot) != {slot: 1} for slot in self.slots):
            raise InvalidParameter("slots", self.slots, "atomic events in canonical form")
        if len(set(self.slots)) != len(self.slots):
            raise InvalidParameter("slots", self.slots, "different events")
        shared = [
            self.accounting == "adaptive" and lane not in (DELTA, EPSILON) for lane in self.lanes
        ]
        wrong = [
            not (0 < weight <= 1 if share else weight == 0)
            for weight, share in zip(self.weights, shared, strict=False)
        ]
        if len(self.weights) != len(shared) or any(wrong) or math.fsum(self.weights) > 1:
            raise InvalidParameter("weights", self.weights, "shares of delta, at most 1 in all")
        if len(self.limits) != len(self.lanes):
            raise InvalidParameter("limits", self.limits, "one for each lane")


def lanes(accounting: str, slots: int) -> tuple[str, ...]:
    """Return the lanes of an accounting whose uses of so many events are counted.

    >>> lanes("planned", 2)
    ('uses 1', 'uses 2', 'mu_squared')
    """
    counted = tuple(f"{USES} {at + 1}" for at in range(slots))
    match accounting:
        case "pure":
            return EPSILON, *counted
        case "adaptive":
            return DELTA, EPSILON, MU_SQUARED, *map(str, ORDERS), *counted[:1]
        case _:
            return *counted, MU_SQUARED


def unit_price(event: Event) -> int:
    """Return what one use of the event costs a unit of a per-unit filter, rounded up.

    The integers are those of the mu-squared lane, and add up to :func:`unit_limit`.

    Raises:
        UnsupportedEvent: If the event is not Gaussian DP without a delta, under add/remove.

    >>> from dp import Gaussian
    >>> unit_limit(1.0) // unit_price(Gaussian(10.0))
    99
    """
    total = 0
    for part, uses in parts(event).items():
        bounds = cost(part)
        total += uses * (NEVER if bounds.delta else _in_lane(MU_SQUARED, bounds))
    if total >= NEVER:
        raise UnsupportedEvent(event, "a per-unit filter takes events that are Gaussian DP")
    return total


def unit_limit(mu: float) -> int:
    """Return what every unit of a per-unit filter is held to, rounded down; -1 if it is nothing.

    >>> unit_limit(1.0)
    1099511626675
    """
    return rounded_down(MU_SQUARED, mu * mu)


def rounded_down(lane: str, value: float) -> int:
    """Return a limit in the units of a lane; -1 where it is not above 0."""
    if not value > 0:
        return -1
    bits = _DELTA_BITS if lane == DELTA else _SCALE_BITS
    return math.floor(math.ldexp(value, bits) * (1 - SLACK)) - 1


def _in_lane(lane: str, bounds: Cost) -> int:
    match lane:
        case "delta":
            return _rounded_up(bounds.delta, _DELTA_BITS) if bounds.delta else 0
        case "epsilon":
            return _rounded_up(bounds.epsilon, _SCALE_BITS)
        case "mu_squared":
            return _rounded_up(bounds.mu_squared, _SCALE_BITS)
        case _:
            return _rounded_up(bounds.renyi(int(lane)), _SCALE_BITS)


def _rounded_up(value: float, bits: int) -> int:
    if not 0 <= value < math.ldexp(NEVER, -bits) / 2:
        return NEVER
    return math.ceil(math.ldexp(value, bits) * (1 + SLACK)) + 1


def _room(total: int, cost: int, limit: int) -> int:
    if total > limit:
        return 0
    return (limit - total) // cost if cost else validate.MAX_COUNT
