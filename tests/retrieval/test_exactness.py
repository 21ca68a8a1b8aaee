"""Products on the grid are those of integers, and no unit's score depends on another unit."""

import numpy as np
import pytest

from retrieval import Hashing, PrivateIndex, RetrievalError
from retrieval.grid import STEPS, check_kernel, is_on_grid, norms, on_grid

DIMENSIONS = [1, 2, 3, 5, 8, 17, 37, 100, 128, 383, 384, 768, 1024, 1537, 2048]


def unit_vectors(rows, dimensions, seed=0):
    vectors = np.random.default_rng(seed).normal(size=(rows, dimensions)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


# --- products --------------------------------------------------------------------------------------


def at_the_bound(dimensions, largest, rng):
    """A vector of integers whose squares add up to exactly STEPS**2, with alternating signs."""
    steps, left, place = np.zeros(dimensions, np.int64), STEPS**2, rng.permutation(dimensions)
    for at in place:
        steps[at] = min(largest, int(left**0.5))
        left -= steps[at] ** 2
    steps[place[0]] += int((steps[place[0]] ** 2 + left) ** 0.5) - steps[place[0]]
    return steps * np.where(np.arange(dimensions) % 2, -1, 1)


def hard_vectors(dimensions):
    """Vectors on the grid: at the norm's bound, in one coordinate, in few or all, and random."""
    rng = np.random.default_rng(dimensions)
    spread = max(1, int(STEPS / dimensions**0.5))
    steps = [
        *(
            at_the_bound(dimensions, largest, rng)
            for largest in (STEPS, 2048, 1447, spread, spread + 1)
        ),
        STEPS * np.eye(dimensions, dtype=np.int64)[rng.integers(dimensions)],
        np.full(dimensions, spread),
    ]
    hard = np.array([*steps, *(-each for each in steps)], np.float32) / STEPS
    return np.concatenate([hard, on_grid(unit_vectors(50, dimensions))])


def products(rows):
    """The inner products of all pairs, by several routines, layouts and blocks."""
    yield rows @ rows.T
    yield np.asfortranarray(rows) @ rows.T
    yield (np.repeat(rows, 2, axis=0)[::2] @ np.concatenate([rows, rows]).T)[:, : len(rows)]
    yield np.transpose([rows @ row for row in rows])
    yield np.concatenate([rows[at : at + 1] @ rows.T for at in range(len(rows))])
    yield np.einsum("ij,kj->ik", rows, rows)


def wrong_products(rows):
    """How many products differ from those of 64-bit integers."""
    steps = np.rint(rows.astype(np.float64) * STEPS).astype(np.int64)
    exact, wrong = steps @ steps.T, 0
    for found in products(rows):
        wrong += np.count_nonzero(found.astype(np.float64) * STEPS**2 != exact)
    return wrong


@pytest.mark.parametrize("dimensions", DIMENSIONS)
def test_products_on_the_grid_are_those_of_integers(dimensions):
    rows = hard_vectors(dimensions)
    norms = np.einsum("ij,ij->i", rows * STEPS, rows * STEPS, dtype=np.float64)
    assert norms.max() == STEPS**2
    assert wrong_products(rows) == 0


@pytest.mark.parametrize("dimensions", DIMENSIONS[2:])
def test_the_control_beyond_the_grid_is_not_exact(dimensions):
    """Finer vectors, or a norm of 2: the routines round."""
    assert wrong_products(unit_vectors(50, dimensions)) > 0
    finer = np.rint(unit_vectors(50, dimensions) * STEPS * 4 + 0.5) / (STEPS * 4)
    exact = finer.astype(np.float64) @ finer.T.astype(np.float64)
    assert ((finer @ finer.T).astype(np.float64) != exact).any()


def test_vectors_are_put_on_the_grid_row_by_row_and_within_the_bound():
    for dimensions in DIMENSIONS:
        spread = np.float32(10.0 ** np.random.default_rng(1).integers(-9, 9, (40, dimensions)))
        rows = np.concatenate([spread, unit_vectors(40, dimensions), np.ones((1, dimensions))])
        found = on_grid(rows.astype(np.float32))
        steps = found.astype(np.float64) * STEPS
        assert (steps == np.rint(steps)).all()
        assert (steps**2).sum(axis=1).max() <= STEPS**2
        alone = np.concatenate([on_grid(row[None].astype(np.float32)) for row in rows])
        assert (alone.view("u4") == found.view("u4")).all()


# --- units -----------------------------------------------------------------------------------------

ROWS = 480


def plain(vectors, folder):
    return PrivateIndex(vectors, units=[f"u{row:04}" for row in range(len(vectors))])


def chunked(vectors, folder):
    return PrivateIndex(vectors, units=[f"u{row % 160:04}" for row in range(len(vectors))])


def hashed(vectors, folder):
    units = [f"u{row % 400:04}" for row in range(len(vectors))]
    return PrivateIndex(vectors, units=units, hashing=Hashing(bits=1, tables=2))


def mapped(vectors, folder):
    chunked(vectors, folder).save(folder / "index")
    return PrivateIndex.open(folder / "index")


def joined(vectors, folder):
    """Of two indexes that share units, less some units again."""
    first, second = chunked(vectors[:200], folder), chunked(vectors[180:], folder)
    whole = first.joined(second, generation="2")
    return whole.without([f"u{unit:04}" for unit in range(0, 160, 9)], generation="3")


def scores(index, query):
    """The score of each unit that is found, as bits, by name."""
    found = index.retrieved(query, -1.0)
    return dict(zip(index.names_of(found), found.scores.view("u4").tolist(), strict=True))


def changes(index, query, removed):
    """How many scores were compared beside a removed unit, and how many changed."""
    whole, compared, changed = scores(index, query), 0, 0
    for unit in removed:
        rest = scores(index.without([unit], generation="next"), query)
        expected = {name: score for name, score in whole.items() if name != unit}
        assert rest.keys() == expected.keys()
        compared += len(rest)
        changed += sum(rest[name] != score for name, score in expected.items())
    return compared, changed


BUILT = [plain, chunked, hashed, mapped, joined]


def test_no_score_depends_on_another_unit(tmp_path):
    compared = 0
    for at, (build, dimensions) in enumerate(zip(BUILT, (384, 383, 100, 128, 37), strict=True)):
        index = build(unit_vectors(ROWS, dimensions), tmp_path)
        query = on_grid(unit_vectors(1, dimensions, at + 1))[0]
        checked, changed = changes(index, query, index.names)
        assert (checked > 10_000, changed) == (True, 0), build.__name__
        compared += checked
    print(f"{compared} scores beside a removed unit, none changed")
    assert compared > 200_000


def test_the_control_of_an_index_off_the_grid_depends_on_other_units(tmp_path):
    """Which products round differently depends on the processor: several shapes."""
    changed = 0
    for dimensions in (384, 383, 100, 37):
        vectors = unit_vectors(ROWS, dimensions)
        index = plain(vectors, tmp_path)
        index._columns.rows[:] = vectors
        for seed in range(1, 4):
            query = unit_vectors(1, dimensions, seed)[0]
            changed += changes(index, query, index.names[::8])[1]
    print(f"{changed} scores changed off the grid")
    assert changed > 0


# --- preparation -----------------------------------------------------------------------------------

LAYOUTS = [np.ascontiguousarray, np.asfortranarray]


def rows_whose_length_moved(lengths):
    """How many rows have another length beside other rows, or in another layout of memory."""
    moved = 0
    for dimensions in (2, 37, 384, 1000, 9000):
        rows = unit_vectors(64, dimensions).astype(np.float64)
        alone = np.concatenate([lengths(row[None]) for row in rows])
        for layout in LAYOUTS:
            for beside in (2, 3, 17, 64):
                parts = [layout(part) for part in np.split(rows, range(beside, 64, beside))]
                moved += np.count_nonzero(np.concatenate(list(map(lengths, parts))) != alone)
    return moved


def test_a_row_s_length_depends_on_the_row_alone():
    assert rows_whose_length_moved(norms) == 0


def test_the_control_that_adds_up_floats_depends_on_other_rows():
    assert rows_whose_length_moved(lambda rows: np.sqrt(np.einsum("ij,ij->i", rows, rows))) > 0


@pytest.mark.parametrize("dimensions", [1, 2, 384, 4097, 50_000])
def test_lengths_are_right_and_rows_on_the_grid_at_most_1(dimensions):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(20, dimensions)) * np.exp(rng.uniform(-300, 300, (20, 1)))
    peaked = rows * (rng.random(rows.shape) < 3 / dimensions)
    peaked[:, 0] = rows[:, 0]
    for each in (rows, peaked):
        largest = np.abs(each).max(axis=1)
        exact = largest * np.linalg.norm(each / largest[:, None], axis=1)
        assert norms(each) == pytest.approx(exact, rel=2e-3)
        on = on_grid((each / exact[:, None]).astype(np.float32))
        assert is_on_grid(on)
        assert np.linalg.norm(on.astype(np.float64), axis=1) == pytest.approx(1, abs=0.03)


def test_a_kernel_whose_products_are_not_exact_is_refused(monkeypatch):
    """Rows off the grid stand for it: their products are rounded."""
    check_kernel.__wrapped__(384)
    monkeypatch.setattr("retrieval.grid.on_grid", lambda rows: unit_vectors(*rows.shape))
    with pytest.raises(RetrievalError, match="does not multiply float32 exactly"):
        check_kernel.__wrapped__(384)


def test_equal_scores_are_not_ordered_by_names_which_could_be_chosen():
    names = [f"{n:02}" for n in range(64)]
    index = PrivateIndex(np.tile([[1.0, 0.0]], (64, 1)), units=names)
    found = index.retrieved(np.float32([1, 0]), 0.5)
    best = index.names_of(index.top(found, 32))
    assert len(best) == 32
    assert sorted(best) != names[:32]  # by chance with probability 1e-18
    assert best == index.names_of(index.top(found, 32))
