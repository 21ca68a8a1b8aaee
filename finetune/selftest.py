"""The neighboring-batch test: does the gradient of a row depend on the other rows of its batch?

DP-SGD is private because the gradient of each row depends on that row alone, and is clipped. A
loss that is a mean over the tokens of a batch, in-batch negatives, batch statistics or routing
by batch break that, and nothing in an accountant sees it. Here one row is left out of a batch,
and the gradients of all others have to stay what they were, up to rounding (a sharper form of the
idea of "Re:cord-play", arXiv 2602.17454).

It falsifies and proves nothing: an error is a real violation, silence is not a proof. Use public
or synthetic rows that differ in all that could matter, short and long ones, of all classes. Where
all rows are equally long, a mean over tokens is a mean over rows, and cannot be found.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from finetune.clipping import HooksModule
from finetune.errors import FinetuneError, NoGradient, NotFinite, RowsMixed, UnsupportedModel
from finetune.models import out_of_place
from finetune.optimizers import same_values

Loss = Callable[[nn.Module, Any], Tensor]

_TOLERANCE = 1e-3
_CODE = (AttributeError, ImportError, NameError, TypeError)
"""What mistakes in a script raise, whatever the rows are."""
_RAW = (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError)
"""What layers and Opacus raise for what they cannot do."""


def check_rows_apart(
    model: nn.Module,
    loss: Loss,
    rows: Sequence[Any],
    collate: Callable[[list[Any]], Any] = torch.utils.data.default_collate,
    *,
    leave_out: int = 8,
) -> float:
    """Raise if the gradient of a row changes when another one is left out of the batch.

    Weights, buffers and gradients are left as they were. Dropout is turned off meanwhile: the
    comparison needs a model that draws nothing.

    Args:
        model: Plain, not wrapped by Opacus. Layers without weights to train keep their mode.
        loss: Takes the model and a batch, and returns the loss that will be trained with.
        rows: Public or synthetic rows, at least 3, of different lengths and classes: a mean over
            the tokens of rows that are equally long cannot be told from the right one.
        collate: Makes a batch of a list of rows.
        leave_out: How many rows to leave out, one after another, spread over all.

    Returns:
        The largest change found, over the median norm of the rows' gradients; at most 1e-3.

    Raises:
        RowsMixed: If it is more, or layers saw another number of samples than rows.
        NoGradient: If the loss does not reach a weight to be trained.
        NotFinite: If a row has no finite gradient.
        UnsupportedModel: If the model draws at random all the same, or has no gradients of rows.
        ValueError: If there are too few rows.

    >>> rows = [torch.full((1,), float(number)) for number in range(1, 9)]
    >>> line = nn.Linear(1, 1)
    >>> check_rows_apart(line, lambda model, batch: model(batch).square().mean(), rows) < 1e-3
    True
    >>> check_rows_apart(line, lambda model, batch: model(batch).mean().square(), rows)
    Traceback (most recent call last):
    finetune.errors.RowsMixed: ...
    """
    if len(rows) < 3:
        raise ValueError(f"it takes at least 3 rows, got {len(rows)}")
    with _left_as_it_was(model), _without_dropout(model), _gradients(model, loss) as gradients_of:
        samples = len(gradients_of(collate(list(rows)))[0])
    if samples != len(rows):
        raise RowsMixed(
            f"a batch of {len(rows)} rows gave {samples} samples; keep rows as the first dimension",
            float("inf"),
        )
    largest = 0.0
    for at in sorted({round(at) for at in torch.linspace(0, len(rows) - 1, leave_out).tolist()}):
        others = [*rows[:at], *rows[at + 1 :]]
        whole, part = collate([*others, rows[at]]), collate(others)
        largest = max(largest, check_batches_apart(model, loss, whole, part))
    return largest


def check_batches_apart(model: nn.Module, loss: Loss, whole: Any, part: Any) -> float:
    """Raise if the gradients of the rows of one batch are others in a larger one.

    Args:
        model: As for :func:`check_rows_apart`.
        loss: Likewise.
        whole: A batch.
        part: The same, without its last rows.

    Returns:
        As :func:`check_rows_apart`, which raises the same.
    """
    with _left_as_it_was(model), _without_dropout(model), _gradients(model, loss) as gradients_of:
        more, fewer = gradients_of(whole), gradients_of(part)
        change = _change(more, fewer)
        if change <= _TOLERANCE:
            return change
        if _change(more, gradients_of(whole)) > _TOLERANCE:
            raise _DrawsAtRandom(
                "the model draws at random, which this check cannot tell from rows that change each"
                " other; turn that off for it"
            )
    raise RowsMixed(
        f"with {len(fewer[0])} of {len(more[0])} rows of a batch, the gradient of one of them"
        f" changed by {change:.1e} of the median norm: the loss of one row depends on the others;"
        " take the mean within each row first, and no statistics or negatives of the batch",
        change,
    )


class _DrawsAtRandom(UnsupportedModel):
    """Gradients are others each time, and nothing can be compared."""


def check_made_up(model: nn.Module, loss: Loss, whole: Any, part: Any) -> None:
    """Do as :func:`check_batches_apart` with made-up batches, if the model can take them at all.

    Some cannot be: tokens that have to be there are missing, logarithms are of zero. Then it warns,
    and the first step shows. What the model can take without gradients of single rows, and not
    with them, is an error here.
    """
    try:
        with _left_as_it_was(model):
            before = {name: each.clone() for name, each in model.named_buffers()}
            loss(model, whole).backward()  # type: ignore[no-untyped-call]
            changed = [
                name
                for name, each in model.named_buffers()
                if name in before and not same_values(each, before[name])
            ]
    except FinetuneError:
        raise
    except _CODE as error:
        raise UnsupportedModel(
            "the loss failed on made-up rows, before anything was paid for:"
            f" {type(error).__name__}: {error}"
        ) from error
    except Exception as error:  # noqa: BLE001 - of any model, about rows that we made up
        reason = f"{type(error).__name__}: {error}"
    else:
        if changed:
            raise UnsupportedModel(
                f"the buffer {changed[0]} is changed by each batch, and would publish what it keeps"
                " of private rows without noise; put its layer in eval(), or take it out of the"
                " model"
            )
        try:
            with _left_as_it_was(model), _gradients(model, loss) as gradients_of:
                gradients_of(whole)  # with dropout, which some layers cannot take
            check_batches_apart(model, loss, whole, part)
        except (NotFinite, _DrawsAtRandom, torch.OutOfMemoryError) as error:
            reason = str(error)
        else:
            return
    warnings.warn(
        f"a trial on made-up rows before the first step failed ({reason}), so nothing is known of"
        " whether rows change each other's gradients; try check_rows_apart with public rows",
        stacklevel=4,
    )


@contextmanager
def _left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Restore buffers and gradients, and the generators of random numbers."""
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        with same_draws_after(), out_of_place(model):
            yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for module, name, buffer, before in buffers:
            setattr(module, name, buffer if same_values(buffer, before) else before)


@contextmanager
def same_draws_after() -> Iterator[None]:
    """Leave the generators of torch, NumPy and Python as they were."""
    numpys, pythons = np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        with torch.random.fork_rng():
            yield
    finally:
        np.random.set_state(numpys)  # noqa: NPY002
        random.setstate(pythons)


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    """Set its probability to 0 in all layers, until the end of the block."""
    drawing = [
        (module, name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, float) and ("drop" in name or (name == "p" and _drops(module)))
    ]
    try:
        for module, name, _ in drawing:
            setattr(module, name, 0.0)  # attention reads it there, too
        yield
    finally:
        for module, name, value in drawing:
            setattr(module, name, value)


@contextmanager
def _gradients(model: nn.Module, loss: Loss) -> Iterator[Callable[[Any], list[Tensor]]]:
    """Give a function of batches: the gradients of each row, for each weight that is trained."""
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    layers = [
        module
        for module in model.modules()
        if any(each.requires_grad for each in module.parameters(recurse=False))
    ]
    modes = [layer.training for layer in layers]
    for layer in layers:
        layer.training = True  # Opacus looks at no others
    wrapped = None
    try:
        warnings.filterwarnings("ignore", message="Full backward hook is firing when gradients are")
        with _named():
            wrapped = HooksModule(model, loss_reduction="mean", strict=False)

        def of(batch: Any) -> list[Tensor]:
            wrapped.zero_grad(set_to_none=True)
            with _named():
                loss(wrapped, batch).backward()  # type: ignore[no-untyped-call]
            return _samples(trained)

        yield of
    finally:
        if wrapped is not None:
            wrapped.zero_grad(set_to_none=True)
            wrapped.remove_hooks()
        for layer, mode in zip(layers, modes, strict=True):
            layer.training = mode


@contextmanager
def _named() -> Iterator[None]:
    """Raise what layers and Opacus raise as UnsupportedModel."""
    try:
        yield
    except (FinetuneError, torch.OutOfMemoryError):
        raise
    except _RAW as error:
        raise UnsupportedModel(
            "gradients of single rows cannot be computed, by the model or the loss:"
            f" {type(error).__name__}: {error}"
        ) from error


def _drops(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.dropout._DropoutNd)  # noqa: SLF001 - all of them


def _samples(trained: dict[str, nn.Parameter]) -> list[Tensor]:
    """Return what a backward pass left, each with rows as its first dimension."""
    found = []
    for name, parameter in trained.items():
        gradients = getattr(parameter, "grad_sample", None)
        if gradients is None:
            raise NoGradient(
                f"{name} got no gradient; freeze it with requires_grad_(False), or let the loss"
                " depend on it"
            )
        found.append(gradients.detach().flatten(1))
    counts = sorted({len(gradients) for gradients in found})
    if len(counts) != 1:
        raise RowsMixed(
            f"layers saw {counts} samples of one batch; keep rows as the first dimension",
            float("inf"),
        )
    odd = ~torch.stack([gradients.isfinite().all(1) for gradients in found]).all(0)
    if odd.any():
        raise NotFinite(
            f"rows {odd.nonzero().flatten().tolist()} of a batch have gradients that are not"
            " finite; use rows and weights with finite ones for this check"
        )
    return found


def _change(more: list[Tensor], fewer: list[Tensor]) -> float:
    """Return the largest change of a row, over its norm or the median one if that is larger."""
    norms = _norms(fewer)
    scale = norms.clamp_min(max(float(norms.median()), torch.finfo(norms.dtype).tiny))
    changes = _norms([a[: len(b)] - b for a, b in zip(more, fewer, strict=True)])
    return float((changes / scale).max())


def _norms(gradients: list[Tensor]) -> Tensor:
    norms: Tensor = torch.stack([each.norm(dim=1) for each in gradients]).norm(dim=0)
    return norms
