"""A private corpus behind a LangChain retriever: the chain gets what the guard released."""

import tempfile
import zlib
from functools import partial
from pathlib import Path

import numpy as np
from langchain_core.language_models.fake_chat_models import ParrotFakeChatModel
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnablePassthrough

from accountant import Accountant, BudgetExceeded
from dp import adaptive
from retrieval import PrivateIndex, RetrievalGuard
from retrieval.adapters.langchain import GuardedRetriever


def embed(text: str) -> np.ndarray:
    """Stand in for an embedding model: the words of a text, hashed."""
    vector = np.zeros(256)
    for word in text.lower().replace("?", "").split():
        vector[zlib.crc32(word.encode()) % 256] += 1
    return vector / np.linalg.norm(vector)


accountant = Accountant.open(Path(tempfile.mkdtemp()) / "ledger.db")
accountant.create_budget("notes", adaptive(3.0, 1e-6), unit="patient", units=1_500)

notes = {
    f"patient-{n}": ("fever cough tired flu" if n % 3 else "sneezing cough tired cold")
    for n in range(1_500)
}
index = PrivateIndex(
    [embed(note) for note in notes.values()],
    units=list(notes),
    labels=["flu" if "flu" in note else "cold" for note in notes.values()],
    public_labels=["flu", "cold"],
)
retriever = GuardedRetriever(
    guard=RetrievalGuard(accountant, "notes", index, unit="patient"),
    embed=embed,
    ask=partial(RetrievalGuard.vote, threshold=0.3, noise_multiplier=20.0),
)
prompt = ChatPromptTemplate.from_template("{context}\n\nAnswer from this only: {question}")
chain = (
    {
        "context": retriever | (lambda documents: documents[0].page_content),
        "question": RunnablePassthrough(),
    }
    | prompt
    | ParrotFakeChatModel()  # repeats its prompt; put your chat model here
)

print(chain.invoke("which illness has fever and cough?").content)
print(retriever.invoke("which illness has fever and cough?")[0].metadata)  # the same, free
try:
    for n in range(10_000):
        chain.invoke(f"fever in week {n}?")
except BudgetExceeded as refusal:
    print(refusal)
