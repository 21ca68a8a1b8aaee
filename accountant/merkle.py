"""Merkle trees: one digest for a list of leaves, and short proofs that a leaf is in the list.

The hashes are those of RFC 6962 section 2.1 (unchanged in RFC 9162 section 2.1), so others'
verifiers work on ours. Leaves and nodes are hashed under different prefixes: without them an
inner node could be passed off as a leaf, and two lists could have one root.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

SIZE = 32
"""Bytes of every digest."""


def leaf_hash(data: bytes) -> bytes:
    """Return the digest of one leaf: SHA-256 over 0x00 and its bytes."""
    return hashlib.sha256(b"\x00" + data).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """Return the digest of an inner node: SHA-256 over 0x01 and the digests of its children."""
    return hashlib.sha256(b"\x01" + left + right).digest()


def root(leaves: Sequence[bytes]) -> bytes:
    """Return the root over the leaves in their order; of no leaves it is SHA-256 of nothing.

    >>> root([b"one"]) == leaf_hash(b"one")
    True
    >>> root([]).hex()[:8]
    'e3b0c442'
    """
    level = [leaf_hash(leaf) for leaf in leaves]
    while len(level) > 1:
        level = _parents(level)
    return level[0] if level else hashlib.sha256().digest()


def inclusion_proof(leaves: Sequence[bytes], index: int) -> tuple[bytes, ...]:
    """Return the digests that lead from one leaf to the root, from the leaf upwards.

    Args:
        leaves: All leaves.
        index: Of the leaf, from 0.

    Raises:
        ValueError: If there is no such leaf.

    >>> leaves = [b"one", b"two", b"three"]
    >>> proof = inclusion_proof(leaves, 1)
    >>> root_from_inclusion(b"two", 1, size=3, proof=proof) == root(leaves)
    True
    """
    _check(index, len(leaves))
    proof = []
    level = [leaf_hash(leaf) for leaf in leaves]
    while len(level) > 1:
        if index ^ 1 < len(level):
            proof.append(level[index ^ 1])
        level, index = _parents(level), index >> 1
    return tuple(proof)


def root_from_inclusion(leaf: bytes, index: int, *, size: int, proof: Sequence[bytes]) -> bytes:
    """Return the root that the tree must have if the proof holds; compare it with the known one.

    Args:
        leaf: The leaf's bytes.
        index: Its position, from 0.
        size: Number of leaves of the tree.
        proof: What :func:`inclusion_proof` returned.

    Raises:
        ValueError: If no leaf of such a tree has a proof of this form.
    """
    _check(index, size)
    digest, path = leaf_hash(leaf), list(reversed(proof))
    while size > 1:
        if index ^ 1 < size:
            if not path or len(path[-1]) != SIZE:
                raise ValueError("a digest of the proof is missing or has another size")
            sibling = path.pop()
            digest = node_hash(sibling, digest) if index & 1 else node_hash(digest, sibling)
        index, size = index >> 1, (size + 1) >> 1
    if path:
        raise ValueError(f"the proof has {len(path)} digests too many")
    return digest


def _parents(level: list[bytes]) -> list[bytes]:
    """Return the level above; the last digest goes up unchanged where it has no sibling."""
    pairs = zip(level[::2], level[1::2], strict=False)
    return [node_hash(left, right) for left, right in pairs] + level[len(level) & ~1 :]


def _check(index: int, size: int) -> None:
    if not 0 <= index < size:
        raise ValueError(f"a tree of {size} leaves has no leaf {index}")
