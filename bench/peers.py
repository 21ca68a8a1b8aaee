"""What peer libraries admit within (epsilon, delta), and how long one decision takes them.

``pld_optimum``           what a PLD proves for uses fixed beforehand (dp-accounting)
``rdp_count``             dp-accounting's RDP accountant at its default orders
``opendp_filter_count``   OpenDP's fully adaptive privacy filter (0.14 and later)
``naive_count``           each use converted alone, epsilons and deltas summed
``decision_times``        seconds for one more admission decision, by library

Only OpenDP's filter and sums of epsilon hold for uses chosen adaptively; the others are what
the same uses would cost if their number and noise had been fixed beforehand. ``after`` holds
(event, count) pairs that ran first. A count is 0 where not even ``after`` fits, and None
where the library does not account for the events. Neighbors add or remove one unit.
Run as a script, it prints a table of the counts, and OpenDP's own filter against its count.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable
from functools import cache
from statistics import median
from time import perf_counter

import dp_accounting
import opendp.prelude as opendp
from dp_accounting.pld import PLDAccountant
from dp_accounting.pld import privacy_loss_distribution as pld
from dp_accounting.rdp import RdpAccountant
from opendp.mod import Measurement, OpenDPException

from dp import Composed, Event, Gaussian, Laplace, PoissonSampled, Repeated

COARSE, FINE = 1e-3, 1e-4
"""Grids of the privacy loss: one to find about where the answer is, one to answer."""

After = tuple[tuple[Event, int], ...]
"""Events that ran first, each with how often."""

opendp.enable_features("contrib")


def uses(event: Event, count: int, after: After = ()) -> Counter[Event]:
    """Return how often each mechanism runs in ``after`` and then ``count`` uses of the event."""
    total: Counter[Event] = Counter()

    def add(part: Event, times: int) -> None:
        if isinstance(part, Composed):
            for inner in part.events:
                add(inner, times)
        elif isinstance(part, Repeated):
            add(part.event, times * part.count)
        elif times:
            total[part] += times

    for first, times in after:
        add(first, times)
    add(event, count)
    return total


def largest(fits: Callable[[int], bool], near: int = 1) -> int:
    """Return the largest count that fits, 0 if none does, for a test that fails from some count.

    It looks in growing steps from ``near``, then bisects.
    """
    low, high, step = 0, None, max(1, near // 256)
    probe = max(1, near)
    while high is None or high - low > 1:
        if fits(probe):
            low = probe
        else:
            high = probe
        if high is None:
            probe, step = low + step, 2 * step
        elif low == 0 and high > step > 0:
            probe, step = high - step, 2 * step
        else:
            probe = (low + high) // 2
    return low


# dp-accounting's privacy loss distributions: what is optimal for uses fixed beforehand


def joint_sigma(mechanisms: Counter[Event]) -> float | None:
    """Return the noise multiplier of all as one Gaussian, None if one is not a Gaussian."""
    if not all(isinstance(event, Gaussian) for event in mechanisms):
        return None
    return sum(count / event.noise_multiplier**2 for event, count in mechanisms.items()) ** -0.5


@cache
def one_loss(event: Event, grid: float) -> pld.PrivacyLossDistribution:
    """Return the pessimistic privacy loss distribution of one use."""
    match event:
        case Gaussian(sigma):
            return pld.from_gaussian_mechanism(sigma, value_discretization_interval=grid)
        case Laplace(scale):
            return pld.from_laplace_mechanism(scale, value_discretization_interval=grid)
        case PoissonSampled(q, Gaussian(sigma)):
            return pld.from_gaussian_mechanism(
                sigma, value_discretization_interval=grid, sampling_prob=q
            )
    raise NotImplementedError(event)


@cache
def loss(mechanisms: tuple[tuple[Event, int], ...], grid: float) -> pld.PrivacyLossDistribution:
    """Return the privacy loss distribution of all; Gaussians are merged exactly into one."""
    gaussians = Counter({event: n for event, n in mechanisms if isinstance(event, Gaussian)})
    parts = [
        one_loss(event, grid).self_compose(n) if n > 1 else one_loss(event, grid)
        for event, n in mechanisms
        if event not in gaussians
    ]
    if gaussians:
        sigma = joint_sigma(gaussians)
        parts.append(pld.from_gaussian_mechanism(sigma, value_discretization_interval=grid))
    total = parts[0]
    for part in parts[1:]:
        total = total.compose(part)
    return total


def pld_optimum(epsilon: float, delta: float, event: Event, after: After = ()) -> int:
    """Return how many uses fit if all is fixed beforehand, by privacy loss distributions.

    The analytic Gaussian mechanism where all are Gaussian: exact. Otherwise rounded up on a
    grid of ``FINE``, so the count is at most the true optimum, and very near it.
    """
    first = uses(event, 0, after)
    if joint_sigma(uses(event, 1, after)) is not None:

        def exact(count: int) -> bool:
            sigma = joint_sigma(uses(event, count, after))
            return sigma is None or dp_accounting.get_epsilon_gaussian(sigma, delta) <= epsilon

        return largest(exact)

    def within(grid: float) -> Callable[[int], bool]:
        def fits(count: int) -> bool:
            added = loss.__wrapped__(tuple(uses(event, count).items()), grid)
            if not first:
                return added.get_delta_for_epsilon(epsilon) <= delta
            ran = loss(tuple(first.items()), grid)
            return ran.get_delta_for_epsilon_for_composed_pld(added, epsilon) <= delta

        return fits

    return largest(within(FINE), near=largest(within(COARSE)))


# dp-accounting's RDP accountant


def dp_event(event: Event) -> dp_accounting.DpEvent:
    """Return the event in dp-accounting's words."""
    match event:
        case Gaussian(sigma):
            return dp_accounting.GaussianDpEvent(sigma)
        case Laplace(scale):
            return dp_accounting.LaplaceDpEvent(scale)
        case PoissonSampled(q, inner):
            return dp_accounting.PoissonSampledDpEvent(q, dp_event(inner))
    raise NotImplementedError(event)


def rdp_count(epsilon: float, delta: float, event: Event, after: After = ()) -> int:
    """Return how many uses fit by dp-accounting's RDP accountant, default orders."""

    def fits(count: int) -> bool:
        accountant = RdpAccountant()
        for mechanism, times in uses(event, count, after).items():
            accountant.compose(dp_event(mechanism), times)
        return accountant.get_epsilon(delta) <= epsilon

    return largest(fits)


# OpenDP's privacy filter


ZCDP, PURE = opendp.zero_concentrated_divergence(), opendp.max_divergence()


def space(metric: opendp.Metric) -> tuple[opendp.Domain, opendp.Metric]:
    """Return the space of a vector of one float."""
    return opendp.vector_domain(opendp.atom_domain(T=float, nan=False), size=1), metric


L1, L2 = space(opendp.l1_distance(T=float)), space(opendp.l2_distance(T=float))


def opendp_filter(measure: opendp.Measure, metric: tuple, budget: float) -> Measurement:
    """Return a filter of fully adaptive composition, at sensitivity 1."""
    odometer = opendp.c.make_fully_adaptive_composition(*metric, output_measure=measure)
    return opendp.c.make_privacy_filter(odometer, d_in=1.0, d_out=budget)


@cache
def opendp_rho(epsilon: float, delta: float) -> float:
    """Return the largest zCDP budget that OpenDP converts to at most (epsilon, delta)."""

    def fits(rho: float) -> bool:
        approximate = opendp.c.make_zCDP_to_approxDP(opendp_filter(ZCDP, L2, rho))
        return opendp.c.make_fix_delta(approximate, delta).map(1.0)[0] <= epsilon

    low, high = 0.0, epsilon
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


@cache
def opendp_query(event: Event, measure: opendp.Measure) -> Measurement | None:
    """Return the query in this privacy measure, None where OpenDP has none."""
    match event:
        case Gaussian(sigma) if measure == ZCDP:
            return opendp.m.make_gaussian(*L2, scale=sigma)
        case Laplace(scale):
            query = opendp.m.make_laplace(*L1, scale=scale)
            return query if measure == PURE else opendp.c.make_pureDP_to_zCDP(query)
    return None


def opendp_filter_count(
    epsilon: float, delta: float, event: Event, after: After = ()
) -> int | None:
    """Return how many uses OpenDP's fully adaptive filter admits, None for sampled events.

    The budget is rho for zCDP, or epsilon itself where all are Laplace: what admits more. The
    sum is OpenDP's ``make_composition``, rounded up as in its filter, whose time is quadratic.
    Gaussians and Laplaces in one filter need one metric: on a vector of one float they have it.
    """

    def count(measure: opendp.Measure, budget: float) -> int | None:
        mechanisms = uses(event, 1, after)
        queries = {part: opendp_query(part, measure) for part in mechanisms}
        if None in queries.values():
            return None

        def fits(count: int) -> bool:
            total = 0.0
            for part, times in uses(event, count, after).items():
                total += opendp.c.make_composition([queries[part]] * times).map(1.0)
            return total <= budget

        return largest(fits)

    counts = count(ZCDP, opendp_rho(epsilon, delta)), count(PURE, epsilon)
    return max((found for found in counts if found is not None), default=None)


def opendp_filter_run(budget: float, sigma: float) -> int:
    """Return how many Gaussian queries a filter of this rho answers before it refuses."""
    ask = opendp_filter(ZCDP, L2, budget)([0.0])
    query = opendp_query(Gaussian(sigma), ZCDP)
    answered = 0
    while True:
        try:
            ask(query)
        except OpenDPException as error:
            if "exhausted" not in str(error):
                raise
            return answered
        answered += 1


# Sums of epsilon


def one_epsilon(event: Event, delta: float) -> float:
    """Return epsilon of one use at this delta; Laplace needs none."""
    match event:
        case Gaussian(sigma):
            return dp_accounting.get_epsilon_gaussian(sigma, delta)
        case Laplace(scale):
            return 1.0 / scale
    return one_loss(event, FINE).get_epsilon_for_delta(delta)


def naive_count(epsilon: float, delta: float, event: Event, after: After = ()) -> int:
    """Return how many uses fit if epsilons and deltas are summed.

    Each use but Laplace gets the same share of delta, which is best for uses of one kind, and
    its epsilon is tight: the analytic Gaussian mechanism, or its privacy loss distribution.
    """

    def fits(count: int) -> bool:
        mechanisms = uses(event, count, after)
        sharing = sum(n for part, n in mechanisms.items() if not isinstance(part, Laplace))
        each = delta / max(1, sharing)
        spent = math.fsum(n * one_epsilon(part, each) for part, n in mechanisms.items())
        return spent <= epsilon * (1 + 1e-12)

    return largest(fits)


# Time of one decision


def decision_times(repetitions: int = 9) -> dict[str, float]:
    """Return median seconds of "may one more use run within (8, 1e-6)?", by library.

    Ahead of it ran 1,000 uses of the same event and one each of 10 others: DP-SGD steps, and
    Gaussians for OpenDP, which has no sampling; dp-accounting is timed with both. What a
    library offers is to add the use to a live account and read epsilon, or to ask the filter,
    which also draws the noise of one float.
    """
    from opacus.accountants import PRVAccountant
    from opacus.accountants import RDPAccountant as OpacusRDP

    epsilon, delta, earlier = 8.0, 1e-6, 1_000
    others = [1.5 + 0.1 * k for k in range(10)], [60.0 + k for k in range(10)]
    steps = [PoissonSampled(0.01, Gaussian(sigma)) for sigma in (*others[0], 1.0)]
    queries = [Gaussian(sigma) for sigma in (*others[1], 50.0)]

    def timed(decide: Callable[[], bool], times: int = repetitions) -> float:
        seconds = []
        for _ in range(times):
            began = perf_counter()
            admitted = decide()
            seconds.append(perf_counter() - began)
            if not admitted:
                raise RuntimeError("the budget was meant to hold these uses")
        return median(seconds)

    def google(accountant: RdpAccountant | PLDAccountant, events: list[Event]) -> float:
        *rest, again = map(dp_event, events)
        for event in rest:
            accountant.compose(event)
        accountant.compose(again, earlier)
        return timed(lambda: accountant.compose(again).get_epsilon(delta) <= epsilon)

    def opacus(accountant: OpacusRDP | PRVAccountant, times: int) -> float:
        def step(event: PoissonSampled) -> None:
            sigma, q = event.event.noise_multiplier, event.sampling_probability
            accountant.step(noise_multiplier=sigma, sample_rate=q)

        def decide() -> bool:
            step(steps[-1])
            return accountant.get_epsilon(delta=delta) <= epsilon

        for event in (*steps[:-1], *steps[-1:] * earlier):
            step(event)
        return timed(decide, times)

    def filtered() -> float:
        ask = opendp_filter(ZCDP, L2, opendp_rho(epsilon, delta))([0.0])
        for event in (*queries[:-1], *queries[-1:] * earlier):
            ask(opendp_query(event, ZCDP))
        return timed(lambda: len(ask(opendp_query(queries[-1], ZCDP))) == 1)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {
            "dp-accounting RDP, DP-SGD": google(RdpAccountant(), steps),
            "dp-accounting RDP, Gaussian": google(RdpAccountant(), queries),
            "dp-accounting PLD 1e-3, DP-SGD": google(
                PLDAccountant(value_discretization_interval=COARSE), steps
            ),
            "dp-accounting PLD 1e-3, Gaussian": google(
                PLDAccountant(value_discretization_interval=COARSE), queries
            ),
            "Opacus RDP, DP-SGD": opacus(OpacusRDP(), repetitions),
            "Opacus PRV, DP-SGD": opacus(PRVAccountant(), 3),
            "OpenDP filter, Gaussian": filtered(),
        }


STEP = PoissonSampled(0.01, Gaussian(1.0))
CASES: dict[str, tuple[Event, After]] = {
    "Gaussian 50": (Gaussian(50.0), ()),
    "DP-SGD q=.01 s=1": (STEP, ()),
    "DP-SGD q=.001 s=.7": (PoissonSampled(0.001, Gaussian(0.7)), ()),
    "1,000 DP-SGD, Gaussian 50": (Gaussian(50.0), ((STEP, 1_000),)),
    "Laplace 50": (Laplace(50.0), ()),
}
BUDGETS = (1.0, 1e-6), (3.0, 1e-6), (8.0, 1e-6), (10.0, 1e-8)


def main() -> None:
    counts = pld_optimum, rdp_count, opendp_filter_count, naive_count
    heads = "".join(f"{count.__name__:>28}" for count in counts)
    print(f"{'uses within':<14} {'of':<26}{heads}")
    for epsilon, delta in BUDGETS:
        for name, (event, after) in CASES.items():
            cells = []
            for count in counts:
                began = perf_counter()
                found = count(epsilon, delta, event, after)
                shown = "-" if found is None else f"{found:,}"
                cells.append(f"{shown:>18} {perf_counter() - began:>7.2f} s")
            print(f"({epsilon:g}, {delta:g})".ljust(14), name.ljust(26) + "".join(cells))
    rho = opendp_rho(1.0, 1e-6)
    said = opendp_filter_count(1.0, 1e-6, Gaussian(50.0))
    ran = opendp_filter_run(rho, 50.0)
    print(f"OpenDP's filter at (1, 1e-06), rho {rho:.6f}: ran {ran}, computed {said}")
    for name, seconds in decision_times().items():
        print(f"{name:<36} {1e3 * seconds:>10,.2f} ms a decision")


if __name__ == "__main__":
    main()
