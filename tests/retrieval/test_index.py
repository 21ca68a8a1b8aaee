"""The index: exact, by unit, and each unit's score a function of that unit alone."""

import numpy as np
import pytest

from retrieval import InvalidIndex, PrivateIndex
from retrieval.grid import on_grid


def unit_vectors(rows, dimensions, seed=0):
    vectors = np.random.default_rng(seed).normal(size=(rows, dimensions)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def build(vectors, units=None, labels=None, public_labels=("x", "y")):
    units = units or [f"u{row:06}" for row in range(len(vectors))]
    labels = labels or ["xy"[row % 2] for row in range(len(vectors))]
    return PrivateIndex(vectors, units=units, labels=labels, public_labels=public_labels)


def test_histogram_against_brute_force():
    vectors, query = on_grid(unit_vectors(200, 16)), on_grid(unit_vectors(1, 16, 1))[0]
    units = [f"u{row % 60}" for row in range(200)]
    labels = ["x" if row % 60 % 3 else "y" for row in range(200)]
    index = build(vectors, units, labels)
    for threshold in (-1.0, 0.0, 0.2, 0.5, 1.0):
        best = {}
        for unit, label, vector in zip(units, labels, vectors, strict=True):
            score = float(np.sum(vector.astype(np.float64) * query))  # exact on the grid
            best[unit] = max(best.get(unit, (-2.0, label)), (score, label))
        expected = [
            sum(label == wanted and score >= threshold for score, label in best.values())
            for wanted in ("x", "y")
        ]
        assert index.histogram(query, threshold).tolist() == expected


def test_a_unit_with_many_rows_votes_once():
    vectors = np.repeat(unit_vectors(1, 8), 50, axis=0)
    index = build(vectors, ["same"] * 50, ["x"] * 50)
    assert index.histogram(on_grid(vectors)[0], 0.9).tolist() == [1, 0]


def bits_changed(score, vectors, query, removed):
    whole, changed = score(vectors, query), 0
    for row in removed:
        rest = score(np.delete(vectors, row, axis=0), query)
        changed += np.count_nonzero(np.delete(whole, row).view("u4") != rest.view("u4"))
    return changed


SHAPES = [(1001, 384), (999, 383), (500, 100), (257, 37), (130, 17), (64, 5)]


def test_no_other_row_s_score_depends_on_a_removed_row():
    """Over 200,000 scores beside a removed row, through the index as it is."""
    compared = 0
    for rows, dimensions in SHAPES:
        vectors, query = unit_vectors(rows, dimensions), unit_vectors(1, dimensions, 1)[0]
        removed = range(0, rows, 8)
        on = on_grid(query[None])[0]
        assert (
            bits_changed(lambda r, q: build(r).retrieved(q, -1).scores, vectors, on, removed) == 0
        )
        compared += (rows - 1) * len(removed)
    assert compared > 200_000


def test_the_control_of_row_independence_depends_on_other_rows():
    """The linear algebra library's product, by a vector or by a matrix: which, differs by processor."""
    changed = 0
    for rows, dimensions in SHAPES:
        vectors, several = unit_vectors(rows, dimensions), unit_vectors(12, dimensions, 1).T
        removed = range(0, rows, 8)
        changed += bits_changed(lambda r, q: r @ q, vectors, several[:, 0].copy(), removed)
        changed += bits_changed(lambda r, q: (r @ q)[:, 0].copy(), vectors, several, removed)
    assert changed > 0


def test_removing_a_unit_changes_one_count_by_one():
    vectors, query = unit_vectors(300, 32), unit_vectors(1, 32, 1)[0]
    query = on_grid(query[None])[0]
    whole = build(vectors).histogram(query, 0.1)
    seen = set()
    for row in range(300):
        kept = [other for other in range(300) if other != row]
        smaller = build(vectors[kept], [f"u{k}" for k in kept], ["xy"[k % 2] for k in kept])
        change = np.abs(whole - smaller.histogram(query, 0.1))
        assert change.sum() <= 1
        seen.add(int(change.sum()))
    assert seen == {0, 1}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vectors": [[1.0, 0.0], [2.0, 0.0]]}, "first is row 1"),
        ({"vectors": [[1.0, 0.0], [np.nan, 0.0]]}, "first is row 1"),
        ({"vectors": [[1.0, 0.0], [0.0, 0.0]]}, "first is row 1"),
        ({"vectors": [1.0, 0.0]}, "shape"),
        ({"vectors": np.empty((0, 2))}, "shape"),
        ({"units": ["a"]}, "1 units: one of each"),
        ({"units": ["a", ""]}, "row 1 has no privacy unit"),
        ({"units": ["a", None]}, "row 1 has no privacy unit"),
        ({"labels": ["x", "z"]}, "not one of the public ones"),
        ({"units": ["a", "a"]}, "two labels"),
        ({"public_labels": []}, "distinct"),
        ({"public_labels": ["x", "x"]}, "distinct"),
    ],
)
def test_an_index_without_a_guarantee_is_not_built(change, words):
    members = {
        "vectors": [[1.0, 0.0], [0.0, 1.0]],
        "units": ["a", "b"],
        "labels": ["x", "y"],
        "public_labels": ["x", "y"],
    } | change
    with pytest.raises(InvalidIndex, match=words):
        PrivateIndex(members.pop("vectors"), **members)


@pytest.mark.parametrize("taken", ["1", "2"])
def test_a_joined_index_is_neither_version_that_it_was_made_of(taken):
    one = PrivateIndex([[1.0, 0.0]], units=["a"], generation="1")
    other = PrivateIndex([[1.0, 0.0]], units=["b"], generation="2")
    with pytest.raises(InvalidIndex, match="name a new one"):
        one.joined(other, generation=taken)
    assert one.joined(other, generation="3").names == ("a", "b")
