"""Charge while files may not grow, and again when they may; print what was raised.

A program of its own, because the limit holds for every file of a process. The limit is real:
the kernel refuses the write (``RLIMIT_FSIZE``), as it would on a full disk.
"""

from __future__ import annotations

import json
import resource
import signal
import sys

from accountant import Accountant
from dp import PureDP


def main(location: str) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with Accountant.open(location) as accountant:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        full = _raised(accountant)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        print(json.dumps([full, _raised(accountant)]))


def _raised(accountant: Accountant) -> list[str]:
    try:
        accountant.charge("tips", PureDP(0.001), unit="article", activity="x")
    except Exception as error:  # noqa: BLE001
        return [type(error).__name__, str(error)]
    return ["nothing", ""]


if __name__ == "__main__":
    main(sys.argv[1])
