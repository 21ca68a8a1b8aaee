"""Which process this is: a fork is another one, even where it has its parent's number.

In a new process namespace a child may have the number of its parent.
"""

from __future__ import annotations

import os

_forks = 0


def _forked() -> None:
    global _forks  # noqa: PLW0603 - the only thing a child must know
    _forks += 1


os.register_at_fork(after_in_child=_forked)


def process() -> tuple[int, int]:
    """Return what tells this process from those it was forked from, and those forked from it.

    >>> process() == process()
    True
    """
    return os.getpid(), _forks
