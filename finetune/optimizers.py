"""Opacus's optimizers under guard: an update happens if it was paid for, as it was priced."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import torch
from opacus.optimizers import DPOptimizer
from torch.optim import Optimizer

from finetune import clipping, distributed
from finetune.errors import (
    NoGradient,
    PlanChanged,
    UnitsMixed,
    UnmarkedStep,
    UnsupportedModel,
    UnsupportedSetting,
    WeightsChanged,
)
from finetune.plan import TrainingPlan

_ROUNDING, _TOLERANCE, _NOTHING = 1e-5, 1e-3, 1e-18
"""Of the clipping norm, left free for rounding; of the mean norm of rows, for a sum over rows; and
where squares of gradients are zero in single precision."""


@dataclass(slots=True)
class Turn:
    """The step in hand: what was paid for, and what of it is done.

    Attributes:
        paid: Whether a durable mark pays for an update.
        rows: How many rows the batch in hand has; it may be a part of the step's sample.
        last: Whether it is the last part.
        done: Whether the part got its ``optimizer.step()``.
        noised: Whether clipped sums with noise are what the wrapped optimizer would apply.
    """

    paid: bool = False
    rows: int = 0
    last: bool = True
    done: bool = True
    noised: bool = False


class Guarded(DPOptimizer):  # type: ignore[misc]
    """Opacus's optimizer with the checks before an update, our clipping, and secret noise.

    Overriding Opacus's own methods, instead of attaching a step hook, leaves no hook that a
    script could overwrite.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        plan: TrainingPlan,
        turn: Turn,
        module: torch.nn.Module,
    ) -> None:
        first = next(each for group in optimizer.param_groups for each in group["params"])
        super().__init__(
            optimizer,
            noise_multiplier=plan.noise_multiplier,
            max_grad_norm=plan.max_grad_norm,
            expected_batch_size=plan.expected_batch_size,
            loss_reduction="mean",
            generator=secret_generator(first.device),
        )
        self.plan, self.turn = plan, turn
        self._module = module
        self._parameters = dict(module.named_parameters())
        self._buffers: dict[str, tuple[torch.Tensor, int, torch.Tensor]] = {}
        self._means: dict[torch.Tensor, torch.Tensor | None] = {}
        self._taken = 1
        self._known: tuple[object, ...] = ()
        self._hooks = [
            optimizer.register_step_pre_hook(self._check_update),
            optimizer.register_step_post_hook(self._updated),
        ]
        self._updated()

    @property
    def accumulated_iterations(self) -> int:
        """Return 1: a step is one sample, whatever the number of its parts."""
        return 1

    def pre_step(self, closure: Callable[[], float] | None = None) -> bool:  # noqa: ARG002
        """Check and clip; at the end of a sample add noise and return True, for the update.

        The mark is used up before any noise is drawn: whatever fails afterwards, a second try
        would be a second release.
        """
        try:
            self._check()
            self.turn.done, self.step_hook = True, None
            self.turn.paid = not self.turn.last
            self.clip_and_accumulate()
            self._is_last_step_skipped = not self.turn.last
            if not self.turn.last:
                return False
            self.add_noise()
            self.scale_grad()
            for parameter in self.params:
                parameter.summed_grad = None
            distributed.add_up(parameter.grad for parameter in self.params)
        except BaseException:
            self.drop()
            raise
        self.turn.noised = True
        return True

    def clip_and_accumulate(self) -> None:
        """Add the clipped gradients of this part to the parts before.

        A row whose gradient is not finite counts as zero, and so does the row that stands in for
        none.

        Raises:
            UnsupportedModel: If gradients of rows do not add up to the gradient of the batch, in
                steps 1, 2, 4, 8, ...
        """
        every = {parameter: parameter.grad_sample for parameter in self.params}
        norms = torch.stack([clipping.norms(rows) for rows in every.values()]).norm(dim=0)
        left_out = ~norms.isfinite()
        if self.turn.rows and not left_out.any():
            self._check_sums(every, norms)
        left_out |= not self.turn.rows
        if left_out.any():
            norms = norms.masked_fill(left_out, 0)
            every = {each: clipping.without(rows, left_out) for each, rows in every.items()}
        factors = ((1 - _ROUNDING) * self.max_grad_norm / (norms + 1e-6)).clamp(max=1.0)
        for parameter, rows in every.items():
            clipped, before = clipping.weighted(rows, factors), parameter.summed_grad
            parameter.summed_grad = clipped if before is None else before.add_(clipped)
            parameter.grad_sample = None  # so that nothing is added twice
        self._taken += 1

    def attach_step_hook(self, fn: Callable[[DPOptimizer], None]) -> NoReturn:
        """Refuse: a hook would see noised gradients, and could make them released twice."""
        raise UnsupportedSetting(
            "step_hook", getattr(fn, "__name__", fn), "look at the weights after the step instead"
        )

    def add_param_group(self, param_group: dict[str, object]) -> NoReturn:
        """Refuse: what is trained is fixed when the run begins."""
        raise UnsupportedSetting(
            "add_param_group", sorted(param_group), "give the optimizer all groups before the run"
        )

    @property
    def _step_supports_amp_scaling(self) -> NoReturn:
        """What torch's GradScaler asks first."""
        raise UnsupportedSetting("GradScaler", "step", "it scales gradients; train in float32")

    def __reduce__(self) -> NoReturn:
        raise TypeError("a guarded optimizer is not copied: copy the model, or use run.save()")

    def __deepcopy__(self, memo: object) -> NoReturn:
        self.__reduce__()

    def add_noise(self) -> None:
        """Add the noise, on one rank of all."""
        if distributed.rank() == 0:
            super().add_noise()
        else:
            for parameter in self.params:
                parameter.grad = parameter.summed_grad.view_as(parameter)

    def follow(self, plan: TrainingPlan) -> None:
        """Go on as another plan says."""
        self.plan = plan
        self.noise_multiplier, self.max_grad_norm = plan.noise_multiplier, plan.max_grad_norm
        self.expected_batch_size = plan.expected_batch_size

    def saw(self, parameter: torch.Tensor) -> None:
        """Take what a backward pass left on a parameter, so that nobody finds it there."""
        if self._is_due:
            self._means[parameter] = parameter.grad
        parameter.grad = None

    def drop(self) -> None:
        """Drop every gradient, clipped sums before noise too."""
        self._is_last_step_skipped = False
        self.zero_grad(set_to_none=True)
        for parameter in self._parameters.values():
            parameter.grad = None
        self.forget()

    def forget(self) -> None:
        """Drop what a backward pass left for single rows."""
        self._means.clear()
        for parameter in self._parameters.values():
            for name in ("grad_sample", "_current_grad_sample"):
                if getattr(parameter, name, None) is not None:
                    setattr(parameter, name, None)
            if getattr(parameter, "_forward_counter", 0):
                parameter._forward_counter = 0  # type: ignore[attr-defined]  # noqa: SLF001
        for module in self._module.modules():
            module.__dict__.pop("activations", None)
            module.__dict__.pop("max_batch_len", None)

    def release(self) -> None:
        """Give the wrapped optimizer back as it was."""
        self.drop()
        for hook in self._hooks:
            hook.remove()

    @property
    def _is_due(self) -> bool:
        """Whether sums are checked in this step: its number is a power of two."""
        return not self._taken & (self._taken - 1)

    def _check(self) -> None:
        for name in ("noise_multiplier", "max_grad_norm", "expected_batch_size"):
            planned, actual = getattr(self.plan, name), getattr(self, name)
            if actual != planned:
                raise PlanChanged(name, planned, actual)
        if not self.turn.paid or self.turn.done:
            raise UnmarkedStep(
                "no durable mark pays for this step; take one optimizer step for each batch"
                " that run.batches yields"
            )
        self.check_weights()
        self._check_buffers()
        samples = {self._samples(parameter) for parameter in self.params}
        if samples != {max(1, self.turn.rows)}:
            raise UnitsMixed(
                f"the batch has {max(1, self.turn.rows)} rows, and trainable layers saw"
                f" {sorted(samples)} samples; each row needs one gradient, so keep rows as the"
                " first dimension and do not cut them in pieces"
            )

    def check_weights(self) -> None:
        """Raise if something else than this optimizer changed weights, or what is trained.

        Raises:
            WeightsChanged: If so.
        """
        known = [*map(id, self._parameters.values())]
        if self._known != self._now() or known != [*map(id, self._module.parameters())]:
            raise WeightsChanged(
                "weights, or which of them are trained, were changed since the last step by"
                " something else than this optimizer; what that learned from is not accounted for"
            )

    def note_buffers(self) -> None:
        """Remember what buffers hold before a batch is seen."""
        named = dict(self._module.named_buffers())
        self._buffers = {
            name: self._buffers[name] if self._is_known(name, buffer) else _noted(buffer)
            for name, buffer in named.items()
        }

    def _check_buffers(self) -> None:
        for name, buffer in self._module.named_buffers():
            if self._is_known(name, buffer) and not self._is_due:
                continue  # by version; some of torch's functions write without a new one
            _, _, before = self._buffers.get(name, (None, 0, None))
            if before is None or not same_values(buffer, before):
                raise WeightsChanged(
                    f"the buffer {name.removeprefix('_module.')} was changed by this batch, and"
                    " would publish what it keeps of private rows without noise; put its layer in"
                    " eval(), take it out of the model, or show the model a public batch first if"
                    " it is made only once"
                )

    def _is_known(self, name: str, buffer: torch.Tensor) -> bool:
        known, version, _ = self._buffers.get(name, (None, 0, None))
        return buffer is known and buffer._version == version  # noqa: SLF001

    def _now(self) -> tuple[object, ...]:
        every = self._parameters.values()
        return tuple((p.requires_grad, p._version, p.data_ptr()) for p in every)  # noqa: SLF001

    def _samples(self, parameter: torch.Tensor) -> int:
        """Return how many rows a parameter has gradients of."""
        rows = getattr(parameter, "grad_sample", None)
        if rows is None:
            raise NoGradient(
                f"{self._name(parameter)} got no gradient of single rows in this backward pass:"
                " let the loss depend on it, or freeze it with requires_grad_(False); a weight"
                " that is used outside the forward pass of its own layer has none"
            )
        if isinstance(rows, list):
            raise UnmarkedStep("several backward passes for one step; take one for each batch")
        return len(rows)

    def _check_sums(self, every: dict[torch.Tensor, clipping.Rows], norms: torch.Tensor) -> None:
        """Compare the mean of the rows' gradients with what the backward pass says."""
        most = _TOLERANCE * norms.mean() + _NOTHING
        for parameter, mean in self._means.items():
            if mean is None or parameter not in every:
                continue
            found = clipping.weighted(every[parameter], torch.full_like(norms, 1 / len(norms)))
            if not (found - mean).double().norm() <= most:
                raise UnsupportedModel(
                    f"the gradients of single rows of {self._name(parameter)} do not add up to its"
                    " gradient: its layer is computed in a way that Opacus does not see (keyword"
                    " arguments, attributes that change, padding of convolutions, a use of the"
                    " weight outside the layer); freeze it, or train adapters"
                )

    def _name(self, parameter: torch.Tensor) -> str:
        names = (name for name, each in self._parameters.items() if each is parameter)
        return next(names, "a parameter").removeprefix("_module.")

    def _check_update(self, *_: object) -> None:
        """Refuse an update of the wrapped optimizer without clipping and noise."""
        if not self.turn.noised:
            raise UnmarkedStep(
                "the optimizer that was passed to make_private was stepped itself, with raw"
                " gradients; step the one that make_private returned"
            )
        self.turn.noised = False

    def _updated(self, *_: object) -> None:
        self._known = self._now()


def _noted(buffer: torch.Tensor) -> tuple[torch.Tensor, int, torch.Tensor]:
    return buffer, buffer._version, buffer.detach().clone()  # noqa: SLF001


def same_values(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Say whether two tensors are alike, NaN included."""
    if one.shape != other.shape or one.dtype != other.dtype or one.is_sparse or other.is_sparse:
        return False
    return torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


def secret_generator(device: torch.device) -> torch.Generator:
    """Return a generator whose whole state comes from the operating system.

    On the CPU the state of the Mersenne Twister is written out, because ``manual_seed`` uses
    32 bits of its seed there; elsewhere a seed of 63 bits is used.
    """
    generator = torch.Generator(device).manual_seed(secrets.randbits(63))
    if device.type == "cpu":
        state = generator.get_state().numpy()
        words = np.frombuffer(os.urandom(4 * _TWISTER_WORDS), "<u4").astype("<u8")
        state[_TWISTER_AT : _TWISTER_AT + 8 * _TWISTER_WORDS] = words.view(np.uint8)
        generator.set_state(torch.from_numpy(state))
    return generator


# Where torch's serialised CPU generator has its words, each in 8 bytes (checked by a test).
_TWISTER_AT, _TWISTER_WORDS = 24, 624
