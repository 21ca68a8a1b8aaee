"""Hypothesis strategies for events and budgets, and the scale of the randomised tests."""

from __future__ import annotations

import os
from functools import cache

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from dp import (
    ZCDP,
    ApproximateDP,
    BandedMatrixFactorization,
    Composed,
    DiscreteGaussian,
    DiscreteLaplace,
    Event,
    ExponentialMechanism,
    Filter,
    FixedSizeSampled,
    Gaussian,
    GumbelTopK,
    Laplace,
    NeighboringRelation,
    PermuteAndFlip,
    PerUnitFilter,
    PoissonSampled,
    ProposeTestRelease,
    PureDP,
    RandomizedResponse,
    RepeatAndSelect,
    RepeatAndSelectPoisson,
    Repeated,
    ReportNoisyMax,
    ShuffledEpoch,
    SparseVector,
    TreeAggregation,
    adaptive,
    planned,
    pure,
)

SCALE = int(os.environ.get("SCALE", "1"))
"""Multiplies every number of examples; above 1 the examples differ from run to run."""


def examples(count: int) -> settings:
    return settings(
        max_examples=count * SCALE,
        deadline=None,
        derandomize=SCALE == 1,
        suppress_health_check=[HealthCheck.too_slow],  # of a busy machine
    )


def positive(low: float = 1e-3, high: float = 1e6) -> st.SearchStrategy[float]:
    return st.floats(low, high) | st.integers(1, 1000).map(lambda k: k / 8)


noise = positive()
losses = positive(1e-9, 100.0)
probabilities = st.floats(1e-9, 1.0) | st.sampled_from([1e-7, 1e-3, 0.01, 0.5])
counts = st.integers(1, 20)

gaussians = noise.map(Gaussian)
pures = (
    noise.map(Laplace)
    | losses.map(PureDP)
    | noise.map(DiscreteLaplace)
    | losses.map(ReportNoisyMax)
    | losses.map(PermuteAndFlip)
    | st.builds(SparseVector, noise, noise, counts, st.booleans())
)
deltas = st.floats(1e-12, 1.0)
others = (
    noise.map(DiscreteGaussian)
    | positive(1e-9, 1e3).map(ZCDP)
    | losses.map(ExponentialMechanism)
    | st.builds(GumbelTopK, losses, counts)
    | st.builds(ApproximateDP, losses, deltas)
    | st.builds(ProposeTestRelease, losses, losses, deltas)
    | st.builds(TreeAggregation, noise, st.integers(1, 10**6))
    | st.builds(
        BandedMatrixFactorization,
        noise,
        st.lists(st.floats(0.1, 1.0), min_size=1, max_size=4).map(tuple),
        counts,
    )
)


def nested(leaves: st.SearchStrategy[Event]) -> st.SearchStrategy[Event]:
    """Repetitions and compositions, several levels deep."""
    return st.recursive(
        leaves,
        lambda inner: (
            st.builds(Repeated, inner, counts)
            | st.lists(inner, min_size=1, max_size=4).map(lambda parts: Composed(tuple(parts)))
        ),
        max_leaves=6,
    )


proper = probabilities.filter(lambda q: q < 1)
sampled = st.builds(PoissonSampled, proper, nested(gaussians | pures))
selected = st.builds(
    RepeatAndSelect, gaussians | sampled, st.floats(-0.9, 3.0), st.floats(1e-3, 0.99)
) | st.builds(RepeatAndSelectPoisson, gaussians | sampled, st.floats(1.0, 100.0))
filters = positive(1e-3, 1e3).map(PerUnitFilter)
atoms = gaussians | pures | others | filters | sampled | selected
events = nested(atoms)

of_replacing = (
    st.builds(RandomizedResponse, losses, st.integers(2, 1000))
    | st.builds(
        FixedSizeSampled, st.integers(1, 10**4), st.integers(10**4, 10**6), gaussians | pures
    )
    | st.builds(ShuffledEpoch, gaussians | others)
)
events_of_replacing = nested(gaussians | pures | others | of_replacing)


@cache
def _with_uses() -> list[Filter]:
    """Budgets whose limits come from privacy loss distributions; each takes a second to make."""
    step, vote = PoissonSampled(0.01, Gaussian(1.0)), Laplace(20.0)
    replace = NeighboringRelation.REPLACE_ONE
    return [
        adaptive(3.0, 1e-6, expect=step),
        adaptive(1.0, 1e-3, expect=vote, relation=replace),
        planned(8.0, 1e-6, slots=[(step, 1000), (vote, 50), (PureDP(0.1), 3)]),
        planned(1.0, 1e-5, slots=[]),
        planned(2.0, 1e-4, slots=[(Laplace(1.0), 1), (ApproximateDP(0.1, 1e-6), 2)]),
        planned(4.0, 1e-6, slots=[(ShuffledEpoch(Gaussian(5.0)), 3)], relation=replace),
    ]


expected = (
    gaussians | noise.map(DiscreteGaussian) | st.builds(Composed, st.tuples(gaussians, pures))
)
budgets: st.SearchStrategy[Filter] = (
    st.floats(1e-2, 1e3).map(pure)
    | st.builds(
        adaptive,
        st.floats(0.1, 100.0),
        st.sampled_from([1e-15, 1e-9, 1e-6, 1e-3, 0.1]),
        expect=st.none() | expected,
    )
    | st.deferred(lambda: st.sampled_from(_with_uses()))
)
