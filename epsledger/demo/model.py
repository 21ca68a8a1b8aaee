"""Define the topic classifier that DP-SGD fine-tunes: LoRA on MiniLM's last block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from epsledger.demo.corpus import TOPICS
from epsledger.demo.encoder import WIDTH, last_block, mean_pool

_HEADS = 12
_ROWS = 64
_LAYER_NORM_EPSILON = 1e-12
_PARTS = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "mix": "attention.output.dense",
    "mix_norm": "attention.output.LayerNorm",
    "inner": "intermediate.dense",
    "outer": "output.dense",
    "outer_norm": "output.LayerNorm",
}


@dataclass(frozen=True, slots=True)
class HyperParameters:
    """Fix the training run; chosen beforehand, on held-out articles only.

    Attributes:
        expected_batch_size: mean size of a Poisson batch.
        steps: DP-SGD steps.
        learning_rate: of Adam, the optimizer these values were chosen for.
        max_grad_norm: L2 bound on the gradient of one article.
        rank: inner width of the LoRA matrices.
        feature_norm: L2 norm of the pooled vector that enters the linear head.
    """

    expected_batch_size: int = 64
    steps: int = 80
    learning_rate: float = 1e-2
    max_grad_norm: float = 1.0
    rank: int = 4
    feature_norm: float = 4.0


def accuracy(model: nn.Module, hidden: Tensor, mask: Tensor, labels: Tensor) -> float:
    """Measure the share of rows whose largest logit is at the label.

    Args:
        model: a `TopicClassifier`, wrapped by Opacus or not; its mode is restored.
        hidden: float32 (n, tokens, 384).
        mask: bool (n, tokens).
        labels: int64 (n,), indices into `TOPICS`.

    Returns:
        A share in [0, 1]; NaN without rows.
    """
    training = model.training
    model.eval()
    right = 0
    try:
        with torch.no_grad():
            for start in range(0, len(labels), _ROWS):
                rows = slice(start, start + _ROWS)
                guesses = model(hidden[rows], mask[rows]).argmax(-1)
                right += int((guesses == labels[rows]).sum())
    finally:
        model.train(training)
    return right / len(labels) if len(labels) else float("nan")


class Lora(nn.Module):
    """Map (..., 384) to (..., 384) through a thin inner layer; zero at the start."""

    def __init__(self, rank: int, generator: torch.Generator) -> None:
        """Draw the first matrix from `generator`; set the second to zero."""
        super().__init__()
        self.down = nn.Linear(WIDTH, rank, bias=False)
        self.up = nn.Linear(rank, WIDTH, bias=False)
        nn.init.normal_(self.down.weight, std=WIDTH**-0.5, generator=generator)
        nn.init.zeros_(self.up.weight)

    def forward(self, states: Tensor) -> Tensor:
        """Return what to add to the output of the frozen layer."""
        added: Tensor = self.up(self.down(states))
        return added


class Block(nn.Module):
    """Run a frozen BERT block with LoRA on query and value, without dropout.

    Every reshape names its sizes, so that a batch may have 0 rows.
    """

    def __init__(self, rank: int, generator: torch.Generator) -> None:
        """Load MiniLM's last block and freeze it; `rank` is that of the LoRA pairs."""
        super().__init__()
        self.query = nn.Linear(WIDTH, WIDTH)
        self.key = nn.Linear(WIDTH, WIDTH)
        self.value = nn.Linear(WIDTH, WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.mix_norm = nn.LayerNorm(WIDTH, eps=_LAYER_NORM_EPSILON)
        self.inner = nn.Linear(WIDTH, 4 * WIDTH)
        self.outer = nn.Linear(4 * WIDTH, WIDTH)
        self.outer_norm = nn.LayerNorm(WIDTH, eps=_LAYER_NORM_EPSILON)
        weights = last_block()
        self.load_state_dict(
            {
                f"{name}.{kind}": weights[f"{part}.{kind}"]
                for name, part in _PARTS.items()
                for kind in ("weight", "bias")
            }
        )
        self.requires_grad_(False)
        self.query_lora = Lora(rank, generator)
        self.value_lora = Lora(rank, generator)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Map hidden states (n, tokens, 384) under a bool mask (n, tokens)."""
        rows, tokens, _ = hidden.shape
        query, key, value = (
            states.view(rows, tokens, _HEADS, WIDTH // _HEADS).transpose(1, 2)
            for states in (
                self.query(hidden) + self.query_lora(hidden),
                self.key(hidden),
                self.value(hidden) + self.value_lora(hidden),
            )
        )
        attended = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask[:, None, None, :]
        )
        mixed = self.mix(attended.transpose(1, 2).reshape(rows, tokens, WIDTH))
        states = self.mix_norm(mixed + hidden)
        out: Tensor = self.outer_norm(self.outer(functional.gelu(self.inner(states))) + states)
        return out


class TopicClassifier(nn.Module):
    """Classify encoded articles: block, mean over tokens, fixed norm, linear head.

    Only the LoRA matrices and the head are trainable. The head starts at zero, so the
    first answers are uniform over the topics.
    """

    def __init__(self, hyper: HyperParameters | None = None, *, seed: int = 0) -> None:
        """Load the frozen weights and draw the first LoRA matrices.

        Args:
            hyper: rank and feature norm are read; the defaults if None.
            seed: of the initial weights alone; torch's own generator, from which
                Opacus draws noise, is not seeded.
        """
        super().__init__()
        hyper = hyper or HyperParameters()
        self.feature_norm = hyper.feature_norm
        self.block = Block(hyper.rank, torch.Generator().manual_seed(seed))
        self.head = nn.Linear(WIDTH, len(TOPICS))
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Map hidden states (n, tokens, 384) and a bool mask to logits (n, 5)."""
        pooled = mean_pool(self.block(hidden, mask), mask)
        features = functional.normalize(pooled, dim=-1) * self.feature_norm
        logits: Tensor = self.head(features)
        return logits
