"""Events to canonical JSON (RFC 8785) and back: the form in which a ledger keeps them.

>>> encode(PoissonSampled(0.01, Gaussian(1.0)))
b'{"event":{"kind":"Gaussian","noise_multiplier":1},"kind":"PoissonSampled","sampling_probability":0.01}'
>>> decode(encode(Gaussian(1.5)))
Gaussian(noise_multiplier=1.5)
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields
from typing import Any

import rfc8785

from dp.errors import InvalidParameter, MalformedEvent
from dp.events import (
    Composed,
    Event,
    Gaussian,
    Laplace,
    NonPrivate,
    PoissonSampled,
    PureDP,
    Repeated,
    canonical,
)

_KINDS = {
    kind.__name__: kind
    for kind in (Gaussian, Laplace, PureDP, PoissonSampled, Repeated, Composed, NonPrivate)
}


def encode(event: Event) -> bytes:
    """Return the canonical JSON of the event, in its :func:`~dp.events.canonical` form."""
    return rfc8785.dumps(_to_json(canonical(event)))


def digest(encoded: bytes) -> bytes:
    """Return the 32 bytes of SHA-256 by which entries refer to an encoded event."""
    return hashlib.sha256(encoded).digest()


def decode(encoded: bytes) -> Event:
    """Return the event that was encoded.

    Raises:
        MalformedEvent: On anything that :func:`encode` would not have written: not JSON, an
            unknown kind, missing or unknown parameters, parameters out of their domain, or
            a form that is not the canonical one.
    """
    try:
        event = _from_json(json.loads(encoded))
        if encode(event) != encoded:
            raise MalformedEvent("not in canonical form")
    except (ValueError, TypeError, RecursionError) as error:
        if isinstance(error, MalformedEvent):
            raise
        raise MalformedEvent(str(error)) from error
    return event


def _to_json(event: Event) -> dict[str, Any]:
    members: dict[str, Any] = {"kind": type(event).__name__}
    for field in fields(event):
        value = getattr(event, field.name)
        if isinstance(value, tuple):
            members[field.name] = [_to_json(inner) for inner in value]
        elif type(value).__name__ in _KINDS:
            members[field.name] = _to_json(value)
        else:
            members[field.name] = value
    return members


def _from_json(members: object) -> Event:
    if not isinstance(members, dict):
        raise MalformedEvent(f"expected an object, got {type(members).__name__}")
    kind = _KINDS.get(str(members.get("kind")))
    if kind is None:
        raise MalformedEvent(f"unknown kind {members.get('kind')!r}")
    names = {field.name for field in fields(kind)}
    if set(members) - {"kind"} != names:
        raise MalformedEvent(f"{kind.__name__} has the parameters {sorted(names)}")
    values = {name: members[name] for name in names}
    if "event" in values:
        values["event"] = _from_json(values["event"])
    if "events" in values:
        if not isinstance(values["events"], list):
            raise MalformedEvent("events must be an array")
        values["events"] = tuple(_from_json(inner) for inner in values["events"])
    try:
        event: Event = kind(**values)
    except InvalidParameter as error:
        raise MalformedEvent(str(error)) from error
    return event
