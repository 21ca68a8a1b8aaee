"""Ghost clipping with norms that are never too small, and losses that are one for each row.

Opacus's ghost clipping (Li et al., "Large Language Models Can Be Strong Differentially Private
Learners", 2022) computes the norm of a row's gradient from products of activations and back
propagated gradients, without the gradient. In single precision the sum over tokens can cancel to
nothing while the gradient is large, and the row is then not clipped. Here it is computed in
double precision and a bound on its rounding is added.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import (
    DPLossFastGradientClipping,
    DPTensorFastGradientClipping,
)
from torch import Tensor, nn

from finetune.errors import NoGradient, UnitsMixed

_ROUNDING = 1e-11
"""Relative to the largest that the terms of a norm can add up to; far above double rounding."""


def linear_norms(
    layer: nn.Linear, activations: list[Tensor], backprops: Tensor
) -> dict[nn.Parameter, Tensor]:
    """Return for each parameter of a linear layer norms of the rows' gradients, rounded up.

    Args:
        layer: The layer.
        activations: Its input, of shape (rows, ..., inputs).
        backprops: Gradients of its output, of shape (rows, ..., outputs).
    """
    rows = len(backprops)
    back = backprops.double().reshape(rows, -1, backprops.shape[-1])
    into = activations[0].double().reshape(rows, -1, activations[0].shape[-1])
    found: dict[Any, Tensor] = {}
    if layer.weight.requires_grad:
        products = torch.bmm(back, back.mT) * torch.bmm(into, into.mT)
        most = (back.norm(dim=2) * into.norm(dim=2)).sum(1).square()
        squares = products.sum((1, 2)).clamp(min=0) + _ROUNDING * most
        found[layer.weight] = squares.sqrt().to(layer.weight.dtype)
    if layer.bias is not None and layer.bias.requires_grad:
        most = back.norm(dim=2).sum(1)
        found[layer.bias] = (back.sum(1).norm(dim=1) + _ROUNDING * most).to(layer.bias.dtype)
    return found


class GhostModule(GradSampleModuleFastGradientClipping):  # type: ignore[misc]
    """Opacus's module with our norms of linear layers; others get gradients for each row."""

    NORM_SAMPLERS = {nn.Linear: linear_norms}  # noqa: RUF012 - as Opacus declares it


class GhostLoss(DPTensorFastGradientClipping):  # type: ignore[misc]
    """What ``backward()`` is called on. Arithmetic with it stays one of its kind."""

    def backward(self) -> None:
        """Take both backward passes, if the first sees all that the second adds up.

        Raises:
            NoGradient: If a weight is used outside its own layer's forward pass, as in a penalty on
                weights or ``hidden @ embedding.weight.T``: its norm would not be known.
        """
        used = _uses(self.loss_per_sample)
        for name, parameter in self.module.named_parameters():
            calls = getattr(parameter, "_forward_counter", 0)
            if parameter.requires_grad and used[id(parameter)] != calls:
                raise NoGradient(
                    f"{name} is used {used[id(parameter)]} times in the loss, and {calls} times by"
                    " its own layer, and ghost clipping knows of no other use; use mode='hooks'"
                )
        super().backward()


def _kept(operation: Callable[..., Any]) -> Callable[..., Any]:
    def kept(self: Any, *others: Any) -> Any:
        result = operation(self, *others)
        result.__class__ = GhostLoss
        return result

    return kept


for _name in ("truediv", "mul", "rmul", "add", "radd", "sub", "rsub", "neg"):
    _base = getattr(DPTensorFastGradientClipping, f"__{_name}__")
    setattr(GhostLoss, f"__{_name}__", _kept(_base))


def _uses(loss: Tensor) -> Counter[int]:
    """Return how often each leaf is used in the graph of a loss, by its id."""
    found: Counter[int] = Counter()
    waiting, seen = [loss.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for after, _ in node.next_functions:
            leaf = getattr(after, "variable", None)
            if leaf is None:
                waiting.append(after)
            else:
                found[id(leaf)] += 1
    return found


class RowLoss(DPLossFastGradientClipping):  # type: ignore[misc]
    """A loss that is one number for each row, or an error."""

    def __init__(
        self, module: Any, optimizer: Any, criterion: Callable[..., Tensor], rows: Callable[[], int]
    ) -> None:
        super().__init__(module, optimizer, criterion, "mean")
        self._rows = rows

    def __call__(self, *args: Any, shape: Any = None, **kwargs: Any) -> Any:
        """Return the loss, to be called ``backward()`` on."""
        loss = super().__call__(*args, shape=shape, **kwargs)
        if loss.loss_per_sample.shape != (self._rows(),):
            raise UnitsMixed(
                f"the loss has shape {tuple(loss.loss_per_sample.shape)} and must be one number for"
                f" each of {self._rows()} rows: use a loss of torch.nn (a function cannot be told"
                " its reduction), with shape=logits.shape where logits were flattened"
            )
        loss.__class__ = GhostLoss
        return loss
