"""Merkle: the published vectors of RFC 6962's reference implementation, proofs, forgeries."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accountant import merkle
from accountant.merkle import inclusion_proof, leaf_hash, root, root_from_inclusion
from tests.strategies import examples

LEAVES = tuple(
    bytes.fromhex(leaf)
    for leaf in (
        "",
        "00",
        "10",
        "2021",
        "3031",
        "40414243",
        "5051525354555657",
        "606162636465666768696a6b6c6d6e6f",
    )
)
ROOTS = (
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
)
"""Of the first 0, 1, ... 8 leaves."""
PROOFS = (
    (0, 1, ()),
    (
        0,
        8,
        (
            "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
            "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
            "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
        ),
    ),
    (
        5,
        8,
        (
            "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
            "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
            "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
        ),
    ),
    (2, 3, ("fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",)),
    (
        1,
        5,
        (
            "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
            "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
            "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
        ),
    ),
)
"""Index from 0, size, and the published path."""


def by_definition(leaves):
    """RFC 6962 section 2.1 read aloud: split at the largest power of two below the size."""
    if len(leaves) <= 1:
        return leaf_hash(leaves[0]) if leaves else hashlib.sha256(b"").digest()
    split = 1 << (len(leaves) - 1).bit_length() - 1
    left, right = by_definition(leaves[:split]), by_definition(leaves[split:])
    return hashlib.sha256(b"\x01" + left + right).digest()


@pytest.mark.parametrize("size", range(9))
def test_published_roots(size):
    assert root(LEAVES[:size]).hex() == ROOTS[size]


@pytest.mark.parametrize(("index", "size", "path"), PROOFS)
def test_published_inclusion_proofs(index, size, path):
    proof = tuple(map(bytes.fromhex, path))
    assert inclusion_proof(LEAVES[:size], index) == proof
    assert root_from_inclusion(LEAVES[index], index, size=size, proof=proof).hex() == ROOTS[size]


@examples(150)
@given(st.lists(st.binary(max_size=3), max_size=40))
def test_roots_are_those_of_the_definition(leaves):
    assert root(leaves) == by_definition(leaves)


@examples(150)
@given(st.lists(st.binary(max_size=3), min_size=1, max_size=40), st.data())
def test_a_proof_leads_to_the_root_from_its_leaf_only(leaves, data):
    size, index = len(leaves), data.draw(st.integers(0, len(leaves) - 1))
    proof = inclusion_proof(leaves, index)
    expected = root(leaves)
    assert root_from_inclusion(leaves[index], index, size=size, proof=proof) == expected
    assert root_from_inclusion(b"other", index, size=size, proof=proof) != expected
    for changed in (proof[1:], (*proof, bytes(32))):
        if len(changed) != len(proof):
            with pytest.raises(ValueError, match="proof"):
                root_from_inclusion(leaves[index], index, size=size, proof=changed)
    for at in range(len(proof)):
        changed = (*proof[:at], bytes(32), *proof[at + 1 :])
        assert root_from_inclusion(leaves[index], index, size=size, proof=changed) != expected


@pytest.mark.parametrize(
    ("index", "size", "proof"),
    [
        (0, 0, ()),
        (-1, 3, ()),
        (3, 3, ()),
        (0, 2, ()),
        (0, 1, (bytes(32),)),
        (0, 2, (bytes(31),)),
        (2, 3, (bytes(32), bytes(32))),
        (0, 1 << 80, (bytes(32),)),
    ],
)
def test_malformed_proofs_are_refused(index, size, proof):
    with pytest.raises(ValueError, match=r"proof|leaf"):
        root_from_inclusion(b"", index, size=size, proof=proof)


def test_there_is_no_proof_of_a_leaf_that_is_not_there():
    with pytest.raises(ValueError, match="no leaf 3"):
        inclusion_proof([b"a", b"b", b"c"], 3)


def second_preimage(prefix=b""):
    """Pass the inner nodes over four leaves off as two leaves; tell whether the root is the same."""
    one, two, three, four = (merkle.leaf_hash(leaf) for leaf in LEAVES[:4])
    return root([prefix + one + two, prefix + three + four]) == root(LEAVES[:4])


def test_no_second_preimage():
    assert not second_preimage()
    assert not second_preimage(b"\x01")


def test_control_without_prefixes_the_same_forgery_works(monkeypatch):
    monkeypatch.setattr(merkle, "leaf_hash", lambda data: hashlib.sha256(data).digest())
    monkeypatch.setattr(merkle, "node_hash", lambda a, b: hashlib.sha256(a + b).digest())
    assert second_preimage()


def test_many_leaves_need_no_recursion():
    leaves = [b""] * 20_000
    proof = inclusion_proof(leaves, 19_999)
    assert root_from_inclusion(b"", 19_999, size=20_000, proof=proof) == root(leaves)
