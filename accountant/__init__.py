"""Budgets, the ledger and its stores: who may spend what, and the record of it."""

from accountant.accountant import Accountant
from accountant.budgets import Budget, fingerprint
from accountant.errors import (
    AccountantError,
    AnchorInvalid,
    AnchorUnavailable,
    BudgetClosed,
    BudgetExceeded,
    BudgetExists,
    DatasetCovered,
    InvalidRequest,
    KeyReused,
    LedgerCorrupt,
    LedgerError,
    LedgerUnavailable,
    OutcomeUnknown,
    QueriesExhausted,
    ReleaseUnknown,
    ReservationError,
    SchemaMismatch,
    UnitMismatch,
    UnknownBudget,
)
from accountant.reader import Reader
from accountant.requests import Receipt
from accountant.reservations import Lease, Reservation
from accountant.statements import Statement
from accountant.verify import Verification

__all__ = [
    "Accountant",
    "AccountantError",
    "AnchorInvalid",
    "AnchorUnavailable",
    "Budget",
    "BudgetClosed",
    "BudgetExceeded",
    "BudgetExists",
    "DatasetCovered",
    "InvalidRequest",
    "KeyReused",
    "Lease",
    "LedgerCorrupt",
    "LedgerError",
    "LedgerUnavailable",
    "OutcomeUnknown",
    "QueriesExhausted",
    "Reader",
    "Receipt",
    "ReleaseUnknown",
    "Reservation",
    "ReservationError",
    "SchemaMismatch",
    "Statement",
    "UnitMismatch",
    "UnknownBudget",
    "Verification",
    "fingerprint",
]
