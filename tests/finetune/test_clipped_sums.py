"""Hooks and ghost clipping, samples in parts, samples without rows: the same sums, as by hand."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from opacus.layers import DPLSTM
from torch.utils.data import DataLoader, TensorDataset

from finetune import training_run
from finetune.clipping import Lookups, Outer, linear_rows, norms
from tests.finetune.worlds import (
    MODES,
    ROWS,
    by_hand,
    close,
    network,
    plan,
    run_of,
    sums_of,
    trained,
)


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
