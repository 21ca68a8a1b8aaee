"""What the log of a per-unit filter adds up to, without the file that it is in.

The first entry holds the terms, an entry with a price is a query and holds the lanes that paid it,
and the others hold the ids of new units, whose lanes are numbered in this order. Each entry
carries the SHA-256 of its body and a head that chains it to those before it, from a random start:
a head that is kept elsewhere confirms no guess about units.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from accountant.errors import InvalidRequest

Lanes = NDArray[np.intp]
"""Positions of units in a filter, shape (n,)."""

LARGEST = 2**62
"""Limits and prices are below it: the sum of two is still a 64-bit integer."""

_HEAD = struct.Struct("<32sQQ32s")
_BITS, _POSITIONS = b"\0", b"\1"


class LaneEntry(NamedTuple):
    """One entry of the log, as it is stored; the body of a folded query is gone."""

    seq: int
    price: int
    digest: bytes
    head: bytes
    body: bytes | None


class LaneState:
    """The sum of the entries that were applied.

    Every method that reads stored entries raises ValueError, TypeError, IndexError or struct.error
    on what no other method could have written.

    Attributes:
        seq: The last entry's number.
        head: Its head.
        terms: Content of the first entry.
        queries: How many queries there were.
        folded: The entry up to which a snapshot holds what was spent; 0 if there is none.
        unfolded: How many queries came after it.
        lane: The lane of each unit.
        spent: What each lane has spent, shape (units,).
    """

    def __init__(self) -> None:
        self.seq, self.head = 0, bytes(32)
        self.terms: list[Any] = []
        self.queries, self.unfolded = 0, 0
        self.lane: dict[str, int] = {}
        self.spent = np.zeros(0, np.int64)
        self.folded = 0

    # --- writing: each changes the state and returns what is to be stored ---

    def begin(self, terms: Sequence[Any]) -> LaneEntry:
        """Write the first entry."""
        entry = self._next(0, json.dumps([secrets.token_hex(32), *terms]).encode())
        self.apply(entry)
        return entry

    def add(self, units: list[str]) -> LaneEntry:
        """Give new units a lane each."""
        entry = self._next(0, json.dumps(units).encode())
        self._advance(entry)
        self._add(units)
        return entry

    def spend(self, price: int, paid: NDArray[np.bool], lanes: Lanes) -> LaneEntry:
        """Let lanes pay the price of a query; they are given as a mask and as positions."""
        entry = self._next(price, _packed(paid))
        self._advance(entry)
        self._spend(price, lanes)
        return entry

    def fold(self) -> tuple[int, bytes, bytes]:
        """Return a snapshot of all lanes: its position, its seal, and what was spent."""
        spent = self.spent.astype("<i8").tobytes()
        self.folded, self.unfolded = self.seq, 0
        return self.seq, _seal(self.head, spent), spent

    # --- reading ---

    def start_from(self, seq: int, seal: bytes, spent: bytes, entries: Sequence[LaneEntry]) -> None:
        """Take what was spent up to an entry from a snapshot, before the entries are applied."""
        if seal != _seal(entries[seq - 1].head, spent):
            raise ValueError("the snapshot is another one")
        self.folded = seq
        self.spent = np.frombuffer(spent, "<i8").astype(np.int64)

    def apply(self, entry: LaneEntry) -> None:
        """Apply the next entry."""
        body = entry.body
        if body is not None and hashlib.sha256(body).digest() != entry.digest:
            raise ValueError(f"entry {entry.seq} has another body")
        self._advance(entry)
        if entry.price:
            if entry.seq > self.folded:
                self._spend(entry.price, _unpacked(body or b"", len(self.lane)))
            else:
                self.queries += 1
        elif entry.seq == 1:
            self.terms = json.loads(body or b"")[1:]
        else:
            self._add(json.loads(body or b""))

    def check_complete(self) -> None:
        """Raise ValueError if entries are missing."""
        if not self.seq or len(self.spent) != len(self.lane):
            raise ValueError("entries are missing")

    def _next(self, price: int, body: bytes) -> LaneEntry:
        seq, digest = self.seq + 1, hashlib.sha256(body).digest()
        return LaneEntry(seq, price, digest, _chained(self.head, seq, price, digest), body)

    def _advance(self, entry: LaneEntry) -> None:
        seq, price, digest, head, _ = entry
        if seq != self.seq + 1 or head != _chained(self.head, seq, price, digest):
            raise ValueError(f"entry {seq} does not follow entry {self.seq}")
        self.seq, self.head = seq, head

    def _add(self, units: list[str]) -> None:
        lanes = range(len(self.lane), len(self.lane) + len(units))
        self.lane.update(zip(units, lanes, strict=True))
        if len(self.lane) != lanes.stop:
            raise ValueError("a unit has two lanes")
        missing = max(0, lanes.stop - len(self.spent))  # a snapshot has them already
        self.spent = np.concatenate([self.spent, np.zeros(missing, np.int64)])

    def _spend(self, price: int, lanes: Lanes) -> None:
        self.queries += 1
        self.unfolded += 1
        self.spent[lanes] += price


def _chained(before: bytes, seq: int, price: int, digest: bytes) -> bytes:
    return hashlib.sha256(_HEAD.pack(before, seq, price, digest)).digest()


def _seal(head: bytes, spent: bytes) -> bytes:
    return hashlib.sha256(head + spent).digest()


def _packed(paid: NDArray[np.bool]) -> bytes:
    """Return which lanes paid, as bits or as sorted positions: what is smaller."""
    if 32 * np.count_nonzero(paid) < len(paid):
        return _POSITIONS + np.flatnonzero(paid).astype("<u4").tobytes()
    return _BITS + np.packbits(paid).tobytes()


def _unpacked(body: bytes, units: int) -> Lanes:
    form, packed = body[:1], np.frombuffer(body, np.uint8, offset=1)
    if form == _POSITIONS:
        return packed.view("<u4").astype(np.intp)
    if form != _BITS or len(packed) != -(-units // 8):
        raise ValueError("a body of no known form")
    return np.flatnonzero(np.unpackbits(packed, count=units))


def checked_lanes(lanes: Lanes) -> Lanes:
    """Return positions of lanes, or raise InvalidRequest if they are of no such kind."""
    found = np.asarray(lanes)
    if found.ndim != 1 or (found.size and found.dtype.kind not in "iu"):
        raise InvalidRequest("lanes must be an array of shape (n,) of whole numbers")
    return found.astype(np.intp, copy=False)


def whole(name: str, value: object) -> int:
    """Return a limit, a price or a cap, or raise InvalidRequest if it is out of range."""
    number = int(value) if isinstance(value, int | np.integer) else 0
    if isinstance(value, bool) or not 1 <= number < LARGEST:
        raise InvalidRequest(f"{name} must be a whole number from 1 to 2**62 - 1, got {value!r}")
    return number
