"""Models and layers that DP-SGD cannot train are named; what only looks like one is trained."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from finetune import (
    NoGradient,
    UnitsMixed,
    UnsupportedModel,
    UnsupportedSetting,
    WeightsChanged,
    training_run,
)
from tests.finetune.worlds import MODES, ROWS, mean_of_rows, network, plan, run_of, tried, untouched


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


def test_a_parameter_that_the_loss_does_not_reach(accountant, rows):
    model = network()
    model.extra = torch.nn.Linear(2, 2)
    run, private, guarded, loader, _ = run_of(accountant, rows, model)
    features, labels = next(run.batches(loader))
    hidden = private._module[2](private._module[1](private._module[0](features)))
    torch.nn.functional.cross_entropy(hidden, labels).backward()
    with pytest.raises(NoGradient, match=r"extra\.weight got no gradient of single rows"):
        guarded.step()


def test_what_is_refused_before_the_first_step_costs_nothing(accountant, rows):
    half = network().half()
    with (
        pytest.raises(UnsupportedModel, match=r"torch\.float16.*keep them in float32"),
        training_run(accountant, "b", plan(), unit="row") as run,
    ):
        run.make_private(half, torch.optim.SGD(half.parameters(), lr=0.1), DataLoader(rows))
    assert accountant.statement("b").spent == ()
    assert accountant.statement("b").open_reservations == ()


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


def test_a_layer_of_rows_and_of_something_else_is_refused(accountant, rows):
    """What the rows do to prototypes would be put into the places of the first rows."""
    model = network()
    run, private, _, loader, _ = run_of(accountant, rows, model)
    features, _ = next(run.batches(loader))
    with pytest.raises(UnitsMixed, match=r"shape \(3, 5\) in a batch of 24 rows"):
        private(features) @ private(torch.randn(3, 5)).T


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
