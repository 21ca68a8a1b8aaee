"""What of Hugging Face's Trainer, its settings and its models cannot be guarded, and why."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from finetune.batches import reads
from finetune.errors import UnsupportedModel, UnsupportedSetting

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


def check_settings(trainer: Any) -> None:
    """Raise for settings of a Trainer under which the guarantee would not hold.

    Raises:
        UnsupportedSetting: If there is one; it says what to set.
        UnsupportedModel: If its model has weights of which no gradients of single rows are seen.
    """
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
    check_evaluation(trainer, trainer.eval_dataset)
    if args.max_grad_norm not in (0.0, 1.0):  # 1.0 is what nobody chose
        warnings.warn(
            f"max_grad_norm={args.max_grad_norm} of the arguments has no effect: rows are clipped"
            " by the plan's",
            stacklevel=4,
        )
    _check_adapters(trainer.model)
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad and parameter.dtype not in (torch.float32, torch.float64):
            raise UnsupportedModel(
                f"{name} is trained in {parameter.dtype}, too coarse for the noise; load the model"
                " with dtype=torch.float32, or train adapters of that type"
            )


def check_evaluation(trainer: Any, evaluated: Any) -> None:
    """Raise if rows to evaluate on are those to train on.

    Raises:
        UnsupportedSetting: If so.
    """
    every = evaluated.values() if isinstance(evaluated, Mapping) else (evaluated,)
    rows = trainer.train_dataset
    if rows is not None and any(reads(each, rows) for each in every):
        raise UnsupportedSetting(
            "eval_dataset",
            "train_dataset",
            "losses of the private rows would be printed, and choose what is kept, without noise;"
            " evaluate on public rows",
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


def check_tables(model: nn.Module) -> None:
    """Raise for trainable tables that are looked up for a batch, or not as Opacus expects.

    Raises:
        UnsupportedModel: If there is one.
    """
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
