"""Planning: figures against simulation, and nothing spent."""

import numpy as np
import pytest

from accountant import Accountant
from dp import Gaussian, NothingFits, adaptive
from retrieval import InvalidQuery, PrivateIndex, RetrievalGuard, margin, winner_accuracy


@pytest.fixture
def accountant():
    with Accountant.open("memory:") as accountant:
        accountant.create_budget("b", adaptive(3.0, 1e-6), unit="article")
        accountant.create_quota("team", adaptive(1.0, 1e-7), of="b")
        yield accountant


def guard(accountant, budget="b"):
    index = PrivateIndex([[1.0, 0.0]], units=["u"])
    return RetrievalGuard(accountant, budget, index, unit="article")


def test_the_least_noise_is_the_least_with_which_they_fit(accountant):
    plan = guard(accountant).plan(200)
    assert plan.fit >= 200
    assert accountant.uses_that_fit("b", Gaussian(plan.noise_multiplier * 0.999)) < 200
    assert plan.share == pytest.approx(1, abs=0.02)
    assert accountant.statement("b").seq == 1  # nothing was spent


def test_a_plan_that_does_not_fit_says_how_many_would(accountant):
    plan = guard(accountant).plan(10_000, noise_multiplier=10.0)
    assert plan.share is None
    assert plan.fit == accountant.uses_that_fit("b", Gaussian(10.0)) < 10_000


def test_of_a_budget_and_its_quota_the_narrower_one_counts(accountant):
    both, alone = guard(accountant, ("b", "team")).plan(50), guard(accountant).plan(50)
    assert both.noise_multiplier > alone.noise_multiplier
    assert both.fit == accountant.uses_that_fit("team", Gaussian(both.noise_multiplier))


@pytest.mark.parametrize(("rivals", "confidence"), [(1, 0.95), (1, 0.7), (4, 0.95), (20, 0.99)])
def test_the_margin_is_that_of_simulated_votes(rivals, confidence):
    lead = margin(10.0, confidence=confidence, rivals=rivals)
    noise = np.random.default_rng(0).normal(0, 10, (200_000, rivals + 1))
    right = np.mean(lead + noise[:, 0] > noise[:, 1:].max(axis=1))
    assert right == pytest.approx(confidence, abs=0.006)
    assert winner_accuracy([lead], noise_multiplier=10.0, rivals=rivals) == pytest.approx(
        confidence
    )


def test_the_other_figures_are_those_of_simulated_counts(accountant):
    plan = guard(accountant).plan(1, noise_multiplier=10.0)
    noise = np.random.default_rng(0).normal(0, 10, 1_000_000)
    assert np.mean(np.abs(noise) <= plan.count_error) == pytest.approx(0.95, abs=0.002)
    assert np.mean(noise >= plan.bar) <= 1.1e-3
    assert np.mean(2 * plan.bar + noise >= plan.bar) >= 0.998
    assert plan.support() == {1.0: 24, 0.9: 30, 0.8: 39, 0.7: 59, 0.6: 117}


@pytest.mark.parametrize("confidence", [0.5, 1.0, float("nan"), -1.0])
def test_a_confidence_is_between_a_half_and_one(accountant, confidence):
    with pytest.raises(InvalidQuery, match="confidence"):
        guard(accountant).plan(10, confidence=confidence)


def test_what_no_noise_makes_fit_has_no_plan(accountant):
    fit = accountant.uses_that_fit("b", Gaussian(5.0))
    accountant.charge("b", Gaussian(5.0), unit="article", activity="x", uses=fit)
    assert guard(accountant).plan(10, noise_multiplier=5.0).share is None
    with pytest.raises(NothingFits):
        guard(accountant).plan(2**52)


def test_a_guard_plans_for_as_many_rivals_as_its_index_has_labels(accountant):
    labels = [f"l{n}" for n in range(9)]
    index = PrivateIndex([[1.0, 0.0]], units=["u"], labels=["l0"], public_labels=labels)
    plan = RetrievalGuard(accountant, "b", index, unit="article").plan(1, noise_multiplier=10.0)
    assert plan.margin == pytest.approx(margin(10.0, rivals=8))
    assert plan.margin > guard(accountant).plan(1, noise_multiplier=10.0).margin + 5
