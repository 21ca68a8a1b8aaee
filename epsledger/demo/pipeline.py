"""The demo's pipeline, in the process that gets killed: budget, fine-tune, votes, refusal.

Every number below was fixed before the private split was first used: noise and threshold by an
earlier study of this public corpus, the learning rate by runs on held-out articles.
"""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from accountant import Accountant, BudgetExceeded
from dp import adaptive
from epsledger.demo.corpus import TOPICS, Article, load_articles, one_per_unit, split
from epsledger.demo.encoder import encode
from epsledger.demo.model import HyperParameters, TopicClassifier, accuracy
from finetune import TrainingPlan, training_run
from retrieval import PrivateIndex, RetrievalGuard
from retrieval.grid import on_grid

BUDGET, UNIT = "bbc-news", "article"
EPSILON, DELTA = 6.0, 1e-5
PRIVATE_UNITS, HELD_OUT = 1300, 400
TRAINING_NOISE = 1.0
VOTE_THRESHOLD, VOTE_NOISE = 0.2, 10.0
HYPER = HyperParameters()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the pipeline reports before it is killed; all accuracies are on held-out articles.

    The non-private figures were computed for comparison. They are not covered by the guarantee.
    """

    records: int
    majority: float
    private_accuracy: float
    plain_accuracy: float
    private_vote: float
    plain_vote: float
    answered: int
    refusal: str
    seq: int
    share_after_training: float
    seconds: dict[str, float]


def work(ledger: Path) -> Outcome:
    """Spend the whole budget on a fine-tune and on votes; return when the budget refuses."""
    torch.set_num_threads(1)
    seconds: dict[str, float] = {}
    with Progress(
        TextColumn("{task.description:<30}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        transient=False,
    ) as progress:
        start = perf_counter()
        private, held_out = split(load_articles(), PRIVATE_UNITS)
        held_out = held_out[:HELD_OUT]
        training = one_per_unit(private)
        encoding = progress.add_task("encode articles", total=len(private) + 2 * len(held_out))

        def done(texts: int) -> None:
            progress.advance(encoding, texts)

        bodies = encode([article.body for article in private], done)
        tests = encode([article.body for article in held_out], done)
        queries = encode([article.headline for article in held_out], done, 32).embeddings
        first = {article.unit: row for row, article in reversed(list(enumerate(private)))}
        rows = [first[article.unit] for article in training]
        train_data = TensorDataset(bodies.hidden[rows], bodies.mask[rows], _labels(training))
        test_data = (tests.hidden, tests.mask, _labels(held_out))
        seconds["encode"] = perf_counter() - start

        accountant = Accountant.open(ledger)
        accountant.create_budget(BUDGET, adaptive(EPSILON, DELTA), unit=UNIT, units=PRIVATE_UNITS)
        start = perf_counter()
        model = _train_private(accountant, train_data, progress)
        seconds["train"] = perf_counter() - start
        share = accountant.statement(BUDGET).share
        private_accuracy = accuracy(model, *test_data)
        plain_accuracy = accuracy(_train_plain(train_data, progress), *test_data)

        start = perf_counter()
        index = PrivateIndex(
            bodies.embeddings,
            units=[article.unit for article in private],
            labels=[article.topic for article in private],
            public_labels=TOPICS,
        )
        guard = RetrievalGuard(accountant, BUDGET, index, unit=UNIT)
        winners, refusal, seq = _ask(guard, queries, progress)
        seconds["votes"] = perf_counter() - start
    truth = [article.topic for article in held_out]
    plain = [
        TOPICS[int(index.histogram(query, VOTE_THRESHOLD).argmax())] for query in on_grid(queries)
    ]
    return Outcome(
        records=len(private),
        majority=max(Counter(truth).values()) / len(truth),
        private_accuracy=private_accuracy,
        plain_accuracy=plain_accuracy,
        private_vote=_agreement(winners, truth),
        plain_vote=_agreement(plain[: len(winners)], truth),
        answered=len(winners),
        refusal=refusal,
        seq=seq,
        share_after_training=share,
        seconds=seconds,
    )


def _train_private(
    accountant: Accountant, data: TensorDataset, progress: Progress
) -> torch.nn.Module:
    plan = TrainingPlan.for_units(
        PRIVATE_UNITS,
        expected_batch_size=HYPER.expected_batch_size,
        noise_multiplier=TRAINING_NOISE,
        steps=HYPER.steps,
        max_grad_norm=HYPER.max_grad_norm,
    )
    model: torch.nn.Module = TopicClassifier(HYPER)
    optimizer: torch.optim.Optimizer = torch.optim.Adam(_trainable(model), lr=HYPER.learning_rate)
    task = progress.add_task("DP-SGD (LoRA + head)", total=plan.steps)
    with training_run(accountant, BUDGET, plan, unit=UNIT) as run, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        private_model, optimizer, loader = run.make_private(model, optimizer, DataLoader(data))
        for hidden, mask, labels in run.batches(loader):
            loss = torch.nn.functional.cross_entropy(private_model(hidden, mask), labels)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            progress.advance(task)
    return model


def _train_plain(data: TensorDataset, progress: Progress) -> torch.nn.Module:
    """Train the same model without clipping or noise, for comparison only."""
    model = TopicClassifier(HYPER)
    optimizer = torch.optim.Adam(_trainable(model), lr=HYPER.learning_rate)
    task = progress.add_task("the same, not private", total=HYPER.steps)
    loader = DataLoader(data, batch_size=HYPER.expected_batch_size, shuffle=True)
    while not progress.tasks[task].finished:
        for hidden, mask, labels in loader:
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(hidden, mask), labels)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            progress.advance(task)
            if progress.tasks[task].finished:
                break
    return model


def _ask(
    guard: RetrievalGuard, queries: NDArray[np.float32], progress: Progress
) -> tuple[list[str], str, int]:
    """Ask headline after headline until the budget refuses."""
    winners: list[str] = []
    seq = 0
    task = progress.add_task("headline queries", total=len(queries))
    for query in queries:
        try:
            vote = guard.vote(query, threshold=VOTE_THRESHOLD, noise_multiplier=VOTE_NOISE)
        except BudgetExceeded as refusal:
            return winners, str(refusal), seq
        winners.append(vote.winner)
        seq = vote.seq
        progress.advance(task)
    raise RuntimeError(f"the budget outlasted all {len(queries)} queries; the demo expects less")


def _labels(articles: list[Article]) -> Tensor:
    return torch.tensor([TOPICS.index(article.topic) for article in articles])


def _trainable(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _agreement(winners: list[str], truth: list[str]) -> float:
    right = sum(winner == topic for winner, topic in zip(winners, truth, strict=False))
    return right / len(winners)
