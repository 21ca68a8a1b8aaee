"""Guarded DP-SGD fine-tuning: wrap a training script so that every step is charged first.

>>> from finetune import TrainingPlan
>>> TrainingPlan(1.0, 0.05, steps=80, expected_batch_size=64).event.sampling_probability
0.05
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finetune.errors import (
    CheckpointInvalid,
    FinetuneError,
    NoGradient,
    NotFinite,
    NotPoissonSampled,
    PlanChanged,
    SkippedStep,
    UnitsMixed,
    UnmarkedStep,
    UnsupportedModel,
    WeightsChanged,
)
from finetune.plan import TrainingPlan

if TYPE_CHECKING:
    from finetune.opacus import TrainingRun, training_run

__all__ = [
    "CheckpointInvalid",
    "FinetuneError",
    "NoGradient",
    "NotFinite",
    "NotPoissonSampled",
    "PlanChanged",
    "SkippedStep",
    "TrainingPlan",
    "TrainingRun",
    "UnitsMixed",
    "UnmarkedStep",
    "UnsupportedModel",
    "WeightsChanged",
    "training_run",
]


def __getattr__(name: str) -> Any:
    """Import what needs torch and opacus on first use."""
    if name not in ("TrainingRun", "training_run"):
        raise AttributeError(f"module 'finetune' has no attribute {name!r}")
    try:
        from finetune import opacus
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{error.name} is missing; install it with: pip install 'epsledger[finetune]'"
        ) from error
    return getattr(opacus, name)
