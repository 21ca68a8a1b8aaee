"""Units pay for queries themselves: each condition of individual accounting has a test."""

import logging
import math
from concurrent.futures import ThreadPoolExecutor
from tempfile import TemporaryDirectory

import numpy as np
import pytest

from accountant import Accountant, BudgetExceeded, InvalidRequest, LedgerCorrupt
from accountant.errors import QueriesExhausted
from dp import (
    ApproximateDP,
    DiscreteGaussian,
    Gaussian,
    InvalidParameter,
    NonPrivate,
    PerUnitFilter,
    UnsupportedEvent,
    adaptive,
    planned,
    pure,
    sampling,
)
from dp.filters import unit_limit, unit_price
from retrieval import InvalidQuery, PrivateIndex, RetrievalGuard, Sampler

LIMITS = adaptive(30.0, 1e-6)
NOISE = 2.0
MU = math.sqrt(4.6) / NOISE
"""Room for four answers of this noise."""
AROUND = math.cos(math.radians(40))


def circle(degrees):
    radians = np.radians(degrees)
    return np.stack([np.cos(radians), np.sin(radians)], axis=-1).astype(np.float32)


def index(units=12, generation="1"):
    """Unit ``u<n>`` stands at n * 30 degrees; even ones are labelled x."""
    return PrivateIndex(
        circle(np.arange(units) * 30.0),
        units=[f"u{n:02}" for n in range(units)],
        labels=["xy"[n % 2] for n in range(units)],
        public_labels=["x", "y"],
        terms=[["even" if n % 2 == 0 else "odd", "all"] for n in range(units)],
        public_terms=["all", "even", "odd"],
        generation=generation,
    )


@pytest.fixture
def accountant(tmp_path):
    with Accountant.open(tmp_path / "ledger.db") as accountant:
        accountant.create_budget("b", LIMITS, unit="article")
        yield accountant


@pytest.fixture
def guard(accountant):
    return RetrievalGuard(accountant, "b", index(), unit="article")


@pytest.fixture
def opened(guard, tmp_path):
    """A filter of room for four answers with noise 0.02, which changes no vote."""
    with guard.per_unit(tmp_path / "units", name="f", mu=MU, queries=100) as many:
        yield many


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """Noise is a hundredth of what is paid for, so that answers show who took part."""
    drawn = sampling.gaussian
    monkeypatch.setattr(sampling, "gaussian", lambda size, sigma: drawn(size, sigma / 100))


def ask(guard, degrees, **more):
    """Ask for a vote around an angle: units within 40 degrees take part."""
    asked = {"threshold": AROUND, "noise_multiplier": NOISE} | more
    return guard.vote(circle(degrees), **asked).counts


def test_a_query_costs_the_budget_nothing_after_the_opening(accountant, opened):
    before = accountant.statement("b")
    (opening,) = before.spent
    assert opening == (PerUnitFilter(MU), 1)
    for degrees in (0.1, 50.2, 100.3):
        ask(opened, degrees)
    assert accountant.statement("b") == before


def test_who_scores_pays_and_is_left_out_when_out_of_room(opened):
    assert ask(opened, 90.0) == {"x": 2, "y": 1}
    for turn in range(3):
        assert ask(opened, 90.1 + turn / 10) == {"x": 2, "y": 1}
    assert ask(opened, 90.5) == {"x": 0, "y": 0}  # silently: the mechanism still runs
    assert ask(opened, 150.0) == {"x": 1, "y": 1}  # of u04, u05, u06 the first has paid already


def test_who_does_not_score_pays_nothing(opened):
    for turn in range(20):
        ask(opened, 90.0 + turn / 4)
    assert ask(opened, 270.0) == {"x": 2, "y": 1}


def test_a_unit_s_cost_depends_on_the_query_and_this_unit_alone(accountant, tmp_path):
    """Others may come, go and run out: who has room is the same for each that stays."""
    stories = []
    for units in (12, 11, 6):
        own = RetrievalGuard(accountant, "b", index(units), unit="article")
        name = f"of-{units}"
        with own.per_unit(tmp_path / name, name=name, mu=MU, queries=99) as many:
            stories.append([ask(many, 60.0 + turn / 10) for turn in range(6)])
    assert stories[0] == stories[1] == stories[2]


def test_control_charging_the_best_ones_only_depends_on_others(accountant, tmp_path):
    """Were only the best k charged, a unit that leaves would spare another's room."""

    class OnlyTheBest(type(RetrievalGuard(accountant, "b", index(), unit="article"))):
        def _retrieved(self, vector, threshold, question):
            found = self._index.top(self._index.retrieved(vector, threshold), 2)
            return found.cut(self._payments.admitted(found.units, question))

    stories = []
    for gone in ([], ["u02"]):
        rest = index().without(gone, generation="2") if gone else index()
        own = OnlyTheBest(accountant, "b", rest, unit="article")
        name = f"without-{len(gone)}"
        with own.per_unit(tmp_path / name, name=name, mu=MU, queries=99) as many:
            for turn in range(4):
                ask(many, 58.0 + turn / 10)
            stories.append(ask(many, 95.0, threshold=math.cos(math.radians(8)))["y"])
    assert stories[0] != stories[1]  # u03, which did not leave, has room only where u02 stayed


def test_all_above_the_threshold_are_charged_before_the_cut_to_the_best(opened):
    chosen = []
    for turn in range(4):
        opened.answer_vote(
            circle(90.0 + turn / 100),
            lambda unit: chosen.append(unit) or "yes",
            ["yes"],
            threshold=AROUND,
            noise_multiplier=NOISE,
            most=1,
        )
    assert set(chosen) == {"u03"}
    assert ask(opened, 90.5) == {"x": 0, "y": 0}  # u02 and u04 had paid as well


class Flat:
    """A model that says nothing, and never ends."""

    end = None

    def begin(self, _):
        return lambda _: np.zeros(3, np.float32)

    def decode(self, tokens):
        return str(tokens)


@pytest.mark.parametrize(("tokens", "read"), [(2, {None, "u02", "u03", "u04"}), (4, {None})])
def test_units_pay_for_all_tokens_of_a_text_before_they_are_read(opened, tokens, read):
    asked, sampler = set(), Sampler(clip=1.0, divisor=4.0)
    limit, price = unit_limit(MU), unit_price(sampler.event)
    assert 2 * price <= limit < 4 * price
    opened.generate(
        circle(90.0),
        Flat(),
        lambda unit: asked.add(unit) or "text",
        threshold=AROUND,
        most=9,
        tokens=tokens,
        sampler=sampler,
    )
    assert asked == read


def test_the_price_is_that_of_the_event_and_the_limit_is_mu(opened):
    assert unit_limit(MU) // unit_price(Gaussian(NOISE)) == 4
    assert ask(opened, 90.0, noise_multiplier=2 * NOISE) == {"x": 2, "y": 1}  # a quarter
    for turn in range(4):
        counts = ask(opened, 90.1 + turn / 10)
        assert counts == {"x": 2, "y": 1}
    assert ask(opened, 90.8) == {"x": 0, "y": 0}
    for turn in range(1):
        assert ask(opened, 91.0 + turn, noise_multiplier=2 * NOISE) == {"x": 2, "y": 1}
    assert ask(opened, 93.0, noise_multiplier=2 * NOISE) == {"x": 0, "y": 0}


def test_the_cap_on_queries_is_public_and_reads_nothing(guard, tmp_path, monkeypatch):
    with guard.per_unit(tmp_path / "units", name="f", mu=MU, queries=3) as many:
        for degrees in (0.0, 100.0, 200.0):
            ask(many, degrees)
        monkeypatch.setattr(guard._index, "retrieved", lambda *_: pytest.fail("it was read"))
        with pytest.raises(QueriesExhausted):
            ask(many, 300.0)
        assert ask(many, 0.0) == {"x": 1, "y": 2}  # an equal question: free


def test_spend_lasts_over_processes_generations_and_removal(accountant, guard, tmp_path):
    def filtered(own):
        return own.per_unit(tmp_path / "units", name="f", mu=MU, queries=100)

    with filtered(guard) as many:
        for turn in range(4):
            ask(many, 90.0 + turn / 10)
    seq = accountant.statement("b").seq
    gone = index().without(["u03"], generation="2")
    with filtered(RetrievalGuard(accountant, "b", gone, unit="article")) as many:
        assert ask(many, 90.5) == {"x": 0, "y": 0}
    back = gone.joined(
        index().without([f"u{n:02}" for n in range(12) if n != 3], generation="x"), generation="3"
    )
    with filtered(RetrievalGuard(accountant, "b", back, unit="article")) as many:
        assert ask(many, 90.6) == {"x": 0, "y": 0}
        assert ask(many, 0.0)["x"] == 1
    assert accountant.statement("b").seq == seq  # going on is free


@pytest.mark.parametrize(("elsewhere", "error"), [(False, LedgerCorrupt), (True, InvalidRequest)])
@pytest.mark.parametrize("name", ["units", "other"])
def test_another_file_cannot_take_the_place_of_the_first(
    accountant, guard, tmp_path, state, elsewhere, error, name
):
    with guard.per_unit(tmp_path / "units", name="f", mu=MU, queries=100):
        pass
    spent = accountant.statement("b").spent
    (tmp_path / "units").unlink()
    for marks in state.glob("lanes-*") if elsewhere else ():  # another machine has none
        marks.unlink()
    with (
        pytest.raises(error, match=r"older copy|not the file"),
        guard.per_unit(tmp_path / name, name="f", mu=MU, queries=100),
    ):
        pass
    assert accountant.statement("b").spent == spent


@pytest.mark.parametrize("change", [{"mu": MU / 2}, {"queries": 99}])
def test_a_filter_s_terms_do_not_change(guard, tmp_path, change):
    terms = {"name": "f", "mu": MU, "queries": 100}
    with guard.per_unit(tmp_path / "units", **terms):
        pass
    with (
        pytest.raises(InvalidRequest),
        guard.per_unit(tmp_path / "units", **(terms | change)),
    ):
        pass


def test_a_crash_between_charge_and_answer_is_survived(accountant, guard, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(accountant, "keep_answer", lambda *_: 1 / 0)
        with (
            pytest.raises(ZeroDivisionError),
            guard.per_unit(tmp_path / "units", name="f", mu=MU, queries=100),
        ):
            pass
    monkeypatch.setattr("accountant.accountant._WAIT_SECONDS", 0.05)
    with guard.per_unit(tmp_path / "units", name="f", mu=MU, queries=100) as many:
        assert ask(many, 90.0) == {"x": 2, "y": 1}
    assert accountant.statement("b").spent == ((PerUnitFilter(MU), 1),)


def test_a_filter_that_does_not_fit_reads_nothing(accountant, guard, tmp_path):
    with (
        pytest.raises(BudgetExceeded),
        guard.per_unit(tmp_path / "units", name="f", mu=50.0, queries=100),
    ):
        pytest.fail("it was opened")


@pytest.mark.parametrize("mu", [0.0, -1.0, math.nan, math.inf, 1e-9, 1e9])
def test_a_mu_out_of_range_charges_nothing(accountant, guard, tmp_path, mu):
    with (
        pytest.raises(InvalidParameter, match="mu"),
        guard.per_unit(tmp_path / "units", name="f", mu=mu, queries=100),
    ):
        pass
    assert accountant.statement("b").seq == 1


def test_a_pure_budget_has_no_room_for_gaussian_dp(accountant, tmp_path):
    accountant.create_budget("tips", pure(10.0), unit="article")
    own = RetrievalGuard(accountant, "tips", index(), unit="article")
    with (
        pytest.raises(BudgetExceeded),
        own.per_unit(tmp_path / "units", name="f", mu=0.1, queries=9),
    ):
        pass


def test_a_planned_budget_pays_mu_squared_of_its_gaussian_lane(accountant, tmp_path):
    limits = planned(3.0, 1e-6, slots=[(Gaussian(1e6), 1)])
    accountant.create_budget("p", limits, unit="article")
    before = accountant.uses_that_fit("p", Gaussian(10.0))
    own = RetrievalGuard(accountant, "p", index(), unit="article")
    with own.per_unit(tmp_path / "units", name="f", mu=0.3, queries=9):
        assert before - accountant.uses_that_fit("p", Gaussian(10.0)) in (9, 10)


def test_selections_generation_and_sums_are_paid_by_units_too(opened, accountant):
    seq = accountant.statement("b").seq
    around = {"threshold": AROUND}
    opened.count(circle(0.0), **around, noise_multiplier=3.0)
    opened.centroid(circle(0.0), **around, noise_multiplier=3.0)
    opened.keywords(circle(0.0), **around, k=1, epsilon=0.2)
    opened.select(circle(0.0), {"a": circle(10.0), "b": circle(90.0)}, **around, k=1, epsilon=0.2)
    opened.anything(circle(0.0), **around, bar=2, noise_multiplier=3.0)
    assert accountant.statement("b").seq == seq


def test_what_units_cannot_pay_for_is_refused_or_paid_by_the_budget(opened, accountant):
    with pytest.raises(InvalidQuery, match="keys"):
        opened.vote(circle(0.0), threshold=0.5, noise_multiplier=3.0, key="k")
    seq = accountant.statement("b").seq
    opened.above_threshold(
        threshold=0.5, bar=2, positives=1, threshold_noise=20.0, query_noise=20.0
    )
    assert accountant.statement("b").seq == seq + 1
    for event in (DiscreteGaussian(1.0), ApproximateDP(1.0, 1e-9), NonPrivate()):
        with pytest.raises(UnsupportedEvent):
            unit_price(event)


def test_nothing_tells_how_many_have_room(opened, accountant, caplog, capfd, tmp_path):
    caplog.set_level(logging.DEBUG)
    for turn in range(8):
        ask(opened, 90.0 + turn / 10)
    said = caplog.text + "".join(capfd.readouterr()) + repr(accountant.statement("b"))
    assert not any(unit in said for unit in index().names)
    assert "charged" not in caplog.text
    assert accountant.verify().clean


def test_what_units_pay_for_is_not_replayed_as_the_budget_s_answer(guard, opened):
    for turn in range(5):
        ask(opened, 90.0 + turn / 10)
    assert ask(opened, 90.4) == {"x": 0, "y": 0}
    assert ask(guard, 90.4) == {"x": 2, "y": 1}


def test_threads_cannot_make_a_unit_pay_more_than_it_may(opened):
    with ThreadPoolExecutor(8) as pool:
        # Far enough apart that no two are one question on the grid, which would be answered again.
        counts = list(pool.map(lambda turn: ask(opened, 90.0 + turn / 4), range(24)))
    assert sum(count["y"] for count in counts) == 4  # u03 took part four times


def shift_of_an_attack(queries, mu):
    """Of 16 like questions about one unit: how much more is counted where it is, in all.

    Returns the mean over units, and its standard error.
    """
    units, where = 150, np.random.default_rng(0).normal(size=(300, 64))
    where /= np.linalg.norm(where, axis=1, keepdims=True)
    index = PrivateIndex(where[:units], units=[f"u{n}" for n in range(units)])
    sums = []
    with Accountant.open("memory:") as books, TemporaryDirectory() as folder:
        books.create_budget("b", adaptive(1e6, 1e-6), unit="article")
        guard = RetrievalGuard(books, "b", index, unit="article")
        with guard.per_unit(f"{folder}/units", name="f", mu=mu, queries=10**6) as many:
            for n, row in enumerate(where):
                near = [row + 1e-2 * np.eye(64)[(n + query) % 64] for query in range(queries)]
                sums.append(
                    sum(
                        many.count(
                            one / np.linalg.norm(one), threshold=0.9, noise_multiplier=NOISE
                        ).value
                        for one in near
                    )
                )
    there, elsewhere = np.array(sums[:units]), np.array(sums[units:])
    return there.mean() - elsewhere.mean(), NOISE * math.sqrt(2 * queries / units)


def test_an_attack_over_many_questions_gains_what_mu_allows_and_no_more(monkeypatch):
    """A unit held to mu shifts a sum by at most mu**2 * sigma**2; the control holds it to more."""
    monkeypatch.undo()  # noise as it is paid for
    shift, error = shift_of_an_attack(10, MU)
    assert abs(shift - 4) < 6 * error
    assert shift < MU**2 * NOISE**2 + 6 * error
    shift, error = shift_of_an_attack(20, 100.0)
    assert shift > MU**2 * NOISE**2 + 6 * error
