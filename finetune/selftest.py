"""The neighboring-batch test: does one row change the clipped sum by more than the clipping norm?

DP-SGD is private because the gradient of each row depends on that row alone, and is clipped. A
loss that is a mean over the tokens of a batch, in-batch negatives, batch statistics or routing
by batch break that, and nothing in an accountant sees it. Here the clipped sum of a batch is
compared with that of the batch without one row, for several rows: the two may differ by the
clipping norm and no more (the idea of "Re:cord-play", arXiv 2602.17454).

It falsifies and proves nothing: an error is a real violation, silence is not a proof. Use public
or synthetic rows, among them short and long ones: the worst case is what the mean hides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from opacus import GradSampleModule
from torch import Tensor, nn

from finetune.errors import RowsMixed

_TOLERANCE = 1e-3


def check_rows_apart(
    model: nn.Module,
    loss: Callable[[nn.Module, Any], Tensor],
    rows: Sequence[Any],
    collate: Callable[[list[Any]], Any] = torch.utils.data.default_collate,
    *,
    leave_out: int = 8,
) -> float:
    """Raise if leaving one row out moves the clipped sum by more than the clipping norm.

    Weights and gradients are left as they were. Dropout is turned off meanwhile: the comparison
    needs a model that draws nothing.

    Args:
        model: Plain, not wrapped by Opacus.
        loss: Takes the model and a batch, and returns the loss that will be trained with.
        rows: Public or synthetic rows, at least 3; short ones and long ones.
        collate: Makes a batch of a list of rows.
        leave_out: Of how many rows to try it, spread over all.

    Returns:
        The largest distance found, in units of the clipping norm: at most 1. Four norms around
        the median of the rows' gradients are tried.

    Raises:
        RowsMixed: If it is more than 1, or layers saw another number of samples than rows.
        ValueError: If there are too few rows, or the model draws at random all the same.

    >>> rows = [torch.full((1,), float(number)) for number in range(1, 9)]
    >>> line = nn.Linear(1, 1)
    >>> check_rows_apart(line, lambda model, batch: model(batch).square().mean(), rows) <= 1.001
    True
    >>> check_rows_apart(line, lambda model, batch: model(batch).mean().square(), rows)
    Traceback (most recent call last):
    finetune.errors.RowsMixed: ...
    """
    if len(rows) < 3:
        raise ValueError(f"it takes at least 3 rows, got {len(rows)}")
    training = {module: module.training for module in model.modules()}
    dropouts = {
        module: module.p
        for module in model.modules()
        if isinstance(module, nn.modules.dropout._DropoutNd)  # noqa: SLF001 - all of them
    }
    gradients = {parameter: parameter.grad for parameter in model.parameters()}
    wrapped = GradSampleModule(model, loss_reduction="mean", strict=False)
    try:
        wrapped.train()
        for dropout in dropouts:
            dropout.p = 0.0  # attention reads it there, too

        def of(chosen: list[Any]) -> Tensor:
            """Return the gradients of the rows: (rows, coordinates)."""
            wrapped.zero_grad(set_to_none=True)
            loss(wrapped, collate(chosen)).backward()  # type: ignore[no-untyped-call]
            trainable = [each for each in model.parameters() if each.requires_grad]
            parts = [getattr(each, "grad_sample", None) for each in trainable]
            counts = sorted({len(part) for part in parts if part is not None})
            if counts != [len(chosen)] or any(part is None for part in parts):
                raise RowsMixed(
                    f"a batch of {len(chosen)} rows gave {counts} samples, or a trainable parameter"
                    " no gradient; keep rows as the first dimension",
                    float("inf"),
                )
            return torch.cat([part.flatten(1) for part in parts if part is not None], dim=1)

        whole = of(list(rows))
        if not torch.allclose(whole, of(list(rows)), rtol=1e-3, atol=1e-7):
            raise ValueError("the model draws at random; turn that off for this check")
        median = whole.norm(dim=1).median().clamp_min(1e-12)
        tried = sorted({round(at) for at in torch.linspace(0, len(rows) - 1, leave_out).tolist()})
        distances = {}
        for at in tried:
            part = of([*rows[:at], *rows[at + 1 :]])
            distances[at] = max(
                float((_clipped(whole, clip) - _clipped(part, clip)).norm() / clip)
                for clip in (median / 2, median, 2 * median, 4 * median)
            )
    finally:
        wrapped.zero_grad(set_to_none=True)
        wrapped.remove_hooks()
        for module, mode in training.items():
            module.training = mode
        for dropout, p in dropouts.items():
            dropout.p = p
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
    worst = max(distances, key=lambda at: distances[at])
    if not distances[worst] <= 1 + _TOLERANCE:
        raise RowsMixed(
            f"leaving row {worst} out moved the clipped sum by {distances[worst]:.2f} clipping"
            " norms, and may move it by 1: the loss of one row depends on the others; take the"
            " mean within each row first, and no statistics or negatives of the batch",
            distances[worst],
        )
    return distances[worst]


def _clipped(gradients: Tensor, clip: Tensor) -> Tensor:
    factors = (clip / gradients.norm(dim=1).clamp_min(1e-30)).clamp(max=1.0)
    return torch.mv(gradients.T, factors)
