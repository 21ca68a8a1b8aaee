"""Count what each accounting admits within (epsilon, delta), beside peers; then time one decision.

``default``     ours, ``adaptive(epsilon, delta)``: any event at any time
``expect``      ours, ``adaptive(..., expect=...)``: any event at any time, tuned to the workload
``planned``     ours, the workload committed as slots, or queries on the Gaussian filter beside them
``PLD``         the non-adaptive optimum: sound only if everything was fixed beforehand
``RDP``         dp-accounting's RDP accountant, likewise
``OpenDP``      OpenDP's privacy filter; it has no sampling
``sums``        epsilons and deltas of single uses added up

The neighboring relation is adding or removing one unit. Percentages are of the PLD column.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from time import perf_counter

import peers

from dp import (
    Event,
    Filter,
    Gaussian,
    NeighboringRelation,
    NothingFits,
    PoissonSampled,
    Price,
    adaptive,
    after,
    planned,
    uses_that_fit,
)
from dp.pld import largest_count

ADD_REMOVE = NeighboringRelation.ADD_REMOVE


def admitted(budget: Filter, event: Event, before: peers.After) -> int:
    """Return how many uses fit after those that ran before; 0 where these do not fit."""
    totals = after(budget, (0,) * len(budget.limits), before)
    return 0 if totals is None else uses_that_fit(budget, totals, event)


def by_default(epsilon: float, delta: float, event: Event, before: peers.After) -> int:
    return admitted(adaptive(epsilon, delta), event, before)


def expecting(epsilon: float, delta: float, event: Event, before: peers.After) -> int:
    workload = before[0][0] if before else event
    return admitted(adaptive(epsilon, delta, expect=workload), event, before)


def committed(epsilon: float, delta: float, event: Event, before: peers.After) -> int:
    if before or isinstance(event, Gaussian):
        try:
            return admitted(planned(epsilon, delta, slots=before), event, before)
        except NothingFits:
            return 0
    uses = largest_count(event, ADD_REMOVE, epsilon, delta)
    return admitted(planned(epsilon, delta, slots=[(event, uses)]), event, ())


def microseconds(call: Callable[[], object], times: int) -> float:
    """Return the median over 7 repetitions."""
    found = []
    for _ in range(7):
        began = perf_counter()
        for _ in range(times):
            call()
        found.append(1e6 * (perf_counter() - began) / times)
    return median(found)


def decisions() -> dict[str, float]:
    """Return microseconds of one decision: may one more use run on top of 1,000?"""
    step, query = PoissonSampled(0.01, Gaussian(1.0)), Gaussian(50.0)
    loose = adaptive(8.0, 1e-6)
    tight = planned(8.0, 1e-6, slots=[(step, 5000)])

    def decision(budget: Filter, event: Event) -> Callable[[], bool]:
        prices: dict[Event, Price] = {event: budget.price(event)}
        totals = budget.after((0,) * len(budget.limits), prices[event], 1000)
        return lambda: budget.admits(budget.after(totals, prices[event], 1))

    return {
        "adaptive, DP-SGD, price cached": microseconds(decision(loose, step), 5000),
        "adaptive, Gaussian, price cached": microseconds(decision(loose, query), 5000),
        "planned, DP-SGD slot, price cached": microseconds(decision(tight, step), 5000),
        "planned, Gaussian, price cached": microseconds(decision(tight, query), 5000),
        "adaptive, DP-SGD, first seen": microseconds(lambda: loose.price(step), 50),
        "adaptive, Gaussian, first seen": microseconds(lambda: loose.price(query), 500),
        "planned, Gaussian, first seen": microseconds(lambda: tight.price(query), 500),
    }


def building() -> dict[str, float]:
    """Return seconds to make budgets whose limits come from a PLD, once each and uncached."""
    training = PoissonSampled(0.002, Gaussian(0.6))
    made = {
        "planned, 5,000 steps q=.002 s=.6": lambda: planned(8.0, 1e-6, slots=[(training, 5000)]),
        "planned, 10,000 steps q=.01 s=1": lambda: planned(8.0, 1e-6, slots=[(peers.STEP, 10_000)]),
        "adaptive, expect q=.01 s=1": lambda: adaptive(8.0, 1e-6, expect=peers.STEP),
    }
    seconds = {}
    for name, make in made.items():
        began = perf_counter()
        make()
        seconds[name] = perf_counter() - began
    return seconds


def main() -> None:
    ours = by_default, expecting, committed
    theirs = peers.pld_optimum, peers.rdp_count, peers.opendp_filter_count, peers.naive_count
    heads = ("default", "expect", "planned", "PLD", "RDP", "OpenDP", "sums")
    print(f"{'uses within':<12} {'of':<26}" + "".join(f"{head:>16}" for head in heads))
    for epsilon, delta in peers.BUDGETS:
        for name, (event, before) in peers.CASES.items():
            counts = [count(epsilon, delta, event, before) for count in (*ours, *theirs)]
            best = counts[3]
            cells = [
                "-" if count is None else f"{count:,} {count / best:4.0%}" if best else f"{count:,}"
                for count in counts
            ]
            print(
                f"({epsilon:g}, {delta:g})".ljust(12),
                name.ljust(26) + "".join(f"{cell:>16}" for cell in cells),
                flush=True,
            )
    ran = peers.opendp_filter_run(peers.opendp_rho(1.0, 1e-6), 50.0)
    said = peers.opendp_filter_count(1.0, 1e-6, Gaussian(50.0))
    print(f"OpenDP's filter at (1, 1e-06), Gaussian 50, really run: {ran}; by its maps: {said}")
    print()
    for name, seconds in building().items():
        print(f"{name:<40} {seconds:>10.2f} s to make, once")
    for name, each in decisions().items():
        print(f"{name:<40} {each:>10.1f} us a decision")
    for name, seconds in peers.decision_times().items():
        print(f"{name:<40} {1e6 * seconds:>10,.0f} us a decision")


if __name__ == "__main__":
    main()
