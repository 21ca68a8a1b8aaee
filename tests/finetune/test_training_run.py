"""The Opacus guard on a real model: priced, marked before the batch, stopped, settled."""

import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

from accountant import Accountant, BudgetExceeded, UnitMismatch
from dp import Gaussian, PoissonSampled, adaptive
from finetune import (
    NotPoissonSampled,
    PlanChanged,
    SkippedStep,
    TrainingPlan,
    UnitsMixed,
    UnmarkedStep,
    training_run,
)
from finetune.batches import PoissonSampler
from finetune.optimizers import secret_generator

UNITS = 200


@pytest.fixture
def accountant(tmp_path):
    with Accountant.open(tmp_path / "ledger.db") as accountant:
        accountant.create_budget("b", adaptive(8.0, 1e-5), unit="row", units=UNITS)
        yield accountant


@pytest.fixture
def rows():
    torch.manual_seed(0)
    return TensorDataset(torch.randn(UNITS, 5), torch.randint(0, 2, (UNITS,)))


def plan(steps=10, **changes):
    values = {"expected_batch_size": 20, "noise_multiplier": 1.0, "steps": steps}
    return TrainingPlan.for_units(UNITS, **(values | changes))


def parts(rows):
    model = torch.nn.Linear(5, 2)
    loader = DataLoader(rows) if rows else None
    return model, torch.optim.SGD(model.parameters(), lr=0.1), loader


def learn(model, optimizer, batch):
    torch.nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()
    optimizer.zero_grad()


def spent(accountant):
    return accountant.statement("b").activities[0].uses


def test_a_whole_run_is_charged_step_by_step(accountant, rows):
    before = accountant.uses_that_fit("b", plan().event)
    with training_run(accountant, "b", plan(), unit="row") as run:
        model, optimizer, loader = run.make_private(*parts(rows))
        for done, batch in enumerate(run.batches(loader)):
            assert accountant.statement("b").open_reservations == ((2, 10, done + 1),)
            learn(model, optimizer, batch)
    assert spent(accountant) == 10
    assert accountant.uses_that_fit("b", plan().event) == before - 10
    assert accountant.verify().clean


def test_stopping_early_returns_the_steps_that_never_started(accountant, rows):
    with training_run(accountant, "b", plan(), unit="row") as run:
        model, optimizer, loader = run.make_private(*parts(rows))
        for batch in run.batches(loader):
            learn(model, optimizer, batch)
            if run.reservation.marked == 4:
                break
    assert spent(accountant) == 4
    assert accountant.statement("b").open_reservations == ()


def test_a_run_that_raises_forfeits_the_whole_plan(accountant, rows):
    with (
        pytest.raises(ZeroDivisionError),
        training_run(accountant, "b", plan(), unit="row") as run,
    ):
        model, optimizer, loader = run.make_private(*parts(rows))
        for batch in run.batches(loader):
            learn(model, optimizer, batch)
            _ = 1 / 0
    assert spent(accountant) == 10
    assert accountant.statement("b").open_reservations == ((2, 10, 1),)


def test_a_plan_that_does_not_fit_is_refused_with_the_number_that_would(accountant):
    fit = accountant.uses_that_fit("b", plan().event)
    with (
        pytest.raises(BudgetExceeded) as refusal,
        training_run(accountant, "b", plan(steps=fit + 1), unit="row"),
    ):
        pytest.fail("entered a run that was refused")
    assert (refusal.value.requested, refusal.value.remaining) == (fit + 1, fit)
    with training_run(accountant, "b", plan(steps=fit), unit="row") as run:
        assert run.reservation.remaining == fit


def test_the_last_affordable_step_is_taken_and_none_more(accountant, rows):
    accountant.charge("b", Gaussian(1.0), unit="row", activity="other", uses=1)
    fit = accountant.uses_that_fit("b", plan().event)
    assert 0 < fit < 400
    steps = 0
    with training_run(accountant, "b", plan(steps=fit), unit="row") as run:
        model, optimizer, loader = run.make_private(*parts(rows))
        for batch in run.batches(loader):
            learn(model, optimizer, batch)
            steps += 1
    assert steps == fit
    assert accountant.uses_that_fit("b", plan().event) == 0


def test_another_unit_is_refused(accountant):
    with (
        pytest.raises(UnitMismatch, match="protects one 'row'"),
        training_run(accountant, "b", plan(), unit="author"),
    ):
        pytest.fail("entered a run for another unit")


def test_a_shuffled_loader_is_refused(accountant, rows):
    with training_run(accountant, "b", plan(), unit="row") as run:
        run.make_private(*parts(rows))
        with pytest.raises(NotPoissonSampled, match="shuffled loader has no amplification"):
            next(run.batches(DataLoader(rows, batch_size=20, shuffle=True)))
        assert run.reservation.marked == 0


def test_a_loader_with_a_sampler_of_its_own_is_refused(accountant, rows):
    weighted = DataLoader(rows, sampler=WeightedRandomSampler([1.0] * UNITS, UNITS))
    model, optimizer, _ = parts(rows)
    with (
        training_run(accountant, "b", plan(), unit="row") as run,
        pytest.raises(NotPoissonSampled, match="WeightedRandomSampler"),
    ):
        run.make_private(model, optimizer, weighted)


def test_a_second_step_on_one_batch_changes_no_weight(accountant, rows):
    with training_run(accountant, "b", plan(), unit="row") as run:
        model, optimizer, loader = run.make_private(*parts(rows))
        batch = next(iter(run.batches(loader)))
        learn(model, optimizer, batch)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        torch.nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
        with pytest.raises(UnmarkedStep, match="no durable mark"):
            optimizer.step()
    assert all(map(torch.equal, before, model.parameters()))


def test_a_step_of_the_unwrapped_optimizer_changes_no_weight(accountant, rows):
    with training_run(accountant, "b", plan(), unit="row") as run:
        theirs, original, rows_loader = parts(rows)
        model, _, loader = run.make_private(theirs, original, rows_loader)
        batch = next(iter(run.batches(loader)))
        before = [parameter.detach().clone() for parameter in model.parameters()]
        torch.nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
        with pytest.raises(UnmarkedStep, match="raw gradients"):
            original.step()
    assert all(map(torch.equal, before, model.parameters()))


def test_a_step_after_the_run_is_refused(accountant, rows):
    with training_run(accountant, "b", plan(steps=1), unit="row") as run:
        model, optimizer, loader = run.make_private(*parts(rows))
        for batch in run.batches(loader):
            torch.nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
            break
    for parameter in model.parameters():
        assert parameter.grad is None
        assert parameter.grad_sample is None
        assert parameter.summed_grad is None
    for parameter in model.parameters():
        parameter.grad_sample = torch.ones(1, *parameter.shape)
    with pytest.raises(UnmarkedStep):
        optimizer.step()


@pytest.mark.parametrize(
    ("name", "value"),
    [("noise_multiplier", 0.1), ("max_grad_norm", 9.0), ("expected_batch_size", 1)],
)
def test_a_changed_optimizer_changes_no_weight(accountant, rows, name, value):
    with training_run(accountant, "b", plan(), unit="row") as run:
        model, optimizer, loader = run.make_private(*parts(rows))
        setattr(optimizer, name, value)
        batch = next(iter(run.batches(loader)))
        before = [parameter.detach().clone() for parameter in model.parameters()]
        with pytest.raises(PlanChanged, match=name):
            learn(model, optimizer, batch)
    assert all(map(torch.equal, before, model.parameters()))


def test_the_normaliser_does_not_depend_on_the_number_of_rows(accountant, rows):
    """Opacus alone would divide by int(n * q), which tells n from n - 1 (the control)."""
    from opacus import PrivacyEngine

    theirs, ours = [], []
    for n in (UNITS, UNITS - 1):
        fewer = TensorDataset(*(tensor[:n] for tensor in rows.tensors))
        with pytest.warns(UserWarning, match="Secure RNG turned off"):
            engine = PrivacyEngine()
        model, optimizer, _ = parts(fewer)
        _, private, _ = engine.make_private(
            module=model,
            optimizer=optimizer,
            data_loader=DataLoader(fewer, batch_size=20),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
        )
        theirs.append(private.expected_batch_size)
        with training_run(accountant, "b", plan(steps=1), unit="row") as run:
            ours.append(run.make_private(*parts(fewer))[1].expected_batch_size)
    assert theirs[0] != theirs[1]
    assert ours == [20, 20]


def test_noise_does_not_follow_the_script_s_seed(accountant, rows):
    weights = []
    for _ in range(2):
        torch.manual_seed(7)
        with training_run(accountant, "b", plan(steps=1), unit="row") as run:
            model, optimizer, loader = run.make_private(*parts(rows))
            for batch in run.batches(loader):
                learn(model, optimizer, batch)
        weights.append(next(model.parameters()).detach().clone())
    assert not torch.equal(*weights)


def test_poisson_samples_have_the_planned_rate_and_are_independent():
    sampler = PoissonSampler(1000, 0.1, 500)
    drawn = torch.zeros(500, 1000)
    for step, indices in enumerate(sampler):
        drawn[step, indices] = 1
    # 500,000 draws at 0.1: standard error 0.00042; batch sizes have the binomial's variance of 90,
    # which a fixed-size batch (0, the shuffled control) has not.
    assert abs(drawn.mean().item() - 0.1) < 6 * 0.00042
    assert 60 < drawn.sum(1).var().item() < 130
    shuffled = torch.stack([torch.randperm(1000) < 100 for _ in range(500)]).float()
    assert shuffled.sum(1).var().item() < 60


def test_a_tiny_sampling_probability_is_not_rounded_up():
    """In single precision a row would be drawn 60 times too often at 1e-9: 18 draws, not 0.3."""
    drawn = sum(map(len, PoissonSampler(1_000_000, 1e-9, 300)))
    assert drawn <= 6  # by chance it is more once in 30 million runs
    generator = torch.Generator().manual_seed(0)
    single = sum(int((torch.rand(1_000_000, generator=generator) < 1e-9).sum()) for _ in range(300))
    assert single > 6


def test_samplers_do_not_repeat_under_one_seed():
    draws = []
    for _ in range(2):
        torch.manual_seed(7)
        np.random.seed(7)  # noqa: NPY002
        draws.append(list(PoissonSampler(1000, 0.5, 2)))
    assert draws[0] != draws[1]


def test_the_noise_generator_takes_all_of_its_state_from_the_system(monkeypatch):
    """A change in any word of the system's bytes changes the noise; a seed's high bits do not."""

    def noise(flipped):
        given = bytearray(range(256)) * 10
        given[flipped] ^= 1
        with monkeypatch.context() as patched:
            patched.setattr(os, "urandom", lambda size: bytes(given[:size]))
            return torch.randn(2000, generator=secret_generator(torch.device("cpu")))

    base = noise(2559)  # past the 2,496 bytes that are used
    assert torch.equal(base, noise(2559))
    for flipped in (8, 100, 1000, 2000, 2495):
        assert not torch.equal(base, noise(flipped))
    seeds = (123, 123 + (77777 << 32))
    control = [torch.randn(9, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    assert torch.equal(*control)


def test_the_noise_is_drawn_from_that_generator(accountant, rows):
    with training_run(accountant, "b", plan(), unit="row") as run:
        _, optimizer, _ = run.make_private(*parts(rows))
        assert optimizer.generator is not None
        assert optimizer.generator is not torch.default_generator


class Watching(torch.utils.data.Dataset):
    """Rows that ask the ledger, when they are read, how many steps are marked."""

    def __init__(self, rows, accountant):
        self.rows, self.accountant, self.seen = rows, accountant, []

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, at):
        open_reservations = self.accountant.statement("b").open_reservations
        self.seen.append(open_reservations[0][2])
        return self.rows[at]


def test_a_step_is_marked_before_any_row_of_it_is_read(accountant, rows):
    watching = Watching(rows, accountant)
    model, optimizer, _ = parts(rows)
    with training_run(accountant, "b", plan(steps=3), unit="row") as run:
        model, optimizer, loader = run.make_private(model, optimizer, DataLoader(watching))
        watching.seen.clear()  # the shape of one row was read
        for step, batch in enumerate(run.batches(loader)):
            assert set(watching.seen) <= {step + 1}
            watching.seen.clear()
            learn(model, optimizer, batch)


def test_a_batch_without_a_step_ends_the_run(accountant, rows):
    with (
        pytest.raises(SkippedStep, match="whatever its loss"),
        training_run(accountant, "b", plan(), unit="row") as run,
    ):
        _, _, loader = run.make_private(*parts(rows))
        for _ in run.batches(loader):
            pass
    assert accountant.statement("b").open_reservations == ((2, 10, 1),)


def test_two_backward_passes_for_one_step_change_no_weight(accountant, rows):
    with training_run(accountant, "b", plan(), unit="row") as run:
        model, optimizer, loader = run.make_private(*parts(rows))
        batch = next(iter(run.batches(loader)))
        before = [parameter.detach().clone() for parameter in model.parameters()]
        torch.nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
        torch.nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
        with pytest.raises(UnmarkedStep, match="several backward passes"):
            optimizer.step()
    assert all(map(torch.equal, before, model.parameters()))


def test_rows_cut_in_pieces_change_no_weight(accountant):
    """A token head sees 8 samples for each row: clipped apiece, one row would count 8 times."""
    rows = TensorDataset(torch.randn(UNITS, 8, 5))
    with training_run(accountant, "b", plan(), unit="row") as run:
        model, _, loader = run.make_private(*parts(rows))
        (tokens,) = next(iter(run.batches(loader)))
        before = [parameter.detach().clone() for parameter in model.parameters()]
        with pytest.raises(UnitsMixed, match="rows are the first dimension"):
            model(tokens.reshape(-1, 5)).square().mean().backward()
        assert all(parameter.grad is None for parameter in model.parameters())
    assert all(map(torch.equal, before, model.parameters()))


def wide_open(accountant):
    """A budget in which almost no noise fits, so that sums can be read off the weights."""
    accountant.create_budget("open", adaptive(1e6, 1e-5), unit="row")


def moved(accountant, rows, scale=1.0):
    """Train one step on every row, with next to no noise; return how far the weights moved."""
    every = TrainingPlan(5e-3, 1.0, steps=1, expected_batch_size=1)
    model = torch.nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = model.weight.item()
    with training_run(accountant, "open", every, unit="row") as run:
        private, optimizer, loader = run.make_private(model, optimizer, DataLoader(rows))
        for (features,) in run.batches(loader):
            (scale * private(features)).mean().backward()
            optimizer.step()
    return before - model.weight.item()


def test_a_row_counts_for_at_most_the_clipping_norm_however_many_rows_there_are(accountant):
    wide_open(accountant)
    for count in (1, 4):
        rows = TensorDataset(torch.full((count, 1), 0.5))
        assert moved(accountant, rows) == pytest.approx(0.5 * count, abs=0.04)
        assert moved(accountant, rows, scale=1e6) == pytest.approx(count, abs=0.04)


def test_a_row_that_is_not_finite_counts_as_zero(accountant):
    wide_open(accountant)
    for bad in (float("inf"), float("nan")):
        rows = TensorDataset(torch.tensor([[0.5], [bad], [0.5]]))
        assert moved(accountant, rows) == pytest.approx(1.0, abs=0.04)


def test_raw_gradients_stay_nowhere(accountant, rows):
    """Not for a second optimizer, and not where a parameter is frozen before the step."""
    with training_run(accountant, "b", plan(), unit="row") as run:
        theirs, original, rows_loader = parts(rows)
        model, _, loader = run.make_private(theirs, original, rows_loader)
        batch = next(iter(run.batches(loader)))
        torch.nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
        assert all(parameter.grad is None for parameter in model.parameters())
        assert all(parameter.grad_sample is not None for parameter in model.parameters())


def test_an_optimizer_serves_a_second_run_and_public_data_after(accountant, rows):
    model, optimizer, loader = parts(rows)
    for _ in range(2):
        with training_run(accountant, "b", plan(steps=1), unit="row") as run:
            private, wrapped, batches = run.make_private(model, optimizer, loader)
            for batch in run.batches(batches):
                learn(private, wrapped, batch)
        with pytest.raises(TypeError, match="plain optimizer"):
            run.make_private(model, wrapped, loader)
    before = model.weight.detach().clone()
    learn(model, optimizer, rows[:10])
    assert not torch.equal(before, model.weight)


@pytest.mark.parametrize(
    "shape", [lambda x: x, lambda x: {"x": x, "name": "a"}, lambda x: (x, {"y": [x]})]
)
def test_a_first_batch_may_be_empty_whatever_its_shape(accountant, shape):
    rows = [shape(torch.randn(5)) for _ in range(10)]
    none = TrainingPlan(1.0, 1e-9, steps=1, expected_batch_size=1)
    model, optimizer, _ = parts(None)
    with training_run(accountant, "b", none, unit="row") as run:
        model, optimizer, loader = run.make_private(model, optimizer, DataLoader(rows))
        for batch in run.batches(loader):
            tensor = batch["x"] if isinstance(batch, dict) else batch
            tensor = tensor[0] if isinstance(tensor, list) else tensor
            assert tensor.shape == (1, 5)
            assert not tensor.any()
            model(tensor).sum().backward()
            optimizer.step()


def test_empty_batches_are_charged_and_noised(accountant, rows):
    tiny = TrainingPlan(1.0, 1e-9, steps=3, expected_batch_size=1)
    few = TensorDataset(*rows[:20])  # one of them is drawn once in 16 million runs
    with training_run(accountant, "b", tiny, unit="row") as run:
        model, optimizer, loader = run.make_private(*parts(few))
        before = [parameter.detach().clone() for parameter in model.parameters()]
        for batch in run.batches(loader):
            assert not batch[0].any()
            learn(model, optimizer, batch)
    assert not any(map(torch.equal, before, model.parameters()))
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert spent(accountant) == 3


def test_kill_9_during_training_keeps_the_whole_plan_spent(tmp_path):
    script = textwrap.dedent("""
        import signal, sys, torch, warnings
        warnings.simplefilter("ignore")
        from torch.utils.data import DataLoader, TensorDataset
        from accountant import Accountant
        from dp import adaptive
        from finetune import TrainingPlan, training_run
        accountant = Accountant.open(sys.argv[1])
        accountant.create_budget("b", adaptive(8.0, 1e-5), unit="row")
        rows = TensorDataset(torch.randn(200, 5), torch.randint(0, 2, (200,)))
        model = torch.nn.Linear(5, 2)
        plan = TrainingPlan.for_units(200, expected_batch_size=20, noise_multiplier=2.0, steps=500)
        with training_run(accountant, "b", plan, unit="row") as run:
            model, optimizer, loader = run.make_private(
                model, torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(rows))
            for step, batch in enumerate(run.batches(loader)):
                torch.nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
                optimizer.step(); optimizer.zero_grad()
                print(step + 1, flush=True)
                if step == 400:
                    signal.pause()  # a slow test must not find the run at its end
    """)
    ledger = tmp_path / "ledger.db"
    with subprocess.Popen(
        [sys.executable, "-c", script, str(ledger)], stdout=subprocess.PIPE, text=True
    ) as process:
        for line in process.stdout:
            if int(line) >= 20:
                os.kill(process.pid, signal.SIGKILL)
                break
        seen = max([20, *(int(line) for line in process.stdout)])
    with Accountant.open(ledger) as accountant:
        ((_, uses, marked),) = accountant.statement("b").open_reservations
        assert uses == 500
        assert seen <= marked <= seen + 1
        assert accountant.statement("b").activities[0].uses == 500
        assert accountant.verify().clean


def test_the_price_is_that_of_the_poisson_sampled_gaussian():
    assert plan().event == PoissonSampled(0.1, Gaussian(1.0))


def test_a_second_loop_over_the_batches_of_a_plan_is_warned_of(accountant, rows, caplog):
    with training_run(accountant, "b", plan(steps=1), unit="row") as run:
        model, optimizer, loader = run.make_private(*parts(rows))
        for _epoch in range(2):
            for batch in run.batches(loader):
                learn(model, optimizer, batch)
    assert caplog.text.count("no step of the plan is left for another loop") == 1
