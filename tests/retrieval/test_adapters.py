"""Retrievers inside the real frameworks: the answer arrives, and no recorder sees the corpus.

Every recorder is also shown a retriever that returns raw documents, which it must catch.
"""

import asyncio
import json
import subprocess
import sys
from collections import defaultdict
from functools import partial

import numpy as np
import pytest

from accountant import Accountant, BudgetExceeded, UnknownBudget
from dp import adaptive
from retrieval import Guarantee, InvalidQuery, PrivateIndex, RetrievalError, RetrievalGuard
from retrieval.answers import Centroid, Count, Generation, Presence, Selection, Vote
from retrieval.documents import documents, released

CANARY = "canary"
UNITS = [f"{CANARY}-{row}" for row in range(300)]
TEXTS = {unit: f"the {CANARY} text of {unit}" for unit in UNITS}
VOTE = partial(RetrievalGuard.vote, threshold=0.3, noise_multiplier=20.0)
QUERY = "who scored in extra time?"


def embed(text):
    """A vector of the text alone, near the corpus."""
    vector = np.random.default_rng(list(text.encode())).normal(size=16) + 2
    return vector / np.linalg.norm(vector)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Haystack makes a folder for snapshots there, though it saves none."""
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture
def accountant(tmp_path):
    with Accountant.open(tmp_path / "ledger.db") as accountant:
        accountant.create_budget("b", adaptive(3.0, 1e-6), unit="article", units=300)
        yield accountant


@pytest.fixture
def index():
    vectors = np.random.default_rng(0).normal(size=(300, 16)) + 1
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return PrivateIndex(
        vectors,
        units=UNITS,
        labels=["sport" if row % 4 else "business" for row in range(300)],
        public_labels=["sport", "business"],
    )


@pytest.fixture
def guard(accountant, index):
    return RetrievalGuard(accountant, "b", index, unit="article")


@pytest.fixture
def raw(index):
    """The texts of the units that score best: what a retriever without a guard returns."""

    def nearest(query):
        found = index.retrieved(np.float32(embed(query)), 0.0)
        return [TEXTS[unit] for unit in index.names_of(index.top(found, 3))]

    return nearest


def uses(accountant):
    return sum(activity.uses for activity in accountant.statement("b").activities)


class Trail(defaultdict):
    """What each recorder was shown, as text."""

    def __init__(self):
        super().__init__(str)

    def saw(self, recorder, *shown):
        self[recorder] += f"{shown!r}\n"

    def seen_by_all(self, text):
        return bool(self) and all(text in shown for shown in self.values())

    def seen(self, text):
        return any(text in shown for shown in self.values())


@pytest.fixture
def trail():
    return Trail()


def checked(trail):
    """Fail if a recorder saw anything of the corpus, or nothing at all."""
    assert trail.seen_by_all(QUERY)
    assert not trail.seen(CANARY)


# --- LangChain ------------------------------------------------------------------------------------


def langchain_retriever(guard, ask=VOTE, **more):
    from retrieval.adapters.langchain import GuardedRetriever

    return GuardedRetriever(guard=guard, embed=embed, ask=ask, **more)


def langchain_raw(raw):
    from langchain_core.documents import Document
    from langchain_core.retrievers import BaseRetriever

    class Naive(BaseRetriever):
        def _get_relevant_documents(self, query, **_):
            return [Document(page_content=text) for text in raw(query)]

    return Naive()


def langchain_recorders(trail):
    """A handler of every event that there is, and a tracer, which keeps whole runs."""
    from langchain_core.callbacks import BaseCallbackHandler
    from langchain_core.tracers.base import BaseTracer

    def record(self, *shown, **more):
        trail.saw("handler", shown, more)

    events = [name for name in dir(BaseCallbackHandler) if name.startswith("on_")]
    handler = type("Handler", (BaseCallbackHandler,), dict.fromkeys(events, record))

    class Tracer(BaseTracer):
        def _persist_run(self, run):
            trail.saw("tracer", run.model_dump())

    return [handler(), Tracer()]


def langchain_chain(retriever):
    from langchain_core.language_models.fake_chat_models import ParrotFakeChatModel
    from langchain_core.prompts import ChatPromptTemplate
    from langchain_core.runnables import RunnablePassthrough

    def joined(found):
        return "\n".join(document.page_content for document in found)

    prompt = ChatPromptTemplate.from_template("{context}\n\n{question}")
    context = {"context": retriever | joined, "question": RunnablePassthrough()}
    return context | prompt | ParrotFakeChatModel()


def run_langchain(retriever, trail):
    chain = langchain_chain(retriever)
    return chain.invoke(QUERY, {"callbacks": langchain_recorders(trail)}).content


def test_langchain_asks_from_a_thread_where_it_is_asynchronous(accountant, guard, trail):
    chain = langchain_chain(langchain_retriever(guard))
    config = {"callbacks": langchain_recorders(trail)}
    answer = asyncio.run(chain.ainvoke(QUERY, config)).content
    assert answer == chain.invoke(QUERY, config).content
    assert uses(accountant) == 1
    checked(trail)


class AsksAboutUnits:
    """A vote in which a LangChain model is shown the text of single units."""

    def __init__(self):
        from langchain_core.language_models.fake_chat_models import FakeListChatModel

        self.model, self.asked = FakeListChatModel(responses=["yes"]), 0

    def answer(self, unit):
        self.asked += 1
        return self.model.invoke(TEXTS[unit]).content

    def __call__(self, guard, vector):
        asked = {"threshold": 0.0, "noise_multiplier": 20.0, "most": 3}
        return guard.answer_vote(vector, self.answer, ["yes", "no"], **asked)


def test_a_langchain_model_that_is_asked_about_units_is_not_recorded(guard, trail):
    ask = AsksAboutUnits()
    assert "for 'yes'" in run_langchain(langchain_retriever(guard, ask), trail)
    assert ask.asked == 3
    checked(trail)


def test_the_control_that_asks_a_model_within_the_chain_is_caught(guard, trail):
    from langchain_core.documents import Document

    ask = AsksAboutUnits()

    class Within(type(langchain_retriever(guard))):
        def _get_relevant_documents(self, query, **_):
            found = documents(self.guard, query, embed=self.embed, ask=self.ask)
            return [Document(page_content=text) for text, _ in found]

    run_langchain(Within(guard=guard, embed=embed, ask=ask), trail)
    assert ask.asked == 3
    with pytest.raises(AssertionError):
        checked(trail)


def test_tracing_that_the_environment_turns_on_is_off_while_the_guard_is_asked(guard, monkeypatch):
    from langsmith import utils

    enabled = []

    def ask(guard, vector):
        enabled.append(utils.tracing_is_enabled())
        return VOTE(guard, vector)

    retriever = langchain_retriever(guard, ask)
    with monkeypatch.context() as patched:
        patched.setenv("LANGSMITH_TRACING", "true")
        utils.get_env_var.cache_clear()
        ask(guard, embed("the control, without a retriever"))
        retriever._answered(QUERY)  # what a run of the whole retriever calls: that one is traced
    utils.get_env_var.cache_clear()
    assert enabled == [True, False]


# --- LlamaIndex -----------------------------------------------------------------------------------


def llamaindex_retriever(guard, ask=VOTE, **more):
    from retrieval.adapters.llamaindex import GuardedRetriever

    return GuardedRetriever(guard, embed=embed, ask=ask, **more)


def llamaindex_raw(raw):
    from llama_index.core.base.base_retriever import BaseRetriever
    from llama_index.core.schema import NodeWithScore, TextNode

    class Naive(BaseRetriever):
        def _retrieve(self, query_bundle):
            return [NodeWithScore(node=TextNode(text=text)) for text in raw(query_bundle.query_str)]

    return Naive()


def run_llamaindex(retriever, trail):
    """Query an engine with callbacks, events and spans recorded."""
    from llama_index.core.callbacks import CallbackManager
    from llama_index.core.callbacks.base_handler import BaseCallbackHandler
    from llama_index.core.instrumentation import get_dispatcher
    from llama_index.core.instrumentation.event_handlers import BaseEventHandler
    from llama_index.core.instrumentation.span_handlers import SimpleSpanHandler
    from llama_index.core.llms import MockLLM
    from llama_index.core.query_engine import RetrieverQueryEngine

    class Callbacks(BaseCallbackHandler):
        def __init__(self):
            super().__init__([], [])

        def on_event_start(self, *shown, **more):
            trail.saw("callbacks", shown, more)
            return ""

        def on_event_end(self, *shown, **more):
            trail.saw("callbacks", shown, more)

        start_trace = end_trace = on_event_end

    class Events(BaseEventHandler):
        def handle(self, event, **more):
            trail.saw("events", event.model_dump(), more)

    class Spans(SimpleSpanHandler):
        def span_enter(self, **more):
            trail.saw("spans", more, vars(more["instance"]))

        span_exit = span_drop = span_enter

    root = get_dispatcher()
    before = root.event_handlers, root.span_handlers
    root.event_handlers, root.span_handlers = [Events()], [Spans()]
    manager = CallbackManager([Callbacks()])
    retriever.callback_manager = manager
    engine = RetrieverQueryEngine.from_args(retriever, llm=MockLLM(), callback_manager=manager)
    try:
        return str(engine.query(QUERY))
    finally:
        root.event_handlers, root.span_handlers = before


def test_llamaindex_keeps_metadata_out_of_prompts_and_asks_from_a_thread(accountant, guard):
    (node,) = asyncio.run(llamaindex_retriever(guard).aretrieve(QUERY))
    from llama_index.core.schema import MetadataMode

    assert node.score is None
    assert node.node.get_content(MetadataMode.LLM) == node.node.text
    assert node.node.metadata["epsilon"] == 3.0
    assert uses(accountant) == 1


# --- Haystack -------------------------------------------------------------------------------------


def haystack_retriever(guard, ask=VOTE, **more):
    from retrieval.adapters.haystack import GuardedRetriever

    return GuardedRetriever(guard, embed=embed, ask=ask, **more)


def haystack_raw(raw):
    from haystack import Document, component

    @component
    class Naive:
        @component.output_types(documents=list[Document])
        def run(self, query: str):
            return {"documents": [Document(content=text) for text in raw(query)]}

    return Naive()


def haystack_pipeline(retriever):
    from haystack import Pipeline
    from haystack.components.builders import PromptBuilder

    template = "{% for d in documents %}{{ d.content }}\n{% endfor %}{{ question }}"
    pipeline = Pipeline()
    pipeline.add_component("retriever", retriever)
    pipeline.add_component("prompt", PromptBuilder(template, required_variables="*"))
    pipeline.connect("retriever.documents", "prompt.documents")
    return pipeline


def run_haystack(retriever, trail):
    """Run a pipeline with its traces recorded, contents too, and the snapshot of a refusal."""
    from contextlib import contextmanager

    from haystack import telemetry, tracing

    assert telemetry._telemetry.telemetry is None

    class Span(tracing.Span):
        def set_tag(self, key, value):
            trail.saw("tracer", key, value)

    class Tracer(tracing.Tracer):
        @contextmanager
        def trace(self, operation_name, tags=None, parent_span=None):
            trail.saw("tracer", operation_name, tags, parent_span)
            yield Span()

        def current_span(self):
            return None

    pipeline = haystack_pipeline(retriever)
    data = {"retriever": {"query": QUERY}, "prompt": {"question": QUERY}}
    tracing.enable_tracing(Tracer())
    tracing.tracer.is_content_tracing_enabled = True
    try:
        return pipeline.run(data, snapshot_callback=partial(trail.saw, "snapshot"))["prompt"][
            "prompt"
        ]
    finally:
        tracing.tracer.is_content_tracing_enabled = False
        tracing.disable_tracing()


def test_haystack_cannot_save_a_guard_with_its_pipeline(guard):
    with pytest.raises(RetrievalError, match="cannot be saved"):
        haystack_pipeline(haystack_retriever(guard)).dumps()


# --- all of them ----------------------------------------------------------------------------------

FRAMEWORKS = {
    "langchain": (langchain_retriever, langchain_raw, run_langchain),
    "llamaindex": (llamaindex_retriever, llamaindex_raw, run_llamaindex),
    "haystack": (haystack_retriever, haystack_raw, run_haystack),
}
frameworks = pytest.mark.parametrize(
    ("retriever", "naive", "run"), FRAMEWORKS.values(), ids=FRAMEWORKS
)


@frameworks
def test_the_answer_arrives_charged_once_and_nothing_else_is_recorded(
    accountant, guard, trail, retriever, naive, run
):
    answer = run(retriever(guard), trail)
    expected = guard.vote(embed(QUERY), threshold=0.3, noise_multiplier=20.0)
    assert expected.replayed
    assert released(expected, guard.guarantee())[0] in answer
    assert run(retriever(guard), trail) == answer
    assert uses(accountant) == 1
    assert trail.seen("add_remove")
    checked(trail)


@frameworks
def test_a_refusal_comes_through_and_tells_recorders_nothing(
    accountant, guard, trail, retriever, naive, run
):
    with pytest.raises(BudgetExceeded):
        for n in range(10**6):
            VOTE(guard, embed(f"{n}"))
    spent = uses(accountant)
    with pytest.raises(Exception, match="refused, 0 would fit") as refusal:
        run(retriever(guard), trail)
    assert BudgetExceeded in {type(refusal.value), type(refusal.value.__cause__)}
    assert uses(accountant) == spent
    checked(trail)


@frameworks
def test_the_control_that_returns_raw_documents_is_caught(raw, trail, retriever, naive, run):
    assert CANARY in run(naive(raw), trail)
    assert trail.seen_by_all(CANARY)
    with pytest.raises(AssertionError):
        checked(trail)


@frameworks
def test_public_passages_follow_the_answer(guard, trail, retriever, naive, run):
    candidates = {name: embed(name) for name in ("goals", "shares", "votes")}
    ask = partial(RetrievalGuard.select, candidates=candidates, threshold=0.3, k=2, epsilon=0.5)
    public = {name: f"All about {name}." for name in ("goals", "shares")}
    answer = run(retriever(guard, ask, passages=public), trail)
    items = ask(guard, embed(QUERY)).items
    assert [name for name in candidates if f"All about {name}." in answer] == [
        name for name in candidates if name in items and name in public
    ]
    checked(trail)


def test_a_missing_framework_names_its_extra():
    code = """
import importlib, sys
for extra, package in [
    ("langchain", "langchain_core"), ("llamaindex", "llama_index"), ("haystack", "haystack")
]:
    sys.modules[package] = None
    try:
        importlib.import_module(f"retrieval.adapters.{extra}")
    except ImportError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for extra, line in zip(FRAMEWORKS, done.stdout.splitlines(), strict=True):
        assert line.endswith(f"pip install 'epsledger[{extra}]'")


# --- the words ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (Vote(seq=1, counts={"x": -3, "y": 4}, noise=10.0), "about 4 for 'y', about 0 for 'x'"),
        (Count(seq=1, value=41, noise=10.0), "has about 41 units"),
        (Presence(seq=1, value=41, bar=30, noise=10.0), "reaches the bar of 30"),
        (Presence(seq=1, value=21, bar=30, noise=10.0), "does not reach the bar of 30"),
        (Selection(seq=1, items=("a", "b")), "'a', 'b'"),
        (Centroid(seq=1, vector=(0.5, 1.5)), "[0.5, 1.5]"),
        (Generation(seq=1, tokens=(1, 2), text="so it is", ended=True), "so it is"),
    ],
)
def test_every_release_has_words_and_metadata_for_json(guard, answer, words):
    text, metadata = released(answer, guard.guarantee())
    assert words in text
    assert json.loads(json.dumps(metadata)) == metadata
    promised = {"epsilon": 3.0, "delta": 1e-6, "unit": "article", "neighboring": "add_remove"}
    assert metadata.items() >= (promised | {"budget": "b", "seq": 1, "replayed": False}).items()


def test_answers_say_the_noise_that_was_drawn(guard):
    vector, asked = embed(QUERY), {"threshold": 0.3, "noise_multiplier": 20.0}
    assert guard.vote(vector, **asked).noise == 20.0
    assert guard.count(vector, **asked).noise == 20.0
    assert guard.anything(vector, bar=60, **asked).noise == 20.0
    voted = guard.answer_vote(vector, lambda _: "yes", ["yes", "no"], most=3, **asked)
    assert voted.noise == pytest.approx(20.0 * 2**0.5)


def test_the_guarantee_is_that_of_the_datasets_budgets_and_not_of_a_quota(accountant, index):
    accountant.create_budget("c", adaptive(5.0, 1e-7), unit="article")
    accountant.create_quota("team", adaptive(1.0, 1e-7), of="b")

    def guarantee(*names):
        return RetrievalGuard(accountant, names, index, unit="article").guarantee()

    same = {"unit": "article", "relation": accountant.budget("b").filter.relation}
    assert guarantee("team", "b") == Guarantee(epsilon=3.0, delta=1e-6, budgets=("b",), **same)
    assert guarantee("b", "c") == Guarantee(epsilon=5.0, delta=1e-6, budgets=("b", "c"), **same)
    with pytest.raises(UnknownBudget):
        guarantee("d")


def test_a_query_that_cannot_be_embedded_charges_nothing(accountant, guard):
    with pytest.raises(InvalidQuery, match="norm 0"):
        documents(guard, QUERY, embed=lambda _: np.zeros(16), ask=VOTE)
    assert uses(accountant) == 0


# --- real text ------------------------------------------------------------------------------------


@pytest.mark.long
def test_headlines_are_answered_in_a_chain_from_real_embeddings(accountant, trail):
    from epsledger.demo.corpus import TOPICS, load_articles, one_per_unit, split
    from epsledger.demo.encoder import encode

    private, public = split(load_articles(), 1300)
    articles = one_per_unit(private)[:600]
    headlines = {article.headline: article.topic for article in public[:12]}
    index = PrivateIndex(
        encode([article.body for article in articles]).embeddings,
        units=[f"{CANARY}-{article.unit}" for article in articles],
        labels=[article.topic for article in articles],
        public_labels=TOPICS,
    )
    guard = RetrievalGuard(accountant, "b", index, unit="article")
    retriever = langchain_retriever(
        guard, partial(RetrievalGuard.vote, threshold=0.2, noise_multiplier=10.0)
    ).model_copy(update={"embed": lambda text: encode([text]).embeddings[0]})
    config = {"callbacks": langchain_recorders(trail)}
    found = [retriever.invoke(headline, config)[0].metadata for headline in headlines]
    right = sum(
        one["winner"] == topic for one, topic in zip(found, headlines.values(), strict=True)
    )
    print(f"\n{right} of {len(found)} headlines right, {accountant.statement('b').seq} entries")
    assert right >= 6  # 1 in 5 is right by chance
    assert not trail.seen(CANARY)
    assert not any(trail.seen(article.body[:80]) for article in articles)
