"""Generation: what a token costs bounds what a unit changes, and each is paid for before it is drawn."""

import math
from collections import OrderedDict
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
from scipy import special, stats

from accountant import Accountant, BudgetExceeded
from dp import InvalidParameter, adaptive
from retrieval import InvalidQuery, PrivateIndex, ReleaseFailed, RetrievalGuard
from retrieval.ensembles import Sampler, begun, generated, or_none
from retrieval.grid import on_grid

TOKENS, REACHED = 8, 100.0
"""A vocabulary; and how far below the largest score a token can still be drawn: Gumbel variates lie
within 94 of each other."""
EXTREME = np.float32([np.inf, -np.inf, np.nan, 1e30, -1e30, 3e38, -3e38, 2**54])


# --- the cost of a token against the exact distributions ------------------------------------------


def loss_range(scores, others):
    """Return the range of the log-ratio of two exact distributions, over what can be drawn."""
    drawn = (scores > scores.max() - REACHED) | (others > others.max() - REACHED)
    with np.errstate(invalid="ignore"):
        loss = (scores - special.logsumexp(scores)) - (others - special.logsumexp(others))
    return np.nan_to_num(np.ptp(loss[drawn]), nan=math.inf)


def logits_of_units(rng, units):
    logits = rng.normal(size=(units, TOKENS)) * 10 ** rng.uniform(-2, 6, (units, 1))
    strange = rng.random(logits.shape) < 0.2 * rng.integers(2)
    return np.where(strange, rng.choice(EXTREME, logits.shape), logits).astype(np.float32)


def public_logits(rng):
    logits = (rng.normal(size=TOKENS) * 10 ** rng.uniform(-2, 2)).astype(np.float32)
    logits[rng.random(TOKENS) < 0.1] = -np.inf
    logits[rng.integers(TOKENS)] = rng.normal() + 2.0**54 * (rng.random() < 0.1)
    return logits


def some_sampler(rng):
    clip, divisor, temperature = 10 ** rng.uniform([-1, 0, -1], [1, 2, 1])
    return Sampler(clip, divisor, temperature, top_k=[None, 1, 3, 20][rng.integers(4)])


def worst_share_of_the_price(scores_of, trials=500):
    """Return the largest loss range over one token's price, when any one unit is taken away."""
    rng, worst = np.random.default_rng(0), 0.0
    for _ in range(trials):
        sampler, public = some_sampler(rng), public_logits(rng)
        private = list(logits_of_units(rng, rng.integers(1, 5)))
        sampler = replace(sampler, divisor=float(len(private)))
        whole = scores_of(sampler, public, private)
        for gone in range(len(private)):
            rest = scores_of(sampler, public, private[:gone] + private[gone + 1 :])
            worst = max(worst, loss_range(whole, rest) / (sampler.event.epsilon / 2))
    return worst


def by_realised_count(sampler, public, private):
    return replace(sampler, divisor=max(1.0, len(private)), top_k=None).scores(public, private)


def cut_after_the_draw(sampler, public, private):
    scores = sampler.scores(public, private)
    return np.where(scores < np.sort(scores)[-2], -np.inf, scores)


def unclipped(sampler, public, private):
    return replace(sampler, clip=1e6 * sampler.clip).scores(public, private)


def test_no_unit_changes_a_token_by_more_than_its_price():
    assert worst_share_of_the_price(Sampler.scores) <= 1 + 1e-9


@pytest.mark.parametrize("broken", [by_realised_count, cut_after_the_draw, unclipped])
@pytest.mark.filterwarnings("ignore:(invalid|overflow)")
def test_the_control_changes_a_token_by_more_than_its_price(broken):
    assert worst_share_of_the_price(broken, trials=100) > 1.5


def pushed(up, down, by=1e3):
    logits = np.zeros(TOKENS, np.float32)
    logits[up], logits[down] = by, -by
    return logits


def test_a_token_costs_no_more_than_the_worst_unit_can_do():
    sampler, public = Sampler(2.0, 32.0, 0.7), np.zeros(TOKENS, np.float32)
    one, other, rest = pushed(0, 1), pushed(1, 0), [np.ones(TOKENS, np.float32)] * 9
    left = loss_range(sampler.scores(public, [one, *rest]), sampler.scores(public, rest))
    assert left == pytest.approx((sampler.event.epsilon / 2), rel=1e-5)
    changed = loss_range(
        sampler.scores(public, [one, *rest]), sampler.scores(public, [other, *rest])
    )
    assert changed == pytest.approx(sampler.event.epsilon, rel=1e-5)


def worst_share_where_another_moves_up(trials, *, swapped):
    """Take units out of an index of which the best three are read; another takes the place."""
    rng, worst = np.random.default_rng(1), 0.0
    for _ in range(trials):
        vectors = rng.normal(size=(7, 3)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        units = [f"u{row % 6}" for row in range(7)]
        index = PrivateIndex(vectors, units=units)
        logits = dict(zip(index.names, logits_of_units(rng, 6), strict=True))
        sampler, public = some_sampler(rng), public_logits(rng)
        query = on_grid(vectors[:1])[0]

        def scores(index, sampler=sampler, public=public, logits=logits, query=query):
            best = index.names_of(index.top(index.retrieved(query, -0.5), 3))
            return sampler.scores(public, [logits[name] for name in best])

        whole, price = scores(index), sampler.event.epsilon / (1 if swapped else 2)
        for name in index.names:
            rest = scores(index.without([name], generation="2"))
            worst = max(worst, loss_range(whole, rest) / price)
    return worst


def test_a_unit_that_makes_room_for_another_is_priced():
    assert 0.99 < worst_share_where_another_moves_up(100, swapped=True) <= 1 + 1e-9


def test_the_control_that_does_not_price_the_swap_is_caught():
    assert worst_share_where_another_moves_up(30, swapped=False) > 1.5


def test_large_public_logits_lose_nothing_to_rounding():
    """At 2**54, doubles are 4 apart: a contribution of 0.1 would move the sum by nothing or by 4."""
    sampler, public = Sampler(0.1, 1.0), np.full(2, 2.0**54, np.float32)
    unit = np.float32([np.inf, 2.0**54])
    price = sampler.event.epsilon / 2
    with_and_without = [sampler.scores(public, [unit] * count) for count in (21, 20)]
    assert loss_range(*with_and_without) <= price
    control = [public.astype(float) + np.array([0.1 * count, 0.0]) for count in (21, 20)]
    assert loss_range(*control) > price


def test_the_scores_are_those_of_the_formula():
    rng = np.random.default_rng(2)
    sampler = Sampler(1.5, 7.0, 0.8)
    public, private = rng.normal(size=TOKENS), rng.normal(0, 3, (5, TOKENS))
    formula = (public + np.clip(private - public, -1.5, 1.5).sum(axis=0) / 7.0) / 0.8
    scores = sampler.scores(public, private)
    assert np.allclose(scores - scores[0], formula - formula[0], atol=1e-5)


def test_only_public_logits_decide_what_can_be_drawn():
    sampler = Sampler(1.0, 2.0, top_k=2)
    public = np.float32([5, 4, 3.5, 2.5, 1, -np.inf, 0, 0])
    for private in ([], [pushed(4, 0)], [pushed(5, 1)] * 3, [np.full(TOKENS, np.inf)]):
        assert np.isfinite(sampler.scores(public, private)).tolist() == [True] * 3 + [False] * 5


def test_tokens_are_drawn_with_the_probabilities_of_their_scores():
    rng = np.random.default_rng(3)
    sampler = Sampler(1.0, 2.0, 0.9, top_k=6)
    public, private = rng.normal(size=TOKENS), [*rng.normal(0, 3, (2, TOKENS)), pushed(3, 0)]
    counts = np.bincount([sampler.draw(public, private) for _ in range(4000)], minlength=TOKENS)

    def fits(sampler, private):
        expected = special.softmax(sampler.scores(public, private)) * counts.sum()
        drawn = expected > 0
        assert not counts[~drawn].any()
        return stats.chisquare(counts[drawn], expected[drawn]).pvalue > 1e-6

    assert fits(sampler, private)
    assert not fits(sampler, private[:-1])
    assert not fits(replace(sampler, temperature=1.5), private)


# --- the course of a generation -------------------------------------------------------------------


class Toy:
    """Continues a prompt with the logits that it is given for it, each time the same."""

    def __init__(self, logits, end=None, on_step=lambda *_: None):
        self.logits, self.end, self.steps, self.on_step = logits, end, {}, on_step

    def begin(self, prompt):
        def following(before):
            self.steps[prompt] = self.steps.get(prompt, 0) + 1
            self.on_step(prompt, self.steps[prompt])
            return self.logits(prompt, self.steps[prompt])

        return following

    def decode(self, tokens):
        return " ".join(map(str, tokens))

    @property
    def private_steps(self):
        return {prompt: steps for prompt, steps in self.steps.items() if prompt != "public"}


def flat(prompt, at):
    return np.zeros(TOKENS, np.float32)


def prompt_of(unit):
    return unit or "public"


ASKED = {"threshold": 0.5, "most": 5, "tokens": 6, "sampler": Sampler(1.0, 5.0)}
QUERY = np.eye(4)[0]


@pytest.fixture
def index():
    rng = np.random.default_rng(4)
    vectors = rng.normal(size=(12, 4)).astype(np.float32) + 4 * np.eye(4, dtype=np.float32)[0]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return PrivateIndex(vectors, units=[f"u{row:02}" for row in range(12)])


@pytest.fixture
def accountant(location):
    with Accountant.open(location) as accountant:
        accountant.create_budget("b", adaptive(20.0, 1e-6), unit="article")
        yield accountant


@pytest.fixture
def guard(accountant, index):
    return RetrievalGuard(accountant, "b", index, unit="article")


def marked(location):
    """What a crash at this moment would leave in the ledger, through a connection of its own."""
    with Accountant.open(location) as other:
        ((_, uses, marked),) = other.statement("b").open_reservations
    return uses, marked


def test_each_token_is_marked_durably_before_private_prompts_are_read_for_it(location, guard):
    seen = []
    model = Toy(
        flat, on_step=lambda prompt, at: prompt != "public" and seen.append((at, *marked(location)))
    )
    answer = guard.generate(QUERY, model, prompt_of, **ASKED)
    assert len(answer.tokens) == 6
    assert not answer.ended
    assert answer.text == " ".join(map(str, answer.tokens))
    assert seen == [(token, 6, token) for token in range(1, 7) for _ in range(5)]


def test_the_control_that_marks_after_the_draw_is_caught(location, accountant):
    seen = []
    model = Toy(
        flat, on_step=lambda prompt, at: prompt != "public" and seen.append((at, *marked(location)))
    )
    with accountant.reserve(
        "b", ASKED["sampler"].event, uses=6, unit="article", activity="a"
    ) as reservation:
        public = begun(model, "public")
        generated(model, ASKED["sampler"], public, lambda: ["u00"], lambda: None, 2)
        reservation.mark(2)
    assert seen == [(1, 6, 0), (2, 6, 0)]


def test_what_was_not_drawn_is_returned_and_each_token_pays_for_a_swap(accountant, guard):
    def ends_at_the_third(prompt, at):
        return pushed(7, 0) if at == 3 else pushed(0, 7)

    answer = guard.generate(QUERY, Toy(ends_at_the_third, end=7), prompt_of, **ASKED)
    assert (answer.tokens, answer.ended) == ((0, 0), True)
    statement = accountant.statement("b")
    assert statement.spent == ((ASKED["sampler"].event, 3),)
    assert statement.open_reservations == ()
    assert accountant.verify().clean


def test_a_text_that_does_not_fit_reads_nothing(accountant, guard, index, monkeypatch):
    monkeypatch.setattr(index, "retrieved", lambda *_: pytest.fail("read"))
    model = Toy(flat)
    with pytest.raises(BudgetExceeded):
        guard.generate(QUERY, model, prompt_of, **(ASKED | {"tokens": 10**6}))
    assert not model.private_steps
    assert not accountant.statement("b").spent


def test_an_interrupted_text_forfeits_what_was_reserved(accountant, guard):
    def interrupt(prompt, at):
        if prompt != "public" and at == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        guard.generate(QUERY, Toy(flat, on_step=interrupt), prompt_of, **ASKED)
    statement = accountant.statement("b")
    assert statement.spent == ((ASKED["sampler"].event, 6),)
    assert [left[1:] for left in statement.open_reservations] == [(6, 2)]


def fails():
    raise RuntimeError("private")


NO_LOGITS = {
    "text": "private",
    "nothing": None,
    "ragged": [[1.0], [1.0, 2.0]],
    "shape": np.ones((1, TOKENS), np.float32),
    "no numbers": np.full(TOKENS, np.nan, np.float32),
}
FEWER = np.ones(TOKENS - 1, np.float32)


@pytest.mark.parametrize("private", [*NO_LOGITS.values(), FEWER], ids=[*NO_LOGITS, "fewer"])
def test_a_unit_without_logits_changes_nothing(guard, private):
    model = Toy(lambda prompt, at: flat(prompt, at) if prompt == "public" else private)
    assert len(guard.generate(QUERY, model, prompt_of, **ASKED).tokens) == 6
    assert model.private_steps == dict.fromkeys(model.private_steps, 6)
    sampler, public = Sampler(1.0, 5.0), np.arange(TOKENS, dtype=np.float32)
    alone, beside = [pushed(0, 1)], [private, pushed(0, 1)]
    assert np.array_equal(sampler.scores(public, alone), sampler.scores(public, beside))


@pytest.mark.parametrize("at", [1, 4])
def test_a_unit_whose_model_call_fails_changes_nothing(guard, at):
    fail = {"u00", "u03", "u05"}
    model = Toy(flat, on_step=lambda prompt, step: prompt in fail and step >= at and fails())
    assert len(guard.generate(QUERY, model, prompt_of, **ASKED).tokens) == 6
    assert set(model.private_steps.values()) == {6}
    assert len(model.private_steps) == 5


@pytest.mark.parametrize("prompt", [fails, lambda: None, lambda: ""])
def test_a_unit_whose_prompt_fails_changes_nothing(guard, prompt):
    model = Toy(flat)
    answer = guard.generate(QUERY, model, lambda unit: prompt() if unit else "public", **ASKED)
    assert len(answer.tokens) == 6
    assert not model.private_steps


@pytest.mark.parametrize("public", NO_LOGITS.values(), ids=NO_LOGITS)
def test_a_public_prompt_without_logits_is_refused_before_it_is_paid(accountant, guard, public):
    model = Toy(lambda *_: public)
    with pytest.raises(InvalidQuery, match="public logits"):
        guard.generate(QUERY, model, prompt_of, **ASKED)
    assert not accountant.statement("b").spent
    assert not model.private_steps


@pytest.mark.parametrize(
    "change", [{"clip": 0.0}, {"divisor": math.nan}, {"temperature": -1.0}, {"top_k": 0}]
)
def test_a_sampler_without_a_guarantee_is_refused(change):
    with pytest.raises(InvalidParameter, match=next(iter(change))):
        Sampler(**({"clip": 1.0, "divisor": 2.0} | change))


@pytest.mark.parametrize("tiny", [1e-200, 1e-300])
def test_a_price_out_of_range_is_refused(tiny):
    with pytest.raises(InvalidParameter, match="epsilon"):
        assert Sampler(1.0, tiny, tiny).event
    with pytest.raises(InvalidParameter, match="epsilon"):
        assert Sampler(tiny, 1 / tiny, 1.0).event


# --- a membership attack --------------------------------------------------------------------------


class Unpaid:
    """Payments that go to no ledger: trials of one mechanism, not releases."""

    def many(self, *_):
        return nullcontext((1, lambda: None))

    def admitted(self, *_):
        return None


def attack(sampler, lead, tokens, trials):
    """Return how often the target's token is drawn in each text, with and without the target.

    The target is the best unit and wants token 0; where it is gone, one that wants all others takes
    its place: what a unit can do at worst. ``lead`` is that of token 0 in the public logits.
    """
    index = PrivateIndex([[1, 0], [0.8, 0.6], [0, 1]], units=["target", "next", "other"])
    one = np.float32([1.0] + [-1.0] * (TOKENS - 1))
    logits = {"public": lead / 2 * one, "target": 1e3 * one, "next": -1e3 * one}
    corpora = (index, index.without(["target"], generation="2"))
    return [
        [
            RetrievalGuard(None, "b", corpus, unit="article")
            ._paying(Unpaid(), OrderedDict())
            .generate(
                [1, 0],
                Toy(lambda prompt, _: logits[prompt]),
                prompt_of,
                threshold=0.5,
                most=1,
                tokens=tokens,
                sampler=sampler,
            )
            .tokens.count(0)
            for _ in range(trials)
        ]
        for corpus in corpora
    ]


def lower_bound(inside, outside, tokens):
    """Return what epsilon is at least, at delta 0, with confidence 1 - 1e-6 (Clopper-Pearson).

    The attack says "inside" from some number of the target's token on; all of them are tried.
    """
    risk, trials, bounds = 1e-6 / (2 * tokens), len(inside), [0.0]
    for least in range(1, tokens + 1):
        hits = int(np.sum(np.array(inside) >= least))
        alarms = int(np.sum(np.array(outside) >= least))
        if hits and alarms < trials:
            true_rate = stats.beta.ppf(risk, hits, trials - hits + 1)
            false_rate = stats.beta.ppf(1 - risk, alarms + 1, trials - alarms)
            bounds.append(math.log(true_rate / false_rate))
    return max(bounds)


TRIALS = [pytest.param(1000, id="1,000"), pytest.param(5000, id="5,000", marks=pytest.mark.long)]


@pytest.mark.parametrize("trials", TRIALS)
@pytest.mark.parametrize(("tokens", "clip", "lead"), [(1, 2.0, -0.5), (4, 1.0, 2.0)])
def test_a_membership_attack_stays_below_the_price_of_the_text(tokens, clip, lead, trials):
    """As many trials with the target as without."""
    sampler = Sampler(clip, divisor=4.0)
    price = tokens * sampler.event.epsilon
    found = lower_bound(*attack(sampler, lead, tokens, trials), tokens)
    print(f"{tokens} tokens: epsilon is at least {found:.2f}, charged {price:.2f}")
    assert found <= price


@pytest.mark.parametrize("trials", TRIALS)
@pytest.mark.parametrize(("tokens", "clip", "lead"), [(1, 2.0, -0.5), (4, 1.0, 2.0)])
def test_the_control_without_clipping_is_caught(tokens, clip, lead, trials):
    price = tokens * Sampler(clip, divisor=4.0).event.epsilon
    found = lower_bound(*attack(Sampler(1e3 * clip, divisor=4.0), lead, tokens, trials), tokens)
    print(f"{tokens} tokens, no clipping: epsilon is at least {found:.2f}, charged {price:.2f}")
    assert found > price


@pytest.mark.long
def test_the_control_that_pays_for_a_unit_without_its_successor_is_caught():
    sampler = Sampler(3.0, divisor=4.0)
    price = sampler.event.epsilon / 2
    found = lower_bound(*attack(sampler, -0.5, 1, 5000), 1)
    print(f"no swap priced: epsilon is at least {found:.2f}, charged {price:.2f}")
    assert found > price


def test_a_model_may_use_the_buffer_of_its_public_logits_again():
    buffer = np.zeros(8)

    def private():
        buffer[:] = 100.0 * np.arange(8)  # as a model does that computes in place
        yield buffer

    sampler = Sampler(clip=1.0, divisor=1e4)
    assert np.ptp(sampler.scores(buffer, private())) <= 1.0001e-4


@pytest.mark.parametrize(
    "error", [MemoryError(), type("OutOfMemoryError", (RuntimeError,), {})("of the device")]
)
def test_memory_that_runs_out_ends_the_release_and_drops_nobody(error):
    """One long unit would else decide whether the others count."""

    def fails(unit):
        raise error

    with pytest.raises(ReleaseFailed, match="memory") as failure:
        or_none(fails)("u")
    assert failure.value.__context__ is None
