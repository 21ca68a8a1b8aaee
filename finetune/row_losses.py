"""Losses of Hugging Face's models, one for each row: no mean over the tokens of a batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from finetune.errors import UnsupportedModel

IGNORED = -100
"""The label of a token that is in no loss."""


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
    labels = functional.pad(labels, (prompt, 0), value=IGNORED)[:, shift:]
    logits = logits[:, : logits.shape[1] - shift]
    losses = functional.cross_entropy(
        logits.transpose(1, 2).float(),
        labels,
        ignore_index=IGNORED,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    mean: Tensor = losses.sum(1) / (labels != IGNORED).sum(1).clamp(min=1)
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
