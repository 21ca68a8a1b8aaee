"""One writer per process, with group commit.

Requests queue to a thread that takes the lock once, decides all that wait, and commits once;
then all are answered. The queue is drained again once the lock is had, so that a batch fills
while the thread waits for its turn; what concerns budgets that are not locked goes to the next.

A caller that gives up (a timeout, a cancelled task) takes its request back if the thread has not
begun it. If it has, the request is carried out: it is spent, and nobody releases anything for it.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import NamedTuple

from accountant.errors import (
    AccountantError,
    BudgetExceeded,
    LedgerUnavailable,
    OutcomeUnknown,
)
from accountant.ledger import Outcome, decide
from accountant.requests import Receipt, Request
from accountant.stores import Store
from accountant.stores.transaction import Transaction, price_ahead
from accountant.telemetry import Watch
from dp import DPError

_LOG = logging.getLogger(__name__)
MAX_BATCH = 512
PATIENCE_SECONDS = 120.0
"""How long a caller waits for its turn."""


class _Job(NamedTuple):
    """A request, what it locks, and where its caller waits."""

    request: Request
    names: frozenset[str]
    done: Future[Outcome]


class Writer:
    """The thread through which every change of one ledger goes in this process."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._door = threading.Lock()
        self._closed = False
        self._watch = Watch()
        self._batch: list[_Job] = []
        self._left_over: list[_Job] = []
        self._thread = threading.Thread(target=self._run, name="epsledger-writer", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> Receipt:
        """Carry out one request; return when its entry is durable.

        Raises:
            BudgetExceeded: If it was refused; the refusal is durable.
            AccountantError: If it failed otherwise.
            DPError: If its event has no price.
        """
        if not self._closed:
            price_ahead(self._store.remembered, request)
        # A caller waits on this and not on the future: an interrupt can leave a future's own
        # lock taken, and the thread would wait for it for ever.
        ready = threading.Lock()
        ready.acquire()
        done = self.enqueue(request, lambda _: ready.release())
        if ready.acquire(timeout=PATIENCE_SECONDS):
            return answer(done.result())
        if done.cancel():
            raise LedgerUnavailable(
                f"no turn in {PATIENCE_SECONDS:.0f} s: another writer holds the ledger;"
                " nothing was charged"
            )
        raise OutcomeUnknown(f"no answer in {PATIENCE_SECONDS:.0f} s; count it as spent")

    def enqueue(
        self, request: Request, then: Callable[[Future[Outcome]], object] | None = None
    ) -> Future[Outcome]:
        """Queue one request; its future is done, and ``then`` called, when its entry is durable."""
        self._store.check_process()
        done: Future[Outcome] = Future()
        if then is not None:
            done.add_done_callback(then)
        job = _Job(request, request.names, done)
        with self._door:
            if self._closed:
                raise LedgerUnavailable("this accountant is closed; open the ledger again")
            self._jobs.put(job)
        return done

    def close(self) -> bool:
        """Finish what is queued and stop the thread; return False if it does not end."""
        if not self._thread.is_alive():
            return True
        with self._door:
            if not self._closed:
                self._closed = True
                self._jobs.put(None)
        self._thread.join(PATIENCE_SECONDS)
        if self._thread.is_alive():
            _LOG.warning("the ledger did not answer in %.0f s; it is left open", PATIENCE_SECONDS)
            return False
        return True

    def _run(self) -> None:
        try:
            open_ = True
            while open_ or self._left_over:
                if self._left_over:
                    waiting = self._left_over
                    self._batch, self._left_over = waiting[:MAX_BATCH], waiting[MAX_BATCH:]
                else:
                    job = self._jobs.get()
                    if job is None:
                        return
                    self._batch = [job] if _begun(job) else []
                open_ = self._drain(lambda _: True) and open_
                if self._batch:
                    open_ = self._commit() and open_
        finally:
            self._turn_away()

    def _turn_away(self) -> None:
        """Leave no caller waiting, whatever ended the thread."""
        with self._door:
            self._closed = True
        for job in self._batch:
            if not job.done.done():
                job.done.set_exception(
                    OutcomeUnknown("the writer thread ended in the middle; count it as spent")
                )
        waiting = self._left_over
        with suppress(queue.Empty):
            while True:
                waiting.append(self._jobs.get_nowait())  # type: ignore[arg-type]
        for job in waiting:
            if job is not None and (job.done.running() or _begun(job)):
                job.done.set_exception(LedgerUnavailable("the writer thread has ended"))

    def _commit(self) -> bool:
        """Carry out the batch; return False if the queue ended meanwhile."""
        batch, going, at_fault = self._batch, True, None
        outcomes: list[Outcome | AccountantError | DPError] = []
        started = time.monotonic()
        try:
            names = frozenset().union(*(job.names for job in batch))
            with self._store.transaction(names) as tx:
                going = self._drain(self._store.covers)
                now = time.time_ns() // 1000
                for job in batch:
                    try:
                        outcomes.append(decide(tx, job.request, now))
                    except (AccountantError, DPError) as error:
                        outcomes.append(error)
                    except Exception:
                        at_fault = job
                        raise
        except BaseException as error:  # noqa: BLE001 - every waiting caller must learn of it
            if at_fault is not None and not isinstance(error, AccountantError):
                self._left_over[:0] = [job for job in batch if job is not at_fault]
                self._batch = batch = [at_fault]  # a defect of one request is not the others'
            for job in batch:
                job.done.set_exception(error)
            return going
        self._seen(tx, outcomes, time.monotonic() - started)
        for job, outcome in zip(batch, outcomes, strict=True):
            if isinstance(outcome, Exception) and not isinstance(outcome, BudgetExceeded):
                job.done.set_exception(outcome)
            else:
                job.done.set_result(outcome)
        return going

    def _seen(self, tx: Transaction, outcomes: Sequence[object], seconds: float) -> None:
        """Tell who watches; whatever goes wrong there, the callers get their answers."""
        refused = [each.budget for each in outcomes if isinstance(each, BudgetExceeded)]
        try:
            self._watch.committed(tx.books(), refused, seconds)
        except Exception:  # noqa: BLE001 - an application's meter may raise anything
            _LOG.exception("telemetry failed")

    def _drain(self, covers: Callable[[frozenset[str]], bool]) -> bool:
        """Add what waits to the batch; return False if the queue ended in it."""
        while len(self._batch) < MAX_BATCH:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                return True
            if job is None:
                return False
            if _begun(job):
                (self._batch if covers(job.names) else self._left_over).append(job)
        return True


def answer(outcome: Outcome) -> Receipt:
    """Return the receipt, or raise the refusal."""
    if isinstance(outcome, BudgetExceeded):
        raise outcome
    return outcome


def _begun(job: _Job) -> bool:
    """Say whether the job is to be carried out: its caller did not take it back."""
    return job.done.set_running_or_notify_cancel()
