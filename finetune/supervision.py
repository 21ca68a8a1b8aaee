"""What a supervised script tells its supervisor: which guarded runs it had, and how they ended.

``epsledger run -- python train.py`` starts a script with ``EPSLEDGER_SUPERVISED`` set to a file.
Guarded runs add lines to it. The supervisor guards nothing itself: a script in which it finds no
line was not guarded, whatever else it did.
"""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from pathlib import Path

VARIABLE = "EPSLEDGER_SUPERVISED"


_numbers = itertools.count()


def next_number() -> int:
    """Return a number for one more run in this process."""
    return next(_numbers)


@dataclass(frozen=True, slots=True)
class Told:
    """One guarded run.

    Attributes:
        budget: Name of its budget.
        outcome: ``ended``, ``left`` by an error (it can be resumed), or ``refused``; ``lost`` if
            its process did not live to say.
        marked: Steps that it paid for, as far as it told.
        uses: Steps that were reserved.
    """

    budget: str
    outcome: str
    marked: int = 0
    uses: int = 0


def tell(run: int, told: Told) -> None:
    """Tell the supervisor, if there is one, about the run of this number in this process."""
    path = os.environ.get(VARIABLE)
    if path:
        line = f"{os.getpid()}-{run}\t{told.budget}\t{told.outcome}\t{told.marked}\t{told.uses}\n"
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(line)


def heard(path: Path) -> tuple[Told, ...]:
    """Return the last that was told about each run.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     os.environ[VARIABLE] = f"{folder}/told"
    ...     tell(0, Told("news", "lost", 0, 9))
    ...     tell(0, Told("news", "ended", 9, 9))
    ...     heard(Path(os.environ.pop(VARIABLE)))
    (Told(budget='news', outcome='ended', marked=9, uses=9),)
    """
    found: dict[str, Told] = {}
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for line in lines:
        run, budget, outcome, marked, uses = line.split("\t")
        found[run] = Told(budget, outcome, int(marked), int(uses))
    return tuple(found.values())
