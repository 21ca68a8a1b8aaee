"""A guarded retriever for Haystack.

Tracing with content records the query and the one document that comes back. A refusal arrives as
the cause of Haystack's ``PipelineRuntimeError``, with a snapshot that holds the query and may be
saved to a file. Tracers are global: a pipeline or agent that ``ask`` runs about single units would
be recorded with its prompts. Telemetry sends the names of a pipeline's components, and is off with
``HAYSTACK_TELEMETRY_ENABLED=False`` set before the import.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NoReturn

from retrieval.adapters import needs
from retrieval.documents import Ask, Embed, documents
from retrieval.errors import RetrievalError
from retrieval.guard import RetrievalGuard

with needs("haystack"):
    from haystack import Document, component


@component
class GuardedRetriever:
    """Returns one document that states what the guard released, or raises its refusal.

    The guarantee is the guard's; it is in the document's metadata.

    Args:
        guard: Answers, or refuses.
        embed: Returns the vector of a query.
        ask: Asks the guard about it.
        passages: Public texts by label or item, which follow the answer; see
            :func:`retrieval.documents.documents`.
    """

    def __init__(
        self,
        guard: RetrievalGuard,
        *,
        embed: Embed,
        ask: Ask,
        passages: Mapping[str, str] | None = None,
    ) -> None:
        self._documents = partial(documents, guard, embed=embed, ask=ask, passages=passages)

    @component.output_types(documents=list[Document])
    def run(self, query: str) -> dict[str, Any]:
        """Ask the guard.

        Args:
            query: Its text; not protected.
        """
        found = self._documents(query)
        return {"documents": [Document(content=text, meta=metadata) for text, metadata in found]}

    def to_dict(self) -> NoReturn:
        """Refuse: a live guard cannot be written to a file.

        Raises:
            RetrievalError: Always.
        """
        raise RetrievalError(
            "a GuardedRetriever holds an open ledger and a private index and cannot be saved with"
            " its pipeline: save the pipeline without it, and add it after loading"
        )
