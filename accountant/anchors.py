"""Anchors: signed checkpoints of a ledger, kept where whoever changes the ledger cannot.

A chain does not reveal that its end was cut off, nor that all of it was written anew. A
checkpoint states the last entry of every budget; signed and published elsewhere it is an
*anchor*: a ledger that does not extend it was rolled back, rewritten or forked. What happened
after the last anchor is not covered.

The formats are those of C2SP: signed-note for keys and signatures (Ed25519), tlog-checkpoint for
the text, with RFC 6962 roots. A checkpoint of two budgets, before it is signed::

    epsledger/<ledger id>
    2
    <base64 of the root over the head lines, each without its newline, in this order>
    head news 12 <base64 of the digest of entry 12>
    head tips 3 <base64 of the digest of entry 3>

Further lines say what else happened. To change the key, a checkpoint carries ``key <verifier
key>`` and is signed by the old and the new key; :func:`history` follows such changes. If the old
key is lost it carries ``lost <hash of the old key>`` as well, signed by the new key alone: then
only a person can say whether the new key is to be trusted.
"""

from __future__ import annotations

import base64
import os
import re
import shlex
import subprocess
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from accountant import merkle
from accountant.errors import AnchorInvalid, AnchorUnavailable
from accountant.notes import (
    Signer,
    VerifierKey,
    fsync_folder,
    open_text,
    sign_text,
    signatures,
    to_base64,
    unverified,
)

ORIGIN = "epsledger/"
"""What the first line of every checkpoint begins with; the ledger's id follows."""
COMMAND = "command:"
"""What a target begins with that is a command and not a file."""
COMMAND_SECONDS = 60
"""How long such a command may take."""

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_NOTE = re.compile(rf"{ORIGIN}[^\n]+\n(?:(?!{ORIGIN})[^\n]+\n)+\n(?:— [^\n]+\n)+")


@dataclass(frozen=True, slots=True)
class Head:
    """The last entry of one budget's chain.

    Attributes:
        budget: Name of the budget.
        seq: Position of its last entry, from 1.
        digest: The 32 bytes of that entry's digest.

    Raises:
        AnchorInvalid: If no ledger has such a head.
    """

    budget: str
    seq: int
    digest: bytes

    def __post_init__(self) -> None:
        named = _ID.fullmatch(self.budget)
        if not named or not 1 <= self.seq < 2**63 or len(self.digest) != merkle.SIZE:
            raise AnchorInvalid(f"head of {self.budget!r}", "no ledger has such a head")

    def to_line(self) -> str:
        """Return ``head <budget> <seq> <base64 of the digest>``: a leaf of the tree."""
        return f"head {self.budget} {self.seq} {to_base64(self.digest)}"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The last entries of all budgets of a ledger, at one moment.

    Attributes:
        ledger: Id of the ledger: letters, digits, dot, dash and underscore, at most 64.
        heads: One for each budget, in the order of their names.
        lines: What else it says, for instance ``key <verifier key>``; printable, and
            not beginning like a head or an origin.

    Raises:
        AnchorInvalid: If it cannot be written as a text that reads back the same.

    >>> checkpoint = Checkpoint("survey", (Head("news", 12, bytes(32)),))
    >>> print(checkpoint.to_text(), end="")
    epsledger/survey
    1
    +EC+YMRBIYBf6+1IvhHvpx3ANBWYrDluGUMiWH9Y93Y=
    head news 12 AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=
    >>> Checkpoint.from_text(checkpoint.to_text()) == checkpoint
    True
    """

    ledger: str
    heads: tuple[Head, ...]
    lines: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = [head.budget for head in self.heads]
        if not _ID.fullmatch(self.ledger):
            raise AnchorInvalid("checkpoint", f"{self.ledger!r} is not the id of a ledger")
        if names != sorted(set(names)):
            raise AnchorInvalid("checkpoint", "its budgets are not in the order of their names")
        for line in self.lines:
            if not line or not line.isprintable() or line.startswith(("head ", "— ", ORIGIN)):
                raise AnchorInvalid("checkpoint", f"{line!r} cannot be one of its further lines")

    def to_text(self) -> str:
        """Return the text to sign, as the module describes it."""
        heads = [head.to_line() for head in self.heads]
        root = to_base64(merkle.root([line.encode() for line in heads]))
        lines = (ORIGIN + self.ledger, str(len(heads)), root, *heads, *self.lines)
        return "".join(f"{line}\n" for line in lines)

    @classmethod
    def from_text(cls, text: str) -> Checkpoint:
        """Return the checkpoint that :meth:`to_text` wrote.

        Raises:
            AnchorInvalid: If the root is not that of the heads, or any letter is out of place.
        """
        try:
            origin, size, _, *lines, _ = text.split("\n")
            count = int(size)
            heads = tuple(_head(line) for line in lines[:count])
        except ValueError as error:
            raise AnchorInvalid("checkpoint", f"its layout is wrong ({error})") from error
        checkpoint = cls(origin.removeprefix(ORIGIN), heads, tuple(lines[count:]))
        if checkpoint.to_text() != text:
            raise AnchorInvalid("checkpoint", "its root is not that of its heads, or its layout")
        return checkpoint


def sign(checkpoint: Checkpoint, signers: Iterable[Signer]) -> str:
    """Return the checkpoint as a signed note.

    Raises:
        AnchorInvalid: If there is no signer.

    >>> signer = Signer("epsledger/survey", bytes(32))
    >>> note = sign(Checkpoint("survey", ()), [signer])
    >>> checkpoint, keys = opened(note, [signer.verifier_key])
    >>> checkpoint.ledger, keys == {signer.verifier_key}
    ('survey', True)
    """
    return sign_text(checkpoint.to_text(), signers)


def opened(note: str, trusted: Iterable[VerifierKey]) -> tuple[Checkpoint, frozenset[VerifierKey]]:
    """Return the checkpoint of a signed note, and which of the trusted keys signed it.

    Whether it is about the ledger in question is the caller's to check: ``checkpoint.ledger``.

    Raises:
        AnchorInvalid: As :func:`open_text`, or if the text is no checkpoint.
    """
    text, signed = open_text(note, trusted)
    return Checkpoint.from_text(text), signed


def history(
    notes: Iterable[str],
    first: VerifierKey,
    *,
    vouched: Collection[VerifierKey] = (),
    shared: bool = False,
) -> tuple[tuple[Checkpoint, ...], VerifierKey]:
    """Return the checkpoints of a series of notes, and the key to trust after the last.

    Each note must be signed by the key that was valid at its place in the series. A note with a
    line ``key <verifier key>`` must be signed by both, and from the next note on only the new
    key counts.

    Args:
        notes: Signed checkpoints of one ledger, oldest first.
        first: The key that is valid at the first of them.
        vouched: Keys that somebody you trust gave you because the one before them was lost.
        shared: Whether other keys sign in the same place; their notes are left out then.

    Raises:
        AnchorInvalid: If a note does not open, is about another ledger, or hands over to a new
            key without the signatures that this takes.
    """
    checkpoints: list[Checkpoint] = []
    current = first
    for number, note in enumerate(notes, 1):
        try:
            checkpoint, current = _followed(note, current, vouched)
        except AnchorInvalid as error:
            lost = f"lost {current.hash}" in note.split("\n")
            if shared and not lost and not _claims(note, current):
                continue
            raise AnchorInvalid(f"note {number} of the series", str(error)) from error
        if checkpoints and checkpoint.ledger != checkpoints[0].ledger:
            raise AnchorInvalid(f"note {number} of the series", "it is about another ledger")
        checkpoints.append(checkpoint)
    return tuple(checkpoints), current


def since(notes: Sequence[str], key: VerifierKey) -> tuple[str, ...]:
    """Return the notes of a series from the first that says it is signed by a key.

    Raises:
        AnchorInvalid: If something before it is no note.
    """
    for at, note in enumerate(notes):
        if _claims(note, key):
            return tuple(notes[at:])
    return ()


def successor(notes: Iterable[str], key: VerifierKey) -> VerifierKey | None:
    """Return the key that this one handed over to by its signature, or None."""
    for note in notes:
        with suppress(AnchorInvalid):  # nothing is handed over by what is no note of this key
            new, _ = _handover(opened(note, {key})[0])
            if new not in (None, key):
                return new
    return None


def check_continues(
    notes: Sequence[str], checkpoint: Checkpoint, keys: Collection[VerifierKey]
) -> None:
    """Raise unless a checkpoint signed by these keys would continue a series of notes.

    A note that does not would make the whole place unverifiable. No signature is verified here:
    this finds mistakes, not forgeries.

    Args:
        notes: Those that are there, oldest first.
        checkpoint: The next one.
        keys: That will sign it.

    Raises:
        AnchorInvalid: If the series is another ledger's, or its last key does not sign.
    """
    if not notes:
        return
    last = Checkpoint.from_text(unverified(notes[-1])[0])
    if last.ledger != checkpoint.ledger:
        reason = f"it holds anchors of ledger {last.ledger}; choose another place for this one's"
        raise AnchorInvalid("anchors", reason)
    handed, _ = _handover(last)
    if handed is None:
        valid = {(name, hash_) for name, hash_, _ in signatures(notes[-1])}
    else:
        valid = {(handed.name, handed.hash)}
    known = "the last key is " + ", ".join(f"{name}+{hash_}" for name, hash_ in sorted(valid))
    new, lost = _handover(checkpoint)
    if lost is not None and new != handed and lost not in {hash_ for _, hash_ in valid}:
        raise AnchorInvalid("anchors", f"{known}, and not {lost}")
    if lost is None and valid.isdisjoint((key.name, key.hash) for key in keys):
        reason = f"{known}; sign with it, or rotate from it to another"
        raise AnchorInvalid("anchors", reason)


def compare(
    checkpoint: Checkpoint, digest_at: Callable[[str, int], bytes | None]
) -> tuple[str, ...]:
    """Return in what a ledger contradicts a checkpoint; nothing if it extends it.

    Args:
        checkpoint: An opened one of this ledger.
        digest_at: The digest of a budget's entry by name and seq, None where there is none.

    >>> checkpoint = Checkpoint("survey", (Head("news", 12, bytes(32)),))
    >>> compare(checkpoint, lambda budget, seq: bytes(32) if seq <= 9 else None)
    ("budget 'news': entry 12 of the anchor is missing: the ledger was rolled back",)
    """
    problems = []
    for head in checkpoint.heads:
        digest = digest_at(head.budget, head.seq)
        if digest == head.digest:
            continue
        if digest is not None:
            problem = f"entry {head.seq} differs from the anchor: it was rewritten or forked"
        elif digest_at(head.budget, 1) is None:
            problem = "it is in the anchor, but not in the ledger"
        else:
            problem = f"entry {head.seq} of the anchor is missing: the ledger was rolled back"
        problems.append(f"budget {head.budget!r}: {problem}")
    return tuple(problems)


def is_command(target: str | Path) -> bool:
    """Say whether a target is a command and not a file."""
    return isinstance(target, str) and target.startswith(COMMAND)


def publish(note: str, target: str | Path) -> None:
    """Append a signed checkpoint to a file, or hand it to a command.

    Args:
        note: What :func:`sign` returned.
        target: A file in an existing folder, made if need be and durable on return; or
            ``command:`` and a command line, which gets the note on its standard input and
            must end with status 0. It is run without a shell.

    Raises:
        AnchorInvalid: If the note is none, or the file holds anything else than whole notes.
        AnchorUnavailable: If the note could not be published.
    """
    unverified(note)
    if not _NOTE.fullmatch(note):
        raise AnchorInvalid("signed note", "this is no signed checkpoint")
    if is_command(target):
        _run(str(target), note.encode())
        return
    path, content = Path(target), note.encode()
    if path.exists():
        read_notes(path)  # behind a note that was cut off this one would be lost
    try:
        with path.open("ab", buffering=0) as file:
            before = os.fstat(file.fileno()).st_size
            if file.write(content) != len(content):
                file.truncate(before)
                raise AnchorUnavailable(str(path), "there is no room for the note")
            os.fsync(file.fileno())
        fsync_folder(path)
    except OSError as error:
        raise AnchorUnavailable(str(path), f"cannot append: {error.strerror}") from error


def read_notes(path: str | Path) -> tuple[str, ...]:
    """Return the notes of a file that :func:`publish` wrote, oldest first, unopened.

    Raises:
        AnchorInvalid: If anything else is in the file, for instance a note cut off by a crash.
        AnchorUnavailable: If it cannot be read.
    """
    try:
        content = Path(path).read_bytes().decode()
    except OSError as error:
        raise AnchorUnavailable(str(path), f"cannot read it: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise AnchorInvalid(str(path), f"byte {error.start} is not text") from error
    notes, at = [], 0
    while at < len(content):
        found = _NOTE.match(content, at)
        if not found:
            line = content.count("\n", 0, at) + 1
            reason = f"no whole note begins at line {line}; remove a note cut off by a crash"
            raise AnchorInvalid(str(path), reason)
        notes.append(found[0])
        at = found.end()
    return tuple(notes)


def _claims(note: str, key: VerifierKey) -> bool:
    """Say whether a note says that it is signed by a key; whether it is, must be verified."""
    return any((name, hash_) == (key.name, key.hash) for name, hash_, _ in signatures(note))


def _followed(
    note: str, current: VerifierKey, vouched: Collection[VerifierKey]
) -> tuple[Checkpoint, VerifierKey]:
    """Return the checkpoint of one note of a series, and the key that is valid after it."""
    new, lost = _handover(Checkpoint.from_text(unverified(note)[0]))
    if new is None:
        return opened(note, {current})[0], current
    checkpoint, signed = opened(note, {current, new})
    if new not in signed:
        raise AnchorInvalid("checkpoint", f"the new key {new.name}+{new.hash} did not sign it")
    if current not in signed and lost != current.hash:
        raise AnchorInvalid("checkpoint", f"only the new key {new.name}+{new.hash} signed it")
    if current not in signed and new not in vouched:
        raise AnchorInvalid(
            "checkpoint",
            f"the old key {current.name}+{current.hash} was declared lost here; get the new"
            " verifier key from somebody you trust and pass it explicitly",
        )
    return checkpoint, new


def _handover(checkpoint: Checkpoint) -> tuple[VerifierKey | None, str | None]:
    """Return the new key and the hash of the lost key that a checkpoint states."""
    stated: dict[str, str] = {}
    for line in checkpoint.lines:
        word, _, rest = line.partition(" ")
        if word in stated or (word == "lost" and "key" not in stated):
            raise AnchorInvalid("checkpoint", "it takes one new key to replace a lost one")
        if word in {"key", "lost"}:
            stated[word] = rest
    new = VerifierKey.from_text(stated["key"]) if "key" in stated else None
    return new, stated.get("lost")


def _head(line: str) -> Head:
    """Return a head from its line, leniently: the whole text is compared afterwards."""
    _, budget, seq, digest = line.split(" ")
    return Head(budget, int(seq), base64.b64decode(digest))


def _run(target: str, note: bytes) -> None:
    try:
        command = shlex.split(target.removeprefix(COMMAND))
        done = subprocess.run(  # noqa: S603 - the command is the owner's own, and no shell reads it
            command, input=note, capture_output=True, timeout=COMMAND_SECONDS, check=False
        )
    except (OSError, ValueError, IndexError, subprocess.TimeoutExpired) as error:
        raise AnchorUnavailable(target, f"cannot run it: {error}") from error
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip() or "nothing on standard error"
        raise AnchorUnavailable(target, f"it failed with status {done.returncode}: {said}")
