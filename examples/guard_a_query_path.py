"""Guard a query path: every answer is charged before the private index is read."""

import tempfile
from pathlib import Path

import numpy as np

from accountant import Accountant, BudgetExceeded
from dp import adaptive
from retrieval import PrivateIndex, RetrievalGuard

folder = Path(tempfile.mkdtemp())
accountant = Accountant.open(folder / "ledger.db")
accountant.create_budget("notes", adaptive(3.0, 1e-6), unit="patient", units=2_000)

vectors = np.random.default_rng(0).normal(size=(2_000, 64)).astype(np.float32)
vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
index = PrivateIndex(
    vectors,
    units=[f"patient-{row}" for row in range(2_000)],
    labels=["flu" if row % 3 else "cold" for row in range(2_000)],
    public_labels=["flu", "cold"],
)
guard = RetrievalGuard(accountant, "notes", index, unit="patient")

answered = 0
try:
    while True:
        vote = guard.vote(vectors[answered], threshold=0.1, noise_multiplier=10.0)
        answered += 1
except BudgetExceeded as refusal:
    print(f"{answered} answers, the last one {vote.winner!r}; then {refusal}")
