"""The server of workers, and what the fault tests read from them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


class Workers:
    """Starts workers, reads what they said, kills them."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("workers.py"))],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def start(
        self,
        folder: Path,
        mode: str,
        *,
        processes: int,
        threads: int,
        asks: int,
        bytes: int = 0,
        location: str | None = None,
        **more: object,
    ) -> dict:
        """Start workers on one ledger at the same moment; return their files by process id."""
        go = folder / "go"
        outs = dict(
            self.send(
                folder,
                mode,
                number,
                location=location or str(folder / "ledger.db"),
                go=str(go),
                threads=threads,
                asks=asks,
                bytes=bytes,
                **more,
            )
            for number in range(processes)
        )
        wait_for(lambda: all("ready" in said(out) for out in outs.values()))
        soon = go.with_suffix(".soon")
        soon.write_text(f"{time.time() + 0.3}")
        soon.rename(go)
        return outs

    def send(self, folder: Path, mode: str, number: int = 0, **task: object) -> tuple[int, Path]:
        """Start one worker; return its process id and its file."""
        out = folder / f"out-{mode}-{number}"
        task |= {"mode": mode, "out": str(out), "state": os.environ["EPSLEDGER_STATE"]}
        self._server.stdin.write(json.dumps(task) + "\n")
        self._server.stdin.flush()
        return int(self._server.stdout.readline()), out

    def gone(self, worker: int) -> None:
        """Wait until a worker has ended by itself."""
        wait_for(lambda: not alive(worker))

    def kill(self, worker: int) -> None:
        """``kill -9``, and wait until it is gone."""
        os.kill(worker, signal.SIGKILL)
        wait_for(lambda: not Path(f"/proc/{worker}").exists() and not alive(worker))

    def stop(self) -> None:
        """Kill the server with everything it started, and check that nothing is left."""
        os.killpg(self._server.pid, signal.SIGKILL)
        self._server.communicate()
        wait_for(lambda: not group_alive(self._server.pid))


def alive(worker: int) -> bool:
    try:
        os.kill(worker, 0)
    except ProcessLookupError:
        return False
    return True


def group_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def wait_for(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.002)


def said(out: Path) -> list[str]:
    """The whole lines that a worker wrote."""
    return out.read_text().split("\n")[:-1] if out.exists() else []


@pytest.fixture(scope="session")
def workers():
    workers = Workers()
    yield workers
    workers.stop()


@pytest.fixture(scope="session")
def lines_of():
    return said


@pytest.fixture(scope="session")
def wait():
    return wait_for
