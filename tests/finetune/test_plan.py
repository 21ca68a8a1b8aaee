"""Plans: whole steps from epochs, and what still fits, against brute force."""

from __future__ import annotations

import dataclasses
import random

import pytest

from accountant import Accountant, BudgetExceeded
from dp import Gaussian, InvalidParameter, NothingFits, adaptive
from finetune import TrainingPlan, least_noise, most_steps

ASK = {"unit": "row", "activity": "training"}


def test_an_epoch_has_all_its_steps_where_floats_lose_one():
    """Opacus plans 1/q with q = 1/len(loader), and takes int(1/q) steps."""
    odd = [length for length in range(1, 3000) if int(1 / (1 / length)) != length]
    assert len(odd) == 153
    for length in odd:
        for batch in (1, 8):
            plan = TrainingPlan.for_units(
                length * batch, expected_batch_size=batch, noise_multiplier=1.0, epochs=1
            )
            assert plan.steps == length
            assert plan.sampling_probability == batch / (length * batch)
    more = TrainingPlan.for_units(93, expected_batch_size=1, noise_multiplier=1.0, epochs=3)
    assert more.steps == 279


@pytest.mark.parametrize(
    "values",
    [{}, {"steps": 3, "epochs": 1}, {"epochs": 0}, {"epochs": float("nan")}, {"epochs": -1}],
)
def test_either_steps_or_epochs(values):
    with pytest.raises(InvalidParameter, match=r"steps|epochs"):
        TrainingPlan.for_units(100, expected_batch_size=10, noise_multiplier=1.0, **values)


def test_more_than_all_units_at_once():
    with pytest.raises(InvalidParameter, match="sampling_probability"):
        TrainingPlan.for_units(10, expected_batch_size=11, noise_multiplier=1.0, steps=1)


def test_a_probability_that_cannot_be_drawn_as_it_is_priced_is_refused():
    TrainingPlan(1.0, 1e-9, steps=1, expected_batch_size=1)
    for probability in (1e-18, 9.9e-10):
        with pytest.raises(InvalidParameter, match=r"sampling_probability .* in \[1e-9, 1\]"):
            TrainingPlan(1.0, probability, steps=1, expected_batch_size=1)


def brute_force(filter, spent, event) -> int:
    """Return how many uses fit, one after another."""
    totals, price, fit = spent, filter.price(event), 0
    while filter.admits(filter.after(totals, price, 1)):
        totals, fit = filter.after(totals, price, 1), fit + 1
    return fit


@pytest.mark.parametrize("plans", [20, pytest.param(200, marks=pytest.mark.long)])
def test_the_last_step_that_fits_and_the_least_noise(plans):
    choose, tried = random.Random(plans), 0
    while tried < plans:
        filter = adaptive(choose.uniform(2.0, 9.0), 10 ** -choose.uniform(5, 7))
        units = choose.randint(50, 5000)
        plan = TrainingPlan.for_units(
            units,
            expected_batch_size=max(1, units // choose.randint(5, 60)),
            noise_multiplier=choose.uniform(0.7, 4.0),
            steps=1,
        )
        first = Gaussian(choose.uniform(5.0, 50.0))
        with Accountant.open("memory:") as accountant:
            accountant.create_budget("b", filter, unit="row")
            accountant.charge("b", first, **ASK)
            totals = filter.after((0,) * len(filter.limits), filter.price(first), 1)
            expected = brute_force(filter, totals, plan.event)
            if not 0 < expected < 3000:
                if not expected:
                    with pytest.raises(NothingFits, match="not one step"):
                        most_steps(accountant, "b", plan)
                continue
            tried += 1
            found = most_steps(accountant, "b", plan)
            assert found.steps == expected
            with pytest.raises(BudgetExceeded) as refusal:
                accountant.reserve("b", found.event, uses=expected + 1, **ASK)
            assert refusal.value.remaining == expected
            quiet = least_noise(accountant, "b", dataclasses.replace(found, steps=expected))
            assert quiet.noise_multiplier <= found.noise_multiplier * (1 + 1e-6)
            assert accountant.uses_that_fit("b", quiet.event) >= expected
            louder = dataclasses.replace(quiet, noise_multiplier=quiet.noise_multiplier * 0.999)
            assert accountant.uses_that_fit("b", louder.event) < expected
            before = accountant.share_after("b", [(quiet.event, expected)])
            accountant.charge("b", quiet.event, uses=expected, **ASK)
            assert accountant.statement("b").share == before
    print(f"{plans} plans: the last step that fits is the one of brute force")
