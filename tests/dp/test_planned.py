"""Budgets with a plan: the filter, and the privacy loss distributions that its limits come from."""

from __future__ import annotations

import itertools
import json
import math
import time
from dataclasses import replace

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution
from hypothesis import given
from hypothesis import strategies as st
from mpmath import mp, mpf

from dp import (
    ZCDP,
    ApproximateDP,
    Composed,
    DiscreteGaussian,
    Event,
    ExponentialMechanism,
    Filter,
    FixedSizeSampled,
    Gaussian,
    GumbelTopK,
    InvalidParameter,
    Laplace,
    NeighboringRelation,
    NothingFits,
    PoissonSampled,
    PureDP,
    RandomizedResponse,
    RepeatAndSelect,
    Repeated,
    ReportNoisyMax,
    ShuffledEpoch,
    UnsupportedEvent,
    planned,
    pld,
)
from dp.accountings import limits_hold, merged
from dp.conversions import gaussian_mu, pure_mu
from dp.filters import Price
from tests.dp import oracles
from tests.strategies import examples

ADD_REMOVE, REPLACE_ONE = NeighboringRelation.ADD_REMOVE, NeighboringRelation.REPLACE_ONE
STEP = PoissonSampled(0.002, Gaussian(0.6))


@pytest.fixture(scope="module")
def training() -> Filter:
    started = time.process_time()  # and not what others do meanwhile
    budget = planned(8.0, 1e-6, slots=[(STEP, 5000)])
    taken = time.process_time() - started
    print(f"planned in {taken:.2f} s")
    assert taken < 5
    return budget


def mu_of(budget: Filter) -> float:
    return math.sqrt(math.ldexp(budget.limits[-1], -40))


def start(budget: Filter) -> Price:
    return (0,) * len(budget.limits)


# --- known figures ------------------------------------------------------------------------------


def test_queries_beside_a_training(training: Filter) -> None:
    query, step = training.price(Gaussian(50.0)), training.price(STEP)
    assert training.uses_that_fit(start(training), query) in range(4805, 4808)
    trained = training.after(start(training), step, 5000)
    assert training.uses_that_fit(trained, query) in range(4805, 4808)
    assert training.uses_that_fit(start(training), step) == 5000
    assert training.uses_that_fit(trained, step) == 0


def test_an_independent_composition_agrees(training: Filter) -> None:
    make = privacy_loss_distribution.from_gaussian_mechanism
    steps = make(0.6, sampling_prob=0.002, value_discretization_interval=1e-4).self_compose(5000)
    whole = steps.compose(make(1 / mu_of(training), value_discretization_interval=1e-4))
    losses = pld.compose(((STEP, 5000),), ADD_REMOVE)
    assert losses.delta(8.0, mu_of(training)) <= 1e-6
    ours = losses.delta(8.0, mu_of(training)) - losses.slack
    assert ours == pytest.approx(whole.get_delta_for_epsilon(8.0), rel=1e-6)
    assert ours == pytest.approx(1e-6, rel=1.1e-5 + losses.slack / 1e-6)


@pytest.mark.parametrize("sigma", [2.0, 10.0, 50.0])
@pytest.mark.parametrize(("epsilon", "delta"), [(1.0, 1e-5), (3.0, 1e-6), (8.0, 1e-3)])
def test_a_plan_of_gaussians_is_the_analytic_gaussian(
    sigma: float, epsilon: float, delta: float
) -> None:
    whole = gaussian_mu(epsilon, delta)
    uses = int(0.7 * (whole * sigma) ** 2)
    if not uses:
        return
    budget = planned(epsilon, delta, slots=[(Gaussian(sigma), uses)])
    together = math.sqrt(uses / sigma**2 + mu_of(budget) ** 2)
    assert whole * (1 - 1e-5) < together
    with mp.workdps(40):
        assert delta * (1 - mpf("1e-3")) < oracles.gaussian_delta(epsilon, together) <= delta


def test_without_slots_it_is_the_analytic_gaussian() -> None:
    for epsilon, delta in ((0.1, 1e-9), (1.0, 1e-6), (8.0, 0.1)):
        budget = planned(epsilon, delta, slots=[])
        assert budget.lanes == ("mu_squared",)
        whole = gaussian_mu(epsilon, delta)
        assert whole * (1 - 1e-6) < mu_of(budget)
        with mp.workdps(40):
            assert oracles.gaussian_delta(epsilon, mu_of(budget)) <= delta


# --- slots and the mu lane ----------------------------------------------------------------------


def test_slots_come_first_and_overflow_into_the_mu_lane() -> None:
    vote = PureDP(0.1)
    budget = planned(3.0, 1e-4, slots=[(vote, 10), (STEP, 100)])
    price = budget.price(vote)
    assert price == (1, 0, 0)
    assert budget.after(start(budget), price, 10) == (10, 0, 0)
    one = budget.after((10, 0, 0), price, 1)
    assert one[:2] == (10, 0)
    assert math.ldexp(one[2], -40) == pytest.approx(pure_mu(0.1) ** 2, rel=1e-8)
    assert one[2] > math.ldexp(pure_mu(0.1) ** 2, 40)
    assert budget.after(start(budget), price, 17) == (10, 0, 7 * one[2])
    fit = budget.uses_that_fit(start(budget), price)
    assert fit == 10 + budget.limits[-1] // one[2]
    assert budget.admits(budget.after(start(budget), price, fit))
    assert not budget.admits(budget.after(start(budget), price, fit + 1))
    # A slot without a bound in the mu lane has no overflow; other events never take a slot.
    other_step = PoissonSampled(0.001, Gaussian(0.6))
    assert not budget.admits(budget.after(start(budget), budget.price(other_step), 1))
    assert not budget.admits(budget.after((0, 100, 0), budget.price(STEP), 1))
    assert budget.price(PureDP(0.05))[:2] == (0, 0)


def test_equal_slots_merge_and_compositions_split() -> None:
    vote = PureDP(0.1)
    written = [
        (Repeated(vote, 4), 2),
        (Composed((Repeated(STEP, 10), vote)), 2),
        (vote, 1),
        (PoissonSampled(1.0, Gaussian(50.0)), 3),
    ]
    assert dict(merged(written)) == {vote: 11, STEP: 20, Gaussian(50.0): 3}
    budget = planned(3.0, 1e-4, slots=written)
    plain = planned(3.0, 1e-4, slots=[(vote, 11), (STEP, 20), (Gaussian(50.0), 3)])
    assert budget == plain
    assert budget.limits[:-1] == (11, 20, 3)
    both = Composed((Repeated(STEP, 3), vote, Gaussian(20.0)))
    assert budget.price(both)[:3] == (1, 3, 0)
    assert budget.price(both)[3] == budget.price(Gaussian(20.0))[3]


SLOTS = planned(3.0, 1e-4, slots=[(PureDP(0.1), 40), (STEP, 100), (Laplace(20.0), 7)])
MIXED = [
    PureDP(0.1),
    STEP,
    Laplace(20.0),
    Gaussian(50.0),
    Composed((PureDP(0.1), Repeated(STEP, 3))),
    Composed((Repeated(PureDP(0.1), 2), Laplace(20.0), Gaussian(30.0))),
]


@examples(300)
@given(
    st.lists(st.tuples(st.sampled_from(MIXED), st.integers(1, 60), st.floats(0, 1)), max_size=6),
    st.sampled_from(MIXED),
    st.integers(1, 200),
    st.floats(0, 1),
)
def test_what_was_not_used_comes_back(
    before: list[tuple[Event, int, float]], event: Event, uses: int, marked: float
) -> None:
    """After marks, totals are what they would be had only the marked uses been asked for."""
    totals = (0, 0, 0, 0)
    for other, asked, share in [*before, (event, uses, marked)]:
        price = SLOTS.price(other)
        charged = SLOTS.charge(totals, price, asked)
        if not SLOTS.admits(tuple(map(sum, zip(totals, charged, strict=True)))):
            continue
        used = int(share * asked)
        part = SLOTS.part(charged, price, used)
        assert SLOTS.part(charged, price, asked) == charged
        assert SLOTS.part(charged, price, 0) == (0, 0, 0, 0)
        assert all(0 <= kept <= whole for kept, whole in zip(part, charged, strict=True))
        assert part == SLOTS.charge(totals, price, used)
        totals = tuple(map(sum, zip(totals, part, strict=True)))
        assert SLOTS.admits(totals)


@examples(300)
@given(
    st.lists(
        st.tuples(st.sampled_from(MIXED), st.integers(1, 60) | st.just(10**9)),
        min_size=1,
        max_size=6,
    )
)
def test_sums_in_any_order_are_the_totals(spends: list[tuple[Event, int]]) -> None:
    """Also above the limit, where a correction can bring them; but not one unit less below it."""
    totals = (0, 0, 0, 0)
    for event, uses in spends:
        totals = SLOTS.after(totals, SLOTS.price(event), uses)
    spent = sorted((SLOTS.price(event), uses, 1) for event, uses in spends)
    assert SLOTS.sums(spent, totals) == totals
    if totals[-1] <= SLOTS.limits[-1]:
        for lane in range(4):
            less = tuple(total - (at == lane) for at, total in enumerate(totals))
            assert SLOTS.sums(spent, less) != less


# --- refusals and records -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slots", "relation"),
    [
        ([(PureDP(1.0), 9)], ADD_REMOVE),
        ([(STEP, 10**7)], ADD_REMOVE),
        ([(Gaussian(0.1), 1)], ADD_REMOVE),
        ([(Gaussian(1e-6), 1)], ADD_REMOVE),
        ([(PureDP(1e6), 1)], ADD_REMOVE),
        ([(ApproximateDP(0.1, 1e-5), 1)], ADD_REMOVE),
        ([(ShuffledEpoch(Gaussian(0.2)), 2)], REPLACE_ONE),
    ],
)
def test_slots_that_are_too_large(slots, relation: NeighboringRelation) -> None:
    with pytest.raises(NothingFits):
        planned(3.0, 1e-6, slots=slots, relation=relation)


@pytest.mark.parametrize(
    ("event", "relation"),
    [
        (ZCDP(0.01), ADD_REMOVE),
        (DiscreteGaussian(10.0), ADD_REMOVE),
        (Composed((PureDP(0.1), ZCDP(0.01))), ADD_REMOVE),
        (FixedSizeSampled(10, 1000, Gaussian(10.0)), REPLACE_ONE),
        (PoissonSampled(0.1, DiscreteGaussian(10.0)), ADD_REMOVE),
        (PoissonSampled(0.1, Gaussian(1.0)), REPLACE_ONE),
    ],
)
def test_events_without_a_known_pair(event: Event, relation: NeighboringRelation) -> None:
    with pytest.raises(UnsupportedEvent):
        planned(3.0, 1e-6, slots=[(event, 1)], relation=relation)


@pytest.mark.parametrize("delta", [9.99e-10, 1e-12, 1e-15, 0.0, 0.2, math.nan])
def test_deltas_that_a_plan_cannot_have(delta: float) -> None:
    with pytest.raises(InvalidParameter, match="delta"):
        planned(3.0, delta, slots=[(Gaussian(50.0), 1)])


@pytest.mark.parametrize("uses", [0, -1, 1.5, True])
def test_uses_that_a_plan_cannot_have(uses) -> None:
    with pytest.raises(InvalidParameter):
        planned(3.0, 1e-6, slots=[(Gaussian(50.0), uses)])


def test_its_record_comes_back(training: Filter) -> None:
    for budget in (training, SLOTS, planned(1.0, 1e-6, slots=[])):
        again = Filter.from_record(json.loads(json.dumps(budget.to_record())))
        assert again == budget
        assert again.price(STEP) == budget.price(STEP)
        assert limits_hold(again)


@pytest.mark.parametrize("lane", [0, 1])
def test_a_limit_that_is_a_little_wider_does_not_hold(training: Filter, lane: int) -> None:
    limits = list(training.limits)
    limits[lane] += math.ceil(limits[lane] * 1e-3)
    assert not limits_hold(replace(training, limits=tuple(limits)))
    limits[lane] -= 2 * math.ceil(training.limits[lane] * 1e-3)
    assert limits_hold(replace(training, limits=tuple(limits)))


# --- no privacy loss distribution is below an explicit pair -------------------------------------


Pair = tuple[list[mpf], list[mpf]]


def several(pair: Pair, uses: int) -> Pair:
    """All uses, by the number of times that each outcome came."""
    p, q = pair
    ps, qs = [], []
    for outcome in itertools.combinations_with_replacement(range(len(p)), uses):
        ways = math.factorial(uses)
        for at in set(outcome):
            ways //= math.factorial(outcome.count(at))
        ps.append(ways * mp.fprod(p[at] for at in outcome))
        qs.append(ways * mp.fprod(q[at] for at in outcome))
    return ps, qs


def on_sample(q: object, pair: Pair) -> Pair:
    q = mpf(q)
    shown, without = pair
    return [q * a + (1 - q) * b for a, b in zip(shown, without, strict=True)], without


def seen_laplace(scale: object, bins: int) -> Pair:
    """A Laplace release of 1 against 0, seen through bins of [0, 1]: post-processing."""
    b = mpf(scale)
    edges = [mpf(at) / bins for at in range(bins + 1)]
    half = mpf(1) / 2
    one = [half * (mp.exp((y - 1) / b) - mp.exp((x - 1) / b)) for x, y in itertools.pairwise(edges)]
    zero = [half * (mp.exp(-x / b) - mp.exp(-y / b)) for x, y in itertools.pairwise(edges)]
    far = half * mp.exp(-1 / b)
    return [far, *one, half], [half, *zero, far]


def approximate(epsilon: object, delta: object) -> Pair:
    """Reveals with probability delta, else responds."""
    truth, lie = oracles.randomized_response(epsilon)
    d = mpf(delta)
    return [d, mpf(0), *((1 - d) * x for x in truth)], [mpf(0), d, *((1 - d) * x for x in lie)]


def bounded_range(epsilon: object, top: object) -> Pair:
    """Two outcomes of losses top * epsilon and (top - 1) * epsilon."""
    e, t = mpf(epsilon), mpf(epsilon) * mpf(top)
    q = (1 - mp.exp(t - e)) / (mp.exp(t) - mp.exp(t - e))
    return [q * mp.exp(t), (1 - q) * mp.exp(t - e)], [q, 1 - q]


def categories(epsilon: object, k: int) -> Pair:
    x = mp.exp(mpf(epsilon))
    rest = x + k - 1
    return [x / rest, 1 / rest, (k - 2) / rest], [1 / rest, x / rest, (k - 2) / rest]


KINDS = {  # event, relation, its explicit pair, whether the pair is all there is; off the grid
    "response": (PureDP(0.70003), ADD_REMOVE, lambda: oracles.randomized_response("0.70003"), True),
    "large response": (PureDP(3.00007), ADD_REMOVE, lambda: oracles.randomized_response("3.00007"), True),
    "noisy max": (ReportNoisyMax(0.20002), REPLACE_ONE, lambda: oracles.randomized_response("0.20002"), True),
    "sampled response": (PoissonSampled(0.1, PureDP(1.5)), ADD_REMOVE, lambda: on_sample("0.1", oracles.randomized_response("1.5")), True),
    "hardly sampled": (PoissonSampled(1e-3, PureDP(4.0)), ADD_REMOVE, lambda: on_sample("1e-3", oracles.randomized_response(4)), True),
    "mostly sampled": (PoissonSampled(0.9, PureDP(0.5)), ADD_REMOVE, lambda: on_sample("0.9", oracles.randomized_response("0.5")), True),
    "laplace": (Laplace(1.25), ADD_REMOVE, lambda: seen_laplace("1.25", 6), False),
    "sharp laplace": (Laplace(0.4), ADD_REMOVE, lambda: seen_laplace("0.4", 6), False),
    "sampled laplace": (PoissonSampled(0.2, Laplace(0.5)), ADD_REMOVE, lambda: on_sample("0.2", seen_laplace("0.5", 6)), False),
    "approximate": (ApproximateDP(0.50003, 1e-3), ADD_REMOVE, lambda: approximate("0.50003", "1e-3"), True),
    "sampled approximate": (PoissonSampled(0.1, ApproximateDP(1.0, 1e-3)), ADD_REMOVE, lambda: on_sample("0.1", approximate(1, "1e-3")), False),
    "exponential": (ExponentialMechanism(1.0), ADD_REMOVE, lambda: bounded_range(1, "0.5"), False),
    "exponential, skewed": (ExponentialMechanism(1.0), ADD_REMOVE, lambda: bounded_range(1, "0.7"), False),
    "top two": (GumbelTopK(0.8, 2), ADD_REMOVE, lambda: several(bounded_range("0.8", "0.45"), 2), False),
    "categories": (RandomizedResponse(1.2, 10), REPLACE_ONE, lambda: categories("1.2", 10), False),
    "selection": (RepeatAndSelect(PureDP(0.2), 1.0, 0.1), ADD_REMOVE, lambda: oracles.randomized_response("0.6"), False),
    "epoch": (ShuffledEpoch(PureDP(0.40004)), REPLACE_ONE, lambda: oracles.randomized_response("0.40004"), True),
}  # fmt: skip


SLOW = {("top two", 5), ("categories", 5), ("exponential", 5)}
"""Many outputs; the others of five uses are of all the kinds of pairs."""


@pytest.mark.parametrize(
    ("kind", "uses"),
    [
        pytest.param(kind, uses, marks=[pytest.mark.long] * ((kind, uses) in SLOW))
        for kind in KINDS
        for uses in (1, 5)
    ],
)
def test_no_distribution_is_below_its_explicit_pair(kind: str, uses: int) -> None:
    event, relation, pair, tight = KINDS[kind]
    with mp.workdps(40):
        p, q = several(pair(), uses)
        finite = [abs(float(mp.log(a / b))) for a, b in zip(p, q, strict=True) if a and b]
        losses = pld.compose(((event, uses),), relation)
        optimistic = pld.compose(((event, uses),), relation, pessimistic=False)
        rounded_down = []
        for epsilon in np.linspace(0.0, max(finite) * 1.01, 25):
            exact = oracles.worst_delta(list(zip(p, q, strict=True)), mpf(float(epsilon)))
            bound = losses.delta(float(epsilon))
            assert exact <= bound
            if tight:
                # The grid of 1e-4 for each use, and the slack.
                near = oracles.worst_delta(
                    list(zip(p, q, strict=True)), mpf(float(epsilon)) - uses * mpf("1e-4")
                )
                assert bound <= near + mpf("1.1e-11")
            rounded_down.append(optimistic.delta(float(epsilon)) - optimistic.slack < exact)
        if tight:
            assert any(rounded_down)  # the control


@pytest.mark.parametrize("scale", [0.2, 1.25, 20.0])
def test_one_laplace_is_the_analytic_one(scale: float) -> None:
    """delta = 1 - exp((epsilon - 1/b) / 2)."""
    losses = pld.compose(((Laplace(scale), 1),), ADD_REMOVE)
    optimistic = pld.compose(((Laplace(scale), 1),), ADD_REMOVE, pessimistic=False)
    below = 0
    for epsilon in np.linspace(0.0, 1 / scale, 50):
        exact = -math.expm1((float(epsilon) - 1 / scale) / 2)
        assert exact <= losses.delta(float(epsilon)) <= exact + 1e-8
        below += optimistic.delta(float(epsilon)) - optimistic.slack < exact - 1e-9
    assert below > 25


@pytest.mark.parametrize("q", [0.01, 0.3])
@pytest.mark.parametrize("scale", [0.3, 2.0])
def test_one_sampled_laplace_is_the_analytic_one(q: float, scale: float) -> None:
    """delta = q times that of the unsampled one at log(1 + (exp(epsilon) - 1) / q)."""
    losses = pld.compose(((PoissonSampled(q, Laplace(scale)), 1),), ADD_REMOVE)
    for epsilon in np.linspace(0.0, math.log1p(q * math.expm1(1 / scale)), 40)[:-1]:
        inner = math.log1p(math.expm1(float(epsilon)) / q)
        exact = q * max(0.0, -math.expm1((inner - 1 / scale) / 2))
        assert exact <= losses.delta(float(epsilon)) <= exact + 1e-7


@pytest.mark.parametrize("q", [0.01, 0.3])
@pytest.mark.parametrize("sigma", [0.6, 2.0])
def test_one_sampled_gaussian_is_the_analytic_one(q: float, sigma: float) -> None:
    losses = pld.compose(((PoissonSampled(q, Gaussian(sigma)), 1),), ADD_REMOVE)
    for epsilon in np.linspace(0.05, 3.0, 40):
        with mp.workdps(40):
            inner = mp.log1p(mp.expm1(mpf(float(epsilon))) / mpf(q))
            exact = mpf(q) * oracles.gaussian_delta(inner, 1 / mpf(sigma))
        assert exact <= losses.delta(float(epsilon)) <= exact * (1 + mpf("1e-5")) + 2e-11


@pytest.mark.parametrize(
    ("sigma", "uses"),
    [
        (0.6, 5),
        (3.0, 1),
        (30.0, 1),
        (30.0, 5),
        pytest.param(0.6, 1, marks=pytest.mark.long),
        pytest.param(3.0, 5, marks=pytest.mark.long),
    ],
)
def test_gaussians_are_the_analytic_ones(sigma: float, uses: int) -> None:
    losses = pld.compose(((Gaussian(sigma), uses),), ADD_REMOVE)
    optimistic = pld.compose(((Gaussian(sigma), uses),), ADD_REMOVE, pessimistic=False)
    mu = math.sqrt(uses) / sigma
    below = 0
    for epsilon in np.linspace(0.0, mu * mu / 2 + 5 * mu, 40):
        with mp.workdps(40):
            exact = oracles.gaussian_delta(float(epsilon), mp.sqrt(uses) / mpf(sigma))
        assert exact <= losses.delta(float(epsilon)) <= exact * (1 + mpf("1e-4")) + 2e-11
        below += optimistic.delta(float(epsilon)) - optimistic.slack < exact
    assert below > 20


# --- counts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "epsilon", "delta"),
    [
        (PureDP(0.1), 1.0, 1e-3),
        (PureDP(0.7), 3.0, 1e-2),
        (Laplace(10.0), 2.0, 1e-6),
        (STEP, 3.0, 1e-5),
        (PoissonSampled(0.1, PureDP(1.0)), 1.0, 1e-4),
        (Gaussian(30.0), 1.0, 1e-6),
    ],
)
def test_the_largest_count_fits_and_one_more_does_not(
    event: Event, epsilon: float, delta: float
) -> None:
    most = pld.largest_count(event, ADD_REMOVE, epsilon, delta)
    assert most > 1
    assert pld.compose(((event, most),), ADD_REMOVE).delta(epsilon) <= delta
    assert pld.compose(((event, most + 1),), ADD_REMOVE).delta(epsilon) > delta
    if isinstance(event, Gaussian):
        assert most == int((gaussian_mu(epsilon, delta) * event.noise_multiplier) ** 2)


def test_the_largest_count_of_what_never_fits() -> None:
    assert pld.largest_count(PureDP(3.0), ADD_REMOVE, 1.0, 1e-3) == 0
