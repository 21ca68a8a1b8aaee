"""One writer per process, with group commit.

Requests queue to a thread that takes the write lock once, decides all that wait, and commits
once; then all are answered. The lock is taken first and the queue drained after, so that a
batch fills while the thread waits for its turn.
"""

from __future__ import annotations

import queue
import threading
import time
from concurrent.futures import Future

from accountant.errors import (
    AccountantError,
    BudgetExceeded,
    LedgerUnavailable,
    OutcomeUnknown,
)
from accountant.ledger import Outcome, Receipt, Request, decide
from accountant.stores.sql import SqlStore
from dp import DPError

MAX_BATCH = 512
_Job = tuple[Request, "Future[Outcome]"]


class Writer:
    """The thread through which every change of one ledger goes in this process."""

    def __init__(self, store: SqlStore) -> None:
        self._store = store
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._door = threading.Lock()
        self._closed = False
        self._batch: list[_Job] = []
        self._thread = threading.Thread(target=self._run, name="epsledger-writer", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> Receipt:
        """Carry out one request; return when its entry is durable.

        Raises:
            BudgetExceeded: If it was refused; the refusal is durable.
            AccountantError: If it failed otherwise.
            DPError: If its event has no price.
        """
        self._store.check_process()
        done: Future[Outcome] = Future()
        with self._door:
            if self._closed:
                raise LedgerUnavailable("this accountant is closed; open the ledger again")
            self._jobs.put((request, done))
        outcome = done.result()
        if isinstance(outcome, BudgetExceeded):
            raise outcome
        return outcome

    def close(self) -> None:
        """Finish what is queued and stop the thread."""
        if not self._thread.is_alive():
            return
        with self._door:
            if not self._closed:
                self._closed = True
                self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            job = self._jobs.get()
            while job is not None:
                self._batch = [job]
                job = self._jobs.get() if self._commit() else None
        finally:
            self._turn_away()

    def _turn_away(self) -> None:
        """Leave no caller waiting, whatever ended the thread."""
        with self._door:
            self._closed = True
        for _, done in self._batch:
            if not done.done():
                done.set_exception(
                    OutcomeUnknown("the writer thread ended in the middle; count it as spent")
                )
        while True:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                return
            if job is not None:
                job[1].set_exception(LedgerUnavailable("the writer thread has ended"))

    def _commit(self) -> bool:
        """Carry out one batch from the job in hand; return False if the queue ended in it."""
        batch, last = self._batch, False
        outcomes: list[Outcome | AccountantError | DPError] = []
        try:
            with self._store.transaction() as tx:
                while len(batch) < MAX_BATCH and not last:
                    try:
                        job = self._jobs.get_nowait()
                    except queue.Empty:
                        break
                    if job is None:
                        last = True
                    else:
                        batch.append(job)
                now = time.time_ns() // 1000
                for request, _ in batch:
                    try:
                        outcomes.append(decide(tx, request, now))
                    except (AccountantError, DPError) as error:
                        outcomes.append(error)
        except BaseException as error:  # noqa: BLE001 - every waiting caller must learn of it
            for _, done in batch:
                done.set_exception(error)
            return not last
        for (_, done), outcome in zip(batch, outcomes, strict=True):
            if isinstance(outcome, Exception) and not isinstance(outcome, BudgetExceeded):
                done.set_exception(outcome)
            else:
                done.set_result(outcome)
        return not last
