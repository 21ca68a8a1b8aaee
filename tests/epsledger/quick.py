"""Scripts that start at once: a server imports torch, and forks a process for each script.

``python -IS quick.py SOCKET SCRIPT ARGUMENT...`` is to ``epsledger run`` what ``python SCRIPT
ARGUMENT...`` is: it hands environment, folder and standard files over, and ends as the script did.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys


def client(address: str, *argv: str) -> None:
    """Have the server run a script; end as it ended."""
    task = {"argv": argv, "environment": dict(os.environ), "folder": os.getcwd()}  # noqa: PTH109
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        socket.send_fds(server, [f"{json.dumps(task)}\n".encode()], [0, 1, 2])
        code = os.waitstatus_to_exitcode(int(server.makefile().readline()))
    if code < 0:
        os.kill(os.getpid(), -code)
        signal.pause()
    os._exit(code)


def script(task: dict, files: list[int]) -> None:
    """Become the script."""
    import runpy

    for number, file in enumerate(files):
        os.dup2(file, number)
    os.environ.clear()
    os.environ.update(task["environment"])
    os.chdir(task["folder"])
    sys.argv, code = task["argv"], 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
    except BaseException:  # noqa: BLE001
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def serve(address: str) -> None:
    import torch._dynamo  # noqa: F401 - what the first optimizer imports

    from finetune import training_run  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel collects the handlers
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen(16)
        print("ready", flush=True)
        while True:
            asked, _ = server.accept()
            if os.fork():
                asked.close()
                continue
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            words, files, _, _ = socket.recv_fds(asked, 1 << 20, 3)
            while not words.endswith(b"\n"):
                words += asked.recv(1 << 20)
            process = os.fork()
            if not process:
                script(json.loads(words), files)
            asked.sendall(b"%d\n" % os.waitpid(process, 0)[1])
            os._exit(0)


if __name__ == "__main__":
    serve(sys.argv[2]) if sys.argv[1] == "serve" else client(*sys.argv[1:])
