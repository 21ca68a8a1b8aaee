"""Events to canonical JSON (RFC 8785) and back: the form in which a ledger keeps them.

>>> from dp import Gaussian, PoissonSampled
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
from dp.events import KINDS, Event, canonical


def encode(event: Event) -> bytes:
    """Return the canonical JSON of the event, in its :func:`~dp.events.canonical` form."""
    return rfc8785.dumps(to_json(canonical(event)))


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
        event = from_json(json.loads(encoded))
        if encode(event) != encoded:
            raise MalformedEvent("not in canonical form")
    except (ValueError, TypeError, RecursionError) as error:
        if isinstance(error, MalformedEvent):
            raise
        raise MalformedEvent(str(error)) from error
    return event


def read_event(text: str) -> Event:
    """Return the event of a JSON text that a person wrote: any order, any form.

    Raises:
        MalformedEvent: If it is none.

    >>> read_event('{"kind": "Gaussian", "noise_multiplier": 2}')
    Gaussian(noise_multiplier=2.0)
    """
    try:
        return from_json(json.loads(text))
    except (json.JSONDecodeError, RecursionError) as error:
        raise MalformedEvent(str(error)) from error


def to_json(value: Any) -> Any:
    """Return an event as JSON objects, as it is written."""
    if isinstance(value, tuple):
        return [to_json(inner) for inner in value]
    if type(value).__name__ not in KINDS:
        return value
    members = {field.name: to_json(getattr(value, field.name)) for field in fields(value)}
    return {"kind": type(value).__name__} | members


def from_json(members: object) -> Event:
    """Return the event of JSON objects; raises MalformedEvent as :func:`decode` does."""
    if not isinstance(members, dict):
        raise MalformedEvent(f"expected an object, got {type(members).__name__}")
    kind = KINDS.get(str(members.get("kind")))
    if kind is None:
        raise MalformedEvent(f"unknown kind {members.get('kind')!r}")
    names = {field.name for field in fields(kind)}
    if set(members) - {"kind"} != names:
        raise MalformedEvent(f"{kind.__name__} has the parameters {sorted(names)}")
    values = {name: members[name] for name in names}
    if "event" in values:
        values["event"] = from_json(values["event"])
    if "events" in values:
        if not isinstance(values["events"], list):
            raise MalformedEvent("events must be an array")
        values["events"] = tuple(from_json(inner) for inner in values["events"])
    try:
        event: Event = kind(**values)
    except InvalidParameter as error:
        raise MalformedEvent(str(error)) from error
    return event
