"""What keeps an acknowledged charge: the pragmas, the files, and a writer that never just hangs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading

import pytest

from accountant import Accountant, KeyReused, LedgerError, LedgerUnavailable, OutcomeUnknown
from dp import PureDP

ASK = {"unit": "article", "activity": "survey"}


def spend_elsewhere(location, uses):
    """Charge in another process; return how many uses it had admitted."""
    code = (
        "import sys; from accountant import *; from dp import PureDP\n"
        "a = Accountant.open(sys.argv[1]); done = 0\n"
        "for _ in range(int(sys.argv[2])):\n"
        "    try: a.charge('tips', PureDP(1.0), unit='article', activity='other'); done += 1\n"
        "    except BudgetExceeded: break\n"
        "a.close(); print(done)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(location), str(uses)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return int(done.stdout)


def pragma(connection, name):
    return connection.execute(f"PRAGMA {name}").fetchone()[0]


def test_every_connection_syncs_every_commit(accountant):
    """2 is FULL: with less, a power cut may give acknowledged charges back."""
    accountant.charge("tips", PureDP(1.0), **ASK)
    store = accountant._store
    with store.engine.connect() as reader:
        for connection in (store._connection, reader):
            driver = (
                connection.connection.driver_connection
                if connection is reader
                else connection.driver_connection
            )
            assert pragma(driver, "synchronous") == 2
            assert pragma(driver, "journal_mode") == "wal"
            assert pragma(driver, "busy_timeout") == 30000


def test_a_copy_in_the_same_process_cannot_lose_charges(accountant, location, tmp_path):
    """Closing the copied file drops SQLite's locks; another process then takes the log away."""
    accountant.charge("tips", PureDP(1.0), **ASK)
    shutil.copy(location, tmp_path / "copy.db")
    elsewhere = spend_elsewhere(location, 0)
    with pytest.raises(LedgerError):
        for _ in range(5):
            accountant.charge("tips", PureDP(1.0), **ASK)
    accountant.close()
    assert elsewhere + 1 + spend_elsewhere(location, 99) == 9  # of 10, the last rounded away
    with Accountant.open(location) as again:
        assert again.verify().clean


def test_a_log_that_is_deleted_stops_the_ledger(accountant, location):
    accountant.charge("tips", PureDP(1.0), **ASK)
    for suffix in ("-wal", "-shm"):
        location.with_name(location.name + suffix).unlink()
    with pytest.raises(LedgerUnavailable, match="write-ahead log"):
        accountant.charge("tips", PureDP(1.0), **ASK)


def test_a_second_name_for_the_file_is_refused(accountant, location, tmp_path):
    accountant.charge("tips", PureDP(1.0), **ASK)
    os.link(location, tmp_path / "other.db")
    with pytest.raises(LedgerUnavailable):
        Accountant.open(tmp_path / "other.db")
    with pytest.raises(LedgerUnavailable, match="hard link"):
        accountant.charge("tips", PureDP(1.0), **ASK)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_no_caller_hangs_when_the_writer_thread_dies(accountant, monkeypatch):
    def dies(self):
        raise MemoryError

    monkeypatch.setattr("accountant.writer.Writer._commit", dies)
    outcomes = []

    def go():
        try:
            accountant.charge("tips", PureDP(1.0), **ASK)
        except LedgerError as error:
            outcomes.append(type(error))

    threads = [threading.Thread(target=go, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(outcomes) == 4
    assert set(outcomes) <= {LedgerUnavailable, OutcomeUnknown}
    with pytest.raises(LedgerUnavailable):
        accountant.charge("tips", PureDP(1.0), **ASK)


def test_a_payload_cannot_pose_as_part_of_an_activity(accountant):
    ask = {"unit": "article", "key": "k"}
    accountant.charge("tips", PureDP(1.0), activity="a", payload=b"bc", **ask)
    accountant.keep_answer("tips", "k", b"answer")
    with pytest.raises(KeyReused, match="another request"):
        accountant.charge("tips", PureDP(1.0), activity="ab", payload=b"c", **ask)
