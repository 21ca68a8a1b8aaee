"""The noise has the law it states, and the tests would notice if it had not.

Randomness is the operating system's, so every comparison allows one false alarm in 10**9: there are
some fifty of them in a run.
"""

from __future__ import annotations

from collections import Counter
from decimal import Decimal
from fractions import Fraction
from functools import cache

import mpmath
import numpy as np
import pytest
from scipy import stats

from dp import InvalidParameter, sampling
from dp.sampling import discrete_gaussian, discrete_laplace, gaussian, gumbel

FALSE_ALARM = 1e-9
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


@pytest.mark.parametrize(
    "standard_deviation", [0.0, -1.0, 1.1e300, float("nan"), float("inf"), True]
)
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


def test_the_other_end_is_zero(monkeypatch) -> None:
    monkeypatch.setattr("dp.sampling.os.urandom", lambda size: b"\xff" * size)
    assert gaussian(1, 1.0)[0] == 0


def looks_gumbel(sample: np.ndarray, scale: float) -> bool:
    return stats.ks_1samp(sample, stats.gumbel_r(scale=scale).cdf).pvalue >= FALSE_ALARM


@pytest.mark.parametrize("scale", [1e-300, 1e-3, 1.0, 7.5, 1e300])
def test_it_is_gumbel(scale: float) -> None:
    assert looks_gumbel(gumbel(SIZE, scale), scale)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: gumbel(SIZE, 0.9),
        lambda: gumbel(SIZE, 1.1),
        lambda: gumbel(SIZE, 1.0) + 0.05,
        lambda: -gumbel(SIZE, 1.0),
        lambda: np.euler_gamma + gaussian(SIZE, np.pi / 6**0.5),  # of the same mean and variance
    ],
)
def test_control_that_another_law_is_not_gumbel(wrong) -> None:
    assert not looks_gumbel(wrong(), 1.0)


def test_calls_of_gumbel_are_independent() -> None:
    first, second = gumbel(SIZE, 1.0), gumbel(SIZE, 1.0)
    assert independent(first, second)
    assert independent(first[1:], first[:-1])
    assert len(np.unique(np.concatenate([first, second]))) > 2 * SIZE - 10


def test_both_tails_of_gumbel_are_right() -> None:
    noise = gumbel(20 * SIZE, 1.0)
    assert np.isfinite(noise).all()
    law = stats.gumbel_r()
    for beyond in (1.0, 5.0, 9.0):
        found = stats.binomtest(int((noise > beyond).sum()), len(noise), law.sf(beyond))
        assert found.pvalue >= FALSE_ALARM
    for below in (0.0, -1.0, -2.0):
        found = stats.binomtest(int((noise < below).sum()), len(noise), law.cdf(below))
        assert found.pvalue >= FALSE_ALARM


def wins(scores: np.ndarray, noise: np.ndarray) -> np.ndarray:
    return np.bincount((scores + noise.reshape(-1, len(scores))).argmax(axis=1))


def test_the_largest_noisy_score_is_drawn_as_the_exponential_mechanism_says() -> None:
    scores, scale = np.array([3.0, 2.0, 2.0, 0.0, -1.0]), 1.5
    chances = np.exp(scores / scale) / np.exp(scores / scale).sum()
    drawn = wins(scores, gumbel(5 * SIZE, scale))
    assert stats.chisquare(drawn, SIZE * chances).pvalue >= FALSE_ALARM
    other = wins(scores, gumbel(5 * SIZE, 1.1 * scale))
    assert stats.chisquare(other, SIZE * chances).pvalue < FALSE_ALARM


@pytest.mark.parametrize(
    ("bits", "value"),
    [  # the coin is the lowest bit of the first word
        (bytes(16), -4.4933),  # -log(129 log 2)
        (b"\x01" + bytes(15), 89.416),  # 129 log 2
        (b"\xfe" + b"\xff" * 15, 0.3665),  # the median, from below
        (b"\xff" * 16, 0.3665),  # and from above: -log(log 2)
    ],
)
def test_the_ends_of_gumbel_are_finite(monkeypatch, bits: bytes, value: float) -> None:
    monkeypatch.setattr("dp.sampling.os.urandom", lambda _: bits)
    assert gumbel(1, 1.0)[0] == pytest.approx(value, abs=1e-3)
    assert np.isfinite(gumbel(1, 1e300)[0])


@pytest.mark.parametrize("scale", [0.0, -1.0, 1.1e300, float("nan"), float("inf"), True])
def test_scales_of_gumbel(scale) -> None:
    with pytest.raises(InvalidParameter, match="scale"):
        gumbel(3, scale)


@pytest.mark.parametrize("size", [0, -1, 1.5, True])
def test_sizes_of_gumbel(size) -> None:
    with pytest.raises(InvalidParameter, match="size"):
        gumbel(size, 1.0)


DRAWS = 20_000
LAPLACE = [0.3, 1, 2.5, Fraction(7, 3), 50]
GAUSSIAN = [0.3, Fraction(1, 3), 1, 2.5, Fraction(7, 3), 50]


def law(exponent, parameter, widths: int) -> dict[int, float]:
    """Probabilities proportional to exp(-exponent), out to so many times the parameter."""
    reach = int(widths * parameter) + widths
    with mpmath.workdps(40):
        exact = mpmath.mpf(Fraction(parameter).numerator) / Fraction(parameter).denominator
        weights = {x: mpmath.exp(-exponent(x, exact)) for x in range(-reach, reach + 1)}
        total = mpmath.fsum(weights.values())
        return {x: float(weight / total) for x, weight in weights.items()}


@cache
def laplace_law(scale) -> dict[int, float]:
    return law(lambda x, b: abs(x) / b, scale, 50)


@cache
def gaussian_law(sigma) -> dict[int, float]:
    return law(lambda x, s: x**2 / (2 * s**2), sigma, 12)


def follows(sample: list[int], probabilities: dict[int, float]) -> bool:
    """Chi-square, over runs of neighboring integers that are expected 50 times or more."""
    seen = Counter(sample)
    if not seen.keys() <= probabilities.keys():
        return False
    cells = [[0.0, 0.0]]
    for x, probability in probabilities.items():
        if cells[-1][1] >= 50:
            cells.append([0.0, 0.0])
        cells[-1][0] += seen[x]
        cells[-1][1] += probability * len(sample)
    last = cells.pop()
    cells[-1] = [cells[-1][0] + last[0], cells[-1][1] + last[1]]
    return stats.chisquare(*np.transpose(cells)).pvalue >= FALSE_ALARM


def drawn_from(probabilities: dict[int, float]) -> list[int]:
    weights = np.array(list(probabilities.values()))
    generator = np.random.default_rng(1)
    return generator.choice(list(probabilities), DRAWS, p=weights / weights.sum()).tolist()


@pytest.mark.parametrize("scale", LAPLACE)
def test_it_is_discrete_laplace(scale) -> None:
    assert follows([discrete_laplace(scale) for _ in range(DRAWS)], laplace_law(scale))


@pytest.mark.parametrize("sigma", GAUSSIAN)
def test_it_is_discrete_gaussian(sigma) -> None:
    assert follows([discrete_gaussian(sigma) for _ in range(DRAWS)], gaussian_law(sigma))


@pytest.mark.parametrize("factor", [Fraction(9, 10), Fraction(11, 10)])
@pytest.mark.parametrize(
    ("right", "parameter"),
    [(laplace_law, scale) for scale in LAPLACE] + [(gaussian_law, sigma) for sigma in GAUSSIAN],
)
def test_control_that_a_wrong_width_is_seen(right, parameter, factor) -> None:
    assert follows(drawn_from(right(parameter)), right(parameter))
    assert not follows(drawn_from(right(factor * Fraction(parameter))), right(parameter))


@pytest.mark.parametrize(
    ("right", "parameter"),
    [(laplace_law, scale) for scale in LAPLACE[:-1]]
    + [(gaussian_law, sigma) for sigma in GAUSSIAN[:-1]],
)
def test_control_that_a_zero_counted_twice_is_seen(right, parameter) -> None:
    probabilities = right(parameter)
    twice = probabilities | {0: 2 * probabilities[0]}
    assert not follows(drawn_from(twice), probabilities)


@pytest.mark.parametrize("sigma", [0.3, Fraction(1, 3), 1])
def test_control_that_a_rounded_gaussian_is_seen(sigma) -> None:
    rounded = np.rint(np.random.default_rng(1).normal(0, float(sigma), DRAWS)).astype(int)
    assert not follows(rounded.tolist(), gaussian_law(sigma))


@pytest.mark.parametrize("parameter", [2.5, 50])
def test_control_that_a_wrong_shape_is_seen(parameter) -> None:
    """Of the same deviation: that of a Laplace variate is the square root of 2 scales."""
    same = laplace_law(Fraction(parameter / 2**0.5))
    assert not follows(drawn_from(same), gaussian_law(parameter))


def test_control_that_impossible_values_are_seen() -> None:
    assert not follows([0] * 1000 + [10**6], {-1: 0.01, 0: 0.98, 1: 0.01})


def test_wide_ones() -> None:
    """At this width the integers are as good as real numbers."""
    wide = np.array([discrete_gaussian(10**11) for _ in range(DRAWS)], float)
    assert looks_normal(wide, 1e11)
    assert not looks_normal(wide, 1.25e11)
    wide = np.array([discrete_laplace(10**12) for _ in range(DRAWS)], float)
    assert stats.ks_1samp(wide, stats.laplace(scale=1e12).cdf).pvalue >= FALSE_ALARM
    assert stats.ks_1samp(wide, stats.laplace(scale=1.25e12).cdf).pvalue < FALSE_ALARM


@pytest.mark.parametrize("draw", [discrete_laplace, discrete_gaussian])
def test_narrow_ones(draw) -> None:
    assert {draw(1e-6), draw(Fraction(1, 10**6)), draw(Fraction(1, 1000))} == {0}


@pytest.mark.parametrize("draw", [discrete_laplace, discrete_gaussian])
def test_every_digit_is_random_where_doubles_have_gaps(draw, monkeypatch) -> None:
    monkeypatch.setattr(sampling, "LARGEST", 10**30)
    drawn = [draw(10**25) for _ in range(100)]
    assert {type(x) for x in drawn} == {int}
    assert min(map(abs, drawn)) > 2**53
    assert len({(x > 0, x % 2) for x in drawn}) == 4


def script(monkeypatch, steps: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Let the operating system answer these, to these bounds; return what is left to answer."""
    left = list(steps)

    def randbelow(bound: int) -> int:
        expected, answer = left.pop(0)
        assert bound == expected
        return answer

    monkeypatch.setattr("secrets.randbelow", randbelow)
    return left


MISS = [(1, 0), (2, 1)]  # exp(-1): one success, of probability 1, is an odd number of them
HIT = [(1, 0), (2, 0), (3, 1)]


@pytest.mark.parametrize(
    ("gamma", "steps", "outcome"),
    [
        ((0, 1), [(1, 0)], True),
        ((1, 2), [(2, 1)], True),
        ((1, 2), [(2, 0), (4, 1)], False),
        ((1, 2), [(2, 0), (4, 0), (6, 1)], True),
        ((1, 2), [(2, 0), (4, 0), (6, 0), (8, 1)], False),
        ((2, 3), [(3, 2)], True),
        ((2, 3), [(3, 1), (6, 2)], False),
        ((2, 3), [(3, 1), (6, 1), (9, 2)], True),
        ((1, 1), MISS, False),
        ((1, 1), [*HIT, (1, 0)], True),
        ((5, 2), [*HIT, *MISS], False),
        ((5, 2), [*HIT, *HIT, (2, 1)], True),
        ((5, 2), [*HIT, *HIT, (2, 0), (4, 3)], False),
    ],
)
def test_bernoulli_by_hand(monkeypatch, gamma, steps, outcome) -> None:
    left = script(monkeypatch, steps)
    assert sampling._bernoulli_exp(*gamma) is outcome
    assert left == []


@pytest.mark.parametrize(
    ("steps", "outcome"),
    [
        ([(7, 2), (7, 2), *MISS, (2, 0)], 0),  # 2 // 3
        ([(7, 5), (7, 5), *MISS, (2, 1)], -1),  # 5 // 3
        ([(7, 2), (7, 2), *HIT, *MISS, (2, 0)], 3),  # (2 + 7) // 3
        ([(7, 5), (7, 4), (14, 5), (7, 6), (7, 6), *MISS, (2, 0)], 2),  # 5 refused, 6 // 3
        ([(7, 2), (7, 2), *MISS, (2, 1), (7, 6), (7, 6), *MISS, (2, 1)], -2),  # -0 refused
    ],
)
def test_laplace_by_hand(monkeypatch, steps, outcome) -> None:
    left = script(monkeypatch, steps)
    assert discrete_laplace(Fraction(7, 3)) == outcome
    assert left == []


@pytest.mark.parametrize(
    ("steps", "outcome"),
    [
        ([(288, 1)], -1),  # gamma is (1 - 9/8)**2 / (9/2)
        ([(288, 0), (576, 1), (2, 0), (2, 0), *MISS, (2, 0), (32, 9)], 0),  # (0 - 9/8)**2 / (9/2)
    ],
)
def test_gaussian_by_hand(monkeypatch, steps, outcome) -> None:
    left = script(monkeypatch, [(2, 1), (2, 1), *MISS, (2, 1), *steps])
    assert discrete_gaussian(1.5) == outcome
    assert left == []


def test_a_float_counts_as_it_is(monkeypatch) -> None:
    numerator, denominator = (0.1).as_integer_ratio()
    assert Fraction(numerator, denominator) != Fraction(1, 10)
    last = (numerator, numerator - 1)
    left = script(monkeypatch, [last, last, *MISS, (2, 0)])
    assert discrete_laplace(0.1) == (numerator - 1) // denominator
    assert left == []


WRONG = [0, -1, Fraction(-1, 3), 9e-7, 1.1e12, 10**400, float("nan"), float("inf")]


@pytest.mark.parametrize("value", [*WRONG, True, None, "1", Decimal(1), 1j])
def test_parameters_of_the_exact_ones(value) -> None:
    with pytest.raises(InvalidParameter, match="scale must be a number from 1e-06 to 1e\\+12"):
        discrete_laplace(value)
    with pytest.raises(InvalidParameter, match="standard_deviation"):
        discrete_gaussian(value)
