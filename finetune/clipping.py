"""Gradients of single rows, whole or as factors, and what clipping needs of them.

``hooks`` keeps a gradient of each row for every weight. ``ghost`` keeps what it is made of where
that is smaller: of a linear layer the input and the gradient of the output of each token, whose
outer products it is the sum of, and of an embedding the tokens and the gradients of what was looked
up. Norms come from their products (ghost norms: Li et al., "Large Language Models Can Be Strong
Differentially Private Learners", 2022), and so does the clipped sum, without a second backward pass
(book-keeping: Bu et al., "Differentially Private Optimization on Large Model at Small Cost", 2023).

Norm and sum are of the same factors in either mode. So what a row adds to the sum is bounded
whatever the loss is, as long as each entry depends on its own row.
"""

from __future__ import annotations

from collections import ChainMap, Counter
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from opacus import GradSampleModule
from opacus.grad_sample.functorch import ft_compute_per_sample_gradient
from opacus.grad_sample.grad_sample_module import promote_current_grad_sample
from opacus.utils.tensor_utils import sum_over_all_but_batch_and_last_n
from torch import Tensor, nn
from torch.nn import functional

from finetune.errors import UnmarkedStep, UnsupportedModel

_CHUNK = 2**12
"""How many squares are added up in single precision."""

_ROUNDING = 1e-6
"""Relative to the sum of the norms of a gradient's terms; the sum in single precision is nearer."""


@dataclass(slots=True)
class Outer:
    """Gradients of the weight of a linear layer: of row i, the matrix ``back[i].T @ into[i]``.

    Attributes:
        back: Gradients of the output, of shape (rows, tokens, outputs).
        into: The input, of shape (rows, tokens, inputs).

    >>> outer = Outer(torch.tensor([[[1.0], [2.0]]]), torch.tensor([[[3.0, 0.0], [0.0, 2.0]]]))
    >>> outer.whole()
    tensor([[[3., 4.]]])
    >>> round(outer.norms().item(), 4), outer.weighted(torch.tensor([0.5]))
    (5.0, tensor([[1.5000, 2.0000]]))
    """

    back: Tensor
    into: Tensor

    def __len__(self) -> int:
        return len(self.back)

    def whole(self) -> Tensor:
        """Return the gradients: (rows, outputs, inputs)."""
        whole: Tensor = torch.bmm(self.back.mT, self.into)
        return whole

    def norms(self) -> Tensor:
        """Return their norms, rounded up, in double precision: (rows,).

        Tokens can cancel, so the squares are added up in double precision, and what rounding can
        do to the sum in single precision is added.
        """
        back, into = self.back.double(), self.into.double()
        squares: Tensor = ((back @ back.mT) * (into @ into.mT)).sum((1, 2)).clamp(min=0)
        terms: Tensor = (back.norm(dim=2) * into.norm(dim=2)).sum(1)
        return squares.sqrt() + _ROUNDING * terms

    def weighted(self, weights: Tensor) -> Tensor:
        """Return the sum over rows, each with its weight: (outputs, inputs)."""
        terms = (self.back * weights[:, None, None]).flatten(0, 1)
        return torch.mm(terms.T, self.into.flatten(0, 1))

    def without(self, left_out: Tensor) -> Outer:
        """Return the same with zeros for some rows: a mask of shape (rows,)."""
        mask = left_out[:, None, None]
        return Outer(self.back.masked_fill(mask, 0), self.into.masked_fill(mask, 0))


@dataclass(slots=True)
class Lookups:
    """Gradients of an embedding: of row i, ``back[i, t]`` is added to entry ``ids[i, t]``.

    Attributes:
        ids: What was looked up, of shape (rows, tokens).
        back: Gradients of what was found, of shape (rows, tokens, width).
        entries: Number of entries of the embedding.

    >>> lookups = Lookups(torch.tensor([[2, 2]]), torch.tensor([[[1.0], [2.0]]]), 3)
    >>> lookups.whole().tolist(), round(lookups.norms().item(), 4)
    ([[[0.0], [0.0], [3.0]]], 3.0)
    >>> lookups.weighted(torch.tensor([0.5])).tolist()
    [[0.0], [0.0], [1.5]]
    """

    ids: Tensor
    back: Tensor
    entries: int

    def __len__(self) -> int:
        return len(self.back)

    def whole(self) -> Tensor:
        """Return the gradients: (rows, entries, width)."""
        rows, _, width = self.back.shape
        whole = self.back.new_zeros(rows, self.entries, width)
        return whole.scatter_add_(1, self.ids[:, :, None].expand_as(self.back), self.back)

    def norms(self) -> Tensor:
        """Return their norms, rounded up, in double precision: (rows,)."""
        back, same = self.back.double(), self.ids[:, :, None] == self.ids[:, None, :]
        squares: Tensor = ((back @ back.mT) * same).sum((1, 2)).clamp(min=0)
        terms: Tensor = back.norm(dim=2).sum(1)
        return squares.sqrt() + _ROUNDING * terms

    def weighted(self, weights: Tensor) -> Tensor:
        """Return the sum over rows, each with its weight: (entries, width)."""
        summed = self.back.new_zeros(self.entries, self.back.shape[-1])
        terms = (self.back * weights[:, None, None]).flatten(0, 1)
        return summed.index_add_(0, self.ids.flatten(), terms)

    def without(self, left_out: Tensor) -> Lookups:
        """Return the same with zeros for some rows: a mask of shape (rows,)."""
        return Lookups(self.ids, self.back.masked_fill(left_out[:, None, None], 0), self.entries)


Rows = Tensor | Outer | Lookups
"""Gradients of single rows; a tensor has them as its first dimension."""


def norms(rows: Rows) -> Tensor:
    """Return the norm of each row's gradient, in double precision: (rows,).

    A sum of a million squares in single precision would be too small; of a few thousand it is not.
    """
    if not isinstance(rows, Tensor):
        return rows.norms()
    flat = rows.reshape(len(rows), -1)
    whole = flat.shape[1] // _CHUNK * _CHUNK
    chunks = torch.unflatten(flat[:, :whole], 1, (-1, _CHUNK)).norm(dim=2)
    parts = torch.cat([chunks, flat[:, whole:].norm(dim=1, keepdim=True)], dim=1).double()
    if not parts.isfinite().all():  # squares beyond single precision, or rows that are not finite
        parts = flat.double()
    norm: Tensor = parts.norm(dim=1)
    return norm


def weighted(rows: Rows, weights: Tensor) -> Tensor:
    """Return the sum over rows, each with its weight."""
    if isinstance(rows, Tensor):
        return torch.einsum("i,i...", weights.to(rows.dtype), rows)
    return rows.weighted(weights.to(rows.back.dtype))


def without(rows: Rows, left_out: Tensor) -> Rows:
    """Return them with zeros for the rows of a mask; a tensor is changed in place."""
    if isinstance(rows, Tensor):
        return rows.masked_fill_(left_out.reshape(-1, *[1] * (rows.dim() - 1)), 0)
    return rows.without(left_out)


def linear_rows(
    layer: nn.Linear, activations: list[Tensor], backprops: Tensor
) -> dict[Tensor, Rows]:
    """Return what is smaller for each row of a linear layer's weight: its gradient, or factors."""
    rows, outputs = len(backprops), layer.out_features
    back = backprops.reshape(rows, -1, outputs)
    into = activations[0].to(back.dtype).reshape(rows, -1, layer.in_features)
    found: dict[Tensor, Rows] = {}
    if layer.weight.requires_grad:
        outer, size = Outer(back, into), layer.weight.numel()
        found[layer.weight] = outer if back[0].numel() + into[0].numel() < size else outer.whole()
    if layer.bias is not None and layer.bias.requires_grad:
        found[layer.bias] = back.sum(1)
    return found


def embedding_rows(
    layer: nn.Embedding, activations: list[Tensor], backprops: Tensor
) -> dict[Tensor, Rows]:
    """Return what was looked up for each row, and the gradients of it."""
    rows = len(backprops)
    ids, back = activations[0].reshape(rows, -1), backprops.reshape(rows, -1, layer.embedding_dim)
    if layer.padding_idx is not None:
        back = back.masked_fill((ids == layer.padding_idx)[:, :, None], 0)
    return {layer.weight: Lookups(ids, back, layer.num_embeddings)}


def _whole_embedding_rows(layer: nn.Embedding, *what: Any) -> dict[Tensor, Rows]:
    return {each: _whole(rows) for each, rows in embedding_rows(layer, *what).items()}


def _layer_norm_rows(
    layer: nn.LayerNorm, activations: list[Tensor], backprops: Tensor
) -> dict[Tensor, Rows]:
    """Return the gradients of each row; Opacus's own needs a bias."""
    found: dict[Tensor, Rows] = {}
    last = len(layer.normalized_shape)
    if layer.weight is not None and layer.weight.requires_grad:
        scaled = functional.layer_norm(activations[0], layer.normalized_shape, eps=layer.eps)
        found[layer.weight] = sum_over_all_but_batch_and_last_n(scaled * backprops, last)
    if layer.bias is not None and layer.bias.requires_grad:
        found[layer.bias] = sum_over_all_but_batch_and_last_n(backprops, last)
    return found


class HooksModule(GradSampleModule):  # type: ignore[misc]
    """Opacus's module, which keeps what it computes for each row without copying it.

    Gradients of padding are left out, as by torch, and norms may have no bias.
    """

    GRAD_SAMPLERS: ClassVar[Any] = ChainMap(
        {nn.Embedding: _whole_embedding_rows, nn.LayerNorm: _layer_norm_rows},
        GradSampleModule.GRAD_SAMPLERS,
    )

    def __init__(self, model: nn.Module, **others: Any) -> None:
        super().__init__(model, **others)
        uses = Counter(
            each for module in model.modules() for each in module.parameters(recurse=False)
        )
        self._shared = {parameter for parameter, count in uses.items() if count > 1}

    def capture_backprops_hook(
        self,
        module: nn.Module,
        _forward_input: Any,
        forward_output: Any,
        loss_reduction: str,
        batch_first: bool,  # noqa: FBT001 - Opacus's signature
    ) -> None:
        """Keep the gradients of single rows, or what they are made of."""
        if not self.hooks_enabled:
            return
        name = type(module).__name__
        if not getattr(module, "activations", None):
            raise UnmarkedStep(
                f"{name} got several backward passes for one forward pass (retain_graph,"
                " create_graph); take one of each for a batch"
            )
        activations, backprops = self.rearrange_grad_samples(
            module=module,
            backprops=forward_output[0].detach(),
            loss_reduction=loss_reduction,
            batch_first=batch_first,
        )
        sampler = self.GRAD_SAMPLERS.get(type(module), ft_compute_per_sample_gradient)
        try:
            sampled = sampler(module, activations, backprops)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            own = [each for each, _ in module.named_parameters(recurse=False)]
            raise UnsupportedModel(
                f"gradients of single rows of {name} cannot be computed; freeze what it has of its"
                f" own ({', '.join(own)}), or train adapters ({type(error).__name__}: {error})"
            ) from error
        for parameter, rows in sampled.items():
            if not parameter.requires_grad:
                continue
            now, before = rows, getattr(parameter, "_current_grad_sample", None)
            if before is not None or parameter in self._shared:
                now = _whole(rows) if before is None else _whole(before) + _whole(rows)
            parameter._current_grad_sample = now  # noqa: SLF001
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter._forward_counter -= 1  # type: ignore[attr-defined]  # noqa: SLF001
                if parameter._forward_counter == 0:  # type: ignore[attr-defined]  # noqa: SLF001
                    promote_current_grad_sample(parameter)
        if not module.activations:
            module.__dict__.pop("max_batch_len", None)


class GhostModule(HooksModule):
    """The same with factors for linear layers and embeddings."""

    GRAD_SAMPLERS: ClassVar[Any] = ChainMap(
        {nn.Linear: linear_rows, nn.Embedding: embedding_rows}, HooksModule.GRAD_SAMPLERS
    )


def _whole(rows: Rows) -> Tensor:
    return rows if isinstance(rows, Tensor) else rows.whole()
