"""A search for the interaction that overspends most, against our filters and an unsound rule.

The adversary picks each mechanism after seeing the outputs so far, from a catalogue and from
mechanisms that it tunes to the largest the rule still admits. With the two probabilities of the
transcript so far as its state, the best choice at every node follows by dynamic programming: the
hockey-stick divergence of the whole is the sum over leaves of (P - exp(epsilon) Q)+.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
from scipy.stats import norm

from dp import Filter, Gaussian, adaptive, pure
from dp.filters import ORDERS, Price
from dp.rows import Cost

_ORDERS = np.array(ORDERS, dtype=float)[:, None]


@dataclass(frozen=True)
class Mechanism:
    """Output probabilities on the two datasets."""

    p: tuple[float, ...]
    q: tuple[float, ...]
    mu_squared: float = math.inf

    def renyi(self) -> np.ndarray:
        """The larger direction at every order, by definition."""
        log_p, log_q = np.log(self.p), np.log(self.q)

        def one_way(first: np.ndarray, second: np.ndarray) -> np.ndarray:
            exponents = _ORDERS * first + (1 - _ORDERS) * second
            top = exponents.max(axis=1, keepdims=True)
            moment = np.exp(exponents - top).sum(axis=1) * 1.0
            return (np.log(moment) + top[:, 0]) / (_ORDERS[:, 0] - 1)

        return np.maximum(np.maximum(one_way(log_p, log_q), one_way(log_q, log_p)), 0.0)

    def largest_loss(self) -> float:
        return float(np.abs(np.log(self.p) - np.log(self.q)).max())

    def turned(self) -> Mechanism:
        return Mechanism(self.q, self.p, self.mu_squared)


def response(epsilon: float) -> Mechanism:
    truth = 1 / (1 + math.exp(-epsilon))
    return Mechanism((truth, 1 - truth), (1 - truth, truth))


def jump(probability: float, loss: float) -> Mechanism:
    other = probability * math.exp(-loss)
    return Mechanism((probability, 1 - probability), (other, 1 - other))


def binned_gaussian(sigma: float) -> Mechanism:
    """A Gaussian seen through seven bins: post-processing, so still (1/sigma)-GDP."""
    edges = np.concatenate([[-np.inf], 0.5 + sigma * np.linspace(-2.5, 2.5, 6), [np.inf]])
    with np.errstate(invalid="ignore"):
        zero, one = np.diff(norm.cdf(edges / sigma)), np.diff(norm.cdf((edges - 1) / sigma))
    return Mechanism(tuple(one), tuple(zero), 1 / sigma**2)


def cut_gaussian(mu: float, loss: float) -> Mechanism:
    """Whether a mu-GDP Gaussian's privacy loss passes a threshold: two outcomes, still mu-GDP."""
    p, q = (max(float(norm.cdf(side * mu / 2 - loss / mu)), 1e-300) for side in (1, -1))
    return Mechanism((p, 1 - p), (q, 1 - q), mu**2)


CATALOGUE = [
    *map(response, (0.05, 0.3, 1.0, 2.0)),
    *(jump(p, z) for p, z in ((1e-3, 3.0), (0.02, 2.0), (1e-4, 6.0))),
    *map(binned_gaussian, (0.5, 2.0)),
]
CATALOGUE += [m.turned() for m in CATALOGUE[4:]]

Totals = tuple[float, ...]


@dataclass
class Rule:
    """What admits: a filter's integers, or the control's real numbers."""

    price: Callable[[Mechanism], Totals]
    admits: Callable[[Totals], bool]
    lanes: int
    tuned: dict[Totals, list[Mechanism]] = field(default_factory=dict)


def ours(budget: Filter) -> Rule:
    def price(mechanism: Mechanism) -> Price:
        curve = dict(zip(ORDERS, mechanism.renyi().tolist(), strict=True))
        return budget.quantize(
            Cost(curve.__getitem__, mechanism.mu_squared, mechanism.largest_loss())
        )

    return Rule(price, budget.admits, len(budget.limits))


def some_order_at_full_delta(epsilon: float, delta: float) -> Rule:
    """The unsound rule: an RDP accountant's epsilon after every event, while below the target."""
    orders = _ORDERS[:, 0]
    limits = epsilon - np.log1p(-1 / orders) + np.log(orders * delta) / (orders - 1)
    return Rule(
        lambda mechanism: tuple(mechanism.renyi().tolist()),
        lambda totals: bool((np.array(totals) <= limits).any()),
        len(ORDERS),
    )


def added(totals: Totals, price: Totals) -> Totals:
    return tuple(a + b for a, b in zip(totals, price, strict=True))


def largest(
    build: Callable[[float], Mechanism],
    fits: Callable[[Mechanism], bool],
    low: float,
    high: float,
) -> Iterator[Mechanism]:
    """The largest parameter that fits, on a logarithmic scale; nothing if none does."""
    if not fits(build(low)):
        return
    for _ in range(26):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if fits(build(middle)) else (low, middle)
    yield build(low)


def tuned(rule: Rule, totals: Totals, epsilon: float) -> list[Mechanism]:
    """For a last step: the largest jumps and Gaussians around the target, the largest response."""
    if totals not in rule.tuned:

        def fits(mechanism: Mechanism) -> bool:
            return rule.admits(added(totals, rule.price(mechanism)))

        found = list(largest(response, fits, 1e-4, 20.0))
        for beyond in (-0.3, 0.016, 0.1, 0.4, 0.7, 1.1, 2.0):
            loss = epsilon + beyond
            found += largest(lambda p, z=loss: jump(p, z), fits, 1e-9, 0.99)
        for beyond in (-0.5, -0.1, 0.0, 0.3):
            loss = epsilon + beyond
            found += largest(lambda mu, z=loss: cut_gaussian(mu, z), fits, epsilon / 30, epsilon)
        rule.tuned[totals] = found
    return rule.tuned[totals]


def worst(rule: Rule, epsilon: float, steps: int) -> float:
    """Delta(epsilon) of the worst interaction found."""
    prices = [(m, rule.price(m)) for m in CATALOGUE]
    scale = math.exp(epsilon)

    def value(p: float, q: float, totals: Totals, left: int) -> float:
        best = max(0.0, p - scale * q)
        if not left or p < 1e-9:
            return best
        options = [(m, added(totals, cost)) for m, cost in prices]
        options = [(m, after, left - 1) for m, after in options if rule.admits(after)]
        options += [(m, totals, 0) for m in tuned(rule, totals, epsilon)]
        for m, after, rest in options:
            outcomes = zip(m.p, m.q, strict=True)
            best = max(best, sum(value(p * a, q * b, after, rest) for a, b in outcomes))
        return best

    return value(1.0, 1.0, (0,) * rule.lanes, steps)


ROUNDING = 1 + 1e-9
"""Of the search's own double precision."""


@pytest.mark.parametrize(
    ("epsilon", "delta", "expect", "steps"),
    [
        (8.0, 1e-3, None, 2),
        (8.0, 1e-3, None, 3),
        (8.0, 1e-3, Gaussian(1.0), 2),
        (3.0, 1e-2, None, 3),
        (1.0, 0.1, None, 3),
        (1.0, 1e-5, None, 2),
    ],
)
def test_adaptive_is_never_overspent(
    epsilon: float, delta: float, expect: Gaussian | None, steps: int
) -> None:
    found = worst(ours(adaptive(epsilon, delta, expect=expect)), epsilon, steps)
    assert delta / 4 < found <= delta * ROUNDING


@pytest.mark.parametrize(
    ("epsilon", "delta", "steps"), [(8.0, 1e-3, 2), (8.0, 1e-3, 3), (3.0, 1e-2, 2)]
)
def test_the_search_overspends_the_unsound_rule(epsilon: float, delta: float, steps: int) -> None:
    found = worst(some_order_at_full_delta(epsilon, delta), epsilon, steps)
    assert found > 1.1 * delta


@pytest.mark.parametrize(("epsilon", "steps"), [(0.5, 3), (2.0, 3), (4.0, 2)])
def test_pure_is_never_overspent(epsilon: float, steps: int) -> None:
    budget = ours(pure(epsilon))
    assert worst(budget, epsilon, steps) <= 1e-12
    budget.tuned.clear()
    assert worst(budget, 0.97 * epsilon, steps) > 1e-4  # it comes close


def test_pure_is_not_a_smaller_epsilon_in_disguise() -> None:
    assert worst(ours(pure(2.0)), 1.999, 1) > 0
