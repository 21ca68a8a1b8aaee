"""Model, optimizer and loader of a run: what cannot be trained with, and what is watched in it.

Opacus takes many that would break its guarantee without a word. They are refused before anything
is paid for where they can be seen, else in the batch in which they are.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from opacus.optimizers import DPOptimizer
from torch import (
    Tensor,
    get_float32_matmul_precision,
    is_autocast_enabled,
    is_grad_enabled,
    nn,
)
from torch.optim import LBFGS, Optimizer
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
)

from finetune import distributed
from finetune.batches import Counted, PoissonSampler, Sealed
from finetune.clipping import GhostModule, HooksModule
from finetune.errors import (
    DeclaredExceeded,
    NotPoissonSampled,
    UnitsMixed,
    UnsupportedModel,
    UnsupportedSetting,
)
from finetune.models import check_model, mixes_rows
from finetune.optimizers import Turn
from finetune.plan import TrainingPlan
from finetune.selftest import check_made_up

MADE_UP = 4
"""Rows of the batch that a loss is tried on."""
_MODES = {"hooks": HooksModule, "ghost": GhostModule}


def check_parts(optimizer: Optimizer, loader: DataLoader[Any], *, mode: str) -> None:
    """Raise if a loader cannot be Poisson-sampled, or an optimizer or mode cannot be guarded."""
    if isinstance(loader.dataset, IterableDataset):
        raise NotPoissonSampled(
            "an IterableDataset cannot be Poisson-sampled; load it into a map-style dataset"
        )
    if not isinstance(loader.sampler, SequentialSampler | RandomSampler):
        raise NotPoissonSampled(
            f"the loader draws by {type(loader.sampler).__name__}, which Poisson sampling"
            " would replace; pass a plain DataLoader over the rows to sample"
        )
    if isinstance(optimizer, LBFGS):
        raise UnsupportedSetting(
            "optimizer",
            "LBFGS",
            "it takes several gradients a step; use one that needs one, as AdamW",
        )
    if isinstance(optimizer, DPOptimizer):
        raise TypeError("pass the plain optimizer, not the one of an earlier run")
    if mode not in _MODES:
        raise ValueError(f"mode must be one of {sorted(_MODES)}, got {mode!r}")


def weights_of(model: nn.Module, optimizer: Optimizer) -> list[nn.Parameter]:
    """Return the weights that an optimizer trains, of a model that can be trained."""
    check_model(model)
    trained = [each for group in optimizer.param_groups for each in group["params"]]
    if not {*map(id, trained)} <= {*map(id, model.parameters())}:
        raise UnsupportedModel(
            "the optimizer has weights that are not the model's; make it of model.parameters()"
        )
    return trained


def check_units(loader: DataLoader[Any], units: int | None) -> None:
    """Raise if there are more rows than a budget declares units."""
    if units is not None and len(loader.dataset) > units:  # type: ignore[arg-type]
        raise DeclaredExceeded(
            "units of the budget",
            units,
            "a row is one unit here: sample or join the rows of a unit (OneRowPerUnit), or"
            " create the budget with the number of rows",
        )


def samples_of(
    loader: DataLoader[Any], example: Any, *, steps: int
) -> tuple[Callable[[TrainingPlan, int | None], DataLoader[Any]], DataLoader[Any]]:
    """Return how loaders of fresh samples are made of a loader's rows, and one to give out.

    Args:
        loader: Its rows are sampled, on several ranks this one's share of them.
        example: One of its rows.
        steps: The length of the loader to give out, which draws nothing.
    """
    rows: Any = loader.dataset
    if distributed.ranks() > 1:
        share = range(distributed.rank(), len(rows), distributed.ranks())
        rows = Subset(rows, share)

    def fresh(plan: TrainingPlan, most: int | None) -> DataLoader[Any]:
        return _loader(
            loader,
            rows,
            PoissonSampler(len(rows), plan.sampling_probability, plan.steps, most),
            Counted(loader.collate_fn, example),
        )

    return fresh, _loader(loader, rows, Sealed(steps), loader.collate_fn)


def with_row_gradients(model: nn.Module, mode: str) -> Any:
    """Return a model that keeps gradients of single rows, in one of the modes of clipping."""
    # Of the first layer, whose input needs no gradient: Opacus's hooks are right all the same.
    warnings.filterwarnings("ignore", message="Full backward hook is firing when gradients are")
    try:
        return _MODES[mode](model, loss_reduction="mean")
    except (NotImplementedError, ValueError) as error:
        raise UnsupportedModel(f"Opacus cannot take the model: {error}") from error


def try_loss(
    model: nn.Module, loss: Callable[..., Tensor], batches: tuple[Any, Any], *, turn: Turn
) -> None:
    """Try a loss on two batches, of which the second lacks the last row of the first."""

    def counted(model: nn.Module, batch: tuple[int, Any]) -> Tensor:
        turn.rows = batch[0]
        return loss(model, batch[1])

    whole, part = batches
    try:
        check_made_up(model, counted, (MADE_UP, whole), (MADE_UP - 1, part))
    finally:
        turn.rows = 0


def watch(model: nn.Module, turn: Turn, *, drop: Callable[[Tensor], None], undo: ExitStack) -> None:
    """Check what trained layers see in each batch, and drop raw gradients when they are there.

    Args:
        model: It is watched.
        turn: Of the run.
        drop: Called with each weight whose raw gradient is there.
        undo: What ends it is added here.
    """

    # Functions, and not methods: a copy of the model must not try to copy the run with them.
    def check_rows(module: nn.Module, inputs: tuple[Any, ...], others: Any) -> None:
        _check_rows(turn, module, inputs, others)

    def check_statistics(module: nn.Module, _: object) -> None:
        _check_statistics(turn, module)

    for parameter in model.parameters():
        if parameter.requires_grad:
            hook = parameter.register_post_accumulate_grad_hook(drop)  # type: ignore[no-untyped-call]
            undo.callback(hook.remove)
    for module in model.modules():
        if any(each.requires_grad for each in module.parameters(recurse=False)):
            hook = module.register_forward_pre_hook(check_rows, with_kwargs=True)
            undo.callback(hook.remove)
        if mixes_rows(module):
            hook = module.register_forward_pre_hook(check_statistics)
            undo.callback(hook.remove)


def _check_statistics(turn: Turn, module: nn.Module) -> None:
    """Raise if a layer of batch statistics was put back into training."""
    if module.training and turn.paid:
        raise UnsupportedModel(
            f"{type(module).__name__} is in training mode, in which batch statistics mix rows"
            " and are kept without noise; put it in eval() after each model.train()"
        )


def _check_rows(turn: Turn, module: nn.Module, inputs: tuple[Any, ...], others: Any) -> None:
    """Raise if a layer that is trained sees anything else than the rows of the batch."""
    if not (is_grad_enabled() and turn.paid):
        return
    name, rows = f"{type(module).__name__}, which is trained,", max(1, turn.rows)
    if not module.training:
        raise UnsupportedModel(
            f"{name} was put in evaluation mode, in which no gradients of single rows are seen;"
            " call model.train() before the next batch, and take torch.no_grad() for a look at"
            " the loss"
        )
    if not inputs or not all(isinstance(each, Tensor) for each in inputs):
        raise UnsupportedModel(
            f"{name} is called without tensors, or with them by keyword, and Opacus cannot see"
            " those; pass them by position, freeze it, or train adapters (by position"
            f" {[type(each).__name__ for each in inputs]}, by keyword {sorted(others)})"
        )
    precision = get_float32_matmul_precision()
    if precision != "highest":
        raise UnsupportedSetting(
            "float32_matmul_precision",
            precision,
            "sums of clipped rows would be rounded by more than is allowed for; call"
            " torch.set_float32_matmul_precision('highest')",
        )
    for each in inputs:
        if is_autocast_enabled(each.device.type):
            raise UnsupportedSetting(
                "autocast", each.device.type, "it rounds gradients; train in float32"
            )
        if each.shape[:1] != (rows,):
            raise UnitsMixed(
                f"{name} got an input of shape {tuple(each.shape)} in a batch of {rows} rows:"
                " gradients of single rows can only be told apart where rows are the first"
                " dimension of every input (pass position_ids of shape (rows, tokens) to models"
                " with a table of positions)"
            )


def _loader(
    of: DataLoader[Any], rows: Any, sampler: Sampler[list[int]], collate: Callable[..., Any]
) -> DataLoader[Any]:
    """Return a loader of these rows that is otherwise like another."""
    return DataLoader(
        rows,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=of.num_workers,
        pin_memory=of.pin_memory,
        worker_init_fn=of.worker_init_fn,
    )
