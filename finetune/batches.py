"""Batches: fresh Poisson samples of the rows, in parts that fit into memory."""

from __future__ import annotations

import copy
import math
import secrets
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler, Subset

from finetune.errors import NotPoissonSampled


class PoissonSampler(Sampler[list[int]]):
    """Draw each row independently with the same probability, afresh in every step.

    Args:
        rows: Number of rows.
        sampling_probability: Of each row in each step; realised to 2**-53, so a plan has no smaller
            one than 1e-9.
        steps: Number of samples, empty ones included.
        most: Most rows of a part; a larger sample comes in several.

    Attributes:
        last: Whether each part that was drawn, and not taken from here yet, ends its sample.

    >>> sampler = PoissonSampler(5, 1.0, 2)
    >>> list(sampler)
    [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]
    >>> sampler = PoissonSampler(5, 1.0, 2, most=2)
    >>> list(sampler)[:3], list(sampler.last)[:3]
    ([[0, 1], [2, 3], [4]], [False, False, True])
    """

    def __init__(
        self, rows: int, sampling_probability: float, steps: int, most: int | None = None
    ) -> None:
        self.rows, self.sampling_probability, self.steps = rows, sampling_probability, steps
        self.most = most or max(1, rows)
        self.last: deque[bool] = deque()

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        self.last.clear()
        generator = np.random.Generator(np.random.PCG64DXSM(secrets.randbits(256)))
        for _ in range(self.steps):
            drawn = generator.random(self.rows) < self.sampling_probability
            sample = np.flatnonzero(drawn).tolist()
            parts = max(1, math.ceil(len(sample) / self.most))
            for part in range(parts):
                self.last.append(part == parts - 1)
                yield sample[part * self.most : (part + 1) * self.most]


class Sealed(Sampler[list[int]]):
    """The sampler of the loader that a run gives out: it says how long it is, and draws nothing."""

    def __init__(self, steps: int) -> None:
        self._steps = steps

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[list[int]]:
        """Refuse: batches that no mark paid for."""
        raise NotPoissonSampled(
            "nothing pays for batches that are taken from the loader itself; iterate over"
            " run.batches(loader)"
        )


def reads(dataset: Any, rows: Any) -> bool:
    """Say whether a dataset is these rows, or a subset of them.

    >>> rows = [1, 2, 3]
    >>> reads(Subset(rows, [0]), rows), reads([1, 2, 3], rows)
    (True, False)
    """
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return dataset is rows


class Counted:
    """Collate rows to (number of rows, batch).

    A sample without rows becomes a batch of one row of zeros and ones, which many models need
    (some cannot take none). The optimizer leaves its gradient out.
    """

    def __init__(self, collate: Callable[[list[Any]], Any], example: Any) -> None:
        self._collate, self._stand_in = collate, stand_in(collate([copy.deepcopy(example)]))

    def __call__(self, rows: list[Any]) -> tuple[int, Any]:
        """Return how many rows there are, and the batch of them."""
        return len(rows), self._collate(rows) if rows else self._stand_in


def stand_in(batch: Any) -> Any:
    """Return a batch of the same form with nothing of its rows in it.

    >>> stand_in({"ids": torch.tensor([[7, 0]]), "weight": torch.tensor([2.5]), "name": ["Ann"]})
    {'ids': tensor([[1, 0]]), 'weight': tensor([0.]), 'name': ['']}

    Raises:
        TypeError: If it is not made of tensors, numbers and texts in lists, tuples and dicts.
    """
    if isinstance(batch, torch.Tensor):
        if batch.is_floating_point() or batch.is_complex():
            return torch.zeros_like(batch)
        return torch.ones_like(batch) if batch.dtype is torch.bool else batch.clamp(0, 1)
    if isinstance(batch, Mapping):
        members = {name: stand_in(part) for name, part in batch.items()}
        return members if type(batch) is dict else type(batch)(members)  # type: ignore[call-arg]
    if isinstance(batch, list | tuple):
        parts = [stand_in(part) for part in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    if batch is None or isinstance(batch, str | bytes | bool | int | float):
        return None if batch is None else type(batch)()
    raise TypeError(
        f"no batch without rows can be made of {type(batch).__name__}: let collate_fn return"
        " tensors, or lists, tuples and dicts of them"
    )


def made_up(collate: Callable[[list[Any]], Any], example: Any, rows: int) -> tuple[Any, Any]:
    """Return a batch of made-up rows of the form of an example, and the same without the last row.

    Numbers are at random in [0, 1], whole ones 0 or 1; what is never anything else, as a mask, is
    the same in every row, and negative labels, which are ignored, stay. Of a batch of tokens the
    last row, which the second batch lacks, is half as long: where the mean is over all tokens, the
    other rows tell.

    Args:
        collate: Makes a batch of rows.
        example: A row; nothing of it but its form is in the batches.
        rows: How many to make, at least 2.

    >>> whole, part = made_up(torch.stack, torch.tensor([7.5, 2.0]), 3)
    >>> whole.shape, torch.equal(whole[:2], part), whole[0].equal(whole[1])
    (torch.Size([3, 2]), True, False)
    """
    generator = torch.Generator().manual_seed(0)

    def both(whole: Any, part: Any) -> tuple[Any, Any]:
        if isinstance(whole, torch.Tensor):
            whole = _at_random(whole, generator)
            apart = whole.shape[:1] == (rows,) and part.shape[:1] == (rows - 1,)
            return whole, whole[:-1].clone() if apart else whole
        if isinstance(whole, Mapping):
            named = {name: both(whole[name], part[name]) for name in whole}
            made = [{name: pair[at] for name, pair in named.items()} for at in (0, 1)]
            return tuple(each if type(whole) is dict else type(whole)(each) for each in made)  # type: ignore[return-value, call-arg]
        if isinstance(whole, list | tuple):
            pairs = [both(*each) for each in zip(whole, part, strict=False)]
            parts = [[pair[at] for pair in pairs] for at in (0, 1)]
            fields = hasattr(whole, "_fields")
            return tuple(type(whole)(*each) if fields else type(whole)(each) for each in parts)  # type: ignore[return-value]
        return stand_in(whole), stand_in(part)

    whole, part = both(  # copies, for some collators take rows apart
        *(collate([copy.deepcopy(example) for _ in range(n)]) for n in (rows, rows - 1))
    )
    if isinstance(whole, Mapping) and isinstance(whole.get("input_ids"), torch.Tensor):
        tokens = whole["input_ids"]
        for name, ended in (("labels", -100), ("attention_mask", 0)):
            column = whole.get(name)
            if isinstance(column, torch.Tensor) and column.shape == tokens.shape:
                column[-1:, column.shape[1] // 2 :] = ended
    return whole, part


def _at_random(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if tensor.is_floating_point() or tensor.is_complex():
        return torch.rand(tensor.shape, generator=generator).to(tensor)
    if tensor.dim() > 1 and ((tensor == 0) | (tensor == 1)).all():
        return torch.full_like(tensor, bool(tensor.any()))
    drawn = torch.randint(0, 2, tensor.shape, generator=generator)
    if tensor.dim() == 1:  # a class for each row, each class in both batches
        drawn = torch.arange(len(tensor)) % 2
    return torch.where(tensor < 0, tensor, drawn.to(tensor))
