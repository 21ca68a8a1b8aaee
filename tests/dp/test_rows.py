"""Every row of prices against the divergence of explicit output distributions.

For each row: random parameters, the outputs on two neighboring datasets as probabilities (summed
over outcomes, or integrated on a grid that is exact to about 1e-13), their Renyi divergence by its
definition in both directions, their hockey-stick curve against that of mu-GDP, and their largest
privacy loss. No formula is shared with dp/. `make test-long` takes 1,000 parameters for each row and
prints by how much the prices are above.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
from numpy.polynomial.legendre import leggauss
from numpy.typing import NDArray
from scipy.special import logsumexp
from scipy.stats import norm

from dp import (
    ZCDP,
    ApproximateDP,
    BandedMatrixFactorization,
    Composed,
    DiscreteGaussian,
    DiscreteLaplace,
    Event,
    ExponentialMechanism,
    FixedSizeSampled,
    Gaussian,
    GumbelTopK,
    Laplace,
    NonPrivate,
    PermuteAndFlip,
    PerUnitFilter,
    PoissonSampled,
    ProposeTestRelease,
    PureDP,
    RandomizedResponse,
    RepeatAndSelect,
    RepeatAndSelectPoisson,
    ReportNoisyMax,
    ShuffledEpoch,
    SparseVector,
    TreeAggregation,
    adaptive,
)
from dp.costs import cost
from dp.filters import ORDERS
from dp.rows import ROWS, Cost
from tests.strategies import SCALE

Array = NDArray[np.float64]
UNIT = 2.0**40
PRECISION = 3e-13
"""Of the oracles, absolute in nats; a third of the unit of a price."""


@dataclass(frozen=True)
class Pair:
    """Log probabilities of the outcomes on two neighboring datasets; weights where integrated."""

    p: Array
    q: Array
    weights: Array = field(default_factory=lambda: np.ones(1))

    def renyi(self, order: int) -> float:
        def one_way(p: Array, q: Array) -> float:
            moment = logsumexp(order * p + (1 - order) * q, b=self.weights)
            return float(moment) / (order - 1)

        return max(one_way(self.p, self.q), one_way(self.q, self.p))

    def hockey_stick(self, epsilon: float) -> float:
        def one_way(p: Array, q: Array) -> float:
            ahead = p > epsilon + q
            weights = np.broadcast_to(self.weights, p.shape)[ahead]
            return float(np.sum(weights * (np.exp(p[ahead]) - np.exp(epsilon + q[ahead]))))

        return max(one_way(self.p, self.q), one_way(self.q, self.p))

    def largest_loss(self) -> float:
        return float(np.abs(self.p - self.q).max())

    def of(self, p_share: float, p: Array, q: Array) -> Array:
        """Log of a mixture."""
        return np.logaddexp(math.log(p_share) + p, math.log1p(-p_share) + q)

    def on_a_sample(self, q: float) -> Pair:
        """With the unit in a Poisson sample with probability q, against without it."""
        return Pair(self.of(q, self.p, self.q), self.q, self.weights)

    def and_then(self, other: Pair) -> Pair:
        """Both outputs, independent."""
        weights = np.multiply.outer(
            np.broadcast_to(self.weights, self.p.shape),
            np.broadcast_to(other.weights, other.p.shape),
        )
        return Pair(
            np.add.outer(self.p, other.p).ravel(),
            np.add.outer(self.q, other.q).ravel(),
            weights.ravel(),
        )


def outcomes(p: object, q: object) -> Pair:
    with np.errstate(divide="ignore"):
        return Pair(np.log(np.asarray(p, float)), np.log(np.asarray(q, float)))


def response(epsilon: float) -> Pair:
    truth, lie = -np.logaddexp(0, -epsilon), -np.logaddexp(0, epsilon)
    return Pair(np.array([truth, lie]), np.array([lie, truth]))


def normals(sigma: float, order: int, means: tuple[float, ...] = (1.0, 0.0)) -> Pair:
    """N(means[0]) against N(means[1]) on a grid on which the trapezoidal rule is exact enough.

    It converges exponentially for moments; curves, whose integrands have a kink, are asked for as
    order 0 and get a finer grid.
    """
    step = min(sigma / 4, sigma * sigma / 2) if order else sigma / 400
    reach = order + 1 + 13 * sigma
    at = np.arange(-reach, reach, step)
    logs = [norm.logpdf(at, mean, sigma) for mean in means]
    return Pair(logs[0], logs[1], np.full(len(at), step))


def panels(low: float, high: float, count: int, kinks: Array) -> tuple[Array, Array]:
    """Nodes and weights of Gauss's rule on panels that no kink lies inside of."""
    edges = np.unique(np.concatenate([np.linspace(low, high, count), kinks]))
    nodes, weights = leggauss(12)
    half = np.diff(edges)[:, None] / 2
    return (edges[:-1, None] + half + half * nodes).ravel(), (half * weights).ravel()


def laplaces(scale: float) -> Pair:
    """Outside [0, 1] the ratio is constant; inside it is integrated."""
    at, weights = panels(0.0, 1.0, 2 + int(80 / scale), np.empty(0))
    inside = [-np.abs(at - mean) / scale - math.log(2 * scale) for mean in (1.0, 0.0)]
    near, far = math.log(0.5), math.log(0.5) - 1 / scale
    return Pair(
        np.concatenate([[far], inside[0], [near]]),
        np.concatenate([[near], inside[1], [far]]),
        np.concatenate([[1.0], weights, [1.0]]),
    )


def integers(log_mass: Callable[[Array], Array], shift: int, reach: int) -> Pair:
    at = np.arange(-reach, reach + 1, dtype=float)
    norm_ = logsumexp(log_mass(at))
    return Pair(log_mass(at - shift) - norm_, log_mass(at) - norm_)


def softmax(scores: Array) -> Array:
    return scores - logsumexp(scores)


Draw = np.random.Generator
Case = tuple[Event, Callable[[int], Pair]]


def log_uniform(draw: Draw, low: float, high: float) -> float:
    return float(np.exp(draw.uniform(math.log(low), math.log(high))))


def gaussian(draw: Draw) -> Case:
    sigma = log_uniform(draw, 0.1, 100)
    return Gaussian(sigma), lambda order: normals(sigma, order)


def discrete_gaussian(draw: Draw) -> Case:
    sigma, shift = log_uniform(draw, 0.4, 30), int(draw.integers(1, 6))
    event = DiscreteGaussian(sigma / shift)
    return event, lambda _: integers(
        lambda at: -(at**2) / (2 * sigma**2), shift, int(65 * shift + 13 * sigma)
    )


def laplace(draw: Draw) -> Case:
    scale = log_uniform(draw, 0.05, 100)
    return Laplace(scale), lambda _: laplaces(scale)


def discrete_laplace(draw: Draw) -> Case:
    scale, shift = log_uniform(draw, 0.2, 30), int(draw.integers(1, 6))
    event = DiscreteLaplace(scale / shift)
    return event, lambda _: integers(lambda at: -np.abs(at) / scale, shift, int(40 * scale + 9))


def any_pure(draw: Draw, epsilon: float) -> Pair:
    """Randomized response, or what a random channel makes of it: any (epsilon, 0)-DP pair."""
    if draw.random() < 0.5:
        return response(epsilon)
    channel = draw.dirichlet(np.ones(draw.integers(2, 9)), size=2)
    one = response(epsilon)
    return outcomes(np.exp(one.p) @ channel, np.exp(one.q) @ channel)


def pure(draw: Draw) -> Case:
    epsilon = log_uniform(draw, 1e-4, 30)
    pair = any_pure(draw, epsilon)
    return PureDP(epsilon), lambda _: pair


def approximate(draw: Draw) -> Case:
    # Revealed with probability delta, which the delta lane pays; else the pair that is left.
    epsilon, delta = log_uniform(draw, 1e-4, 30), log_uniform(draw, 1e-12, 0.9)
    pair = any_pure(draw, epsilon)
    return ApproximateDP(epsilon, delta), lambda _: pair


def propose_test_release(draw: Draw) -> Case:
    # The noisy distance to a bad dataset, and a Laplace release where the test passes.
    test, release, delta = (log_uniform(draw, 1e-3, 3) for _ in "ttd")
    delta = min(delta, 0.5)
    pair = response(test).and_then(response(release))
    return ProposeTestRelease(test, release, delta), lambda _: pair


def zcdp(draw: Draw) -> Case:
    rho = log_uniform(draw, 1e-4, 30)
    return ZCDP(rho), lambda order: normals(math.sqrt(1 / (2 * rho)), order)


def categories(draw: Draw) -> Case:
    epsilon, k = log_uniform(draw, 1e-3, 20), int(draw.integers(2, 60))
    low = 1 / (math.exp(epsilon) + k - 1)
    rest = [low] * (k - 2)
    pair = outcomes([1 - low * (k - 1), low, *rest], [low, 1 - low * (k - 1), *rest])
    return RandomizedResponse(epsilon, k), lambda _: pair


def scores(draw: Draw, count: int) -> tuple[Array, Array]:
    """Scores on two neighboring datasets, of sensitivity 1; often the worst: up or down by 1."""
    first = draw.normal(0, draw.choice([0.0, 1.0, 5.0]), count)
    change = draw.choice([-1.0, 1.0], count) if draw.random() < 0.6 else draw.uniform(-1, 1, count)
    return first, first + change


def exponential(draw: Draw) -> Case:
    scale = log_uniform(draw, 0.1, 1000)
    one, two = scores(draw, int(draw.integers(2, 300)))
    pair = Pair(softmax(one / scale), softmax(two / scale))
    return ExponentialMechanism(2 / scale), lambda _: pair


def top_k(draw: Draw) -> Case:
    scale, k = log_uniform(draw, 0.2, 100), int(draw.integers(1, 4))

    def peeled(values: Array) -> Array:
        logs = []
        for order in itertools.permutations(range(5), k):
            left, log = np.ones(5, bool), 0.0
            for pick in order:
                log += values[pick] / scale - logsumexp(values[left] / scale)
                left[pick] = False
            logs.append(log)
        return np.array(logs)

    one, two = scores(draw, 5)
    pair = Pair(peeled(one), peeled(two))
    return GumbelTopK(2 / scale, k), lambda _: pair


def noisy_max(draw: Draw) -> Case:
    scale = log_uniform(draw, 0.3, 50)
    one, two = scores(draw, 3)
    laplacian = draw.random() < 0.5

    def winners(values: Array) -> Array:
        top = values.max()
        at, weights = panels(top - 45 * scale, top + 45 * scale, 200, values)
        z = (at[:, None] - values) / scale
        if laplacian:
            density = np.exp(-np.abs(z)) / 2
            below = np.where(z < 0, np.exp(np.minimum(z, 0)) / 2, 1 - np.exp(-np.maximum(z, 0)) / 2)
        else:
            density = np.where(z < 0, 0.0, np.exp(-np.maximum(z, 0)))
            below = np.where(z < 0, 0.0, 1 - np.exp(-np.maximum(z, 0)))
        wins = [
            weights @ (density[:, i] * np.prod(np.delete(below, i, axis=1), axis=1))
            for i in range(3)
        ]
        return np.array(wins) / sum(wins)

    pair = outcomes(winners(one), winners(two))
    return ReportNoisyMax(2 / scale), lambda _: pair


def permute_and_flip(draw: Draw) -> Case:
    scale = log_uniform(draw, 0.2, 100)
    one, two = scores(draw, 4)

    def winners(values: Array) -> Array:
        heads = np.exp((values - values.max()) / scale)
        total = np.zeros(4)
        for order in itertools.permutations(range(4)):
            left = 1.0
            for candidate in order:
                total[candidate] += left * heads[candidate]
                left *= 1 - heads[candidate]
        return total / 24

    pair = outcomes(winners(one), winners(two))
    return PermuteAndFlip(2 / scale), lambda _: pair


def sparse_vector(draw: Draw) -> Case:
    threshold, query = log_uniform(draw, 0.5, 20), log_uniform(draw, 0.5, 20)
    positives, monotone = int(draw.integers(1, 3)), bool(draw.integers(2))
    first = draw.normal(0, 2, 4)
    change = draw.choice([-1.0, 1.0], 4)
    second = first + (np.abs(change) * draw.choice([-1, 1]) if monotone else change)
    kinks = np.concatenate([[0.0], first, second])
    at, weights = panels(-40 * threshold, 40 * threshold, 200, kinks)
    density = np.exp(-np.abs(at) / threshold) / (2 * threshold)

    def transcripts(values: Array) -> Array:
        z = (at[:, None] - values) / query
        above = np.where(z > 0, np.exp(-np.maximum(z, 0)) / 2, 1 - np.exp(np.minimum(z, 0)) / 2)
        found = []
        for bits in itertools.product([0, 1], repeat=4):
            said = [i for i in range(4) if bits[:i].count(1) < positives]
            if any(bits[i] for i in range(4) if i not in said):
                continue
            chance = density.copy()
            for i in said:
                chance *= above[:, i] if bits[i] else 1 - above[:, i]
            found.append(weights @ chance)
        return np.array(found) / sum(found)

    pair = outcomes(transcripts(first), transcripts(second))
    return SparseVector(threshold, query, positives, monotone), lambda _: pair


def poisson_sampled(draw: Draw) -> Case:
    q = log_uniform(draw, 1e-4, 0.99)
    sigma, scale = log_uniform(draw, 0.4, 20), log_uniform(draw, 0.1, 20)
    epsilon = log_uniform(draw, 1e-2, 10)
    kind = draw.integers(6)
    if kind == 5:
        shift, deviation = int(draw.integers(1, 4)), log_uniform(draw, 0.5, 20)
        whole = integers(
            lambda at: -(at**2) / (2 * deviation**2), shift, int(65 * shift + 13 * deviation)
        )
        return PoissonSampled(q, DiscreteGaussian(deviation / shift)), lambda _: whole.on_a_sample(
            q
        )
    if kind == 0:
        return PoissonSampled(q, Gaussian(sigma)), lambda a: normals(sigma, a).on_a_sample(q)
    if kind == 1:
        return PoissonSampled(q, Laplace(scale)), lambda _: laplaces(scale).on_a_sample(q)
    if kind == 2:
        return PoissonSampled(q, PureDP(epsilon)), lambda _: response(epsilon).on_a_sample(q)
    if kind == 3:
        both = response(epsilon).and_then(response(epsilon / 2))
        event = PoissonSampled(q, Composed((PureDP(epsilon), ReportNoisyMax(epsilon / 2))))
        return event, lambda _: both.on_a_sample(q)
    event = PoissonSampled(q, Composed((Gaussian(sigma), PureDP(epsilon))))
    return event, lambda a: normals(sigma, a).and_then(response(epsilon)).on_a_sample(q)


def fixed_size_sampled(draw: Draw) -> Case:
    size, of = int(draw.integers(1, 50)), int(draw.integers(50, 5000))
    q = size / of
    if draw.random() < 0.5:
        epsilon = log_uniform(draw, 1e-2, 8)
        # One category, its opposite, or a third one that the rest of the sample would give.
        low = 1 / (math.exp(epsilon) + 2)
        high = 1 - 2 * low
        one, two, rest = ([high, low, low], [low, high, low], [low, low, high])
        mixed = [q * np.array(mine) + (1 - q) * np.array(rest) for mine in (one, two)]
        pair = outcomes(*mixed)
        return FixedSizeSampled(size, of, PureDP(epsilon)), lambda _: pair
    sigma = log_uniform(draw, 0.4, 20)

    def of_order(order: int) -> Pair:
        left, right = (normals(sigma, order, (0.0, mean)) for mean in (-0.5, 0.5))
        one, two = (p.of(q, p.q, p.p) for p in (left, right))
        return Pair(one, two, left.weights)

    return FixedSizeSampled(size, of, Gaussian(sigma)), of_order


def shuffled_epoch(draw: Draw) -> Case:
    """Two batches; the replaced unit is in the first one with a probability that an order has."""
    sigma, first = log_uniform(draw, 1.0, 10), draw.choice([0.5, 0.9, 1.0 - 1e-12])

    def of_order(order: int) -> Pair:
        # order times 1/2 to each side is where the moment's mass lies
        step = sigma / (1.5 if order else 15)
        at = np.arange(-order / 2 - 9 * sigma, order / 2 + 9 * sigma, step)
        log = {mean: norm.logpdf(at, mean, sigma) for mean in (-0.5, 0.0, 0.5)}

        def released(mean: float) -> Array:
            here = np.add.outer(log[mean], log[0.0])
            return np.logaddexp(math.log(first) + here, math.log1p(-first) + here.T).ravel()

        weights = np.full(len(at) ** 2, step**2)
        return Pair(released(0.5), released(-0.5), weights)

    return ShuffledEpoch(Gaussian(sigma)), of_order


def tree(draw: Draw) -> Case:
    """The nodes of a binary tree over the leaves, each a sum of a block; the fullest leaf."""
    leaves, sigma = int(draw.integers(1, 300)), log_uniform(draw, 1.0, 100)
    blocks = [
        (start, start + size)
        for size in (2**level for level in range(10))
        for start in range(0, leaves - size + 1, size)
    ]
    nodes = max(sum(low <= leaf < high for low, high in blocks) for leaf in range(leaves))
    event = TreeAggregation(sigma, leaves)
    return event, lambda order: normals(sigma / math.sqrt(nodes), order)


def banded(draw: Draw) -> Case:
    """The longest C @ u over all participations that lie apart, and directions of the gradient."""
    bands, steps = int(draw.integers(1, 4)), int(draw.integers(5, 9))
    coefficients = tuple(map(float, draw.uniform(-0.5, 1.0, bands) + np.eye(1, bands)[0]))
    participations, sigma = int(draw.integers(1, 4)), log_uniform(draw, 3.0, 100)
    matrix = sum(np.eye(steps, k=-lag) * c for lag, c in enumerate(coefficients))
    longest = 0.0
    for count in range(1, participations + 1):
        for taken in itertools.combinations(range(steps), count):
            if all(b - a >= bands for a, b in itertools.pairwise(taken)):
                for signs in itertools.product([-1.0, 1.0], repeat=count):
                    sums = np.zeros(steps)
                    sums[list(taken)] = signs
                    longest = max(longest, float(np.linalg.norm(matrix @ sums)))
    event = BandedMatrixFactorization(sigma, coefficients, participations)
    return event, lambda order: normals(sigma / longest, order)


def fits(spent: float, asked: float, limit: float) -> bool:
    return spent + asked <= limit


def session(
    draw: Draw, mu: float, fits: Callable[[float, float, float], bool]
) -> Callable[[int], Pair]:
    """One unit in a filtered session of Gaussian sums with unit noise, up to six of them.

    How long its vectors are depends on the first output, by pieces: the first sum is released,
    then those of its piece, one after another, without the unit where it has no room. Given the
    first output, what the others tell is one Gaussian of all the lengths that were paid.
    """
    limit = mu * mu
    first = limit * draw.choice([0.0, 1.0, draw.uniform()])
    cuts = np.sort(draw.normal(mu / 2, 1, int(draw.integers(0, 4))))
    shifts = []
    for _ in range(len(cuts) + 1):
        spent = first
        for share in draw.dirichlet(np.ones(5)) * draw.choice([1.0, 2.0, 5.0]):
            # A unit that spends on purpose takes what is left to the last bit.
            asked = limit - spent if draw.random() < 0.3 else share * limit
            if fits(spent, asked, limit):
                spent += asked
        shifts.append(math.sqrt(spent - first))

    def of_order(order: int) -> Pair:
        ends, step = (order * mu + 13, 0.4) if order else (7.5, 0.05)
        at, weights = panels(-ends, ends, int(ends * (1.2 if order else 8)), cuts)
        shift = np.array(shifts)[np.searchsorted(cuts, at)][:, None]
        then = np.arange(-ends, ends, step)
        without = np.add.outer(norm.logpdf(at), norm.logpdf(then))
        within = norm.logpdf(at, math.sqrt(first))[:, None] + norm.logpdf(then, shift)
        return Pair(within, without, np.outer(weights, np.full(len(then), step)))

    return of_order


def per_unit_filter(draw: Draw) -> Case:
    mu = log_uniform(draw, 0.01, 0.8)
    return PerUnitFilter(mu), session(draw, mu, fits)


def best_of(epsilon: float, generating: Callable[[float], float]) -> Pair:
    """Released: the better of two scores that a response gave, over K runs; or nothing, if K = 0."""

    def released(chance_of_low: float) -> list[float]:
        nothing, low = generating(0.0), generating(chance_of_low)
        return [nothing, low - nothing, 1 - low]

    truth = 1 / (1 + math.exp(-epsilon))
    one, two = released(truth), released(1 - truth)
    shown = slice(None) if one[0] > 0 else slice(1, None)
    return outcomes(one[shown], two[shown])


def selected(draw: Draw) -> Case:
    epsilon, eta = log_uniform(draw, 0.05, 3), float(draw.choice([-0.5, 0.0, 0.7, 1.0, 2.0]))
    gamma = log_uniform(draw, 1e-2, 0.9)

    def generating(x: float) -> float:
        if eta == 0:
            return math.log(1 - (1 - gamma) * x) / math.log(gamma)
        return ((1 - (1 - gamma) * x) ** -eta - 1) / (gamma**-eta - 1)

    pair = best_of(epsilon, generating)
    return RepeatAndSelect(PureDP(epsilon), eta, gamma), lambda _: pair


def selected_poisson(draw: Draw) -> Case:
    epsilon, mean = log_uniform(draw, 0.05, 3), log_uniform(draw, 1.0, 30)
    pair = best_of(epsilon, lambda x: math.exp(mean * (x - 1)))
    return RepeatAndSelectPoisson(PureDP(epsilon), mean), lambda _: pair


EXPLICIT: dict[type, Callable[[Draw], Case]] = {
    Gaussian: gaussian,
    DiscreteGaussian: discrete_gaussian,
    Laplace: laplace,
    DiscreteLaplace: discrete_laplace,
    PureDP: pure,
    ApproximateDP: approximate,
    ZCDP: zcdp,
    RandomizedResponse: categories,
    ExponentialMechanism: exponential,
    GumbelTopK: top_k,
    ReportNoisyMax: noisy_max,
    PermuteAndFlip: permute_and_flip,
    SparseVector: sparse_vector,
    ProposeTestRelease: propose_test_release,
    PoissonSampled: poisson_sampled,
    FixedSizeSampled: fixed_size_sampled,
    ShuffledEpoch: shuffled_epoch,
    TreeAggregation: tree,
    BandedMatrixFactorization: banded,
    RepeatAndSelect: selected,
    RepeatAndSelectPoisson: selected_poisson,
    PerUnitFilter: per_unit_filter,
}


def test_every_row_has_explicit_outputs() -> None:
    assert set(EXPLICIT) == set(ROWS) - {NonPrivate}


class Below(AssertionError):
    """A bound is below the truth."""


def excesses(case: Case, kind: type, draw: Draw, price: Callable[[Event], Cost]) -> Iterator[float]:
    """Yield by how much each price is above, relative; raise if a bound is below the truth."""
    event, of_order = case
    bounds = price(event)
    for order in draw.choice(ORDERS, 3, replace=False):
        pair = of_order(int(order))
        truth = pair.renyi(int(order))
        limits = adaptive(8.0, 1e-6, relation=ROWS[kind].relations[0])
        priced = limits.quantize(bounds)[limits.lanes.index(str(order))] / UNIT
        if priced < truth - PRECISION - 1e-11 * truth:
            raise Below(f"{event!r}: order {order} costs {priced}, the truth is {truth}")
        if truth > 1e-9:
            yield priced / truth - 1
    pair = of_order(0)
    kink = 1e-3 if pair.weights.size > 1 else 0.0  # of an integral's grid, where the curves cross
    if bounds.mu_squared < math.inf:
        mu = math.sqrt(bounds.mu_squared)
        for ratio in (0.0, 0.3, 1.0, 2.0):
            epsilon = ratio * mu
            allowed = norm.cdf(mu / 2 - ratio) - math.exp(epsilon) * norm.cdf(-mu / 2 - ratio)
            if pair.hockey_stick(epsilon) > allowed * (1 + kink) + 1e-11:
                raise Below(f"{event!r}: not {mu}-GDP at epsilon {epsilon}")
    if bounds.epsilon < math.inf and pair.largest_loss() > bounds.epsilon * (1 + 1e-9) + 1e-9:
        raise Below(f"{event!r}: loses {pair.largest_loss()}, more than {bounds.epsilon}")


def own_price(event: Event) -> Cost:
    return cost(event, ROWS[type(event)].relations[0])


def compared(kind: type, count: int, seed: int) -> list[float]:
    draw = np.random.default_rng([seed, list(EXPLICIT).index(kind)])
    return [
        excess
        for _ in range(count)
        for excess in excesses(EXPLICIT[kind](draw), kind, draw, own_price)
    ]


@pytest.mark.parametrize("kind", EXPLICIT, ids=lambda kind: kind.__name__)
def test_no_price_is_below_the_explicit_outputs(kind: type) -> None:
    assert compared(kind, 25, 1)


@pytest.mark.long
@pytest.mark.parametrize("kind", EXPLICIT, ids=lambda kind: kind.__name__)
def test_a_thousand_parameters_for_each_row(kind: type, capsys) -> None:
    found = compared(kind, 1000 * SCALE, 2)
    with capsys.disabled():
        print(
            f"\n{kind.__name__:<26} {1000 * SCALE:,} parameters, 0 below;"
            f" excess: median {np.median(found):.2e}, worst {max(found):.2e}"
        )


@pytest.mark.parametrize("kind", [ApproximateDP, ProposeTestRelease])
def test_the_delta_is_paid_in_full(kind: type) -> None:
    draw = np.random.default_rng(3)
    for _ in range(100):
        event, _ = EXPLICIT[kind](draw)
        assert own_price(event).delta == event.delta
        assert adaptive(8.0, 1e-6).price(event)[0] >= event.delta * 2.0**62


def broken(kind: type, wrong: Callable[[Event], Cost]) -> None:
    """The controls: the same check must raise on a price that is wrong."""
    draw = np.random.default_rng(4)
    with pytest.raises(Below):
        for _ in range(200):
            list(excesses(EXPLICIT[kind](draw), kind, draw, wrong))


CONTROLS: dict[str, tuple[type, Callable[[Event], Cost]]] = {
    "half of the noise's epsilon": (
        DiscreteLaplace,
        lambda e: own_price(PureDP(0.5 / e.noise_multiplier)),
    ),
    "a maximum as an exponential mechanism": (
        PermuteAndFlip,
        lambda e: own_price(ExponentialMechanism(e.epsilon)),
    ),
    "one selection for k": (GumbelTopK, lambda e: own_price(ExponentialMechanism(e.epsilon))),
    "e^2/16 instead of e^2/8": (
        ExponentialMechanism,
        lambda e: own_price(ZCDP(e.epsilon**2 / 16)),
    ),
    "a sparse vector without its threshold": (
        SparseVector,
        lambda e: own_price(PureDP(0.3 / e.query_noise)),
    ),
    "q times the event": (
        PoissonSampled,
        lambda e: Cost(
            lambda a: e.sampling_probability**2 * cost(e.event).renyi(a),
        ),
    ),
    "a fixed size as a Poisson sample of half the noise's effect": (
        FixedSizeSampled,
        lambda e: Cost(cost(PoissonSampled(e.sample_size / e.dataset_size, PureDP(1e-3))).renyi),
    ),
    "an epoch amplified by sampling": (
        ShuffledEpoch,
        lambda e: Cost(cost(PoissonSampled(0.5, e.event)).renyi),
    ),
    "a tree one level lower": (
        TreeAggregation,
        lambda e: own_price(TreeAggregation(e.noise_multiplier, max(1, e.steps // 2))),
    ),
    "one participation": (
        BandedMatrixFactorization,
        lambda e: own_price(BandedMatrixFactorization(e.noise_multiplier, e.coefficients, 1)),
    ),
    "one run": (RepeatAndSelect, lambda e: own_price(e.event)),
    "one run of Poisson many": (RepeatAndSelectPoisson, lambda e: own_price(e.event)),
    "two categories for many": (
        RandomizedResponse,
        lambda e: own_price(RandomizedResponse(e.epsilon, 10 * e.categories)),
    ),
    "a Gaussian's mu for the discrete one, at half": (
        DiscreteGaussian,
        lambda e: Cost(lambda a: a / 2.002 / e.noise_multiplier**2),
    ),
    "what half of the units' budget pays": (
        PerUnitFilter,
        lambda e: own_price(PerUnitFilter(0.7 * e.mu)),
    ),
    "a Laplace as a Gaussian of its standard deviation": (
        Laplace,
        lambda e: own_price(Gaussian(1.5 * e.noise_multiplier)),
    ),
}


@pytest.mark.parametrize("control", CONTROLS)
def test_controls(control: str) -> None:
    broken(*CONTROLS[control])


@pytest.mark.parametrize("share", [0.5, 0.2, 0.03])
@pytest.mark.parametrize("order", [2, 8, 24])
def test_a_unit_that_spends_all_is_told_apart_as_by_one_gaussian(share: float, order: int) -> None:
    mu = 0.8
    sizes = (mu * math.sqrt(share), mu * math.sqrt(1 - share))
    both = normals(1 / sizes[0], order).and_then(normals(1 / sizes[1], order))
    assert both.renyi(order) == pytest.approx(normals(1 / mu, order).renyi(order), rel=1e-9)
    assert own_price(PerUnitFilter(mu)).renyi(order) == pytest.approx(both.renyi(order), rel=1e-9)
    assert own_price(PerUnitFilter(mu)).mu_squared == pytest.approx(1 / (1 / mu) ** 2)


@pytest.mark.parametrize(
    "broken_fits",
    [
        lambda spent, _, limit: spent <= limit,  # looks before it adds
        lambda _, asked, limit: asked <= limit,  # each release by itself
        lambda spent, asked, limit: spent + asked <= 1.1 * limit,  # a tenth more
    ],
)
def test_control_that_a_filter_that_lets_through_too_much_is_seen(broken_fits) -> None:
    draw = np.random.default_rng(5)
    with pytest.raises(Below):
        for _ in range(200):
            mu = log_uniform(draw, 0.05, 0.8)
            case = PerUnitFilter(mu), session(draw, mu, broken_fits)
            list(excesses(case, PerUnitFilter, draw, own_price))
