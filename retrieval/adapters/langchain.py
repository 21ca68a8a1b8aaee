"""A guarded retriever for LangChain.

Handlers, LangSmith and other tracers record the query and the one document that comes back, or
the message of a refusal. Within ``ask``, in its own thread, those of the chain around it and
LangSmith's are off, so that a model which is asked about single units is not recorded. What stays
on: a model's own ``callbacks``, ``set_debug(True)``, and handlers that other packages register
with ``register_configure_hook`` for the environment to turn on. Leave them out.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import Context

from pydantic import Field

from retrieval.adapters import needs
from retrieval.documents import Ask, Embed, documents
from retrieval.guard import RetrievalGuard

with needs("langchain"):
    from langchain_core.callbacks import CallbackManagerForRetrieverRun
    from langchain_core.documents import Document
    from langchain_core.retrievers import BaseRetriever
    from langsmith import tracing_context


class GuardedRetriever(BaseRetriever):
    """Returns one document that states what the guard released, or raises its refusal.

    The guarantee is the guard's; it is in the document's metadata. ``ainvoke`` and ``abatch`` ask
    from a thread.

    Attributes:
        guard: Answers, or refuses.
        embed: Returns the vector of a query, for instance ``OpenAIEmbeddings().embed_query``.
        ask: Asks the guard about it.
        passages: Public texts by label or item, which follow the answer; see
            :func:`retrieval.documents.documents`.
    """

    guard: RetrievalGuard = Field(exclude=True, repr=False)
    embed: Embed = Field(exclude=True, repr=False)
    ask: Ask = Field(exclude=True, repr=False)
    passages: Mapping[str, str] | None = Field(default=None, exclude=True, repr=False)

    def _get_relevant_documents(
        self,
        query: str,
        *,
        run_manager: CallbackManagerForRetrieverRun,  # noqa: ARG002 - not for what is private
    ) -> list[Document]:
        return Context().run(self._answered, query)

    def _answered(self, query: str) -> list[Document]:
        with tracing_context(enabled=False):
            found = documents(
                self.guard, query, embed=self.embed, ask=self.ask, passages=self.passages
            )
        return [Document(page_content=text, metadata=metadata) for text, metadata in found]
