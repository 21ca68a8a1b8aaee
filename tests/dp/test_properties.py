"""Laws that hold for every event and budget, on generated ones."""

from __future__ import annotations

import json
import math
import os
from dataclasses import fields
from fractions import Fraction
from random import Random

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from mpmath import mp, mpf
from scipy import stats

from dp import (
    Composed,
    Event,
    Filter,
    Gaussian,
    InvalidParameter,
    Laplace,
    NeighboringRelation,
    NonPrivate,
    PoissonSampled,
    PureDP,
    Repeated,
    UnsupportedEvent,
    adaptive,
    pure,
)
from dp.accountings import limits_hold
from dp.codec import decode, digest, encode
from dp.events import KINDS, canonical
from dp.filters import NEVER, ORDERS, Price
from dp.readings import if_fixed
from dp.validate import MAX_COUNT
from tests import strategies
from tests.dp import oracles
from tests.strategies import SCALE, examples

BUDGET = adaptive(8.0, 1e-6)
EITHER = {relation: adaptive(8.0, 1e-6, relation=relation) for relation in NeighboringRelation}
UNIT = 2**40


def added(*prices: Price) -> Price:
    return tuple(map(sum, zip(*prices, strict=True)))


def plain_price(budget: Filter, event: Event) -> Price:
    """Summed as written, without the canonical form."""
    match event:
        case Repeated(inner, uses):
            return tuple(uses * cost for cost in plain_price(budget, inner))
        case Composed(parts):
            return added(*(plain_price(budget, part) for part in parts))
    return budget.price(event)


# --- prices -------------------------------------------------------------------------------------


def capped(price: Price) -> Price:
    return tuple(min(cost, NEVER) for cost in price)


@examples(200)
@given(strategies.events, st.integers(1, 12))
def test_n_uses_cost_n_times_one(event: Event, uses: int) -> None:
    one = BUDGET.price(event)
    repeated = BUDGET.price(Repeated(event, uses))
    assert repeated == capped(tuple(uses * cost for cost in one))
    assert repeated == capped(added(*(BUDGET.price(event) for _ in range(uses))))
    assert repeated == BUDGET.price(Composed((event,) * uses))


@examples(200)
@given(strategies.events)
def test_a_price_is_positive_and_adds_up_as_written(event: Event) -> None:
    price = BUDGET.price(event)
    assert price == capped(plain_price(BUDGET, event))
    assert all(isinstance(cost, int) for cost in price)
    assert all(cost > 0 for cost in price[1:])


@examples(100)
@given(st.lists(strategies.events, min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_order_does_not_matter(parts: list[Event], random: Random) -> None:
    shuffled = random.sample(parts, len(parts))
    once, again = Composed(tuple(parts)), Composed(tuple(shuffled))
    assert canonical(once) == canonical(again)
    assert BUDGET.price(once) == BUDGET.price(again)
    assert digest(encode(once)) == digest(encode(again))


@examples(100)
@given(strategies.events)
def test_canonical_is_idempotent_and_preserves_the_price(event: Event) -> None:
    form = canonical(event)
    assert canonical(form) == form
    assert BUDGET.price(form) == BUDGET.price(event)


@examples(200)
@given(strategies.gaussians | strategies.pures)
def test_certain_sampling_is_no_sampling(event: Event) -> None:
    assert BUDGET.price(PoissonSampled(1.0, event)) == BUDGET.price(event)


@examples(200)
@given(st.sampled_from([Gaussian, Laplace]), strategies.noise, strategies.noise, strategies.proper)
def test_more_noise_is_never_dearer(
    kind: type[Gaussian | Laplace], first: float, second: float, q: float
) -> None:
    less, more = sorted((first, second))
    for low, high in (
        (kind(more), kind(less)),
        (PoissonSampled(q, kind(more)), PoissonSampled(q, kind(less))),
        (PureDP(1 / more), PureDP(1 / less)),
    ):
        assert all(a <= b for a, b in zip(BUDGET.price(low), BUDGET.price(high), strict=True))


@examples(200)
@given(strategies.proper, strategies.proper, strategies.gaussians | strategies.pures)
def test_a_larger_sample_is_never_cheaper(first: float, second: float, event: Event) -> None:
    low, high = sorted((first, second))
    small, large = (BUDGET.price(PoissonSampled(q, event)) for q in (low, high))
    assert all(a <= b for a, b in zip(small, large, strict=True))


@examples(200)
@given(strategies.proper, strategies.gaussians | strategies.losses.map(PureDP))
def test_a_sample_is_never_dearer_than_everyone(q: float, event: Event) -> None:
    """By 1e-9 at most, for a q next to 1; but a sampled Gaussian has no mu."""
    lanes = zip(
        BUDGET.lanes, BUDGET.price(PoissonSampled(q, event)), BUDGET.price(event), strict=True
    )
    for lane, sample, whole in lanes:
        no_mu = lane == "mu_squared" and isinstance(event, Gaussian)
        assert sample == NEVER if no_mu else sample <= whole + whole // 10**9


# --- limits and charges -------------------------------------------------------------------------


def in_relation(budget: Filter, event: Event) -> Event:
    """The event, or a Gaussian where it has no price under the budget's relation."""
    try:
        budget.price(event)
    except UnsupportedEvent:
        return Gaussian(2.0)
    return event


@examples(100)
@given(strategies.budgets, strategies.events, strategies.events, st.integers(0, 10**6))
def test_uses_that_fit_is_exact(budget: Filter, held: Event, event: Event, before: int) -> None:
    held, event = in_relation(budget, held), in_relation(budget, event)
    totals = budget.after((0,) * len(budget.limits), budget.price(held), before)
    price = budget.price(event)
    fits = budget.uses_that_fit(totals, price)
    if fits:
        assert budget.admits(budget.after(totals, price, fits))
    assert not budget.admits(budget.after(totals, price, fits + 1))


@examples(200)
@given(strategies.budgets, strategies.events, st.integers(1, MAX_COUNT))
def test_a_charge_is_capped_just_above_its_limit(budget: Filter, event: Event, uses: int) -> None:
    event = in_relation(budget, event)
    zero = (0,) * len(budget.limits)
    charged = budget.charge(zero, budget.price(event), uses)
    for lane, cost, limit in zip(charged, budget.price(event), budget.limits, strict=True):
        assert 0 <= lane <= max(limit, -1) + 1
        if budget.accounting != "planned":
            assert (lane <= limit) == (uses * cost <= limit)


def lane_of(budget: Filter, name: str) -> int:
    return budget.lanes.index(name)


@pytest.mark.parametrize("uses", [70_000, 10**9, MAX_COUNT])
def test_sums_do_not_wrap(uses: int) -> None:
    """Gate review, row "plain int64": the control wraps at order 64 below a limit, ours caps."""
    lane = lane_of(BUDGET, "64")
    cost = BUDGET.price(Gaussian(0.5))[lane]
    with np.errstate(over="ignore"):
        wrapped = int(np.int64(cost) * np.int64(uses))
    assert wrapped != cost * uses
    assert wrapped < 0 or uses != 70_000
    charged = BUDGET.charge((), BUDGET.price(Gaussian(0.5)), uses)
    assert charged[lane] == BUDGET.limits[lane] + 1
    assert not BUDGET.admits(charged)


def test_a_lane_above_its_limit_stays_there() -> None:
    dead = BUDGET.charge((), BUDGET.price(NonPrivate()), 1)
    assert not BUDGET.admits(dead)
    assert not BUDGET.admits(added(dead, (0,) * len(dead)))
    assert BUDGET.uses_that_fit(dead, BUDGET.price(Gaussian(1e9))) == 0


@pytest.mark.parametrize("budget", [pure(1e6), adaptive(1e6, 0.1), adaptive(1e-6, 1e-15)])
def test_totals_fit_128_bits(budget: Filter) -> None:
    """2**53 entries of the largest charge there is."""
    largest = budget.charge((), (NEVER,) * len(budget.limits), MAX_COUNT)
    assert all(total * 2**53 < 2**127 for total in largest)
    assert max(budget.limits) < NEVER


@pytest.mark.parametrize("name", ["mu_squared", "epsilon"])
def test_a_witness_that_cannot_bound_an_event_is_dead(name: str) -> None:
    sampled = PoissonSampled(0.001, Gaussian(2.0))
    charged = BUDGET.charge((), BUDGET.price(sampled), 1)
    lane = lane_of(BUDGET, name)
    assert charged[lane] == BUDGET.limits[lane] + 1
    assert BUDGET.admits(charged)  # a Renyi order is still there


FINE = 2**200


def exact_gaussian(sigma: float) -> dict[str, Fraction]:
    exact = {name: Fraction(int(name), 2) / Fraction(sigma) ** 2 for name in ("2", "7", "64")}
    return exact | {"mu_squared": 1 / Fraction(sigma) ** 2}


def exact_laplace(scale: float) -> dict[str, Fraction]:
    return {"epsilon": 1 / Fraction(scale)}


def integer_totals(sequences: int, random: Random) -> dict[str, list[float]]:
    """Return relative excesses by lane; raise if a total is below the exact rational.

    The exact ones are rounded up at 2**-200, 160 bits below the last one of a price.
    """
    excesses: dict[str, list[float]] = {}
    for kind, exactly in ((Gaussian, exact_gaussian), (Laplace, exact_laplace)):
        sizes = [10 ** random.uniform(-3, 6) for _ in range(512)]
        pool = []
        for size in sizes:
            price = dict(zip(BUDGET.lanes, BUDGET.price(kind(size)), strict=True))
            exact = {name: math.ceil(value * FINE) for name, value in exactly(size).items()}
            pool.append([(price[name], exact[name]) for name in exact])
        for _ in range(sequences // 2):
            drawn = random.choices(pool, k=random.randint(1, 12))
            uses = [random.choice((1, 2, random.randint(1, 10**6))) for _ in drawn]
            for lane, name in enumerate(exactly(1.0)):
                total = sum(n * event[lane][0] for n, event in zip(uses, drawn, strict=True))
                exact = sum(n * event[lane][1] for n, event in zip(uses, drawn, strict=True))
                assert total * (FINE // UNIT) >= exact
                excesses.setdefault(name, []).append(total * (FINE // UNIT) / exact - 1)
    return excesses


def test_integer_totals_are_never_below_the_exact_ones() -> None:
    for name, found in integer_totals(4000, Random(20_261_122)).items():
        assert np.median(found) < 3e-9, name


@pytest.mark.long
def test_a_million_integer_totals(capsys) -> None:
    found = integer_totals(1_000_000 * SCALE, Random(20_261_123))
    with capsys.disabled():
        for name, excess in found.items():
            median, worst = np.median(excess), np.max(excess)
            print(f"\n{len(excess):,} sums in lane {name}: excess {median:.1e}, worst {worst:.1e}")


def test_control_a_total_rounded_to_nearest_is_below() -> None:
    random, below = Random(1), 0
    for _ in range(1000):
        sigma = 10 ** random.uniform(-3, 6)
        below += round(float(1 / Fraction(sigma) ** 2 * UNIT)) < UNIT / Fraction(sigma) ** 2
    assert below > 300


@examples(60)
@given(strategies.budgets)
def test_limits_are_rounded_down(budget: Filter) -> None:
    shares = dict(zip(budget.lanes, budget.weights, strict=True))
    limits = dict(zip(budget.lanes, budget.limits, strict=True))
    assume(budget.accounting != "planned")
    epsilon = Fraction(budget.epsilon) * UNIT
    assert epsilon * (1 - Fraction(2, 10**9)) - 3 <= limits["epsilon"] <= epsilon
    if budget.accounting == "pure":
        return
    delta = Fraction(budget.delta)
    # What the witnesses and the delta lane may spend together, as rationals.
    spread = sum(map(Fraction, shares.values())) * (delta - delta / 100)
    assert spread + Fraction(limits["delta"], 2**62) <= delta
    with mp.workdps(40):
        converted = mpf(budget.delta) * (1 - mpf(1) / 100)
        for order in ORDERS:
            limit = limits[str(order)]
            # delta of the conversion, Proposition 12 of Canonne, Kamath and Steinke
            if limit >= 0:
                spent = mp.exp((order - 1) * (mpf(limit) / UNIT - budget.epsilon))
                spent *= (1 - mpf(1) / order) ** order / (order - 1)
                assert spent <= shares[str(order)] * converted
        if limits["mu_squared"] > 0:
            mu = mp.sqrt(mpf(limits["mu_squared"]) / UNIT)
            spent = oracles.gaussian_delta(budget.epsilon, mu)
            assert spent <= shares["mu_squared"] * converted


def delta_of_responses(each: float, uses: int, epsilon: float) -> float:
    """Return the exact delta at epsilon of randomized responses, the worst pure-DP mechanisms."""
    right = np.arange(uses + 1)
    losses = (2 * right - uses) * each
    chances = stats.binom.pmf(right, uses, 1 / (1 + math.exp(-each)))
    return float(np.sum(chances * -np.expm1(np.minimum(0.0, epsilon - losses))))


@examples(20)
@given(strategies.budgets)
def test_what_is_reported_is_within_its_bounds(budget: Filter) -> None:
    zero = (0,) * len(budget.limits)
    assert budget.share(zero) == 0.0
    assume(budget.accounting != "planned")
    price = budget.price(PureDP(budget.epsilon / 100))
    fits = budget.uses_that_fit(zero, price)
    assert fits >= 99
    assert 0 < budget.share(budget.after(zero, price, fits)) <= 1
    response = PureDP(budget.epsilon / 100)
    spent = if_fixed([(response, fits)], budget.delta, budget.relation).renyi
    assert spent <= budget.epsilon
    assert delta_of_responses(budget.epsilon / 100, fits, spent) <= budget.delta * (1 + 1e-9)


# --- records ------------------------------------------------------------------------------------


@examples(60)
@given(strategies.budgets)
def test_a_record_survives_json(budget: Filter) -> None:
    again = Filter.from_record(json.loads(json.dumps(budget.to_record())))
    assert again == budget
    assert limits_hold(again)


@examples(60)
@given(strategies.budgets, st.data())
def test_a_widened_limit_is_found(budget: Filter, data: st.DataObject) -> None:
    lane = data.draw(st.integers(0, len(budget.limits) - 1))
    record = budget.to_record()
    limit = budget.limits[lane]
    from_pld = budget.accounting == "planned" or "uses" in budget.lanes[lane]
    record["limits"][lane] = str(limit + max(1, abs(limit) // (10**3 if from_pld else 10**8)))
    assert not limits_hold(Filter.from_record(record))
    record["limits"][lane] = str(min(limit, limit - limit // 2))  # narrower is nobody's loss
    assert limits_hold(Filter.from_record(record))


@pytest.mark.parametrize("lane", [2, 5, 18])
@pytest.mark.parametrize("weight", [0.9, -0.01])
def test_weights_that_are_no_shares_are_found(lane: int, weight: float) -> None:
    record = BUDGET.to_record()
    record["weights"][lane] = weight
    with pytest.raises(InvalidParameter, match="weights"):
        Filter.from_record(record)


def test_weights_that_make_up_for_each_other_are_found() -> None:
    """Negative where none is due, so that the shares of others may be above 1."""
    record = BUDGET.to_record()
    record["weights"] = [-1000.0, -1000.0] + [100.0] * (len(record["weights"]) - 2)
    with pytest.raises(InvalidParameter, match="weights"):
        Filter.from_record(record)


@pytest.mark.parametrize(
    "changed", [{"version": 2}, {"accounting": "zcdp"}, {"version": None}, {"accounting": ""}]
)
def test_a_record_of_another_version_is_refused(changed: dict[str, object]) -> None:
    with pytest.raises(InvalidParameter, match="upgrade"):
        Filter.from_record(BUDGET.to_record() | changed)


@examples(100)
@given(strategies.events, st.data())
def test_a_lowered_price_is_found(event: Event, data: st.DataObject) -> None:
    price = BUDGET.price(event)
    assert BUDGET.price_holds(event, price)
    assert not BUDGET.price_holds(event, price[:-1])
    lane = data.draw(st.integers(1, len(price) - 1))
    lowered = list(price)
    lowered[lane] -= max(1, lowered[lane] // 10**8)
    assert not BUDGET.price_holds(event, tuple(lowered))
    within = list(price)
    within[lane] += within[lane] // (4 * 10**9)  # another host's last digits
    assert BUDGET.price_holds(event, tuple(within))


# --- codec --------------------------------------------------------------------------------------


@examples(200)
@given(strategies.events)
def test_events_survive_the_codec(event: Event) -> None:
    encoded = encode(event)
    assert decode(encoded) == canonical(event)
    assert encode(decode(encoded)) == encoded
    assert len(digest(encoded)) == 32


@examples(200)
@given(strategies.events, strategies.events)
def test_digests_tell_events_apart(first: Event, second: Event) -> None:
    assume(canonical(first) != canonical(second))
    assert digest(encode(first)) != digest(encode(second))


def test_scale_is_a_number() -> None:
    assert int(os.environ.get("SCALE", "1")) == SCALE >= 1


# --- anything at all ----------------------------------------------------------------------------

anything = (
    st.floats()  # NaN, infinities, subnormal and negative ones among them
    | st.floats(0, 1)
    | st.integers()
    | st.sampled_from([1e-308, 5e-324, 1e-154, 1e154, 1.7e308, 0.0, -0.0, 1 - 2**-53, 2**53 - 1])
)
inner = st.sampled_from([Gaussian(1.0), PureDP(0.5), Gaussian(1e-150), PureDP(1e3), Laplace(1e9)])


@st.composite
def wild(draw: st.DrawFn) -> tuple[type, dict[str, object]]:
    """Any class of events with any numbers for its parameters."""
    kind = draw(st.sampled_from(sorted(KINDS.values(), key=lambda kind: kind.__name__)))
    values: dict[str, object] = {}
    for parameter in fields(kind):
        match parameter.name:
            case "event":
                values["event"] = draw(inner)
            case "events":
                values["events"] = tuple(draw(st.lists(inner, max_size=3)))
            case "coefficients":
                values["coefficients"] = tuple(draw(st.lists(anything, max_size=3)))
            case "monotone":
                values["monotone"] = draw(st.booleans())
            case name:
                values[name] = draw(anything)
    return kind, values


@examples(400)
@given(wild())
def test_any_number_is_refused_or_priced(made: tuple[type, dict[str, object]]) -> None:
    kind, values = made
    try:
        event = kind(**values)
    except InvalidParameter:
        return
    assert decode(encode(event)) == canonical(event)
    for relation in NeighboringRelation:
        for budget in (pure(1.0, relation=relation), EITHER[relation]):
            try:
                price = budget.price(event)
            except (UnsupportedEvent, InvalidParameter):
                continue
            assert len(price) == len(budget.lanes)
            for lane, cost in zip(budget.lanes, price, strict=True):
                assert isinstance(cost, int)
                assert (0 if lane == "delta" else 1) <= cost <= NEVER
