"""A training plan: what a DP-SGD run will do, fixed and priced before it starts."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction

from accountant import Reader
from dp import Gaussian, InvalidParameter, NothingFits, PoissonSampled, validate

_LEAST_PROBABILITY = 1e-9
"""Samples are drawn on a grid of 2**-53, which is 1e-7 of it."""


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """A DP-SGD run (Abadi et al., "Deep Learning with Differential Privacy", 2016).

    Each step draws every unit independently with ``sampling_probability``, clips each unit's
    gradient to L2 norm ``max_grad_norm``, adds N(0, (noise_multiplier * max_grad_norm)^2) to
    every coordinate of the sum, and divides by ``expected_batch_size``, a public constant. The
    real batch size and the size of the dataset are private under add/remove and never used.

    Attributes:
        noise_multiplier: Standard deviation of the noise over ``max_grad_norm``.
        sampling_probability: Probability that a unit takes part in a step, in [1e-9, 1]; a smaller
            one cannot be drawn as it is priced.
        steps: Number of optimizer steps.
        max_grad_norm: Clipping norm, in the units of the gradient.
        expected_batch_size: Public normaliser of the gradient sum.

    Raises:
        InvalidParameter: If a value is outside its domain.

    >>> plan = TrainingPlan.for_units(1300, expected_batch_size=65, noise_multiplier=1.0, steps=80)
    >>> plan.event
    PoissonSampled(sampling_probability=0.05, event=Gaussian(noise_multiplier=1.0))
    """

    noise_multiplier: float
    sampling_probability: float
    steps: int
    expected_batch_size: int
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        validate.positive(noise_multiplier=self.noise_multiplier)
        if (
            validate.probability(sampling_probability=self.sampling_probability)
            < _LEAST_PROBABILITY
        ):
            raise InvalidParameter(
                "sampling_probability", self.sampling_probability, "in [1e-9, 1] to be drawn"
            )
        validate.count(steps=self.steps)
        validate.count(expected_batch_size=self.expected_batch_size)
        validate.positive(max_grad_norm=self.max_grad_norm)

    @classmethod
    def for_units(
        cls,
        units: int,
        *,
        expected_batch_size: int,
        noise_multiplier: float,
        steps: int | None = None,
        epochs: float | None = None,
        max_grad_norm: float = 1.0,
    ) -> TrainingPlan:
        """Return the plan that samples ``expected_batch_size`` of a public number of units.

        Args:
            units: Number of privacy units, a public one: an upper bound if the real one is secret.
            expected_batch_size: Mean size of a sample.
            noise_multiplier: Standard deviation of the noise over ``max_grad_norm``.
            steps: Number of optimizer steps; or else
            epochs: How often each unit takes part on average. Rounded up to whole steps, exactly:
                ``int(epochs / sampling_probability)`` in floats can be a step short.
            max_grad_norm: Clipping norm.

        Raises:
            InvalidParameter: If a value is outside its domain, or neither or both of ``steps``
                and ``epochs`` are given.

        >>> TrainingPlan.for_units(93, expected_batch_size=1, noise_multiplier=1.0, epochs=1).steps
        93
        >>> int(1 / (1 / 93))
        92
        """
        validate.count(units=units)
        validate.count(expected_batch_size=expected_batch_size)
        if (steps is None) == (epochs is None):
            raise InvalidParameter("steps", steps, "given, or else epochs")
        if steps is None:
            passes = Fraction(validate.positive(epochs=epochs))
            steps = math.ceil(passes * units / expected_batch_size)
        return cls(
            noise_multiplier=noise_multiplier,
            sampling_probability=expected_batch_size / units,
            steps=steps,
            expected_batch_size=expected_batch_size,
            max_grad_norm=max_grad_norm,
        )

    @property
    def event(self) -> PoissonSampled:
        """One step, as what it costs."""
        return PoissonSampled(self.sampling_probability, Gaussian(self.noise_multiplier))


def most_steps(reader: Reader, budget: str, plan: TrainingPlan) -> TrainingPlan:
    """Return the plan with as many steps as fit into what is left of a budget; spends nothing.

    Args:
        reader: Of the ledger.
        budget: Name of the budget.
        plan: Everything but the number of steps.

    Raises:
        NothingFits: If not one step does.

    >>> from accountant import Accountant
    >>> from dp import adaptive
    >>> plan = TrainingPlan(1.0, 0.01, steps=1, expected_batch_size=100)
    >>> with Accountant.open("memory:") as accountant:
    ...     _ = accountant.create_budget("news", adaptive(8.0, 1e-6), unit="article")
    ...     most_steps(accountant, "news", plan).steps
    10919
    """
    fit = reader.uses_that_fit(budget, plan.event)
    if not fit:
        raise NothingFits(f"budget {budget!r}: not one step of {plan.event!r} fits any more")
    return replace(plan, steps=fit)


def least_noise(reader: Reader, budget: str, plan: TrainingPlan) -> TrainingPlan:
    """Return the plan with the least noise with which it fits into what is left of a budget.

    Args:
        reader: Of the ledger.
        budget: Name of the budget.
        plan: Everything but the noise.

    Raises:
        NothingFits: If no noise is enough.

    >>> from accountant import Accountant
    >>> from dp import adaptive
    >>> plan = TrainingPlan(1.0, 0.01, steps=2000, expected_batch_size=100)
    >>> with Accountant.open("memory:") as accountant:
    ...     _ = accountant.create_budget("news", adaptive(3.0, 1e-6), unit="article")
    ...     round(least_noise(accountant, "news", plan).noise_multiplier, 3)
    1.053
    """

    def step(noise_multiplier: float) -> PoissonSampled:
        return PoissonSampled(plan.sampling_probability, Gaussian(noise_multiplier))

    return replace(plan, noise_multiplier=reader.smallest_noise(budget, step, uses=plan.steps))
