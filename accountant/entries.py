"""Entries: the append-only, chained record of everything that happened to a budget.

An entry is packed into a fixed binary layout with a version byte, and refers to its event by
the SHA-256 of the event's canonical JSON. One chain per budget: the digest of an entry covers
the digest of the one before, so no entry can be edited, dropped or moved without breaking
every later one. A chain by itself does not reveal that its end was cut off.

What one operation wrote to several chains is linked: the entry in the first chain says how many
chains there are, those in the others carry its digest.
"""

from __future__ import annotations

import enum
import hashlib
import struct
from dataclasses import dataclass

from accountant.errors import LedgerCorrupt

VERSION, LINKED_VERSION = 1, 2
"""Layouts: of an entry by itself, and of one that is linked to those in other chains."""
NO_EVENT = bytes(32)
"""The event of entries that have none."""
GENESIS = bytes(32)
"""What the first entry of a chain is chained to."""

# version, kind, seq, time, first, times, uses, reservation, event, lengths of activity and note
_HEADER = struct.Struct("<BBQQQQQQ32sHH")
_LINK = struct.Struct("<32sH")
_DOMAIN = b"epsledger entry\x00"
KIND_AT, USES_AT, EVENT_AT = 1, 34, 50
"""Where the layout keeps kind (1 byte), uses (8) and event (32), for sums in SQL."""


class Kind(enum.IntEnum):
    """What an entry records. The numbers are stored: they never change."""

    OPEN = 1
    CHARGE = 2
    RESERVE = 3
    MARK = 4
    SETTLE = 5
    VOID = 6
    REFUSE = 7
    LEASE = 8
    ADOPT = 9
    IMPORT = 10
    CORRECT = 11
    CLOSE = 12
    UNPROTECTED = 13


_KINDS = {int(kind): kind for kind in Kind}
SPENDS = frozenset((Kind.CHARGE, Kind.IMPORT, Kind.CORRECT))
"""Kinds that spend at once."""
CARRIES = frozenset((Kind.IMPORT, Kind.CORRECT))
"""Those of them that a budget has from the one that it supersedes."""
HOLDS = frozenset((Kind.RESERVE, Kind.LEASE))
"""Kinds that put uses aside."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the ledger.

    Attributes:
        kind: What happened.
        seq: Position in the budget's chain, from 1.
        time: Microseconds since 1970 (UTC), never decreasing. A label: nothing is decided by it.
        event: SHA-256 of the event's canonical JSON; of the budget's record for OPEN, and for
            CLOSE that of the successor, if there is one.
        uses: How many uses were charged, reserved, marked, settled or asked for.
        reservation: The ``seq`` of the RESERVE or LEASE entry that MARK, SETTLE, VOID and ADOPT
            refer to, else 0.
        activity: What the spend was for, for instance ``training``.
        note: Free text of the caller.
        times: How many equal refusals this entry stands for; 1 for every other kind.
        first: Time of the first of them; equal to ``time`` for every other kind.
        link: Digest of the entry in the operation's first chain; zero there and if there is one.
        chains: In the first of several chains, how many there are; else 0.
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
    link: bytes = NO_EVENT
    chains: int = 0


def pack(entry: Entry) -> bytes:
    """Return the binary form of an entry."""
    activity, note = entry.activity.encode(), entry.note.encode()
    linked = bool(entry.chains) or entry.link != NO_EVENT
    header = _HEADER.pack(
        LINKED_VERSION if linked else VERSION,
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
    link = _LINK.pack(entry.link, entry.chains) if linked else b""
    return header + link + activity + note


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
        link, chains, start = NO_EVENT, 0, _HEADER.size
        if version == LINKED_VERSION:
            (link, chains), start = _LINK.unpack_from(body, start), start + _LINK.size
        if version not in (VERSION, LINKED_VERSION) or len(body) != start + activity + note:
            raise LedgerCorrupt(f"entry of version {version} and {len(body)} bytes")
        return Entry(
            _KINDS.get(kind) or Kind(kind),
            seq,
            time,
            event,
            uses,
            reservation,
            body[start : start + activity].decode(),
            body[start + activity :].decode(),
            times,
            first,
            link,
            chains,
        )
    except (struct.error, ValueError) as error:
        raise LedgerCorrupt(f"unreadable entry: {error}") from error


def chain(previous: bytes, body: bytes) -> bytes:
    """Return the digest of an entry: SHA-256 over a domain tag, the digest before, and its body."""
    return hashlib.sha256(_DOMAIN + previous + body).digest()
