"""Hugging Face's causal language models, for answers in words.

::

    model = CausalLM(AutoModelForCausalLM.from_pretrained(...), AutoTokenizer.from_pretrained(...))
    guard.generate(query, model, prompt, threshold=0.3, most=32, tokens=20, sampler=Sampler(...))

Each prompt is a batch of its own with a cache of its own, since rows of one batch change each
other's last bits. ``model.generate`` is never called: no part of a generation config or logits
processor takes part, and one that would cut or reshape the distribution is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dp import validate
from retrieval.adapters import needs
from retrieval.ensembles import Continuation
from retrieval.errors import InvalidQuery

with needs("transformers"):
    import torch
    from transformers import GenerationConfig

_WITHOUT_EFFECT: dict[str, object] = {
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "sequence_bias": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "guidance_scale": 1.0,
    "watermarking_config": None,
    "penalty_alpha": None,
    "dola_layers": None,
}
"""Settings of a generation config that change which tokens are drawn, and the value that does not.

Applied after a private draw's softmax, to logits that are private, they void its guarantee.
"""


class CausalLM:
    """A causal language model as :meth:`RetrievalGuard.generate` continues prompts with.

    It is put into evaluation mode, so that dropout is off. Logits are those of the whole
    vocabulary, in float32.

    Of a prompt only the last ``prompt_tokens`` tokens are read, whoever's it is: put the question
    after the document. A chat template is for the caller to apply.

    Args:
        model: Of ``AutoModelForCausalLM``, with its weights; not trained on the corpus.
        tokenizer: Its tokenizer.
        prompt_tokens: Most tokens of a prompt. What is left of the model's context is for the text.

    Raises:
        InvalidQuery: If the model is no causal one, its context is shorter, or its generation
            config would cut or reshape the distribution that tokens are drawn from.
    """

    def __init__(self, model: Any, tokenizer: Any, *, prompt_tokens: int = 512) -> None:
        config = model.config.get_text_config()
        if getattr(config, "is_encoder_decoder", False):
            raise InvalidQuery(f"{type(model).__name__} is not a causal language model")
        _check_generation_config(getattr(model, "generation_config", None))
        self._context = getattr(config, "max_position_embeddings", None)
        self._most = validate.count(prompt_tokens=prompt_tokens)
        if self._context is not None and self._most >= self._context:
            raise InvalidQuery(
                f"prompts of {prompt_tokens} tokens leave no room for text in a context of"
                f" {self._context}; give a smaller prompt_tokens"
            )
        self._model, self._tokenizer, self._tokens = model, tokenizer, len(tokenizer)

    @property
    def end(self) -> int | None:
        """The token that ends a text, if there is one."""
        end: int | None = self._tokenizer.eos_token_id
        return end

    def begin(self, prompt: str) -> Continuation:
        """Return what continues this prompt: a function with a cache of its own.

        Raises:
            InvalidQuery: If the prompt has no tokens; from the function, if there are fewer logits
                than tokens, or the text has outgrown the model's context.
        """
        tokens = self._tokenizer(prompt, verbose=False)["input_ids"][-self._most :]
        if not tokens:
            raise InvalidQuery("the prompt has no tokens")
        self._model.eval()
        read, kept = 0, dict[str, Any]()

        def following(before: int | None) -> NDArray[np.float32]:
            nonlocal read, kept
            new = tokens if before is None else [before]
            read += len(new)
            if self._context is not None and read > self._context:
                raise InvalidQuery(f"the text has outgrown the model's {self._context} tokens")
            logits, kept = self._step(new, kept)
            return logits

        return following

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, without special ones."""
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text

    def _step(
        self, new: Sequence[int], kept: dict[str, Any]
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        with torch.inference_mode():
            output = self._model(
                input_ids=torch.tensor([new], device=self._model.device),
                use_cache=True,
                logits_to_keep=1,
                **kept,
            )
            logits = output.logits[0, -1].float().cpu().numpy()
        if len(logits) < self._tokens:
            raise InvalidQuery(
                f"the model gives {len(logits)} logits for {self._tokens} tokens: a draw needs one"
                " of each"
            )
        # Releases of transformers differ in what they call it.
        cache = "cache" if "cache" in output else "past_key_values"
        return logits[: self._tokens], {cache: output[cache]}


def _check_generation_config(config: Any) -> None:
    usual = GenerationConfig()
    for name, without_effect in _WITHOUT_EFFECT.items():
        value = getattr(config, name, None)
        if value not in (None, without_effect, getattr(usual, name, None)):
            raise InvalidQuery(
                f"model.generation_config has {name}={value!r}, which would cut or reshape the"
                " distribution after the private draw's softmax; set it to None: only Sampler's"
                " temperature and top_k, of public logits, decide what is drawn"
            )
