"""Bad calls: each raises a named error that says what is wrong, charges nothing and reads nothing.

One table for questions, one for indexes. A row is a name, what is changed, the error, and words
that its message must contain.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from accountant import (
    Accountant,
    BudgetClosed,
    BudgetExceeded,
    InvalidRequest,
    LedgerUnavailable,
    ReservationError,
    UnitMismatch,
    UnknownBudget,
)
from accountant.stores.unit_lanes import UnitLanes
from dp import InvalidParameter, NeighboringRelation, adaptive, pure
from retrieval import (
    Hashing,
    InvalidIndex,
    InvalidQuery,
    NoCorpusGuarantee,
    PrivateIndex,
    RetrievalError,
    RetrievalGuard,
)
from tests.retrieval.calls import PUBLIC, QUERY, RELEASES, ROWS, TERMS, UNITS, ask, small, watched

NAN, INF = float("nan"), float("inf")
SESSION = {"threshold": 0.5, "bar": 2, "positives": 1, "threshold_noise": 4.0, "query_noise": 4.0}


class World:
    """A ledger with budgets of all kinds, and a guard of an index that counts looks."""

    def __init__(self, accountant):
        self.accountant, self.looks = accountant, 0
        wide = adaptive(30.0, 1e-6)
        accountant.create_budget("b", wide, unit="person")
        accountant.create_quota("quota", wide, of="b")
        accountant.create_budget("pure", pure(1.0), unit="person")
        accountant.create_budget("closed", wide, unit="person")
        accountant.close_budget("closed")
        replaced = adaptive(30.0, 1e-6, relation=NeighboringRelation.REPLACE_ONE)
        accountant.create_budget("replaced", replaced, unit="person")
        self.index = watched(small(), self.look)
        self.guard = self.of("b")

    def look(self):
        self.looks += 1

    def of(self, budget, unit="person"):
        return RetrievalGuard(self.accountant, budget, self.index, unit=unit)

    def spent(self):
        """The lanes of all budgets, and the reads outside of the guarantee; no refusals."""
        lanes = [self.accountant._now(budget)[1] for budget in self.accountant.budgets()]
        return lanes, self.accountant.statement("b").unprotected


@pytest.fixture
def world():
    with Accountant.open("memory:") as accountant:
        yield World(accountant)


def refused(world, call, error, words):
    before = world.spent()
    with pytest.raises(error, match=words) as raised:
        call()
    assert type(raised.value) is error
    assert world.spent() == before
    assert world.looks == 0


def test_the_control_good_calls_are_paid_for_and_looked_at(world):
    for release in RELEASES:
        with pytest.raises(AssertionError):
            refused(
                world, lambda release=release: _then_fail(world, release), InvalidQuery, "too late"
            )
        world.looks = 0


def _then_fail(world, release):
    ask(world.guard, release)
    raise InvalidQuery("too late")


NO_VECTOR = "not a vector of numbers"
QUERIES = [
    ("NaN", [NAN] * 4, "norm nan"),
    ("zeros", [0.0] * 4, "norm 0"),
    ("infinite", [INF, 0, 0, 0], "norm inf"),
    ("twice as long", QUERY * 2, "norm 2, not 1; normalize"),
    ("quantised", np.int8([127, 0, 0, 0]), "norm 127"),
    ("beyond float32", [1e300, 0, 0, 0], "norm inf"),
    ("beyond float64", [10**400, 0, 0, 0], NO_VECTOR),
    ("short", [1.0, 0.0], r"shape \(2,\), it needs \(4,\)"),
    ("a row of a matrix", QUERY[None], r"shape \(1, 4\)"),
    ("ragged", [[1.0], [0.0, 0.0]], NO_VECTOR),
    ("complex", np.array([1j, 0, 0, 0]), NO_VECTOR),
    ("text", "fever", NO_VECTOR),
    ("texts", ["1", "0", "0", "0"], NO_VECTOR),
    ("times", np.array([1, 0, 0, 0], "datetime64[s]"), NO_VECTOR),
    ("a set", {1.0, 0.0}, NO_VECTOR),
    ("None", None, NO_VECTOR),
    ("a tensor in training", torch.tensor(QUERY, requires_grad=True), "detach"),
]


@pytest.mark.parametrize(
    ("query", "words"), [row[1:] for row in QUERIES], ids=[q[0] for q in QUERIES]
)
def test_a_bad_query_charges_and_reads_nothing(world, query, words):
    session = world.guard.above_threshold(**SESSION)
    for release in RELEASES:
        refused(
            world, lambda release=release: ask(world.guard, release, query), InvalidQuery, words
        )
    refused(world, lambda: world.guard.raw(query, k=1, reason="x"), InvalidQuery, words)
    refused(world, lambda: session.ask(query), InvalidQuery, words)
    bad = PUBLIC | {"fourth": query}
    words = words.replace("not a vector", "candidate 'fourth' is not a vector")
    refused(world, lambda: ask(world.guard, "select", candidates=bad), InvalidQuery, words)


def test_vectors_of_other_types_are_the_same_question(world):
    first = ask(world.guard, "count")
    same = [list(QUERY), tuple(QUERY), QUERY.astype("f2"), np.int64(QUERY), torch.tensor(QUERY)]
    assert all(ask(world.guard, "count", query).seq == first.seq for query in same)
    assert ask(world.guard, "count", QUERY, threshold=np.float32(0.5)).replayed


def rows(error, words, **columns):
    """One row of the table for each value."""
    ((name, values),) = columns.items()
    return [({name: value}, error, words) for value in values]


ARGUMENTS = [
    *rows(
        InvalidQuery, "cosine", threshold=[-1.1, 1.1, NAN, INF, True, "0.5", None, 10**400, [0.5]]
    ),
    *rows(
        InvalidParameter, "a number|finite|above|positive", noise_multiplier=[0.0, -1.0, NAN, INF]
    ),
    *rows(
        InvalidParameter, "number|subnormal", noise_multiplier=["4", True, None, 10**400, 1e-310]
    ),
    *rows(InvalidQuery, "at most 1e.15", noise_multiplier=[1e16, 1e300]),
    *rows(BudgetExceeded, "refused", noise_multiplier=[1e-3, 1e-300]),
    *rows(InvalidParameter, "epsilon", epsilon=[0.0, -1.0, NAN, INF, "1", True, None, 1e-310]),
    *rows(InvalidQuery, "epsilon must be at least", epsilon=[1e-300, 1e-16]),
    *rows(BudgetExceeded, "refused", epsilon=[1e3, 1e300]),
    *rows(InvalidParameter, "k must be an integer", k=[0, -1, 1.0, True, None, "1", 10**400]),
    *rows(InvalidQuery, "4 of 3 candidates", k=[4]),
    *rows(InvalidQuery, "integer number of units", bar=[3.0, NAN, "3", True, None]),
    *rows(InvalidQuery, "mapping", candidates=[ROWS, list(ROWS), {"a"}, None, "a"]),
    *rows(InvalidQuery, "distinct texts", candidates=[{}, {1: QUERY}, {("a",): QUERY}]),
    *rows(InvalidQuery, "distinct texts", answers=[[], ["a", "a"], {"a"}, "ab", [1], None]),
    *rows(InvalidParameter, "most must be", most=[0, -1, 1.5, None, True]),
    *rows(InvalidParameter, "tokens must be", tokens=[0, 1.5, None, 10**20]),
    *rows(BudgetExceeded, "would fit", tokens=[10**6]),
    *rows(InvalidRequest, "key must be", key=["", 1, b"k", "a\x00", "k" * 300]),
]


@pytest.mark.parametrize(
    ("change", "error", "words"), ARGUMENTS, ids=[str(a[0])[:60] for a in ARGUMENTS]
)
def test_a_bad_argument_charges_and_reads_nothing(world, change, error, words):
    takers = [
        release
        for release, (arguments, replayed) in RELEASES.items()
        if change.keys() <= arguments.keys() | ({"key"} if replayed else set())
    ]
    assert takers
    for release in takers:
        refused(world, lambda release=release: ask(world.guard, release, **change), error, words)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        *rows(InvalidQuery, "cosine", threshold=[2.0, NAN, True]),
        *rows(InvalidQuery, "integer", bar=[2.0, None]),
        *rows(InvalidParameter, "positives", positives=[0, -1, 1.0, True]),
        *rows(InvalidParameter, "threshold_noise", threshold_noise=[0.0, -1.0, NAN, INF]),
        *rows(InvalidQuery, "from 1e-06 to", query_noise=[1e-7, 1e13]),
        *rows(InvalidQuery, "from 1e-06 to", threshold_noise=[1e-7, 1e13]),
        *rows(BudgetExceeded, "refused", query_noise=[1e-3]),
    ],
)
def test_a_bad_session_is_not_paid_for(world, change, error, words):
    refused(world, lambda: world.guard.above_threshold(**SESSION | change), error, words)


@pytest.mark.parametrize(
    ("budget", "error", "words"),
    [
        ("replaced", UnitMismatch, "replace_one"),
        ("quota", InvalidRequest, r"charge \('b', 'quota'\) together"),
        ("closed", BudgetClosed, "closed"),
        ("pure", BudgetExceeded, "refused"),
        ("none", UnknownBudget, "create it first"),
        ((), InvalidRequest, "named once each"),
        (("b", "b"), InvalidRequest, "named once each"),
    ],
)
def test_a_guard_of_such_a_budget_answers_nothing(world, budget, error, words):
    guard = world.of(budget)

    def ask_leased(release):
        with guard.leased() as leased:
            ask(leased, release)

    for release in RELEASES:
        if budget == "pure" and release in ("select", "keywords"):
            continue  # pure epsilon-DP
        refused(world, lambda release=release: ask(guard, release), error, words)
        refused(world, lambda release=release: ask_leased(release), error, words)


def test_a_guard_of_another_unit_answers_nothing(world):
    guard = world.of("b", unit="household")
    for release in RELEASES:
        refused(world, lambda release=release: ask(guard, release), UnitMismatch, "household")
    refused(world, lambda: guard.raw(QUERY, k=1, reason="x"), UnitMismatch, "household")


def test_a_release_that_the_corpus_cannot_give_is_refused(world):
    class Counted:
        """A corpus that only counts."""

        dimensions, public_labels, generation = 4, (), "1"

    world.index = PrivateIndex(ROWS, units=UNITS)
    bare = world.of("b")
    refused(world, lambda: ask(bare, "vote"), InvalidQuery, "build it with labels")
    refused(world, lambda: ask(bare, "keywords"), InvalidQuery, "build it with terms")
    world.index = Counted()
    for release in ("select", "keywords", "centroid", "answer_vote", "generate"):
        refused(
            world, lambda release=release: ask(world.of("b"), release), InvalidQuery, "PrivateIndex"
        )
    refused(world, lambda: world.of("b").raw(QUERY, k=1, reason="x"), InvalidQuery, "PrivateIndex")


def test_raw_units_need_a_reason(world):
    for reason in (None, ""):
        refused(
            world,
            lambda reason=reason: world.guard.raw(QUERY, k=1, reason=reason),
            NoCorpusGuarantee,
            "reason",
        )
    refused(world, lambda: world.guard.raw(QUERY, k=0, reason="x"), InvalidParameter, "k must be")


def test_a_lease_takes_no_keys(world):
    with world.guard.leased() as leased:
        refused(world, lambda: ask(leased, "count", key="k"), InvalidQuery, "takes no keys")


def test_a_lease_that_ended_answers_nothing(world):
    with world.guard.leased() as leased:
        ask(leased, "count")
    world.looks = 0
    refused(world, lambda: ask(leased, "count", ROWS[1]), ReservationError, "ended")


def test_guards_and_sessions_are_not_copied(world):
    session = world.guard.above_threshold(**SESSION)
    for make in (copy.copy, copy.deepcopy, pickle.dumps):
        refused(world, lambda make=make: make(world.guard), RetrievalError, "no copies")
        refused(world, lambda make=make: make(session), InvalidQuery, "no copies")


def in_a_fork(call):
    """What the call raises in a forked child: the name of its class."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            call()
            os.write(writer, b"nothing")
        except Exception as error:  # noqa: BLE001
            os.write(writer, type(error).__name__.encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        return answer.read()


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # it has threads
@pytest.mark.parametrize("where", ["memory:", "file"])
def test_a_forked_guard_releases_nothing_new(where, tmp_path):
    with Accountant.open(where if where == "memory:" else tmp_path / "ledger.db") as accountant:
        world = World(accountant)
        session = world.guard.above_threshold(**SESSION)
        with world.guard.leased() as leased:
            ask(leased, "count")
            for call, error in (
                (lambda: ask(world.guard, "count", ROWS[1]), LedgerUnavailable),
                (lambda: ask(world.guard, "generate"), LedgerUnavailable),
                (lambda: world.guard.raw(QUERY, k=1, reason="x"), LedgerUnavailable),
                (lambda: ask(leased, "count", ROWS[1]), ReservationError),
                (lambda: session.ask(QUERY), InvalidQuery),
            ):
                assert in_a_fork(call) == error.__name__
        assert accountant.verify().clean


# --- indexes ---------------------------------------------------------------------------------------

NO_NUMBERS = "not an array of numbers"
INDEXES = [
    ({"vectors": [[1.0, 0.0], [NAN, 0.0]]}, "first is row 1 with nan"),
    ({"vectors": [[INF, 0.0], [0.0, 1.0]]}, "first is row 0 with inf"),
    ({"vectors": [[1e300, 0.0], [0.0, 1.0]]}, "first is row 0 with inf"),
    ({"vectors": [[1.0, 0.0], [0.0, 0.0]]}, "first is row 1 with 0; normalize"),
    ({"vectors": np.int8([[127, 0], [0, 127]])}, "first is row 0 with 127; normalize"),
    ({"vectors": [[1.0, 0.0], [1.0]]}, NO_NUMBERS),
    ({"vectors": [["1", "0"], ["0", "1"]]}, NO_NUMBERS),
    ({"vectors": np.eye(2) * 1j}, NO_NUMBERS),
    ({"vectors": [[10**400, 0], [0, 1]]}, NO_NUMBERS),
    ({"vectors": None}, NO_NUMBERS),
    ({"vectors": torch.eye(2, requires_grad=True)}, "detach"),
    ({"vectors": [1.0, 0.0]}, r"shape \(rows, dimensions\)"),
    ({"vectors": np.empty((0, 2))}, r"shape \(rows, dimensions\)"),
    ({"units": ["a"]}, "2 vectors and 1 units"),
    ({"units": ["a", None]}, "row 1 has no privacy unit"),
    ({"units": ["a", ""]}, "row 1 has no privacy unit"),
    ({"units": [1, 2]}, "row 0 has no privacy unit"),
    ({"units": [b"a", b"b"]}, "row 0 has no privacy unit"),
    ({"units": np.array([1, 2])}, "row 0 has no privacy unit"),
    ({"units": {"a", "b"}}, "units must be a list"),
    ({"units": "ab"}, "units must be a list"),
    ({"units": None}, "units must be a list"),
    ({"labels": ["x", "z"]}, "row 1 has the label 'z', not one of the public"),
    ({"labels": [None, "x"]}, "row 0 has the label None"),
    ({"labels": [["x"], ["y"]]}, r"row 0 has the label \['x'\]"),
    ({"labels": {"x", "y"}}, "labels must be a list"),
    ({"labels": "xy"}, "labels must be a list"),
    ({"labels": ["x"]}, "2 vectors and 1 labels"),
    ({"units": ["a", "a"]}, "unit 'a' has two labels"),
    ({"labels": None}, "given together"),
    ({"public_labels": []}, "distinct texts"),
    ({"public_labels": ["x", "x"]}, "distinct texts"),
    ({"public_labels": [1, 2]}, "distinct texts"),
    ({"public_labels": {"x", "y"}}, "without looking at the rows"),
    ({"public_labels": {"x": 1, "y": 2}.keys()}, "without looking at the rows"),
    ({"public_labels": "xy"}, "without looking at the rows"),
    ({"public_labels": None}, "without looking at the rows"),
    ({"terms": ["fever", "rash"]}, "terms of row 0 must be a list"),
    ({"terms": [["fever"], None]}, "terms of row 1 must be a list"),
    ({"terms": "ab"}, "terms must be a list"),
    ({"terms": [["fever"]]}, "2 vectors and 1 terms"),
    ({"public_terms": []}, "distinct texts"),
    ({"public_terms": {"fever"}}, "without looking at the rows"),
    ({"generation": ""}, "generation must be a name"),
    ({"generation": 1}, "generation must be a name"),
]


def index(**change):
    members = {
        "vectors": [[1.0, 0.0], [0.0, 1.0]],
        "units": ["a", "b"],
        "labels": ["x", "y"],
        "public_labels": ["x", "y"],
        "terms": [["fever"], []],
        "public_terms": ["fever", "rash"],
    } | change
    return PrivateIndex(members.pop("vectors"), **members)


@pytest.mark.parametrize(("change", "words"), INDEXES, ids=[str(row[0])[:60] for row in INDEXES])
def test_an_index_that_no_guarantee_can_be_given_for_is_not_built(change, words):
    with pytest.raises(InvalidIndex, match=words):
        index(**change)


def test_a_public_list_is_not_the_column_of_the_rows():
    for name, column in (("labels", ["x", "y"]), ("terms", ["fever", "rash"])):
        with pytest.raises(InvalidIndex, match="without looking at the rows"):
            index(**{name: column, f"public_{name}": column})


@pytest.mark.parametrize(
    "same",
    [
        {"vectors": torch.eye(2)},
        {"vectors": np.eye(2)},
        {"vectors": np.eye(2, dtype=np.int8)},
        {"units": np.array(["a", "b"])},
        {"labels": np.array(["x", "y"])},
        {"public_labels": np.array(["x", "y"])},
        {"terms": (("fever", "fever", "other"), {7})},
    ],
)
def test_an_index_takes_arrays_of_other_libraries(same):
    found, query = index(**same), np.float32([1, 0])
    assert found.histogram(query, 0.5).tolist() == [1, 0]
    assert found.terms_of(found.retrieved(query, 0.5)).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda one: one.joined(index(units=["c", "d"]), generation="1"), "name a new one"),
        (lambda one: one.joined(index(units=["c", "d"]), generation=""), "must be a name"),
        (lambda one: one.joined(small(), generation="2"), "differ in dimensions"),
        (lambda one: one.joined(index(public_terms=["fever"]), generation="2"), "public terms"),
        (lambda one: one.joined(index(labels=["y", "y"]), generation="2"), "two labels"),
        (lambda one: one.without(["a", "b"], generation="2"), "no unit would be left"),
        (lambda one: one.without("a", generation="2"), "list of names"),
        (lambda one: one.without(None, generation="2"), "list of names"),
        (lambda one: one.without(["a"], generation="1"), "name a new one"),
    ],
)
def test_an_index_is_not_changed_into_one_without_a_guarantee(change, words):
    with pytest.raises(InvalidIndex, match=words):
        change(index())


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"bits": 0}, "bits"),
        ({"bits": 63}, "bits"),
        ({"bits": 1.5}, "bits"),
        ({"tables": 0}, "tables"),
        ({"seed": -1}, "seed"),
        ({"seed": None}, "seed"),
    ],
)
def test_a_hashing_that_cannot_be_is_refused(change, name):
    with pytest.raises(InvalidParameter, match=name):
        Hashing(**{"bits": 2, "tables": 2} | change)


# --- folders ---------------------------------------------------------------------------------------

FILES = ["index.json", "names.json", "rows.npy", "owners.npy", "labels.npy", "pairs.npy"]


@pytest.fixture
def folder(tmp_path):
    small(Hashing(bits=1, tables=2)).save(tmp_path / "index")
    return tmp_path / "index"


def truncate(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(
    "damage",
    [Path.unlink, *(lambda file, size=size: truncate(file, size) for size in (0, 20, -1))],
    ids=["missing", "empty", "20 bytes", "a byte less"],
)
def test_a_damaged_index_is_not_opened(folder, file, damage):
    damage(folder / file)
    with pytest.raises(InvalidIndex, match="no index that can be read; build it again"):
        PrivateIndex.open(folder)


@pytest.mark.parametrize("file", [*FILES[1:5], "other types"])
def test_an_index_of_files_of_two_is_not_opened(folder, file, tmp_path):
    if file == "other types":
        np.save(folder / "rows.npy", ROWS)
    else:
        two = small().without(["dan", "eve", "bob"], generation="2")
        two.save(tmp_path / "two")
        shutil.copy(tmp_path / "two" / file, folder / file)
    with pytest.raises(InvalidIndex, match="do not belong together"):
        PrivateIndex.open(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"format": None},
        {"hashing": {"bits": 1}},
        {"hashing": {"bits": 0, "tables": 1}},
        {"generation": ""},
        {"public_labels": ["ill"]},
        {"public_terms": ["fever"]},
        {"public_labels": None},
    ],
)
def test_an_index_of_another_version_is_not_opened(folder, change):
    record = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(record | change))
    with pytest.raises(InvalidIndex, match="no index that can be read; build it again"):
        PrivateIndex.open(folder)


def test_a_folder_that_is_there_is_not_written_over(folder):
    with pytest.raises(InvalidIndex, match="name a new folder"):
        small().save(folder)


def test_the_index_of_an_intact_folder_answers_as_before(folder):
    before, after = small(Hashing(bits=1, tables=2)), PrivateIndex.open(folder)
    query = np.float32(ROWS[0])
    assert before.histogram(query, 0.5).tolist() == after.histogram(query, 0.5).tolist() == [2, 1]
    assert TERMS[0] == ["fever", "cough"]
    assert after.terms_of(after.retrieved(query, 0.9)).tolist() == [1, 1, 0]


@pytest.mark.parametrize("unit", [os.fsdecode(b"r\xe9sum\xe9.txt"), "\ud83d\ude00"])
def test_a_unit_that_no_text_can_name_is_refused_when_the_index_is_built(unit, tmp_path):
    """Else it would fail where it is found, which tells that it was."""
    with pytest.raises(InvalidIndex, match="UTF-8"):
        PrivateIndex([[1.0, 0.0]], units=[unit])
    lanes = UnitLanes(tmp_path / "units", opening="o", limit=10, most_queries=3)
    with closing(lanes), pytest.raises(InvalidRequest, match="UTF-8"):
        lanes.lanes_of([unit])


def test_vectors_of_a_folder_that_are_not_on_the_grid_are_refused(tmp_path):
    PrivateIndex([[0.6, 0.8], [1.0, 0.0]], units=["a", "b"]).save(tmp_path / "index")
    path = tmp_path / "index" / "rows.npy"
    sound = np.load(path)
    for damaged in (sound * 100, sound + np.float32(1e-5)):
        np.save(path, damaged)
        with pytest.raises(InvalidIndex, match="not on the grid"):
            PrivateIndex.open(tmp_path / "index")
    np.save(path, sound)
    assert PrivateIndex.open(tmp_path / "index").names == ("a", "b")


def test_a_save_that_was_cut_off_is_named(tmp_path):
    (tmp_path / "index.new").mkdir()
    index = PrivateIndex([[0.6, 0.8]], units=["a"])
    for folder, words in (("index", "index.new is there"), ("no/such/folder", "cannot be written")):
        with pytest.raises(InvalidIndex, match=words):
            index.save(tmp_path / folder)
