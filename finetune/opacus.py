"""DP-SGD through Opacus, with every step in the ledger.

::

    with training_run(accountant, "news", plan, unit="article") as run:   # refused here, or never
        model, optimizer, loader = run.make_private(model, optimizer, loader)
        for batch in run.batches(loader):     # one durable mark, then the batch; ends by itself
            ...                               # forward, backward, optimizer.step()

What the guard holds Opacus to:

* Poisson sampling at the plan's probability, compared in double precision. Opacus prices any
  loader as Poisson, shuffled ones too, and compares in single precision.
* The gradient sum is divided by the plan's ``expected_batch_size``. Opacus 1.6 divides by
  ``int(len(dataset) * q)``, which depends on the number of units and so tells neighboring
  datasets apart.
* A step is marked durably before its batch reaches any code that could drop it, and an update
  without a mark of its own raises before it changes the weights.
* Every batch gets its step: skipping one because of its loss would tell what was in it.
* There is one gradient for each row of the batch, and a row whose gradient is not finite counts
  as zero; otherwise clipping would not bound what a row can do. In steps 1, 2, 4, ... they are
  added up and compared with the gradient of the batch.
* Raw gradients never stay on the parameters, where another optimizer would find them.
* The whole state of the generators of sampling and noise comes from the operating system. A
  seed would not do: PyTorch's generator on the CPU uses 32 bits of it, few enough to try.

Not covered:

* The loss must be the mean over rows of a loss that depends on that row alone. A mean over
  tokens (``ignore_index``), class weights normalised over the batch, a sum over rows, in-batch
  negatives and batch statistics let one row rescale the gradients of the others before they are
  clipped. Some of them are found with ``make_private(..., loss=...)``.
* What a script does with private data besides its optimizer: printing the loss, evaluating on it,
  choosing a checkpoint by it, leaving the loop because of it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from opacus.utils.batch_memory_manager import BatchSplittingSampler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from accountant import Accountant, AccountantError, BudgetExceeded, Reservation
from dp import InvalidParameter, validate
from finetune import distributed, wrapping
from finetune.batches import PoissonSampler, made_up
from finetune.checkpoints import Checkpoint
from finetune.distributed import Steps
from finetune.errors import CheckpointInvalid, NotPoissonSampled, SkippedStep, UnmarkedStep
from finetune.models import out_of_place
from finetune.optimizers import Guarded, Turn
from finetune.plan import TrainingPlan
from finetune.selftest import same_draws_after
from finetune.supervision import Told, next_number, tell

_LOG = logging.getLogger(__name__)


@contextmanager
def training_run(
    accountant: Accountant,
    budget: str,
    plan: TrainingPlan | Sequence[TrainingPlan],
    *,
    unit: str,
    activity: str = "training",
    checkpoint: str | Path | None = None,
) -> Iterator[TrainingRun]:
    """Reserve a planned run for the length of a ``with`` block; settle what was not run.

    If the block raises after the first mark, nothing is returned: the whole plan stays spent,
    unless it is resumed from a checkpoint.

    Args:
        accountant: Of the ledger.
        budget: Name of the budget.
        plan: What will be run; several plans are run one after another, each with its own noise,
            clipping, sampling and number of steps. All of them are reserved, or none.
        unit: The privacy unit that one row of the dataset is; it must be the budget's.
        activity: What the ledger calls it.
        checkpoint: A file for :meth:`TrainingRun.save`. If it exists, the run in it is resumed:
            its reservation is adopted with the steps that are left by the ledger, whatever the
            file's age, and whoever held it before is shut out.

    Raises:
        BudgetExceeded: If the plan does not fit; ``remaining`` is the number of steps that would.
        AccountantError: As for ``Accountant.reserve`` or ``Accountant.adopt``.
        CheckpointInvalid: If the file is no checkpoint, or of a run that ended, or of another
            ledger or budget.
        PlanChanged: If the run in the file was priced for another plan.
    """
    run = _run_on_this_rank(accountant, budget, plan, unit, activity, checkpoint)
    with distributed.together(), run as entered:
        yield entered


@contextmanager
def _run_on_this_rank(
    accountant: Accountant,
    budget: str,
    plan: TrainingPlan | Sequence[TrainingPlan],
    unit: str,
    activity: str,
    checkpoint: str | Path | None,
) -> Iterator[TrainingRun]:
    plans = (plan,) if isinstance(plan, TrainingPlan) else tuple(plan)
    path = None if checkpoint is None else Path(checkpoint)
    saved = Checkpoint.read(path) if path is not None and path.exists() else None

    def claimed() -> Sequence[Reservation]:
        if path is None or saved is None:
            return _reserved(accountant, budget, plans, unit, activity)
        return saved.adopt(path, accountant, budget=budget, plans=plans, unit=unit)

    distributed.same_plans(plans)
    number = next_number()
    try:
        reservations = distributed.on_rank_0(claimed)
    except BudgetExceeded:
        tell(number, Told(budget, "refused"))
        raise
    uses = sum(each.uses for each in reservations)
    tell(number, Told(budget, "lost", 0, uses))
    with ExitStack() as stack:
        if distributed.rank() == 0:
            for reservation in reservations:
                stack.enter_context(reservation)
            holds = (reservation.holds for reservation in reservations)
            saved = saved or Checkpoint(accountant.ledger, tuple(zip(plans, holds, strict=True)))
        units = None if distributed.rank() else accountant.budget(budget).units
        run = TrainingRun(plans, reservations, path, saved, units)
        stack.callback(run.stop)
        try:
            yield run
            run.warn_if_unused()
        except GeneratorExit:
            raise  # nobody left the block: it was collected, maybe in the thread that would void it
        except BaseException as error:
            tell(number, Told(budget, "left", run.marked, uses))
            if run.marked and path is None:
                error.add_note(
                    f"All {uses} steps of the plan stay spent. With training_run(...,"
                    " checkpoint=path) the steps that are left could be taken by the next start."
                )
            if not run.marked and path is None and not distributed.rank():
                with suppress(AccountantError):  # nothing was drawn, and nobody can resume it
                    for reservation in reservations:
                        reservation.void()
            raise
        tell(number, Told(budget, "ended", run.marked, uses))


def _reserved(
    accountant: Accountant,
    budget: str,
    plans: Sequence[TrainingPlan],
    unit: str,
    activity: str,
) -> list[Reservation]:
    """Reserve all plans or none."""
    if not plans:
        raise InvalidParameter("plan", plans, "a TrainingPlan, or several")
    with ExitStack() as undo:
        reservations = []
        for plan in plans:
            reservation = accountant.reserve(
                budget,
                plan.event,
                uses=plan.steps,
                unit=unit,
                activity=activity,
                note=f"DP-SGD: expected_batch_size={plan.expected_batch_size}"
                f" max_grad_norm={plan.max_grad_norm}",
            )
            undo.callback(reservation.void)
            reservations.append(reservation)
        undo.pop_all()
    return reservations


class TrainingRun:
    """A run that was paid for; get one from :func:`training_run`."""

    def __init__(
        self,
        plans: Sequence[TrainingPlan],
        steps: Sequence[Steps],
        path: Path | None,
        saved: Checkpoint | None,
        units: int | None = None,
    ) -> None:
        self._segments = tuple(zip(plans, steps, strict=True))
        self._path, self._saved, self._units = path, saved, units
        self.turn = Turn()
        self._loader: DataLoader[Any] | None = None
        self._fresh: Callable[[TrainingPlan, int | None], Any] = lambda *_: None
        self._round: object = None
        self._model: Any = None
        self._optimizer: Guarded | None = None
        self._undo = ExitStack()
        self._ended = False

    @property
    def plan(self) -> TrainingPlan:
        """The plan whose steps are run now: the first that has some left, else the last."""
        return self._now[0]

    @property
    def reservation(self) -> Any:
        """The steps that the ledger holds for it, a :class:`accountant.Reservation`."""
        return self._now[1]

    @property
    def remaining(self) -> int:
        """Steps that can still be taken, under all plans."""
        return sum(reservation.remaining for _, reservation in self._segments)

    @property
    def steps(self) -> int:
        """Steps of all plans."""
        return sum(plan.steps for plan, _ in self._segments)

    @property
    def checkpoint(self) -> Path | None:
        """The file that :meth:`save` writes."""
        return self._path

    @property
    def marked(self) -> int:
        """Steps that were paid for, under all plans."""
        return sum(steps.marked for _, steps in self._segments)

    @property
    def _now(self) -> tuple[TrainingPlan, Steps]:
        left = (segment for segment in self._segments if segment[1].remaining)
        return next(left, self._segments[-1])

    def make_private(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        loader: DataLoader[Any],
        *,
        mode: Literal["hooks", "ghost"] = "hooks",
        loss: Callable[[nn.Module, Any], Tensor] | None = None,
    ) -> tuple[nn.Module, Optimizer, DataLoader[Any]]:
        """Return model, optimizer and loader for DP-SGD as planned.

        Args:
            model: Its trainable layers must have per-sample gradients (no batch norm); the loss
                must be the mean over rows of a per-row loss.
            optimizer: Any first-order optimizer over parameters of the model.
            loader: Gives dataset, collation and workers; its batching is replaced by Poisson
                sampling. One row of its dataset is one privacy unit.
            mode: ``hooks`` keeps a gradient for each row; ``ghost`` keeps what it is made of where
                that is smaller, as for large linear layers and embeddings.
            loss: A function of model and batch, as will be trained with. It is tried on made-up
                rows of the loader's form before anything is paid for: a model or a loss that cannot
                be trained with, or in which rows change each other's gradients, is named.

        Raises:
            NotPoissonSampled: If the dataset cannot be Poisson-sampled, or the loader has a
                sampler with a meaning of its own.
            TypeError: If the optimizer is Opacus's already, or empty batches cannot be made.
            UnsupportedSetting: If it evaluates the loss several times a step.
            UnsupportedModel: If the model cannot be trained in this mode, or not at all.
            DeclaredExceeded: If there are more rows than the budget declares units.
            RowsMixed: If ``loss`` is one in which rows change each other's gradients.
            CheckpointInvalid: If the run's checkpoint cannot be written, or is of another model.
        """
        wrapping.check_parts(optimizer, loader, mode=mode)
        if self._optimizer is not None:
            raise TypeError("this run has its model; start another run for another one")
        trained = wrapping.weights_of(model, optimizer)
        wrapping.check_units(loader, self._units)
        distributed.same_rows(loader.dataset)
        with same_draws_after():
            example = loader.dataset[0]
            tried = loss and made_up(loader.collate_fn, example, wrapping.MADE_UP)
        self._fresh, self._loader = wrapping.samples_of(loader, example, steps=self.steps)
        if self._saved is not None and self._saved.model is not None:
            self._saved.load_into(self._path or Path(), model, optimizer)
        elif self._saved is not None and self._path is not None and not distributed.rank():
            self._saved.write(self._path)  # so that a crash before the first save is not the end
        distributed.same_weights(model.state_dict().values())
        names = {id(each): name for name, each in model.named_parameters()}
        distributed.same_names([names[id(each)] for each in trained])
        if loss and tried:
            wrapping.try_loss(model, loss, tried, turn=self.turn)
        self._undo.enter_context(out_of_place(model))
        self._model = wrapping.with_row_gradients(model, mode)
        self._optimizer = Guarded(optimizer, plan=self.plan, turn=self.turn, module=self._model)

        # A function, and not a method: a copy of the model must not try to copy the run with it.
        def drop(parameter: Tensor) -> None:
            if self._optimizer is not None:
                self._optimizer.saw(parameter)

        wrapping.watch(model, self.turn, drop=drop, undo=self._undo)
        return self._model, self._optimizer, self._loader

    def batches(self, loader: DataLoader[Any], *, physical: int | None = None) -> Iterator[Any]:
        """Yield batches until the plan's steps are taken; each step is marked durably before.

        Args:
            loader: The one that :meth:`make_private` returned, or that Opacus's
                ``BatchMemoryManager`` made of it.
            physical: Most rows of a batch. A larger sample comes in parts; take
                ``optimizer.step()`` and ``zero_grad()`` for each, weights change after the last.

        Raises:
            NotPoissonSampled: If it is another loader.
            SkippedStep: If a batch got no optimizer step.
        """
        optimizer, most = self._parts(loader, physical)
        if self._ended:
            raise UnmarkedStep("the run has ended; take its batches within the with block")
        # Not of the trials of a sweep, which have nothing saved: the lines would tell how many.
        if self._round is not None and not self.remaining and self._saved is not None:
            _LOG.warning(
                "no step of the plan is left for another loop over run.batches: its steps are those"
                " of all epochs (TrainingPlan.for_units(..., epochs=...))"
            )
        self._round = now = object()
        rows: Iterator[Any] = iter(())
        sampler, now_run = PoissonSampler(0, 0.0, 0), None
        while self.remaining:
            if self._now[1] is not now_run:
                plan, now_run = self._now
                if plan is not optimizer.plan:
                    optimizer.follow(plan)
                fresh = self._fresh(plan, most)
                sampler, rows = fresh.batch_sampler, iter(fresh)
            optimizer.drop()  # what is left of a sample that was not finished
            distributed.led(self._now[1]).mark()
            self.turn.paid, self.turn.last = True, False
            while not self.turn.last:
                count, batch = next(rows)
                optimizer.forget()
                self.turn.rows, self.turn.last = count, sampler.last.popleft()
                self.turn.done = False
                optimizer.note_buffers()
                yield batch
                if self._round is not now:
                    raise NotPoissonSampled(
                        "another loop over run.batches began meanwhile; use one at a time"
                    )
                if not self.turn.done:
                    raise SkippedStep(
                        "the last batch got no optimizer step; take one for every batch, whatever"
                        " its loss, and for empty ones too"
                    )
                optimizer.check_weights()

    def save(self) -> None:
        """Write weights and optimizer state to the run's checkpoint, between two steps.

        Raises:
            CheckpointInvalid: If the run has no checkpoint, or it cannot be written.
        """
        if self._path is None or self._optimizer is None:
            raise CheckpointInvalid(
                self._path or Path(), "name one in training_run, and save after make_private"
            )
        model = {
            name.removeprefix("_module."): part for name, part in self._model.state_dict().items()
        }
        if self._saved is not None and not distributed.rank():
            state = self._optimizer.state_dict()
            replace(self._saved, model=model, optimizer=state).write(self._path)

    def warn_if_unused(self) -> None:
        """Log a warning if nothing was guarded by this run, and what its block trained was not."""
        if self._optimizer is None and not self.marked:
            _LOG.warning(
                "no model was made private in this run, so what was trained in its block was not"
                " guarded; use run.make_private and run.batches, transformers.guarded(Trainer, run)"
                " or lightning.fit"
            )

    def stop(self) -> None:
        """Drop every gradient, clipped sums before noise too, and every hook."""
        self.turn.paid = self.turn.noised = False
        self._undo.close()
        self._ended = True
        if self._optimizer is not None:
            self._optimizer.release()
            self._model.remove_hooks()

    def _parts(self, loader: DataLoader[Any], physical: int | None) -> tuple[Guarded, int | None]:
        sampler, own = loader.batch_sampler, self._loader
        if (
            own is not None
            and isinstance(sampler, BatchSplittingSampler)
            and sampler.sampler is own.batch_sampler
        ):
            physical, loader = physical or sampler.max_batch_size, own
        if loader is not own or self._optimizer is None:
            raise NotPoissonSampled(
                "these batches are not the Poisson samples that were priced; iterate over the"
                " loader that make_private returned (a shuffled loader has no amplification)"
            )
        return self._optimizer, None if physical is None else validate.count(physical=physical)
