"""Ghost clipping with norms that are never too small, and losses that are one for each row.

Opacus's ghost clipping (Li et al., "Large Language Models Can Be Strong Differentially Private
Learners", 2022) computes the norm of a row's gradient from products of activations and back
propagated gradients, without the gradient. In single precision the sum over tokens can cancel to
nothing while the gradient is large, and the row is then not clipped. Here it is computed in
double precision and a bound on its rounding is added.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import Tensor, nn

from finetune.errors import UnitsMixed

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
        return loss
