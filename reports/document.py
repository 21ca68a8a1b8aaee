"""The report's content as one JSON-able document; the page and the plots only show it."""

from __future__ import annotations

import math
from collections import Counter
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from accountant import Statement, Verification
from accountant.entries import HOLDS, SPENDS, Kind
from accountant.statements import Line
from dp.readings import if_fixed

SCHEMA = "epsledger-report-1"
_BURN_DOWN_POINTS = 500
_OPERATIONS = 200

NOT_COVERED = (
    "Anything that was not charged to this budget, before this ledger began or past it.",
    (
        "Un-noised values that leave by other ways: training loss, gradient norms, logs,"
        " evaluation on private data, checkpoints or hyper-parameters chosen by it."
    ),
    (
        "Operations that did not do what their event says: another sensitivity, batches that were"
        " not fresh secret Poisson samples, noise that was reused. An event charged by hand is"
        " taken at its word."
    ),
    (
        "Several privacy units that belong to one person: k of them are protected by k times"
        " epsilon and a larger delta (group privacy)."
    ),
    (
        "What the pretrained model, the embedding model and the tokenizer were made from; they are"
        " taken as public."
    ),
    "Floating-point effects in the noise, and the time that an answer takes.",
    "Whoever can read the raw data, or the memory and disk of the hosts that process it.",
)
UNPROTECTED = (
    "Whoever made them saw private data as it is. The guarantee is about everybody else, as long"
    " as they keep it for themselves: neither told, nor used to choose what is run next."
)


def document(statement: Statement, verification: Verification, *, now: datetime) -> dict[str, Any]:
    """Return everything that a report says about one budget.

    Args:
        statement: The budget.
        verification: What verify found in its ledger.
        now: When the report is made, with a time zone.

    Returns:
        A JSON-able object of the schema ``reports/schema/report-1.json``; no NaN or infinity.
    """
    budget, limits = statement.budget, statement.budget.filter
    checked = next((found for found in verification.budgets if found.budget == budget.name), None)
    return {
        "schema": SCHEMA,
        "generated": _time(now),
        "epsledger": version("epsledger"),
        "budget": {
            "name": budget.name,
            "unit": budget.unit,
            "units": budget.units,
            "relation": limits.relation.value,
            "epsilon": limits.epsilon,
            "delta": limits.delta,
            "accounting": f"{limits.accounting} {limits.version}",
            "committed": [{"event": repr(e), "uses": uses} for e, uses in limits.committed],
            "dataset": budget.dataset,
            "lineage": list(budget.lineage),
            "supersedes": budget.supersedes,
            "superseded_by": statement.superseded_by,
            "quota_of": budget.quota_of,
            "closed": statement.closed,
        },
        "guarantee": _guarantee(statement),
        "not_covered": list(NOT_COVERED),
        "ledger": {
            "entries": statement.seq,
            "head": statement.head,
            "first": _stamp(statement.lines[0]) if statement.lines else None,
            "last": _stamp(statement.lines[-1]) if statement.lines else None,
        },
        "verification": {
            "clean": verification.clean,
            "same_state": checked is not None and checked.head == statement.head,
            "entries": checked.entries if checked else 0,
            "problems": _problems(verification),
            "rollback": verification.rollback,
        },
        "spend": {
            "share": statement.share,
            "activities": [
                {"name": a.name, "uses": a.uses, "share": a.share, "refused": a.refused}
                for a in statement.activities
            ],
            "open_reservations": [
                {"seq": seq, "uses": uses, "marked": marked}
                for seq, uses, marked in statement.open_reservations
            ],
            "if_fixed_in_advance": _if_fixed(statement),
        },
        "events": _events(statement),
        "unprotected": _unprotected(statement),
        "refusals": _refusals(statement),
        "burn_down": _burn_down(statement),
        "operations": [
            _operation(line) for line in statement.lines if line.entry.kind is not Kind.MARK
        ][-_OPERATIONS:],
    }


def _guarantee(statement: Statement) -> str:
    budget, limits = statement.budget, statement.budget.filter
    neighbors = {
        "add_remove": f"adding or removing one {budget.unit}",
        "replace_one": f"replacing one {budget.unit} by another",
    }[limits.relation.value]
    if budget.quota_of is not None:
        return (
            f"None by itself: '{budget.name}' is a quota of ({limits.epsilon!r}, {limits.delta!r})"
            f" of the budget '{budget.quota_of}', whose report states the guarantee."
        )
    condition = (
        f" It includes what was spent under '{budget.supersedes}', which it supersedes, provided"
        " that the change was decided without regard to what had been released."
        if budget.supersedes is not None
        else ""
    )
    return (
        f"The outputs of all operations charged to the budget '{budget.name}', for its whole life,"
        f" are together ({limits.epsilon!r}, {limits.delta!r})-differentially private under"
        f" {neighbors}, however each operation was chosen from the outputs before it. Enforced by a"
        f" privacy filter ({limits.accounting} accounting, version {limits.version}) that charges"
        f" an operation before it may touch private data, or refuses it.{condition}"
    )


def _if_fixed(statement: Statement) -> dict[str, object]:
    limits = statement.budget.filter
    found = if_fixed(statement.spent, limits.delta, limits.relation)
    return {
        "label": "if the operations had been fixed in advance",
        "delta": found.delta,
        "epsilon_renyi": found.renyi if found.renyi < math.inf else None,
        "epsilon_pld": found.pld,
        "epsilon_pld_low": found.pld_low,
    }


def _problems(verification: Verification) -> list[str]:
    found = [
        f"{checked.budget}: {problem}"
        for checked in verification.budgets
        for problem in checked.problems
    ]
    found += verification.anchors
    return found + [
        f"rows of a budget that does not exist: {name!r}" for name in verification.strays
    ]


def _events(statement: Statement) -> list[dict[str, Any]]:
    """Return how often each event was paid for; returned uses of a reservation are taken off."""
    uses: Counter[tuple[str, str]] = Counter()
    for line in statement.lines:
        entry, key = line.entry, (repr(line.event), line.entry.activity)
        if entry.kind in SPENDS | HOLDS:
            uses[key] += entry.uses
        elif entry.kind in (Kind.SETTLE, Kind.VOID):
            opened = statement.lines[entry.reservation - 1]
            uses[repr(opened.event), opened.entry.activity] -= opened.entry.uses - entry.uses
    return [
        {"event": event, "activity": activity, "uses": count}
        for (event, activity), count in sorted(uses.items())
    ]


def _unprotected(statement: Statement) -> dict[str, Any]:
    lines = [line for line in statement.lines if line.entry.kind is Kind.UNPROTECTED]
    return {
        "total": statement.unprotected,
        "meaning": UNPROTECTED,
        "reads": [
            {
                "seq": line.entry.seq,
                "time": _stamp(line),
                "activity": line.entry.activity,
                "reason": line.entry.note,
            }
            for line in lines
        ],
    }


def _refusals(statement: Statement) -> dict[str, Any]:
    lines = [line for line in statement.lines if line.entry.kind is Kind.REFUSE]
    return {
        "total": statement.refused,
        "first": _time(_when(min(line.entry.first for line in lines))) if lines else None,
        "last": _stamp(lines[-1]) if lines else None,
    }


def _burn_down(statement: Statement) -> list[dict[str, Any]]:
    lines = statement.lines
    step = len(lines) // _BURN_DOWN_POINTS + 1
    kept = [lines[at] for at in sorted({*range(0, len(lines), step), len(lines) - 1})]
    return [
        {
            "time": _stamp(line),
            "seq": line.entry.seq,
            "share": line.share,
            "refusal": line.entry.kind is Kind.REFUSE,
        }
        for line in kept
    ]


def _operation(line: Line) -> dict[str, Any]:
    entry = line.entry
    return {
        "seq": entry.seq,
        "time": _stamp(line),
        "kind": entry.kind.name.lower(),
        "times": entry.times,
        "uses": entry.uses,
        "event": repr(line.event) if line.event else "",
        "activity": entry.activity,
        "note": entry.note,
        "share": line.share,
    }


def _stamp(line: Line) -> str:
    return _time(_when(line.entry.time))


def _when(microseconds: int) -> datetime:
    return datetime.fromtimestamp(microseconds / 1e6, UTC)


def _time(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="seconds")
