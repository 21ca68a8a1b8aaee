"""Errors of guarded fine-tuning.

::

    FinetuneError
    ├── NotPoissonSampled   batches that were not drawn as the plan's price assumes
    ├── UnmarkedStep        an update that no durable mark paid for
    ├── SkippedStep         a batch that was paid for and then dropped
    ├── UnitsMixed          gradients that are not one for each row of the batch
    ├── RowsMixed           a loss in which rows change each other's gradients
    ├── NoGradient          a trainable parameter that the loss does not reach
    ├── NotFinite           a row without a finite gradient, where it cannot be left out
    ├── PeerFailed          another process of the run could not go on
    ├── WeightsChanged      weights that something else than the guarded optimizer changed
    ├── UnsupportedModel    a model that cannot be trained in this mode, or not at all
    ├── UnsupportedSetting  a setting of a trainer under which the guarantee would not hold
    ├── PlanChanged         noise, clipping or normaliser are not those of the plan
    ├── UnitIdsInvalid      ids that do not say whose each row is
    ├── DeclaredExceeded    more units, or rows of one, than declared
    └── CheckpointInvalid   a file that no run can be resumed from, or saved to
"""

from __future__ import annotations

from pathlib import Path

from dp.errors import FactualError


class FinetuneError(FactualError):
    """Base class of every error raised by :mod:`finetune`."""


class NotPoissonSampled(FinetuneError, ValueError):
    """Batches would not come from fresh Poisson samples; shuffling is not Poisson sampling."""


class UnmarkedStep(FinetuneError, RuntimeError):
    """An optimizer step without a mark of its own; the weights were not changed."""


class SkippedStep(FinetuneError, RuntimeError):
    """The last batch got no optimizer step; leaving one out because of its data reveals it."""


class UnitsMixed(FinetuneError, ValueError):
    """A layer saw another number of samples than the batch has rows; nothing was updated."""


class RowsMixed(FinetuneError, ValueError):
    """The gradient of one row depends on other rows, so clipping does not bound what a row does.

    Attributes:
        change: By how much it changed, over the median norm of the rows' gradients.
    """

    def __init__(self, message: str, change: float) -> None:
        super().__init__(message)
        self.change = change


class NoGradient(FinetuneError, ValueError):
    """A trainable parameter got no gradient; nothing was updated."""


class NotFinite(FinetuneError, ValueError):
    """A row has no finite gradient, where it cannot be left out; nothing was updated."""


class PeerFailed(FinetuneError, RuntimeError):
    """Another process of a distributed run could not go on; nothing was updated on any."""


class WeightsChanged(FinetuneError, RuntimeError):
    """Weights were changed between two steps by something that is not accounted for."""


class UnsupportedModel(FinetuneError, ValueError):
    """The model cannot be trained with DP-SGD in the mode that was asked for."""


class PlanChanged(FinetuneError, ValueError):
    """The optimizer no longer does what was priced; the weights were not changed.

    Attributes:
        name: The parameter.
        planned: Its value in the plan.
        actual: Its value now.
    """

    def __init__(self, name: str, planned: object, actual: object) -> None:
        super().__init__(
            f"{name} is {actual!r}, the plan that was priced says {planned!r};"
            " start a new run with a new plan"
        )
        self.name, self.planned, self.actual = name, planned, actual


class CheckpointInvalid(FinetuneError, ValueError):
    """A run cannot be resumed from a file, or saved to it.

    Attributes:
        path: The file.
        reason: Why.
    """

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"checkpoint {path}: {reason}")
        self.path, self.reason = path, reason


class UnitIdsInvalid(FinetuneError, ValueError):
    """The ids do not say which unit each row belongs to.

    Attributes:
        row: Position of the row, or None.
        reason: What is wrong, and what to do.
    """

    def __init__(self, reason: str, row: int | None = None) -> None:
        super().__init__(reason if row is None else f"row {row}: {reason}")
        self.row, self.reason = row, reason


class DeclaredExceeded(FinetuneError, ValueError):
    """The data has more than was declared in public; how much more is private and not told.

    Attributes:
        what: What was counted.
        declared: The public number.
    """

    def __init__(self, what: str, declared: int, instead: str) -> None:
        super().__init__(f"the data has more than the declared {declared} {what}; {instead}")
        self.what, self.declared = what, declared


class UnsupportedSetting(FinetuneError, ValueError):
    """A setting of a trainer under which the guarantee would not hold; nothing was trained.

    Attributes:
        name: The setting.
        value: Its value.
        advice: What to do.
    """

    def __init__(self, name: str, value: object, advice: str) -> None:
        super().__init__(f"{name}={value!r} cannot be used under guard: {advice}")
        self.name, self.value, self.advice = name, value, advice
