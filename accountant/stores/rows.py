"""Rows: what a store keeps, as plain tuples in the order of the tables' columns."""

from __future__ import annotations

from typing import NamedTuple

from accountant.errors import LedgerCorrupt
from dp import Price

_LANE_BYTES = 16


class BudgetRow(NamedTuple):
    """One budget: its frozen record, and the head and totals that its entries come to."""

    name: str
    record: bytes
    seq: int
    head: bytes
    time: int
    totals: bytes
    pending: str
    closed: bool


class EventRow(NamedTuple):
    """An event that was asked for, with the price that is frozen for this budget."""

    budget: str
    digest: bytes
    encoded: bytes
    price: bytes


class EntryRow(NamedTuple):
    """One entry, packed, and its digest."""

    budget: str
    seq: int
    body: bytes
    digest: bytes


class ReservationRow(NamedTuple):
    """One reservation: what its entries come to, and the secret of its holder."""

    budget: str
    seq: int
    event: bytes
    uses: int
    holder: str
    charged: bytes
    marked: int
    open: bool
    lease: bool


class KeyRow(NamedTuple):
    """One idempotency key, and the answer that was released for it."""

    budget: str
    key: str
    payload: bytes
    seq: int
    digest: bytes
    answer: bytes | None


class CheckpointRow(NamedTuple):
    """One signed checkpoint, as it was published."""

    number: int
    note: str


class Spent(NamedTuple):
    """How often the same event was charged with the same number of uses."""

    event: bytes
    uses: int
    times: int


def pack_lanes(lanes: Price) -> bytes:
    """Return lanes as 128-bit little-endian integers: no sum of them can overflow.

    >>> unpack_lanes(pack_lanes((1, 2**96)))
    (1, 79228162514264337593543950336)
    """
    return b"".join([lane.to_bytes(_LANE_BYTES, "little") for lane in lanes])


def unpack_lanes(packed: bytes) -> Price:
    """Return the lanes that :func:`pack_lanes` packed.

    Raises:
        LedgerCorrupt: If these are not whole lanes.
    """
    if len(packed) % _LANE_BYTES:
        raise LedgerCorrupt(f"lanes of {len(packed)} bytes")
    return tuple(
        [
            int.from_bytes(packed[at : at + _LANE_BYTES], "little")
            for at in range(0, len(packed), _LANE_BYTES)
        ]
    )
