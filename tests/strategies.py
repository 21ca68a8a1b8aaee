"""Hypothesis strategies for events and budgets, and the scale of the randomised tests."""

from __future__ import annotations

import os

from hypothesis import settings
from hypothesis import strategies as st

from dp import (
    Composed,
    Event,
    Filter,
    Gaussian,
    Laplace,
    PoissonSampled,
    PureDP,
    Repeated,
    adaptive,
    pure,
)

SCALE = int(os.environ.get("SCALE", "1"))
"""Multiplies every number of examples; above 1 the examples differ from run to run."""


def examples(count: int) -> settings:
    return settings(max_examples=count * SCALE, deadline=None, derandomize=SCALE == 1)


def positive(low: float = 1e-3, high: float = 1e6) -> st.SearchStrategy[float]:
    return st.floats(low, high) | st.integers(1, 1000).map(lambda k: k / 8)


noise = positive()
losses = positive(1e-9, 100.0)
probabilities = st.floats(1e-9, 1.0) | st.sampled_from([1e-7, 1e-3, 0.01, 0.5])
counts = st.integers(1, 20)

gaussians = noise.map(Gaussian)
pures = noise.map(Laplace) | losses.map(PureDP)


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
sampled = st.builds(PoissonSampled, proper, nested(gaussians) | nested(pures))
atoms = gaussians | pures | sampled
events = nested(atoms)

budgets: st.SearchStrategy[Filter] = st.floats(1e-2, 1e3).map(pure) | st.builds(
    adaptive,
    st.floats(0.1, 100.0),
    st.sampled_from([1e-15, 1e-9, 1e-6, 1e-3, 0.1]),
    expect=st.none() | atoms,
)
