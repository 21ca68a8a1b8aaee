"""High-water marks: what this machine's clients last saw of a ledger, kept outside it.

A ledger can be put back to an older copy of itself, and no check of the ledger alone notices:
the copy is consistent. A client that remembers the highest entry it saw does. The marks of a
ledger are one small file in ``$EPSLEDGER_STATE``, else ``$XDG_STATE_HOME/epsledger``, else
``~/.local/state/epsledger``; an empty ``EPSLEDGER_STATE`` turns them off.

Marks are read under the ledger's lock before each charge, so that what one process saw binds the
others. They are written after the commit, not synced, and two processes may write at the same
moment: the newest entry may be missing from them, which makes the check weaker by it, never wrong.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import struct
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Self

_LOG = logging.getLogger(__name__)
_PATIENCE_SECONDS = 1.0
_SLOT = struct.Struct("<64sQ32s8s")
Heads = Mapping[str, tuple[int, bytes]]
"""By budget: position and digest of an entry."""


class HighWaterMarks:
    """The marks of one ledger, for the threads of this process and for other processes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._slots: dict[str, int] = {}
        self._content: dict[bytes, tuple[str, int, bytes]] = {}
        self._door = threading.Lock()

    @classmethod
    def open(cls, ledger: str) -> Self | None:
        """Return the marks of a ledger, or None where this machine keeps none.

        Args:
            ledger: Identity of the ledger.
        """
        folder = state_folder()
        if folder is None:
            return None
        try:
            return cls(folder / f"{ledger}.marks")
        except OSError as error:
            _LOG.warning(
                "no high-water marks can be kept (%s): an older copy of the ledger put in its"
                " place would not be noticed; set EPSLEDGER_STATE to a folder that lasts",
                error,
            )
            return None

    def read(self, names: frozenset[str] | None = None) -> dict[str, tuple[int, bytes]]:
        """Return what was seen: position and digest of an entry for each budget.

        Args:
            names: Of the budgets in question; of all if None.
        """
        if self._file < 0:
            return {}
        if names is not None:
            found = {name: self._stored(name) for name in names}
            if None not in found.values():
                return {name: mark for name, mark in found.items() if mark and mark[0]}
        everything = self._read()
        return {n: m for n, m in everything.items() if names is None or n in names}

    def raise_to(self, heads: Heads) -> None:
        """Remember these heads where they are higher than what is remembered."""
        try:
            for name, (seq, head) in heads.items():
                stored = self._stored(name)
                if stored is None:
                    self._add(name, seq, head)
                elif stored[0] < seq:
                    os.pwrite(self._file, _packed(name, seq, head), self._slots[name] * _SLOT.size)
        except OSError as error:
            _LOG.warning("%s: the high-water mark was not written: %s", self.path, error)

    def close(self) -> None:
        """Close the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _stored(self, name: str) -> tuple[int, bytes] | None:
        """Return the mark in a budget's slot, or None if it has none, or it is another's now."""
        slot = self._slots.get(name)
        if slot is None:
            return None
        stored = _unpacked(os.pread(self._file, _SLOT.size, slot * _SLOT.size))
        return None if stored is None or stored[0] != name else stored[1:]

    def _add(self, name: str, seq: int, head: bytes) -> None:
        """Give a budget a slot at the end, unless another process just did."""
        with self._locked():
            if self._read().get(name, (0, b""))[0] >= seq:
                return
            slot = self._slots.get(name)
            if slot is None:
                slot = -(-os.fstat(self._file).st_size // _SLOT.size)
            os.pwrite(self._file, _packed(name, seq, head), slot * _SLOT.size)
            self._slots[name] = slot

    def _read(self) -> dict[str, tuple[int, bytes]]:
        """Return all marks; slots that are as they were are not parsed again."""
        before, found, slots = self._content, {}, {}
        content = os.pread(self._file, os.fstat(self._file).st_size, 0)
        for at in range(0, len(content), _SLOT.size):
            slot = content[at : at + _SLOT.size]
            stored = before[slot] if slot in before else _unpacked(slot)
            if stored is None:
                _LOG.warning("%s: a mark at byte %d is unreadable and ignored", self.path, at)
                continue
            name, seq, head = stored
            slots[name], found[name] = at // _SLOT.size, (seq, head)
            self._content[slot] = stored
        self._slots = slots
        if len(self._content) > 2 * len(slots) + 1000:
            self._content = {}
        return found

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep other threads and processes from adding a slot; raise OSError if they do not end."""
        with self._door:  # a lock on a file is its process's, not a thread's
            patience = time.monotonic() + _PATIENCE_SECONDS
            while True:
                try:
                    fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > patience:
                        raise
                    time.sleep(0.001)
            try:
                yield
            finally:
                fcntl.flock(self._file, fcntl.LOCK_UN)


def state_folder() -> Path | None:
    """Return where this machine's clients keep what they saw, or None if that is turned off."""
    chosen = os.environ.get("EPSLEDGER_STATE")
    if chosen is not None:
        return Path(chosen) if chosen else None
    state = os.environ.get("XDG_STATE_HOME")
    try:
        return (Path(state) if state else Path.home() / ".local" / "state") / "epsledger"
    except RuntimeError:  # there is no home
        return None


def _packed(name: str, seq: int, head: bytes) -> bytes:
    body = _SLOT.pack(name.encode(), seq, head, bytes(8))
    return body[:-8] + hashlib.sha256(body[:-8]).digest()[:8]


def _unpacked(slot: bytes) -> tuple[str, int, bytes] | None:
    if len(slot) != _SLOT.size or hashlib.sha256(slot[:-8]).digest()[:8] != slot[-8:]:
        return None
    name, seq, head, _ = _SLOT.unpack(slot)
    return name.rstrip(b"\0").decode(), seq, head
