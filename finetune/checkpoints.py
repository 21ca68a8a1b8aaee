"""Checkpoints of a run: weights, optimizer state, and which reservation goes on paying.

A checkpoint never says what was spent: the ledger does. Steps that run a second time, because the
process died after the last save or an older file was put back, are paid a second time.

Only weights and optimizer state are kept, which are outputs of DP-SGD; no batch, no gradient and
no state of a random generator: a generator that went back would draw the same noise again, and
the difference of the two releases would have none.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from accountant import Accountant, Reservation, ReservationError, UnitMismatch
from accountant.requests import Holds
from finetune.errors import CheckpointInvalid, PlanChanged
from finetune.plan import TrainingPlan

_FORMAT = 1
_FIELDS = ("format", "ledger", "segments", "model", "optimizer")
Segments = tuple[tuple[TrainingPlan, Holds], ...]
"""The parts of a run, in order: what was priced, and its reservation for ``Accountant.adopt``."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a later process needs to go on with a run.

    Attributes:
        ledger: Identity of the ledger.
        segments: Plans and reservations.
        model: State of the model; None before the first save.
        optimizer: State of the optimizer, likewise.
    """

    ledger: str
    segments: Segments
    model: dict[str, Any] | None = None
    optimizer: dict[str, Any] | None = None

    def write(self, path: Path) -> None:
        """Put the checkpoint in place of the one before, whole or not at all.

        Raises:
            CheckpointInvalid: If it cannot be written; the one before is still there.
        """
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        content = {
            "format": _FORMAT,
            "ledger": self.ledger,
            "segments": [
                {"plan": asdict(plan), "holds": [list(hold) for hold in holds]}
                for plan, holds in self.segments
            ],
            "model": self.model,
            "optimizer": self.optimizer,
        }
        try:
            with part.open("wb") as file:
                torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        except OSError as error:
            raise CheckpointInvalid(path, f"it cannot be written: {error}") from error
        finally:
            part.unlink(missing_ok=True)

    @classmethod
    def read(cls, path: Path) -> Checkpoint:
        """Return the checkpoint in a file; no code in it is run.

        Raises:
            CheckpointInvalid: If the file cannot be read, or is none.
        """
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch's unpickler raises anything on foreign bytes
            raise CheckpointInvalid(
                path,
                f"it cannot be read ({type(error).__name__}); restore it, or name another file",
            ) from error
        if not isinstance(content, dict) or not set(_FIELDS) <= content.keys():
            raise CheckpointInvalid(path, "it is not a checkpoint of a guarded run")
        if content["format"] != _FORMAT:
            raise CheckpointInvalid(path, f"its format is {content['format']!r}, not {_FORMAT}")
        try:
            return cls(
                content["ledger"],
                tuple(
                    (TrainingPlan(**each["plan"]), tuple(map(_hold, each["holds"])))
                    for each in content["segments"]
                ),
                _state(content["model"]),
                _state(content["optimizer"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointInvalid(path, f"it is damaged, restore it: {error}") from error

    def load_into(self, path: Path, model: nn.Module, optimizer: Optimizer) -> None:
        """Load what was saved.

        Raises:
            CheckpointInvalid: If it is of another model or optimizer.
        """
        try:
            model.load_state_dict(self.model or {})
            optimizer.load_state_dict(self.optimizer or {})
        except Exception as error:  # optimizers raise anything on foreign state
            raise CheckpointInvalid(
                path, f"it is of another model or optimizer, resume with those it is of: {error}"
            ) from error

    def adopt(
        self,
        path: Path,
        accountant: Accountant,
        *,
        budget: str,
        plans: Sequence[TrainingPlan],
        unit: str,
    ) -> list[Reservation]:
        """Take over the reservations of the run, with the steps that are left by the ledger.

        Raises:
            PlanChanged: If it was priced for other plans.
            UnitMismatch: If the unit is not the budget's.
            CheckpointInvalid: If it ended, or is of another ledger or budget.
        """
        self.check_plans(plans)
        kept = accountant.budget(budget)
        if unit != kept.unit:
            relation = kept.filter.relation
            raise UnitMismatch(budget, (kept.unit, relation), (unit, relation))
        named = {name for _, holds in self.segments for name, _ in holds}
        if self.ledger != accountant.ledger or named != {budget}:
            raise CheckpointInvalid(
                path,
                f"it is of budget {', '.join(sorted(named))} in ledger {self.ledger}, and not of"
                f" {budget} in {accountant.ledger}; open that one, or name another file",
            )
        try:
            return [accountant.adopt(holds, each.event) for each, holds in self.segments]
        except ReservationError as error:
            raise CheckpointInvalid(
                path,
                f"its run cannot go on ({error}); if it has ended, its weights as last saved are"
                " torch.load(path, weights_only=True)['model']; name another file for a new run",
            ) from error

    def check_plans(self, plans: Sequence[TrainingPlan]) -> None:
        """Raise PlanChanged unless the run was priced for these plans."""
        if len(plans) != len(self.segments):
            raise PlanChanged("number of segments", len(self.segments), len(plans))
        for (saved, _), asked in zip(self.segments, plans, strict=True):
            for name, value in asdict(saved).items():
                if getattr(asked, name) != value:
                    raise PlanChanged(name, value, getattr(asked, name))


def _hold(saved: Any) -> tuple[str, int]:
    name, seq = saved
    if not isinstance(name, str) or not isinstance(seq, int):
        raise TypeError(f"a hold is a name and a number, got {saved!r}")
    return name, seq


def _state(saved: Any) -> dict[str, Any] | None:
    if saved is not None and not isinstance(saved, dict):
        raise TypeError(f"states are dicts, got {type(saved).__name__}")
    return saved
