"""DP-SGD through Opacus, with every step in the ledger. The only importer of torch and opacus.

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
* Sampling and noise come from a generator seeded by the operating system, so that no seed of
  the script, kept or replayed, repeats them.

Not covered: what a script does with private data besides its optimizer (printing the loss,
evaluating on it, choosing a checkpoint by it), and a second optimizer over the same weights.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from opacus import GradSampleModule
from opacus.data_loader import dtype_safe, shape_safe, wrap_collate_with_empty
from opacus.optimizers import DPOptimizer
from opacus.validators import ModuleValidator
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, Sampler, SequentialSampler

from accountant import Accountant, Reservation
from finetune.errors import NotPoissonSampled, PlanChanged, UnmarkedStep
from finetune.plan import TrainingPlan


@contextmanager
def training_run(
    accountant: Accountant,
    budget: str,
    plan: TrainingPlan,
    *,
    unit: str,
    activity: str = "training",
) -> Iterator[TrainingRun]:
    """Reserve a planned run for the length of a ``with`` block; settle what was not run.

    If the block raises, nothing is returned: the whole plan stays spent.

    Args:
        accountant: Of the ledger.
        budget: Name of the budget.
        plan: What will be run.
        unit: The privacy unit that one row of the dataset is; it must be the budget's.
        activity: What the ledger calls it.

    Raises:
        BudgetExceeded: If the plan does not fit; ``remaining`` is the number of steps that would.
        AccountantError: As for ``Accountant.reserve``.
    """
    reservation = accountant.reserve(
        budget,
        plan.event,
        uses=plan.steps,
        unit=unit,
        activity=activity,
        note=f"DP-SGD: expected_batch_size={plan.expected_batch_size}"
        f" max_grad_norm={plan.max_grad_norm}",
    )
    with reservation:
        run = TrainingRun(plan, reservation)
        try:
            yield run
        finally:
            run.stop()


class TrainingRun:
    """A run that was paid for; get one from :func:`training_run`.

    Attributes:
        plan: What was priced.
        reservation: The steps that the ledger holds for it.
    """

    def __init__(self, plan: TrainingPlan, reservation: Reservation) -> None:
        self.plan, self.reservation = plan, reservation
        self._paid = self._noised = False
        self._loader: DataLoader[Any] | None = None
        self._model: Any = None
        self._optimizer: Any = None

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
            opacus.validators.errors.UnsupportedModuleError: If a layer mixes rows.
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
        ModuleValidator.validate(model, strict=True)
        generator = torch.Generator().manual_seed(secrets.randbits(63))
        rows = loader.dataset
        self._loader = DataLoader(
            rows,
            batch_sampler=PoissonSampler(
                len(rows),  # type: ignore[arg-type]
                self.plan.sampling_probability,
                self.plan.steps,
                generator,
            ),
            collate_fn=wrap_collate_with_empty(
                collate_fn=loader.collate_fn,
                sample_empty_shapes=[(0, *shape_safe(part)) for part in rows[0]],
                dtypes=[dtype_safe(part) for part in rows[0]],
            ),
            num_workers=loader.num_workers,
            pin_memory=loader.pin_memory,
            worker_init_fn=loader.worker_init_fn,
        )
        self._model = GradSampleModule(model, loss_reduction="mean")
        self._optimizer = DPOptimizer(
            optimizer,
            noise_multiplier=self.plan.noise_multiplier,
            max_grad_norm=self.plan.max_grad_norm,
            expected_batch_size=self.plan.expected_batch_size,
            loss_reduction="mean",
            generator=torch.Generator().manual_seed(secrets.randbits(63)),
        )
        self._optimizer.attach_step_hook(self._check_step)
        optimizer.register_step_pre_hook(self._check_update)
        return self._model, self._optimizer, self._loader

    def batches(self, loader: DataLoader[Any]) -> Iterator[Any]:
        """Yield batches until the plan's steps are taken; each is marked durably before.

        Args:
            loader: The one that :meth:`make_private` returned.

        Raises:
            NotPoissonSampled: If it is another loader.
        """
        if loader is not self._loader:
            raise NotPoissonSampled(
                "these batches are not the Poisson samples that were priced; iterate over the"
                " loader that make_private returned (a shuffled loader has no amplification)"
            )
        rows = iter(loader)
        while self.reservation.remaining:
            self.reservation.mark()
            self._paid = True
            try:
                batch = next(rows)
            except StopIteration:  # an earlier call drew some of the sampler's steps
                rows = iter(loader)
                batch = next(rows)
            yield batch

    def stop(self) -> None:
        """Drop every gradient, clipped sums before noise too, and the per-sample hooks."""
        self._paid = self._noised = False
        if self._optimizer is not None:
            self._optimizer._step_skip_queue.clear()  # noqa: SLF001
            self._optimizer._is_last_step_skipped = False  # noqa: SLF001
            self._optimizer.zero_grad(set_to_none=True)
            self._model.remove_hooks()

    def _check_step(self, optimizer: Any) -> None:
        """Refuse the update, before it is made, unless it is the one that was paid for."""
        for name, actual in (
            ("noise_multiplier", optimizer.noise_multiplier),
            ("max_grad_norm", optimizer.max_grad_norm),
            ("expected_batch_size", optimizer.expected_batch_size),
        ):
            planned = getattr(self.plan, name)
            if actual != planned:
                raise PlanChanged(name, planned, actual)
        if optimizer.accumulated_iterations != 1:
            raise UnmarkedStep(
                "gradients of several batches in one step; each batch is a step of its own"
            )
        if not self._paid:
            raise UnmarkedStep(
                "no durable mark pays for this step; take one optimizer step for each batch"
                " that run.batches yields"
            )
        self._paid, self._noised = False, True

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
        generator: Source of randomness.

    >>> sampler = PoissonSampler(4, 1.0, 2, torch.Generator())
    >>> list(sampler)
    [[0, 1, 2, 3], [0, 1, 2, 3]]
    """

    def __init__(
        self, rows: int, sampling_probability: float, steps: int, generator: torch.Generator
    ) -> None:
        self.rows, self.sampling_probability, self.steps = rows, sampling_probability, steps
        self._generator = generator

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(self.steps):
            drawn = torch.rand(self.rows, generator=self._generator, dtype=torch.float64)
            yield (drawn < self.sampling_probability).nonzero().reshape(-1).tolist()
