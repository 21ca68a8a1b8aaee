"""Real-valued privacy costs of events, by the rows of :mod:`dp.rows`.

Integer prices add these up use by use in :mod:`dp.filters`; here they are summed as real numbers,
for events inside other events and for readings.

>>> from dp.events import Gaussian
>>> cost(Gaussian(2.0)).renyi(8)
1.0
>>> cost(Gaussian(2.0)).mu_squared
0.25
"""

from __future__ import annotations

from dp import divergences
from dp.errors import UnsupportedEvent
from dp.events import Atomic, Event, parts
from dp.rows import ROWS, Cost
from dp.units import NeighboringRelation

_ADD_REMOVE = NeighboringRelation.ADD_REMOVE


def cost(event: Event, relation: NeighboringRelation = _ADD_REMOVE) -> Cost:
    """Return the bounds for one use of an event.

    Args:
        event: Any event; the bounds of a composition are the sums of those of its parts.
        relation: The relation that its sensitivities and the bounds are about.

    Raises:
        UnsupportedEvent: If nothing is proved for it under the relation, naming the innermost
            offending part.
    """
    found = [(_atomic(part, relation), uses) for part, uses in parts(event).items()]
    if len(found) == 1 and found[0][1] == 1:
        return found[0][0]
    return Cost(
        lambda order: divergences.total(uses * one.renyi(order) for one, uses in found),
        divergences.total(uses * one.mu_squared for one, uses in found),
        divergences.total(uses * one.epsilon for one, uses in found),
        divergences.total(uses * one.delta for one, uses in found),
    )


def _atomic(event: Atomic, relation: NeighboringRelation) -> Cost:
    row = ROWS[type(event)]
    if relation not in row.relations:
        raise UnsupportedEvent(event, f"{row.refused}; it needs a budget under {row.relations[0]}")
    return row.cost(event, lambda inner: cost(inner, relation))
