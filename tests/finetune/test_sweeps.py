"""Sweeps: one event for all trials, each held to its plan, and a K that nobody is told."""

from __future__ import annotations

import dataclasses
import math
import pickle
import random
import re
from collections import Counter

import dp_accounting
import numpy as np
import pytest
import torch
from dp_accounting import dp_event
from dp_accounting.rdp import RdpAccountant
from scipy.special import gammaln
from torch.utils.data import DataLoader, TensorDataset

from accountant import Accountant, BudgetExceeded, ReservationError, UnitMismatch
from dp import (
    ApproximateDP,
    Composed,
    Gaussian,
    InvalidParameter,
    NonPrivate,
    PureDP,
    RepeatAndSelect,
    RepeatAndSelectPoisson,
    Repeated,
    UnsupportedEvent,
    adaptive,
    planned,
)
from dp.costs import cost
from dp.events import canonical
from dp.rows import _INNER_ORDERS
from finetune import (
    PlanChanged,
    SkippedStep,
    TrainingPlan,
    UnmarkedStep,
    UnsupportedModel,
    supervision,
    sweeps,
)
from finetune.sweeps import Winner, sweep, sweep_event

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS = 40
PLAN = TrainingPlan(2.0, 0.2, steps=3, expected_batch_size=8)
SHORT = TrainingPlan(2.0, 0.2, steps=1, expected_batch_size=4, max_grad_norm=0.5)
CANDIDATES = ((PLAN, 0.1), (PLAN, 0.5), (SHORT, 0.9))


def geometric(trial):
    return RepeatAndSelect(trial, eta=1.0, gamma=0.5)


EVENT = geometric(Repeated(PLAN.event, 3))


@pytest.fixture
def accountant(tmp_path):
    with Accountant.open(tmp_path / "ledger.db") as accountant:
        accountant.create_budget("b", adaptive(8.0, 1e-5), unit="row")
        yield accountant


@pytest.fixture
def trials(monkeypatch):
    """Fix K, for tests that count; what is drawn is tested by itself."""

    def fix(number):
        monkeypatch.setattr(sweeps, "_number", lambda _: number)

    fix(4)
    return fix


class Rows(TensorDataset):
    """Private rows that say when they are read."""

    def __init__(self):
        super().__init__(torch.randn(ROWS, 5), torch.randint(0, 2, (ROWS,)))
        self.read = lambda: None

    def __getitem__(self, at):
        self.read()
        return super().__getitem__(at)


def parts(rows=None, rate=0.1):
    model = torch.nn.Linear(5, 2)
    return model, torch.optim.SGD(model.parameters(), lr=rate), DataLoader(rows or Rows())


def learn(run, rate, rows=None):
    model, optimizer, loader = run.make_private(*parts(rows, rate))
    for features, labels in run.batches(loader):
        torch.nn.functional.cross_entropy(model(features), labels).backward()
        optimizer.step()
        optimizer.zero_grad()


def swept(accountant, train=lambda *_: None, score=lambda _: 0.0, candidates=CANDIDATES, **changes):
    more = {"select": geometric, "score_event": None, "unit": "row"} | changes
    return sweep(accountant, "b", candidates, train, score, **more)


def taking(run, of=lambda _: None):
    """Take a trial's steps without a model, where a test is about something else."""
    while run.remaining:
        run.reservation.mark()
    return of(run)


def spent(accountant):
    return dict(accountant.statement("b").spent)


def test_a_sweep_tells_its_supervisor_once_whatever_k_is(accountant, trials, tmp_path, monkeypatch):
    said = []
    for number in (1, 5):
        told = tmp_path / f"told-{number}"
        monkeypatch.setenv(supervision.VARIABLE, str(told))
        trials(number)
        swept(accountant, lambda run, _: taking(run))
        said.append(supervision.heard(told))
        assert told.read_text().count("\n") == 1
    assert said[0] == said[1] == (supervision.Told("b", "ended", 1, 1),)


# --- the charge ---------------------------------------------------------------------------------


def test_one_event_is_charged_before_the_first_row_is_read(accountant, trials):
    rows, seen = Rows(), []
    rows.read = lambda: seen.append(spent(accountant))
    before = accountant.share_after("b", [(EVENT, 1)])
    best = swept(accountant, lambda run, rate: learn(run, rate, rows))
    assert len(seen) > 4  # the example row of each trial's loader, and samples
    assert all(each == {EVENT: 1} for each in seen)
    statement = accountant.statement("b")
    assert dict(statement.spent) == {EVENT: 1}
    assert (statement.share, statement.open_reservations) == (before, ())
    assert isinstance(best, Winner)
    assert accountant.verify().clean


def test_a_sweep_that_does_not_fit_is_refused_before_anything_is_touched(accountant):
    fit = accountant.uses_that_fit("b", EVENT)
    accountant.charge("b", EVENT, uses=fit, unit="row", activity="other")
    torch.manual_seed(1)
    before = torch.get_rng_state()
    with pytest.raises(BudgetExceeded) as refusal:
        swept(accountant, lambda *_: pytest.fail("ran"))
    assert (refusal.value.event, refusal.value.requested) == (EVENT, 1)
    assert torch.equal(torch.get_rng_state(), before)
    assert spent(accountant) == {EVENT: fit}
    with pytest.raises(UnitMismatch):
        swept(accountant, lambda *_: pytest.fail("ran"), unit="patient")


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["train", "score"])
def test_an_error_leaves_the_whole_sweep_spent_and_the_trial_ended(
    accountant, trials, error, where
):
    runs = []

    def fail(here):
        if here == where and len(runs) == 2:
            raise error

    def train(run, rate):
        runs.append(run)
        fail("train")
        taking(run)

    with pytest.raises(error):
        swept(accountant, train, lambda _: fail("score") or 0.0)
    assert spent(accountant) == {EVENT: 1}
    assert runs[-1].remaining == 0
    with pytest.raises(ReservationError, match="has ended"):
        runs[-1].reservation.mark()


def test_a_score_on_private_rows_is_a_part_of_every_trial(accountant, trials):
    noisy = Gaussian(5.0)
    event = geometric(Composed((Repeated(PLAN.event, 3), noisy)))
    assert sweep_event(CANDIDATES, geometric, score_event=noisy) == event
    swept(accountant, lambda run, _: taking(run), score_event=noisy)
    assert spent(accountant) == {canonical(event): 1}
    with pytest.raises(BudgetExceeded):
        swept(accountant, lambda *_: pytest.fail("ran"), score_event=NonPrivate())
    with pytest.raises(UnsupportedEvent, match="a run with a delta of its own"):
        swept(accountant, lambda *_: pytest.fail("ran"), score_event=ApproximateDP(1.0, 1e-9))


def test_planned_budgets_have_no_price_for_it(accountant):
    accountant.create_budget("p", planned(8.0, 1e-5, slots=[(PLAN.event, 3)]), unit="row")
    with pytest.raises(BudgetExceeded, match="it needs an adaptive budget"):
        sweep(
            accountant, "p", CANDIDATES, lambda *_: pytest.fail("ran"), lambda _: 0.0,
            select=geometric, score_event=None, unit="row",
        )  # fmt: skip


LOUD = TrainingPlan(1.9, 0.2, steps=1, expected_batch_size=8)


@pytest.mark.parametrize(
    ("candidates", "select", "name"),
    [
        ((), geometric, "candidates"),
        ((*CANDIDATES, (LOUD, 0.1)), geometric, "candidates"),
        (CANDIDATES, lambda trial: trial, "select"),
        (CANDIDATES, lambda trial: geometric(trial.event), "select"),
        (CANDIDATES, lambda _: RepeatAndSelectPoisson(Gaussian(50.0), 5.0), "select"),
    ],
)
def test_what_is_priced_is_what_runs(accountant, candidates, select, name):
    with pytest.raises(InvalidParameter) as refusal:
        swept(accountant, lambda *_: pytest.fail("ran"), candidates=candidates, select=select)
    assert refusal.value.name == name
    assert spent(accountant) == {}


def test_several_processes_are_refused(accountant, monkeypatch):
    monkeypatch.setattr(sweeps, "ranks", lambda: 2)
    with pytest.raises(InvalidParameter, match="each would draw a K of its own"):
        swept(accountant, lambda *_: pytest.fail("ran"))
    assert spent(accountant) == {}


# --- the trials ---------------------------------------------------------------------------------


def test_every_trial_takes_exactly_the_steps_of_its_plan(accountant, trials, caplog):
    trials(12)
    updates = []

    def train(run, rate):
        model, optimizer, loader = parts(rate=rate)
        taken = []
        optimizer.register_step_pre_hook(lambda *_: taken.append(1))
        model, optimizer, loader = run.make_private(model, optimizer, loader)
        plan = run.plan
        assert plan in (PLAN, SHORT)
        assert (optimizer.max_grad_norm, optimizer.noise_multiplier) == (plan.max_grad_norm, 2.0)
        for features, labels in run.batches(loader):
            torch.nn.functional.cross_entropy(model(features), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert list(run.batches(loader)) == []
        with pytest.raises(ReservationError, match="all steps of its plan are taken"):
            run.reservation.mark()
        updates.append(len(taken) == plan.steps)

    swept(accountant, train)
    assert updates == [True] * 12
    assert "no step of the plan is left" not in caplog.text  # once for each trial


@pytest.mark.parametrize("taken", [0, 2])
def test_a_trial_that_leaves_steps_undone_ends_the_sweep(accountant, trials, taken):
    def train(run, rate):
        for _ in range(taken):
            run.reservation.mark()
        return "model"

    with pytest.raises(SkippedStep, match="left steps of its plan undone"):
        swept(accountant, train, candidates=[(PLAN, 0.1)])
    assert spent(accountant) == {EVENT: 1}


def test_the_guard_is_the_one_of_a_single_run(accountant, trials):
    """A raw step, an unmarked one, and another noise than was priced are refused inside a trial."""
    refused = []

    def train(run, rate):
        model, raw, loader = parts()
        model, optimizer, loader = run.make_private(model, raw, loader)
        weights = [each.detach().clone() for each in model.parameters()]
        for number, (features, labels) in enumerate(run.batches(loader)):
            torch.nn.functional.cross_entropy(model(features), labels).backward()
            if number == 0:
                with pytest.raises(UnmarkedStep, match="stepped itself, with raw"):
                    raw.step()
                optimizer.noise_multiplier = 0.1
                with pytest.raises(PlanChanged):
                    optimizer.step()
                optimizer.noise_multiplier = 2.0
                assert all(map(torch.equal, weights, model.parameters()))
                torch.nn.functional.cross_entropy(model(features), labels).backward()
            optimizer.step()
            with pytest.raises(UnmarkedStep, match="no durable mark"):
                optimizer.step()
            optimizer.zero_grad()
        refused.append(run)

    swept(accountant, train)
    assert len(refused) == 4


def test_a_trial_is_not_copied_nor_used_by_another_process(accountant, trials, monkeypatch):
    def train(run, rate):
        with pytest.raises(ReservationError, match="no copies"):
            pickle.dumps(run.reservation)
        monkeypatch.setattr(sweeps, "process", lambda: -1)
        with pytest.raises(ReservationError, match="belongs to the process"):
            run.reservation.mark()
        monkeypatch.undo()
        monkeypatch.setattr(sweeps, "_number", lambda _: 1)
        taking(run)

    trials(1)
    swept(accountant, train)


def test_the_best_score_wins_and_no_number_loses(accountant, trials):
    scores = iter([math.nan, 0.25, 0.75, 0.75, -1.0, math.nan])
    trials(6)
    names = iter("abcdef")
    best = swept(
        accountant, lambda run, _: taking(run, lambda _: next(names)), lambda _: next(scores)
    )
    assert (best.release, best.score) == ("c", 0.75)
    assert (best.plan, best.settings) in CANDIDATES
    trials(2)
    best = swept(accountant, lambda run, _: taking(run), lambda _: math.nan)
    assert best.score == -math.inf
    trials(0)
    assert swept(accountant, lambda run, _: taking(run)) is None


# --- what may tell K ----------------------------------------------------------------------------


def test_result_and_ledger_are_the_same_whatever_k_is(tmp_path, trials, caplog, capfd):
    told = []
    for number in (1, 7):
        trials(number)
        with Accountant.open(tmp_path / f"{number}.db") as books:
            books.create_budget("b", adaptive(8.0, 1e-5), unit="row")
            best = swept(books, lambda run, _: taking(run), candidates=[(PLAN, 0.1)])
            (budget,) = books.verify().budgets
            told.append((best, books.statement("b").share, budget.entries))
    assert told[0] == told[1]
    assert [field.name for field in dataclasses.fields(Winner)] == [
        "plan",
        "settings",
        "score",
        "release",
    ]
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


def shown(raised):
    """Return the locals of the sweep's own frames, as text without addresses."""
    frames = [each.frame for each in raised.traceback if each.path.name == "sweeps.py"]
    return [
        {name: re.sub("0x[0-9a-f]+", "", repr(value)) for name, value in frame.f_locals.items()}
        for frame in frames
    ]


@pytest.mark.parametrize("fails", ["train", "score"])
def test_a_traceback_shows_the_same_in_whichever_trial_it_was(
    accountant, trials, fails, monkeypatch
):
    def act(at, failing, value):
        seen.append(at)
        if at == fails and seen.count(at) == failing:
            raise ZeroDivisionError
        return value

    def after(failing):
        seen.clear()
        with pytest.raises(ZeroDivisionError) as raised:
            swept(
                accountant,
                lambda run, _: (taking(run), act("train", failing, len(seen)))[1],
                lambda release: act("score", failing, release / 4),
                candidates=[(PLAN, 0.1)],
            )
        return shown(raised)

    trials(123)
    monkeypatch.setattr(sweeps, "next_number", lambda: 0)
    receipt = accountant.charge("b", PureDP(0.01), unit="row", activity="x")
    monkeypatch.setattr(accountant, "charge", lambda *_, **__: receipt)
    seen = []
    first, third = after(1), after(3)
    assert len(first) == 2
    assert first == third
    assert not {"2", "3", "122", "123"} & {text for frame in third for text in frame.values()}


def test_a_model_that_was_trained_in_an_earlier_trial_is_refused(accountant, trials):
    def train(run, rate):
        run.make_private(shared, torch.optim.SGD(shared.parameters(), lr=rate), DataLoader(Rows()))
        return taking(run, lambda _: shared)

    trials(2)
    shared = torch.nn.Linear(5, 2)
    before = shared.weight.detach().clone()
    with pytest.raises(UnsupportedModel, match="let it make a new one every time"):
        swept(accountant, train)
    assert torch.equal(shared.weight, before)


def test_another_sweep_may_go_on_with_the_winner_and_trials_may_share_frozen_layers(
    accountant, trials
):
    def train(run, rate):
        model = torch.nn.Sequential(frozen, torch.nn.Linear(2, 2))
        made.append(model if start is None else start)
        weights = [each for each in made[-1].parameters() if each.requires_grad]
        run.make_private(made[-1], torch.optim.SGD(weights, lr=rate), DataLoader(Rows()))
        return taking(run, lambda _: made[-1])

    frozen = torch.nn.Linear(5, 2).requires_grad_(requires_grad=False)
    made, start = [], None
    trials(3)
    winner = swept(accountant, train).release
    trials(1)
    start = winner
    assert swept(accountant, train).release is winner


def test_a_known_seed_does_not_number_the_trials(accountant, trials):
    """Otherwise trial i starts from weights that tell i, and K is at least that."""

    def draws():
        return (
            torch.initial_seed(),
            float(torch.rand(1, dtype=torch.float64)),  # of 2**24 two may be equal
            float(np.random.rand()),  # noqa: NPY002
            random.random(),
        )

    found = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002
        random.seed(0)
        swept(accountant, lambda run, _: taking(run, lambda _: found.append(draws())))
        found.append(draws())  # nor does what is drawn afterwards
    for column in zip(*found, strict=True):
        assert len(set(column)) == 10


# --- the distribution of K ----------------------------------------------------------------------


def mass(event, k):
    """By the gamma function, and not by the recurrence that draws."""
    if isinstance(event, RepeatAndSelectPoisson):
        return math.exp(k * math.log(event.mean) - event.mean - gammaln(k + 1))
    eta, gamma = event.eta, event.gamma
    if k == 0:
        return 0.0
    if abs(eta) < 1e-300:
        return (1 - gamma) ** k / (k * math.log(1 / gamma))
    sign = math.copysign(1, eta)  # of 1/gamma(eta), too, where eta is negative
    log_ratio = gammaln(k + eta) - gammaln(eta) - gammaln(k + 1)
    return sign * (1 - gamma) ** k * math.exp(log_ratio) / (gamma**-eta - 1)


def mean(event):
    if isinstance(event, RepeatAndSelectPoisson):
        return event.mean
    eta, gamma = event.eta, event.gamma
    if eta == 0:
        return (1 / gamma - 1) / math.log(1 / gamma)
    return eta * (1 - gamma) / (gamma * (1 - gamma**eta))


TRIAL = PureDP(1.0)
NUMBERS = [
    RepeatAndSelect(TRIAL, 1.0, 0.1),
    RepeatAndSelect(TRIAL, 0.0, 0.05),
    RepeatAndSelect(TRIAL, -0.5, 0.02),
    RepeatAndSelect(TRIAL, 2.5, 0.3),
    RepeatAndSelectPoisson(TRIAL, 6.0),
]


@pytest.mark.parametrize("event", NUMBERS)
def test_k_is_drawn_as_the_event_says(event):
    draws = 3000
    masses = [mass(event, k) for k in range(3000)]
    assert math.isclose(sum(masses), 1, rel_tol=1e-9)
    assert math.isclose(sum(k * m for k, m in enumerate(masses)), mean(event), rel_tol=1e-8)
    found = Counter(sweeps._number(event) for _ in range(draws))
    for k, expected in enumerate(masses[:30]):
        deviation = math.sqrt(draws * expected * (1 - expected)) + 1
        assert abs(found[k] - draws * expected) < 7 * deviation, k
    variance = sum((k - mean(event)) ** 2 * m for k, m in enumerate(masses))
    average = sum(k * times for k, times in found.items()) / draws
    assert abs(average - mean(event)) < 7 * math.sqrt(variance / draws)


@pytest.mark.parametrize("event", [*NUMBERS, RepeatAndSelect(TRIAL, 5e-324, 0.1)])
def test_the_distribution_function_is_met_at_every_step(event, monkeypatch):
    reached = 0.0
    for k in range(12):
        below, reached = reached, reached + mass(event, k)
        if reached == below:
            continue
        for at in (below + 1e-9, reached - 1e-9):
            monkeypatch.setattr(sweeps.secrets, "randbits", lambda bits, at=at: int(at * 2**bits))
            assert sweeps._number(event) == k
    monkeypatch.setattr(sweeps.secrets, "randbits", lambda bits: 2**bits - 1)
    assert sweeps._number(event) > 12  # the last of all ends, too


# --- the price ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [0.0, 1.0, math.inf])
def test_the_price_is_that_of_another_library(shape):
    """dp_accounting, which has the theorems of its own, at orders below the jump of either min."""
    plan = TrainingPlan(1.2, 0.02, steps=200, expected_batch_size=8)
    step = dp_accounting.PoissonSampledDpEvent(0.02, dp_accounting.GaussianDpEvent(1.2))
    run = dp_accounting.SelfComposedDpEvent(step, 200)
    gamma = 0.1
    select = {
        0.0: lambda trial: RepeatAndSelect(trial, 0.0, gamma),
        1.0: lambda trial: RepeatAndSelect(trial, 1.0, gamma),
        math.inf: lambda trial: RepeatAndSelectPoisson(trial, 10.0),
    }[shape]
    event = sweep_event([(plan, None)], select, score_event=None)
    peer = RdpAccountant(_INNER_ORDERS)
    peer.compose(dp_event.RepeatAndSelectDpEvent(run, mean(event), shape))
    ours = cost(event)
    for order, theirs in zip(peer._orders, peer._rdp, strict=True):
        assert theirs <= ours.renyi(int(order)) * (1 + 1e-6)
    order = {0.0: 8, 1.0: 8, math.inf: 4}[shape]
    assert math.isclose(ours.renyi(order), peer._rdp[_INNER_ORDERS.index(order)], rel_tol=1e-3)


def test_a_shorter_candidate_and_a_draw_among_candidates_cost_no_more():
    """The mixture of two trials is no dearer than the dearest, for explicit outputs."""
    p, q = (np.array([0.7, 0.2, 0.1]), np.array([0.6, 0.1, 0.3])), None
    q = (np.array([0.5, 0.3, 0.2]), np.array([0.5, 0.2, 0.3]))
    for order in (2, 8, 64):
        each = [
            np.log((a**order * b ** (1 - order)).sum()) / (order - 1)
            for a, b in zip(p, q, strict=True)
        ]
        drawn, other = np.concatenate(p) / 2, np.concatenate(q) / 2
        mixed = np.log((drawn**order * other ** (1 - order)).sum()) / (order - 1)
        assert mixed <= max(each) + 1e-12
    shorter, longer = (cost(Repeated(PLAN.event, steps)) for steps in (1, 3))
    assert all(shorter.renyi(order) <= longer.renyi(order) for order in _INNER_ORDERS)


def loss(shown_by_one, shown_by_other):
    return max(abs(math.log(a / b)) for a, b in zip(shown_by_one, shown_by_other, strict=True))


def test_control_the_best_of_a_known_number_costs_more_than_any_of_these_claims():
    """A trial answers one bit by randomized response, and the bit is its score: computed exactly."""
    epsilon, gamma = 1.0, 0.1
    truth = 1 / (1 + math.exp(-epsilon))

    def best(low, probability_of_all):  # the best of K is low where all of K are
        return probability_of_all(low), 1 - probability_of_all(low)

    def known(low):
        return low**10  # K = 10, the mean of the secret one

    def secret(low):
        return gamma * low / (1 - (1 - gamma) * low)  # generating function of the geometric K

    one_run = cost(PureDP(epsilon)).epsilon
    claim = cost(RepeatAndSelect(PureDP(epsilon), 1.0, gamma)).epsilon
    paid_for_one = loss(best(truth, known), best(1 - truth, known))
    swept_losses = loss(best(truth, secret), best(1 - truth, secret))
    assert one_run < swept_losses <= claim == 3 * epsilon
    assert paid_for_one == pytest.approx(10 * epsilon)
    assert paid_for_one > claim > one_run
    told = math.log(truth**30 / (1 - truth) ** 30)  # and a geometric K that was told may be 30
    assert told > 9 * claim
