"""Doctor: what an operator should know about where a ledger is kept, before it matters."""

from __future__ import annotations

import math
import shutil
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from accountant.anchors import Checkpoint
from accountant.errors import AccountantError
from accountant.notes import unverified
from accountant.requests import WHOLE_LEDGER
from accountant.stores import open_store
from accountant.stores.snapshot import Snapshot
from accountant.stores.sql import SqlStore
from accountant.stores.sqlite import NETWORK_FILE_SYSTEMS, SqliteStore, file_system

_FREE_BYTES = 200 * 2**20
_LOG_BYTES = 64 * 2**20
_ANCHOR_SECONDS = 7 * 86_400


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        what: It was.
        ok: Whether nothing needs to be done.
        detail: What was found, and what to do about it.
    """

    what: str
    ok: bool
    detail: str


def examine(location: str | Path) -> tuple[Finding, ...]:
    """Look at a ledger and its surroundings; nothing is changed.

    Args:
        location: As for ``Accountant.open``.

    >>> import tempfile
    >>> from accountant import Accountant
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     Accountant.open(f"{folder}/ledger.db").close()
    ...     [finding.what for finding in examine(f"{folder}/ledger.db")][1:4]
    ['file system', 'disk', 'permissions']
    """
    try:
        store = open_store(location, create=False)
    except AccountantError as error:
        return (Finding("opening", ok=False, detail=str(error)),)
    try:
        return tuple(_findings(store)) if isinstance(store, SqlStore) else ()
    finally:
        store.close()


def _findings(store: SqlStore) -> Iterator[Finding]:
    yield Finding("schema", ok=True, detail=f"ledger {store.ledger}, readable by this epsledger")
    if isinstance(store, SqliteStore):
        yield from _of_files(Path(store.place))
    warnings = store.warnings()
    yield Finding(
        "durability",
        ok=not warnings,
        detail="; ".join(warnings) or "a commit returns when it would survive a power cut",
    )
    missing = store.missing_triggers()
    yield Finding(
        "triggers",
        ok=not missing,
        detail=f"missing or changed: {', '.join(missing)}; somebody opened the ledger to edits"
        if missing
        else "edits and deletions are refused",
    )
    started = time.monotonic()
    try:
        with store.snapshot() as snapshot:
            names = snapshot.budgets()
        store.try_locks(frozenset({WHOLE_LEDGER, *filter(_is_text, names)}))
    except AccountantError as error:
        yield Finding("lock", ok=False, detail=f"not had: {error}")
    else:
        seconds = time.monotonic() - started
        yield Finding("lock", ok=seconds < 1, detail=f"had and released in {seconds:.3f} s")
    yield Finding(
        "marks",
        ok=store.remembered.marks is not None,
        detail=f"what this machine saw last is kept in {store.remembered.marks.path}"
        if store.remembered.marks is not None
        else "this machine keeps no high-water marks: an older copy would not be noticed here;"
        " set EPSLEDGER_STATE to a folder that lasts",
    )
    for look in (_clock, _anchor):
        try:
            with store.snapshot() as snapshot:
                yield look(snapshot)
        except (AccountantError, TypeError, ValueError) as error:
            name = look.__name__.removeprefix("_")
            yield Finding(name, ok=False, detail=f"the ledger cannot be read: {error}")


def _is_text(name: object) -> bool:
    return isinstance(name, str)


def _of_files(path: Path) -> Iterator[Finding]:
    kind = file_system(path)
    network = kind in NETWORK_FILE_SYSTEMS
    yield Finding(
        "file system",
        ok=not network,
        detail=f"{kind} is of a network: SQLite's locks may not hold"
        if network
        else f"{kind or 'unknown'}, not of a network",
    )
    free = shutil.disk_usage(path.parent).free
    log = path.with_name(f"{path.name}-wal")
    pending = log.stat().st_size if log.exists() else 0
    yield Finding(
        "disk",
        ok=free > _FREE_BYTES and pending < _LOG_BYTES,
        detail=f"{free / 2**20:,.0f} MiB free, {pending / 2**20:.1f} MiB in the write-ahead log",
    )
    mode = path.stat().st_mode
    others = bool(mode & (stat.S_IWGRP | stat.S_IWOTH))
    yield Finding(
        "permissions",
        ok=not others,
        detail=f"{stat.filemode(mode)}" + (": others may write to it" if others else ""),
    )


def _clock(snapshot: Snapshot) -> Finding:
    newest = max((snapshot.row(name).time for name in snapshot.budgets()), default=0)
    ahead = newest / 1e6 - time.time()
    return Finding(
        "clock",
        ok=ahead < 60,
        detail=f"the last entry is labelled {ahead:.0f} s in the future"
        if ahead > 0
        else "not behind the last entry",
    )


def _anchor(snapshot: Snapshot) -> Finding:
    notes = snapshot.checkpoints()
    if not notes:
        return Finding(
            "anchor",
            ok=False,
            detail="no checkpoint was ever signed: whoever owns the ledger can put an older copy"
            " in its place; run epsledger anchor publish, often",
        )
    checkpoint = Checkpoint.from_text(unverified(notes[-1].note)[0])
    at = {head.budget: head.seq for head in checkpoint.heads}
    since = sum(snapshot.row(name).seq - at.get(name, 0) for name in snapshot.budgets())
    when = next((line[5:] for line in checkpoint.lines if line.startswith("time ")), "")
    try:
        age = (datetime.now(UTC) - datetime.fromisoformat(when)).total_seconds()
    except ValueError:
        age = math.inf  # it does not say when it was made
    return Finding(
        "anchor",
        ok=age < _ANCHOR_SECONDS or (not since and age < math.inf),
        detail=f"{len(notes)} checkpoints, the last {age / 86_400:.1f} days"
        f" and {since} entries ago",
    )
