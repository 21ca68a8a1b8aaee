"""A guarded retriever for LlamaIndex.

Callbacks and instrumentation record the query and the one node that comes back, or the message of
a refusal; span handlers are also handed the retriever itself, as an object. The handlers are
global, and see every call of a LlamaIndex model: one that ``ask`` calls about single units would
be recorded with its prompts. Call another one there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from functools import partial

from retrieval.adapters import needs
from retrieval.documents import Ask, Embed, documents
from retrieval.guard import RetrievalGuard

with needs("llamaindex"):
    from llama_index.core.base.base_retriever import BaseRetriever
    from llama_index.core.callbacks import CallbackManager
    from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode


class GuardedRetriever(BaseRetriever):
    """Returns one node that states what the guard released, or raises its refusal.

    The node has no score. The guarantee is the guard's; it is in the node's metadata, which is
    kept out of prompts and embeddings. ``aretrieve`` asks from a thread.

    Args:
        guard: Answers, or refuses.
        embed: Returns the vector of a query.
        ask: Asks the guard about it.
        passages: Public texts by label or item, which follow the answer; see
            :func:`retrieval.documents.documents`.
        callback_manager: As for any retriever.
    """

    def __init__(
        self,
        guard: RetrievalGuard,
        *,
        embed: Embed,
        ask: Ask,
        passages: Mapping[str, str] | None = None,
        callback_manager: CallbackManager | None = None,
    ) -> None:
        super().__init__(callback_manager)
        self._documents = partial(documents, guard, embed=embed, ask=ask, passages=passages)

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return [
            NodeWithScore(
                node=TextNode(
                    text=text,
                    metadata=metadata,
                    excluded_llm_metadata_keys=list(metadata),
                    excluded_embed_metadata_keys=list(metadata),
                )
            )
            for text, metadata in self._documents(query_bundle.query_str)
        ]

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return await asyncio.to_thread(self._retrieve, query_bundle)
