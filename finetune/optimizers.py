"""Opacus's optimizers under guard: an update happens if it was paid for, as it was priced."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from torch.optim import Optimizer

from finetune import distributed
from finetune.errors import (
    FinetuneError,
    NoGradient,
    NotFinite,
    PlanChanged,
    UnitsMixed,
    UnmarkedStep,
    UnsupportedSetting,
    WeightsChanged,
)
from finetune.plan import TrainingPlan


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
    """What both ways of clipping share: the checks before an update, and the noise generator.

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
        device = optimizer.param_groups[0]["params"][0].device
        super().__init__(
            optimizer,
            noise_multiplier=plan.noise_multiplier,
            max_grad_norm=plan.max_grad_norm,
            expected_batch_size=plan.expected_batch_size,
            loss_reduction="mean",
            generator=secret_generator(device),
        )
        self.plan, self.turn = plan, turn
        self._module = module
        self._parameters = dict(module.named_parameters())
        self._weights: tuple[tuple[bool, int, int], ...] = ()
        self._hooks = [
            optimizer.register_step_pre_hook(self._check_update),
            optimizer.register_step_post_hook(self._updated),
        ]
        self._updated()

    def pre_step(self, closure: Callable[[], float] | None = None) -> Any:
        """Check and clip; at the end of a sample add noise and return True, for the update.

        The mark is used up before any noise is drawn: whatever fails afterwards, a second try
        would be a second release.
        """
        try:
            self._check()
        except FinetuneError:
            self.drop()
            distributed.agree(well=False)
            raise
        self.turn.done, self.step_hook = True, None
        self.turn.paid = not self.turn.last
        try:
            if not self.turn.rows:
                self._leave_out()
            ready = super().pre_step(closure)
            if ready:
                self._join()
        except BaseException:
            self.drop()
            raise
        self.turn.noised = bool(ready)
        return ready

    def attach_step_hook(self, fn: Callable[[DPOptimizer], None]) -> NoReturn:
        """Refuse: a hook would see noised gradients, and could make them released twice."""
        raise UnsupportedSetting(
            "step_hook", getattr(fn, "__name__", fn), "look at the weights after the step instead"
        )

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
                parameter.grad = parameter.summed_grad.clone().view_as(parameter)
                parameter.summed_grad._processed = True  # noqa: SLF001 - as Opacus marks it

    def _join(self) -> None:
        """Add up what the ranks have."""
        distributed.agree(well=True)
        distributed.add_up(parameter.grad for parameter in self.params)

    def follow(self, plan: TrainingPlan) -> None:
        """Go on as another plan says."""
        self.plan = plan
        self.noise_multiplier, self.max_grad_norm = plan.noise_multiplier, plan.max_grad_norm
        self.expected_batch_size = plan.expected_batch_size

    def drop(self) -> None:
        """Drop every gradient and norm, clipped sums before noise too."""
        self._is_last_step_skipped = False
        self.zero_grad(set_to_none=True)
        self.forget()

    def forget(self) -> None:
        """Drop what a backward pass left for single rows."""
        for parameter in self._parameters.values():
            for name in ("grad_sample", "_norm_sample", "_current_grad_sample"):
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

    def _check_skip_next_step(self, pop_next: bool = True) -> bool:  # noqa: ARG002, FBT001, FBT002
        return not self.turn.last

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
        known = map(id, self._parameters.values())
        if self._weights != self._now() or list(known) != list(map(id, self._module.parameters())):
            raise WeightsChanged(
                "weights, or which of them are trained, were changed since the last step by"
                " something else than this optimizer; what that learned from is not accounted for"
            )

    def _now(self) -> tuple[tuple[bool, int, int], ...]:
        every = self._parameters.values()
        return tuple((p.requires_grad, p._version, p.data_ptr()) for p in every)  # noqa: SLF001

    def _samples(self, parameter: torch.Tensor) -> int:
        """Return how many samples a parameter has gradients, or their norms, of."""
        raise NotImplementedError

    def _leave_out(self) -> None:
        """Make the gradient of the row that stands in for none zero."""
        raise NotImplementedError

    def _missing(self, parameter: torch.Tensor, way: str) -> NoGradient:
        names = (name for name, each in self._parameters.items() if each is parameter)
        return NoGradient(
            f"{next(names, 'a parameter')} got no gradient {way}; freeze it"
            " with requires_grad_(False), or let the loss depend on it"
        )

    def _check_update(self, *_: object) -> None:
        """Refuse an update of the wrapped optimizer without clipping and noise."""
        if not self.turn.noised:
            raise UnmarkedStep(
                "the optimizer that was passed to make_private was stepped itself, with raw"
                " gradients; step the one that make_private returned"
            )
        self.turn.noised = False

    def _updated(self, *_: object) -> None:
        self._weights = self._now()


class HooksOptimizer(Guarded):
    """Clips a gradient for each row; one that is not finite counts as zero."""

    def _samples(self, parameter: torch.Tensor) -> int:
        gradients = getattr(parameter, "grad_sample", None)
        if gradients is None:
            raise self._missing(parameter, "in this backward pass")
        if isinstance(gradients, list):
            raise UnmarkedStep("gradients of several backward passes in one step")
        return len(gradients)

    def _leave_out(self) -> None:
        for parameter in self.params:
            parameter.grad_sample = torch.zeros_like(parameter.grad_sample)

    def clip_and_accumulate(self) -> None:
        """Clip and sum; a bound needs rows that are not finite left out."""
        before = [parameter.summed_grad for parameter in self.params]
        kept = [None if summed is None else summed.clone() for summed in before]
        super().clip_and_accumulate()
        if all(parameter.summed_grad.isfinite().all() for parameter in self.params):
            return
        finite = torch.stack(
            [gradients.flatten(1).isfinite().all(1) for gradients in self.grad_samples]
        ).all(0)
        for parameter, gradients, summed in zip(self.params, self.grad_samples, kept, strict=True):
            parameter.grad_sample = gradients.clone()
            parameter.grad_sample[~finite] = 0
            parameter.summed_grad = summed
        super().clip_and_accumulate()


class GhostOptimizer(Guarded, DPOptimizerFastGradientClipping):  # type: ignore[misc]
    """Gets sums that the module clipped in the second of two backward passes (ghost clipping)."""

    _module: Any

    def __init__(self, optimizer: Optimizer, **others: Any) -> None:
        super().__init__(optimizer, **others)
        self._sums: dict[int, torch.Tensor] = {}

    def keep(self, parameter: torch.Tensor) -> None:
        """Keep the sum that a second backward pass left, whatever becomes of the gradient."""
        if id(parameter) in self._sums:
            raise UnmarkedStep("several backward passes for one step; take one for each batch")
        if parameter.grad is not None:
            self._sums[id(parameter)] = parameter.grad.detach().clone()

    def accumulate(self) -> None:
        """Add what was kept of this part to the parts before."""
        for parameter in self.params:
            kept = self._sums.pop(id(parameter))
            before = parameter.summed_grad
            parameter.summed_grad = kept if before is None else before.add_(kept)

    def forget(self) -> None:
        """Drop what a backward pass left for single rows, and let the next one begin anew."""
        super().forget()
        getattr(self, "_sums", {}).clear()
        self._module.enable_hooks()

    def follow(self, plan: TrainingPlan) -> None:
        """Go on as another plan says, the module too."""
        super().follow(plan)
        self._module.max_grad_norm = plan.max_grad_norm

    def _samples(self, parameter: torch.Tensor) -> int:
        norms = getattr(parameter, "_norm_sample", None)
        kept = self._sums.get(id(parameter))
        if norms is None or kept is None or not self._module.hooks_enabled:
            raise self._missing(
                parameter, "from a loss of run.criterion(...), which ghost clipping needs"
            )
        if not kept.isfinite().all():
            raise NotFinite(
                "a row's gradient is not finite, and ghost clipping cannot leave the row out;"
                " use mode='hooks', where it counts as zero"
            )
        return len(norms)

    def _leave_out(self) -> None:
        for parameter in self.params:
            self._sums[id(parameter)] = torch.zeros_like(parameter)


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
