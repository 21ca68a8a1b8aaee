"""A real primary with a real standby: the primary dies, the standby takes its place.

An asynchronous standby that was cut off is promoted without the last acknowledged charges, and
gives their budget back. The clients that saw them refuse to go on. Controls: a machine that saw
nothing finds the promoted server clean, and says that rollback was not checked; with a
synchronous standby nothing is acknowledged that the standby has not, so nothing is lost.
"""

from __future__ import annotations

import subprocess
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import psycopg
import pytest

from accountant import Accountant, LedgerError, LedgerUnavailable, OutcomeUnknown
from dp import PureDP, pure

ONE, ASK = PureDP(1.0), {"unit": "article", "activity": "survey"}


class Pair:
    """A primary and its streaming standby, each behind a socket in a folder of its own."""

    def __init__(self, package, folder: Path) -> None:
        self.primary, self.standby = folder / "primary", folder / "standby"
        self._server = package.get_server(self.primary, cleanup_mode=None)
        self._info = self._server.get_postmaster_info()
        address = ("-h", str(self._info.socket_dir), "-U", "postgres")
        folder.chmod(0o777)  # the standby's files are the server user's
        self.run("pg_basebackup", *address, "-D", str(self.standby), "-R", "-c", "fast")
        self.sockets = folder / "sockets"
        self.sockets.mkdir()
        self.sockets.chmod(0o777)

    def run(self, program: str, *arguments: str) -> None:
        subprocess.run(
            [str(self._server.bin_path / program), *arguments],
            user=self._server.system_user,
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            timeout=60,
        )

    def url(self, sockets: Path | None = None, *, driver: str = "+psycopg") -> str:
        return f"postgresql{driver}://postgres@/postgres?host={sockets or self._info.socket_dir}"

    def ask(self, statement: str, sockets: Path | None = None):
        with psycopg.connect(self.url(sockets, driver=""), autocommit=True) as connection:
            cursor = connection.execute(statement)
            return cursor.fetchone() if cursor.description else None

    def control(self, data: Path, *arguments: str) -> None:
        self.run("pg_ctl", "-w", "-D", str(data), "-l", str(data / "log"), *arguments)

    def start_standby(self, sockets: Path) -> None:
        self.control(self.standby, "-o", f"-h '' -k {sockets}", "start")

    def wait(self, condition) -> None:
        deadline = time.monotonic() + 120
        while not condition():
            assert time.monotonic() < deadline, "waited too long"
            time.sleep(0.02)

    def wait_for_stream(self) -> None:
        self.wait(lambda: self.ask("SELECT count(*) FROM pg_stat_replication") == (1,))

    def wait_for_replay(self) -> None:
        self.wait(
            lambda: (
                self.ask("SELECT pg_current_wal_lsn() <= replay_lsn FROM pg_stat_replication")
                == (True,)
            )
        )

    def cut_standby(self) -> None:
        self.control(self.standby, "-m", "fast", "stop")

    def fail_over(self) -> None:
        """Kill the primary at once, and promote the standby behind the primary's socket."""
        self.control(self.primary, "-m", "immediate", "stop")
        with suppress(subprocess.CalledProcessError):  # it was cut off before
            self.cut_standby()
        self.start_standby(self._info.socket_dir)
        assert self.ask("SELECT pg_promote(true, 30)") == (True,)

    def stop(self) -> None:
        for data in (self.standby, self.primary):
            with suppress(subprocess.CalledProcessError):
                self.control(data, "-m", "immediate", "stop")
        self._server.cleanup()


@pytest.fixture
def pair(embedded_postgres):
    package, folder = embedded_postgres
    pair = Pair(package, Path(tempfile.mkdtemp(dir=folder)))
    pair.start_standby(pair.sockets)
    pair.wait_for_stream()
    yield pair
    pair.stop()


@contextmanager
def elsewhere(monkeypatch, tmp_path):
    """Be a machine that has seen nothing."""
    with monkeypatch.context() as patch:
        patch.setenv("EPSLEDGER_STATE", str(tmp_path / "elsewhere"))
        yield


def spent_in(accountant: Accountant) -> int:
    return sum(uses for _, uses in accountant.statement("tips").spent)


def tried(accountant: Accountant) -> LedgerError:
    """Charge until it is not the connection that fails; return the error."""
    for _ in range(10):
        try:
            accountant.charge("tips", ONE, **ASK)
        except (LedgerUnavailable, OutcomeUnknown):
            time.sleep(0.1)
        except LedgerError as error:
            return error
        else:
            break
    raise AssertionError("a charge was admitted after budget came back")


def test_a_failover_that_lost_acknowledged_charges(pair, tmp_path, monkeypatch, caplog):
    location = pair.url()
    with Accountant.open(location) as accountant:
        assert "no standby is synchronous, of 1" in caplog.text
        accountant.create_budget("tips", pure(10.5), unit="article")
        for _ in range(4):
            accountant.charge("tips", ONE, **ASK)
        pair.wait_for_replay()
        with pytest.raises(LedgerUnavailable, match="this server is a standby"):
            Accountant.open(pair.url(pair.sockets))
        pair.cut_standby()
        for _ in range(6):  # acknowledged: all of the budget is spent
            accountant.charge("tips", ONE, **ASK)
        pair.fail_over()
        assert "went back" in str(tried(accountant))
    with Accountant.open(location) as accountant:  # the next process on this machine
        assert "went back" in str(tried(accountant))
        assert not accountant.verify().clean
    with elsewhere(monkeypatch, tmp_path), Accountant.open(location) as accountant:
        verification = accountant.verify()
        assert verification.clean
        assert verification.rollback == "not checked"
        lost = 10 - spent_in(accountant)
        accountant.charge("tips", ONE, **ASK)  # the eleventh of ten
    print(f"failover to a standby that was cut off: {lost} of 10 charges lost, found; else not")
    assert lost == 6


def test_a_synchronous_standby_loses_nothing(pair, tmp_path, monkeypatch, caplog):
    pair.ask("ALTER SYSTEM SET synchronous_standby_names = 'ANY 1 (*)'")
    pair.ask("SELECT pg_reload_conf()")
    pair.wait(lambda: pair.ask("SELECT sync_state FROM pg_stat_replication") == ("quorum",))
    location = pair.url()
    with Accountant.open(location) as accountant:
        assert "standby" not in caplog.text
        accountant.create_budget("tips", pure(10.5), unit="article")
        for _ in range(6):
            accountant.charge("tips", ONE, **ASK)
        pair.fail_over()
        pair.ask("ALTER SYSTEM RESET synchronous_standby_names")  # there is no standby any more
        pair.ask("SELECT pg_reload_conf()")
        for attempt in range(10):
            with suppress(LedgerUnavailable, OutcomeUnknown):
                accountant.charge("tips", ONE, **ASK)
                break
            time.sleep(0.1 * attempt)
        assert spent_in(accountant) >= 7
        assert accountant.verify().clean
    print("failover to a synchronous standby: 0 of 6 charges lost, and it goes on")


def test_a_cancelled_wait_for_the_standby_is_unknown(pair):
    """The server then commits here alone, and says so only in a warning."""
    pair.ask("ALTER SYSTEM SET synchronous_standby_names = 'ANY 1 (*)'")
    pair.ask("SELECT pg_reload_conf()")
    pair.wait(lambda: pair.ask("SELECT sync_state FROM pg_stat_replication") == ("quorum",))
    with Accountant.open(pair.url()) as accountant:
        accountant.create_budget("tips", pure(10.5), unit="article")
        pair.cut_standby()
        done = accountant._writer.enqueue(charge())
        waits = "SELECT pid FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
        pair.wait(lambda: pair.ask(waits) is not None)
        pair.ask(f"SELECT pg_cancel_backend(({waits} LIMIT 1))")
        with pytest.raises(OutcomeUnknown, match="count it as spent"):
            done.result(30)
        pair.ask("ALTER SYSTEM RESET synchronous_standby_names")
        pair.ask("SELECT pg_reload_conf()")
        assert spent_in(accountant) == 1


def charge():
    from accountant.requests import Charge
    from dp import NeighboringRelation

    return Charge(("tips",), ONE, 1, "article", NeighboringRelation.ADD_REMOVE, "survey")


@pytest.mark.parametrize("setting", ["fsync", "full_page_writes"])
def test_a_server_that_does_not_sync_is_refused(pair, setting):
    pair.ask(f"ALTER SYSTEM SET {setting} = off")
    pair.ask("SELECT pg_reload_conf()")
    pair.wait(lambda: pair.ask(f"SHOW {setting}") == ("off",))
    with pytest.raises(LedgerUnavailable, match=f"{setting}=off: a crash would lose"):
        Accountant.open(pair.url())
