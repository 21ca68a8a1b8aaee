"""The plots. The only importer of matplotlib; returns figures, never shows or saves them."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

_BLUE, _ORANGE, _GREY = "#0072b2", "#d55e00", "#666666"  # Okabe-Ito: distinct to color-blind eyes


def burn_down(document: dict[str, Any]) -> Figure:
    """Return the used share of the limits after each entry, with refusals marked.

    Args:
        document: From :func:`reports.document.document`.
    """
    figure, axes = _blank(width=7.5, height=3.2)
    points = document["burn_down"]
    entries = [point["seq"] for point in points]
    axes.step(
        entries, [point["share"] for point in points], where="post", color=_BLUE, label="used"
    )
    axes.axhline(1.0, color=_GREY, linestyle="--", linewidth=1, label="limit")
    refused = [point for point in points if point["refusal"]]
    if refused:
        axes.plot(
            [point["seq"] for point in refused],
            [point["share"] for point in refused],
            "x",
            color=_ORANGE,
            label="refused",
        )
    axes.set_ylim(0, 1.08)
    axes.set_xlabel("ledger entry")
    axes.set_ylabel("used share of the limits")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.legend(frameon=False, loc="center right")
    return figure


def spend_by_activity(document: dict[str, Any]) -> Figure:
    """Return one bar for each activity: its share of the limits.

    Args:
        document: From :func:`reports.document.document`.
    """
    activities = document["spend"]["activities"]
    figure, axes = _blank(width=7.5, height=1.2 + 0.4 * max(1, len(activities)))
    names = [_shortened(activity["name"]) for activity in activities]
    places = list(range(len(activities)))
    bars = axes.barh(
        places, [activity["share"] for activity in activities], color=_BLUE, height=0.6
    )
    axes.bar_label(bars, [f"{activity['share']:.1%}" for activity in activities], padding=4)
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12)
    axes.set_xlabel("share of the limits")
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    if not activities:
        axes.text(0.5, 0.5, "nothing was charged yet", ha="center", transform=axes.transAxes)
    return figure


def _blank(*, width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _shortened(name: str) -> str:
    shown = name if len(name) <= 28 else f"{name[:27]}…"
    return shown.replace("$", r"\$")
