"""A training plan: what a DP-SGD run will do, fixed and priced before it starts."""

from __future__ import annotations

from dataclasses import dataclass

from dp import Gaussian, PoissonSampled, validate


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """A DP-SGD run (Abadi et al., "Deep Learning with Differential Privacy", 2016).

    Each step draws every unit independently with ``sampling_probability``, clips each unit's
    gradient to L2 norm ``max_grad_norm``, adds N(0, (noise_multiplier * max_grad_norm)^2) to
    every coordinate of the sum, and divides by ``expected_batch_size``, a public constant. The
    real batch size and the size of the dataset are private under add/remove and never used.

    Attributes:
        noise_multiplier: Standard deviation of the noise over ``max_grad_norm``.
        sampling_probability: Probability that a unit takes part in a step, in (0, 1].
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
        validate.probability(sampling_probability=self.sampling_probability)
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
        steps: int,
        max_grad_norm: float = 1.0,
    ) -> TrainingPlan:
        """Return the plan that samples ``expected_batch_size`` of a public number of units."""
        return cls(
            noise_multiplier=noise_multiplier,
            sampling_probability=expected_batch_size / validate.count(units=units),
            steps=steps,
            expected_batch_size=expected_batch_size,
            max_grad_norm=max_grad_norm,
        )

    @property
    def event(self) -> PoissonSampled:
        """One step, as what it costs."""
        return PoissonSampled(self.sampling_probability, Gaussian(self.noise_multiplier))
