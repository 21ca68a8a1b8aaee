"""Training on several processes: rank 0 pays for a step, and all learn it before they read a batch.

Each rank draws a Poisson sample of its own share of the rows, which together are a Poisson sample
of all; clips and sums it; rank 0 adds the noise once; the sums are added up before the update.
Only rank 0 touches the ledger. What it is refused, and an update that one rank refuses, ends the
run on all of them: no rank waits for sums that will not come.

Without ``torch.distributed``, or with one process, everything here does nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import distributed

from finetune.errors import PeerFailed

_Made = TypeVar("_Made")


class Steps(Protocol):
    """What pays for the steps of one plan: a reservation, or word of the one that rank 0 has."""

    @property
    def marked(self) -> int:
        """Steps that were paid for."""

    @property
    def remaining(self) -> int:
        """Steps that can still be taken."""

    def mark(self) -> object:
        """Pay for one step; return when that is durable."""


def ranks() -> int:
    """Return how many processes train together.

    >>> ranks()
    1
    """
    together = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if together else 1


def rank() -> int:
    """Return which of them this is; 0 pays."""
    return distributed.get_rank() if ranks() > 1 else 0


class Leader:
    """Tells the other ranks of each mark, or that there is none."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps

    @property
    def marked(self) -> int:
        """Steps that were paid for."""
        return self._steps.marked

    @property
    def remaining(self) -> int:
        """Steps that can still be taken."""
        return self._steps.remaining

    def mark(self) -> object:
        """Pay for one step, and tell."""
        try:
            receipt = self._steps.mark()
        except BaseException as error:
            _tell(f"{type(error).__name__}: {error}")
            raise
        _tell("")
        return receipt


class Follower:
    """Waits for rank 0 to pay."""

    def __init__(self, uses: int, marked: int) -> None:
        self.uses, self.marked = uses, marked

    @property
    def remaining(self) -> int:
        """Steps that can still be taken."""
        return self.uses - self.marked

    def mark(self) -> None:
        """Wait until rank 0 has paid for one step.

        Raises:
            PeerFailed: If it could not.
        """
        problem = _tell("")
        if problem:
            raise PeerFailed(f"rank 0 could not pay for this step: {problem}")
        self.marked += 1


def on_rank_0(make: Callable[[], Sequence[Any]]) -> Sequence[Any]:
    """Return the reservations that rank 0 makes, or on the others what stands for them.

    Args:
        make: Makes reservations, with ``uses`` and ``marked``; called on rank 0 alone.

    Raises:
        PeerFailed: On the others, if it raised there.
    """
    if ranks() == 1:
        return make()
    if rank() == 0:
        try:
            made = make()
        except BaseException as error:
            _tell((f"{type(error).__name__}: {error}", []))
            raise
        _tell(("", [(each.uses, each.marked) for each in made]))
        return made
    nothing: tuple[str, list[tuple[int, int]]] = ("", [])
    problem, steps = _tell(nothing)
    if problem:
        raise PeerFailed(f"rank 0 made no reservation: {problem}")
    return [Follower(*each) for each in steps]


def led(steps: Steps) -> Steps:
    """Return what marks steps on this rank."""
    return Leader(steps) if ranks() > 1 and rank() == 0 else steps


def same_weights(tensors: Iterable[torch.Tensor]) -> None:
    """Give every rank the weights of rank 0."""
    if ranks() > 1:
        for tensor in tensors:
            distributed.broadcast(tensor, 0)


def agree(*, well: bool) -> None:
    """Wait until every rank is at the end of its part of a step.

    Raises:
        PeerFailed: If another one is not well.
    """
    if ranks() > 1:
        found: list[Any] = [None] * ranks()
        distributed.all_gather_object(found, well)
        if well and not all(found):
            raise PeerFailed(f"rank {found.index(False)} refused its part of this step")


def add_up(gradients: Iterable[torch.Tensor]) -> None:
    """Add the gradients of all ranks."""
    if ranks() > 1:
        for gradient in gradients:
            distributed.all_reduce(gradient, op=distributed.ReduceOp.SUM)


def _tell(said: _Made) -> _Made:
    """Return what rank 0 said."""
    heard: list[Any] = [said]
    distributed.broadcast_object_list(heard, 0)
    told: _Made = heard[0]
    return told
