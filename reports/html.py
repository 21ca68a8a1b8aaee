"""The report as one self-contained page: no script, no address outside itself."""

from __future__ import annotations

from base64 import b64encode
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def page(document: dict[str, Any], plots: dict[str, bytes]) -> str:
    """Return the page of a document.

    Args:
        document: From :func:`reports.document.document`.
        plots: PNG bytes by name: ``burn-down`` and ``activities``.
    """
    environment = Environment(
        loader=PackageLoader("reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = "{:.2%}".format
    images = {
        name: f"data:image/png;base64,{b64encode(png).decode()}" for name, png in plots.items()
    }
    return environment.get_template("report.html.j2").render(report=document, images=images)
