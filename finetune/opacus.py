"""DP-SGD through Opacus, with every step in the ledger. The only importer of opacus.

::

    with training_run(accountant, "news", plan, unit="article") as run:   # refused here, or never
        model, optimizer, loader = run.make_private(model, optimizer, loader)
        for batch in run.batches(loader):     # one durable mark, then the batch; ends by itself
            ...                               # forward, backward, optimizer.step()

What the guard holds Opacus to:

* Poisson sampling at the plan's probability, compared in double precision. Opacus prices any
  loader as Poisson, shuffled ones too, and compares in single precision.
* The gradient sum is divided by the plan's ``expected_batch_size``. Opacus 1.6 divides by
  ``int(len(dataset) * q)``, which depends on the number of units and so tells neighboring
  datasets apart.
* A step is marked durably before its batch reaches any code that could drop it, and an update
  without a mark of its own raises before it changes the weights.
* Every batch gets its step: skipping one because of its loss would tell what was in it.
* There is one gradient for each row of the batch, and a row whose gradient is not finite counts
  as zero; otherwise clipping would not bound what a row can do.
* Raw gradients never stay on the parameters, where another optimizer would find them.
* The whole state of the generators of sampling and noise comes from the operating system. A
  seed would not do: PyTorch's generator on the CPU uses 32 bits of it, few enough to try.

Not covered:

* The loss must be the mean over rows of a loss that depends on that row alone. A mean over
  tokens (``ignore_index``), class weights normalised over the batch, in-batch negatives and batch
  statistics let one row rescale the gradients of the others before they are clipped.
* What a script does with private data besides its optimizer: printing the loss, evaluating on it,
  choosing a checkpoint by it, leaving the loop because of it.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from opacus.validators import ModuleValidator
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, Sampler, SequentialSampler

from accountant import Accountant, Reservation
from finetune.checkpoints import Checkpoint
from finetune.errors import (
    CheckpointInvalid,
    FinetuneError,
    NotPoissonSampled,
    PlanChanged,
    SkippedStep,
    UnitsMixed,
    UnmarkedStep,
)
from finetune.plan import TrainingPlan


@contextmanager
def training_run(
    accountant: Accountant,
    budget: str,
    plan: TrainingPlan,
    *,
    unit: str,
    activity: str = "training",
    checkpoint: str | Path | None = None,
) -> Iterator[TrainingRun]:
    """Reserve a planned run for the length of a ``with`` block; settle what was not run.

    If the block raises, nothing is returned: the whole plan stays spent, unless it is resumed.

    Args:
        accountant: Of the ledger.
        budget: Name of the budget.
        plan: What will be run.
        unit: The privacy unit that one row of the dataset is; it must be the budget's.
        activity: What the ledger calls it.
        checkpoint: A file for :meth:`TrainingRun.save`. If it exists, the run in it is resumed:
            its reservation is adopted with the steps that are left by the ledger, whatever the
            file's age, and whoever held it before is shut out.

    Raises:
        BudgetExceeded: If the plan does not fit; ``remaining`` is the number of steps that would.
        AccountantError: As for ``Accountant.reserve`` or, for a run that ended, ``adopt``.
        CheckpointInvalid: If the file is no checkpoint, or of another ledger or budget.
        PlanChanged: If the run in the file was priced for another plan.
    """
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and path.exists():
        saved = Checkpoint.read(path)
        saved.check_plan(plan)
        if saved.ledger != accountant.ledger or saved.holds[0][0] != budget:
            raise CheckpointInvalid(
                path, f"it is of budget {saved.holds[0][0]!r} in ledger {saved.ledger}"
            )
        reservation = accountant.adopt(saved.holds, plan.event)
    else:
        saved, reservation = None, _reserved(accountant, budget, plan, unit, activity)
    with reservation:
        run = TrainingRun(plan, reservation, accountant.ledger, path, saved)
        try:
            yield run
        finally:
            run.stop()


def _reserved(
    accountant: Accountant, budget: str, plan: TrainingPlan, unit: str, activity: str
) -> Reservation:
    return accountant.reserve(
        budget,
        plan.event,
        uses=plan.steps,
        unit=unit,
        activity=activity,
        note=f"DP-SGD: expected_batch_size={plan.expected_batch_size}"
        f" max_grad_norm={plan.max_grad_norm}",
    )


class TrainingRun:
    """A run that was paid for; get one from :func:`training_run`.

    Attributes:
        plan: What was priced.
        reservation: The steps that the ledger holds for it.
    """

    def __init__(
        self,
        plan: TrainingPlan,
        reservation: Reservation,
        ledger: str,
        path: Path | None = None,
        saved: Checkpoint | None = None,
    ) -> None:
        self.plan, self.reservation = plan, reservation
        self._path, self._saved = path, saved or Checkpoint(ledger, reservation.holds, plan)
        self._paid = self._noised = False
        self._rows = 0
        self._loader: DataLoader[Any] | None = None
        self._model: Any = None
        self._optimizer: Any = None
        self._hooks: list[Any] = []

    def make_private(
        self, model: nn.Module, optimizer: Optimizer, loader: DataLoader[Any]
    ) -> tuple[nn.Module, Optimizer, DataLoader[Any]]:
        """Return model, optimizer and loader for DP-SGD as planned.

        Args:
            model: Its trainable layers must have per-sample gradients (no batch norm); the loss
                must be the mean over rows of a per-row loss.
            optimizer: Any first-order optimizer over parameters of the model.
            loader: Gives dataset, collation and workers; its batching is replaced by Poisson
                sampling. One row of its dataset is one privacy unit.

        Raises:
            NotPoissonSampled: If the dataset cannot be Poisson-sampled, or the loader has a
                sampler with a meaning of its own.
            TypeError: If the optimizer is Opacus's already, or empty batches cannot be made.
            opacus.validators.errors.UnsupportedModuleError: If a layer, such as batch norm,
                cannot be used with DP-SGD.
        """
        if isinstance(loader.dataset, IterableDataset):
            raise NotPoissonSampled(
                "an IterableDataset cannot be Poisson-sampled; load it into a map-style dataset"
            )
        if not isinstance(loader.sampler, SequentialSampler | RandomSampler):
            raise NotPoissonSampled(
                f"the loader draws by {type(loader.sampler).__name__}, which Poisson sampling"
                " would replace; pass a plain DataLoader over the rows to sample"
            )
        if isinstance(optimizer, DPOptimizer):
            raise TypeError("pass the plain optimizer, not the one of an earlier run")
        ModuleValidator.validate(model, strict=True)
        rows = loader.dataset
        self._loader = DataLoader(
            rows,
            batch_sampler=PoissonSampler(
                len(rows),  # type: ignore[arg-type]
                self.plan.sampling_probability,
                self.plan.steps,
            ),
            collate_fn=_Counted(loader.collate_fn, rows[0]),
            num_workers=loader.num_workers,
            pin_memory=loader.pin_memory,
            worker_init_fn=loader.worker_init_fn,
        )
        self._model = GradSampleModule(model, loss_reduction="mean")
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._optimizer = _Optimizer(
            optimizer,
            noise_multiplier=self.plan.noise_multiplier,
            max_grad_norm=self.plan.max_grad_norm,
            expected_batch_size=self.plan.expected_batch_size,
            loss_reduction="mean",
            generator=secret_generator(parameters[0].device),
        )
        self._optimizer.attach_step_hook(self._check_step)
        self._hooks = [
            optimizer.register_step_pre_hook(self._check_update),
            *(
                each.register_post_accumulate_grad_hook(_drop_gradient)  # type: ignore[no-untyped-call]
                for each in parameters
            ),
        ]
        if self._saved.model is not None:
            model.load_state_dict(self._saved.model)
            optimizer.load_state_dict(self._saved.optimizer or {})
        elif self._path is not None:
            self._saved.write(self._path)  # so that a crash before the first save is not the end
        return self._model, self._optimizer, self._loader

    def batches(self, loader: DataLoader[Any]) -> Iterator[Any]:
        """Yield batches until the plan's steps are taken; each is marked durably before.

        Args:
            loader: The one that :meth:`make_private` returned.

        Raises:
            NotPoissonSampled: If it is another loader.
            SkippedStep: If the last batch got no optimizer step.
        """
        if loader is not self._loader:
            raise NotPoissonSampled(
                "these batches are not the Poisson samples that were priced; iterate over the"
                " loader that make_private returned (a shuffled loader has no amplification)"
            )
        rows = iter(loader)
        while self.reservation.remaining:
            if self._paid:
                raise SkippedStep(
                    "the last batch got no optimizer step; take one for every batch, whatever its"
                    " loss, and for empty ones too"
                )
            self.reservation.mark()
            self._paid = True
            try:
                self._rows, batch = next(rows)
            except StopIteration:  # an earlier call drew some of the sampler's steps
                rows = iter(loader)
                self._rows, batch = next(rows)
            yield batch

    def save(self) -> None:
        """Write weights and optimizer state to the run's checkpoint, between two steps.

        Raises:
            CheckpointInvalid: If the run has no checkpoint, or it cannot be written.
        """
        if self._path is None or self._optimizer is None:
            raise CheckpointInvalid(
                self._path or Path(), "name one in training_run, and save after make_private"
            )
        model = {
            name.removeprefix("_module."): part for name, part in self._model.state_dict().items()
        }
        replace(self._saved, model=model, optimizer=self._optimizer.state_dict()).write(self._path)

    def stop(self) -> None:
        """Drop every gradient, clipped sums before noise too, and the per-sample hooks."""
        self._paid = self._noised = False
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._optimizer is not None:
            self._optimizer._step_skip_queue.clear()  # noqa: SLF001
            self._optimizer._is_last_step_skipped = False  # noqa: SLF001
            self._optimizer.zero_grad(set_to_none=True)
            self._model.remove_hooks()

    def _check_step(self, optimizer: Any) -> None:
        """Refuse the update, before it is made, unless it is the one that was paid for."""
        try:
            self._refuse_others(optimizer)
        except FinetuneError:
            for parameter in optimizer.params:
                parameter.grad = None
            raise
        self._paid, self._noised = False, True

    def _refuse_others(self, optimizer: Any) -> None:
        for name, actual in (
            ("noise_multiplier", optimizer.noise_multiplier),
            ("max_grad_norm", optimizer.max_grad_norm),
            ("expected_batch_size", optimizer.expected_batch_size),
        ):
            planned = getattr(self.plan, name)
            if actual != planned:
                raise PlanChanged(name, planned, actual)
        if not self._paid:
            raise UnmarkedStep(
                "no durable mark pays for this step; take one optimizer step for each batch"
                " that run.batches yields"
            )
        if optimizer.accumulated_iterations != 1:
            raise UnmarkedStep("gradients of several backward passes in one step")
        samples = {len(gradients) for gradients in optimizer.grad_samples}
        if samples != {self._rows}:
            raise UnitsMixed(
                f"the batch has {self._rows} rows, and trainable layers saw {sorted(samples)}"
                " samples; each row needs one gradient, so keep rows as the first dimension and"
                " do not cut them in pieces"
            )

    def _check_update(self, *_: object) -> None:
        """Refuse an update of the wrapped optimizer without clipping and noise."""
        if not self._noised:
            raise UnmarkedStep(
                "the optimizer that was passed to make_private was stepped itself, with raw"
                " gradients; step the one that make_private returned"
            )
        self._noised = False


class PoissonSampler(Sampler[list[int]]):
    """Draw each row independently with the same probability, afresh in every step.

    Args:
        rows: Number of rows.
        sampling_probability: Of each row in each step; realised to 2**-53.
        steps: Number of batches, empty ones included.

    >>> list(PoissonSampler(4, 1.0, 2))
    [[0, 1, 2, 3], [0, 1, 2, 3]]
    """

    def __init__(self, rows: int, sampling_probability: float, steps: int) -> None:
        self.rows, self.sampling_probability, self.steps = rows, sampling_probability, steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        generator = np.random.Generator(np.random.PCG64DXSM(secrets.randbits(256)))
        for _ in range(self.steps):
            drawn = generator.random(self.rows) < self.sampling_probability
            yield np.flatnonzero(drawn).tolist()


class _Counted:
    """Collate rows to (number of rows, batch); a batch without rows has the shape of the others."""

    def __init__(self, collate: Callable[[list[Any]], Any], example: Any) -> None:
        self._collate, self._empty = collate, _without_rows(collate([example]))

    def __call__(self, rows: list[Any]) -> tuple[int, Any]:
        return len(rows), self._collate(rows) if rows else self._empty


class _Optimizer(DPOptimizer):  # type: ignore[misc]
    """DP-SGD in which a row whose gradient is not finite counts as zero, which a bound needs."""

    def clip_and_accumulate(self) -> None:
        super().clip_and_accumulate()
        if all(parameter.summed_grad.isfinite().all() for parameter in self.params):
            return
        finite = torch.stack(
            [gradients.flatten(1).isfinite().all(1) for gradients in self.grad_samples]
        ).all(0)
        for parameter, gradients in zip(self.params, self.grad_samples, strict=True):
            parameter.grad_sample = gradients.clone()
            parameter.grad_sample[~finite] = 0
            parameter.summed_grad = None
        super().clip_and_accumulate()


def secret_generator(device: torch.device) -> torch.Generator:
    """Return a generator whose whole state comes from the operating system.

    On the CPU the state of the Mersenne Twister is written out, because ``manual_seed`` uses
    32 bits of its seed there; elsewhere a seed of 63 bits is used.
    """
    generator = torch.Generator(device).manual_seed(secrets.randbits(63))
    if device.type == "cpu":
        state = generator.get_state().numpy()
        words = np.frombuffer(os.urandom(4 * _TWISTER_WORDS), "<u4").astype("<u8")
        state[_TWISTER_AT : _TWISTER_AT + 8 * _TWISTER_WORDS] = words.view(np.uint8)
        generator.set_state(torch.from_numpy(state))
    return generator


# Where torch's serialised CPU generator has its words, each in 8 bytes (checked by a test).
_TWISTER_AT, _TWISTER_WORDS = 24, 624


def _drop_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None


def _without_rows(batch: Any) -> Any:
    if isinstance(batch, torch.Tensor):
        return batch[:0]
    if isinstance(batch, Mapping):
        return {name: _without_rows(part) for name, part in batch.items()}
    if isinstance(batch, list | tuple):
        if all(isinstance(part, str | bytes) for part in batch):
            return []
        return [_without_rows(part) for part in batch]
    raise TypeError(
        f"a batch without rows cannot be made of {type(batch).__name__}: let collate_fn return"
        " tensors, or lists, tuples and dicts of them"
    )
