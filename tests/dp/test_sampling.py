"""The noise is normal, independent and finite, and the tests would notice if it were not.

Randomness is the operating system's, so every test allows one false alarm in a million.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from dp import InvalidParameter
from dp.sampling import gaussian

FALSE_ALARM = 1e-6
SIZE = 100_000


def looks_normal(sample: np.ndarray, standard_deviation: float) -> bool:
    return stats.ks_1samp(sample, stats.norm(scale=standard_deviation).cdf).pvalue >= FALSE_ALARM


@pytest.mark.parametrize("standard_deviation", [1e-300, 1e-3, 1.0, 7.5, 1e300])
def test_it_is_normal(standard_deviation: float) -> None:
    assert looks_normal(gaussian(SIZE, standard_deviation), standard_deviation)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: gaussian(SIZE, 0.9),
        lambda: gaussian(SIZE, 1.1),
        lambda: gaussian(SIZE, 1.0) + 0.05,
        lambda: abs(gaussian(SIZE, 1.0)),
        lambda: np.linspace(-(3**0.5), 3**0.5, SIZE),  # uniform of the same variance
    ],
)
def test_control_that_the_test_has_teeth(wrong) -> None:
    assert not looks_normal(wrong(), 1.0)


def independent(first: np.ndarray, second: np.ndarray) -> bool:
    """Neither the values nor their sizes nor their signs go together."""
    return all(
        stats.pearsonr(change(first), change(second)).pvalue >= FALSE_ALARM
        for change in (np.asarray, np.abs, np.sign)
    )


def test_calls_are_independent() -> None:
    first, second = gaussian(SIZE, 1.0), gaussian(SIZE, 1.0)
    assert independent(first, second)
    assert independent(first[1:], first[:-1])
    assert independent(first[: SIZE // 2], first[SIZE // 2 :])
    assert len(np.unique(np.concatenate([first, second]))) > 2 * SIZE - 10


def test_control_that_dependence_is_seen() -> None:
    first, second = gaussian(SIZE, 1.0), gaussian(SIZE, 1.0)
    assert not independent(first, first)
    assert not independent(first, -first)
    assert not independent(first, np.abs(first) * np.sign(second))
    assert not independent(first, 0.05 * first + second)


def test_signs_are_even_and_tails_are_right() -> None:
    noise = gaussian(20 * SIZE, 1.0)
    assert np.isfinite(noise).all()
    assert noise.max() > 4
    assert noise.min() < -4
    assert np.abs(noise).max() < 9.3
    for beyond in (0.0, 1.0, 3.0, 4.0):
        for count in ((noise > beyond).sum(), (noise < -beyond).sum()):
            found = stats.binomtest(int(count), len(noise), stats.norm.sf(beyond))
            assert found.pvalue >= FALSE_ALARM


@pytest.mark.parametrize("size", [0, -1, 1.5, True])
def test_sizes(size) -> None:
    with pytest.raises(InvalidParameter, match="size"):
        gaussian(size, 1.0)


@pytest.mark.parametrize("standard_deviation", [0.0, -1.0, float("nan"), float("inf"), True])
def test_standard_deviations(standard_deviation) -> None:
    with pytest.raises(InvalidParameter, match="standard_deviation"):
        gaussian(3, standard_deviation)


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_shapes(size: int) -> None:
    noise = gaussian(size, 1.0)
    assert noise.shape == (size,)
    assert noise.dtype == np.float64


def test_tails_reach_past_twelve_standard_deviations(monkeypatch) -> None:
    """With 63 bits they would end at nine: outputs that only one of two neighbors can have."""
    monkeypatch.setattr("dp.sampling.os.urandom", bytes)
    assert abs(gaussian(1, 1.0)[0]) > 12
