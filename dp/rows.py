"""What is proved about each class of events: one row of :data:`ROWS` bounds it in four measures.

A row bounds four measures at once, in both directions of the neighboring relation, and where the
event carries a delta of its own ONE decomposition serves all of them: with probability 1 - delta
the event behaves as the other three say. ``math.inf`` says that a measure cannot bound the event.
:func:`table` prints the rows, and docs/prices.md holds what it prints.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from scipy.special import ndtri

from dp import divergences
from dp.conversions import pure_mu, renyi_to_delta
from dp.errors import UnsupportedEvent
from dp.events import (
    Atomic,
    Event,
    FixedSizeSampled,
    NonPrivate,
    PoissonSampled,
    RepeatAndSelect,
    RepeatAndSelectPoisson,
    ShuffledEpoch,
    parts,
)
from dp.mechanisms import (
    ZCDP,
    ApproximateDP,
    BandedMatrixFactorization,
    DiscreteGaussian,
    DiscreteLaplace,
    ExponentialMechanism,
    Gaussian,
    GumbelTopK,
    Laplace,
    PermuteAndFlip,
    PerUnitFilter,
    ProposeTestRelease,
    PureDP,
    RandomizedResponse,
    ReportNoisyMax,
    SparseVector,
    TreeAggregation,
)
from dp.units import NeighboringRelation

ADD_REMOVE, REPLACE_ONE = NeighboringRelation.ADD_REMOVE, NeighboringRelation.REPLACE_ONE
_BOTH = (ADD_REMOVE, REPLACE_ONE)
_INNER_ORDERS = (*range(2, 17), 20, 24, 32, 48, 64, 96, 128, 192, 256)
"""Orders among which the selection rows look for the best one of the repeated run."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Bounds on what one use of an event costs.

    Attributes:
        renyi: Renyi divergence by integer order of at least 2, in nats.
        mu_squared: Square of the Gaussian-DP parameter.
        epsilon: Largest privacy loss, in nats.
        delta: The delta that the event carries itself.
    """

    renyi: Callable[[int], float]
    mu_squared: float = math.inf
    epsilon: float = math.inf
    delta: float = 0.0


Inner = Callable[[Event], Cost]
"""Prices an event inside another, under the same relation."""


# --- rows ---------------------------------------------------------------------------------------


def _gaussian(mu_squared: float) -> Cost:
    return Cost(lambda order: order / 2 * mu_squared, mu_squared)


def _zcdp(rho: float) -> Cost:
    return Cost(lambda order: order * rho)


def _laplace(epsilon: float) -> Cost:
    return Cost(lambda order: divergences.laplace(epsilon, order), pure_mu(epsilon) ** 2, epsilon)


def _pure(epsilon: float, delta: float = 0.0) -> Cost:
    return Cost(
        lambda order: divergences.randomized_response(epsilon, order),
        pure_mu(epsilon) ** 2,
        epsilon,
        delta,
    )


def _response(event: RandomizedResponse, _: Inner) -> Cost:
    # The trade-off curve has its kink where one category is told from the rest.
    epsilon, others = event.epsilon, event.categories - 1
    lie = math.exp(-epsilon) / (1 + others * math.exp(-epsilon))
    # Both tails as small numbers: near 1 a double has lost what is missing to 1.
    untrue = others * math.exp(-epsilon) / (1 + others * math.exp(-epsilon))
    mu = min(pure_mu(epsilon), float(-ndtri(untrue) - ndtri(lie)) * (1 + 1e-12))
    return Cost(
        lambda order: divergences.randomized_response(epsilon, order, event.categories),
        mu**2,
        epsilon,
    )


def _selection(epsilon: float, k: int) -> Cost:
    # Two losses t and t - e are told apart best where t = e/2: randomized response of e/2.
    return Cost(
        lambda order: k * divergences.bounded_range(epsilon, order),
        k * pure_mu(epsilon / 2) ** 2,
        k * epsilon,
    )


def _sparse_vector(event: SparseVector, _: Inner) -> Cost:
    moves = event.positives if event.monotone else 2 * event.positives
    return _pure(1 / event.threshold_noise + moves / event.query_noise)


def _poisson_sampled(event: PoissonSampled, cost: Inner) -> Cost:
    q, inner = event.sampling_probability, cost(event.event)
    amplified = math.inf
    if inner.epsilon < math.inf:
        amplified = min(
            inner.epsilon,
            math.log1p(q * math.expm1(inner.epsilon)) if inner.epsilon < 700 else math.inf,
        )
    if inner.delta:
        if amplified == math.inf:
            raise UnsupportedEvent(event, "an event with a delta is sampled with pure ones only")
        return _pure(amplified, max(q * inner.delta, sys.float_info.min))  # never pure
    precision, pairs = 0.0, []
    for part, uses in parts(event.event).items():
        match part:
            case Gaussian(sigma) | DiscreteGaussian(sigma):
                precision += uses / sigma / sigma
            case Laplace(scale):
                pairs.append((uses, divergences.laplace, 1 / scale))
            case _ if (epsilon := cost(part).epsilon) < math.inf:
                pairs.append((uses, divergences.randomized_response, epsilon))
            case _:
                raise UnsupportedEvent(
                    event, f"sampling is priced under Gaussians and pure-DP events, not {part!r}"
                )
    precision = min(precision, sys.float_info.max)

    def log_moment(k: int) -> float:
        return (k - 1) * divergences.total(
            (k / 2 * precision, *(uses * pair(epsilon, k) for uses, pair, epsilon in pairs))
        )

    return Cost(
        lambda order: divergences.sampled(q, order, log_moment),
        pure_mu(amplified) ** 2 if amplified < math.inf else math.inf,
        amplified,
    )


def _fixed_size_sampled(event: FixedSizeSampled, cost: Inner) -> Cost:
    q, inner = event.sample_size / event.dataset_size, cost(event.event)
    if inner.delta:
        raise UnsupportedEvent(event, "an event with a delta of its own is not priced on a sample")
    amplified = math.inf
    if inner.epsilon < 700:
        amplified = math.log1p(q * math.expm1(inner.epsilon))
    return Cost(
        lambda order: min(
            inner.renyi(order),
            divergences.sampled_without_replacement(q, order, inner.renyi, inner.epsilon),
        ),
        pure_mu(amplified) ** 2 if amplified < math.inf else math.inf,
        amplified,
    )


def _repeat_and_select(event: RepeatAndSelect, cost: Inner) -> Cost:
    eta, log_gamma = event.eta, math.log(event.gamma)
    inner = _repeated_run(event, event.event, cost)
    small = eta * log_gamma
    norm = -math.expm1(small) / eta if abs(small) > 1e-12 else -log_gamma
    log_runs = math.log((1 - event.gamma) / norm) - log_gamma
    selection = (1 + eta) * min(
        (1 - 1 / order) * inner.renyi(order) - log_gamma / order for order in _INNER_ORDERS
    )
    epsilon = (2 + eta) * inner.epsilon
    return Cost(
        lambda order: min(
            epsilon, inner.renyi(order) + selection + max(0.0, log_runs) / (order - 1)
        ),
        pure_mu(epsilon) ** 2 if epsilon < math.inf else math.inf,
        epsilon,
    )


def _repeat_and_select_poisson(event: RepeatAndSelectPoisson, cost: Inner) -> Cost:
    inner = _repeated_run(event, event.event, cost)

    def renyi(order: int) -> float:
        reached = math.log1p(1 / (order - 1))
        delta = min(renyi_to_delta(b, inner.renyi(b), reached) for b in _INNER_ORDERS)
        return inner.renyi(order) + event.mean * delta + math.log(event.mean) / (order - 1)

    return Cost(renyi)


def _repeated_run(event: Atomic, run: Event, cost: Inner) -> Cost:
    if any(isinstance(part, PerUnitFilter) for part in parts(run)):
        raise UnsupportedEvent(
            event, "a per-unit filter is an interactive session, and only single runs are selected"
        )
    inner = cost(run)
    if inner.delta:
        raise UnsupportedEvent(event, "a run with a delta of its own is not priced in a selection")
    return inner


@dataclass(frozen=True, slots=True)
class Row:
    """What is proved about one class of events.

    Attributes:
        cost: Computes the bounds of one use, with the means to price what is inside it.
        renyi: The formula at order a, in words.
        mu_squared: Likewise; empty where that measure cannot bound the event.
        epsilon: Likewise.
        source: Paper and theorem.
        relations: Relations under which it is proved; the others are refused.
        refused: Why they are.
        slot: The pair of output distributions that stands for it in a plan; empty where none is
            known, and the event is refused as a slot.
        delta: The delta that the event carries; empty for none.
    """

    cost: Callable[[Any, Inner], Cost]
    renyi: str
    mu_squared: str
    epsilon: str
    source: str
    relations: tuple[NeighboringRelation, ...] = _BOTH
    refused: str = ""
    delta: str = ""
    slot: str = ""


_MIRONOV = "Mironov 2017"
_BUN_STEINKE = "Bun, Steinke 2016, Prop. 3.3"
_NO_SAMPLE_SIZE = "adding a unit changes the size of every sample, or moves others between them"

ROWS: dict[type[Any], Row] = {
    Gaussian: Row(
        lambda e, _: _gaussian(1 / e.noise_multiplier / e.noise_multiplier),
        "a/(2 s²)",
        "1/s²",
        "",
        f"{_MIRONOV}, Prop. 7; Dong, Roth, Su 2022, Thm 2.7",
        slot="itself",
    ),
    DiscreteGaussian: Row(
        lambda e, _: _zcdp(0.5 / e.noise_multiplier / e.noise_multiplier),
        "a/(2 s²)",
        "",
        "",
        "Canonne, Kamath, Steinke 2020, Prop. 5",
    ),
    Laplace: Row(
        lambda e, _: _laplace(1 / e.noise_multiplier),
        "closed form",
        "as PureDP(1/b)",
        "1/b",
        f"{_MIRONOV}, Prop. 6",
        slot="itself",
    ),
    DiscreteLaplace: Row(
        lambda e, _: _pure(1 / e.noise_multiplier),
        "as PureDP(1/b)",
        "as PureDP(1/b)",
        "1/b",
        "Ghosh, Roughgarden, Sundararajan 2012; tight for sensitivity 1",
        slot="randomized response",
    ),
    PureDP: Row(
        lambda e, _: _pure(e.epsilon),
        "randomized response of e",
        "(2 Φ⁻¹(1/(1+exp(-e))))²",
        "e",
        f"{_BUN_STEINKE}; Dong, Roth, Su 2022 (two chords of the Gaussian curve)",
        slot="randomized response",
    ),
    ApproximateDP: Row(
        lambda e, _: _pure(e.epsilon, e.delta),
        "as PureDP(e)",
        "as PureDP(e)",
        "e",
        "Kairouz, Oh, Viswanath 2015",
        delta="d",
        slot="randomized response, d revealed",
    ),
    ZCDP: Row(lambda e, _: _zcdp(e.rho), "a rho", "", "", "Bun, Steinke 2016, Def. 1.1"),
    RandomizedResponse: Row(
        _response,
        "log(1 + r (x^a - 1)(1 - x^(1-a)))/(a-1), x = exp(e), r = 1/(x+k-1)",
        "(Φ⁻¹(x r) - Φ⁻¹(r))²",
        "e",
        "by its definition, two categories of k",
        relations=(REPLACE_ONE,),
        refused="whether a unit answered at all is not protected",
        slot="with two categories",
    ),
    ExponentialMechanism: Row(
        lambda e, _: _selection(e.epsilon, 1),
        "sup over t of the pair of losses t, t-e",
        "as PureDP(e/2)",
        "e",
        "Dong, Durfee, Rogers 2020, Lemma 3.2",
        slot="Gaussian of its mu",
    ),
    GumbelTopK: Row(
        lambda e, _: _selection(e.epsilon, e.k),
        "k times ExponentialMechanism(e)",
        "k times it",
        "k e",
        "Durfee, Rogers 2019, Lemma 4.2",
        slot="Gaussian of its mu",
    ),
    ReportNoisyMax: Row(
        lambda e, _: _pure(e.epsilon),
        "as PureDP(e)",
        "as PureDP(e)",
        "e",
        "Dwork, Roth 2014, Claim 3.9; Ding et al. 2021 (exponential noise)",
        slot="randomized response",
    ),
    PermuteAndFlip: Row(
        lambda e, _: _pure(e.epsilon),
        "as PureDP(e)",
        "as PureDP(e)",
        "e",
        "McKenna, Sheldon 2020, Thm 1",
        slot="randomized response",
    ),
    SparseVector: Row(
        _sparse_vector,
        "as PureDP(1/b + 2c/b')",
        "as PureDP",
        "1/b + 2c/b'; 1/b + c/b' if monotone",
        "Lyu, Su, Li 2017, Thms 4 and 5",
        slot="randomized response",
    ),
    ProposeTestRelease: Row(
        lambda e, _: _pure(e.test_epsilon + e.release_epsilon, e.delta),
        "as PureDP(e + e')",
        "as PureDP(e + e')",
        "e + e'",
        "Dwork, Lei 2009",
        delta="d",
        slot="randomized response, d revealed",
    ),
    PerUnitFilter: Row(
        lambda e, _: _gaussian(e.mu * e.mu),
        "a m²/2",
        "m²",
        "",
        "Feldman, Zrnic 2021, Thm 4.5; Koskela, Tobaben, Honkela 2023 (individual Gaussian DP)",
        relations=(ADD_REMOVE,),
        refused="replacing a unit moves two of them, each held to mu",
        slot="Gaussian",
    ),
    PoissonSampled: Row(
        _poisson_sampled,
        "binomial sum over Gaussian, Laplace and randomized-response moments",
        "as PureDP(e') of pure parts",
        "e' = log(1+q(exp(e)-1))",
        "Mironov, Talwar, Zhang 2019, Thm 5 and 3.3; Balle, Barthe, Gaboardi 2018, Thm 8",
        relations=(ADD_REMOVE,),
        refused="amplification by Poisson sampling is proved for adding or removing a unit only",
        delta="q d",
        slot="sampled Gaussian, Laplace or randomized response, both directions",
    ),
    FixedSizeSampled: Row(
        _fixed_size_sampled,
        "polynomial in m/n over the event's moments",
        "as PureDP(e') of pure parts",
        "e' = log(1+(m/n)(exp(e)-1))",
        "Wang, Balle, Kasiviswanathan 2019, Thm 9; Balle, Barthe, Gaboardi 2018, Thm 9",
        relations=(REPLACE_ONE,),
        refused=_NO_SAMPLE_SIZE,
        slot="randomized response of pure parts",
    ),
    ShuffledEpoch: Row(
        lambda e, cost: cost(e.event),
        "as the event: no amplification",
        "as the event",
        "as the event",
        "quasi-convexity over the orders, of which each shows a unit to one batch",
        relations=(REPLACE_ONE,),
        refused=_NO_SAMPLE_SIZE,
        delta="as the event",
        slot="as the event",
    ),
    TreeAggregation: Row(
        lambda e, _: _gaussian(e.steps.bit_length() / e.noise_multiplier / e.noise_multiplier),
        "a h/(2 s²), h = ceil(log2(n+1))",
        "h/s²",
        "",
        "Kairouz et al. 2021, App. D; adaptive inputs: Denisov et al. 2022, Thm 2.1",
        slot="Gaussian",
    ),
    BandedMatrixFactorization: Row(
        lambda e, _: _gaussian(
            e.participations
            * divergences.total((c / e.noise_multiplier) ** 2 for c in e.coefficients)
        ),
        "a k c·c/(2 s²)",
        "k c·c/s²",
        "",
        "Choquette-Choo et al. 2023 (amplified banded), Thm 2; Denisov et al. 2022, Thm 2.1",
        slot="Gaussian",
    ),
    RepeatAndSelect: Row(
        _repeat_and_select,
        "r(a) + (1+eta) min over b of ((1-1/b) r(b) + log(1/gamma)/b) + log(E K)/(a-1)",
        "as PureDP((2+eta) e) of pure runs",
        "(2+eta) e",
        "Papernot, Steinke 2022, Thm 2 and Cor. 3",
        slot="randomized response of pure runs",
    ),
    RepeatAndSelectPoisson: Row(
        _repeat_and_select_poisson,
        "r(a) + mean delta(log(1+1/(a-1))) + log(mean)/(a-1)",
        "",
        "",
        "Papernot, Steinke 2022, Thm 6",
    ),
    NonPrivate: Row(lambda *_: Cost(lambda _: math.inf), "", "", "", "no bound exists"),
}
"""The table: every atomic event's bounds and where they come from."""


def table() -> str:
    """Return the rows as a Markdown table.

    >>> print(table().splitlines()[2][:47])
    | `Gaussian` | both | a/(2 s²) | 1/s² | refused
    """
    heads = (
        "event", "relation", "adaptive: Renyi order a", "adaptive, planned: mu²",
        "adaptive, pure: epsilon", "adaptive: delta", "planned: pair of a slot", "source",
    )  # fmt: skip
    lines = [heads, ("---",) * len(heads)]
    for kind, row in ROWS.items():
        relations = "both" if row.relations == _BOTH else f"{row.relations[0]} only: {row.refused}"
        bounds = (row.renyi, row.mu_squared, row.epsilon)
        lines.append(
            (
                f"`{kind.__name__}`",
                relations,
                *(text or "refused" for text in bounds),
                row.delta or "0",
                row.slot or "refused",
                row.source,
            )
        )
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
