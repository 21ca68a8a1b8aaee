"""Guarded DP-SGD fine-tuning: wrap a training script so that every step is charged first.

>>> from finetune import TrainingPlan
>>> TrainingPlan(1.0, 0.05, steps=80, expected_batch_size=64).event.sampling_probability
0.05
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from finetune.errors import (
    CheckpointInvalid,
    DeclaredExceeded,
    FinetuneError,
    NoGradient,
    NotFinite,
    NotPoissonSampled,
    PeerFailed,
    PlanChanged,
    RowsMixed,
    SkippedStep,
    UnitIdsInvalid,
    UnitsMixed,
    UnmarkedStep,
    UnsupportedModel,
    UnsupportedSetting,
    WeightsChanged,
)
from finetune.plan import TrainingPlan, least_noise, most_steps

if TYPE_CHECKING:
    from finetune.opacus import TrainingRun, training_run
    from finetune.selftest import check_rows_apart
    from finetune.sweeps import Winner, sweep, sweep_event
    from finetune.unit_map import UnitMap
    from finetune.units import CappedRows, OneRowPerUnit, UnitGuarantee, unit_guarantee

__all__ = [
    "CappedRows",
    "CheckpointInvalid",
    "DeclaredExceeded",
    "FinetuneError",
    "NoGradient",
    "NotFinite",
    "NotPoissonSampled",
    "OneRowPerUnit",
    "PeerFailed",
    "PlanChanged",
    "RowsMixed",
    "SkippedStep",
    "TrainingPlan",
    "TrainingRun",
    "UnitGuarantee",
    "UnitIdsInvalid",
    "UnitMap",
    "UnitsMixed",
    "UnmarkedStep",
    "UnsupportedModel",
    "UnsupportedSetting",
    "WeightsChanged",
    "Winner",
    "check_rows_apart",
    "least_noise",
    "most_steps",
    "sweep",
    "sweep_event",
    "training_run",
    "unit_guarantee",
]


_LAZY = {
    "CappedRows": "finetune.units",
    "OneRowPerUnit": "finetune.units",
    "TrainingRun": "finetune.opacus",
    "UnitGuarantee": "finetune.units",
    "UnitMap": "finetune.unit_map",
    "Winner": "finetune.sweeps",
    "check_rows_apart": "finetune.selftest",
    "sweep": "finetune.sweeps",
    "sweep_event": "finetune.sweeps",
    "training_run": "finetune.opacus",
    "unit_guarantee": "finetune.units",
}


def __getattr__(name: str) -> Any:
    """Import what needs torch and opacus on first use."""
    if name not in _LAZY:
        raise AttributeError(f"module 'finetune' has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_LAZY[name]), name)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{error.name} is missing; install it with: pip install 'epsledger[finetune]'"
        ) from error
