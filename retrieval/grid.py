"""Vectors on a grid, on which every inner product is exact, in any order and by any library.

A guarantee for a sum over privacy units needs each unit's score to depend on that unit alone.
Floating-point products of a linear algebra library do not have that property: removing one row
moves the others to other positions of a block, and the last bits of their scores change. On the
grid nothing is left to rounding: coordinates are multiples of 2**-12 and norms are at most 1, so
every product and every partial sum of one is a multiple of 2**-24 of magnitude at most 1 (by
Cauchy-Schwarz), and float32 has each of these. The scores of NumPy, FAISS, pgvector and DuckDB
on the same rows are equal, bit for bit.

Rounding to the grid is part of each row's own preparation; it moves a cosine by less than 1e-3.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from retrieval.errors import InvalidIndex, InvalidQuery, RetrievalError

STEPS = 2**12
"""Steps of the grid between 0 and 1. Its square is the largest integer below which float32 has
all of them."""
NORM_TOLERANCE = 1e-3
"""How far a vector's L2 norm may be from 1."""
_SHRINK = 1 - 2.0**-12
"""Room for what rounding adds to a norm."""
_BLOCK = 2**22
"""Most numbers that are prepared at once."""


def on_grid(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the vectors rounded to the grid, each by itself; norms at most 1.

    Args:
        vectors: Array of shape (rows, dimensions), float32, of L2 norms about 1.

    >>> bool((on_grid(np.float32([[0.6, 0.8]])) * STEPS % 1 == 0).all())
    True
    """
    result = np.empty(vectors.shape, np.float32)
    block = max(1, _BLOCK // vectors.shape[1])
    for start in range(0, len(vectors), block):
        rows = vectors[start : start + block].astype(np.float64)
        rows *= STEPS * _SHRINK / norms(rows)[:, None]
        steps = np.rint(rows)
        while (long := np.einsum("ij,ij->i", steps, steps) > STEPS**2).any():  # integers: exact
            rows[long] *= _SHRINK
            steps[long] = np.trunc(rows[long])
        result[start : start + block] = steps / STEPS
    return result


def is_on_grid(rows: NDArray[np.float32]) -> bool:
    """Say whether all vectors are on the grid, with norms at most 1: shape (rows, dimensions).

    >>> is_on_grid(on_grid(np.float32([[0.6, 0.8]]))), is_on_grid(np.float32([[0.6, 0.8]]))
    (True, False)
    """
    steps = rows.astype(np.float64) * STEPS
    return bool(
        (steps == np.rint(steps)).all() and (np.einsum("ij,ij->i", steps, steps) <= STEPS**2).all()
    )


def norms(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return L2 norms that depend on each row alone, to 1e-3 or better.

    The last bits of a sum of floating-point numbers depend on how many rows there are and on how
    they lie in memory. Here squares of integers are added up, exactly: coordinates are rounded to
    multiples of a power of 2 that is small beside the row's largest.

    Args:
        rows: Array of shape (rows, dimensions), finite.

    >>> norms(np.array([[3.0, 4.0], [0.0, 0.0]])).tolist()
    [5.0, 0.0]
    """
    bits = (52 - rows.shape[1].bit_length()) // 2
    _, exponents = np.frexp(np.abs(rows).max(axis=1))
    steps = np.rint(np.ldexp(rows, (bits - exponents)[:, None]))
    result: NDArray[np.float64] = np.ldexp(
        np.sqrt(np.einsum("ij,ij->i", steps, steps)), exponents - bits
    )
    return result


def checked_rows(vectors: ArrayLike) -> NDArray[np.float32]:
    """Return the rows of an index on the grid.

    Args:
        vectors: Array of shape (rows, dimensions) and L2 norms 1.

    Raises:
        InvalidIndex: If they are anything else; it names the first row that is wrong.
    """
    rows = _numbers(vectors, "the vectors are not an array of numbers", InvalidIndex)
    if rows.ndim != 2 or not rows.size:
        raise InvalidIndex(f"vectors must have shape (rows, dimensions), got {rows.shape}")
    check_kernel(rows.shape[1])
    lengths = np.sqrt(np.einsum("ij,ij->i", rows, rows, dtype=np.float64))
    wrong = np.flatnonzero(~(np.abs(lengths - 1) <= NORM_TOLERANCE))
    if len(wrong):
        raise InvalidIndex(
            f"{len(wrong)} vectors do not have L2 norm 1, the first is row {wrong[0]}"
            f" with {lengths[wrong[0]]:g}; normalize them, as retrieval.stores.normalized does"
        )
    return on_grid(rows)


def checked_query(
    query: ArrayLike, dimensions: int | None = None, *, name: str = "the query"
) -> NDArray[np.float32]:
    """Return the query on the grid, of shape (dimensions,), or any dimensions if None.

    Raises:
        InvalidQuery: If it is no vector of that shape and L2 norm 1.
    """
    vector = _numbers(query, f"{name} is not a vector of numbers", InvalidQuery)
    if vector.ndim != 1 or len(vector) != (len(vector) if dimensions is None else dimensions):
        raise InvalidQuery(
            f"{name} has shape {vector.shape}, it needs ({dimensions or 'dimensions'},)"
        )
    norm = float(np.linalg.norm(vector.astype(np.float64)))
    if not abs(norm - 1) <= NORM_TOLERANCE:
        raise InvalidQuery(f"{name} has L2 norm {norm:g}, not 1; normalize it")
    grid: NDArray[np.float32] = on_grid(vector[None])[0]
    return grid


def _numbers(values: ArrayLike, what: str, error: type[RetrievalError]) -> NDArray[np.float32]:
    try:
        with np.errstate(over="ignore"):  # infinities have no norm of 1
            return np.asarray(values).astype(np.float32, casting="same_kind", copy=False)
    except (TypeError, ValueError, RuntimeError) as reason:  # RuntimeError: PyTorch's
        raise error(f"{what}: {reason}") from reason


def checked_threshold(threshold: float) -> float:
    """Return the threshold as the float32 number that scores are compared with.

    Raises:
        InvalidQuery: If it is no cosine.
    """
    if (
        isinstance(threshold, bool)
        or not isinstance(threshold, int | float | np.floating)
        or not -1.0 <= threshold <= 1.0
    ):
        raise InvalidQuery(f"threshold must be a cosine in [-1, 1], got {threshold!r}")
    return float(np.float32(threshold))


@cache
def check_kernel(dimensions: int) -> None:
    """Check that this machine's matrix products are exact on the grid, as integers are.

    Raises:
        RetrievalError: If they are not: a library that multiplies in reduced precision.

    >>> check_kernel(384)
    """
    rows = on_grid(np.random.default_rng(0).normal(size=(131, dimensions)).astype(np.float32))
    queries = rows[:3]
    steps = (rows * STEPS).astype(np.int64)
    exact = steps @ steps[:3].T
    single = [rows @ query for query in queries]
    if not all(
        np.array_equal(np.asarray(found, np.float64) * STEPS**2, exact)
        for found in (rows @ queries.T, np.transpose(single))
    ):
        raise RetrievalError(
            f"this build of NumPy ({np.__version__}) does not multiply float32 exactly: no score"
            " would depend on its own unit alone; install another build"
        )
