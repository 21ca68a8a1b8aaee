"""Requests with keys, delivered twice, late, out of order and by several threads.

Control: the same deliveries without keys are charged once each.
"""

from __future__ import annotations

import random
import threading

import pytest

from accountant import Accountant, KeyReused, ReleaseUnknown
from dp import PureDP, pure

ASK, CHEAP = {"unit": "article", "activity": "survey"}, PureDP(1e-4)


def delivered(accountant, deliveries: int, *, keyed: bool) -> tuple[int, int, int, int]:
    """Deliver requests; return requests, drawn answers, wrong answers, and refused payloads."""
    choose = random.Random(deliveries)
    requests = deliveries // 5
    order = [number for number in range(requests) for _ in range(4)]
    order += [requests + number for number in range(requests)]  # the key of another request
    choose.shuffle(order)
    drawn, wrong, refused, lock = [], [], [], threading.Lock()

    def deliver(numbers) -> None:
        for number in numbers:
            other = number >= requests
            request = number % requests
            payload = b"other" if other else b"query"
            key = {"key": f"{request}"} if keyed else {}
            try:
                receipt = accountant.charge("tips", CHEAP, payload=payload, **key, **ASK)
            except KeyReused:
                refused.append(number)
                continue
            except ReleaseUnknown:
                wrong.append(number)
                continue
            if receipt.answer is None:
                with lock:
                    drawn.append((request, other))
                if keyed:
                    accountant.keep_answer("tips", f"{request}", payload + b"%d" % request)
            elif receipt.answer != payload + b"%d" % request:
                wrong.append(number)

    crowd = [threading.Thread(target=deliver, args=(order[part::8],)) for part in range(8)]
    for thread in crowd:
        thread.start()
    for thread in crowd:
        thread.join()
    return requests, len(drawn), len(wrong), len(refused)


@pytest.mark.parametrize("deliveries", [5000, pytest.param(100_000, marks=pytest.mark.long)])
def test_no_request_is_charged_twice_or_for_free(location, deliveries, monkeypatch):
    monkeypatch.setattr("accountant.accountant._WAIT_SECONDS", 60.0)  # for answers of a busy disk
    with Accountant.open(location) as accountant:
        accountant.create_budget("tips", pure(1e4), unit="article")
        requests, drawn, wrong, refused = delivered(accountant, deliveries, keyed=True)
        spent = dict(accountant.statement("tips").spent)[CHEAP]
        assert accountant.verify().clean
    print(
        f"{deliveries} deliveries of {requests} requests: {spent} charged, {drawn} drawn,"
        f" {wrong} wrong answers, {refused} with another payload refused"
    )
    assert drawn == spent == requests
    assert wrong == 0
    assert refused >= requests * 0.5


def test_the_control_charges_every_delivery(location):
    with Accountant.open(location) as accountant:
        accountant.create_budget("tips", pure(1e4), unit="article")
        requests, drawn, _, _ = delivered(accountant, 1000, keyed=False)
    print(f"control, no keys: {requests} requests charged {drawn} times")
    assert drawn > 2 * requests
