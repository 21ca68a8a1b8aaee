"""``epsledger run``: what it says of scripts that are guarded, refused, killed, or unaware."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from accountant import Accountant
from dp import adaptive

EPSLEDGER = (sys.executable, "-m", "epsledger")
QUICK = Path(__file__).with_name("quick.py")
SCRIPT = textwrap.dedent("""
    import os, signal, sys, warnings
    warnings.simplefilter("ignore")
    import torch
    from torch.utils.data import DataLoader, TensorDataset
    from accountant import Accountant, BudgetExceeded
    from finetune import TrainingPlan, training_run

    steps, how = int(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    rows = TensorDataset(torch.randn(50, 3), torch.randint(0, 2, (50,)))
    plan = TrainingPlan.for_units(50, expected_batch_size=5, noise_multiplier=1.0, steps=steps)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Accountant.open(os.environ["EPSLEDGER_LEDGER"], create=False) as accountant:
        if how == "nothing":  # entered, and nothing was trained under it
            with training_run(accountant, "b", plan, unit="row"):
                sys.exit(0)
        if how == "second":  # one that is paid for, then one that is refused
            with training_run(accountant, "b", plan, unit="row") as run:
                guarded = run.make_private(model, optimizer, DataLoader(rows))
                for x, y in run.batches(guarded[2]):
                    torch.nn.functional.cross_entropy(guarded[0](x), y).backward()
                    guarded[1].step()
                    guarded[1].zero_grad()
            plan = TrainingPlan.for_units(
                50, expected_batch_size=5, noise_multiplier=1.0, steps=99_999
            )
        if how in ("caught", "second"):
            try:
                training_run(accountant, "b", plan, unit="row").__enter__()
            except BudgetExceeded:
                sys.exit(0)
        with training_run(accountant, "b", plan, unit="row") as run:
            model, optimizer, loader = run.make_private(model, optimizer, DataLoader(rows))
            for number, (x, y) in enumerate(run.batches(loader)):
                torch.nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
                if number == 1 and how == "break":
                    break
                if number == 1 and how == "raise":
                    raise SystemExit(7)
                if number == 1 and how == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
""")


def run_under(location, *command: str, more: tuple[str, ...] = ()) -> tuple[int, str]:
    """Run a command under supervision; return exit code and what was said."""
    done = subprocess.run(
        [*EPSLEDGER, "run", "--ledger", str(location), *more, "--", *command],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    return done.returncode, done.stderr


def with_budget(folder):
    """Return the location of a ledger with a budget, and a script that trains under it."""
    location, script = folder / "ledger.db", folder / "train.py"
    with Accountant.open(location) as accountant:
        accountant.create_budget("b", adaptive(8.0, 1e-5), unit="row")
    script.write_text(SCRIPT)
    return location, str(script)


def spent(location):
    with Accountant.open(location) as accountant:
        return sum(uses for _, uses in accountant.statement("b").spent)


CASES = (
    ("3", "end", 0, "budget 'b': 3 of 3 steps paid", 3),
    ("9", "break", 0, "budget 'b': 2 of 9 steps paid, the rest returned", 2),
    ("9", "raise", 7, "left by an error: all 9 steps stay spent", 9),
    ("9", "kill", 128 + signal.SIGKILL, "its process died: all 9 steps stay spent", 9),
    ("9", "nothing", 5, "this run was not guarded: no step", 0),
    ("99999", "caught", 3, "budget 'b': refused: it does not fit", 0),
    ("3", "second", 3, "budget 'b': refused: it does not fit", 3),
    ("99999", "end", 3, "budget 'b': refused: it does not fit", 0),
)


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """What runs a script in place of an interpreter that has to import torch first."""
    address = str(tmp_path_factory.mktemp("quick") / "socket")
    with subprocess.Popen(
        [sys.executable, str(QUICK), "serve", address],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
        yield sys.executable, "-IS", str(QUICK), address
        server.kill()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory, python):
    """Run the script in all ways at once, each with a ledger of its own."""

    def outcome(case):
        location, script = with_budget(tmp_path_factory.mktemp(case[1]))
        return *run_under(location, *python, script, *case[:2]), spent(location)

    with ThreadPoolExecutor(4) as pool:
        return dict(zip(CASES, pool.map(outcome, CASES), strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[1]}-{case[0]}")
def test_a_guarded_script(outcomes, case):
    _, _, code, words, paid = case
    found, said, uses = outcomes[case]
    assert (found, uses) == (code, paid), said
    assert words in said


@pytest.fixture
def run(tmp_path):
    location, _ = with_budget(tmp_path)
    return partial(run_under, location)


def test_a_script_that_guards_nothing_fails_though_it_ends_well(run):
    code, said = run(sys.executable, "-c", "print('trained')")
    assert code == 5
    assert "this run was not guarded" in said


def test_no_two_runs_of_one_name(run):
    inner = [*EPSLEDGER, "run", "--name", "n", "--", sys.executable]
    code, said = run(*inner, "-c", "", more=("--name", "n"))
    assert code == 5
    assert "run 'n' is running on this machine" in said
    assert "running on this machine" not in run(sys.executable, "-c", "", more=("--name", "n"))[1]


def test_a_command_that_is_not_there(run):
    code, said = run("no-such-program")
    assert code == 1
    assert "no-such-program: No such file" in said


WAITS = textwrap.dedent("""
    import signal, sys, time
    def stop(*_):
        time.sleep(0.5)
        sys.stderr.write("saved\\n")
        sys.exit(0)
    signal.signal(int(sys.argv[1]), stop)
    sys.stderr.write("ready\\n")
    sys.stderr.flush()
    time.sleep(60)
""")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_are_the_scripts_to_handle(location, tmp_path, number):
    script = tmp_path / "waits.py"
    script.write_text(WAITS)
    command = [*EPSLEDGER, "run", "--ledger", str(location), "--name", "waits", "--"]
    with subprocess.Popen(
        [*command, sys.executable, str(script), str(int(number))],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as process:
        assert process.stderr is not None
        while "ready" not in process.stderr.readline():
            pass
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does
        else:
            process.send_signal(number)
        said = process.stderr.read()
    assert "saved" in said
    assert "this run was not guarded" in said


def test_a_run_within_a_run_is_heard_by_both(tmp_path):
    """And the script by an interpreter of its own."""
    location, script = with_budget(tmp_path)
    inner = [*EPSLEDGER, "run", "--ledger", str(location), "--", sys.executable, script]
    code, said = run_under(location, *inner, "3", "end")
    assert code == 0
    assert said.count("3 of 3 steps paid") == 2
