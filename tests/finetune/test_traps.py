"""What makes the epsilon of a DP-SGD run wrong without a word, and what is said here instead.

One script for each trap, in the order of the table below; each must end with its error before a
weight was changed, or the trap must have no effect. Beside them good scripts, which must end well:
a guard that cries wolf is turned off.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

from accountant import Accountant, BudgetExceeded
from dp import adaptive
from finetune import (
    DeclaredExceeded,
    FinetuneError,
    NoGradient,
    NotPoissonSampled,
    OneRowPerUnit,
    PlanChanged,
    RowsMixed,
    TrainingPlan,
    UnitMap,
    UnmarkedStep,
    UnsupportedModel,
    WeightsChanged,
    check_rows_apart,
    training_run,
)

ROWS = 40
PLAN = TrainingPlan.for_units(ROWS, expected_batch_size=8, noise_multiplier=1.0, steps=4)


class World:
    """What a script finds: a ledger, rows, a model, an optimizer."""

    def __init__(self, folder):
        torch.manual_seed(0)
        self.folder = folder
        self.accountant = Accountant.open(folder / "ledger.db")
        self.accountant.create_budget("b", adaptive(8.0, 1e-5), unit="row", units=ROWS)
        self.rows = TensorDataset(torch.randn(ROWS, 5), torch.randint(0, 3, (ROWS,)))
        self.model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)

    @contextmanager
    def run(self, plan=PLAN, model=None, loader=None, mode="hooks", **more):
        model = model or self.model
        optimizer = self.optimizer
        if model is not self.model:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with training_run(self.accountant, "b", plan, unit="row", **more) as run:
            yield (
                run,
                *run.make_private(model, optimizer, loader or DataLoader(self.rows), mode=mode),
            )

    def step(self, model, optimizer, batch, criterion=functional.cross_entropy):
        criterion(model(batch[0]), batch[1]).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture
def world(tmp_path):
    world = World(tmp_path)
    yield world
    world.accountant.close()


def shuffled_batches(w):
    with w.run() as (run, *_):
        next(run.batches(DataLoader(w.rows, batch_size=8, shuffle=True)))


def weighted_sampler(w):
    sampler = WeightedRandomSampler(torch.ones(ROWS), ROWS)
    with w.run(loader=DataLoader(w.rows, batch_size=8, sampler=sampler)):
        pass


def mean_over_tokens(w):
    rows = []
    for length in (*[1] * 20, 60):
        labels = torch.full((60,), -100)
        labels[:length] = 1
        rows.append((torch.randn(60, 5), labels))

    def loss(model, batch):
        return functional.cross_entropy(model(batch[0]).transpose(1, 2), batch[1])

    check_rows_apart(w.model, loss, rows)


def in_batch_negatives(w):
    def loss(model, batch):
        vectors = functional.normalize(model(batch[0]), dim=1)
        return functional.cross_entropy(vectors @ vectors.T * 10, torch.arange(len(vectors)))

    check_rows_apart(w.model, loss, [w.rows[at] for at in range(12)])


def batch_norm(w):
    with w.run(model=nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3))):
        pass


def chunks_of_one_document(w):
    UnitMap.of(w.rows, [at // 8 for at in range(ROWS)]).check_group(1)


def packed_documents(w):
    UnitMap.packed(w.rows, [(at, at + 1) for at in range(ROWS)]).check_group(1)


def records_of_one_user(w):
    UnitMap.of(w.rows, ["ann"] * 30 + [f"u{at}" for at in range(10)]).check_group(2)


def accumulation_by_hand(w):
    with w.run() as (run, model, optimizer, loader):
        batch = next(run.batches(loader))
        for _ in range(2):
            functional.cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()


def more_units_than_declared(w):
    UnitMap.of(w.rows, range(ROWS)).check_units(ROWS - 1)


def interrupted(w):
    with pytest.raises(KeyboardInterrupt), w.run(checkpoint=w.folder / "run.pt") as (run, *parts):
        w.step(*parts[:2], next(run.batches(parts[2])))
        run.save()
        raise KeyboardInterrupt


def less_noise_on_resume(w):
    interrupted(w)
    w.before = copy.deepcopy(list(w.model.parameters()))
    plan = TrainingPlan.for_units(ROWS, expected_batch_size=8, noise_multiplier=0.3, steps=4)
    with w.run(plan, checkpoint=w.folder / "run.pt"):
        pass


def less_noise_in_the_loop(w):
    with w.run() as (run, model, optimizer, loader):
        optimizer.noise_multiplier = 0.1
        w.step(model, optimizer, next(run.batches(loader)))


def step_of_the_old_optimizer(w):
    with w.run() as (run, model, _, loader):
        batch = next(run.batches(loader))
        functional.cross_entropy(model(batch[0]), batch[1]).backward()
        w.optimizer.step()


def two_steps_on_one_batch(w):
    with w.run() as (run, model, optimizer, loader):
        batch = next(run.batches(loader))
        w.step(model, optimizer, batch)
        w.before = copy.deepcopy(list(w.model.parameters()))
        w.step(model, optimizer, batch)


def weights_changed_beside(w):
    with w.run() as (run, model, optimizer, loader):
        batches = run.batches(loader)
        w.step(model, optimizer, next(batches))
        with torch.no_grad():
            w.model[0].weight += 1
        w.before = copy.deepcopy(list(w.model.parameters()))
        w.step(model, optimizer, next(batches))


def sweep_that_pays_for_one_trial(w):
    fit = w.accountant.uses_that_fit("b", PLAN.event)
    plan = TrainingPlan.for_units(ROWS, expected_batch_size=8, noise_multiplier=1.0, steps=fit)
    for _ in range(2):  # the second trial finds its budget spent
        with training_run(w.accountant, "b", plan, unit="row") as run:
            run.reservation.mark(fit)


def unused_parameter(w):
    w.model.extra = nn.Linear(2, 2)
    w.model.forward = lambda features: w.model[2](w.model[1](w.model[0](features)))
    w.optimizer = torch.optim.SGD(w.model.parameters(), lr=0.1)
    with w.run() as (run, model, optimizer, loader):
        w.step(model, optimizer, next(run.batches(loader)))


def evaluation_mode(w):
    w.model.eval()
    with w.run():
        pass


def gradient_checkpointing(w):
    w.model.gradient_checkpointing = True
    with w.run():
        pass


def tied_weights_under_ghost_clipping(w):
    tied = nn.Sequential(nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False))
    tied[1].weight = tied[0].weight
    with w.run(model=tied, mode="ghost"):
        pass


TRAPS = {
    shuffled_batches: (NotPoissonSampled, "no amplification"),
    weighted_sampler: (NotPoissonSampled, "WeightedRandomSampler"),
    mean_over_tokens: (RowsMixed, "mean within each row"),
    in_batch_negatives: (RowsMixed, "negatives of the batch"),
    batch_norm: (UnsupportedModel, "BatchNorm"),
    chunks_of_one_document: (DeclaredExceeded, "OneRowPerUnit"),
    packed_documents: (DeclaredExceeded, "counts twice"),
    records_of_one_user: (DeclaredExceeded, "the declared 2 rows of one unit"),
    accumulation_by_hand: (UnmarkedStep, "several backward passes"),
    more_units_than_declared: (DeclaredExceeded, "public bound"),
    less_noise_on_resume: (PlanChanged, "noise_multiplier is 0.3"),
    less_noise_in_the_loop: (PlanChanged, "noise_multiplier is 0.1"),
    step_of_the_old_optimizer: (UnmarkedStep, "raw gradients"),
    two_steps_on_one_batch: (UnmarkedStep, "no durable mark"),
    weights_changed_beside: (WeightsChanged, "not accounted for"),
    sweep_that_pays_for_one_trial: (BudgetExceeded, "0 would fit"),
    unused_parameter: (NoGradient, "extra.weight"),
    evaluation_mode: (UnsupportedModel, "model.train()"),
    gradient_checkpointing: (UnsupportedModel, "gradient checkpointing"),
    tied_weights_under_ghost_clipping: (UnsupportedModel, "is tied"),
}


@pytest.mark.parametrize("script", TRAPS, ids=lambda script: script.__name__)
def test_a_trap_is_named_before_a_weight_is_changed(world, script):
    error, words = TRAPS[script]
    world.before = copy.deepcopy(list(world.model.parameters()))
    with pytest.raises((FinetuneError, BudgetExceeded)) as caught:
        script(world)
    assert type(caught.value) is error
    assert words in str(caught.value)
    assert all(map(torch.equal, world.before, list(world.model.parameters())[: len(world.before)]))
    assert world.accountant.verify().clean


def seeds_that_repeat(world) -> bool:
    """Train twice under one seed; say whether the noise was the same."""
    found = []
    for _ in range(2):
        torch.manual_seed(42)
        model = nn.Linear(5, 3)
        plan = TrainingPlan.for_units(ROWS, expected_batch_size=8, noise_multiplier=1.0, steps=1)
        with world.run(plan, model=model) as (run, private, optimizer, loader):
            for batch in run.batches(loader):
                world.step(private, optimizer, batch)
        found.append(model.weight.detach().clone())
    return torch.equal(*found)


def test_a_seed_does_not_repeat_the_noise(world):
    assert not seeds_that_repeat(world)


def test_an_older_checkpoint_gives_no_step_back(world):
    interrupted(world)
    older = (world.folder / "run.pt").read_bytes()
    for _ in range(2):
        (world.folder / "run.pt").write_bytes(older)
        with (
            pytest.raises(KeyboardInterrupt),
            world.run(checkpoint=world.folder / "run.pt") as (run, *parts),
        ):
            world.step(*parts[:2], next(run.batches(parts[2])))
            raise KeyboardInterrupt
    with world.run(checkpoint=world.folder / "run.pt") as (run, *_):
        assert run.remaining == 1


# --- good scripts ----------------------------------------------------------------------------------


def plain(w):
    with w.run() as (run, *parts):
        for batch in run.batches(parts[2]):
            w.step(*parts[:2], batch)


def memory_manager(w):
    with (
        w.run() as (run, model, optimizer, loader),
        BatchMemoryManager(
            data_loader=loader, max_physical_batch_size=3, optimizer=optimizer
        ) as parts,
    ):
        for batch in run.batches(parts):
            w.step(model, optimizer, batch)


def ghost(w):
    with w.run(mode="ghost") as (run, model, optimizer, loader):
        criterion = nn.CrossEntropyLoss()
        for batch in run.batches(loader):
            w.step(model, optimizer, batch, criterion)


def schedules(w):
    warm = TrainingPlan.for_units(ROWS, expected_batch_size=4, noise_multiplier=2.0, steps=1)
    main = TrainingPlan.for_units(ROWS, expected_batch_size=8, noise_multiplier=1.0, steps=3)
    with w.run((warm, main)) as (run, model, optimizer, loader):
        rates = torch.optim.lr_scheduler.LinearLR(w.optimizer)
        for batch in run.batches(loader):
            w.step(model, optimizer, batch)
            rates.step()


def evaluation_between_steps(w):
    with w.run() as (run, model, optimizer, loader):
        for batch in run.batches(loader):
            w.step(model, optimizer, batch)
            model.eval()
            with torch.no_grad():
                model(torch.randn(3, 5))
            model.train()


def frozen_layers_and_adam(w):
    w.model[0].requires_grad_(False)
    w.optimizer = torch.optim.AdamW(w.model[2].parameters(), lr=0.01, weight_decay=0.1)
    plain(w)


def one_row_for_each_author(w):
    units = UnitMap.of(w.rows, [at // 2 for at in range(ROWS)])
    drawn = OneRowPerUnit(w.rows, units)
    plan = TrainingPlan.for_units(
        units.check_units(ROWS), expected_batch_size=8, noise_multiplier=1.0, steps=4
    )
    with w.run(plan, loader=DataLoader(drawn)) as (run, *parts):
        for batch in run.batches(parts[2]):
            w.step(*parts[:2], batch)


GOOD = (
    plain,
    memory_manager,
    ghost,
    schedules,
    evaluation_between_steps,
    frozen_layers_and_adam,
    one_row_for_each_author,
)


@pytest.mark.parametrize("script", GOOD, ids=lambda script: script.__name__)
def test_a_good_script_is_left_alone(world, script):
    before = copy.deepcopy(list(world.model.parameters()))
    script(world)
    assert not all(map(torch.equal, before, world.model.parameters()))
    assert sum(uses for _, uses in world.accountant.statement("b").spent) == 4
    assert world.accountant.statement("b").open_reservations == ()
    assert world.accountant.verify().clean
