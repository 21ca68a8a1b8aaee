"""Units of several rows: drawn, capped, packed; what one moves; what row budgets give them."""

from __future__ import annotations

import math
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from dp_accounting.pld import privacy_loss_distribution
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom
from torch.utils.data import DataLoader, TensorDataset

from accountant import Accountant
from dp import (
    Gaussian,
    InvalidParameter,
    NeighboringRelation,
    NothingFits,
    PoissonSampled,
    adaptive,
    pure,
)
from dp.readings import lifetime_delta
from finetune import (
    CappedRows,
    DeclaredExceeded,
    OneRowPerUnit,
    TrainingPlan,
    UnitIdsInvalid,
    UnitMap,
    training_run,
    unit_guarantee,
)
from tests.finetune.worlds import sums_of
from tests.strategies import examples

pytestmark = pytest.mark.usefixtures("one_thread")
CLIP = 0.5
IDS = ["ann"] * 8 + ["bob", "cyn", "cyn"]
NAN = float("nan")


# --- what one unit moves ------------------------------------------------------------------------


def rows_of(ids):
    """All rows of a unit alike, and each with a gradient far above the clipping norm."""
    angles = {"ann": 0.3, "bob": 2.0, "cyn": 4.0}
    features = [[9 * math.cos(angles[unit]), 9 * math.sin(angles[unit])] for unit in ids]
    return TensorDataset(torch.tensor(features, dtype=torch.float64))


def clipped_sum(tmp_path, rows, *, unit):
    """Take one real step over all rows; return the clipped sum that noise was added to."""
    plan = TrainingPlan(8.0, 1.0, steps=1, expected_batch_size=3, max_grad_norm=CLIP)
    with Accountant.open(tmp_path / f"{len(list(tmp_path.iterdir()))}.db") as accountant:
        accountant.create_budget("b", adaptive(8.0, 1e-5), unit=unit)
        with training_run(accountant, "b", plan, unit=unit) as run:
            model = torch.nn.Linear(2, 1, bias=False, dtype=torch.float64)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            model, optimizer, loader = run.make_private(model, optimizer, DataLoader(rows))
            sums = sums_of(optimizer)
            for (features,) in run.batches(loader):
                model(features.flatten(1).reshape(len(features), -1, 2)).mean().backward()
                optimizer.step()
    ((found,),) = sums
    return found.flatten()


def moved(tmp_path, dataset, *, unit, without="ann"):
    """Return by how many clipping norms the clipped sum moves when a unit is left out."""
    ids = [each for each in IDS if each != without]
    whole, part = (
        clipped_sum(tmp_path, dataset(rows_of(some), UnitMap.of(some, some)), unit=unit)
        for some in (IDS, ids)
    )
    return float((whole - part).norm()) / CLIP


def test_a_unit_of_many_rows_moves_the_clipped_sum_by_one_clipping_norm(tmp_path):
    for unit in ("ann", "bob", "cyn"):
        distance = moved(tmp_path, OneRowPerUnit, unit="author", without=unit)
        assert distance == pytest.approx(1.0, abs=1e-4)


def test_so_does_a_unit_whose_rows_are_joined(tmp_path):
    def joined(rows, units):
        return OneRowPerUnit(
            rows, units, most=2, join=lambda several: (torch.stack([several[0][0]] * 2),)
        )

    assert moved(tmp_path, joined, unit="author") == pytest.approx(1.0, abs=1e-4)


def test_control_sampled_by_rows_it_moves_it_by_as_many_norms_as_it_has_rows(tmp_path):
    assert moved(tmp_path, lambda rows, _: rows, unit="message") == pytest.approx(8.0, abs=1e-3)


def test_capped_it_moves_it_by_the_cap(tmp_path):
    def capped(rows, units):
        return CappedRows(rows, units, most=3)

    assert moved(tmp_path, capped, unit="message") == pytest.approx(3.0, abs=1e-3)


def test_a_row_that_units_share_moves_it_by_two_norms_when_one_leaves(tmp_path):
    """What remains of a packed row can pull the other way: why a shared row counts twice."""
    held = [["ann", "bob"], ["cyn"]]
    assert UnitMap.packed(held, held).group_size == 2
    packed = torch.tensor([[9.0, 0.0, -6.0, 0.0], [0.0, 9.0, 0.0, 9.0]], dtype=torch.float64)
    blank = packed.clone()
    blank[0, :2] = 0
    whole, part = (
        clipped_sum(tmp_path, TensorDataset(rows), unit="block") for rows in (packed, blank)
    )
    assert float((whole - part).norm()) / CLIP == pytest.approx(2.0, abs=1e-3)


def test_a_run_by_units_is_charged_as_planned_for_a_public_number_of_units(tmp_path):
    units = UnitMap.of(IDS, IDS)
    plan = TrainingPlan.for_units(
        units.check_units(20), expected_batch_size=2, noise_multiplier=1.0, steps=30
    )
    seen = set()
    with Accountant.open(tmp_path / "ledger.db") as accountant:
        accountant.create_budget("b", adaptive(8.0, 1e-5), unit="author", units=20)
        with training_run(accountant, "b", plan, unit="author") as run:
            model = torch.nn.Linear(2, 1, dtype=torch.float64)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            rows = DataLoader(OneRowPerUnit(rows_of(IDS), units))
            model, optimizer, loader = run.make_private(model, optimizer, rows)
            for (features,) in run.batches(loader):
                seen.add(len(features))
                model(features).mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        assert dict(accountant.statement("b").spent) == {plan.event: 30}
    assert plan.sampling_probability == 0.1
    assert max(seen) <= 3  # never more rows than units


# --- the draw -----------------------------------------------------------------------------------


def test_each_row_of_a_unit_is_drawn_as_often_as_the_others():
    drawn = OneRowPerUnit(range(11), UnitMap.of(IDS, IDS))
    counts = Counter(drawn[0] for _ in range(8000))
    assert set(counts) == set(range(8))
    # Pearson's statistic with 7 degrees of freedom exceeds 60 once in 10**10 runs.
    assert sum((count - 1000) ** 2 / 1000 for count in counts.values()) < 60
    assert {drawn[1] for _ in range(20)} == {8}


def test_a_draw_of_several_is_without_replacement_and_in_the_order_of_the_rows():
    drawn = OneRowPerUnit(range(11), UnitMap.of(IDS, IDS), most=3, join=tuple)
    draws = {drawn[0] for _ in range(2000)}
    assert len(draws) == math.comb(8, 3)  # each missed with probability below 1e-15
    assert all(first < second < third for first, second, third in draws)
    assert [drawn[1], drawn[2]] == [(8,), (9, 10)]  # all of a unit that has fewer


def test_draws_ignore_seeds_and_differ_between_workers():
    rows = torch.arange(4000)
    drawn = OneRowPerUnit(rows, UnitMap.of(rows, ["one"] * 4000))

    def some(seed):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        return [int(drawn[0]) for _ in range(8)]

    assert some(0) != some(0)
    two = DataLoader(drawn, batch_sampler=[[0] * 8] * 2, num_workers=2)
    first, second = (batch.tolist() for batch in two)
    assert first != second


def test_the_rows_that_are_kept_are_chosen_uniformly_and_counted():
    kept = Counter()
    for _ in range(1000):
        capped = CappedRows(range(11), UnitMap.of(IDS, IDS), most=2)
        assert (len(capped), capped.dropped, capped.units.most_rows) == (5, 6, 2)
        kept.update(capped[at] for at in range(5))
    assert [kept[row] for row in (8, 9, 10)] == [1000] * 3
    assert all(abs(kept[row] - 250) < 100 for row in range(8))  # 7 standard deviations
    assert capped.units.rows_of == {"ann": (0, 1), "bob": (2,), "cyn": (3, 4)}


def test_what_is_shown_of_a_map_is_not_private():
    units = UnitMap.of(IDS, IDS)
    assert "ann" not in repr(units)
    assert pickle.loads(pickle.dumps(units)) == units  # noqa: S301


# --- maps ---------------------------------------------------------------------------------------


@examples(50)
@given(st.lists(st.sets(st.integers(0, 5), min_size=1), min_size=1, max_size=12))
def test_the_map_against_a_recount(held):
    units = UnitMap.packed(held, held)
    cost = {
        unit: sum(1 if row == {unit} else 2 for row in held if unit in row)
        for unit in set().union(*held)
    }
    assert units.group_size == max(cost.values())
    assert units.most_rows == max(sum(unit in row for row in held) for unit in cost)
    assert units.shared == {at for at, row in enumerate(held) if len(row) > 1}


def test_ids_of_arrays_and_tensors_are_their_values():
    for ids in (np.array([7, 7, 9]), torch.tensor([7, 7, 9]), [7, 7, 9]):
        assert UnitMap.of(ids, ids).rows_of == {7: (0, 1), 9: (2,)}
    several = torch.tensor([[7, 7], [7, 9]])
    assert UnitMap.packed(several, several).rows_of == {7: (0, 1), 9: (1,)}
    pairs = [("a", np.int64(1)), ("a", 1)]
    assert UnitMap.of(pairs, pairs).rows_of == {("a", 1): (0, 1)}


class Unknown:
    """As the NA of pandas: comparing it gives no truth value."""

    def __ne__(self, other):
        return self

    def __bool__(self):
        raise TypeError

    __hash__ = None


@pytest.mark.parametrize("inner", [(NAN,), (1,), ()])
def test_tuples_of_tuples_are_refused(inner):
    with pytest.raises(UnitIdsInvalid, match="row 0: its unit id is a tuple of tuples; use a flat"):
        UnitMap.of(range(2), [("a", inner), ("a", inner)])


@pytest.mark.parametrize(
    "missing", [None, NAN, np.nan, torch.tensor(NAN), "", "  ", (), ("a", None), Unknown()]
)
def test_a_missing_id_is_refused_with_its_row(missing):
    with pytest.raises(UnitIdsInvalid, match=r"^row 1: its unit id is missing; give") as refusal:
        UnitMap.of(range(2), ["ann", missing])
    assert refusal.value.row == 1
    assert pickle.loads(pickle.dumps(refusal.value)).row == 1  # noqa: S301


@pytest.mark.parametrize("odd", [["ann"], {"ann": 1}, object(), (object(), 1), np.zeros(2)])
def test_an_id_without_a_value_is_refused(odd):
    with pytest.raises(UnitIdsInvalid, match=r"^row 0: its unit id, of type .* use a text or"):
        UnitMap.of(range(1), [odd])


@pytest.mark.parametrize(
    ("make", "rows", "ids", "reason"),
    [
        (UnitMap.of, [], [], "has no rows"),
        (UnitMap.packed, [], [], "has no rows"),
        (UnitMap.of, "ab", None, "there are no unit ids"),
        (UnitMap.packed, "ab", None, "there are no unit ids"),
        (UnitMap.of, "ab", [], "fewer ids than rows"),
        (UnitMap.of, "ab", [1], "fewer ids than rows"),
        (UnitMap.of, "ab", [1, 2, 3], "more ids than rows"),
        (UnitMap.of, "ab", [7, "7"], "row 1: ids are of types int and str"),
        (UnitMap.packed, "ab", [["a"], []], "row 1: holds no unit"),
        (UnitMap.packed, "ab", ["ann", "bob"], "collection of ids, got str"),
        (UnitMap.packed, "ab", [1, 2], "collection of ids, got int"),
    ],
)
def test_ids_that_do_not_fit_the_rows_are_refused(make, rows, ids, reason):
    with pytest.raises(UnitIdsInvalid, match=reason):
        make(rows, ids)


def test_declared_numbers_are_checked_and_real_ones_never_told():
    ids = list(range(437)) + [5] * 28
    units = UnitMap.of(ids, ids)
    assert units.check_units(437) == 437
    assert units.check_group(29) == 29
    for check, real, declared in ((units.check_units, 437, 436), (units.check_group, 29, 28)):
        with pytest.raises(DeclaredExceeded, match=f"declared {declared}") as refusal:
            check(declared)
        assert str(real) not in f"{refusal.value} {vars(refusal.value)}"
        for wrong in (0, -1, 1.5, NAN):
            with pytest.raises(InvalidParameter, match="declared"):
                check(wrong)


def test_a_unit_in_one_shared_row_is_a_group_of_two():
    held = [["ann", "bob"], ["cyn"]]
    with pytest.raises(DeclaredExceeded, match="one that it shares counts twice"):
        UnitMap.packed(held, held).check_group(1)


@pytest.mark.parametrize("dataset", [OneRowPerUnit, CappedRows])
def test_datasets_refuse_other_rows_shared_rows_and_less_than_one(dataset):
    with pytest.raises(UnitIdsInvalid, match="another number of rows"):
        dataset("abc", UnitMap.of("ab", "ab"), most=1)
    with pytest.raises(UnitIdsInvalid, match="row 1: holds several units"):
        dataset("ab", UnitMap.packed("ab", [["x"], ["x", "y"]]), most=1)
    for most in (0, -1, 1.0, NAN, True):
        with pytest.raises(InvalidParameter, match="most"):
            dataset("ab", UnitMap.of("ab", "ab"), most=most)


def test_drawing_several_rows_needs_a_way_to_join_them():
    with pytest.raises(InvalidParameter, match="join must be a function that makes one row of 2"):
        OneRowPerUnit("ab", UnitMap.of("ab", "ab"), most=2)


# --- what a budget for rows is worth for units --------------------------------------------------


def chain(epsilon, delta, size):
    """Group privacy step by step: P <= e^eps Q + delta along each link."""
    total = 0.0
    for _ in range(size):
        total = math.exp(epsilon) * total + delta
    return total


@pytest.mark.parametrize("budget", [adaptive(2.1, 1e-5), adaptive(1.0, 1e-6)], ids=str)
@pytest.mark.parametrize("delta", [None, 1e-4])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_conversion_is_the_best_of_the_chain_of_neighbors(budget, delta, size):
    target = delta or budget.delta
    fine = (budget.epsilon * 1.001**step for step in range(-2500, 4000))
    best = next((e for e in fine if chain(e, lifetime_delta(budget, e), size) <= target), None)
    if best is None:
        with pytest.raises(NothingFits, match="OneRowPerUnit"):
            unit_guarantee(budget, size=size, delta=delta)
        return
    found = unit_guarantee(budget, size=size, delta=delta)
    assert found.delta == target
    assert found.epsilon == pytest.approx(size * best, rel=2e-3)
    assert found.epsilon >= size * found.row_epsilon
    assert chain(found.row_epsilon, found.row_delta, size) <= target
    assert found.row_delta >= min(budget.delta, lifetime_delta(budget, found.row_epsilon))


def truth(size, steps, delta):
    """Return the epsilon that a unit of so many rows has after steps that sample rows, rounded down.

    A step adds up as many clipped gradients as of its rows were sampled, a mixture of Gaussians
    (Charles et al. 2024).
    """
    one = privacy_loss_distribution.from_mixture_gaussian_mechanism(
        standard_deviation=1.0,
        sensitivities=list(range(size + 1)),
        sampling_probs=[float(binom.pmf(drawn, size, 0.01)) for drawn in range(size + 1)],
        pessimistic_estimate=False,
        value_discretization_interval=3e-3,
        use_connect_dots=False,
    )
    return one.self_compose(steps).get_epsilon_for_delta(delta)


def test_the_conversion_is_never_below_the_truth():
    step = PoissonSampled(0.01, Gaussian(1.0))
    budget = adaptive(1.0, 1e-6, expect=step)
    steps = budget.uses_that_fit((0,) * len(budget.limits), budget.price(step))
    one, three = (truth(size, steps, 1e-6) for size in (1, 3))
    assert 0.5 < one <= unit_guarantee(budget, size=1).epsilon <= budget.epsilon
    assert 2 < three <= unit_guarantee(budget, size=3).epsilon  # a row's epsilon is not a unit's


def test_a_pure_budget_is_multiplied_exactly():
    for epsilon, size in ((0.5, 3), (0.1, 3), (1.0, 1), (0.7, 10)):
        found = unit_guarantee(pure(epsilon), size=size)
        assert (found.delta, found.row_epsilon) == (0.0, epsilon)
        assert 0 <= found.epsilon / (size * epsilon) - 1 < 1e-15
    assert str(unit_guarantee(pure(0.5), size=3)) == (
        "a unit of at most 3 rows (a shared one counts twice) is protected with epsilon 1.5 at"
        " delta 0.0: group privacy under add/remove, 3 times the epsilon 0.5 of one row"
    )


def test_what_is_not_converted():
    replace = adaptive(1.0, 1e-6, relation=NeighboringRelation.REPLACE_ONE)
    with pytest.raises(InvalidParameter, match="relation must be add_remove"):
        unit_guarantee(replace, size=2)
    for size in (0, 1.5, NAN):
        with pytest.raises(InvalidParameter, match="size"):
            unit_guarantee(pure(1.0), size=size)
    for delta in (0.0, NAN, 1.0):
        with pytest.raises(InvalidParameter, match="delta"):
            unit_guarantee(adaptive(1.0, 1e-6), size=2, delta=delta)
    with pytest.raises(NothingFits, match=r"\(2.0, 1e-05\)-DP for one row says nothing about a"):
        unit_guarantee(adaptive(2.0, 1e-5), size=8)
    with pytest.raises(NothingFits):
        unit_guarantee(pure(10.0), size=101)


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([("eu", 7), ("eu", "7")], "two units"),
        ([1.5, 2.5], "is a float"),
        ([("eu", 1.0), ("eu", 2.0)], "is a float"),
    ],
)
def test_ids_that_would_split_or_join_units(ids, words):
    with pytest.raises(UnitIdsInvalid, match=words):
        UnitMap.of(ids, ids)
