"""Hugging Face's Trainer under guard, with PEFT models too. The only importer of transformers.

::

    with training_run(accountant, "news", plan, unit="article") as run:
        trainer = guarded(Trainer, run)(model=model, args=args, train_dataset=rows)
        trainer.train()                     # ends by itself with the last step of the plan

One step of the Trainer is one step of the plan: one mark, one update, one turn of the learning
rate, whatever the size of the sample, which is private. A sample larger than
``per_device_train_batch_size`` is taken in parts. The plan says how many steps there are, so
``num_train_epochs`` has no meaning; ``max_steps`` may end training earlier.

The loss of a row is the mean over its own tokens, and the loss of a batch the mean over rows; the
Trainer's own, a mean over all tokens of the batch, lets one row rescale the others. Losses,
gradient norms and operation counts are computed from private data, so none are logged. Evaluation
is as ever: what it prints is inside the guarantee only if its rows are not the private ones.
PEFT's LoRA on linear layers, prompt tuning, p-tuning and prefix tuning are supported.
Rows may be padded on the left for rotary models, whose positions are relative, or with
position_ids; tokens that would be predicted from padding then have no loss.

The model stays the caller's own object: ``save_pretrained`` and ``trainer.save_model`` work. The
Trainer's checkpoints are for release; only the run's own can be resumed from, and it is written
whenever the Trainer saves.
"""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler
from transformers import Trainer, TrainerCallback

from finetune.errors import (
    NotPoissonSampled,
    UnitsMixed,
    UnmarkedStep,
    UnsupportedModel,
    UnsupportedSetting,
)
from finetune.opacus import TrainingRun
from finetune.optimizers import Turn
from finetune.row_losses import IGNORED, row_losses
from finetune.trainer_settings import check_evaluation, check_settings, check_tables

_PRIVATE = ("loss", "train_loss", "grad_norm", "total_flos")


def guarded(
    trainer: type[Any], run: TrainingRun, *, mode: Literal["hooks", "ghost"] = "hooks"
) -> type[Any]:
    """Return a class like ``trainer`` whose training is paid for by a run.

    Its ``compute_loss_func``, if given, takes outputs and labels, and returns one loss for each
    row: shape (rows,). It is needed for tasks other than causal and masked language models, and
    classification of sequences, tokens, images and audio.

    Args:
        trainer: Hugging Face's ``Trainer``, or a subclass that leaves ``compute_loss`` as it is.
        run: The run that pays.
        mode: How gradients are clipped; see :meth:`finetune.TrainingRun.make_private`.

    Raises:
        UnsupportedSetting: If the class computes a loss of its own. Making or training one of the
            class raises it for settings under which the guarantee would not hold.
    """
    for name in ("compute_loss", "training_step", "_inner_training_loop", "_prepare_inputs"):
        if getattr(trainer, name) is not getattr(Trainer, name):
            raise UnsupportedSetting(
                name,
                getattr(trainer, name).__qualname__,
                "it may mix rows; pass compute_loss_func=..., which returns one loss for each row",
            )
    return type(f"Guarded{trainer.__name__}", (GuardedTrainer, trainer), {"run": run, "mode": mode})


class GuardedTrainer(Trainer):  # type: ignore[misc]
    """What :func:`guarded` puts in front of a trainer."""

    run: TrainingRun
    mode: Literal["hooks", "ghost"] = "hooks"
    args: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_settings(self)
        self._row_losses: Callable[..., Tensor] = (
            _of_outputs_and_labels(self.compute_loss_func)
            if self.compute_loss_func
            else row_losses(self.model, self.args.label_smoothing_factor)
        )
        self._optimizer: Any = None
        self._plain: DataLoader[Any] | None = None
        self._samples: DataLoader[Any] | None = None
        self._parts: Iterator[Any] = iter(())
        self._undo = ExitStack()
        self.add_callback(_Between(self))

    def train(self, resume_from_checkpoint: object = None, *args: Any, **kwargs: Any) -> Any:
        """Train to the end of the plan, or to ``max_steps``; the loss in the result is NaN.

        Raises:
            UnsupportedSetting: If a setting breaks the guarantee, a checkpoint of the Trainer's
                own included.
            UnsupportedModel: If the model cannot be trained in this mode, or not at all.
            UnmarkedStep: If it was trained to the end of the plan already, or the run has ended.
        """
        ended = self.run.marked < self.run.steps  # with steps that were never taken
        if not self.run.remaining and (ended or self._optimizer is not None):
            raise UnmarkedStep(
                "no step of the plan is left, or the run has ended; start a new run, and train"
                " inside of `with training_run(...)`"
            )
        if resume_from_checkpoint:
            raise UnsupportedSetting(
                "resume_from_checkpoint",
                resume_from_checkpoint,
                "its weights may be older than what was paid for since; resume through"
                " training_run(..., checkpoint=path)",
            )
        check_settings(self)
        check_tables(self.model)
        asked, total = self.args, self.run.steps
        self.args = copy.copy(asked)
        self.args.max_grad_norm = 0.0  # rows are clipped already, by the plan
        self.args.max_steps = min(asked.max_steps, total) if asked.max_steps > 0 else total
        with ExitStack() as self._undo:
            self._undo.callback(setattr, self, "args", asked)
            output = super().train(None, *args, **kwargs)
        self._save_run()
        return output._replace(training_loss=math.nan)

    def get_train_dataloader(self) -> Any:
        """Return what the run's samples are taken from, one for each step."""
        loader = super().get_train_dataloader()
        drawn_by = getattr(loader.batch_sampler, "sampler", loader.sampler)
        if not isinstance(loader.dataset, IterableDataset) and not isinstance(
            drawn_by, SequentialSampler | RandomSampler
        ):
            raise NotPoissonSampled(
                f"the trainer draws by {type(drawn_by).__name__}, which Poisson sampling would"
                " replace; let it shuffle at random"
            )
        self._plain = DataLoader(
            loader.dataset,
            collate_fn=loader.collate_fn,
            num_workers=loader.num_workers,
            pin_memory=loader.pin_memory and torch.accelerator.is_available(),
        )
        return _Steps(self)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Return a loader of rows to evaluate on, which are not the private ones."""
        check_evaluation(self, eval_dataset)
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """Return a loader of rows to predict for, which are not the private ones."""
        check_evaluation(self, test_dataset)
        return super().get_test_dataloader(test_dataset)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Return the optimizer of the private run.

        Raises:
            UnsupportedSetting: If it was not trained before, and this is not called by ``train``.
        """
        if self._optimizer is None:
            if self._plain is None:  # the Trainer asks for its loader first
                raise UnsupportedSetting(
                    "create_optimizer",
                    "called by hand",
                    "train() does that, once it has the rows to sample; pass optimizers=(...) to"
                    " choose one",
                )
            plain = super().create_optimizer(*args, **kwargs)
            self.model.train()  # as the Trainer does before each step; from_pretrained does not
            _, self._optimizer, self._samples = self.run.make_private(
                self.model, plain, self._plain, mode=self.mode, loss=self._tried
            )
            self.optimizer = self._optimizer
        return self.optimizer

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """Return the schedule of the learning rate, where a resumed run left it."""
        fresh = self.lr_scheduler is None
        scheduler = super().create_scheduler(*args, **kwargs)
        if fresh and not isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            with warnings.catch_warnings():  # of steps of the schedule before one of the optimizer
                warnings.simplefilter("ignore", UserWarning)
                for _ in range(self.run.steps - self.run.remaining):
                    scheduler.step()
        return scheduler

    def training_step(self, model: nn.Module, inputs: Any, *_: Any, **__: Any) -> Tensor:
        """Make the gradients of a step's whole sample; return zero in place of the loss."""
        loss = super().training_step(model, inputs)
        while not self._optimizer.turn.last:
            self._optimizer.step()
            self._optimizer.zero_grad()
            loss = super().training_step(model, next(self._parts))
        return torch.zeros_like(loss)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,  # noqa: FBT001, FBT002 - the Trainer's signature
        num_items_in_batch: object = None,
    ) -> Any:
        """Return the mean over rows of the loss of each; in evaluation, the Trainer's own."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        losses, outputs = self._losses(model, inputs)
        loss = losses.mean()
        return (loss, outputs) if return_outputs else loss

    def _losses(self, model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, Any]:
        """Return the loss of each row, and the outputs of the model."""
        features = dict(inputs)
        labels = features.pop("labels", None)
        mask = features.get("attention_mask")
        left = isinstance(mask, Tensor) and mask.dim() == 2 and not mask[:, 0].all()
        alike = self.compute_loss_func is None and _only_distances_matter(self.model)
        if left and "position_ids" not in features and not alike:
            raise UnitsMixed(
                "rows are padded on the left, so the longest row of a batch shifts the positions of"
                " the others; pad on the right, or pass position_ids"
            )
        if left and isinstance(labels, Tensor) and labels.shape == mask.shape:  # type: ignore[union-attr]
            labels = self._of_own_tokens(labels, mask)
        outputs = model(**features)
        losses = self._row_losses(outputs, labels)
        rows = max(1, self.run.turn.rows)
        if losses.shape != (rows,):
            raise UnitsMixed(
                f"the batch has {rows} rows, and losses have the shape {tuple(losses.shape)};"
                " compute_loss_func has to return one loss for each row, and not their mean, and"
                " data_collator has to keep rows apart, as the first dimension"
            )
        return losses, outputs

    def _tried(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the loss of a batch before training, when nothing of the model is hooked."""
        with ExitStack() as undo:
            self._hook_embeddings(undo)
            return self._losses(model, self._prepare_inputs(batch))[0].mean()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log what is not computed from private rows."""
        for name in _PRIVATE:
            logs.pop(name, None)
        super().log(logs, *args, **kwargs)

    def num_examples(self, dataloader: Any) -> int:
        """Return a public number where the rows are private."""
        if isinstance(dataloader, _Steps):
            return len(dataloader) * self.run.plan.expected_batch_size
        return int(super().num_examples(dataloader))

    def get_total_train_batch_size(self, *_: object) -> int:
        """Return the public size of a sample."""
        return self.run.plan.expected_batch_size

    def floating_point_ops(self, *_: object) -> int:
        """Return zero: they tell the size of the samples."""
        return 0

    def _of_own_tokens(self, labels: Tensor, mask: Any) -> Tensor:
        """Ignore tokens that would be predicted from padding, as where there is no padding."""
        shift = getattr(self._row_losses, "keywords", {}).get("shift", 0)
        behind = functional.pad(mask == 0, (shift, 0))[:, : labels.shape[1]]
        return labels.masked_fill(behind & (mask != 0), IGNORED)

    def _hook_embeddings(self, undo: ExitStack) -> None:
        """Look positions and prompts up once for each row, where a model does so for the batch."""
        turn = self.run.turn
        for name, module in self.model.named_modules():
            if isinstance(module, nn.Embedding) and module.weight.requires_grad:
                hook = module.register_forward_pre_hook(_for_each_row(name, turn), prepend=True)
                undo.callback(hook.remove)
        if hasattr(self.model, "get_prompt"):
            self.model.get_prompt = MethodType(_prompt_of_each_row, self.model)
            undo.callback(delattr, self.model, "get_prompt")

    def _save_run(self) -> None:
        """Write the run's checkpoint, if it has one."""
        if self.run.checkpoint is not None:
            self.run.save()


def _of_outputs_and_labels(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a loss function without the number of items, which the Trainer's own may take."""
    parameters = inspect.signature(loss).parameters
    if "num_items_in_batch" in parameters or any(
        each.kind is each.VAR_KEYWORD for each in parameters.values()
    ):
        return partial(loss, num_items_in_batch=None)
    return loss


# Functions, and not methods: a copy of the model must not try to copy the trainer with them.
def _for_each_row(name: str, turn: Turn) -> Callable[[nn.Module, tuple[Any, ...]], Any]:
    def look_up(module: nn.Module, inputs: tuple[Any, ...]) -> Any:
        if not module.training or not inputs:
            return None
        rows = max(1, turn.rows)
        if inputs[0].dim() < 2 or len(inputs[0]) not in (1, rows):
            raise UnsupportedModel(
                f"{name} looks up {tuple(inputs[0].shape)} entries for {rows} rows; it needs one"
                " look-up for each row: pass position_ids of shape (rows, tokens), or freeze it"
            )
        return (inputs[0].expand(rows, *inputs[0].shape[1:]).contiguous(), *inputs[1:])

    return look_up


def _prompt_of_each_row(model: Any, batch_size: int, *args: Any, **kwargs: Any) -> Any:
    """Return a prompt for each row, of which PEFT repeats what it takes for the only one."""
    prompt = type(model).get_prompt(model, batch_size, *args, **kwargs)
    return prompt[:batch_size] if isinstance(prompt, Tensor) else prompt


class _Steps:
    """The loader that the Trainer sees: the first part of the sample of each step."""

    def __init__(self, trainer: GuardedTrainer) -> None:
        self._trainer = trainer

    def __len__(self) -> int:
        return int(self._trainer.args.max_steps)

    def __iter__(self) -> Iterator[Any]:
        trainer = self._trainer
        trainer._optimizer.drop()  # noqa: SLF001 - parts of a sample that was left half-way
        trainer._parts = trainer.run.batches(  # noqa: SLF001
            trainer._samples,  # type: ignore[arg-type] # noqa: SLF001
            physical=trainer.args.per_device_train_batch_size,
        )
        return trainer._parts  # noqa: SLF001


class _Between(TrainerCallback):  # type: ignore[misc]
    """What is done between two steps."""

    def __init__(self, trainer: GuardedTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        self._trainer._hook_embeddings(self._trainer._undo)  # noqa: SLF001 - Opacus copied its layers before
        run = self._trainer.run
        state.global_step = self._trainer._initial_global_step = run.steps - run.remaining  # noqa: SLF001

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        self._trainer._optimizer.zero_grad()  # noqa: SLF001

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        self._trainer._save_run()  # noqa: SLF001


def _only_distances_matter(model: Any) -> bool:
    """Say whether attention sees distances of tokens alone, so that padding shifts nothing."""
    rotary = [each for name, each in model.named_modules() if name.endswith("rotary_emb")]
    known = ("default", "linear", "llama3", "yarn")  # others depend on the longest row
    if not rotary or any(getattr(each, "rope_type", None) not in known for each in rotary):
        return False
    words = model.get_input_embeddings()
    return getattr(model.config, "attention_chunk_size", None) is None and not any(
        isinstance(each, nn.Embedding | nn.Conv1d) and each is not words for each in model.modules()
    )
