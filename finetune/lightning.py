"""Lightning under guard. The only importer of lightning.

::

    with training_run(accountant, "news", plan, unit="article") as run:
        fit(trainer, run, module, loader, physical=64)    # in place of trainer.fit(module, loader)

One step of the trainer is one step of the plan: one mark, one update, one turn of a schedule of
the learning rate by steps, whatever the size of the sample, which is private. A sample larger
than ``physical`` is taken in parts, with one call of ``training_step`` for each. The plan says how
many steps there are, in one epoch; ``max_steps`` and ``limit_train_batches`` may end it earlier.

The module stays as it is, but for the time of training: its ``training_step`` has to return the
mean over rows of a loss of each row alone, and models with a trained table of positions (GPT-2's)
need position_ids of shape (rows, tokens). What it logs, and what the trainer monitors, is outside
the guarantee if it is computed from private rows: ``self.log("loss", ...)`` publishes the loss.

The trainer's checkpoints are for release; only the run's own can be resumed from, and it is
written whenever the trainer saves, and at the end. A resumed run goes on in its schedule of the
learning rate, while the trainer counts steps and epochs from zero, as it does for any new module.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial, wraps
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    GradientAccumulationScheduler,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.utils.data import DataLoader

from finetune.errors import SkippedStep, UnsupportedSetting
from finetune.opacus import TrainingRun


def fit(
    trainer: Trainer,
    run: TrainingRun,
    module: LightningModule,
    train_dataloader: DataLoader[Any],
    val_dataloaders: Any = None,
    *,
    physical: int | None = None,
    mode: Literal["hooks", "ghost"] = "hooks",
) -> None:
    """Train a module to the end of the plan, as ``trainer.fit`` does, with a run that pays.

    Args:
        trainer: On one device, in full precision, without clipping or accumulation of its own.
        run: The run that pays.
        module: Optimized automatically, by one optimizer.
        train_dataloader: Gives dataset, collation and workers; its batching is replaced.
        val_dataloaders: As for ``trainer.fit``.
        physical: Most rows of a batch.
        mode: How gradients are clipped; see :meth:`finetune.TrainingRun.make_private`.

    Raises:
        UnsupportedSetting: If the guarantee would not hold.
        SkippedStep: If ``training_step`` returned no loss.
    """
    _check_settings(trainer, module)
    guard = _Guard(run, train_dataloader, physical, mode)
    own = module.training_step
    with ExitStack() as undo:
        _replace(undo, module, "training_step", wraps(own)(partial(guard.training_step, own)))
        _replace(undo, trainer.fit_loop, "max_epochs", trainer.current_epoch + 1)
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        callbacks.append(guard)
        undo.callback(callbacks.remove, guard)
        trainer.fit(module, guard.steps, val_dataloaders)
    guard.save()


def _replace(undo: ExitStack, owner: Any, name: str, value: object) -> None:
    """Set an attribute of an instance until ``undo``."""
    if name in vars(owner):
        undo.callback(setattr, owner, name, getattr(owner, name))
    else:
        undo.callback(delattr, owner, name)
    setattr(owner, name, value)


class _Guard(Callback):
    """Makes the optimizer of a fit private, and what is done in a step and when it is saved."""

    def __init__(
        self,
        run: TrainingRun,
        loader: DataLoader[Any],
        physical: int | None,
        mode: Literal["hooks", "ghost"],
    ) -> None:
        self.steps = _Steps(run, loader, physical)
        self._run, self._mode = run, mode
        self._trainer: Any = None
        self._optimizer: Any = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the private optimizer in place of the module's own."""
        if [bool(each.param_groups) for each in trainer.optimizers] != [True]:
            raise UnsupportedSetting(
                "configure_optimizers", trainer.optimizers, "return one optimizer"
            )
        rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
        _, self._optimizer, self.steps.loader = self._run.make_private(
            pl_module, trainer.optimizers[0], self.steps.loader, mode=self._mode
        )
        self._trainer, trainer.optimizers = trainer, [self._optimizer]
        self._catch_up(trainer.lr_scheduler_configs, rates)

    def _catch_up(self, schedules: list[Any], rates: list[Any]) -> None:
        """Bring fresh schedules of the learning rate to where a resumed run left them."""
        taken = self._run.steps - self._run.remaining
        if schedules:
            for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
                group["lr"] = rate  # and not what it was when it was saved
        for schedule in schedules:
            if schedule.interval == "step" and not schedule.reduce_on_plateau:
                with warnings.catch_warnings():  # of a step before one of the optimizer
                    warnings.simplefilter("ignore", UserWarning)
                    for _ in range(taken // schedule.frequency):
                        schedule.scheduler.step()

    def training_step(self, own: Callable[..., Any], batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Take all parts of a sample, and return what a module's own method does of the last."""
        while True:
            output = own(batch, *args, **kwargs)
            output = output if isinstance(output, Mapping) else {"loss": output}
            if output.get("loss") is None:
                raise SkippedStep(
                    "training_step returned no loss; return one for every batch, whatever is in"
                    " it: leaving one out because of its data reveals it"
                )
            if self._optimizer.turn.last:
                return output
            self._optimizer.zero_grad()
            output["loss"].backward()
            self._optimizer.step()
            batch = self._trainer.lightning_module.on_before_batch_transfer(self.steps.part(), 0)
            batch = self._trainer.strategy.batch_to_device(batch)

    def save(self) -> None:
        """Write the run's checkpoint, if it has one."""
        if self._run.checkpoint is not None:
            self._run.save()

    def on_save_checkpoint(self, *_: object) -> None:
        """Write it when the trainer writes its own."""
        self.save()


class _Steps:
    """The loader that the trainer sees: the first part of the sample of each step."""

    def __init__(self, run: TrainingRun, loader: DataLoader[Any], physical: int | None) -> None:
        self.loader = loader
        self._run, self._physical, self._steps = run, physical, run.remaining
        self._parts: Iterator[Any] = iter(())

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[Any]:
        self._parts = self._run.batches(self.loader, physical=self._physical)
        yield from self._parts

    def part(self) -> Any:
        """Return the next part of the sample in hand."""
        return next(self._parts)


_ONE = "run on one device, in one process: Trainer(devices=1, strategy='auto')"
_ALLOWED: tuple[tuple[str, tuple[object, ...], str], ...] = (
    (
        "accumulate_grad_batches",
        (1,),
        "set 1; the plan fixes the sample, which comes in parts of fit(..., physical=...)",
    ),
    ("gradient_clip_val", (None, 0), "rows are clipped already, by the plan's max_grad_norm"),
    (
        "precision",
        ("32-true", "64-true"),
        "it scales or rounds gradients; set precision='32-true'",
    ),
    ("num_devices", (1,), _ONE),
    ("num_nodes", (1,), _ONE),
    ("world_size", (1,), _ONE),
    ("overfit_batches", (0, 0.0), "samples are drawn by Poisson sampling"),
)


def _check_settings(trainer: Trainer, module: LightningModule) -> None:
    if not isinstance(trainer, Trainer):
        raise TypeError("the trainer has to be of lightning.pytorch, not of pytorch_lightning")
    for name, allowed, advice in _ALLOWED:
        value = getattr(trainer, name)
        if value not in allowed:
            raise UnsupportedSetting(name, value, advice)
    if not isinstance(trainer.strategy, SingleDeviceStrategy):
        raise UnsupportedSetting("strategy", type(trainer.strategy).__name__, _ONE)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if (
            isinstance(callback, GradientAccumulationScheduler)
            and callback.going_to_accumulate_grad_batches()
        ):
            raise UnsupportedSetting("callbacks", type(callback).__name__, _ALLOWED[0][2])
        if isinstance(callback, StochasticWeightAveraging | WeightAveraging):
            raise UnsupportedSetting(
                "callbacks",
                type(callback).__name__,
                "it copies the module while it is guarded; average the weights of saved models",
            )
    if type(module).configure_gradient_clipping is not LightningModule.configure_gradient_clipping:
        raise UnsupportedSetting(
            "configure_gradient_clipping", type(module).__name__, _ALLOWED[1][2]
        )
    if not module.automatic_optimization:
        raise UnsupportedSetting(
            "automatic_optimization", False, "iterate over run.batches(...) yourself instead"
        )
