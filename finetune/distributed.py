"""Training on several processes: rank 0 pays for a step, and all learn it before they read a batch.

Each rank draws a Poisson sample of its own share of the rows, which together are a Poisson sample
of all; clips and sums it; rank 0 adds the noise once; the sums are added up before the update.
Only rank 0 touches the ledger.

The ranks meet when they enter the run, compare plans, rows and weights, before each batch, before
sums are added up, and when they leave the run. A rank that leaves it with an error says so in
place of what the others wait for, and they end with ``PeerFailed``; a rank that is killed breaks
its connections, with the same end. A rank that hangs, or fails while tensors are being exchanged,
leaves the others waiting until the process group's timeout.

Without ``torch.distributed``, or with one process, everything here does nothing.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import Any, Protocol, TypeVar

import torch
from torch import distributed

from finetune.errors import NotPoissonSampled, PeerFailed, PlanChanged, UnsupportedModel
from finetune.plan import TrainingPlan

_Value = TypeVar("_Value")

_SPOTS = 16
"""How many rows are compared, spread over the dataset."""


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


# --- meeting ------------------------------------------------------------------------------------

_parted = [False]
"""Of each run that is open, the inner one last: whether a rank has left it with an error."""


@contextmanager
def together() -> Iterator[None]:
    """Enter and leave a run with all ranks; what one raises in it ends it on all.

    Raises:
        PeerFailed: If another rank left the run with an error, or at another place.
    """
    _parted.append(False)
    try:
        yield
        _meet("the end of the run")
    except GeneratorExit:  # the collector found a run that nobody left
        raise
    except BaseException as error:
        if not _parted[-1]:
            with suppress(PeerFailed):  # this rank's own error goes on
                _meet("an error", problem=f"{type(error).__name__}: {error}")
        raise
    finally:
        _parted.pop()


def _meet(place: str, said: _Value | None = None, *, problem: str = "") -> list[_Value]:
    """Return what each rank said at this place.

    Raises:
        PeerFailed: If another has a problem, is at another place, or cannot be reached.
    """
    if ranks() == 1:
        return [said]  # type: ignore[list-item]
    if _parted[-1]:
        raise PeerFailed("another rank has left this run; start it again on all of them")
    heard: list[Any] = [None] * ranks()
    _parted[-1] = True
    try:
        distributed.all_gather_object(heard, (place, problem, said))
    except RuntimeError as error:
        raise PeerFailed(f"at {place} another rank cannot be reached: {error}") from error
    for other, (_, why, _) in enumerate(heard):
        if why:
            raise PeerFailed(f"rank {other} left the run: {why}")
    for other, (where, _, _) in enumerate(heard):
        if where != place:
            raise PeerFailed(
                f"rank {other} is at {where} and this one at {place}; all ranks have"
                " to take the same steps"
            )
    _parted[-1] = False
    return [each for _, _, each in heard]


# --- paying -------------------------------------------------------------------------------------


class Leader:
    """Pays for each step, and then lets the other ranks go on."""

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
        receipt = self._steps.mark()
        _meet(f"step {self.marked}")
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
        _meet(f"step {self.marked + 1}")
        self.marked += 1


def on_rank_0(make: Callable[[], Sequence[Any]]) -> Sequence[Any]:
    """Return the reservations that rank 0 makes, or on the others what stands for them.

    Args:
        make: Makes reservations, with ``uses`` and ``marked``; called on rank 0 alone.

    Raises:
        PeerFailed: On the others, if it raised there.
    """
    made = make() if rank() == 0 else ()
    told = _meet("the reservation", [(each.uses, each.marked) for each in made])
    return made if rank() == 0 else [Follower(*each) for each in told[0]]


def led(steps: Steps) -> Steps:
    """Return what marks steps on this rank."""
    return Leader(steps) if ranks() > 1 and rank() == 0 else steps


# --- what has to be the same on all ranks -------------------------------------------------------


def as_on_rank_0(value: _Value) -> _Value:
    """Return what rank 0 has; all ranks have to call it."""
    if ranks() > 1:
        heard: list[Any] = [value if rank() == 0 else None]
        distributed.broadcast_object_list(heard, 0)
        value = heard[0]
    return value


def same_plans(plans: Sequence[TrainingPlan]) -> None:
    """Raise, on every rank, unless all ranks have the plans of rank 0.

    Raises:
        PlanChanged: If they have not.
    """
    first, *others = _meet("the plans", [asdict(plan) for plan in plans])
    for other, theirs in enumerate(others, 1):
        if len(theirs) != len(first):
            raise PlanChanged(f"number of plans on rank {other}", len(first), len(theirs))
        for mine, plan in zip(first, theirs, strict=True):
            for name, value in mine.items():
                if plan[name] != value:
                    raise PlanChanged(f"{name} on rank {other}", value, plan[name])


def same_rows(rows: Any) -> None:
    """Raise, on every rank, unless all ranks have as many rows, in the same order.

    A spot check: some rows, spread over the dataset, are compared by their SHA-256. Where a row is
    not the same when it is read twice, as in a dataset that draws at random, only the number is.

    Raises:
        NotPoissonSampled: If they have not: a row could be in the shares of two ranks.
    """
    if ranks() == 1:
        return
    digest = _digest(rows)
    fixed = digest if _digest(rows) == digest else ""
    (count, first), *others = _meet("the rows", (len(rows), fixed))
    for other, (theirs, found) in enumerate(others, 1):
        if theirs != count or (first and found and found != first):
            raise NotPoissonSampled(
                f"rank {other} has other rows than rank 0, or in another order, so that a row"
                " could be in the shares of both; load the same rows in the same order on all"
            )


def same_weights(tensors: Iterable[torch.Tensor]) -> None:
    """Give every rank the weights of rank 0.

    Raises:
        UnsupportedModel: On every rank, if they are not of the same shapes.
    """
    tensors = list(tensors)
    first, *others = _meet("the weights", [(tuple(each.shape), each.dtype) for each in tensors])
    for other, theirs in enumerate(others, 1):
        if theirs != first:
            raise UnsupportedModel(f"rank {other} has weights of other shapes than rank 0")
    if others:
        for tensor in tensors:
            distributed.broadcast(tensor, 0)


def same_names(trained: Sequence[str]) -> None:
    """Raise, on every rank, unless all ranks train the same weights in the same order.

    Raises:
        UnsupportedModel: If they do not.
    """
    first, *others = _meet("the weights that are trained", list(trained))
    for other, theirs in enumerate(others, 1):
        if theirs != first:
            raise UnsupportedModel(f"the optimizer of rank {other} has other weights than rank 0's")


def _digest(rows: Any) -> str:
    """Return a digest of some rows, or nothing if a row has no bytes that can be compared."""
    last, found = len(rows) - 1, hashlib.sha256()
    read = getattr(rows, "example_of", rows.__getitem__)
    try:
        for at in sorted({spot * last // (_SPOTS - 1) for spot in range(_SPOTS)}):
            for part in _bytes(read(at)):
                found.update(part)
    except (TypeError, AttributeError, pickle.PicklingError):
        return ""
    return found.hexdigest()


def _bytes(part: Any) -> Iterator[bytes]:
    if isinstance(part, torch.Tensor):  # its pickle has an address in it
        yield f"{part.dtype} {tuple(part.shape)}".encode()
        yield part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    elif isinstance(part, Mapping):
        for name, each in part.items():
            yield str(name).encode()
            yield from _bytes(each)
    elif isinstance(part, list | tuple):
        for each in part:
            yield from _bytes(each)
    else:
        yield pickle.dumps(part)


# --- updates ------------------------------------------------------------------------------------


def add_up(gradients: Iterable[torch.Tensor]) -> None:
    """Add the gradients of all ranks, when every one of them is at the end of its part.

    Raises:
        PeerFailed: If one is not.
    """
    if ranks() > 1:
        _meet("the sum of a step")
        for gradient in gradients:
            distributed.all_reduce(gradient, op=distributed.ReduceOp.SUM)
