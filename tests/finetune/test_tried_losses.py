"""A loss that is tried before anything is paid for."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from finetune import RowsMixed, UnsupportedModel, training_run
from finetune.batches import made_up
from tests.finetune.worlds import ROWS, mean_of_rows, network, plan, tried, untouched


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
