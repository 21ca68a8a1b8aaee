"""Hyper-parameter search with a private winner: many guarded trials, one charge.

::

    def train(run, rate):                     # one trial; a new model every time
        model = Net()
        optimizer = SGD(model.parameters(), lr=rate)
        private, optimizer, loader = run.make_private(model, optimizer, DataLoader(rows))
        for batch in run.batches(loader):
            ...                               # as in training_run
        return model

    best = sweep(accountant, "news", [(plan, 0.1), (plan, 0.5)], train, accuracy_on_public_rows,
                 select=lambda trial: RepeatAndSelect(trial, eta=1.0, gamma=0.1),
                 score_event=None, unit="article")

A secret number K of trials is run, each with a candidate that is drawn uniformly, and only the
trial with the best score comes back. That is one event, whose cost hardly grows with the mean of
K (Papernot and Steinke, "Hyperparameter Tuning with Renyi Differential Privacy", 2022, Theorems 2
and 6; after Liu and Talwar, "Private Selection from Private Candidates", 2019). To fit 500 steps
of sampling probability 0.01 into (8, 1e-6), one run needs a noise multiplier of 0.65; a sweep of
10 trials on average 0.72, of 100 trials 0.83; 10 runs that are all paid for 0.82, and 100 runs
1.74. It pays where one trial is a good part of the budget: for a trial of 3 percent of it, the
same sweep of 10 takes 23. ``adaptive`` budgets have a price for it, ``planned`` ones have none.

Why the one charge pays for every trial: it is durable before the first trial, and the trials are
independent runs of one mechanism, whose cost is in the event. Each is held to its plan by the
guard of :mod:`finetune.opacus`, with its steps counted in memory: they are paid for, and a
durable mark for each of them would publish K. A candidate with fewer steps than the dearest
costs no more than that one at any Renyi order, and so does a draw among such candidates. A trial
that raises ends the sweep, which then releases nothing: it outranks every score. A sweep whose
trials are all looked at has to pay for all of them; that is several runs of ``training_run``.

Not covered, because no code here can see it:

* K. It is drawn from the operating system's entropy, and is in no result, entry or log of this
  module. How long a sweep takes (the times of ledger entries before and after it too), what it
  draws of power or memory, and what ``train`` prints, logs, saves or charges tell K to whoever
  sees it, and the price is then no bound. So does the moment at which a trial raises.
* Independence. Whatever ``train`` or ``score`` keep from one call to the next (a copy of a model,
  a learning rate that worked, Bayesian optimization) voids the theorem. The same model again is
  refused.
* The score. It may use public rows, and what the trial released; private rows only with the noise
  that ``score_event`` is the price of. Choosing candidates by looking at private rows is outside.
"""

from __future__ import annotations

import math
import random
import secrets
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from decimal import Context, Decimal, localcontext
from itertools import count, repeat
from typing import Any, Generic, NoReturn, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from accountant import Accountant, BudgetExceeded, Receipt, ReservationError
from accountant.forks import process
from dp import (
    Composed,
    Event,
    InvalidParameter,
    RepeatAndSelect,
    RepeatAndSelectPoisson,
    Repeated,
)
from finetune.distributed import ranks
from finetune.errors import SkippedStep, UnsupportedModel
from finetune.opacus import TrainingRun
from finetune.plan import TrainingPlan
from finetune.supervision import Told, next_number, tell

Settings = TypeVar("Settings")
Release = TypeVar("Release")
Selection = RepeatAndSelect | RepeatAndSelectPoisson
Select = Callable[[Event], Selection]
"""Makes the event of a sweep from that of one trial, and so says how K is drawn."""

_PRECISION = Context(prec=100)


@dataclass(frozen=True, slots=True)
class Winner(Generic[Settings, Release]):
    """The best trial of a sweep: all of the sweep that may be released.

    Attributes:
        plan: What it was trained with.
        settings: Likewise.
        score: Its score; ``-inf`` if that was no number.
        release: What ``train`` returned.
    """

    plan: TrainingPlan
    settings: Settings
    score: float
    release: Release


def sweep_event(
    candidates: Sequence[tuple[TrainingPlan, Settings]],
    select: Select,
    *,
    score_event: Event | None,
) -> Selection:
    """Return what a sweep costs, as one event; for ``uses_that_fit`` and ``share_after``, too.

    Args:
        candidates: As for :func:`sweep`.
        select: As for :func:`sweep`.
        score_event: As for :func:`sweep`.

    Raises:
        InvalidParameter: If there is no candidate, their steps differ in sampling probability or
            noise, or ``select`` returns another event.

    >>> plan = TrainingPlan(2.0, 0.01, steps=100, expected_batch_size=10)
    >>> sweep_event([(plan, None)], lambda e: RepeatAndSelectPoisson(e, 10.0), score_event=None)
    ... # doctest: +NORMALIZE_WHITESPACE
    RepeatAndSelectPoisson(event=Repeated(event=PoissonSampled(sampling_probability=0.01,
        event=Gaussian(noise_multiplier=2.0)), count=100), mean=10.0)
    """
    steps = {plan.event for plan, _ in candidates}
    if len(steps) != 1:
        raise InvalidParameter(
            "candidates", candidates, "of one sampling probability and noise multiplier"
        )
    trial: Event = Repeated(steps.pop(), max(plan.steps for plan, _ in candidates))
    if score_event is not None:
        trial = Composed((trial, score_event))
    event = select(trial)
    if not isinstance(event, Selection) or event.event != trial:
        raise InvalidParameter(
            "select", event, "RepeatAndSelect or RepeatAndSelectPoisson of the trial it is given"
        )
    return event


def sweep(
    accountant: Accountant,
    budget: str,
    candidates: Sequence[tuple[TrainingPlan, Settings]],
    train: Callable[[TrainingRun, Settings], Release],
    score: Callable[[Release], float],
    *,
    select: Select,
    score_event: Event | None,
    unit: str,
    activity: str = "training/sweep",
) -> Winner[Settings, Release] | None:
    """Charge a whole sweep, run a secret number of trials, and return the best.

    The winner, with its score and settings, is as private as the event of the sweep says, for one
    privacy unit under add/remove. It does not cover what the head of this module lists.

    The global generators of torch, numpy and ``random`` are seeded afresh by the operating system
    before each trial and at the end: otherwise a known seed would number the trials.

    Args:
        accountant: Of the ledger.
        budget: Name of the budget.
        candidates: Plans with settings of any kind; fixed, and not chosen by looking at private
            data. Plans may differ in steps (the price is of most), clipping norm and batch size.
        train: Runs one trial: trains a new model with ``run.make_private`` and ``run.batches``
            until the plan's steps are taken, and returns what is released if it wins. It must
            charge, log and keep nothing.
        score: Of what ``train`` returned; the highest wins, and of equal ones the first.
        select: How K is drawn: makes a :class:`dp.RepeatAndSelect` or
            :class:`dp.RepeatAndSelectPoisson` of the event of a trial.
        score_event: What one score costs. None says that it uses no private rows. Otherwise it
            has the noise of this event in it; sensitivity is that of the rows' budget, this one.
        unit: The privacy unit that one row of the dataset is; it must be the budget's.
        activity: What the ledger calls it.

    Returns:
        The best trial; None if K was 0, as it may be if Poisson distributed.

    Raises:
        BudgetExceeded: If the sweep does not fit, or is planned for other events; nothing was run.
        UnsupportedEvent: If the score's event has a delta of its own, or no price in a trial.
        AccountantError: As for ``Accountant.charge``.
        InvalidParameter: As for :func:`sweep_event`, or if several processes train together.
        SkippedStep: If a trial left steps of its plan undone. As after any error in a trial, the
            whole sweep stays spent, and nothing of it may be released.

    >>> import accountant, dp
    >>> plan = TrainingPlan(4.0, 0.5, steps=2, expected_batch_size=2)
    >>> def train(run, rate):
    ...     model = torch.nn.Linear(1, 1)
    ...     _, optimizer, loader = run.make_private(
    ...         model, torch.optim.SGD(model.parameters(), lr=rate),
    ...         torch.utils.data.DataLoader(torch.ones(4, 1)),
    ...     )
    ...     for rows in run.batches(loader):
    ...         model(rows).mean().backward()
    ...         optimizer.step()
    ...         optimizer.zero_grad()
    ...     return model.weight.item()
    >>> with accountant.Accountant.open("memory:") as books:
    ...     _ = books.create_budget("news", dp.adaptive(8.0, 1e-6), unit="article")
    ...     best = sweep(
    ...         books, "news", [(plan, 0.1), (plan, 0.5)], train, lambda weight: -weight,
    ...         select=lambda trial: RepeatAndSelect(trial, eta=1.0, gamma=0.5),
    ...         score_event=None, unit="article",
    ...     )
    ...     books.statement("news").activities[0].uses
    1
    >>> best.settings in (0.1, 0.5)
    True
    """
    candidates = tuple(candidates)
    event = sweep_event(candidates, select, score_event=score_event)
    if ranks() > 1:
        raise InvalidParameter("processes", ranks(), "1: each would draw a K of its own")
    number = next_number()
    try:
        receipt = accountant.charge(
            budget,
            event,
            unit=unit,
            activity=activity,
            note=f"DP-SGD: best of a secret number of trials, candidates={len(candidates)}",
        )
    except BudgetExceeded:
        tell(number, Told(budget, "refused"))
        raise
    tell(number, Told(budget, "ended", 1, 1))  # once: what is told must not depend on K
    best: Winner[Settings, Release] | None = None
    this = object()
    try:
        for _ in repeat(None, _number(event)):  # no variable that a traceback would show
            _seed_afresh()
            run = _Trial(*secrets.choice(candidates), receipt, this)
            best = _better(best, run.winner(train, score))
    except BaseException:
        best = None  # a traceback shows locals
        raise
    finally:
        _seed_afresh()
    return best


_trained: MutableMapping[Tensor, object] = WeakIdKeyDictionary()
"""Weights that were trained in a sweep, and in which."""


class _Trial(TrainingRun):
    """One run of a sweep."""

    def __init__(self, plan: TrainingPlan, settings: Any, receipt: Receipt, of: object) -> None:
        self._paid = _PaidSteps(plan.steps, receipt)
        super().__init__((plan,), (self._paid,), None, None)
        self._settings, self._sweep = settings, of

    def make_private(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Refuse weights of another trial: they would depend on it, and go on being trained."""
        weights = [each for each in model.parameters() if each.requires_grad]
        if any(_trained.get(each) is self._sweep for each in weights):
            raise UnsupportedModel(
                "train trained this model in an earlier trial; let it make a new one every time"
            )
        made = super().make_private(model, *args, **kwargs)
        _trained.update(dict.fromkeys(weights, self._sweep))
        return made

    def winner(
        self, train: Callable[[Any, Any], Release], score: Callable[[Release], float]
    ) -> Winner[Any, Release]:
        """Run the trial; return it as if it had won."""
        release: Release | None = None
        try:
            try:
                release = train(self, self._settings)
                if self.remaining:
                    raise SkippedStep("the trial left steps of its plan undone; take all of them")
            finally:
                self.stop()
            return Winner(self.plan, self._settings, _number_or_least(score(release)), release)
        except BaseException:
            release = None  # a sweep that ends by an error releases nothing
            raise

    def stop(self) -> None:
        """End the trial, whatever is left of it."""
        self._paid.end()
        super().stop()


def _better(best: Winner[Any, Release] | None, trial: Winner[Any, Release]) -> Winner[Any, Release]:
    return trial if best is None or trial.score > best.score else best


def _number_or_least(score: float) -> float:
    return -math.inf if math.isnan(score) else float(score)


class _PaidSteps:
    """The steps of one trial, marked in memory: the charge of the sweep has paid for them."""

    def __init__(self, steps: int, receipt: Receipt) -> None:
        self.uses, self.marked, self.receipt = steps, 0, receipt
        self._process, self._open = process(), True

    @property
    def remaining(self) -> int:
        return self.uses - self.marked if self._open else 0

    def mark(self) -> Receipt:
        if process() != self._process:
            raise ReservationError("a trial belongs to the process that runs the sweep")
        if not self.remaining:
            raise ReservationError("the trial has ended, or all steps of its plan are taken")
        self.marked += 1
        return self.receipt

    def end(self) -> None:
        self._open = False

    def __reduce__(self) -> NoReturn:
        raise ReservationError("a trial belongs to the process that runs the sweep: no copies")


def _number(event: Selection) -> int:
    """Draw K; its distribution function is met to 2**-127 everywhere."""
    with localcontext(_PRECISION):
        left = Decimal(secrets.randbits(128)) / 2**128
        for number, mass in _masses(event):
            left -= mass
            if left < 0:
                return number
    raise AssertionError  # pragma: no cover - the masses go on for ever


def _masses(event: Selection) -> Iterator[tuple[int, Decimal]]:
    """Yield every possible K with its probability (Papernot and Steinke 2022, Definition 1)."""
    if isinstance(event, RepeatAndSelectPoisson):
        mean = Decimal(event.mean)
        mass = (-mean).exp()
        for number in count():
            yield number, mass
            mass *= mean / (number + 1)
    else:
        eta, gamma = Decimal(event.eta), Decimal(event.gamma)
        power = -eta * gamma.ln()
        norm = -gamma.ln() if abs(power) < Decimal("1e-40") else (power.exp() - 1) / eta
        mass = (1 - gamma) / norm
        for number in count(1):
            yield number, mass
            mass *= (1 - gamma) * (number + eta) / (number + 1)


def _seed_afresh() -> None:
    torch.seed()
    np.random.seed()  # noqa: NPY002 - the generator that collate functions and transforms use
    random.seed()
