"""The rules of opening a budget: what it promises, what it takes over, whose data it is about.

No I/O, as in :mod:`accountant.ledger`, whose seventh rule this is.
"""

from __future__ import annotations

from accountant.books import Book, Transaction
from accountant.budgets import Budget
from accountant.entries import Kind
from accountant.errors import (
    BudgetClosed,
    BudgetExceeded,
    BudgetExists,
    DatasetCovered,
    InvalidRequest,
    UnitMismatch,
)
from accountant.requests import Open, Receipt
from dp import Price
from dp.codec import digest


def open_budget(tx: Transaction, ask: Open, now: int) -> Receipt:
    """Open a budget inside a write transaction; see :func:`accountant.ledger.decide`."""
    budget, name = ask.budget, ask.budget.name
    if tx.find_book(name) is not None:
        raise BudgetExists(name)
    if budget.quota_of is not None:
        if tx.book(budget.quota_of).closed:
            raise BudgetClosed(budget.quota_of)
        _check_same_promise(budget, tx.book(budget.quota_of).budget)
    old, imported = None, ask.imported
    others = [other for other in tx.budgets() if other.quota_of is None]
    replaced = {other.supersedes: other.name for other in others}
    if budget.supersedes is not None:
        old = tx.book(budget.supersedes)
        if old.budget.name in replaced:
            raise DatasetCovered(name, replaced[old.budget.name])
        _check_same_promise(budget, old.budget)
        lost = {old.budget.dataset, *old.budget.lineage} - {None, budget.dataset, *budget.lineage}
        if lost:
            raise InvalidRequest(
                f"budget {name!r}: the fingerprints {sorted(map(str, lost))} of the budget that"
                " it supersedes must be its dataset's, or in its lineage"
            )
        imported += tx.spent(old)
    for other in others:
        if other.name != budget.supersedes and other.name not in replaced and budget.covers(other):
            raise DatasetCovered(name, other.name)
    limits = budget.filter
    totals: Price = (0,) * len(limits.limits)
    for event, uses in imported:
        price = limits.price(event)
        totals, before = limits.after(totals, price, uses), totals
        if not limits.admits(totals):
            fit = limits.uses_that_fit(before, price)
            raise BudgetExceeded(name, event, uses, fit, limits.advice(price))
    book = Book(budget, totals=totals)
    tx.add_book(book)  # from here on nothing is refused
    receipt = book.append(Kind.OPEN, now, event=digest(budget.to_json()))
    for event, uses in imported:
        digested, _ = tx.price(book, event)
        tx.keep_event(book, digested)
        origin = "imported" if old is None else old.budget.name
        book.append(Kind.IMPORT, now, event=digested, uses=uses, activity=origin)
    if old is not None and not old.closed:
        old.closed = True
        old.append(Kind.CLOSE, now, event=digest(budget.to_json()), note=f"superseded by {name}")
    return receipt


def _check_same_promise(budget: Budget, other: Budget) -> None:
    expected = (other.unit, other.filter.relation)
    given = (budget.unit, budget.filter.relation)
    if given != expected:
        raise UnitMismatch(other.name, expected, given)
    if other.quota_of is not None:
        raise InvalidRequest(f"{other.name!r} is a quota, not a dataset's budget")
