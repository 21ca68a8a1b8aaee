"""Privacy filters: what may still be run, decided on integers.

A :class:`Filter` turns every event into a price, a tuple of non-negative integers with one
*lane* each. Lanes add up and have limits; no float ever decides. The sums include the event
being admitted.

``pure``
    One lane: the sum of pure epsilons stays within epsilon. On every transcript the privacy
    loss is at most that sum, however the events were chosen.

``adaptive``
    Witness lanes (integer Renyi orders, mu squared, pure epsilon) and a delta lane. An event
    fits while the delta lane and SOME witness fit, and every witness has its own share w of
    delta, fixed at creation, with a sum of at most 1. Sound for adaptively chosen events:
    on the paths that end under the witness of order a, (1 - exp(epsilon - L))+ is at most
    w_a * delta * X(a), where L is the privacy loss and X(a) = exp((a-1)(L - S_a)), times a
    constant that the limit absorbs, is a supermartingale of mean at most 1 (Feldman and
    Zrnic, "Individual Privacy Accounting via a Renyi Filter", 2021; Lecuyer, "Practical
    Privacy Filters and Odometers with Renyi Differential Privacy", 2021, for one order).
    The mu-squared witness is the Gaussian filter of Smith and Thakurta, "Fully Adaptive
    Composition for Gaussian Differential Privacy" (2022); the pure witness needs no share.
    Without the shares ("some order still fits at the full delta") the rule is unsound; the
    counterexample is a test.

Rounding: a price is ``ceil(r * 2**40 * (1 + 1e-9)) + 1``, a limit the floor with the signs
turned; the delta lane counts in units of 2**-62. A price is for one use, and n uses cost
exactly n times as much.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dp import costs, validate
from dp.conversions import gaussian_mu, renyi_limit, renyi_to_epsilon
from dp.errors import InvalidParameter
from dp.events import Composed, Event, Gaussian, PoissonSampled, Repeated, canonical
from dp.units import NeighboringRelation

Price = tuple[int, ...]
"""What an event costs a budget: one non-negative integer for each lane."""

NEVER = 1 << 96
"""The price of what a lane cannot bound: above every limit, and it still adds up in 128 bits."""

ORDERS = (2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 32, 48, 64)
"""Renyi orders of the witnesses of accounting version 1."""

_SCALE_BITS, _DELTA_BITS, _SLACK = 40, 62, 1e-9
_DELTA_OPS = 0.01
_DELTA, _EPSILON, _MU_SQUARED = "delta", "epsilon", "mu_squared"
_LANES = {
    "pure": (_EPSILON,),
    "adaptive": (_DELTA, _EPSILON, _MU_SQUARED, *map(str, ORDERS)),
}
_TYPICAL_TRAINING = PoissonSampled(0.01, Gaussian(1.0))


@dataclass(frozen=True, slots=True)
class Filter:
    """The frozen limits of one budget and the prices that count against them.

    Attributes:
        accounting: ``pure`` or ``adaptive``.
        version: Pricing version; a stored budget is priced by its own for ever.
        epsilon: The epsilon that holds for the budget's whole life, in nats.
        delta: The delta that holds for the budget's whole life.
        relation: The neighboring relation that sensitivities refer to.
        lanes: Names of the lanes: ``delta``, ``epsilon``, ``mu_squared`` or a Renyi order.
        weights: The share of the converted delta that each lane was given; 0 where it needs none.
        limits: One integer for each lane; negative where the lane can admit nothing.

    >>> budget = pure(1.0)
    >>> budget.price(Repeated(Gaussian(1.0), 2)) == (NEVER,)
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

    def __str__(self) -> str:
        """Return the promise with its exact parameters, for instance ``(8.0, 1e-06)-DP``."""
        return f"({self.epsilon!r}, {self.delta!r})-DP"

    def price(self, event: Event) -> Price:
        """Return what one use of the event costs: one integer for each lane, at most NEVER.

        Raises:
            UnsupportedEvent: If no price is proved under this budget's relation.
        """
        event = canonical(event)
        costs.check_supported(event, self.relation)
        return tuple(min(cost, NEVER) for cost in self._price(event))

    def _price(self, event: Event) -> Price:
        match event:
            case Repeated(inner, uses):
                return tuple(uses * cost for cost in self._price(inner))
            case Composed(events):
                return tuple(map(sum, zip(*map(self._price, events), strict=True)))
            case _:
                return self.quantize(
                    renyi=lambda order: costs.renyi(event, order),
                    mu_squared=costs.mu_squared(event),
                    epsilon=costs.pure_epsilon(event),
                )

    def quantize(
        self,
        *,
        renyi: Callable[[int], float],
        mu_squared: float = math.inf,
        epsilon: float = math.inf,
        delta: float = 0.0,
    ) -> Price:
        """Return the integer price of a release from its real-valued costs, rounded up.

        Args:
            renyi: Bound on the Renyi divergence by integer order, in nats.
            mu_squared: Square of the Gaussian-DP parameter.
            epsilon: Bound on the privacy loss, in nats.
            delta: The delta that the release carries itself.

        A cost that is NaN, negative or infinite is :data:`NEVER`.
        """
        price = []
        for lane in self.lanes:
            if lane == _DELTA:
                price.append(_rounded_up(delta, _DELTA_BITS) if delta else 0)
            elif lane == _EPSILON:
                price.append(_rounded_up(epsilon, _SCALE_BITS))
            elif lane == _MU_SQUARED:
                price.append(_rounded_up(mu_squared, _SCALE_BITS))
            else:
                price.append(_rounded_up(renyi(int(lane)), _SCALE_BITS))
        return tuple(price)

    def price_holds(self, event: Event, stored: Price) -> bool:
        """Say whether a stored price is this filter's price of the event.

        The mathematics library of another host may round differently; half of the slack that
        every price carries (1e-9 of it) is allowed for that.
        """
        return len(stored) == len(self.lanes) and all(
            2 * abs(kept - own) * 10**9 <= own
            for kept, own in zip(stored, self.price(event), strict=True)
        )

    def epsilon_if_fixed(self, totals: Price) -> float:
        """Return the epsilon at this filter's delta if the operations had been fixed in advance.

        Not a guarantee for operations that were chosen after seeing outputs: the guarantee is
        the filter's own (epsilon, delta). The smallest Renyi conversion over the lanes that are
        within their limits (the others are capped and say nothing).
        """
        found = [self.epsilon]
        for lane, total, limit in zip(self.lanes, totals, self.limits, strict=True):
            if lane in (_DELTA, _MU_SQUARED) or total > limit:
                continue
            spent = math.ldexp(total, -_SCALE_BITS)
            found.append(
                spent if lane == _EPSILON else renyi_to_epsilon(int(lane), spent, self.delta)
            )
        return min(found) if any(totals) else 0.0

    def charge(self, price: Price, uses: int) -> Price:
        """Return what ``uses`` uses add to each lane: ``min(uses * price, limit + 1)``.

        Recomputed from ``uses`` at settlement, never subtracted from. The cap keeps a lane that
        cannot bound the event from growing; once above its limit it stays above.

        >>> pure(1.0).charge((2**39,), 1)
        (549755813888,)
        """
        return tuple(
            min(uses * cost, max(limit, -1) + 1)
            for cost, limit in zip(price, self.limits, strict=True)
        )

    def admits(self, totals: Price) -> bool:
        """Say whether lanes at these totals are within the guarantee."""
        fits = [total <= limit for total, limit in zip(totals, self.limits, strict=True)]
        if self.lanes[0] == _DELTA:
            return fits[0] and any(fits[1:])
        return all(fits)

    def uses_that_fit(self, totals: Price, price: Price) -> int:
        """Return the largest number of uses at this price that still fits on top of the totals.

        >>> budget = pure(1.0)
        >>> budget.uses_that_fit((0,), budget.price(Repeated(Gaussian(1.0), 1)))
        0
        """
        rooms = [
            _room(total, cost, limit)
            for total, cost, limit in zip(totals, price, self.limits, strict=True)
        ]
        room = min(rooms[0], max(rooms[1:])) if self.lanes[0] == _DELTA else min(rooms)
        return min(room, validate.MAX_COUNT)

    def share(self, totals: Price) -> float:
        """Return the used share of the limits, from 0 to 1: for reading, it decides nothing.

        Under ``adaptive`` that of the witness with the most room, or of the delta lane if that
        one has less.
        """
        shares = [
            total / limit if limit > 0 else math.inf
            for total, limit in zip(totals, self.limits, strict=True)
        ]
        if self.lanes[0] == _DELTA:
            return max(shares[0], min(shares[1:]))
        return max(shares)

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
        }

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Filter:
        """Return the filter that :meth:`to_record` froze.

        Raises:
            InvalidParameter: If this version of epsledger cannot price by it.
        """
        known = (record.get("accounting"), record.get("version"))
        if known not in (("pure", 1), ("adaptive", 1)):
            raise InvalidParameter("accounting", known, "pure 1 or adaptive 1; upgrade epsledger")
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
            )
        except (LookupError, TypeError, ValueError) as error:
            raise InvalidParameter("record", record, f"a filter's record ({error})") from error
        stored._check_shape()
        return stored

    def _check_shape(self) -> None:
        if self.accounting == "adaptive":
            validate.delta(delta=self.delta)
        elif self.delta != 0:
            raise InvalidParameter("delta", self.delta, "0 under pure accounting")
        if self.lanes != _LANES[self.accounting]:
            raise InvalidParameter("lanes", self.lanes, f"those of {self.accounting} accounting 1")
        shared = [lane not in (_DELTA, _EPSILON) for lane in self.lanes]
        if [weight > 0 for weight in self.weights] != shared or math.fsum(self.weights) > 1:
            raise InvalidParameter("weights", self.weights, "shares of delta, at most 1 in all")
        if len(self.limits) != len(self.lanes):
            raise InvalidParameter("limits", self.limits, "one for each lane")


def pure(
    epsilon: float, *, relation: NeighboringRelation = NeighboringRelation.ADD_REMOVE
) -> Filter:
    """Return the filter of an (epsilon, 0)-DP budget: pure epsilons add up.

    Args:
        epsilon: In nats, from 1e-6 to 1e6.
        relation: Neighboring relation.
    """
    epsilon = validate.epsilon(epsilon=epsilon)
    return _with_limits("pure", epsilon, 0.0, relation, {_EPSILON: 0.0})


def adaptive(
    epsilon: float,
    delta: float,
    *,
    relation: NeighboringRelation = NeighboringRelation.ADD_REMOVE,
    expect: Event | None = None,
) -> Filter:
    """Return the filter of an (epsilon, delta)-DP budget for events chosen at any time.

    Args:
        epsilon: In nats, from 1e-6 to 1e6.
        delta: From 1e-15 to 0.1; 1 % of it is kept for events that carry a delta themselves.
        relation: Neighboring relation.
        expect: One use of the expected workload. It moves the shares of delta towards the
            witness that is best for it and weakens nothing: anything else can still be charged.

    >>> by_default = adaptive(8.0, 1e-6)
    >>> by_default.uses_that_fit((0,) * 19, by_default.price(Gaussian(50.0)))
    5418
    """
    epsilon, delta = validate.epsilon(epsilon=epsilon), validate.delta(delta=delta)
    if expect is not None:
        expect = canonical(expect)
        costs.check_supported(expect, relation)
    weights = _witness_weights(epsilon, delta, expect)
    return _with_limits(
        "adaptive", epsilon, delta, relation, {_DELTA: 0.0, _EPSILON: 0.0} | weights
    )


def limits_hold(filter: Filter) -> bool:
    """Say whether a stored filter's limits are no wider than its epsilon, delta and weights allow.

    Compared with a relative tolerance of 1e-9 for the mathematics library of another host, which
    is inside the rounding that prices and limits already carry.
    """
    weights = dict(zip(filter.lanes, filter.weights, strict=True))
    own = _with_limits(
        filter.accounting, filter.epsilon, filter.delta, filter.relation, weights
    ).limits
    return all(
        stored <= computed + abs(computed) * _SLACK
        for stored, computed in zip(filter.limits, own, strict=True)
    )


def _with_limits(
    accounting: str,
    epsilon: float,
    delta: float,
    relation: NeighboringRelation,
    weights: dict[str, float],
) -> Filter:
    delta_ops = _DELTA_OPS * delta
    limits = []
    for lane, weight in weights.items():
        share = weight * (delta - delta_ops)
        if lane == _DELTA:
            limits.append(_rounded_down(delta_ops, _DELTA_BITS))
        elif lane == _EPSILON:
            limits.append(_rounded_down(epsilon, _SCALE_BITS))
        elif lane == _MU_SQUARED:
            limits.append(_rounded_down(gaussian_mu(epsilon, share) ** 2, _SCALE_BITS))
        else:
            limits.append(_rounded_down(renyi_limit(int(lane), epsilon, share), _SCALE_BITS))
    return Filter(
        accounting,
        1,
        epsilon,
        delta,
        relation,
        tuple(weights),
        tuple(weights.values()),
        tuple(limits),
    )


def _witness_weights(epsilon: float, delta: float, expect: Event | None) -> dict[str, float]:
    """Return each witness's share of the converted delta; they sum to a little under 1."""
    delta_conv = delta - _DELTA_OPS * delta
    if expect is None:
        focus = {_MU_SQUARED: 0.3, _best_order(epsilon, 0.59 * delta_conv, _TYPICAL_TRAINING): 0.59}
    elif costs.summed(costs.mu_squared, expect) < math.inf:
        focus = {_MU_SQUARED: 0.8}
    else:
        focus = {_best_order(epsilon, 0.9 * delta_conv, expect): 0.9}
    lanes = (_MU_SQUARED, *map(str, ORDERS))
    spread = (1 - 1e-9 - sum(focus.values())) / (len(lanes) - len(focus))
    return {lane: focus.get(lane, spread) for lane in lanes}


def _best_order(epsilon: float, delta: float, event: Event) -> str:
    """Return the order under which most uses of the event fit."""

    def uses(order: int) -> float:
        limit = renyi_limit(order, epsilon, delta)
        return (
            limit / costs.summed(lambda part: costs.renyi(part, order), event)
            if limit > 0
            else limit
        )

    return str(max(ORDERS, key=uses))


def _rounded_up(value: float, bits: int) -> int:
    if not 0 <= value < math.inf:
        return NEVER
    if value >= math.ldexp(NEVER, -bits) / 2:
        return NEVER
    return math.ceil(math.ldexp(value, bits) * (1 + _SLACK)) + 1


def _rounded_down(value: float, bits: int) -> int:
    if not value > 0:
        return -1
    return math.floor(math.ldexp(value, bits) * (1 - _SLACK)) - 1


def _room(total: int, cost: int, limit: int) -> int:
    if total > limit:
        return 0
    return (limit - total) // cost if cost else validate.MAX_COUNT
