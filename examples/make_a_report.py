"""Make the compliance report of a budget."""

import tempfile
from pathlib import Path

from accountant import Accountant
from dp import Gaussian, adaptive
from reports import write_report

folder = Path(tempfile.mkdtemp())
accountant = Accountant.open(folder / "ledger.db")
accountant.create_budget("survey", adaptive(1.0, 1e-6), unit="household")
accountant.charge("survey", Gaussian(20.0), unit="household", activity="count/region")

written = write_report(accountant.statement("survey"), accountant.verify(), folder / "report")
print(*(path.name for path in written.values()))
