"""The neighboring-batch test finds losses that mix rows, and accuses none that does not."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from finetune import NoGradient, NotFinite, RowsMixed, UnsupportedModel, check_rows_apart
from finetune.selftest import check_batches_apart

PAD, VOCABULARY, WIDTH = -100, 20, 300


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Language(nn.Module):
    """Predicts tokens: embedding, one layer, logits."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.layer = nn.Linear(8, 8)
        self.head = nn.Linear(8, VOCABULARY)
        self.drop = nn.Dropout(0.3)

    def forward(self, ids):
        return self.head(self.drop(torch.tanh(self.layer(self.embed(ids)))))


def records(lengths):
    """Texts of these lengths, padded."""
    found = []
    for length in lengths:
        ids = torch.randint(0, VOCABULARY, (WIDTH,))
        labels = torch.full((WIDTH,), PAD)
        labels[:length] = torch.randint(0, VOCABULARY, (length,))
        found.append((ids, labels))
    return found


def over_all_tokens(model, batch):
    """What most language models compute by themselves: the mean over all tokens of the batch."""
    ids, labels = batch
    return functional.cross_entropy(model(ids).transpose(1, 2), labels, ignore_index=PAD)


def within_each_row(model, batch):
    ids, labels = batch
    losses = functional.cross_entropy(
        model(ids).transpose(1, 2), labels, ignore_index=PAD, reduction="none"
    )
    return (losses.sum(1) / (labels != PAD).sum(1).clamp(min=1)).mean()


@pytest.mark.parametrize("lengths", [(2,) * 63 + (WIDTH,), (20, 25, 30, 35, 40) * 3, (10, 11)])
def test_a_mean_over_tokens_is_found_and_one_within_each_row_is_not_accused(lengths):
    texts = records(lengths if len(lengths) > 2 else lengths * 8)
    with pytest.raises(RowsMixed, match="mean within each row") as caught:
        check_rows_apart(Language(), over_all_tokens, texts)
    right = check_rows_apart(Language(), within_each_row, texts)
    print(f"changes: {caught.value.change:.1e} under a mean over tokens, {right:.1e} within rows")
    assert caught.value.change > 2e-3
    assert right < 1e-5


def test_control_a_mean_over_the_tokens_of_rows_that_are_equally_long_is_one_over_rows():
    assert check_rows_apart(Language(), over_all_tokens, records([40] * 8)) < 1e-5


class Normed(nn.Module):
    """Batch statistics by hand, which no list of layers forbids."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, features):
        hidden = self.inner(features)
        return self.head((hidden - hidden.mean(0)) / (hidden.std(0) + 1e-3))


def mean_loss(model, batch):
    return functional.cross_entropy(model(batch[0]), batch[1])


def weighted(model, batch):
    return functional.cross_entropy(
        model(batch[0]), batch[1], weight=torch.tensor([0.01, 1.0, 5.0])
    )


def contrastive(model, batch):
    one = functional.normalize(model(batch[0]), dim=1)
    two = functional.normalize(model(batch[0].flip(1)), dim=1)
    return functional.cross_entropy(one @ two.T * 20, torch.arange(len(one)))


def summed(model, batch):
    return functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")


def rows(count=12):
    return [(torch.randn(4) * (1 + 5 * (n == 3)), torch.tensor(n % 3)) for n in range(count)]


@pytest.mark.parametrize(
    ("model", "loss"),
    [
        (Normed(), mean_loss),
        (nn.Linear(4, 3), weighted),
        (nn.Linear(4, 3), contrastive),
        (nn.Linear(4, 3), summed),  # Opacus was told that it is a mean: scaled by the batch
    ],
    ids=["batch statistics", "class weights", "in-batch negatives", "a sum"],
)
def test_what_mixes_rows_is_found(model, loss):
    with pytest.raises(RowsMixed):
        check_rows_apart(model, loss, rows(), leave_out=12)


@pytest.mark.parametrize(
    "model",
    [
        nn.Linear(4, 3),
        nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3)),
        nn.Sequential(nn.Linear(4, 8), nn.GroupNorm(2, 8), nn.Dropout(0.5), nn.Linear(8, 3)),
    ],
    ids=["linear", "layer norm", "group norm and dropout"],
)
@pytest.mark.parametrize("count", [3, 12, 40])
def test_what_keeps_rows_apart_is_not_accused(model, count):
    assert check_rows_apart(model, mean_loss, rows(count)) < 1e-5


def test_tokens_as_rows_are_found():
    def flattened(model, batch):
        return functional.cross_entropy(model(batch[0].reshape(-1, 2)), batch[1].repeat(2))

    with pytest.raises(RowsMixed, match="12 rows gave 24 samples"):
        check_rows_apart(nn.Linear(2, 3), flattened, rows())


def test_nothing_is_changed():
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3)).eval()
    model[0].train()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    weights = {name: part.clone() for name, part in model.state_dict().items()}
    check_rows_apart(model, mean_loss, rows())
    assert all(torch.equal(part, weights[name]) for name, part in model.state_dict().items())
    assert [module.training for module in model] == [True, False, False]
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert not model[0]._forward_hooks
    with pytest.raises(RowsMixed):
        check_rows_apart(model, contrastive, rows())
    assert not model[0]._forward_hooks


class Drawing(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 3)

    def forward(self, features):
        return self.inner(functional.dropout(features, 0.5, self.training))


def test_a_model_that_draws_is_no_violation_and_no_proof():
    with pytest.raises(UnsupportedModel, match="draws at random"):
        check_rows_apart(Drawing(), mean_loss, rows())


def frozen(layer):
    return layer.requires_grad_(requires_grad=False)


def test_a_frozen_batch_norm_keeps_its_mode_and_its_statistics():
    model = nn.Sequential(nn.Linear(4, 8), frozen(nn.BatchNorm1d(8)), nn.Linear(8, 3))
    model[1].eval()
    assert check_rows_apart(model, mean_loss, rows()) < 1e-5
    model[1].train()
    before = {name: part.clone() for name, part in model.state_dict().items()}
    with pytest.raises(RowsMixed):
        check_rows_apart(model, mean_loss, rows())
    assert all(torch.equal(part, before[name]) for name, part in model.state_dict().items())


def test_a_row_without_a_finite_gradient_is_named():
    spoiled = rows()
    spoiled[5] = (torch.full((4,), math.nan), torch.tensor(0))
    with pytest.raises(NotFinite, match=r"rows \[5\] of a batch have gradients that are not"):
        check_rows_apart(nn.Linear(4, 3), mean_loss, spoiled)


def test_rows_of_very_different_scale_are_not_accused():
    scaled = [(row * 10.0 ** (at % 6), label) for at, (row, label) in enumerate(rows())]
    assert check_rows_apart(nn.Linear(4, 3), mean_loss, scaled) < 1e-3


def test_a_weight_that_the_loss_does_not_reach_is_named():
    class Partly(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.extra = nn.Linear(4, 3), nn.Linear(2, 2)

        def forward(self, features):
            return self.used(features)

    with pytest.raises(NoGradient, match=r"extra\.weight got no gradient"):
        check_rows_apart(Partly(), mean_loss, rows())


class Recurrent(nn.Module):
    """Layers whose dropout is not a layer of its own."""

    def __init__(self):
        super().__init__()
        self.inner = nn.LSTM(4, 6, num_layers=2, dropout=0.5, batch_first=True)
        self.attention = nn.MultiheadAttention(6, 2, dropout=0.5, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, features):
        hidden, _ = self.inner(features[:, None].expand(-1, 3, -1))
        return self.head(self.attention(hidden, hidden, hidden)[0][:, -1])


def test_dropout_inside_frozen_layers_is_off_meanwhile():
    model = Recurrent()
    frozen(model.inner), frozen(model.attention)
    assert check_rows_apart(model, mean_loss, rows()) < 1e-5
    assert (model.inner.dropout, model.attention.dropout) == (0.5, 0.5)


def test_layers_that_have_no_gradients_of_rows_are_named():
    with pytest.raises(UnsupportedModel, match="rows of MultiheadAttention cannot be"):
        check_rows_apart(Recurrent(), mean_loss, rows())
    with pytest.raises(UnsupportedModel, match="RuntimeError: mat1 and mat2"):
        check_rows_apart(nn.Linear(5, 3), mean_loss, rows())


def test_two_batches_are_compared():
    whole, part = (torch.utils.data.default_collate(rows()[:count]) for count in (7, 4))
    torch.manual_seed(1)
    whole[0][:4], whole[1][:4] = part
    assert check_batches_apart(nn.Linear(4, 3), mean_loss, whole, part) < 1e-5
    with pytest.raises(RowsMixed, match="with 4 of 7 rows"):
        check_batches_apart(nn.Linear(4, 3), contrastive, whole, part)


def test_too_few_rows():
    with pytest.raises(ValueError, match="at least 3 rows, got 2"):
        check_rows_apart(nn.Linear(4, 3), mean_loss, rows(2))
