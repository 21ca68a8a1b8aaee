"""What a script may do in its loop: one mark, one sample, one step, and nothing of rows is left."""

from __future__ import annotations

import copy

import pytest
import torch
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch.utils.data import DataLoader

from accountant import Accountant
from dp import adaptive
from finetune import (
    DeclaredExceeded,
    NoGradient,
    NotPoissonSampled,
    SkippedStep,
    UnmarkedStep,
    UnsupportedSetting,
    WeightsChanged,
    training_run,
)
from tests.finetune.worlds import MODES, ROWS, mean_of_rows, network, plan, run_of, untouched


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


@pytest.mark.parametrize("thawed", ["before the loss", "after the step"])
def test_a_layer_that_is_thawed_is_not_trained_on_raw_gradients(accountant, rows, thawed):
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
            model[0].requires_grad_(thawed == "before the loss")
            torch.nn.functional.cross_entropy(private(features), labels).backward()
            guarded.step()
            model[0].requires_grad_(True)
            torch.nn.functional.cross_entropy(model[2](model[1](model[0](features))), labels)
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


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("physical", [None, 1])
def test_two_backward_passes_for_one_step(accountant, rows, mode, physical):
    run, private, guarded, loader, _ = run_of(accountant, rows, network(), mode)
    features, labels = next(run.batches(loader, physical=physical))
    for _ in range(2):
        torch.nn.functional.cross_entropy(private(features), labels).backward()
    with pytest.raises(UnmarkedStep, match="several backward passes"):
        guarded.step()


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
