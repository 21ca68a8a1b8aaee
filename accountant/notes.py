"""Signed notes: texts with Ed25519 signatures, and the keys that make and check them.

The formats are those of C2SP signed-note, which the Go checksum database and the witnesses of
transparency logs use. A key is known by its name and the first 4 bytes of a hash of it.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import shlex
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from accountant.errors import AnchorInvalid, AnchorUnavailable

_ED25519 = b"\x01"
_PRIVATE = "PRIVATE+KEY+"
_KEY_NAME = re.compile(r"[^\s+]+")
_SIGNATURE = re.compile(r"— ([^\s+]+) (\S+)")
_FORBIDDEN = re.compile("[\x00-\x09\x0b-\x1f\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class VerifierKey:
    """The public half of a key: whoever holds it can check signatures.

    Attributes:
        name: Of the key, without spaces and plus signs; best the origin of the ledger.
        public: The 32 bytes of the Ed25519 public key.

    Raises:
        AnchorInvalid: If it is not a key.
    """

    name: str
    public: bytes

    def __post_init__(self) -> None:
        _check_key(self.name, self.public)

    @property
    def hash(self) -> str:
        """The first 4 bytes of SHA-256(name, newline, 0x01, public key), as 8 hex digits."""
        key = self.name.encode() + b"\n" + _ED25519 + self.public
        return hashlib.sha256(key).hexdigest()[:8]

    def check(self, text: str, signature: bytes) -> None:
        """Raise unless the signature over the text is this key's.

        Raises:
            AnchorInvalid: If it is not.
        """
        try:
            Ed25519PublicKey.from_public_bytes(self.public).verify(signature, text.encode())
        except InvalidSignature:
            raise AnchorInvalid(
                "signed note",
                f"the signature of {self.name}+{self.hash} is wrong:"
                " the text or the signature was changed",
            ) from None

    def to_text(self) -> str:
        """Return ``<name>+<hash>+<base64 of 0x01 and the key>``."""
        return f"{self.name}+{self.hash}+{to_base64(_ED25519 + self.public)}"

    @classmethod
    def from_text(cls, text: str) -> VerifierKey:
        """Return the key that :meth:`to_text` wrote.

        Raises:
            AnchorInvalid: If it is not one, to the letter.

        >>> text = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"
        >>> VerifierKey.from_text(text).hash
        'c74f20a3'
        """
        key = cls(*_key_parts(text))
        if key.to_text() != text:
            raise AnchorInvalid(f"verifier key {key.name!r}", "its hash or its base64 is wrong")
        return key


@dataclass(frozen=True, slots=True)
class Signer:
    """A key that signs. Its seed is secret, and is left out of its ``repr``.

    Attributes:
        name: Of the key, as in :class:`VerifierKey`.
        seed: The 32 bytes of the Ed25519 private key.

    Raises:
        AnchorInvalid: If it is not a key.
    """

    name: str
    seed: bytes = field(repr=False)

    def __post_init__(self) -> None:
        _check_key(self.name, self.seed)

    @property
    def verifier_key(self) -> VerifierKey:
        """The public half, to be given to whoever verifies."""
        private = Ed25519PrivateKey.from_private_bytes(self.seed)
        return VerifierKey(self.name, private.public_key().public_bytes_raw())

    def signature_line(self, text: str) -> str:
        """Return the line that signs a text in a note."""
        signature = Ed25519PrivateKey.from_private_bytes(self.seed).sign(text.encode())
        return f"— {self.name} {to_base64(bytes.fromhex(self.verifier_key.hash) + signature)}\n"

    def to_text(self) -> str:
        """Return ``PRIVATE+KEY+<name>+<hash>+<base64 of 0x01 and the seed>``."""
        return f"{_PRIVATE}{self.name}+{self.verifier_key.hash}+{to_base64(_ED25519 + self.seed)}"

    @classmethod
    def from_text(cls, text: str) -> Signer:
        """Return the key that :meth:`to_text` wrote.

        Raises:
            AnchorInvalid: If it is not one, to the letter. The message does not repeat it.
        """
        signer = cls(*_key_parts(text.removeprefix(_PRIVATE)))
        if signer.to_text() != text:
            raise AnchorInvalid(f"signing key {signer.name!r}", "its hash or its base64 is wrong")
        return signer


def new_key(path: str | Path, name: str) -> Signer:
    """Make a signing key and write it to a new file that only its owner can read.

    Keep the file out of the ledger's folder: whoever can rewrite both can forge anchors.

    Raises:
        AnchorInvalid: If the name has spaces or plus signs.
        AnchorUnavailable: If the file exists or cannot be written.
    """
    signer = Signer(name, os.urandom(32))
    path = Path(path)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(signer.to_text() + "\n")
            file.flush()
            os.fsync(file.fileno())
        fsync_folder(path)
    except FileExistsError as error:
        reason = "it exists, and no key is ever overwritten; choose another path"
        raise AnchorUnavailable(str(path), reason) from error
    except OSError as error:
        raise AnchorUnavailable(str(path), f"cannot write the key: {error.strerror}") from error
    return signer


def read_key(path: str | Path) -> Signer:
    """Return the signing key that :func:`new_key` wrote.

    Raises:
        AnchorInvalid: If the file holds no signing key.
        AnchorUnavailable: If it cannot be read, or others than its owner may use it.
    """
    try:
        with Path(path).open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            content = file.read()
    except OSError as error:
        reason = f"cannot read the key: {error.strerror}; give the path of a signing key"
        raise AnchorUnavailable(str(path), reason) from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        reason = f"others than its owner may use this key; run: chmod 600 {shlex.quote(str(path))}"
        raise AnchorUnavailable(str(path), reason)
    try:
        return Signer.from_text(content.decode().removesuffix("\n"))
    except (AnchorInvalid, UnicodeDecodeError):
        reason = "this is no signing key; restore the file from a copy, or make a new key"
        raise AnchorInvalid(str(path), reason) from None


def sign_text(text: str, signers: Iterable[Signer]) -> str:
    """Return the signed note: the text, an empty line, and one line for each signer.

    Raises:
        AnchorInvalid: If there is no signer, or the text cannot be signed.
    """
    signers = tuple(signers)
    if not signers or not text.endswith("\n") or _FORBIDDEN.search(text):
        reason = "it takes a signer, and a text without control characters that ends its last line"
        raise AnchorInvalid("note to sign", reason)
    return text + "\n" + "".join(signer.signature_line(text) for signer in signers)


def open_text(note: str, trusted: Iterable[VerifierKey]) -> tuple[str, frozenset[VerifierKey]]:
    """Return the text of a signed note, and which of the trusted keys signed it.

    Signatures of other keys are ignored, as the specification says, but must be well formed.

    Raises:
        AnchorInvalid: If no trusted key signed it, a trusted key's signature is wrong, or the
            note is malformed.
    """
    text, lines = unverified(note)
    trusted, signed = frozenset(trusted), set()
    for line in lines:
        name, key_hash, signature = _signature(line)
        for key in trusted:
            if (key.name, key.hash) == (name, key_hash):
                key.check(text, signature)
                signed.add(key)
    if not signed:
        known = ", ".join(sorted(f"{key.name}+{key.hash}" for key in trusted)) or "none"
        raise AnchorInvalid("signed note", f"no trusted key signed it; trusted: {known}")
    return text, frozenset(signed)


def unverified(note: str) -> tuple[str, list[str]]:
    """Return the text of a note and its signature lines; nothing has been verified.

    Raises:
        AnchorInvalid: If it is no note.
    """
    text, separator, signatures = note.rpartition("\n\n")
    if not separator or not signatures.endswith("\n") or _FORBIDDEN.search(note):
        raise AnchorInvalid("signed note", "it is not a text, an empty line and signatures")
    return text + "\n", signatures[:-1].split("\n")


def signatures(note: str) -> list[tuple[str, str, bytes]]:
    """Return key name, key hash and signature of each signature line; nothing has been verified.

    Raises:
        AnchorInvalid: If it is no note, or a line is no signature.
    """
    return [_signature(line) for line in unverified(note)[1]]


def to_base64(content: bytes) -> str:
    """Return the standard base64 of some bytes, as text."""
    return base64.b64encode(content).decode()


def fsync_folder(path: Path) -> None:
    """Make the name of a new file durable."""
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _signature(line: str) -> tuple[str, str, bytes]:
    """Return the key name, the key hash and the signature of a line."""
    found = _SIGNATURE.fullmatch(line)
    try:
        content = base64.b64decode(found[2], validate=True) if found else b""
    except ValueError:
        content = b""
    if not found or len(content) <= 4 or to_base64(content) != found[2]:
        raise AnchorInvalid("signed note", f"{line!r} is no signature")
    return found[1], content[:4].hex(), content[4:]


def _key_parts(text: str) -> tuple[str, bytes]:
    """Return name and key of ``<name>+<hash>+<base64>``; the whole is compared afterwards."""
    try:
        name, _, content = text.split("+", 2)
        return name, base64.b64decode(content)[1:]
    except ValueError:
        raise AnchorInvalid("key", "it is not of the form <name>+<hash>+<base64>") from None


def _check_key(name: str, content: bytes) -> None:
    if not _KEY_NAME.fullmatch(name) or _FORBIDDEN.search(name):
        raise AnchorInvalid(f"key {name!r}", "its name must have neither spaces nor plus signs")
    if len(content) != 32:
        raise AnchorInvalid(f"key {name!r}", f"it must have 32 bytes, not {len(content)}")
