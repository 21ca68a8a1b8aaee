"""Hooks and ghost clipping, samples in parts, samples without rows: the same sums, all paid for.

With next to no noise the clipped sum of a step can be read off the weights.
"""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import pytest
import torch
from opacus.layers import DPLSTM
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch.utils.data import DataLoader, TensorDataset

from accountant import Accountant
from dp import adaptive
from finetune import (
    DeclaredExceeded,
    NoGradient,
    NotPoissonSampled,
    RowsMixed,
    SkippedStep,
    TrainingPlan,
    UnitsMixed,
    UnmarkedStep,
    UnsupportedModel,
    UnsupportedSetting,
    WeightsChanged,
    training_run,
)
from finetune.batches import made_up
from finetune.clipping import Lookups, Outer, linear_rows, norms

ROWS, NOISELESS = 24, 5e-3
MODES = ("hooks", "ghost")


@pytest.fixture
def accountant(tmp_path):
    """A budget in which almost no noise fits."""
    with Accountant.open(tmp_path / "ledger.db") as accountant:
        accountant.create_budget("b", adaptive(1e6, 1e-5), unit="row")
        yield accountant


@pytest.fixture
def rows():
    torch.manual_seed(0)
    return TensorDataset(torch.randn(ROWS, 5), torch.randint(0, 3, (ROWS,)))


def network():
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))


def plan(**changes):
    values = {
        "noise_multiplier": NOISELESS,
        "sampling_probability": 1.0,
        "steps": 2,
        "expected_batch_size": ROWS,
        "max_grad_norm": 0.5,
    }
    return TrainingPlan(**(values | changes))


def trained(accountant, rows, *, mode="hooks", physical=None, workers=0, manager=False, **changes):
    """Return the weights after a run, and how often it took a batch."""
    model, asked = network(), plan(**changes)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    loader = DataLoader(rows, num_workers=workers)
    taken = 0
    with training_run(accountant, "b", asked, unit="row") as run:
        private, guarded, batches = run.make_private(model, optimizer, loader, mode=mode)
        if manager:
            batches = BatchMemoryManager(
                data_loader=batches, max_physical_batch_size=physical, optimizer=guarded
            ).__enter__()
            physical = None
        for features, labels in run.batches(batches, physical=physical):
            assert physical is None or len(features) <= physical
            torch.nn.functional.cross_entropy(private(features), labels).backward()
            guarded.step()
            guarded.zero_grad()
            taken += 1
        assert run.reservation.marked == asked.steps
    return torch.cat([part.detach().flatten() for part in model.parameters()]), taken


def by_hand(rows, steps=2, max_grad_norm=0.5, lost=()):
    """Return the weights after clipped steps without noise, one row at a time."""
    model = network()
    for _ in range(steps):
        total = [torch.zeros_like(part) for part in model.parameters()]
        for number, (features, label) in enumerate(rows):
            if number in lost:
                continue
            loss = torch.nn.functional.cross_entropy(model(features[None]), label[None])
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            norm = torch.cat([part.flatten() for part in gradients]).norm()
            for summed, gradient in zip(total, gradients, strict=True):
                summed.add_(gradient * min(1.0, max_grad_norm / norm))
        with torch.no_grad():
            for weight, summed in zip(model.parameters(), total, strict=True):
                weight.sub_(summed / ROWS)
    return torch.cat([part.detach().flatten() for part in model.parameters()])


def close(one, other):
    return torch.allclose(one, other, atol=6 * NOISELESS * 0.5 / ROWS * 2)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("physical", "parts"), [(None, 1), (24, 1), (10, 3), (1, 24)])
def test_a_step_is_the_clipped_sum_whatever_the_mode_and_the_parts(
    accountant, rows, mode, physical, parts
):
    weights, taken = trained(accountant, rows, mode=mode, physical=physical)
    assert taken == 2 * parts
    assert close(weights, by_hand(rows))
    assert not close(weights, by_hand(rows, max_grad_norm=0.4))  # the control: it would be seen


@pytest.mark.parametrize("mode", MODES)
def test_under_opacus_own_memory_manager(accountant, rows, mode):
    weights, taken = trained(accountant, rows, mode=mode, physical=7, manager=True)
    assert taken == 8
    assert close(weights, by_hand(rows))


def test_parts_come_in_order_from_the_workers_of_a_loader(accountant, rows):
    weights, taken = trained(accountant, rows, physical=5, workers=2)
    assert taken == 10
    assert close(weights, by_hand(rows))


@pytest.mark.parametrize("mode", MODES)
def test_a_sample_without_rows_moves_nothing_but_by_noise(accountant, rows, mode):
    weights, taken = trained(accountant, rows, mode=mode, sampling_probability=1e-9, steps=3)
    assert taken == 3
    assert close(weights, by_hand(rows, steps=0))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("physical", [None, 5])
def test_a_row_that_is_not_finite_counts_as_zero_in_any_part(accountant, rows, mode, physical):
    rows.tensors[0][13] = float("nan")
    weights, _ = trained(accountant, rows, mode=mode, physical=physical)
    assert close(weights, by_hand(rows, lost=(13,)))


def run_of(accountant, rows, model, mode="hooks", steps=2):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    context = training_run(accountant, "b", plan(steps=steps), unit="row")
    run = context.__enter__()
    run.entered = context  # or it would be left when nobody holds it
    return run, *run.make_private(model, optimizer, DataLoader(rows), mode=mode), optimizer


def sums_of(guarded):
    """Return a list to which each step adds its clipped sums before noise."""
    sums, add_noise = [], guarded.add_noise

    def noted():
        sums.append([part.summed_grad.clone() for part in guarded.params])
        add_noise()

    guarded.add_noise = noted
    return sums


def untouched(model, before) -> bool:
    return all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("mode", MODES)
def test_tokens_for_rows_change_no_weight(accountant, mode):
    """Clipped apiece, the 8 tokens of a row would count 8 times."""
    rows = TensorDataset(torch.randn(ROWS, 8, 5), torch.randint(0, 3, (ROWS, 8)))
    model = network()
    before = copy.deepcopy(list(model.parameters()))
    run, private, guarded, loader, _ = run_of(accountant, rows, model, mode)
    features, labels = next(run.batches(loader))
    with pytest.raises(UnitsMixed, match=r"shape \(192, 5\) in a batch of 24 rows"):
        torch.nn.functional.cross_entropy(
            private(features.reshape(-1, 5)), labels.reshape(-1)
        ).backward()
    with pytest.raises(NoGradient):
        guarded.step()
    assert untouched(model, before)


def test_a_hook_of_a_script_is_refused_and_one_by_force_is_not_called(accountant, rows):
    """It would see a noised sum, and by raising could have a second one drawn for one mark."""
    model, seen = network(), []
    run, private, guarded, loader, _ = run_of(accountant, rows, model, steps=1)
    with pytest.raises(UnsupportedSetting, match="step_hook"):
        guarded.attach_step_hook(seen.append)
    guarded.step_hook = seen.append
    features, labels = next(batches := run.batches(loader))
    torch.nn.functional.cross_entropy(private(features), labels).backward()
    guarded.step()
    guarded.zero_grad()
    assert seen == []
    assert list(batches) == []
    torch.nn.functional.cross_entropy(private(features), labels).backward()
    with pytest.raises(UnmarkedStep):
        guarded.step()


def test_skip_signals_of_a_script_change_nothing(accountant, rows):
    """A batch that is accumulated in silence would join two samples in one step."""
    model = network()
    run, private, guarded, loader, _ = run_of(accountant, rows, model)
    guarded.signal_skip_step(do_skip=True)
    before = copy.deepcopy(list(model.parameters()))
    features, labels = next(run.batches(loader))
    torch.nn.functional.cross_entropy(private(features), labels).backward()
    guarded.step()
    assert not untouched(model, before)


def test_a_second_optimizer_finds_nothing_and_what_it_changes_is_seen(accountant, rows):
    model = network()
    run, private, guarded, loader, _ = run_of(accountant, rows, model)
    second = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    batches = run.batches(loader)
    features, labels = next(batches)
    before = copy.deepcopy(list(model.parameters()))
    torch.nn.functional.cross_entropy(private(features), labels).backward()
    second.step()
    assert untouched(model, before)
    guarded.step()
    guarded.zero_grad()
    features, labels = next(batches)
    with torch.no_grad():
        model[0].weight += 0.1
    torch.nn.functional.cross_entropy(private(features), labels).backward()
    with pytest.raises(WeightsChanged, match="not accounted for"):
        guarded.step()


def test_a_parameter_that_the_loss_does_not_reach(accountant, rows):
    model = network()
    model.extra = torch.nn.Linear(2, 2)
    run, private, guarded, loader, _ = run_of(accountant, rows, model)
    features, labels = next(run.batches(loader))
    hidden = private._module[2](private._module[1](private._module[0](features)))
    torch.nn.functional.cross_entropy(hidden, labels).backward()
    with pytest.raises(NoGradient, match=r"extra\.weight got no gradient of single rows"):
        guarded.step()


@pytest.mark.parametrize("physical", [None, 10])
def test_every_part_needs_its_step(accountant, rows, physical):
    model = network()
    run, private, _, loader, _ = run_of(accountant, rows, model)
    batches = run.batches(loader, physical=physical)
    features, labels = next(batches)
    torch.nn.functional.cross_entropy(private(features), labels).backward()
    with pytest.raises(SkippedStep):
        next(batches)


@pytest.mark.parametrize("mode", MODES)
def test_leaving_in_the_middle_of_a_sample_leaves_no_sum_behind(accountant, rows, mode):
    model = network()
    original = torch.optim.SGD(model.parameters(), lr=0.1)
    with training_run(accountant, "b", plan(), unit="row") as run:
        private, guarded, loader = run.make_private(model, original, DataLoader(rows), mode=mode)
        for features, labels in run.batches(loader, physical=10):
            torch.nn.functional.cross_entropy(private(features), labels).backward()
            guarded.step()
            guarded.zero_grad()
            assert any(parameter.summed_grad is not None for parameter in model.parameters())
            break
    for parameter in model.parameters():
        assert parameter.grad is None
        assert parameter.summed_grad is None
        assert getattr(parameter, "grad_sample", None) is None
    assert accountant.statement("b").activities[0].uses == 1


def test_a_sample_that_was_left_half_way_is_not_joined_to_the_next(accountant, rows):
    """Two samples in one update would move it by twice the clipping norm."""
    model = network()
    run, private, guarded, loader, original = run_of(accountant, rows, model, steps=2)
    original.param_groups[0]["lr"] = 1.0
    for features, labels in run.batches(loader, physical=10):
        torch.nn.functional.cross_entropy(private(features), labels).backward()
        guarded.step()
        guarded.zero_grad()
        break
    for features, labels in run.batches(loader, physical=10):
        torch.nn.functional.cross_entropy(private(features), labels).backward()
        guarded.step()
        guarded.zero_grad()
    weights = torch.cat([part.detach().flatten() for part in model.parameters()])
    assert close(weights, by_hand(rows, steps=1))


def test_what_is_refused_before_the_first_step_costs_nothing(accountant, rows):
    half = network().half()
    with (
        pytest.raises(UnsupportedModel, match=r"torch\.float16.*keep them in float32"),
        training_run(accountant, "b", plan(), unit="row") as run,
    ):
        run.make_private(half, torch.optim.SGD(half.parameters(), lr=0.1), DataLoader(rows))
    assert accountant.statement("b").spent == ()
    assert accountant.statement("b").open_reservations == ()


# --- what a review broke --------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_no_second_noise_is_drawn_for_one_mark(accountant, rows, mode, monkeypatch):
    """Whatever fails after the noise: the mark is used up, and nothing stays."""
    model = network()
    before = copy.deepcopy(list(model.parameters()))
    run, private, guarded, loader, _ = run_of(accountant, rows, model, mode)
    features, labels = next(run.batches(loader))
    monkeypatch.setattr(guarded, "scale_grad", lambda: 1 / 0)
    torch.nn.functional.cross_entropy(private(features), labels).backward()
    with pytest.raises(ZeroDivisionError):
        guarded.step()
    monkeypatch.undo()
    assert all(part.grad is None and part.summed_grad is None for part in model.parameters())
    torch.nn.functional.cross_entropy(private(features), labels).backward()
    with pytest.raises(UnmarkedStep):
        guarded.step()
    assert untouched(model, before)


def test_batch_statistics_without_weights_are_refused_too(accountant, rows):
    for layer in (
        torch.nn.BatchNorm1d(5, affine=False),
        torch.nn.BatchNorm1d(5).requires_grad_(False),
    ):
        model = torch.nn.Sequential(layer, torch.nn.Linear(5, 3))
        with pytest.raises(UnsupportedModel, match="batch statistics"):
            run_of(accountant, rows, model)
        layer.eval()
        run_of(accountant, rows, model)


def test_a_layer_that_is_thawed_is_not_trained_on_raw_gradients(accountant, rows):
    model = network()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)
    second = torch.optim.SGD(model[0].parameters(), lr=0.1)
    with (
        pytest.raises(WeightsChanged),
        training_run(accountant, "b", plan(steps=1), unit="row") as run,
    ):
        private, guarded, loader = run.make_private(model, optimizer, DataLoader(rows))
        for features, labels in run.batches(loader):
            model[0].requires_grad_(True)
            torch.nn.functional.cross_entropy(private(features), labels).backward()
            guarded.step()
            second.step()
    assert all(part.grad is None for part in model.parameters())


@pytest.mark.parametrize("mode", MODES)
def test_clipping_by_hand_adds_no_row_twice(accountant, rows, mode):
    """A row would move the sum by twice the clipping norm, for the price of one."""
    model = network()
    before = copy.deepcopy(list(model.parameters()))
    run, private, guarded, loader, _ = run_of(accountant, rows, model, mode)
    features, labels = next(run.batches(loader))
    torch.nn.functional.cross_entropy(private(features), labels).backward()
    guarded.clip_and_accumulate()
    with pytest.raises(NoGradient):
        guarded.step()
    assert untouched(model, before)
    assert all(part.summed_grad is None for part in model.parameters())


def test_a_layer_that_is_trained_after_the_last_step_is_seen(accountant, rows):
    model = network()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)
    second = torch.optim.SGD(model[0].parameters(), lr=0.1)
    with (
        pytest.raises(WeightsChanged),
        training_run(accountant, "b", plan(steps=1), unit="row") as run,
    ):
        private, guarded, loader = run.make_private(model, optimizer, DataLoader(rows))
        for features, labels in run.batches(loader):
            torch.nn.functional.cross_entropy(private(features), labels).backward()
            guarded.step()
            model[0].requires_grad_(True)
            torch.nn.functional.cross_entropy(model[2](model[1](model[0](features))), labels)
            second.step()


def test_a_layer_of_rows_and_of_something_else_is_refused(accountant, rows):
    """What the rows do to prototypes would be put into the places of the first rows."""
    model = network()
    run, private, _, loader, _ = run_of(accountant, rows, model)
    features, _ = next(run.batches(loader))
    with pytest.raises(UnitsMixed, match=r"shape \(3, 5\) in a batch of 24 rows"):
        private(features) @ private(torch.randn(3, 5)).T


def test_nothing_comes_from_the_loader_itself(accountant, rows):
    run, _, _, loader, _ = run_of(accountant, rows, network())
    with pytest.raises(NotPoissonSampled, match=r"run\.batches\(loader\)"):
        next(iter(loader))
    assert len(loader) == 2
    first, second = run.batches(loader), run.batches(loader)
    next(first)
    next(second)
    with pytest.raises(NotPoissonSampled, match="one at a time"):
        next(first)


def test_a_run_has_one_model(accountant, rows):
    run, *_ = run_of(accountant, rows, network())
    model = network()
    with pytest.raises(TypeError, match="start another run"):
        run.make_private(model, torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(rows))


@pytest.mark.parametrize("mode", MODES)
def test_nothing_of_single_rows_stays_after_an_error(accountant, rows, mode):
    model = network()
    original = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        pytest.raises(KeyboardInterrupt),
        training_run(accountant, "b", plan(), unit="row") as run,
    ):
        private, _, loader = run.make_private(model, original, DataLoader(rows), mode=mode)
        features, labels = next(run.batches(loader))
        torch.nn.functional.cross_entropy(private(features), labels).backward()
        private(features)
        raise KeyboardInterrupt
    for parameter in model.parameters():
        for name in ("grad", "grad_sample", "summed_grad", "_current_grad_sample"):
            assert getattr(parameter, name, None) is None
    assert not any("activations" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("mode", MODES)
def test_statistics_that_are_thawed_in_the_loop(accountant, rows, mode):
    layer = torch.nn.BatchNorm1d(5).requires_grad_(False)
    model = torch.nn.Sequential(layer, torch.nn.Linear(5, 3))
    layer.eval()
    run, private, _, loader, _ = run_of(accountant, rows, model, mode)
    features, _ = next(run.batches(loader))
    private(features)
    private.train()
    with pytest.raises(UnsupportedModel, match=r"after each model\.train"):
        private(features)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("physical", "parts"), [(None, 1), (10, 3)])
def test_looking_and_copying_between_steps_does_no_harm(accountant, rows, mode, physical, parts):
    model = network()
    run, private, guarded, loader, _ = run_of(accountant, rows, model, mode)
    taken = 0
    for features, labels in run.batches(loader, physical=physical):
        torch.nn.functional.cross_entropy(private(features), labels).backward()
        guarded.step()
        guarded.zero_grad()
        private(features)  # in training mode, for its loss
        averaged = torch.optim.swa_utils.AveragedModel(model)
        with torch.no_grad():
            averaged(features)
        taken += 1
    assert taken == 2 * parts


def test_a_layer_that_is_exchanged_in_the_loop(accountant, rows):
    model = network()
    run, private, guarded, loader, _ = run_of(accountant, rows, model)
    features, labels = next(run.batches(loader))
    torch.nn.functional.cross_entropy(private(features), labels).backward()
    model[0] = torch.nn.Linear(5, 7)
    with pytest.raises(WeightsChanged):
        guarded.step()


def test_models_that_cannot_be_trained_are_named_before_a_step(accountant, rows):
    class Checkpointed(torch.nn.Linear):
        gradient_checkpointing = True

    class Frozen(torch.nn.Linear):
        """As from_pretrained leaves a model."""

        def __init__(self, *size):
            super().__init__(*size)
            self.eval()

    normed = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.BatchNorm1d(3))
    for model, mode, words in (
        (Checkpointed(5, 3), "hooks", "gradient checkpointing"),
        (normed, "hooks", "BatchNorm"),
        (torch.nn.Sequential(Frozen(5, 3)), "ghost", r"0 is in evaluation mode.*model\.train"),
    ):
        with pytest.raises(UnsupportedModel, match=words):
            run_of(accountant, rows, model, mode)


def test_a_manager_of_another_loader_is_refused(accountant, rows):
    model = network()
    run, _, guarded, _, _ = run_of(accountant, rows, model)
    other = DataLoader(rows, batch_size=4, shuffle=True)
    with (
        BatchMemoryManager(
            data_loader=other, max_physical_batch_size=2, optimizer=guarded
        ) as batches,
        pytest.raises(NotPoissonSampled),
    ):
        next(run.batches(batches))


# --- gradients of single rows ---------------------------------------------------------------------


class Shifted(torch.nn.Module):
    """A weight of its own beside a layer: Opacus differentiates both by itself."""

    def __init__(self):
        super().__init__()
        self.shift, self.inner = torch.nn.Parameter(torch.ones(6)), torch.nn.Linear(6, 6)

    def forward(self, hidden):
        return self.inner(hidden + self.shift)


class Language(torch.nn.Module):
    """Every kind of layer that is kept as factors, or not: looked up, normed, projected, tied."""

    def __init__(self, *, tied=False):
        super().__init__()
        torch.manual_seed(2)
        self.embed = torch.nn.Embedding(11, 6, padding_idx=0)
        self.norm = torch.nn.LayerNorm(6, bias=False)
        self.shifted = Shifted()
        self.wide, self.narrow = torch.nn.Linear(6, 40), torch.nn.Linear(40, 6)
        self.head = torch.nn.Linear(6, 11, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids):
        hidden = self.shifted(self.norm(self.embed(ids)))
        for _ in range(2):  # one layer, used twice
            hidden = hidden + self.narrow(self.wide(hidden).tanh())
        return self.head(hidden)


def language_loss(model, ids):
    return torch.nn.functional.cross_entropy(model(ids).transpose(1, 2), ids)


class Recurrent(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.embed = torch.nn.Embedding(11, 6)
        self.memory = DPLSTM(6, 5, num_layers=2, bidirectional=True, batch_first=True)
        self.head = torch.nn.Linear(10, 11)

    def forward(self, ids):
        return self.head(self.memory(self.embed(ids))[0])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("model", [Language, partial(Language, tied=True), Recurrent])
@pytest.mark.parametrize("max_grad_norm", [0.05, 1e6])
def test_every_layer_is_clipped_as_by_hand(accountant, mode, model, max_grad_norm):
    """Padding, norms without bias, layers used twice and tied ones: against one row at a time."""
    texts = torch.randint(0, 11, (ROWS, 4))
    model = model()
    expected = [torch.zeros_like(part) for part in model.parameters()]
    for text in texts:
        gradients = torch.autograd.grad(language_loss(model, text[None]), [*model.parameters()])
        norm = torch.cat([part.flatten() for part in gradients]).norm()
        for summed, gradient in zip(expected, gradients, strict=True):
            summed.add_(gradient * min(1.0, max_grad_norm / norm))
    asked = plan(max_grad_norm=max_grad_norm, steps=1)
    with training_run(accountant, "b", asked, unit="row") as run:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        private, guarded, loader = run.make_private(
            model, optimizer, DataLoader(TensorDataset(texts)), mode=mode
        )
        sums = sums_of(guarded)
        for (ids,) in run.batches(loader, physical=10):
            language_loss(private, ids).backward()
            assert all(part.grad is None for part in model.parameters())
            guarded.step()
        for found, summed in zip(sums[0], expected, strict=True):
            off = (found - summed).norm()
            assert off <= 1e-4 * summed.norm() + 2e-5 * max_grad_norm * (max_grad_norm < 1)


def test_ghost_clipping_keeps_factors_where_they_are_smaller(accountant):
    model = Language()
    run, private, _, loader, _ = run_of(
        accountant, TensorDataset(torch.randint(0, 11, (ROWS, 4))), model, "ghost"
    )
    (ids,) = next(run.batches(loader))
    language_loss(private, ids).backward()
    assert isinstance(model.embed.weight.grad_sample, Lookups)
    assert isinstance(model.head.weight.grad_sample, torch.Tensor)  # 4 * (6 + 11) > 6 * 11
    layer = torch.nn.Linear(64, 64)
    found = linear_rows(layer, [torch.randn(2, 5, 64)], torch.randn(2, 5, 64))
    assert isinstance(found[layer.weight], Outer)


@pytest.mark.parametrize("scale", [1e5, 1e10])
def test_a_gradient_whose_tokens_cancel_is_bounded_all_the_same(scale):
    """Its norm in double precision may be less than what single precision makes of the sum."""
    into = torch.tensor([[[scale, 3.0], [scale, -3.0]]])
    back = torch.tensor([[[1.0], [-1.0]]])
    for outer in (Outer(back, into), Outer(into, back)):
        exact = (outer.back.double().mT @ outer.into.double()).norm()
        assert outer.norms() >= max(exact, outer.weighted(torch.ones(1)).double().norm())


def test_norms_are_rounded_up_and_by_little():
    torch.manual_seed(0)
    for _ in range(200):
        into, back = torch.randn(3, 7, 4) * 10 ** torch.randn(3, 7, 1), torch.randn(3, 7, 5)
        ids = torch.randint(0, 3, (3, 7))
        for rows in (Outer(back, into), Lookups(ids, back, 3)):
            exact = rows.whole().double().flatten(1).norm(dim=1)
            assert (rows.norms() >= exact * (1 - 1e-6)).all()
            assert (rows.norms() <= exact * 1.001 + 1e-3).all()


class Penalized(torch.nn.Module):
    """Uses the weight of a layer outside it, too."""

    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(5, 5)
        self.head = torch.nn.Linear(5, 3)

    def forward(self, features):
        hidden = self.inner(features)
        return self.head(torch.nn.functional.linear(hidden, self.inner.weight))


class Scaled(torch.nn.Module):
    """A layer that Opacus differentiates by itself: with what it was at the start, by position."""

    def __init__(self):
        super().__init__()
        self.weight, self.power = torch.nn.Parameter(torch.ones(5)), 1.0

    def forward(self, features, power=None):
        return features * self.weight * (power or self.power)


class ByKeyword(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scaled, self.head = Scaled(), torch.nn.Linear(5, 3)

    def forward(self, features):
        return self.head(self.scaled(features, power=3.0))


class Circular(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.convolved = torch.nn.Conv1d(1, 1, 3, padding=2, padding_mode="circular")
        self.head = torch.nn.Linear(7, 3)

    def forward(self, features):
        return self.head(self.convolved(features[:, None])[:, 0])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Penalized, r"inner\.weight do not add up"),
        (ByKeyword, r"scaled\.weight do not add up"),
        (Circular, r"convolved\.weight do not add up"),
    ],
)
def test_gradients_that_opacus_does_not_see_are_named_in_the_first_step(
    accountant, rows, mode, model, words
):
    model = model()
    before = copy.deepcopy(list(model.parameters()))
    run, private, guarded, loader, _ = run_of(accountant, rows, model, mode)
    features, labels = next(run.batches(loader))
    torch.nn.functional.cross_entropy(private(features), labels).backward()
    with pytest.raises(UnsupportedModel, match=words):
        guarded.step()
    assert untouched(model, before)
    assert all(part.summed_grad is None for part in model.parameters())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("physical", [None, 1])
def test_two_backward_passes_for_one_step(accountant, rows, mode, physical):
    run, private, guarded, loader, _ = run_of(accountant, rows, network(), mode)
    features, labels = next(run.batches(loader, physical=physical))
    for _ in range(2):
        torch.nn.functional.cross_entropy(private(features), labels).backward()
    with pytest.raises(UnmarkedStep, match="several backward passes"):
        guarded.step()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("penalty", [0.0, 0.01])
def test_a_penalty_on_activations_is_clipped_with_the_rest(accountant, mode, penalty):
    """One row that is large, with a scalar added to the loss: no more than its clipping norm."""
    rows = TensorDataset(torch.randn(ROWS, 5) * 0.01, torch.randint(0, 3, (ROWS,)))
    rows.tensors[0][-1] = 1000
    sums = []
    for count in (ROWS, ROWS - 1):
        model = network()
        taken = TensorDataset(*(tensor[:count] for tensor in rows.tensors))
        run, _, guarded, loader, _ = run_of(accountant, taken, model, mode, steps=1)
        noted = sums_of(guarded)
        for features, labels in run.batches(loader):
            hidden = model[0](features)
            loss = torch.nn.functional.cross_entropy(model[2](model[1](hidden)), labels)
            (loss + penalty * hidden.square().mean()).backward()
            guarded.step()
            for name in ("summed_grad", "grad_sample"):
                assert all(getattr(part, name) is None for part in model.parameters())
        sums.append(torch.cat([part.flatten() for part in noted[0]]))
    assert 0.49 <= (sums[0] - sums[1]).norm() <= 0.5


@pytest.mark.parametrize("mode", MODES)
def test_autocast_is_refused(accountant, rows, mode):
    run, private, _, loader, _ = run_of(accountant, rows, network(), mode)
    features, _ = next(run.batches(loader))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(UnsupportedSetting, match="autocast"):
        private(features)


class Normalized(torch.nn.Module):
    """Keeps a mean of what it saw."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(5))
        self.head = torch.nn.Linear(5, 3)

    def forward(self, features):
        if self.training:
            self.mean.mul_(0.9).add_(features.mean(0), alpha=0.1)
        return self.head(features - self.mean)


def test_statistics_that_a_layer_keeps_are_seen(accountant, rows):
    run, private, guarded, loader, _ = run_of(accountant, rows, Normalized())
    features, labels = next(run.batches(loader))
    torch.nn.functional.cross_entropy(private(features), labels).backward()
    with pytest.raises(WeightsChanged, match="the buffer mean was changed"):
        guarded.step()


def test_layers_that_opacus_cannot_see_into_are_named(accountant, rows):
    class Keyword(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(5, 3)

        def forward(self, features):
            return self.head(input=features)

    run, private, _, loader, _ = run_of(accountant, rows, Keyword())
    features, _ = next(run.batches(loader))
    with pytest.raises(UnsupportedModel, match=r"pass them by position.*\['input'\]"):
        private(features)
    run, private, _, loader, _ = run_of(accountant, rows, network())
    features, _ = next(run.batches(loader))
    private.eval()
    with pytest.raises(UnsupportedModel, match="evaluation mode"):
        private(features)


def test_an_optimizer_that_evaluates_several_times_is_refused(accountant, rows):
    model = network()
    optimizer = torch.optim.LBFGS(model.parameters())
    with (
        pytest.raises(UnsupportedSetting, match="LBFGS"),
        training_run(accountant, "b", plan(), unit="row") as run,
    ):
        run.make_private(model, optimizer, DataLoader(rows))


def test_batches_after_the_run_has_ended(accountant, rows):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with training_run(accountant, "b", plan(), unit="row") as run:
        _, _, loader = run.make_private(model, optimizer, DataLoader(rows))
    with pytest.raises(UnmarkedStep, match="within the with block"):
        next(run.batches(loader))


# --- a loss that is tried before anything is paid for ---------------------------------------------


def tried(accountant, rows, model, loss):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with training_run(accountant, "b", plan(), unit="row") as run:
        run.make_private(model, optimizer, DataLoader(rows), loss=loss)


def mean_of_rows(model, batch):
    return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])


def weighted_by_batch(model, batch):
    weights = torch.tensor([1.0, 50.0, 1.0])
    return torch.nn.functional.cross_entropy(model(batch[0]), batch[1], weight=weights)


def total(model, batch):
    return torch.nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")


def contrastive(model, batch):
    hidden = model(batch[0])
    return torch.nn.functional.cross_entropy(hidden @ hidden.T, torch.arange(len(hidden)))


@pytest.mark.parametrize("loss", [weighted_by_batch, total, contrastive])
def test_a_loss_that_mixes_rows_is_named_before_anything_is_paid(accountant, rows, loss):
    with pytest.raises(RowsMixed):
        tried(accountant, rows, network(), loss)
    assert accountant.statement("b").spent == ()


def test_a_trial_changes_nothing(accountant, rows):
    model, state = network(), torch.get_rng_state()
    before = copy.deepcopy(list(model.parameters()))
    tried(accountant, rows, model, mean_of_rows)
    assert untouched(model, before)
    assert torch.equal(state, torch.get_rng_state())
    assert all(part.grad is None for part in model.parameters())


class Dropping(torch.nn.Module):
    """Opacus cannot differentiate a weight beside a dropout."""

    def __init__(self):
        super().__init__()
        self.shift, self.drop = torch.nn.Parameter(torch.ones(5)), torch.nn.Dropout(0.5)
        self.head = torch.nn.Linear(5, 3)

    def forward(self, features):
        return self.head(self.drop(features + self.shift))


class Sorted(torch.nn.Linear):
    """Puts rows in another order between two layers, as packing by length does."""

    def forward(self, features):
        return super().forward(features[features[:, 0].argsort()])


@pytest.mark.parametrize(
    ("model", "error"),
    [
        (Dropping, UnsupportedModel),
        (lambda: torch.nn.Sequential(torch.nn.Linear(5, 5), Sorted(5, 3)), RowsMixed),
    ],
)
def test_a_model_that_cannot_be_trained_is_named_before_anything_is_paid(
    accountant, rows, model, error
):
    with pytest.raises(error):
        tried(accountant, rows, model(), mean_of_rows)
    assert accountant.statement("b").spent == ()


def test_a_loss_that_takes_no_made_up_rows_is_a_warning(accountant, rows):
    def picky(model, batch):
        if batch[1].max() < 2:
            raise LookupError("no row of the third class")
        return mean_of_rows(model, batch)

    with pytest.warns(UserWarning, match="LookupError: no row of the third class"):
        tried(accountant, rows, network(), picky)


@pytest.mark.parametrize(
    "drawn",
    [torch.randn_like, lambda x: torch.as_tensor(np.random.rand(*x.shape))],  # noqa: NPY002
)
def test_a_model_that_draws_at_random_is_tried_as_far_as_can_be(accountant, rows, drawn):
    """A warning, for it can be trained; the generators are where they were."""

    def noisy(model, batch):
        features = batch[0] + drawn(batch[0])
        return torch.nn.functional.cross_entropy(model(features.float()), batch[1])

    model = network()
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    with pytest.warns(UserWarning, match="draws at random"):
        tried(accountant, rows, model, noisy)
    assert torch.equal(states[0], torch.get_rng_state())
    assert (states[1] == np.random.get_state()[1]).all()  # noqa: NPY002


def test_a_mistake_in_a_loss_is_named_before_anything_is_paid(accountant, rows):
    with pytest.raises(UnsupportedModel, match="before anything was paid for: AttributeError"):
        tried(accountant, rows, network(), lambda model, batch: model(batch[0]).los)
    assert accountant.statement("b").spent == ()


class Functional(Normalized):
    """Keeps statistics by a function of torch, which writes them without a new version."""

    def __init__(self):
        super().__init__()
        self.register_buffer("spread", torch.ones(5))

    def forward(self, features):
        with torch.no_grad():
            torch.nn.functional.batch_norm(features, self.mean, self.spread, training=True)
        return self.head(features)


def test_statistics_that_torch_writes_are_seen(accountant, rows):
    run, private, guarded, loader, _ = run_of(accountant, rows, Functional())
    features, labels = next(run.batches(loader))
    torch.nn.functional.cross_entropy(private(features), labels).backward()
    with pytest.raises(WeightsChanged, match="the buffer mean was changed"):
        guarded.step()


class Replaced(Normalized):
    """Puts another tensor in the place of its buffer."""

    def forward(self, features):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * features.mean(0)
        return self.head(features - self.mean.detach())


def test_statistics_in_a_new_buffer_are_seen_and_a_trial_leaves_none(accountant, rows):
    model = Replaced()
    with pytest.raises(UnsupportedModel, match="the buffer mean is changed by each batch"):
        tried(accountant, rows, model, mean_of_rows)
    assert not model.mean.any()
    run, private, guarded, loader, _ = run_of(accountant, rows, model)
    features, labels = next(run.batches(loader))
    torch.nn.functional.cross_entropy(private(features), labels).backward()
    with pytest.raises(WeightsChanged, match="the buffer mean was changed"):
        guarded.step()


# --- what a second review broke -------------------------------------------------------------------


@pytest.fixture
def coarse():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("mode", MODES)
def test_coarse_products_are_refused(accountant, rows, mode, coarse):
    """With tokens that cancel, a sum of their products is rounded to many clipping norms."""
    run, private, _, loader, _ = run_of(accountant, rows, network(), mode)
    features, _ = next(run.batches(loader))
    with pytest.raises(UnsupportedSetting, match="float32_matmul_precision='medium'"):
        private(features)


def test_norms_of_many_weights_and_of_huge_ones_are_not_too_small():
    """A sum of 10 million squares in single precision is too small by 4e-4, or infinite."""
    torch.manual_seed(0)
    for scale in (1.0, 1e25):
        many = torch.randn(1, 2_000_001, 5) * scale
        exact = many.double().square().sum().sqrt()
        assert norms(many)[0] == pytest.approx(exact.item(), rel=1e-7)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_that_are_tiny_or_huge_are_clipped_like_others(accountant, rows, mode):
    for scale in (1e-25, 1e22):
        model = network()
        run, private, guarded, loader, original = run_of(accountant, rows, model, mode, steps=1)
        original.param_groups[0]["lr"] = 1.0
        for features, labels in run.batches(loader):
            loss = torch.nn.functional.cross_entropy(private(features), labels)
            (loss * scale).backward()
            guarded.step()
        found = torch.cat([part.detach().flatten() for part in model.parameters()])
        assert close(found, by_hand(rows, steps=int(scale > 1)))


@pytest.mark.parametrize("mode", MODES)
def test_an_activation_in_place_is_made_one_out_of_place_meanwhile(accountant, rows, mode):
    model = network()
    model[1] = torch.nn.ReLU(inplace=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with training_run(accountant, "b", plan(), unit="row") as run:
        private, guarded, loader = run.make_private(
            model, optimizer, DataLoader(rows), mode=mode, loss=mean_of_rows
        )
        for batch in run.batches(loader):
            mean_of_rows(private, batch).backward()
            guarded.step()
    assert model[1].inplace


class Cached(torch.nn.Module):
    """Puts an equal tensor in the place of its buffer, as rotary embeddings do; counts outside."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(5))
        self.register_buffer("seen", torch.zeros(()))
        self.head = torch.nn.Linear(5, 3)

    def forward(self, features):
        self.register_buffer("scale", self.scale.clone())
        return self.head(features * self.scale)


def test_buffers_that_keep_their_values_or_change_between_steps_are_let_be(accountant, rows):
    model = Cached()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with training_run(accountant, "b", plan(), unit="row") as run:
        private, guarded, loader = run.make_private(
            model, optimizer, DataLoader(rows), loss=mean_of_rows
        )
        for batch in run.batches(loader):
            mean_of_rows(private, batch).backward()
            guarded.step()
            guarded.zero_grad()
            model.seen += 1  # as a metric of public rows does in validation


def test_made_up_rows_are_of_several_classes_with_and_without_the_last():
    whole, part = made_up(torch.utils.data.default_collate, (torch.ones(2), torch.tensor(7)), 4)
    assert whole[1].tolist() == [0, 1, 0, 1]
    assert part[1].tolist() == [0, 1, 0]


def test_a_collator_that_takes_rows_apart(accountant, rows):
    listed = [{"x": features, "y": label} for features, label in rows]

    class Fresh(torch.utils.data.Dataset):
        def __len__(self):
            return ROWS

        def __getitem__(self, at):
            return dict(listed[at])

    def collate(taken):
        labels = torch.stack([row.pop("y") for row in taken])
        return torch.stack([row.pop("x") for row in taken]), labels

    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with training_run(accountant, "b", plan(), unit="row") as run:
        private, guarded, loader = run.make_private(
            model, optimizer, DataLoader(Fresh(), collate_fn=collate), loss=mean_of_rows
        )
        for batch in run.batches(loader):
            mean_of_rows(private, batch).backward()
            guarded.step()


def test_one_plan_twice_is_two_runs_of_it(accountant, rows):
    model, once = network(), plan(steps=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with training_run(accountant, "b", [once, once], unit="row") as run:
        private, guarded, loader = run.make_private(model, optimizer, DataLoader(rows))
        for batch in run.batches(loader):
            mean_of_rows(private, batch).backward()
            guarded.step()
            guarded.zero_grad()
        assert run.marked == 4


@pytest.mark.parametrize("mode", MODES)
def test_two_backward_passes_of_one_graph(accountant, rows, mode):
    run, private, _, loader, _ = run_of(accountant, rows, network(), mode)
    features, labels = next(run.batches(loader))
    loss = torch.nn.functional.cross_entropy(private(features), labels)
    loss.backward(retain_graph=True)
    with pytest.raises(UnmarkedStep, match="several backward passes for one forward pass"):
        loss.backward()


def test_a_scaler_of_gradients_and_new_groups_are_refused(accountant, rows):
    model = network()
    run, private, guarded, loader, _ = run_of(accountant, rows, model)
    with pytest.raises(UnsupportedSetting, match="add_param_group"):
        guarded.add_param_group({"params": []})
    features, labels = next(run.batches(loader))
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.nn.functional.cross_entropy(private(features), labels)).backward()
    with pytest.raises(UnsupportedSetting, match="GradScaler"):
        scaler.step(guarded)


def test_more_models_that_cannot_be_trained_are_named_before_a_step(accountant, rows):
    frozen = network().requires_grad_(False)
    open_already = network()
    run_of(accountant, rows, open_already)
    for model, words in (
        (frozen, "all of them are frozen"),
        (torch.nn.EmbeddingBag(5, 3), "EmbeddingBag"),
        (torch.nn.Embedding(5, 3, sparse=True), "sparse=False"),
        (torch.nn.LazyLinear(3), "has no weights yet"),
        (open_already, "hooks twice"),
    ):
        with pytest.raises(UnsupportedModel, match=words):
            run_of(accountant, rows, model)
    other = torch.optim.SGD(network().parameters())
    with (
        training_run(accountant, "b", plan(), unit="row") as run,
        pytest.raises(UnsupportedModel, match="not the model's"),
    ):
        run.make_private(network(), other, DataLoader(rows))


def test_more_rows_than_units_are_refused(tmp_path, rows):
    with Accountant.open(tmp_path / "other.db") as accountant:
        accountant.create_budget("b", adaptive(1e6, 1e-5), unit="author", units=ROWS - 1)
        model = network()
        with (
            training_run(accountant, "b", plan(), unit="author") as run,
            pytest.raises(DeclaredExceeded, match="declared 23 units of the budget"),
        ):
            run.make_private(model, torch.optim.SGD(model.parameters()), DataLoader(rows))


def test_a_block_in_which_nothing_was_guarded_is_warned_of(accountant, rows, caplog):
    with training_run(accountant, "b", plan(), unit="row"):
        pass
    assert "was not guarded; use run.make_private" in caplog.text


def test_an_error_says_that_a_checkpoint_would_have_kept_the_steps(accountant, rows):
    model = network()
    with (
        pytest.raises(ZeroDivisionError) as caught,
        training_run(accountant, "b", plan(), unit="row") as run,
    ):
        _, _, loader = run.make_private(
            model, torch.optim.SGD(model.parameters()), DataLoader(rows)
        )
        for features, _ in run.batches(loader):
            features.shape[0] // 0
    assert "All 2 steps of the plan stay spent" in caught.value.__notes__[0]
