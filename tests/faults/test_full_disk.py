"""A file that may not grow any more: what was acknowledged stays, and the ledger goes on later.

The kernel refuses the write, as on a full disk. Control: the store that answers before it
commits.
"""

from __future__ import annotations

from accountant import Accountant
from dp import PureDP, pure

ROOM = 400_000


def fill(workers, lines_of, wait, query, location, mode: str) -> tuple[int, int]:
    """Charge until nothing can be written; return how many were acknowledged, how many lost."""
    with Accountant.open(location) as accountant:
        accountant.create_budget("tips", pure(1e5), unit="article")
    outs = workers.start(location.parent, mode, processes=1, threads=2, asks=10**6, bytes=ROOM)
    ((worker, out),) = outs.items()
    wait(lambda: "done" in lines_of(out))
    workers.kill(worker)
    errors = [line.split()[1] for line in lines_of(out) if line.startswith("error")]
    assert len(errors) == 2
    if mode == "charges":
        assert set(errors) <= {"OutcomeUnknown", "LedgerUnavailable"}
    stored = dict(query(location, "SELECT seq, hex(digest) FROM epsledger_entry"))
    told = [line.split() for line in lines_of(out) if line.startswith("charged")]
    lost = sum(stored.get(int(seq), "").lower() != digest for _, seq, digest in told)
    with Accountant.open(location) as accountant:
        assert accountant.verify().clean
        accountant.charge("tips", PureDP(1.0), unit="article", activity="after")
        assert accountant.verify().clean
    return len(told), lost


def test_nothing_acknowledged_is_lost(workers, lines_of, wait, query, location):
    acknowledged, lost = fill(workers, lines_of, wait, query, location, "charges")
    assert acknowledged > 5
    assert lost == 0


def test_the_control_loses_what_it_acknowledged(workers, lines_of, wait, query, location):
    acknowledged, lost = fill(workers, lines_of, wait, query, location, "broken_charges")
    print(f"control: {acknowledged} acknowledged, {lost} lost")
    assert lost > 0
