"""Which models DP-SGD can train: what makes gradients of single rows impossible or untrue."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from opacus.validators import ModuleValidator
from torch import float32, float64, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from finetune.errors import UnsupportedModel


def mixes_rows(module: nn.Module) -> bool:
    """Say whether a layer computes statistics of a batch in training mode."""
    batch_norm = nn.modules.batchnorm._BatchNorm  # noqa: SLF001 - all of them
    return isinstance(module, batch_norm) or bool(getattr(module, "track_running_stats", False))


def check_model(model: nn.Module) -> None:
    """Raise if a model cannot be trained with DP-SGD as it is.

    Raises:
        UnsupportedModel: If so; it names the part, and what to do.
    """
    if isinstance(model, DistributedDataParallel):
        raise UnsupportedModel(
            "pass the model itself: the guarded optimizer adds up the clipped sums of the ranks,"
            " and DistributedDataParallel would average raw gradients before"
        )
    if not any(each.requires_grad for each in model.parameters()):
        raise UnsupportedModel("the model has no weights to train: all of them are frozen")
    for name, module in model.named_modules():
        own = [each for each in module.parameters(recurse=False) if each.requires_grad]
        if any(each.dtype not in (float32, float64) for each in own):
            raise UnsupportedModel(
                f"{name or 'the model'} has trainable weights of {own[0].dtype}, too coarse for"
                " clipping and noise; keep them in float32 (frozen ones may be smaller)"
            )
        if any(map(is_lazy, own)):
            raise UnsupportedModel(f"{name} has no weights yet; show the model a batch first")
        mixed = isinstance(module, nn.EmbeddingBag | nn.Bilinear)
        if own and (mixed or getattr(module, "sparse", False) is True):
            raise UnsupportedModel(
                f"{name or 'the model'} is a {type(module).__name__}, of which no gradients of"
                " single rows are known; freeze it, or take Embedding(sparse=False) or Linear"
            )
        if own and not module.training:
            raise UnsupportedModel(
                f"{name or 'the model'} is in evaluation mode, in which no gradients of single rows"
                " are seen; call model.train() first (from_pretrained leaves models in it)"
            )
        if module.training and mixes_rows(module):
            raise UnsupportedModel(
                f"{name or 'the model'} is a {type(module).__name__}: batch statistics mix rows"
                " and are kept without noise; use GroupNorm or LayerNorm, or put it in eval()"
            )
        if getattr(module, "gradient_checkpointing", False) is True:
            raise UnsupportedModel(
                f"{name or 'the model'} uses gradient checkpointing, under which no gradients of"
                " single rows are seen; turn it off and take smaller physical batches"
            )
    errors = ModuleValidator.validate(model, strict=False)
    if errors:
        raise UnsupportedModel("; ".join(map(str, errors)))


@contextmanager
def out_of_place(model: nn.Module) -> Iterator[None]:
    """Let activations leave their input as it was: hooks need the output of the layer before."""
    changed = [each for each in model.modules() if getattr(each, "inplace", False) is True]
    for module in changed:
        module.inplace = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in changed:
            module.inplace = True  # type: ignore[assignment]
