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
need position_ids of shape (rows, tokens). Its loss is private: what ``training_step`` logs is
dropped with a warning, so that nothing can monitor it either, and callbacks see a loss of zero.
What other hooks log, or callbacks make of a batch, is outside the guarantee if it is computed from
private rows. Evaluate on public rows, and log in ``validation_step``.

The trainer's checkpoints are for release; only the run's own can be resumed from, and it is
written whenever the trainer saves, and at the end. A resumed run goes on in its schedule of the
learning rate, while the trainer counts steps and epochs from zero, as it does for any new module.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    StochasticWeightAveraging,
    ThroughputMonitor,
    WeightAveraging,
)
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch.utils._pytree import tree_flatten
from torch.utils.data import DataLoader

from finetune.batches import reads
from finetune.errors import SkippedStep, UnsupportedSetting
from finetune.opacus import TrainingRun


def fit(
    trainer: Trainer,
    run: TrainingRun,
    module: LightningModule,
    train_dataloader: DataLoader[Any] | LightningDataModule,
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
        train_dataloader: Gives dataset, collation and workers; its batching is replaced. Or a
            data module that makes one.
        val_dataloaders: As for ``trainer.fit``; a data module makes its own.
        physical: Most rows of a batch.
        mode: How gradients are clipped; see :meth:`finetune.TrainingRun.make_private`.

    Raises:
        UnsupportedSetting: If the guarantee would not hold.
        SkippedStep: If ``training_step`` returned no loss, or was skipped.
    """
    _check_settings(trainer, module)
    guard = _Guard(run, physical, mode)
    loop, strategy = trainer.fit_loop.epoch_loop, trainer.strategy
    automatic, results = loop.automatic_optimization, loop._results  # noqa: SLF001
    with ExitStack() as undo:
        # Nothing of the module itself is replaced: callbacks may copy it.
        _replace(undo, strategy, "setup_optimizers", partial(_one_optimizer, strategy))
        _replace(undo, strategy, "training_step", partial(guard.training_step, strategy))
        _replace(undo, automatic, "run", partial(_without_loss, automatic.run))
        _replace(undo, results, "log", partial(guard.log, results.log))
        _replace(undo, trainer.fit_loop, "max_epochs", trainer.current_epoch + 1)
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        callbacks.append(guard)
        undo.callback(callbacks.remove, guard)
        if isinstance(train_dataloader, LightningDataModule):
            guard.make_loader = train_dataloader.train_dataloader
            _replace(undo, train_dataloader, "train_dataloader", lambda: guard.steps)
            trainer.fit(module, None, val_dataloaders, datamodule=train_dataloader)
        else:
            guard.make_loader = lambda: train_dataloader
            trainer.fit(module, guard.steps, val_dataloaders)
    guard.save()


def _without_loss(own: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """Return what a step hands to callbacks, with zero in place of the loss."""
    outputs = own(*args)
    return outputs | {"loss": torch.zeros_like(outputs["loss"])}


def _with_loss(output: Any) -> Mapping[str, Any]:
    """Return what training_step returned as a mapping, with a loss in it."""
    found: Mapping[str, Any] = output if isinstance(output, Mapping) else {"loss": output}
    if found.get("loss") is None:
        raise SkippedStep(
            "training_step returned no loss; return one for every batch, whatever is in it: leaving"
            " one out because of its data reveals it"
        )
    return found


def _one_optimizer(strategy: Any, trainer: Trainer) -> None:
    """Set up the optimizer of a module, if it is one."""
    try:
        type(strategy).setup_optimizers(strategy, trainer)
    except RuntimeError as error:  # its advice, automatic_optimization = False, does not fit
        if "multiple optimizers" not in str(error):
            raise
        raise UnsupportedSetting("configure_optimizers", "several", _OPTIMIZER) from error


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
        self, run: TrainingRun, physical: int | None, mode: Literal["hooks", "ghost"]
    ) -> None:
        self.steps = _Steps(run, physical)
        self.make_loader: Callable[[], Any] = lambda: None
        self._run, self._mode = run, mode
        self._trainer: Any = None
        self._optimizer: Any = None
        self._rows: Any = None
        self._warned = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the private optimizer in place of the module's own."""
        if [bool(each.param_groups) for each in trainer.optimizers] != [True]:
            raise UnsupportedSetting("configure_optimizers", trainer.optimizers, _OPTIMIZER)
        loader = self.make_loader()
        if not isinstance(loader, DataLoader):
            raise UnsupportedSetting(
                "train_dataloader",
                type(loader).__name__,
                "pass one DataLoader over all rows (samples are drawn from one data set)",
            )
        self._trainer, self._rows = trainer, loader.dataset
        rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
        _, self._optimizer, self.steps.loader = self._run.make_private(
            pl_module,
            trainer.optimizers[0],
            loader,
            mode=self._mode,
            loss=partial(self._tried, trainer.strategy, pl_module),
        )
        trainer.optimizers = [self._optimizer]
        self._catch_up(trainer.lr_scheduler_configs, rates)

    def _tried(self, strategy: Any, module: Any, _: object, batch: Any) -> torch.Tensor:
        """Return the loss of a batch before training, when nothing can be logged."""
        with ExitStack() as undo:
            check = self._check_monitors
            _replace(undo, module, "log", check)
            _replace(
                undo, module, "log_dict", lambda named, **_: [*map(self._check_monitors, named)]
            )
            batch = strategy.precision_plugin.convert_input(batch)
            batch = strategy.batch_to_device(module._on_before_batch_transfer(batch))  # noqa: SLF001
            numbered = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
            loss: torch.Tensor = _with_loss(module.training_step(batch, *[0] * numbered))["loss"]
        return loss

    def _check_monitors(self, name: str, *_: object, **__: object) -> None:
        """Raise if a callback waits for what training_step logs."""
        for callback in self._trainer.callbacks:
            monitor = getattr(callback, "monitor", None)
            if monitor in (name, f"{name}_step", f"{name}_epoch"):
                raise UnsupportedSetting(
                    f"{type(callback).__name__}(monitor=...)",
                    monitor,
                    "training_step computes it from private rows; monitor what validation_step"
                    " logs of public ones",
                )

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Raise if the rows to validate on are those to train on."""
        loaders, _ = tree_flatten(trainer.val_dataloaders)
        if any(reads(getattr(each, "dataset", None), self._rows) for each in loaders):
            raise UnsupportedSetting(
                "val_dataloaders",
                "the rows to train on",
                "metrics of the private rows would be printed, and choose what is kept, without"
                " noise; validate on public rows",
            )

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

    def training_step(self, strategy: Any, batch: Any, *args: Any) -> Any:
        """Take all parts of a sample, and return what a module's own method does of the last."""
        while True:
            output = _with_loss(type(strategy).training_step(strategy, batch, *args))
            if self._optimizer.turn.last:
                return output
            self._optimizer.zero_grad()
            output["loss"].backward()
            self._optimizer.step()
            batch = strategy.precision_plugin.convert_input(self.steps.part())
            batch = strategy.lightning_module._on_before_batch_transfer(batch)  # noqa: SLF001
            batch = strategy.batch_to_device(batch)

    def log(self, own: Callable[..., None], hook: str, name: str, *args: Any, **kw: Any) -> None:
        """Log what is not computed from private rows."""
        if hook != "training_step":
            own(hook, name, *args, **kw)
        elif not self._warned:
            self._warned = True
            warnings.warn(
                f"training_step logs {name!r}, which is private: this and all else that it logs is"
                " dropped; evaluate on public rows, and log in validation_step",
                UserWarning,
                stacklevel=3,  # where training_step logs
            )

    def on_train_end(self, *_: object) -> None:
        """Raise if the last batch was skipped; the run itself sees it of the others.

        Raises:
            SkippedStep: If so.
        """
        if not self._optimizer.turn.done:
            raise SkippedStep(
                "on_train_batch_start returned -1 and left a batch out that was paid for; take"
                " every batch, whatever is in it, and end training by Trainer(max_steps=...)"
            )

    def save(self) -> None:
        """Write the run's checkpoint, if it has one."""
        if self._run.checkpoint is not None:
            self._run.save()

    def on_save_checkpoint(self, *_: object) -> None:
        """Write it when the trainer writes its own."""
        self.save()


class _Steps:
    """The loader that the trainer sees: the first part of the sample of each step."""

    def __init__(self, run: TrainingRun, physical: int | None) -> None:
        self.loader: Any = None
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


_OPTIMIZER = "return one optimizer, with a group of parameters for each learning rate"
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

_CALLBACKS: tuple[tuple[Any, str], ...] = (
    (
        StochasticWeightAveraging | WeightAveraging,
        "it puts averages in place of the module's weights; average those of saved models",
    ),
    (ThroughputMonitor, "it publishes the sizes of the samples, which are private; remove it"),
    (
        LearningRateFinder | BatchSizeFinder,
        "it tries settings on private rows, unpaid; choose them on public rows before the run",
    ),
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
        for kind, advice in _CALLBACKS:
            if isinstance(callback, kind):
                raise UnsupportedSetting("callbacks", type(callback).__name__, advice)
    if type(module).configure_gradient_clipping is not LightningModule.configure_gradient_clipping:
        raise UnsupportedSetting(
            "configure_gradient_clipping", type(module).__name__, _ALLOWED[1][2]
        )
    if not module.automatic_optimization:
        raise UnsupportedSetting(
            "automatic_optimization", False, "iterate over run.batches(...) yourself instead"
        )
