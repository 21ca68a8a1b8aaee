"""A search for the interaction that overspends most, against our filters and two unsound rules.

The adversary picks each mechanism after seeing the outputs so far, from a catalogue and from
mechanisms that it tunes to the largest the rule still admits. With the two probabilities of the
transcript so far as its state, the best choice at every node follows by dynamic programming: the
hockey-stick divergence of the whole is the sum over leaves of (P - exp(epsilon) Q)+. P is the
dataset with one unit more, and then the one with one unit less.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
import pytest
from scipy.stats import laplace, norm

from dp import (
    Event,
    Filter,
    Gaussian,
    Laplace,
    PoissonSampled,
    PureDP,
    adaptive,
    planned,
    pld,
    pure,
)
from dp.conversions import gaussian_mu, renyi_limit
from dp.costs import Cost
from dp.filters import ORDERS

_ORDERS = np.array(ORDERS, dtype=float)[:, None]


@dataclass(frozen=True)
class Mechanism:
    """Output probabilities on the two datasets, and the event it is charged as, if it is one."""

    p: tuple[float, ...]
    q: tuple[float, ...]
    mu_squared: float = math.inf
    event: Event | None = None

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
        return replace(self, p=self.q, q=self.p)


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
    p, q = (float(norm.cdf(side * mu / 2 - loss / mu)) for side in (1, -1))
    p, q = (min(max(each, 1e-300), 1 - 2**-53) for each in (p, q))
    return Mechanism((p, 1 - p), (q, 1 - q), mu**2)


def sampled(q: float, inner: Mechanism) -> Mechanism:
    """The mechanism on a Poisson sample: P has the unit, and shows it with probability q."""
    mixed = tuple(
        (1 - q) * without + q * shown for shown, without in zip(inner.p, inner.q, strict=True)
    )
    return Mechanism(mixed, inner.q)


def binned_laplace(scale: float) -> Mechanism:
    """A Laplace release of 1 against 0 through six bins; the outer two lose nothing."""
    edges = np.array([-np.inf, 0.0, 0.25, 0.5, 0.75, 1.0, np.inf])
    one, zero = (np.diff(laplace.cdf(edges, center, scale)) for center in (1, 0))
    return Mechanism(tuple(one), tuple(zero))


def charged_as(event: Event, *mechanisms: Mechanism) -> list[Mechanism]:
    return [replace(mechanism, event=event) for mechanism in mechanisms]


def pure_uses(epsilon: float) -> list[Mechanism]:
    """Uses of PureDP(epsilon): randomized response, and rare outcomes either way."""
    rare = jump(0.1, epsilon)
    return charged_as(PureDP(epsilon), response(epsilon), rare, rare.turned())


def sampled_uses(q: float, epsilon: float) -> list[Mechanism]:
    """Uses of the same on a Poisson sample."""
    event = PoissonSampled(q, PureDP(epsilon))
    return [m for use in pure_uses(epsilon) for m in charged_as(event, sampled(q, use))]


def gaussian_uses(sigma: float, *losses: float) -> list[Mechanism]:
    """Uses of Gaussian(sigma), seen through seven bins, or only whether a loss is passed."""
    seen = [binned_gaussian(sigma), *(cut_gaussian(1 / sigma, loss) for loss in losses)]
    return charged_as(Gaussian(sigma), *seen)


CATALOGUE = [
    *map(response, (0.05, 0.3, 1.0, 2.0)),
    *(jump(p, z) for p, z in ((1e-3, 3.0), (0.02, 2.0), (1e-4, 6.0))),
    *map(binned_gaussian, (0.5, 2.0)),
]
CATALOGUE += [m.turned() for m in CATALOGUE[4:]]

Totals = Hashable


@dataclass
class Rule:
    """What admits: a filter's integers, or a control's own reckoning; ``start`` is unspent."""

    start: Totals
    after: Callable[[Totals, Mechanism], Totals]
    admits: Callable[[Totals], bool]
    tuned: dict[Hashable, list[Mechanism]] = field(default_factory=dict)

    def fits(self, totals: Totals, mechanism: Mechanism) -> bool:
        return self.admits(self.after(totals, mechanism))


def ours(budget: Filter) -> Rule:
    @cache
    def price(mechanism: Mechanism) -> tuple[int, ...]:
        if mechanism.event is not None:
            return budget.price(mechanism.event)
        curve = dict(zip(ORDERS, mechanism.renyi().tolist(), strict=True))
        return budget.quantize(
            Cost(curve.__getitem__, mechanism.mu_squared, mechanism.largest_loss())
        )

    return Rule(
        (0,) * len(budget.limits),
        lambda totals, mechanism: budget.after(totals, price(mechanism), 1),
        budget.admits,
    )


def some_order_at_full_delta(epsilon: float, delta: float) -> Rule:
    """The unsound rule: an RDP accountant's epsilon after every event, while below the target."""
    orders = _ORDERS[:, 0]
    limits = epsilon - np.log1p(-1 / orders) + np.log(orders * delta) / (orders - 1)
    price = cache(lambda mechanism: tuple(mechanism.renyi().tolist()))
    return Rule(
        (0.0,) * len(ORDERS),
        lambda totals, mechanism: tuple(map(sum, zip(totals, price(mechanism), strict=True))),
        lambda totals: bool((np.array(totals) <= limits).any()),
    )


def exact_delta_of_the_log(epsilon: float, delta: float) -> Rule:
    """Another unsound rule: the exact delta of what was run, as if it had been fixed in advance."""
    scale = math.exp(epsilon)

    @cache
    def whole(log: tuple[Mechanism, ...]) -> tuple[np.ndarray, np.ndarray]:
        if not log:
            return np.ones(1), np.ones(1)
        p, q = whole(log[:-1])
        return np.outer(p, log[-1].p).ravel(), np.outer(q, log[-1].q).ravel()

    def admits(log: tuple[Mechanism, ...]) -> bool:
        p, q = whole(log)
        one, other = (np.maximum(a - scale * b, 0.0).sum() for a, b in ((p, q), (q, p)))
        return bool(max(one, other) <= delta)

    return Rule((), lambda log, mechanism: (*log, mechanism), admits)


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


def tuned(rule: Rule, totals: Totals, target: float) -> list[Mechanism]:
    """For a last step: the largest jumps and Gaussians around the target, the largest response."""
    key = totals, target
    if key not in rule.tuned:

        def fits(mechanism: Mechanism) -> bool:
            return rule.fits(totals, mechanism)

        found = list(largest(response, fits, 1e-4, 20.0))
        for beyond in (-0.3, 0.016, 0.1, 0.4, 0.7, 1.1, 2.0):
            loss = target + beyond
            if loss > 0:
                found += largest(lambda p, z=loss: jump(p, z), fits, 1e-9, 0.99)
        for beyond in (-0.5, -0.1, 0.0, 0.3):
            loss = target + beyond
            high = max(target, 0.5)
            found += largest(lambda mu, z=loss: cut_gaussian(mu, z), fits, high / 30, high)
        rule.tuned[key] = found
    return rule.tuned[key]


def worst(
    rule: Rule,
    epsilon: float,
    steps: int,
    *,
    catalogue: Sequence[Mechanism] = (),
    expected: Sequence[Mechanism] = (),
    expected_steps: int = 0,
    last: Callable[[Totals, float], Sequence[Mechanism]] | None = None,
) -> float:
    """Delta(epsilon) of the worst interaction found.

    Args:
        rule: What admits.
        epsilon: Where the divergence is taken.
        steps: Mechanisms from the catalogue on one path, at most.
        catalogue: Mechanisms to choose from; CATALOGUE unless given.
        expected: Mechanisms of which one path may hold ``expected_steps`` besides.
        expected_steps: How many.
        last: Mechanisms to end with, by totals and loss so far; ``tuned`` unless given.
    """
    catalogue = catalogue or CATALOGUE
    last = last or (lambda totals, _: tuned(rule, totals, epsilon))
    known: dict[Hashable, float] = {}
    admitted: dict[Hashable, Totals | None] = {}

    def stop(loss: float) -> float:
        return max(0.0, -math.expm1(epsilon - loss))

    @cache
    def outcomes(mechanism: Mechanism) -> list[tuple[float, float]]:
        both = zip(mechanism.p, mechanism.q, strict=True)
        return [(a, math.log(a) - math.log(b)) for a, b in both]

    def step(totals: Totals, mechanism: Mechanism) -> Totals | None:
        key = totals, mechanism
        if key not in admitted:
            after = rule.after(totals, mechanism)
            admitted[key] = after if rule.admits(after) else None
        return admitted[key]

    def value(loss: float, totals: Totals, left: int, expected_left: int) -> float:
        """The part of delta below a node per unit of P's probability of it, best play assumed."""
        # Uses in another order reach the same node up to the last digits.
        key = round(loss, 11), totals, left, expected_left
        if key in known:
            return known[key]
        best = stop(loss)
        options = [(m, left - 1, expected_left) for m in catalogue] if left else []
        if expected_left:
            options += [(m, left, expected_left - 1) for m in expected]
        for m, rest, expected_rest in options:
            after = step(totals, m)
            if after is not None:
                reached = (
                    a * value(loss + gain, after, rest, expected_rest) for a, gain in outcomes(m)
                )
                best = max(best, sum(reached))
        if left:
            for m in last(totals, loss):
                best = max(best, sum(a * stop(loss + gain) for a, gain in outcomes(m)))
        known[key] = best
        return best

    return value(0.0, rule.start, steps, expected_steps)


def turned(mechanisms: Sequence[Mechanism]) -> list[Mechanism]:
    return [m.turned() for m in mechanisms]


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


# --- planned ------------------------------------------------------------------------------------


def of_mu(budget: Filter, share: float) -> list[Mechanism]:
    """Gaussians that take a share of the mu lane: binned, and cut where the target is."""
    mu = math.sqrt(share * math.ldexp(budget.limits[-1], -40))
    return gaussian_uses(1 / mu, 0.0, budget.epsilon)


def rest_of_mu(budget: Filter, rule: Rule) -> Callable[[Totals, float], list[Mechanism]]:
    """The largest Gaussian that still fits, cut where it tells most: its whole power at epsilon."""

    @cache
    def mu(totals: Totals) -> float:
        def fits(mechanism: Mechanism) -> bool:
            return rule.fits(totals, mechanism)

        found = list(largest(lambda mu: gaussian_uses(1 / mu)[0], fits, 1e-6, 10.0))
        return math.sqrt(found[0].mu_squared) if found else 0.0

    def last(totals: Totals, loss: float) -> list[Mechanism]:
        return gaussian_uses(1 / mu(totals), budget.epsilon - loss)[1:] if mu(totals) else []

    return last


PLANS = {  # epsilon, delta, slots, steps before the last, least share of delta that must be found
    "responses": (3.0, 1e-2, [(PureDP(1.0), 2), (PoissonSampled(0.3, PureDP(1.0)), 2)], 4, 0.999),
    "small delta": (3.0, 1e-3, [(PureDP(1.0), 2), (PoissonSampled(0.3, PureDP(1.0)), 1)], 3, 0.999),
    "samples": (1.0, 1e-2, [(PoissonSampled(0.1, PureDP(2.0)), 3)], 4, 0.999),
    "gaussian": (3.0, 1e-2, [(Gaussian(2.0), 1), (PureDP(0.8), 2)], 3, 0.9),
    "overflow": (1.0, 1e-2, [(PureDP(0.15), 3)], 4, 0.999),
    "nothing planned": (2.0, 1e-2, [], 2, 0.999),
}


def uses(event: Event) -> list[Mechanism]:
    match event:
        case PureDP(epsilon):
            return pure_uses(epsilon)
        case PoissonSampled(q, PureDP(epsilon)):
            return sampled_uses(q, epsilon)
        case Gaussian(sigma):
            return gaussian_uses(sigma, 0.0, 1.0)
        case Laplace(scale):
            return charged_as(event, binned_laplace(scale))
    raise AssertionError(event)


def worst_of_plan(budget: Filter, slots: Sequence[tuple[Event, int]], steps: int) -> list[float]:
    """Of adding and of removing a unit."""
    catalogue = [m for event, _ in slots for m in uses(event)] + of_mu(budget, 0.5)
    rule = ours(budget)
    return [
        worst(rule, budget.epsilon, steps + 1, catalogue=way, last=rest_of_mu(budget, rule))
        for way in (catalogue, turned(catalogue))
    ]


@pytest.mark.parametrize("plan", PLANS)
def test_planned_is_never_overspent(plan: str) -> None:
    epsilon, delta, slots, steps, floor = PLANS[plan]
    found = worst_of_plan(planned(epsilon, delta, slots=slots), slots, steps)
    assert floor * delta < max(found) <= delta * ROUNDING


@pytest.mark.parametrize("plan", ["samples", "overflow", "nothing planned"])
def test_the_search_overspends_a_plan_that_is_a_little_wider(plan: str) -> None:
    epsilon, delta, slots, steps, _ = PLANS[plan]
    budget = planned(epsilon, delta, slots=slots)
    more_mu = replace(budget, limits=(*budget.limits[:-1], int(1.01 * budget.limits[-1])))
    assert max(worst_of_plan(more_mu, slots, steps)) > delta * 1.001
    if slots:
        one_more = replace(budget, limits=(budget.limits[0] + 1, *budget.limits[1:]))
        assert max(worst_of_plan(one_more, slots, steps + 1)) > delta * 1.1


# --- adaptive with an expected event ------------------------------------------------------------


EXPECTED = {  # epsilon, delta, event, uses that fit, least share of delta that must be found
    "pure": (1.0, 1e-2, PureDP(0.206), 6, 0.59),
    "pure, twice": (2.0, 1e-2, PureDP(1.005), 2, 0.53),
    "sampled": (1.0, 1e-3, PoissonSampled(0.2, PureDP(0.904)), 4, 0.58),
    "sampled, more": (2.0, 1e-2, PoissonSampled(0.2, PureDP(1.868)), 4, 0.58),
    "laplace": (1.0, 1e-2, Laplace(1 / 0.272), 4, 0.5),
}


def worst_of_expected(
    budget: Filter, expected: Sequence[Mechanism], others: Sequence[Mechanism], steps: int
) -> float:
    """Up to one use more than fits, mixed with others, of which the last is tuned."""
    rule = ours(budget)

    def last(totals: Totals, loss: float) -> list[Mechanism]:
        return tuned(rule, totals, round(budget.epsilon - loss, 1))

    return max(
        worst(
            rule,
            budget.epsilon,
            steps,
            catalogue=way,
            expected=used,
            expected_steps=budget.limits[-1] + 1,
            last=last,
        )
        for way, used in ((others, expected), (turned(others), turned(expected)))
    )


def every_witness_at_full_delta(budget: Filter) -> Filter:
    """The unsound rule, on the same witnesses."""

    def limit(lane: str, own: int) -> float:
        if lane.isdigit():
            return math.ldexp(renyi_limit(int(lane), budget.epsilon, budget.delta), 40)
        if lane == "mu_squared":
            return math.ldexp(gaussian_mu(budget.epsilon, budget.delta) ** 2, 40)
        if lane == "uses 1":
            return pld.largest_count(budget.slots[0], budget.relation, budget.epsilon, budget.delta)
        return own

    limits = zip(budget.lanes, budget.limits, strict=True)
    return replace(budget, limits=tuple(int(limit(*both)) for both in limits))


@pytest.mark.parametrize("case", EXPECTED)
def test_adaptive_with_an_expected_event_is_never_overspent(case: str) -> None:
    epsilon, delta, event, fit, floor = EXPECTED[case]
    budget = adaptive(epsilon, delta, expect=event)
    assert budget.lanes[-1] == "uses 1"
    assert budget.limits[-1] == fit
    found = worst_of_expected(budget, uses(event), CATALOGUE, 2)
    assert floor * delta < found <= delta * ROUNDING


@pytest.mark.parametrize(
    ("epsilon", "delta", "event"),
    [
        (4.0, 1e-2, PureDP(0.5)),
        (3.0, 0.05, PureDP(0.5)),
    ],
)
def test_without_shares_the_expected_event_is_overspent(
    epsilon: float, delta: float, event: Event
) -> None:
    budget = adaptive(epsilon, delta, expect=event)
    asked = uses(event)[:1], CATALOGUE[3:4], 1
    found = worst_of_expected(budget, *asked)
    assert delta / 4 < found <= delta * ROUNDING
    found = worst_of_expected(every_witness_at_full_delta(budget), *asked)
    assert found > 1.1 * delta


# --- the control that runs the exact accountant on the log --------------------------------------


@pytest.mark.parametrize(
    ("epsilon", "delta", "steps"),
    [(0.8, 0.15, 2), (0.8, 0.05, 2), (0.8, 0.1, 3), (1.0, 1e-2, 2), (3.0, 1e-2, 2), (8.0, 1e-3, 2)],
)
def test_the_search_overspends_an_exact_accountant_run_on_the_log(
    epsilon: float, delta: float, steps: int
) -> None:
    rule = exact_delta_of_the_log(epsilon, delta)
    first = [*map(response, (0.05, 0.3, 0.5, 1.0)), jump(0.1, 0.5)]

    def last(totals: Totals, loss: float) -> list[Mechanism]:
        reveal = largest(lambda p: jump(p, 30.0), lambda m: rule.fits(totals, m), 1e-9, 0.99)
        return [*tuned(rule, totals, epsilon), *reveal]

    found = worst(rule, epsilon, steps, catalogue=first, last=last)
    assert found > 1.1 * delta
