"""The three accountings: how a budget's (epsilon, delta) becomes the limits of a filter.

``pure``
    The sum of pure epsilons stays within epsilon. On every transcript the privacy loss is at
    most that sum, however the events were chosen.

``adaptive``
    Every witness has its own share w of delta, fixed at creation, with a sum of at most 1. On
    the transcripts that end under the witness of order a, (1 - exp(epsilon - L))+ is at most
    w_a * delta * X(a), where L is the privacy loss and X(a) = exp((a-1)(L - S_a)), times a
    constant that the limit absorbs, is a supermartingale of mean at most 1 (Feldman and
    Zrnic, "Individual Privacy Accounting via a Renyi Filter", 2021; Lecuyer, "Practical
    Privacy Filters and Odometers with Renyi Differential Privacy", 2021, for one order). The
    parts add up to at most delta over all witnesses: shares for several orders are ours.
    The mu-squared witness is the Gaussian filter of Smith and Thakurta, "Fully Adaptive
    Composition for Gaussian Differential Privacy" (2022); the pure witness needs no share. The
    witness of an expected event lives while nothing else was run: the transcripts that end under
    it are all transcripts of one interaction, which stops when another event or one use
    too many is asked for, and is post-processing of the n uses that were fixed at creation; so
    their part of the hockey-stick divergence is at most that of the n uses, w * delta by its PLD.
    Without the shares ("some order still fits at the full delta") the rule is unsound; the
    counterexample is a test.

``planned``
    The uses of the slots, fixed at creation, and one Gaussian(mu) together are (epsilon, delta)-DP
    by their PLD in both directions. Every use of a slot is post-processing of an independent draw
    from its dominating pair, whenever it happens and whether it happens at all, and adaptively
    chosen mu_i-GDP events with sum of mu_i^2 within mu^2 are post-processing of one Gaussian(mu)
    (Smith and Thakurta, 2022; Koskela, Tobaben, Honkela, "Individual Privacy Accounting with
    Gaussian Differential Privacy", 2023): the whole is post-processing of a fixed product.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from dp import pld, validate
from dp.conversions import gaussian_mu, renyi_limit
from dp.costs import cost
from dp.errors import InvalidParameter, NothingFits, UnsupportedEvent
from dp.events import (
    Atomic,
    Event,
    PoissonSampled,
    Repeated,
    canonical,
    parts,
)
from dp.filters import (
    DELTA,
    EPSILON,
    MU_SQUARED,
    ORDERS,
    SLACK,
    USES,
    Filter,
    lanes,
    rounded_down,
)
from dp.mechanisms import (
    Gaussian,
)
from dp.units import NeighboringRelation

_ADD_REMOVE = NeighboringRelation.ADD_REMOVE
_DELTA_OPS = 0.01
"""Share of delta that adaptive accounting keeps for events that carry a delta themselves."""

_TYPICAL_TRAINING = PoissonSampled(0.01, Gaussian(1.0))


def pure(epsilon: float, *, relation: NeighboringRelation = _ADD_REMOVE) -> Filter:
    """Return the filter of an (epsilon, 0)-DP budget: pure epsilons add up.

    Args:
        epsilon: In nats, from 1e-6 to 1e6.
        relation: Neighboring relation.
    """
    epsilon = validate.epsilon(epsilon=epsilon)
    limit = rounded_down(EPSILON, epsilon)
    return Filter("pure", 1, epsilon, 0.0, relation, (EPSILON,), (0.0,), (limit,))


def adaptive(
    epsilon: float,
    delta: float,
    *,
    relation: NeighboringRelation = _ADD_REMOVE,
    expect: Event | None = None,
) -> Filter:
    """Return the filter of an (epsilon, delta)-DP budget for events chosen at any time.

    Args:
        epsilon: In nats, from 1e-6 to 1e6.
        delta: From 1e-15 to 0.1; 1 % of it is kept for events that carry a delta themselves.
        relation: Neighboring relation.
        expect: One use of the expected workload. It moves the shares of delta towards the
            witnesses that are best for it and weakens nothing: anything else can still be charged.

    Raises:
        UnsupportedEvent: If ``expect`` has no price under the relation.

    >>> by_default = adaptive(8.0, 1e-6)
    >>> by_default.uses_that_fit((0,) * 19, by_default.price(Gaussian(50.0)))
    5418
    """
    epsilon, delta = validate.epsilon(epsilon=epsilon), validate.delta(delta=delta)
    slot = None if expect is None else _counted(expect, delta, relation)
    slots = () if slot is None else (slot,)
    focus = _focus(epsilon, delta, relation, expect, slot)
    names = lanes("adaptive", len(slots))
    shared = [lane for lane in names if lane not in (DELTA, EPSILON)]
    spread = (1 - 1e-9 - sum(focus.values())) / (len(shared) - len(focus))
    weights = tuple(0.0 if lane in (DELTA, EPSILON) else focus.get(lane, spread) for lane in names)
    limits = tuple(
        _limit(lane, weight, epsilon, delta, relation, slot)
        for lane, weight in zip(names, weights, strict=True)
    )
    return Filter("adaptive", 1, epsilon, delta, relation, names, weights, limits, slots)


def planned(
    epsilon: float,
    delta: float,
    *,
    slots: Sequence[tuple[Event, int]],
    relation: NeighboringRelation = _ADD_REMOVE,
) -> Filter:
    """Return the filter of an (epsilon, delta)-DP budget with a plan known up front: the tightest.

    What the slots leave of the budget becomes one Gaussian filter: events that are no slot, or that
    exceed theirs, are admitted at any time if they are Gaussian DP.

    Args:
        epsilon: In nats, from 1e-6 to 1e6.
        delta: From 1e-9 to 0.1.
        slots: Events and how often each will be used at most; compositions count as their parts.
        relation: Neighboring relation.

    Raises:
        NothingFits: If the slots alone exceed (epsilon, delta).
        UnsupportedEvent: If an event has no known dominating pair under the relation.
        InvalidParameter: On a number out of its domain.

    >>> steps = PoissonSampled(0.01, Gaussian(1.0))
    >>> budget = planned(3.0, 1e-6, slots=[(steps, 1000)])
    >>> unspent = (0,) * len(budget.limits)
    >>> budget.uses_that_fit(unspent, budget.price(steps))
    1000
    >>> budget.uses_that_fit(unspent, budget.price(Gaussian(50.0)))
    536
    """
    epsilon, delta = validate.epsilon(epsilon=epsilon), validate.delta(delta=delta)
    if delta < pld.SMALLEST_DELTA:
        raise InvalidParameter("delta", delta, f"at least {pld.SMALLEST_DELTA} under planned")
    committed = merged(slots)
    mu = pld.largest_mu(pld.compose(committed, relation), epsilon, delta)
    names = lanes("planned", len(committed))
    limits = (*(uses for _, uses in committed), max(0, rounded_down(MU_SQUARED, mu * mu)))
    events = tuple(event for event, _ in committed)
    weights = (0.0,) * len(names)
    return Filter("planned", 1, epsilon, delta, relation, names, weights, limits, events)


def merged(slots: Sequence[tuple[Event, int]]) -> pld.Slots:
    """Return slots of different atomic events: repetitions multiplied, equal events merged."""
    total: dict[Atomic, int] = {}
    for event, uses in slots:
        for part, times in parts(Repeated(event, uses)).items():
            total[part] = total.get(part, 0) + times
    return tuple(total.items())


def limits_hold(filter: Filter) -> bool:
    """Say whether a stored filter's limits are no wider than its promise allows.

    Those that are formulas are compared with a relative tolerance of 1e-9 for the mathematics
    library of another host, which is inside the rounding that prices and limits already carry;
    those that come from a PLD are put through it again, and may exceed delta by 1e-6 of it.
    """
    if filter.accounting == "planned":
        mu = (filter.limits[-1] / 2**40) ** 0.5
        spent = pld.compose(filter.committed, filter.relation).delta(filter.epsilon, mu)
        return spent <= filter.delta * (1 + 1e-6)
    own = pure(filter.epsilon, relation=filter.relation).limits
    if filter.accounting == "adaptive":
        own = tuple(
            _limit(lane, weight, filter.epsilon, filter.delta, filter.relation, None)
            for lane, weight in zip(filter.lanes, filter.weights, strict=True)
        )
        if filter.slots and filter.limits[-1] > 0:
            share = filter.weights[-1] * (1 - _DELTA_OPS) * filter.delta
            spent = pld.compose(filter.committed, filter.relation).delta(filter.epsilon)
            if spent > share * (1 + 1e-6):
                return False
            own = (*own[:-1], filter.limits[-1])
    return all(
        stored <= computed + abs(computed) * SLACK
        for stored, computed in zip(filter.limits, own, strict=True)
    )


def _limit(
    lane: str,
    weight: float,
    epsilon: float,
    delta: float,
    relation: NeighboringRelation,
    slot: Atomic | None,
) -> int:
    delta_ops = _DELTA_OPS * delta
    share = weight * (delta - delta_ops)
    if lane == DELTA:
        return rounded_down(lane, delta_ops)
    if lane == EPSILON:
        return rounded_down(lane, epsilon)
    if lane == MU_SQUARED:
        return rounded_down(lane, gaussian_mu(epsilon, share) ** 2)
    if lane.startswith(USES):
        return 0 if slot is None else pld.largest_count(slot, relation, epsilon, share)
    return rounded_down(lane, renyi_limit(int(lane), epsilon, share))


def _counted(expect: Event, delta: float, relation: NeighboringRelation) -> Atomic | None:
    """Return the event whose uses get a witness: one that has a PLD and is not simply Gaussian."""
    event, *others = parts(canonical(expect))
    bounds = cost(expect, relation)
    gaussian = bounds.mu_squared < math.inf and bounds.epsilon == math.inf
    if others or gaussian or bounds.delta or delta < 2 * pld.SMALLEST_DELTA:
        return None
    try:
        pld.compose(((event, 1),), relation)
    except (NothingFits, UnsupportedEvent):
        return None
    return event


def _focus(
    epsilon: float,
    delta: float,
    relation: NeighboringRelation,
    expect: Event | None,
    slot: Atomic | None,
) -> dict[str, float]:
    """Return the witnesses that get more than the rest, and their shares of the converted delta."""
    delta_conv = delta - _DELTA_OPS * delta
    if expect is None:
        best = _best_order(epsilon, 0.59 * delta_conv, _ADD_REMOVE, _TYPICAL_TRAINING)
        return {MU_SQUARED: 0.3, best: 0.59}
    if slot is not None:
        best = _best_order(epsilon, 0.25 * delta_conv, relation, expect)
        return {f"{USES} 1": 0.6, best: 0.25}
    if cost(expect, relation).mu_squared < math.inf:
        return {MU_SQUARED: 0.8}
    return {_best_order(epsilon, 0.9 * delta_conv, relation, expect): 0.9}


def _best_order(epsilon: float, delta: float, relation: NeighboringRelation, event: Event) -> str:
    """Return the order under which most uses of the event fit."""
    bounds = cost(event, relation)

    def uses(order: int) -> float:
        limit = renyi_limit(order, epsilon, delta)
        return limit / max(bounds.renyi(order), 5e-324) if limit > 0 else limit

    return str(max(ORDERS, key=uses))
