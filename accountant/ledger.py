"""The rules of the ledger: every check, no I/O.

:func:`decide` takes one request inside one write transaction, checks it against the state that
the transaction shows, and appends what happened. The store behind the transaction makes it
durable; only after that may a caller learn the outcome. The rules:

1. An event is admitted on the lanes that include it, or refused; a refusal is recorded too.
   One that names several budgets is charged to all of them or to none. A quota is never charged
   without the dataset's budget that it is a share of.
2. An open reservation counts in full. A mark takes one of its uses and never exceeds them.
3. Settling recomputes a reservation's contribution from its marks; voiding needs no marks.
4. Only the holder marks, settles or voids. Whoever adopts a reservation becomes its holder; a
   lease, whose marks are in its holder's memory, is never adopted.
5. A key with the same request gets the stored answer back, never a second charge and never a
   second draw of noise; with another request it is an error.
6. Refusals equal to a recorded one are counted in the budget's row and written as one entry
   when the next entry of another kind is appended, so that a storm of them stays small.
7. A budget is never changed. A closed one admits nothing; one that supersedes another begins
   with all that was spent there; two over the same dataset cannot be. A correction only adds.
8. A read of private data as it is has no guarantee: it is recorded, whatever is left, and adds to
   no lane. It is never a refusal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from accountant.books import Book, Hold, Keyed, Transaction
from accountant.entries import NO_EVENT, Kind
from accountant.errors import (
    BudgetClosed,
    BudgetExceeded,
    InvalidRequest,
    KeyReused,
    ReleaseUnknown,
    ReservationError,
    UnitMismatch,
)
from accountant.opening import open_budget
from accountant.requests import (
    Adopt,
    Anchor,
    Answer,
    Ask,
    Borrow,
    Charge,
    Close,
    Correct,
    Mark,
    Open,
    Receipt,
    Request,
    Reserve,
    Settle,
    Unprotected,
    Void,
)
from dp import Price
from dp.codec import digest, encode

MAX_TALLIES = 64
"""Distinct refusals counted apart between two other entries; the rest share one count."""
LEASED_SHARE = 4
"""A block of a lease is at most this part of what is left, so that several holders find some."""
_OTHER = f"{NO_EVENT.hex()}:0:other"


Outcome = Receipt | BudgetExceeded


def decide(tx: Transaction, request: Request, now: int) -> Outcome:
    """Carry out one request inside a write transaction.

    Args:
        tx: The transaction.
        request: What is asked.
        now: Microseconds since 1970, to label entries with.

    Returns:
        A receipt; or the refusal, to be raised once its entry is durable.

    Raises:
        AccountantError: If the request is refused for another reason than the budget; then
            nothing was changed.
        DPError: If the event cannot be priced; then nothing was changed.
    """
    match request:
        case Anchor(note):
            return Receipt("", tx.add_checkpoint(note), digest(note.encode()).hex())
        case Open():
            return open_budget(tx, request, now)
        case Close(name, note):
            book = tx.book(name)
            if book.closed:
                raise BudgetClosed(name)
            book.closed = True
            return book.append(Kind.CLOSE, now, note=note)
        case Unprotected():
            priced = _priced(tx, request)
            _check_open(priced)
            unchanged = [book.totals for book, _, _ in priced]
            return _record(tx, request, Kind.UNPROTECTED, priced, unchanged, now)
        case Charge():
            return _charge(tx, request, now)
        case Correct(budgets=names):
            priced = _priced(tx, request)
            for successor in tx.budgets():
                if successor.supersedes in names and successor.name not in names:
                    raise InvalidRequest(
                        f"budget {successor.supersedes!r} was superseded by {successor.name!r},"
                        " which carries its spend; correct both together"
                    )
            reached = [
                book.budget.filter.after(book.totals, price, request.uses)
                for book, _, price in priced
            ]
            return _record(tx, request, Kind.CORRECT, priced, reached, now)
        case Reserve():
            return _reserve(tx, request, now)
        case Mark(uses=uses):
            held = _held(tx, request)
            for book, hold in held:
                if book.closed:
                    raise BudgetClosed(book.budget.name)
                _check_left(book, hold, uses)
            for _, hold in held:
                hold.marked += uses
            return _append(held, Kind.MARK, now, uses=uses)
        case Settle(marked=marked):
            held = _held(tx, request)
            if marked:
                for book, hold in held:
                    if not hold.lease:
                        raise ReservationError(f"reservation {hold.seq} is marked use by use")
                    _check_left(book, hold, marked)
                for _, hold in held:
                    hold.marked += marked
                _append(held, Kind.MARK, now, uses=marked)
            return _end(tx, held, Kind.SETTLE, now)
        case Void():
            held = _held(tx, request)
            for book, hold in held:
                if hold.marked:
                    raise ReservationError(
                        f"reservation {hold.seq} of budget {book.budget.name!r} has {hold.marked}"
                        " marked uses; settle it instead"
                    )
            return _end(tx, held, Kind.VOID, now)
        case Adopt(holder=holder, event=event):
            held = _held(tx, request)
            for book, hold in held:
                if hold.event != digest(encode(event)):
                    raise ReservationError(
                        f"reservation {hold.seq} of budget {book.budget.name!r} is of another"
                        " event; the run that adopts it must be the one that was priced"
                    )
                if hold.lease:
                    raise ReservationError(
                        f"reservation {hold.seq} of budget {book.budget.name!r} is a lease: what"
                        " its holder marked is unknown, so all of it stays spent"
                    )
            for _, hold in held:
                hold.holder = _holder(holder, len(held))
            return _append(held, Kind.ADOPT, now, uses=held[0][1].marked)
        case Answer(name, key, answer):
            keyed = tx.keyed(name, key)
            if keyed is None or keyed.answer is not None:
                raise InvalidRequest(f"no charge waits for an answer under key {key!r}")
            keyed.answer = answer
            return Receipt(name, keyed.seq, keyed.digest.hex(), answer)


_Priced = list[tuple[Book, bytes, Price]]
_Held = list[tuple[Book, Hold]]


def _charge(tx: Transaction, ask: Charge, now: int) -> Outcome:
    priced = _priced(tx, ask)
    if ask.key is None:
        return _admit(tx, ask, Kind.CHARGE, priced, now)
    event = priced[0][1]
    others = tuple(name.encode() for name in ask.budgets[1:])
    parts = (event, ask.uses.to_bytes(8, "little"), ask.activity.encode(), ask.payload, *others)
    payload = digest(b"".join(map(digest, parts)))
    keys = [tx.keyed(name, ask.key) for name in ask.budgets]
    if any(keyed is not None for keyed in keys):
        if any(keyed is None or keyed.payload != payload for keyed in keys):
            raise KeyReused(ask.key)
        receipts = [
            Receipt(name, keyed.seq, keyed.digest.hex(), keyed.answer, ask.uses)
            for name, keyed in zip(ask.budgets, keys, strict=True)
            if keyed is not None
        ]
        if receipts[0].answer is None:
            raise ReleaseUnknown(ask.key)
        return _joined(receipts)
    outcome = _admit(tx, ask, Kind.CHARGE, priced, now)
    if isinstance(outcome, Receipt):
        for receipt in (outcome, *outcome.linked):
            keyed = Keyed(ask.key, payload, receipt.seq, bytes.fromhex(receipt.digest))
            tx.add_keyed(receipt.budget, keyed)
    return outcome


def _reserve(tx: Transaction, ask: Reserve, now: int) -> Outcome:
    priced, kind = _priced(tx, ask), Kind.RESERVE
    if isinstance(ask, Borrow):
        fit = min(book.budget.filter.uses_that_fit(book.totals, price) for book, _, price in priced)
        ask, kind = replace(ask, uses=min(ask.uses, max(1, fit // LEASED_SHARE))), Kind.LEASE
    charged = [book.budget.filter.charge(book.totals, price, ask.uses) for book, _, price in priced]
    outcome = _admit(tx, ask, kind, priced, now)
    if isinstance(outcome, Receipt):
        receipts = (outcome, *outcome.linked)
        for receipt, (_, event, _), lanes in zip(receipts, priced, charged, strict=True):
            holder = _holder(ask.holder, len(priced))
            hold = Hold(receipt.seq, event, ask.uses, holder, lanes, lease=kind is Kind.LEASE)
            tx.add_hold(receipt.budget, hold)
    return outcome


def _admit(tx: Transaction, ask: Ask, kind: Kind, priced: _Priced, now: int) -> Outcome:
    refusals, reached = [], []
    _check_open(priced)
    for book, event, price in priced:
        limits = book.budget.filter
        reached.append(limits.after(book.totals, price, ask.uses))
        if not limits.admits(reached[-1]):
            _refuse(tx, book, ask, event, now)
            fit = limits.uses_that_fit(book.totals, price)
            name, advice = book.budget.name, limits.advice(price)
            refusals.append(BudgetExceeded(name, ask.event, ask.uses, fit, advice))
    return refusals[0] if refusals else _record(tx, ask, kind, priced, reached, now)


def _check_open(priced: _Priced) -> None:
    for book, _, _ in priced:
        if book.closed:
            raise BudgetClosed(book.budget.name)


def _record(
    tx: Transaction,
    ask: Ask | Unprotected,
    kind: Kind,
    priced: _Priced,
    reached: list[Price],
    now: int,
) -> Receipt:
    """Bring every budget to the totals that it reaches, and add the entries to their chains."""
    receipts: list[Receipt] = []
    for (book, event, _), totals in zip(priced, reached, strict=True):
        tx.keep_event(book, event)
        book.totals = totals
        receipts.append(
            book.append(
                kind,
                now,
                event=event,
                uses=ask.uses,
                activity=ask.activity,
                note=ask.note,
                **_linked(receipts, len(priced)),
            )
        )
    return _joined(receipts)


def _append(held: _Held, kind: Kind, now: int, uses: int | None = None) -> Receipt:
    """Append one entry about each hold; without ``uses``, about the uses that it marked."""
    receipts: list[Receipt] = []
    for book, hold in held:
        receipts.append(
            book.append(
                kind,
                now,
                event=hold.event,
                uses=hold.marked if uses is None else uses,
                reservation=hold.seq,
                **_linked(receipts, len(held)),
            )
        )
    return _joined(receipts)


def _linked(before: Sequence[Receipt], chains: int) -> dict[str, Any]:
    if chains == 1:
        return {}
    return {"link": bytes.fromhex(before[0].digest)} if before else {"chains": chains}


def _joined(receipts: list[Receipt]) -> Receipt:
    first, *others = receipts
    return replace(first, linked=tuple(others)) if others else first


def _refuse(tx: Transaction, book: Book, ask: Ask, event: bytes, now: int) -> None:
    key = f"{event.hex()}:{ask.uses}:{ask.activity}"
    if key not in book.pending and len(book.pending) >= MAX_TALLIES:
        key = _OTHER
    if key in book.pending:
        tally = book.pending[key]
        tally[0], tally[2] = tally[0] + 1, max(now, tally[2])
        tally[1] = tally[1] or now
    elif key == _OTHER:
        book.pending[key] = [1, now, now]
    else:
        tx.keep_event(book, event)
        book.append(
            Kind.REFUSE, now, event=event, uses=ask.uses, activity=ask.activity, note=ask.note
        )
        book.pending[key] = [0, 0, 0]


def _end(tx: Transaction, held: _Held, kind: Kind, now: int) -> Receipt:
    for book, hold in held:
        book.totals = book.settled(hold, tx.frozen_price(book, hold.event))
        hold.open = False
    return _append(held, kind, now)


def _priced(tx: Transaction, ask: Ask | Unprotected) -> _Priced:
    """Return the books that are asked, each with digest and price of the event."""
    books = [tx.book(name) for name in ask.budgets]
    for book in books:
        expected = (book.budget.unit, book.budget.filter.relation)
        given = (ask.unit, ask.relation if isinstance(ask, Ask) else expected[1])
        if given != expected:
            raise UnitMismatch(book.budget.name, expected, given)
        owner = book.budget.quota_of
        if owner is not None and owner not in ask.budgets:
            raise InvalidRequest(
                f"quota {book.budget.name!r} guarantees nothing by itself; charge"
                f" ({owner!r}, {book.budget.name!r}) together"
            )
    return [(book, *tx.price(book, ask.event)) for book in books]


def _held(tx: Transaction, ask: Mark | Settle | Void | Adopt) -> _Held:
    held: _Held = []
    for name, seq in ask.holds:
        book, hold = tx.book(name), tx.hold(name, seq)
        if hold is None or not hold.open:
            raise ReservationError(f"budget {name!r} has no open reservation {seq}")
        if _chains(hold.holder) != len(ask.holds):
            raise ReservationError(
                f"reservation {seq} of budget {name!r} is held in {_chains(hold.holder)} budgets;"
                " name all of them"
            )
        if isinstance(ask, Adopt):
            if held and hold.holder != held[0][1].holder:
                raise ReservationError(f"reservation {seq} of budget {name!r} is another one")
        elif hold.holder != _holder(ask.holder, len(ask.holds)):
            raise ReservationError(f"reservation {seq} of budget {name!r} has another holder")
        held.append((book, hold))
    return held


def _holder(secret: str, chains: int) -> str:
    """Return what is stored of a holder: in several budgets nobody marks or ends a part."""
    return secret if chains == 1 else f"{chains}-{secret}"


def _chains(holder: str) -> int:
    chains, dash, _ = holder.partition("-")
    return int(chains) if dash else 1


def _check_left(book: Book, hold: Hold, uses: int) -> None:
    if hold.marked + uses > hold.uses:
        raise ReservationError(
            f"reservation {hold.seq} of budget {book.budget.name!r} has {hold.uses - hold.marked}"
            f" of {hold.uses} uses left, {uses} asked"
        )
