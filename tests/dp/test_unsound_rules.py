"""Two rules that admit too much, by explicit interactions, and ours on the same interactions.

The controls are implemented here. Every delta is exact: the leaves of the interaction are
enumerated at 60 digits, in both directions of the neighboring relation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
from mpmath import mp, mpf

from dp import Filter, adaptive, pure
from dp.filters import Price
from dp.rows import Cost
from tests.dp import oracles


@pytest.fixture(autouse=True)
def _sixty_digits():
    with mp.workdps(60):
        yield


class Mechanism(NamedTuple):
    """Output probabilities on two neighboring datasets; ``q`` may be 0 where ``p`` is not."""

    p: list[mpf]
    q: list[mpf]

    def renyi(self, order: int) -> mpf:
        if any((a == 0) != (b == 0) for a, b in zip(self.p, self.q, strict=True)):
            return mp.inf
        return oracles.both_ways(self.p, self.q, order)

    def price(self, budget: Filter) -> Price:
        pure_loss = self.renyi(2) < mp.inf
        loss = float(oracles.largest_loss(self.p, self.q)) if pure_loss else math.inf
        return budget.quantize(Cost(lambda order: float(self.renyi(order)), epsilon=loss))


def leaves(first: Mechanism, then: list[Mechanism | None]) -> Iterator[tuple[mpf, mpf]]:
    """Every transcript's two probabilities; None: the interaction ends there."""
    for a, b, second in zip(first.p, first.q, then, strict=True):
        if second is None:
            yield a, b
        else:
            yield from ((a * p, b * q) for p, q in zip(second.p, second.q, strict=True))


def added(totals: Price, price: Price) -> Price:
    return tuple(map(sum, zip(totals, price, strict=True)))


# --- Rule 1: go on while SOME Renyi order is within (epsilon, delta), each at the full delta ----

EPSILON, DELTA = 8, mpf("1e-3")
FIRST = Mechanism(*oracles.randomized_response("0.05"))
AFTER = [  # after loss +0.05, and after loss -0.05
    Mechanism(*oracles.jump("0.124660931917", "7.965748356968")),
    Mechanism(*oracles.jump("0.002694239173", "8.455465108108")),
]


def full_delta_budget(order: int) -> mpf:
    return EPSILON - mp.log(1 - mpf(1) / order) + mp.log(order * DELTA) / (order - 1)


def some_order_fits(mechanisms: list[Mechanism]) -> bool:
    """The control, with a hair of room for the twelve published digits."""
    return any(
        mp.fsum(m.renyi(order) for m in mechanisms) <= full_delta_budget(order) + mpf("1e-6")
        for order in (3, 64)
    )


def test_some_order_overspends() -> None:
    assert mp.nstr(full_delta_budget(64), 7) == "7.972115"
    assert mp.nstr(full_delta_budget(3), 7) == "5.500894"
    assert some_order_fits([FIRST, AFTER[0]])
    assert some_order_fits([FIRST, AFTER[1]])
    fixed = [oracles.worst_delta(list(leaves(FIRST, [m, m])), EPSILON) for m in AFTER]
    assert [mp.nstr(value, 3) for value in fixed] == ["0.000998", "0.000986"]
    chosen = oracles.worst_delta(list(leaves(FIRST, AFTER)), EPSILON)
    assert mp.nstr(chosen, 4) == "0.001436"
    assert chosen > DELTA


def test_our_filter_on_the_same_interaction() -> None:
    budget = adaptive(8.0, 1e-3)
    zero = (0,) * len(budget.limits)
    once = added(zero, FIRST.price(budget))
    assert budget.admits(once)
    taken = [m if budget.admits(added(once, m.price(budget))) else None for m in AFTER]
    assert None in taken
    assert oracles.worst_delta(list(leaves(FIRST, taken)), EPSILON) <= DELTA


def largest_jump(budget: Filter, totals: Price, loss: mpf) -> Mechanism | None:
    """The most probable jump of this loss that the filter still admits."""

    def fits(probability: mpf) -> bool:
        price = Mechanism(*oracles.jump(probability, loss)).price(budget)
        return budget.admits(added(totals, price))

    low, high = mpf("1e-12"), mpf("0.999")
    if not fits(low):
        return None
    while high - low > low * mpf("1e-9"):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return Mechanism(*oracles.jump(low, loss))


def test_an_adversary_tuned_to_our_filter() -> None:
    """On each branch the best of the largest jumps that fit: near delta, and never past it."""
    budget = adaptive(8.0, 1e-3)
    once = added((0,) * len(budget.limits), FIRST.price(budget))
    then = []
    for kept, other in zip(FIRST.p, FIRST.q, strict=True):
        # A loss of 8 + log(a / (a - 1)) is the best against one order a; a few around each.
        tried = [
            largest_jump(budget, once, 8 + mp.log(mpf(order) / (order - 1)) - mp.log(kept / other))
            for order in (3, 4, 8, 20, 64)
        ]
        found = [m for m in tried if m is not None]
        then.append(
            max(found, key=lambda m: mp.fsum(
                max(mpf(0), kept * p - mp.exp(8) * other * q) for p, q in zip(m.p, m.q, strict=True)
            ))
        )  # fmt: skip
    delta = oracles.worst_delta(list(leaves(FIRST, then)), EPSILON)
    assert DELTA * mpf("0.4") < delta <= DELTA


# --- Rule 2: re-run the exact accountant (PLD) over the log so far ------------------------------


def reveal(probability: object) -> Mechanism:
    r = mpf(probability)
    return Mechanism([r, mpf(0), 1 - r], [mpf(0), r, 1 - r])


def largest(fits: Callable[[mpf], bool], high: str) -> mpf:
    low, top = mpf(0), mpf(high)
    for _ in range(60):
        middle = (low + top) / 2
        low, top = (middle, top) if fits(middle) else (low, middle)
    return low


def response(epsilon: object) -> Mechanism:
    return Mechanism(*oracles.randomized_response(epsilon))


def log_fits(mechanisms: list[Mechanism], epsilon: mpf, delta: mpf) -> bool:
    """The control: the exact delta of the two that were run, as if both had been fixed."""
    first, second = mechanisms
    fixed = oracles.worst_delta(list(leaves(first, [second, second])), epsilon)
    return fixed <= delta + mpf("1e-50")  # equality is reached


def test_rerunning_the_accountant_overspends() -> None:
    epsilon, delta = mpf("0.8"), mpf("0.15")
    first = response("0.5")
    then = [
        response(largest(lambda e: log_fits([first, response(e)], epsilon, delta), "3")),
        reveal("0.15"),
    ]
    assert mp.nstr(mp.log(then[0].p[0] / then[0].q[0]), 5) == "0.73999"
    assert all(log_fits([first, second], epsilon, delta) for second in then)
    chosen = oracles.worst_delta(list(leaves(first, then)), epsilon)
    assert mp.nstr(chosen, 4) == "0.2066"


def test_pure_refuses_both_branches() -> None:
    budget = pure(0.8)
    once = response("0.5").price(budget)
    assert budget.admits(once)
    for second in (response("0.73999"), reveal("0.15")):
        assert not budget.admits(added(once, second.price(budget)))
    filled = response("0.2999999")
    assert budget.admits(added(once, filled.price(budget)))  # it does not refuse everything


@pytest.mark.parametrize("start", ["0.3", "0.5", "0.7"])
def test_the_same_at_a_delta_that_adaptive_takes(start: str) -> None:
    """Both second mechanisms as large as the control admits at (0.8, 0.1)."""
    epsilon, delta = mpf("0.8"), mpf("0.1")
    first = response(start)

    then = [
        response(largest(lambda e: log_fits([first, response(e)], epsilon, delta), "3")),
        reveal(largest(lambda r: log_fits([first, reveal(r)], epsilon, delta), "1")),
    ]
    assert all(log_fits([first, second], epsilon, delta) for second in then)
    assert oracles.worst_delta(list(leaves(first, then)), epsilon) > delta * mpf("1.2")

    budget = adaptive(0.8, 0.1)
    once = first.price(budget)
    assert budget.admits(once)
    taken = [m if budget.admits(added(once, m.price(budget))) else None for m in then]
    assert oracles.worst_delta(list(leaves(first, taken)), epsilon) <= delta

    def charged_reveal(r: mpf) -> Price:  # (0, r)-DP: its own delta, and nothing else
        return budget.quantize(Cost(lambda _: 0.0, 0.0, 0.0, float(r)))

    ours = [
        response(largest(lambda e: budget.admits(added(once, response(e).price(budget))), "3")),
        reveal(largest(lambda r: budget.admits(added(once, charged_reveal(r))), "1")),
    ]
    assert ours[1].p[0] <= delta * mpf("0.01")
    spent = oracles.worst_delta(list(leaves(first, ours)), epsilon)
    assert delta * mpf("0.1") < spent <= delta
