"""What is outside its domain is a named error, everywhere that takes a number or bytes."""

from __future__ import annotations

import math

import pytest

from dp import (
    ZCDP,
    ApproximateDP,
    Composed,
    DiscreteGaussian,
    Event,
    Filter,
    FixedSizeSampled,
    Gaussian,
    InvalidParameter,
    Laplace,
    MalformedEvent,
    NeighboringRelation,
    NonPrivate,
    PerUnitFilter,
    PoissonSampled,
    PureDP,
    RandomizedResponse,
    RepeatAndSelect,
    RepeatAndSelectPoisson,
    Repeated,
    ShuffledEpoch,
    SparseVector,
    UnsupportedEvent,
    adaptive,
    planned,
    pure,
    smallest_noise,
    uses_that_fit,
)
from dp.accountings import limits_hold
from dp.codec import decode, digest, encode
from dp.conversions import gaussian_epsilon, gaussian_mu
from dp.costs import cost
from dp.errors import DPError, NothingFits
from dp.events import MAX_DEPTH, canonical
from dp.filters import NEVER, unit_limit, unit_price
from dp.pld import compose, largest_mu
from dp.rows import Cost
from dp.validate import MAX_COUNT

NOT_NUMBERS = [
    float("nan"),
    float("inf"),
    float("-inf"),
    0,
    0.0,
    -0.0,
    -1.0,
    -1,
    5e-324,
    2.2e-308,
    True,
    False,
    "1.0",
    b"1",
    None,
    1j,
    [1.0],
    10**400,
    -(10**400),
]


@pytest.mark.parametrize("value", NOT_NUMBERS, ids=repr)
@pytest.mark.parametrize(
    "build",
    [
        Gaussian,
        Laplace,
        PureDP,
        lambda q: PoissonSampled(q, Gaussian(1.0)),
        pure,
        lambda epsilon: adaptive(epsilon, 1e-6),
        lambda delta: adaptive(1.0, delta),
        lambda epsilon: gaussian_mu(epsilon, 1e-6),
        lambda delta: gaussian_mu(1.0, delta),
    ],
)
def test_real_parameters(build, value) -> None:
    with pytest.raises(InvalidParameter) as caught:
        build(value)
    assert isinstance(caught.value, DPError)
    assert isinstance(caught.value, ValueError)
    assert caught.value.name in str(caught.value)


@pytest.mark.parametrize("value", [1.0000001, 2, 1e308])
def test_probabilities_above_one(value: float) -> None:
    with pytest.raises(InvalidParameter):
        PoissonSampled(value, Gaussian(1.0))


@pytest.mark.parametrize("value", [0.1000001, 0.5, 1, 9e-16, 1e-300])
def test_deltas_out_of_range(value: float) -> None:
    with pytest.raises(InvalidParameter, match="delta"):
        adaptive(1.0, value)


@pytest.mark.parametrize("value", [9e-7, 1.1e6, 1e308])
def test_epsilons_out_of_range(value: float) -> None:
    with pytest.raises(InvalidParameter, match="epsilon"):
        pure(value)
    with pytest.raises(InvalidParameter, match="epsilon"):
        adaptive(value, 1e-6)


@pytest.mark.parametrize("value", [*NOT_NUMBERS, 1.0, 2**53, 0.5], ids=repr)
def test_counts(value) -> None:
    with pytest.raises(InvalidParameter, match="count must be an integer"):
        Repeated(Gaussian(1.0), value)


@pytest.mark.parametrize("value", [1, MAX_COUNT])
def test_the_largest_and_smallest_count(value: int) -> None:
    assert Repeated(Gaussian(1.0), value).count == value


@pytest.mark.parametrize("value", ["Gaussian", 1.0, None, {"kind": "Gaussian"}, Gaussian])
def test_what_is_no_event(value) -> None:
    for build in (
        lambda: PoissonSampled(0.5, value),
        lambda: Repeated(value, 2),
        lambda: Composed((Gaussian(1.0), value)),
    ):
        with pytest.raises(InvalidParameter, match="event"):
            build()


def test_an_empty_composition() -> None:
    with pytest.raises(InvalidParameter, match="at least one"):
        Composed(())


def test_nesting_has_a_bottom() -> None:
    event = Gaussian(1.0)
    for _ in range(MAX_DEPTH):
        event = Repeated(event, 2)
    assert canonical(event) == Repeated(Gaussian(1.0), 2**MAX_DEPTH)
    for build in (
        lambda: Repeated(event, 2),
        lambda: Composed((event,)),
        lambda: PoissonSampled(0.5, event),
    ):
        with pytest.raises(InvalidParameter, match="nested"):
            build()


def test_counts_that_multiply_past_the_largest() -> None:
    event = Repeated(Repeated(Gaussian(1.0), 2**30), 2**30)
    for use in (canonical, encode, pure(1.0).price):
        with pytest.raises(InvalidParameter, match="count"):
            use(event)


@pytest.mark.parametrize("cost", [float("nan"), -1.0, -1e-300, float("inf"), float("-inf")])
def test_costs_that_are_none(cost: float) -> None:
    price = adaptive(1.0, 1e-6).quantize(Cost(lambda _: cost, cost, cost, cost))
    assert set(price) == {NEVER}


def test_a_delta_of_its_own() -> None:
    budget = adaptive(1.0, 1e-6)
    price = budget.quantize(Cost(lambda _: 0.0, 0.0, 0.0, 1e-9))
    assert price[0] >= 1e-9 * 2**62
    assert budget.uses_that_fit((0,) * len(price), price) == 9
    with_orders = budget.quantize(Cost(lambda _: 0.0))
    assert (with_orders[0], with_orders[1], with_orders[3]) == (0, NEVER, 1)


GAUSSIAN = b'{"kind":"Gaussian","noise_multiplier":1}'
DEEP = b'{"count":2,"event":' * 900 + GAUSSIAN + b',"kind":"Repeated"}' * 900


@pytest.mark.parametrize(
    "encoded",
    [
        b"",
        b"null",
        b"[]",
        b"1",
        b'"Gaussian"',
        b"not json",
        b"\xff\xfe{}",
        b"\x00",
        GAUSSIAN[:-1],
        GAUSSIAN + b" ",
        b" " + GAUSSIAN,
        GAUSSIAN + GAUSSIAN,
        GAUSSIAN.decode().encode("utf-16"),
        b"\xef\xbb\xbf" + GAUSSIAN,
        b"{}",
        b'{"kind":null}',
        b'{"kind":["Gaussian"],"noise_multiplier":1}',
        b'{"kind":"Gaussian"}',
        b'{"kind":"gaussian","noise_multiplier":1}',
        b'{"kind":"Uniform","noise_multiplier":1}',
        b'{"kind":"Event"}',
        b'{"kind":"\\ud800"}',
        b'{"extra":1,"kind":"Gaussian","noise_multiplier":1}',
        b'{"kind":"NonPrivate","noise_multiplier":1}',
        b'{"noise_multiplier":1,"kind":"Gaussian"}',
        b'{"kind": "Gaussian","noise_multiplier":1}',
        b'{"kind":"Gaussian","noise_multiplier":1.0}',
        b'{"kind":"Gaussian","noise_multiplier":1e0}',
        b'{"kind":"Gaussian","noise_multiplier":01}',
        b'{"kind":"Gaussian","noise_multiplier":2,"noise_multiplier":1}',
        b'{"kind":"Gaussian","kind":"Gaussian","noise_multiplier":1}',
        b'{"kind":"Gaussian","noise_multiplier":NaN}',
        b'{"kind":"Gaussian","noise_multiplier":Infinity}',
        b'{"kind":"Gaussian","noise_multiplier":-Infinity}',
        b'{"kind":"Gaussian","noise_multiplier":1e999}',
        b'{"kind":"Gaussian","noise_multiplier":' + b"1" * 5000 + b"}",
        b'{"kind":"Gaussian","noise_multiplier":0}',
        b'{"kind":"Gaussian","noise_multiplier":-1}',
        b'{"kind":"Gaussian","noise_multiplier":true}',
        b'{"kind":"Gaussian","noise_multiplier":"1"}',
        b'{"kind":"Gaussian","noise_multiplier":[1]}',
        b'{"kind":"Gaussian","noise_multiplier":{}}',
        b'{"count":1,"event":' + GAUSSIAN + b',"kind":"Repeated"}',  # canonical: the event itself
        b'{"count":2.5,"event":' + GAUSSIAN + b',"kind":"Repeated"}',
        b'{"count":9007199254740992,"event":' + GAUSSIAN + b',"kind":"Repeated"}',
        b'{"count":2,"event":null,"kind":"Repeated"}',
        b'{"count":2,"event":[' + GAUSSIAN + b'],"kind":"Repeated"}',
        b'{"event":' + GAUSSIAN + b',"kind":"PoissonSampled","sampling_probability":1}',
        b'{"event":' + GAUSSIAN + b',"kind":"PoissonSampled","sampling_probability":1.5}',
        b'{"events":[],"kind":"Composed"}',
        b'{"events":' + GAUSSIAN + b',"kind":"Composed"}',
        b'{"events":null,"kind":"Composed"}',
        b'{"events":[' + GAUSSIAN + b'],"kind":"Composed"}',
        b'{"events":[' + GAUSSIAN + b"," + GAUSSIAN + b'],"kind":"Composed"}',
        b'{"events":[{"kind":"Laplace","noise_multiplier":1},' + GAUSSIAN + b'],"kind":"Composed"}',
        DEEP,
        b"[" * 100_000,
        b'{"event":' * 100_000,
    ],
    ids=lambda encoded: repr(encoded[:60]),
)
def test_malformed_events(encoded: bytes) -> None:
    with pytest.raises(MalformedEvent, match="not a readable event") as caught:
        decode(encoded)
    assert caught.value.reason


def test_an_encoding_is_for_ever() -> None:
    """The bytes and the digest of one event of every kind, as every version must write them."""
    event = Composed(
        (
            NonPrivate(),
            Repeated(PoissonSampled(0.01, Composed((Gaussian(1.5), Gaussian(0.1)))), 3),
            Laplace(1e21),
            PureDP(1e-7),
        )
    )
    encoded = encode(event)
    assert encoded == (
        b'{"events":[{"kind":"Laplace","noise_multiplier":1e+21},{"kind":"NonPrivate"},'
        b'{"count":3,"event":{"event":{"events":['
        b'{"kind":"Gaussian","noise_multiplier":0.1},{"kind":"Gaussian","noise_multiplier":1.5}],'
        b'"kind":"Composed"},"kind":"PoissonSampled","sampling_probability":0.01},'
        b'"kind":"Repeated"},{"epsilon":1e-7,"kind":"PureDP"}],"kind":"Composed"}'
    )
    assert decode(encoded) == canonical(event)
    assert (
        digest(GAUSSIAN).hex() == "a0a99801ee76e30e792b5cbd974861ef21187f2914534da2fdc2f11ada311402"
    )


@pytest.mark.parametrize("uses", [1, 30, 1000])
def test_the_smallest_noise_fits_and_a_smaller_one_does_not(uses: int) -> None:
    budget = adaptive(3.0, 1e-6)
    held = budget.charge((), budget.price(Gaussian(60.0)), 100)
    for with_noise in (Gaussian, Laplace, lambda sigma: PoissonSampled(0.01, Gaussian(sigma))):
        noise = smallest_noise(budget, held, with_noise, uses=uses)
        assert uses_that_fit(budget, held, with_noise(noise)) >= uses
        assert uses_that_fit(budget, held, with_noise(noise * (1 - 2e-6))) < uses


def test_calibration_that_finds_nothing() -> None:
    budget = adaptive(1.0, 1e-6)
    zero = (0,) * len(budget.limits)
    with pytest.raises(NothingFits, match=r"noise multiplier of up to 0\.5") as caught:
        smallest_noise(budget, zero, Gaussian, uses=10, at_most=0.5)
    assert "10 uses" in caught.value.reason
    wide = pure(1e6)
    assert smallest_noise(wide, (0,), lambda noise: PureDP(1e-4 / noise), uses=1) == 1e-9
    with pytest.raises(InvalidParameter, match="uses"):
        smallest_noise(budget, zero, Gaussian, uses=0)
    with pytest.raises(InvalidParameter, match="at_most"):
        smallest_noise(budget, zero, Gaussian, uses=1, at_most=float("nan"))


REPLACE = NeighboringRelation.REPLACE_ONE
SESSION = PerUnitFilter(1.0)


@pytest.mark.parametrize(
    "build",
    [
        lambda: RandomizedResponse(1.0, 1),
        lambda: FixedSizeSampled(11, 10, Gaussian(1.0)),
        lambda: RepeatAndSelect(Gaussian(1.0), -1.0, 0.5),
        lambda: RepeatAndSelect(Gaussian(1.0), 1.0, 1.0),
        lambda: RepeatAndSelectPoisson(Gaussian(1.0), 0.9),
        lambda: SparseVector(1.0, 1.0, 1, 1),
    ],
)
def test_parameters_that_contradict_each_other(build) -> None:
    with pytest.raises(InvalidParameter):
        build()


@pytest.mark.parametrize(
    "event",
    [
        FixedSizeSampled(10, 100, ApproximateDP(1.0, 1e-9)),
        RepeatAndSelect(ApproximateDP(1.0, 1e-9), 1.0, 0.5),
        RepeatAndSelectPoisson(ApproximateDP(1.0, 1e-9), 2.0),
    ],
)
def test_a_delta_inside_what_has_no_row_for_it(event: Event) -> None:
    with pytest.raises(UnsupportedEvent, match="delta of its own") as caught:
        cost(event, REPLACE)
    assert caught.value.event == event


@pytest.mark.parametrize(
    ("event", "why"),
    [
        (PoissonSampled(0.5, SESSION), "sampling is priced under"),
        (PoissonSampled(0.5, Composed((Gaussian(1.0), SESSION))), "sampling is priced under"),
        (RepeatAndSelect(SESSION, 1.0, 0.5), "only single runs are selected"),
        (RepeatAndSelect(Composed((Gaussian(1.0), SESSION)), 1.0, 0.5), "only single runs"),
        (RepeatAndSelectPoisson(Repeated(SESSION, 2), 2.0), "only single runs are selected"),
        (RepeatAndSelect(RepeatAndSelectPoisson(SESSION, 2.0), 1.0, 0.5), "only single runs"),
    ],
)
def test_a_session_inside_what_takes_single_runs(event: Event, why: str) -> None:
    with pytest.raises(UnsupportedEvent, match=why):
        cost(event)
    assert cost(Composed((SESSION, Gaussian(1.0)))).mu_squared == 2.0  # beside others it is fine


@pytest.mark.parametrize("event", [FixedSizeSampled(1, 10, SESSION), ShuffledEpoch(SESSION)])
def test_a_session_under_replacement(event: Event) -> None:
    with pytest.raises(UnsupportedEvent, match="replacing a unit moves two") as caught:
        cost(event, REPLACE)
    assert caught.value.event == SESSION


@pytest.mark.parametrize("sigma", [1e-160, 1e-154])
def test_no_noise_on_a_sample_of_fixed_size(sigma: float) -> None:
    event = FixedSizeSampled(1, 100, Gaussian(sigma))
    assert cost(event, REPLACE).renyi(64) == math.inf
    assert adaptive(8.0, 1e-6, relation=REPLACE).price(event)[-1] == NEVER


@pytest.mark.parametrize(
    ("limits", "event", "advice"),
    [
        (planned(1.0, 1e-6, slots=[]), ZCDP(0.1), "neither a slot nor Gaussian DP"),
        (pure(1.0), Gaussian(1.0), "a budget with a delta"),
        (pure(1.0), PureDP(1.1), "beyond the whole budget"),
        (adaptive(1.0, 1e-6), PoissonSampled(0.01, Gaussian(1.0)), "expects it"),
        (adaptive(1.0, 1e-6), NonPrivate(), "beyond the whole budget"),
        (adaptive(1.0, 1e-6), Gaussian(50.0), ""),
    ],
    ids=repr,
)
def test_advice(limits: Filter, event: Event, advice: str) -> None:
    found = limits.advice(limits.price(event))
    assert advice in found
    assert bool(advice) == bool(found)


SLOTTED = planned(3.0, 1e-6, slots=[(PureDP(0.1), 3), (PureDP(0.2), 2)])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"slots": [{"kind": "PureDP", "epsilon": 0.1}] * 2}, "different events"),
        (
            {
                "slots": [
                    {"kind": "PureDP", "epsilon": 0.1},
                    {"kind": "Repeated", "count": 2, "event": {"kind": "PureDP", "epsilon": 0.2}},
                ]
            },
            "atomic events",
        ),
        ({"slots": [{"kind": "PureDP", "epsilon": 0.1}]}, "lanes"),
        ({"weights": [0.1, 0.0, 0.0]}, "weights"),
        ({"delta": 0.5}, "delta"),
    ],
)
def test_a_planned_record_that_is_none(change: dict[str, object], words: str) -> None:
    assert Filter.from_record(SLOTTED.to_record()) == SLOTTED
    with pytest.raises(InvalidParameter, match=words):
        Filter.from_record(SLOTTED.to_record() | change)


def test_a_pure_record_with_a_delta() -> None:
    with pytest.raises(InvalidParameter, match="0 under pure"):
        Filter.from_record(pure(1.0).to_record() | {"delta": 0.1})


def test_more_uses_than_the_witness_may_count() -> None:
    budget = adaptive(1.0, 1e-6, expect=PoissonSampled(0.01, Gaussian(1.0)))
    record = budget.to_record()
    record["limits"][-1] = str(budget.limits[-1] + 1)
    assert limits_hold(budget)
    assert not limits_hold(Filter.from_record(record))


def test_losses_that_have_no_epsilon() -> None:
    revealing = compose(((ApproximateDP(1.0, 1e-3), 2),), NeighboringRelation.ADD_REMOVE)
    assert revealing.epsilon(1e-4) == math.inf
    assert revealing.epsilon(0.9) == 0.0


def test_readings_of_no_noise_at_all() -> None:
    assert gaussian_epsilon(math.inf, 1e-6) == math.inf
    assert gaussian_epsilon(0.0, 1e-6) == 0.0


def test_rounding_that_is_not_negligible() -> None:
    losses = compose(((Gaussian(5.0), 3),), NeighboringRelation.ADD_REMOVE)
    with pytest.raises(InvalidParameter, match="rounding error"):
        largest_mu(losses, 1.0, 5e-11)


@pytest.mark.parametrize(
    "event",
    [
        DiscreteGaussian(1.0),
        ApproximateDP(1.0, 1e-9),
        NonPrivate(),
        Composed((Gaussian(1.0), ZCDP(0.1))),
    ],
)
def test_a_unit_pays_for_gaussian_dp_alone(event):
    with pytest.raises(UnsupportedEvent, match="per-unit filter"):
        unit_price(event)


def test_what_a_unit_pays_adds_up_to_its_limit():
    assert unit_price(Repeated(Gaussian(2.0), 3)) == 3 * unit_price(Gaussian(2.0))
    assert unit_price(Composed((Gaussian(2.0), Laplace(9.0)))) == unit_price(
        Gaussian(2.0)
    ) + unit_price(Laplace(9.0))
    assert unit_limit(1e-9) == -1
