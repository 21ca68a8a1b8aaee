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

_IGNORED = -100
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
        _check_settings(self)
        self._row_losses: Callable[..., Tensor] = (
            partial(self.compute_loss_func, num_items_in_batch=None)
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
        _check_settings(self)
        _check_tables(self.model)
        asked, total = self.args, _planned(self.run)
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
                for _ in range(_planned(self.run) - self.run.remaining):
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
        return labels.masked_fill(behind & (mask != 0), _IGNORED)

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


def _planned(run: TrainingRun) -> int:
    """Return the number of steps of a run, those of an earlier process included."""
    return run.steps


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
        state.global_step = self._trainer._initial_global_step = _planned(run) - run.remaining  # noqa: SLF001

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        self._trainer._optimizer.zero_grad()  # noqa: SLF001

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        self._trainer._save_run()  # noqa: SLF001


def row_losses(model: nn.Module, label_smoothing: float = 0.0) -> Callable[[Any, Any], Tensor]:
    """Return the loss of a task, as a function of outputs and labels to losses (rows,).

    Args:
        model: A causal or masked language model, or one for classification of sequences, tokens,
            images or audio; within PEFT's or not.
        label_smoothing: Weight of the uniform distribution over classes, in [0, 1).

    Raises:
        UnsupportedModel: If the task is another one.
    """
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    names, config = [each.__name__ for each in type(base).__mro__], getattr(base, "config", None)

    def is_of(*tasks: str) -> bool:
        return any(name.endswith(tasks) for name in names)

    if not getattr(config, "is_encoder_decoder", False):
        if is_of("ForCausalLM", "GPT2LMHeadModel", "BertLMHeadModel"):
            return partial(_token_losses, shift=1, label_smoothing=label_smoothing)
        if is_of("ForMaskedLM", "ForTokenClassification"):
            return partial(_token_losses, shift=0, label_smoothing=label_smoothing)
        if is_of(*(f"For{each}Classification" for each in ("Sequence", "Image", "Audio"))):
            return partial(_sequence_losses, config=config, label_smoothing=label_smoothing)
    raise UnsupportedModel(
        f"no loss by row is known for {names[0]}; pass compute_loss_func=..., of outputs, labels"
        " and num_items_in_batch, which returns one loss for each row"
    )


def _token_losses(outputs: Any, labels: Any, *, shift: int, label_smoothing: float) -> Tensor:
    """Return the mean loss of each row over its own tokens that are not ignored: (rows,)."""
    logits, labels = outputs["logits"], _labels(labels)
    prompt = max(0, logits.shape[1] - labels.shape[1])  # virtual tokens of PEFT's, in front
    labels = functional.pad(labels, (prompt, 0), value=_IGNORED)[:, shift:]
    logits = logits[:, : logits.shape[1] - shift]
    losses = functional.cross_entropy(
        logits.transpose(1, 2).float(),
        labels,
        ignore_index=_IGNORED,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    mean: Tensor = losses.sum(1) / (labels != _IGNORED).sum(1).clamp(min=1)
    return mean


def _sequence_losses(outputs: Any, labels: Any, *, config: Any, label_smoothing: float) -> Tensor:
    """Return the loss of each row's class, classes or numbers: (rows,)."""
    logits, labels = outputs["logits"].float(), _labels(labels)
    task = config.problem_type
    if task is None and config.num_labels > 1:
        whole = not labels.is_floating_point()
        task = "single_label_classification" if whole else "multi_label_classification"
    if task == "single_label_classification":
        return functional.cross_entropy(
            logits, labels.reshape(-1), reduction="none", label_smoothing=label_smoothing
        )
    labels = labels.reshape(logits.shape).float()
    if task == "multi_label_classification":
        losses = functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    else:
        losses = functional.mse_loss(logits, labels, reduction="none")
    return losses.mean(1)


def _labels(labels: Any) -> Tensor:
    if not isinstance(labels, Tensor):
        raise UnsupportedModel(
            "the batch has no tensor of labels; let data_collator return one, or pass"
            " compute_loss_func=... that does without"
        )
    return labels


_PARALLEL = "run on one device, in one process (CUDA_VISIBLE_DEVICES=0 python train.py)"
_PRECISION = "it scales or rounds gradients; use float32 (frozen weights may be bfloat16)"
_LAYERS = "it hides the gradients of single rows; turn it off"
_ALLOWED: tuple[tuple[str, tuple[object, ...], str], ...] = (
    (
        "gradient_accumulation_steps",
        (1,),
        "set 1; the plan fixes the sample, which comes in parts of per_device_train_batch_size",
    ),
    ("fp16", (False,), _PRECISION),
    ("bf16", (False,), _PRECISION),
    ("n_gpu", (0, 1), _PARALLEL),
    ("world_size", (1,), _PARALLEL),
    ("fsdp", (None, False, "", []), _PARALLEL),
    ("deepspeed", (None, ""), _PARALLEL),
    ("parallelism_config", (None,), _PARALLEL),
    ("gradient_checkpointing", (None, False), _LAYERS),
    ("activation_checkpointing", (None, False), _LAYERS),
    ("torch_compile", (False,), _LAYERS),
    ("use_liger_kernel", (False,), _LAYERS),
    ("neftune_noise_alpha", (None,), "its noise depends on the longest row of a batch; set None"),
    (
        "auto_find_batch_size",
        (False,),
        "it starts over after a batch that was paid for; set per_device_train_batch_size",
    ),
    (
        "include_num_input_tokens_seen",
        ("no", False),
        "the number of tokens in the private samples is private; set 'no'",
    ),
    (
        "train_sampling_strategy",
        ("random", "sequential"),
        "samples are drawn by Poisson sampling; set 'random'",
    ),
    ("group_by_length", (False,), "samples are drawn by Poisson sampling; set False"),
    (
        "skip_memory_metrics",
        (True,),
        "how much memory the private samples take is private; set True",
    ),
    (
        "resume_from_checkpoint",
        (None, False),
        "resume through training_run(..., checkpoint=path)",
    ),
)

# What `accelerate launch` and its configuration set, whatever the arguments say.
_LAUNCHED: tuple[tuple[str, tuple[object, ...], str], ...] = (
    ("mixed_precision", ("no",), f"{_PRECISION}: accelerate launch --mixed_precision no"),
    ("distributed_type", ("NO",), _PARALLEL),
    ("gradient_accumulation_steps", (1,), "set 1 in accelerate's configuration"),
)


def _check_settings(trainer: GuardedTrainer) -> None:
    args = trainer.args
    for owner, settings in ((args, _ALLOWED), (trainer.accelerator, _LAUNCHED)):
        for name, allowed, advice in settings:
            value = getattr(owner, name, allowed[0])
            if value not in allowed:
                raise UnsupportedSetting(name, value, advice)
    if "lomo" in args.optim or "layerwise" in args.optim:
        raise UnsupportedSetting(
            "optim", str(args.optim), "it updates in the backward pass, before any noise"
        )
    if trainer.model_init is not None:
        raise UnsupportedSetting(
            "model_init", trainer.model_init, "pass model=...; each trial needs a run of its own"
        )
    if trainer.is_model_parallel:
        raise UnsupportedSetting("device_map", trainer.model.hf_device_map, _PARALLEL)
    evaluated = trainer.eval_dataset
    every = evaluated.values() if isinstance(evaluated, Mapping) else (evaluated,)
    if trainer.train_dataset is not None and any(each is trainer.train_dataset for each in every):
        raise UnsupportedSetting(
            "eval_dataset",
            "train_dataset",
            "losses of the private rows would be printed, and choose what is kept, without noise;"
            " evaluate on public rows",
        )
    _check_adapters(trainer.model)
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad and parameter.dtype not in (torch.float32, torch.float64):
            raise UnsupportedModel(
                f"{name} is trained in {parameter.dtype}, too coarse for the noise; load the model"
                " with dtype=torch.float32, or train adapters of that type"
            )


def _trained(module: nn.Module) -> bool:
    return any(each.requires_grad for each in module.parameters(recurse=False))


def _check_adapters(model: nn.Module) -> None:
    """Raise for weights that an adapter uses elsewhere than in a layer of their own."""
    for name, module in model.named_modules():
        bare = isinstance(module, nn.ParameterDict | nn.ParameterList)
        if _trained(module) and (bare or type(module).__module__.startswith("peft.")):
            raise UnsupportedModel(
                f"{name} trains weights that are not those of a layer (as IA3, VeRA, DoRA and LoRA"
                " on embeddings do), so no gradients of single rows are seen; use LoRA on linear"
                " layers: LoraConfig(target_modules=[...]) of names of nn.Linear"
            )


def _check_tables(model: nn.Module) -> None:
    """Raise for trainable tables that are looked up for a batch, or not as Opacus expects."""
    for name, module in model.named_modules():
        leaf, kind = name.rpartition(".")[2], type(module)
        relative = leaf.startswith(("rel_", "distance_")) or "relative_" in leaf
        positional = kind.forward is not nn.Embedding.forward and "Position" in kind.__name__
        if isinstance(module, nn.Embedding) and _trained(module) and (relative or positional):
            raise UnsupportedModel(
                f"{name} is a {kind.__name__} that is not looked up once for each row, so gradients"
                " of single rows are not seen; freeze it:"
                f" model.get_submodule({name!r}).requires_grad_(False), or train LoRA"
            )


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
