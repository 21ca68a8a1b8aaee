"""The guard of a query path: charge, then score, then noise, then release.

What it never returns: texts, identifiers, scores or ranks of private rows. Noise on the query,
or on scores, followed by raw results has no corpus privacy at any noise level: whatever comes
out verbatim was in the corpus.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dp import Gaussian, Repeated, SparseVector, sampling, validate
from retrieval.answers import Centroid, Count, Generation, Presence, Selection, Vote
from retrieval.ensembles import LanguageModel, Sampler, ballots, begun, generated, or_none
from retrieval.errors import InvalidQuery, NoCorpusGuarantee
from retrieval.grid import STEPS, checked_query, checked_threshold
from retrieval.index import PrivateIndex
from retrieval.payments import Question
from retrieval.questions import PaidQuestions
from retrieval.releases import (
    additive,
    bar_of,
    check_callable,
    noisy,
    public_list,
    public_prompt,
    selected,
    selection,
)
from retrieval.sessions import AboveThreshold


class RetrievalGuard(PaidQuestions):
    """Answers queries about a private corpus, each paid for before the corpus is read.

    Guarantee: everything it ever returns, together with whatever else is charged to the same
    budget, is (epsilon, delta)-DP under adding or removing one unit of the index. The queries,
    the embedding model, the threshold and all lists called public are taken as public. It does not
    protect the query, nor anything from whoever runs the index.

    A question that is equal to one of the last 1,024 gets the same answer, free of charge.

    Args:
        accountant: Of the ledger.
        budget: Name of the budget, or of the budget and quotas that are charged together.
        index: The private corpus.
        unit: The privacy unit that the index is grouped by; it must be the budget's.
    """

    # --- counts -----------------------------------------------------------------------------------

    def vote(
        self,
        query: ArrayLike,
        *,
        threshold: float,
        noise_multiplier: float,
        key: str | None = None,
    ) -> Vote:
        """Let every unit that scores at least ``threshold`` vote for its label; add noise.

        Each unit votes at most once, so the histogram has L2 sensitivity 1 under add/remove, and
        one Gaussian release pays for all of it. The noisy counts are rounded to integers, which
        is post-processing.

        Args:
            query: Vector of shape (dimensions,) and L2 norm 1.
            threshold: Cosine similarity in [-1, 1]; fixed without looking at the corpus.
            noise_multiplier: Standard deviation of the noise, in votes.
            key: Idempotency key: the same key and query return the same answer, uncharged.

        Raises:
            InvalidQuery: If the query is malformed; nothing was charged.
            BudgetExceeded: If it does not fit; the corpus was not read.
            AccountantError: As for ``Accountant.charge``.
        """
        vector, threshold = self._checked(query, threshold)
        if not self._index.public_labels:
            raise InvalidQuery("this index has no labels; build it with labels and public_labels")
        event = additive(noise_multiplier)
        question = self._question(event, "vote", vector, key, threshold=threshold)

        def draw(seq: int) -> Vote:
            if isinstance(self._index, PrivateIndex):
                votes = self._index.labels_of(self._retrieved(vector, threshold, question))
            else:
                votes = self._index.histogram(vector, threshold)
            counts = noisy(votes, event.noise_multiplier)
            named = dict(zip(self._index.public_labels, counts, strict=True))
            return Vote(seq=seq, counts=named, noise=event.noise_multiplier)

        return self._answer(question, Vote, draw)

    def count(
        self,
        query: ArrayLike,
        *,
        threshold: float,
        noise_multiplier: float,
        key: str | None = None,
    ) -> Count:
        """Count the units that score at least ``threshold``; add Gaussian noise, and round.

        Args and errors as for :meth:`vote`.
        """
        vector, threshold = self._checked(query, threshold)
        event = additive(noise_multiplier)
        question = self._question(event, "count", vector, key, threshold=threshold)

        def draw(seq: int) -> Count:
            value = self._noisy_count(vector, threshold, question, event)
            return Count(seq=seq, value=value, noise=event.noise_multiplier)

        return self._answer(question, Count, draw)

    def anything(
        self,
        query: ArrayLike,
        *,
        threshold: float,
        bar: int,
        noise_multiplier: float,
        key: str | None = None,
    ) -> Presence:
        """Say whether at least about ``bar`` units score ``threshold`` or more, by a noisy count.

        A bar of three times the noise is passed by nothing with probability 0.1 %. Where nearly all
        answers are no, :meth:`above_threshold` answers more of them.

        Args:
            query: Vector of shape (dimensions,) and L2 norm 1.
            threshold: Cosine similarity in [-1, 1]; fixed without looking at the corpus.
            bar: Public, likewise.
            noise_multiplier: Standard deviation of the noise, in units.
            key: As for :meth:`vote`.

        Raises:
            InvalidQuery: If the query is malformed; nothing was charged.
            AccountantError: As for ``Accountant.charge``.
        """
        vector, threshold = self._checked(query, threshold)
        event, bar = additive(noise_multiplier), bar_of(bar)
        question = self._question(event, "anything", vector, key, threshold=threshold, bar=bar)

        def draw(seq: int) -> Presence:
            value = self._noisy_count(vector, threshold, question, event)
            return Presence(seq=seq, value=value, bar=bar, noise=event.noise_multiplier)

        return self._answer(question, Presence, draw)

    def above_threshold(
        self,
        *,
        threshold: float,
        bar: int,
        positives: int,
        threshold_noise: float,
        query_noise: float,
    ) -> AboveThreshold:
        """Pay for a session that says which queries find about ``bar`` units or more.

        Answers of no cost nothing; the session ends after so many of yes. Best where more than nine
        of ten answers are no. See :class:`AboveThreshold`.

        Args:
            threshold: Cosine similarity in [-1, 1]; fixed without looking at the corpus.
            bar: From how many units the answer is yes; public.
            positives: After so many answers of yes the session ends.
            threshold_noise: Scale of the Laplace noise on the bar, in units.
            query_noise: Scale of the Laplace noise on each count, in units.

        Raises:
            InvalidQuery: If something is malformed; nothing was charged.
            AccountantError: As for ``Accountant.charge``.
        """
        threshold, bar = checked_threshold(threshold), bar_of(bar)
        event = SparseVector(threshold_noise, query_noise, positives, monotone=True)
        for noise in (event.threshold_noise, event.query_noise):
            if not sampling.SMALLEST <= noise <= sampling.LARGEST:
                raise InvalidQuery(
                    f"noise must be from {sampling.SMALLEST:g} to {sampling.LARGEST:g} units"
                )
        question = Question(event, "retrieval/above_threshold", f"{threshold=:g}, {bar=}", b"")

        def count(query: ArrayLike) -> int:
            vector = checked_query(query, self._index.dimensions)
            return self._looked(question, lambda: self._index.count(vector, threshold))

        return AboveThreshold(self._charges.pay(question).seq, event, bar, count)

    # --- selections -------------------------------------------------------------------------------

    def select(
        self,
        query: ArrayLike,
        candidates: Mapping[str, ArrayLike],
        *,
        threshold: float,
        k: int,
        epsilon: float,
        key: str | None = None,
    ) -> Selection:
        """Select ``k`` of the PUBLIC candidates that most units are nearest to.

        Every unit that scores at least ``threshold`` counts for the candidate that is nearest to
        its best row; Gumbel noise of scale 1/epsilon decides (the exponential mechanism, k times).

        Args:
            query: Vector of shape (dimensions,) and L2 norm 1.
            candidates: Vectors like the query's, by name, fixed without looking at the corpus.
            threshold: Cosine similarity in [-1, 1]; likewise.
            k: How many are released, best first.
            epsilon: Of each selection, in nats: counts that differ by much more than 1/epsilon
                are told apart.
            key: As for :meth:`vote`.

        Raises:
            InvalidQuery: If something is malformed; nothing was charged.
            AccountantError: As for ``Accountant.charge``.
        """
        vector, threshold = self._checked(query, threshold)
        index = self._own_index("select")
        if not isinstance(candidates, Mapping):
            raise InvalidQuery("candidates must be a mapping of names to vectors")
        names = public_list("the names of candidates", tuple(candidates))
        event = selection(epsilon, k, len(names))
        rows = np.stack(
            [
                checked_query(candidates[name], index.dimensions, name=f"candidate {name!r}")
                for name in names
            ]
        )
        public = hashlib.sha256(json.dumps(names).encode() + rows.tobytes()).hexdigest()
        question = self._question(
            event, "select", vector, key, threshold=threshold, candidates=public
        )

        def draw(seq: int) -> Selection:
            counts = index.nearest(self._retrieved(vector, threshold, question), rows)
            return Selection(seq=seq, items=selected(counts, names, event))

        return self._answer(question, Selection, draw)

    def keywords(
        self,
        query: ArrayLike,
        *,
        threshold: float,
        k: int,
        epsilon: float,
        key: str | None = None,
    ) -> Selection:
        """Select ``k`` of the index's public terms that most units have.

        Every unit that scores at least ``threshold`` counts once for each of its terms. Otherwise
        as :meth:`select`.
        """
        vector, threshold = self._checked(query, threshold)
        index = self._own_index("keywords")
        if not index.public_terms:
            raise InvalidQuery("this index has no terms; build it with terms and public_terms")
        event = selection(epsilon, k, len(index.public_terms))
        question = self._question(event, "keywords", vector, key, threshold=threshold)

        def draw(seq: int) -> Selection:
            counts = index.terms_of(self._retrieved(vector, threshold, question))
            return Selection(seq=seq, items=selected(counts, index.public_terms, event))

        return self._answer(question, Selection, draw)

    # --- vectors ----------------------------------------------------------------------------------

    def centroid(
        self,
        query: ArrayLike,
        *,
        threshold: float,
        noise_multiplier: float,
        key: str | None = None,
    ) -> Centroid:
        """Add up the best rows of the units that score at least ``threshold``; add noise.

        Rows have norm at most 1, which is the L2 sensitivity. Useful only where the sum is much
        longer than noise_multiplier * sqrt(dimensions). Args and errors as for :meth:`vote`;
        the noise's standard deviation is per coordinate.
        """
        vector, threshold = self._checked(query, threshold)
        index, event = self._own_index("centroid"), additive(noise_multiplier)
        question = self._question(event, "centroid", vector, key, threshold=threshold)

        def draw(seq: int) -> Centroid:
            total = index.total(self._retrieved(vector, threshold, question))
            noise = sampling.gaussian(len(total), event.noise_multiplier * STEPS)
            return Centroid(seq=seq, vector=tuple((np.rint(total + noise) / STEPS).tolist()))

        return self._answer(question, Centroid, draw)

    # --- words ------------------------------------------------------------------------------------

    def answer_vote(
        self,
        query: ArrayLike,
        answer: Callable[[str], str | None],
        answers: Sequence[str],
        *,
        threshold: float,
        noise_multiplier: float,
        most: int,
    ) -> Vote:
        """Let a function answer from each of at most ``most`` units; release a noisy vote.

        A unit that leaves the best ones makes room for another, so that two votes may change: the
        noise's standard deviation is sqrt(2) * noise_multiplier votes.

        Args:
            query: Vector of shape (dimensions,) and L2 norm 1.
            answer: Takes the name of a unit; returns one of the answers, from this unit alone, for
                instance by a language model. Anything else, or an error, is no vote.
            answers: All that count, fixed without looking at the corpus.
            threshold: Cosine similarity in [-1, 1]; likewise.
            noise_multiplier: Standard deviation of the noise over the sensitivity.
            most: Of units that are asked, the best ones.

        Raises:
            InvalidQuery: If something is malformed; nothing was charged.
            AccountantError: As for ``Accountant.charge``.
        """
        vector, threshold = self._checked(query, threshold)
        index, event = self._own_index("answer_vote"), additive(noise_multiplier)
        listed, most = public_list("answers", answers), validate.count(most=most)
        check_callable(answer)
        question = self._question(event, "answer_vote", vector, None, threshold=threshold)
        paid = self._payments.pay(question)
        best = self._looked(
            question, lambda: index.top(self._retrieved(vector, threshold, question), most)
        )
        votes = ballots(listed, answer, index.names_of(best))
        noise = event.noise_multiplier * math.sqrt(2) * (1 + 1e-15)
        counts = noisy(votes, noise)
        return Vote(seq=paid.seq, counts=dict(zip(listed, counts, strict=True)), noise=noise)

    def generate(
        self,
        query: ArrayLike,
        model: LanguageModel,
        prompt: Callable[[str | None], str],
        *,
        threshold: float,
        most: int,
        tokens: int,
        sampler: Sampler,
    ) -> Generation:
        """Generate text from at most ``most`` units, token by token, each paid before it is drawn.

        All tokens are reserved; those after the end are returned, and where the public prompt fails
        later than at its first token all are spent. A unit that leaves the best ones makes room for
        another, which is priced.

        Args:
            query: Vector of shape (dimensions,) and L2 norm 1.
            model: The same for all prompts, and not trained on the corpus.
            prompt: Takes the name of a unit and returns its prompt, made from this unit alone; for
                None a prompt without private data.
            threshold: Cosine similarity in [-1, 1]; fixed without looking at the corpus.
            most: Of units that are read, the best ones.
            tokens: At most so many are generated.
            sampler: How each token is drawn, and with that what it costs.

        Raises:
            InvalidQuery: If something is malformed, the public prompt's first logits included;
                nothing was charged.
            BudgetExceeded: If not all tokens fit; nothing was read.
            AccountantError: As for ``Accountant.reserve``.
        """
        vector, threshold = self._checked(query, threshold)
        index, event = self._own_index("generate"), sampler.event
        check_callable(model.begin, prompt)
        uses, most = validate.count(tokens=tokens), validate.count(most=most)
        public = begun(model, public_prompt(prompt(None)))
        question = self._question(event, "generate", vector, None, threshold=threshold)
        whole = replace(question, event=Repeated(event, uses))

        def prompts() -> list[str]:
            best = self._looked(
                whole, lambda: index.top(self._retrieved(vector, threshold, whole), most)
            )
            given = map(or_none(prompt), index.names_of(best))
            return [text for text in given if isinstance(text, str) and text]

        with self._payments.many(question, uses) as (seq, mark):
            drawn, ended = generated(model, sampler, public, prompts, mark, uses)
        return Generation(seq=seq, tokens=drawn, text=model.decode(drawn), ended=ended)

    # --- what has no guarantee --------------------------------------------------------------------

    def raw(self, query: ArrayLike, *, k: int, reason: str | None = None) -> list[str]:
        """Return the names of the ``k`` units that score best: NO guarantee for any of them.

        For somebody who may read the documents. The ledger records the read and its reason as
        unprotected, for ever, and the report shows it. Noise on the query would not help:
        a unit that comes out was in the corpus.

        Args:
            query: Vector of shape (dimensions,) and L2 norm 1.
            k: How many.
            reason: Who may see them, and why. Public to whoever reads the ledger.

        Raises:
            NoCorpusGuarantee: If no reason is given; nothing was read.
            InvalidQuery: If the query is malformed; nothing was read.
            AccountantError: If it could not be recorded; nothing was read.
        """
        if not reason or not reason.strip():
            raise NoCorpusGuarantee(
                "units as they are have no guarantee at any noise level: ask for a vote, a count"
                " or a selection, or give a reason, which is recorded as an unprotected read"
            )
        vector = checked_query(query, self._index.dimensions)
        index = self._own_index("raw")
        most = validate.count(k=k)
        charges = self._charges
        charges.accountant.record_unprotected(
            charges.budget, unit=charges.unit, activity="retrieval/raw", note=reason
        )
        return index.names_of(index.top(index.retrieved(vector, -1.0), most))

    def _noisy_count(
        self, vector: NDArray[np.float32], threshold: float, question: Question, event: Gaussian
    ) -> int:
        if isinstance(self._index, PrivateIndex):
            exact = len(self._retrieved(vector, threshold, question).units)
        else:
            exact = self._index.count(vector, threshold)
        return noisy(np.array([exact]), event.noise_multiplier)[0]
