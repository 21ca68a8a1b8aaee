"""Hooks and ghost clipping, samples in parts, samples without rows: the same sums, all paid for.

With next to no noise the clipped sum of a step can be read off the weights.
"""

from __future__ import annotations

import copy

import pytest
import torch
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch.utils.data import DataLoader, TensorDataset

from accountant import Accountant
from dp import adaptive
from finetune import (
    NoGradient,
    NotFinite,
    NotPoissonSampled,
    SkippedStep,
    TrainingPlan,
    UnitsMixed,
    UnmarkedStep,
    UnsupportedModel,
    UnsupportedSetting,
    WeightsChanged,
    training_run,
)
from finetune.ghost import linear_norms

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
        criterion = run.criterion(torch.nn.CrossEntropyLoss())
        if manager:
            batches = BatchMemoryManager(
                data_loader=batches, max_physical_batch_size=physical, optimizer=guarded
            ).__enter__()
            physical = None
        for features, labels in run.batches(batches, physical=physical):
            assert physical is None or len(features) <= physical
            criterion(private(features), labels).backward()
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


def test_a_row_that_is_not_finite_counts_as_zero_in_any_part(accountant, rows):
    rows.tensors[0][13] = float("nan")
    for physical in (None, 5):
        weights, _ = trained(accountant, rows, physical=physical)
        assert close(weights, by_hand(rows, lost=(13,)))


def run_of(accountant, rows, model, mode="hooks", steps=2):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    context = training_run(accountant, "b", plan(steps=steps), unit="row")
    run = context.__enter__()
    run.entered = context  # or it would be left when nobody holds it
    return run, *run.make_private(model, optimizer, DataLoader(rows), mode=mode), optimizer


def untouched(model, before) -> bool:
    return all(map(torch.equal, before, model.parameters()))


def test_ghost_clipping_cannot_leave_a_row_out_and_says_so(accountant, rows):
    rows.tensors[0][13] = float("inf")
    model = network()
    before = copy.deepcopy(list(model.parameters()))
    run, private, guarded, loader, _ = run_of(accountant, rows, model, "ghost")
    criterion = run.criterion(torch.nn.CrossEntropyLoss())
    features, labels = next(run.batches(loader))
    criterion(private(features), labels).backward()
    with pytest.raises(NotFinite, match="mode='hooks'"):
        guarded.step()
    assert untouched(model, before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_ghost_clipping_needs_its_own_loss(accountant, rows):
    model = network()
    before = copy.deepcopy(list(model.parameters()))
    _, private, guarded, loader, _ = (made := run_of(accountant, rows, model, "ghost"))
    features, labels = next(made[0].batches(loader))
    torch.nn.functional.cross_entropy(private(features), labels).backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(
        NoGradient, match=r"0\.weight got no gradient from a loss of run\.criterion"
    ):
        guarded.step()
    assert untouched(model, before)


@pytest.mark.parametrize("mode", MODES)
def test_tokens_for_rows_change_no_weight(accountant, mode):
    """Clipped apiece, the 8 tokens of a row would count 8 times."""
    rows = TensorDataset(torch.randn(ROWS, 8, 5), torch.randint(0, 3, (ROWS, 8)))
    model = network()
    before = copy.deepcopy(list(model.parameters()))
    run, private, guarded, loader, _ = run_of(accountant, rows, model, mode)
    criterion = run.criterion(torch.nn.CrossEntropyLoss())
    features, labels = next(run.batches(loader))
    with pytest.raises(UnitsMixed, match=r"shape \(192, 5\) in a batch of 24 rows"):
        criterion(private(features.reshape(-1, 5)), labels.reshape(-1)).backward()
    with pytest.raises(NoGradient):
        guarded.step()
    assert untouched(model, before)


def test_a_language_loss_by_row_in_ghost_mode(accountant):
    """One number for each row: the same clipped sum as hooks with a mean within each row."""
    rows = TensorDataset(torch.randn(ROWS, 8, 5), torch.randint(0, 3, (ROWS, 8)))
    found = []
    for mode in MODES:
        model = network()
        run, private, guarded, loader, _ = run_of(accountant, rows, model, mode, steps=1)
        for features, labels in run.batches(loader):
            logits = private(features)
            if mode == "ghost":
                criterion = run.criterion(torch.nn.CrossEntropyLoss())
                loss = criterion(logits.view(-1, 3), labels.view(-1), shape=logits.shape)
            else:
                loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels)
            loss.backward()
            guarded.step()
        found.append(torch.cat([part.detach().flatten() for part in model.parameters()]))
    assert close(*found)


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
    with pytest.raises(NoGradient, match=r"extra\.weight got no gradient in this backward"):
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
        criterion = run.criterion(torch.nn.CrossEntropyLoss())
        for features, labels in run.batches(loader, physical=10):
            criterion(private(features), labels).backward()
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


@pytest.mark.parametrize(
    "criterion", [torch.nn.functional.cross_entropy, lambda a, b: (a.sum(1) - b).square().mean()]
)
def test_a_function_cannot_be_the_loss_of_ghost_clipping(accountant, rows, criterion):
    """It ignores that it is to return a loss for each row, and nothing would be clipped."""
    run, private, _, loader, _ = run_of(accountant, rows, network(), "ghost")
    features, labels = next(run.batches(loader))
    with pytest.raises(UnitsMixed, match="one number for each of 24 rows"):
        run.criterion(criterion)(private(features), labels)


def test_flattened_tokens_without_a_shape_are_no_rows(accountant):
    rows = TensorDataset(torch.randn(ROWS, 8, 5), torch.randint(0, 3, (ROWS, 8)))
    run, private, _, loader, _ = run_of(accountant, rows, network(), "ghost")
    features, labels = next(run.batches(loader, physical=1))
    criterion = run.criterion(torch.nn.CrossEntropyLoss())
    with pytest.raises(UnitsMixed, match=r"shape \(8,\)"):
        criterion(private(features).view(-1, 3), labels.view(-1))


@pytest.mark.parametrize("mode", MODES)
def test_no_second_noise_is_drawn_for_one_mark(accountant, rows, mode, monkeypatch):
    """Whatever fails after the noise: the mark is used up, and nothing stays."""
    model = network()
    before = copy.deepcopy(list(model.parameters()))
    run, private, guarded, loader, _ = run_of(accountant, rows, model, mode)
    criterion = run.criterion(torch.nn.CrossEntropyLoss())
    features, labels = next(run.batches(loader))
    monkeypatch.setattr(guarded, "scale_grad", lambda: 1 / 0)
    criterion(private(features), labels).backward()
    with pytest.raises(ZeroDivisionError):
        guarded.step()
    monkeypatch.undo()
    assert all(part.grad is None and part.summed_grad is None for part in model.parameters())
    criterion(private(features), labels).backward()
    with pytest.raises(UnmarkedStep):
        guarded.step()
    assert untouched(model, before)


def test_norms_of_an_earlier_batch_pay_for_no_other(accountant, rows, monkeypatch):
    """A second backward pass that failed, in which Opacus leaves its hooks disabled."""
    model = network()
    run, private, guarded, loader, _ = run_of(accountant, rows, model, "ghost")
    criterion = run.criterion(torch.nn.CrossEntropyLoss())
    features, labels = next(run.batches(loader))
    monkeypatch.setattr(private, "enable_hooks", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        criterion(private(features), labels).backward()
    monkeypatch.undo()
    with pytest.raises(NoGradient):
        guarded.step()
    features, labels = next(run.batches(loader))
    assert private.hooks_enabled
    assert all(getattr(part, "_norm_sample", None) is None for part in model.parameters())


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


def test_the_norm_of_tokens_that_cancel_is_not_too_small():
    layer = torch.nn.Linear(2, 1)
    into = torch.tensor([[[1e6, 1.0], [1e6, -1.0]]])
    back = torch.tensor([[[1.0], [-1.0]]])
    found = linear_norms(layer, [into], back)
    exact = (back.double().mT @ into.double()).norm()
    assert exact <= found[layer.weight].item() <= exact * 1.01 + 1e2
    assert found[layer.bias].item() >= 0
    for large, small in ((1e5, 3.0), (1e10, 1.0)):  # in single, and in double precision
        into = torch.tensor([[[large, small], [large, -small]]])
        exact = (back.double().mT @ into.double()).norm()
        assert linear_norms(layer, [into], back)[layer.weight].item() >= exact * (1 - 1e-6)
        turned = torch.nn.Linear(1, 2)
        assert linear_norms(turned, [back], into)[turned.weight].item() >= exact * (1 - 1e-6)
    for _ in range(200):
        into, back = torch.randn(3, 7, 4) * 10 ** torch.randn(3, 7, 1), torch.randn(3, 7, 5)
        layer = torch.nn.Linear(4, 5)
        exact = (back.double().mT @ into.double()).flatten(1).norm(dim=1)
        norms = linear_norms(layer, [into], back)[layer.weight]
        assert (norms >= exact.float() * (1 - 1e-6)).all()
        assert (norms <= exact * 1.01 + 1e-3).all()


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
        criterion = run.criterion(torch.nn.CrossEntropyLoss())
        features, labels = next(run.batches(loader))
        criterion(private(features), labels).backward()
        private(features)
        raise KeyboardInterrupt
    for parameter in model.parameters():
        for name in ("grad", "grad_sample", "summed_grad", "_norm_sample"):
            assert getattr(parameter, name, None) is None
    assert not any("activations" in module.__dict__ for module in model.modules())


def test_gradients_that_a_script_changed_have_no_effect(accountant, rows):
    model = network()
    run, private, guarded, loader, original = run_of(accountant, rows, model, "ghost", steps=1)
    original.param_groups[0]["lr"] = 1.0
    criterion = run.criterion(torch.nn.CrossEntropyLoss())
    for features, labels in run.batches(loader):
        criterion(private(features), labels).backward()
        for parameter in model.parameters():
            parameter.grad.mul_(10)
        guarded.step()
    assert close(
        torch.cat([part.detach().flatten() for part in model.parameters()]),
        by_hand(rows, steps=1),
    )


class Penalized(torch.nn.Module):
    """Uses the weight of a layer outside it, too."""

    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(5, 5)
        self.head = torch.nn.Linear(5, 3)

    def forward(self, features):
        hidden = self.inner(features)
        return self.head(torch.nn.functional.linear(hidden, self.inner.weight))


def test_weights_that_are_used_outside_their_layer_have_no_norm(accountant, rows):
    model = Penalized()
    run, private, _, loader, _ = run_of(accountant, rows, model, "ghost")
    features, labels = next(run.batches(loader))
    criterion = run.criterion(torch.nn.CrossEntropyLoss())
    with pytest.raises(NoGradient, match=r"inner\.weight is used 2 times"):
        criterion(private(features), labels).backward()
    model = network()
    run, private, _, loader, _ = run_of(accountant, rows, model, "ghost")
    features, labels = next(run.batches(loader))
    criterion = run.criterion(torch.nn.CrossEntropyLoss())
    penalty = 50 * sum(part.square().sum() for part in model.parameters())
    with pytest.raises(NoGradient, match="used 2 times"):
        (criterion(private(features), labels) * 1 + penalty).backward()


def test_two_backward_passes_in_ghost_mode(accountant, rows):
    run, private, _, loader, _ = run_of(accountant, rows, network(), "ghost")
    features, labels = next(run.batches(loader))
    criterion = run.criterion(torch.nn.CrossEntropyLoss())
    criterion(private(features), labels).backward()
    with pytest.raises(UnmarkedStep, match="several backward passes"):
        criterion(private(features), labels).backward()


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
    criterion = run.criterion(torch.nn.CrossEntropyLoss())
    taken = 0
    for features, labels in run.batches(loader, physical=physical):
        criterion(private(features), labels).backward()
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


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(3, 3)
        self.head = torch.nn.Linear(3, 3, bias=False)
        self.head.weight = self.embed.weight


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
        (Tied(), "ghost", r"embed\.weight is tied: 2 modules"),
        (Checkpointed(5, 3), "hooks", "gradient checkpointing"),
        (normed, "hooks", "BatchNorm"),
        (torch.nn.Sequential(Frozen(5, 3)), "ghost", r"0 is in evaluation mode.*model\.train"),
    ):
        with pytest.raises(UnsupportedModel, match=words):
            run_of(accountant, rows, model, mode)
    run_of(accountant, rows, Tied())


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
