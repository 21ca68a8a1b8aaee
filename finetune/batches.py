"""Batches: fresh Poisson samples of the rows, in parts that fit into memory."""

from __future__ import annotations

import math
import secrets
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler

from finetune.errors import NotPoissonSampled


class PoissonSampler(Sampler[list[int]]):
    """Draw each row independently with the same probability, afresh in every step.

    Args:
        rows: Number of rows.
        sampling_probability: Of each row in each step; realised to 2**-53.
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


class Counted:
    """Collate rows to (number of rows, batch).

    A sample without rows becomes a batch of one row of zeros and ones, which many models need
    (some cannot take none). The optimizer leaves its gradient out.
    """

    def __init__(self, collate: Callable[[list[Any]], Any], example: Any) -> None:
        self._collate, self._stand_in = collate, stand_in(collate([example]))

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
        return batch.clone() if batch.dtype is torch.bool else batch.clamp(0, 1)
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
