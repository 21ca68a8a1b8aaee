"""Exit codes of the command: an error's business ends where the library's does.

====  ==========================================================
0     done
1     an error; the message says what, where and what to do
2     the command line is wrong (click's own)
3     refused: it does not fit the budget
4     ``verify`` found a contradiction
5     ``run`` found no guarded run in the script
====  ==========================================================
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import click

from accountant import AccountantError, BudgetExceeded
from dp import DPError
from reports import ReportError

REFUSED = 3
CONTRADICTION = 4
UNGUARDED = 5


class _Refused(click.ClickException):
    exit_code = REFUSED


@contextmanager
def told() -> Iterator[None]:
    """Turn the library's errors into a message and an exit code."""
    try:
        yield
    except BudgetExceeded as error:
        raise _Refused(str(error)) from error
    except (AccountantError, DPError, ReportError, ImportError) as error:
        raise click.ClickException(str(error)) from error
