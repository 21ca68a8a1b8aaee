"""What the tests of the ledger share."""

from __future__ import annotations

import pytest

from accountant import Accountant
from tests.accountant.ledgers import LIMITS


@pytest.fixture
def books(location):
    with Accountant.open(location) as accountant:
        accountant.create_budget("d", LIMITS, unit="article", dataset="sha256:1")
        yield accountant
