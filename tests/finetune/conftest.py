"""What the tests of runs share: a ledger, rows, one thread, a folder of their own."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import TensorDataset

from accountant import Accountant
from dp import adaptive
from tests.finetune.worlds import ROWS


@pytest.fixture
def accountant(tmp_path):
    """A budget in which almost no noise fits."""
    with Accountant.open(tmp_path / "ledger.db") as accountant:
        accountant.create_budget("b", adaptive(1e6, 1e-5), unit="row")
        yield accountant


@pytest.fixture
def rows():
    torch.manual_seed(0)
    return TensorDataset(torch.randn(ROWS, 5), torch.randint(0, 3, (ROWS,)))


@pytest.fixture
def one_thread():
    """Several threads take longer for tiny models."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def in_its_folder(tmp_path, monkeypatch):
    """Trainers write where they are."""
    monkeypatch.chdir(tmp_path)
