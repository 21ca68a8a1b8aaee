"""Entries: the append-only, chained record of everything that happened to a budget.

An entry is packed into a fixed binary layout with a version byte, and refers to its event by
the SHA-256 of the event's canonical JSON. One chain per budget: the digest of an entry covers
the digest of the one before, so no entry can be edited, dropped or moved without breaking
every later one. A chain by itself does not reveal that its end was cut off.
"""

from __future__ import annotations

import enum
import hashlib
import struct
from dataclasses import dataclass

from accountant.errors import LedgerCorrupt

VERSION = 1
NO_EVENT = bytes(32)
"""The event of entries that have none."""
GENESIS = bytes(32)
"""What the first entry of a chain is chained to."""

# version, kind, seq, time, first, times, uses, reservation, event, lengths of activity and note
_HEADER = struct.Struct("<BBQQQQQQ32sHH")
_DOMAIN = b"epsledger entry\x00"


class Kind(enum.IntEnum):
    """What an entry records. The numbers are stored: they never change."""

    OPEN = 1
    CHARGE = 2
    RESERVE = 3
    MARK = 4
    SETTLE = 5
    VOID = 6
    REFUSE = 7


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the ledger.

    Attributes:
        kind: What happened.
        seq: Position in the budget's chain, from 1.
        time: Microseconds since 1970 (UTC), never decreasing. A label: nothing is decided by it.
        event: SHA-256 of the event's canonical JSON; of the budget's record for OPEN.
        uses: How many uses were charged, reserved, marked, settled or asked for.
        reservation: The ``seq`` of the RESERVE entry that MARK, SETTLE and VOID refer to, else 0.
        activity: What the spend was for, for instance ``training``.
        note: Free text of the caller.
        times: How many equal refusals this entry stands for; 1 for every other kind.
        first: Time of the first of them; equal to ``time`` for every other kind.
    """

    kind: Kind
    seq: int
    time: int
    event: bytes = NO_EVENT
    uses: int = 0
    reservation: int = 0
    activity: str = ""
    note: str = ""
    times: int = 1
    first: int = 0


def pack(entry: Entry) -> bytes:
    """Return the binary form of an entry."""
    activity, note = entry.activity.encode(), entry.note.encode()
    header = _HEADER.pack(
        VERSION,
        entry.kind,
        entry.seq,
        entry.time,
        entry.first,
        entry.times,
        entry.uses,
        entry.reservation,
        entry.event,
        len(activity),
        len(note),
    )
    return header + activity + note


def unpack(body: bytes) -> Entry:
    """Return the entry that :func:`pack` wrote.

    Raises:
        LedgerCorrupt: On an unknown version or kind, or any byte too many or too few.

    >>> entry = Entry(Kind.CHARGE, seq=2, time=0, uses=3, activity="vote")
    >>> unpack(pack(entry)) == entry
    True
    """
    try:
        (version, kind, seq, time, first, times, uses, reservation, event, activity, note) = (
            _HEADER.unpack_from(body)
        )
        if version != VERSION or len(body) != _HEADER.size + activity + note:
            raise LedgerCorrupt(f"entry of version {version} and {len(body)} bytes")
        text = body[_HEADER.size :]
        return Entry(
            Kind(kind),
            seq,
            time,
            event,
            uses,
            reservation,
            text[:activity].decode(),
            text[activity:].decode(),
            times,
            first,
        )
    except (struct.error, ValueError) as error:
        raise LedgerCorrupt(f"unreadable entry: {error}") from error


def chain(previous: bytes, body: bytes) -> bytes:
    """Return the digest of an entry: SHA-256 over a domain tag, the digest before, and its body."""
    return hashlib.sha256(_DOMAIN + previous + body).digest()
