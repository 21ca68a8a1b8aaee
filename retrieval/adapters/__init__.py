"""Retrievers for LangChain, LlamaIndex and Haystack, each with a guard inside; and models for text.

A retriever returns ONE document: the released answer in words, with the guarantee in its metadata.
There is one module per framework, with one class of the same name::

    from functools import partial

    from retrieval import RetrievalGuard
    from retrieval.adapters.langchain import GuardedRetriever

    GuardedRetriever(
        guard=guard,
        embed=embedder.embed_query,
        ask=partial(RetrievalGuard.vote, threshold=0.3, noise_multiplier=10.0),
    )

Callbacks and traces of a framework see what goes into a retriever, which is the query as it was
typed, and what comes out, which is released. The query is not protected. Whatever ``ask`` does
with single units (``answer_vote`` and ``generate`` call a model about each) must not be traced:
where a framework's own models would be, the module says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Name the extra that installs what cannot be imported.

    >>> with needs("langchain"):
    ...     import no_such_framework
    Traceback (most recent call last):
    ImportError: no_such_framework is missing; install it with: pip install 'epsledger[langchain]'
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{error.name} is missing; install it with: pip install 'epsledger[{extra}]'"
        ) from error
