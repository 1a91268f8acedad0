"""A comparison of methods as a table in the terminal and as an HTML page."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from steering_vectors.measures.results import ComparedMethod, MethodComparison
from steering_vectors.reports.evaluation import margin_change, prompting_estimates
from steering_vectors.reports.html import BLUE, LIGHT, document, lead, plots, table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RANDOM = "random"
WIDTH = 104  # of the table, also on a narrower terminal
HEAD = ("method", "blocks", "rise", "95 %", "accuracy", "KL", "perplexity", "safe to", "seconds", "kB")


def print_comparison(found: MethodComparison) -> None:
    console = Console(highlight=False, soft_wrap=True, width=max(Console().width, WIDTH))
    console.print(escape(_headline(found)))
    drawn = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in HEAD:
        drawn.add_column(name, no_wrap=True)
    for row in map(_cells, found["methods"]):
        drawn.add_row(*row)
    console.print(drawn)
    for line in _remarks(found):
        console.print(escape(line))


def render_comparison(found: MethodComparison) -> str:
    """The page. Raises FitError without matplotlib."""
    remarks = "".join(f"<p>{html.escape(line)}</p>" for line in _remarks(found))
    body = (
        f"{lead(_headline(found))}{plots([lambda ax: _rises(ax, found), lambda ax: _seconds(ax, found)])}"
        f"{table(HEAD, [_cells(one) for one in found['methods']])}{remarks}"
    )
    return document("methods", f"Methods on {found['model']}", body, found)


def _headline(found: MethodComparison) -> str:
    return (
        f"Each profile costs {found['kl_budget']:g} nats of KL per token at strength 1. The rise is the change of the "
        f"margin of preferred over rejected responses from strength −1 to 1, in {found['unit']}, on "
        f"{found['data']['read']} held-out rows. KL, accuracy and perplexity are at strength 1."
    )


def _cells(one: ComparedMethod) -> tuple[str, ...]:
    last, cost = one["strengths"][-1], one["costs"][-1]
    width = one["strengths"][-1]["strength"] - one["strengths"][0]["strength"]
    interval = "–"
    if "steerability_95" in one:  # the slope of three equally distant strengths is half of the rise
        low, high = (width * bound for bound in one["steerability_95"])
        interval = f"{low:+.2f} to {high:+.2f}"
    return (
        one["method"],
        ", ".join(map(str, one["layers"])),
        f"{margin_change(one['strengths']):+.2f}",
        interval,
        f"{last['accuracy']:.3f}",
        f"{cost['kl']:.3f}",
        f"{cost['perplexity']:.1f}",
        f"±{one['max_strength']:g}",
        f"{one['seconds']:.0f}",
        f"{one['stored_bytes'] / 1e3:.1f}",
    )


def _remarks(found: MethodComparison) -> list[str]:
    plain = next(iter(found["methods"]))
    base = next(point for point in plain["strengths"] if point["strength"] == 0)
    cost = next(point for point in plain["costs"] if point["strength"] == 0)
    lines = [
        f"unsteered: margin {base['margin']:.2f}, accuracy {base['accuracy']:.3f}, perplexity {cost['perplexity']:.1f}"
    ]
    lines += [
        f"{sign} instruction instead: margin {estimate['margin']:.2f}, accuracy {estimate['accuracy']:.3f}"
        for sign, estimate in prompting_estimates(found)
    ]
    lines += [f"{name} was not fitted: {reason}" for name, reason in found["failed"].items()]
    left_out = found["data"]["notes"]
    lines += [f"note: {note}" for note in left_out]
    lines += [f"{one['method']}: {note}" for one in found["methods"] for note in one["notes"] if note not in left_out]
    return lines


def _rises(ax: Axes, found: MethodComparison) -> None:
    for place, one in enumerate(reversed(found["methods"])):
        rise = margin_change(one["strengths"])
        colour = LIGHT if one["method"] == RANDOM else BLUE
        ax.barh(place, rise, color=colour)
        if "steerability_95" in one:
            width = one["strengths"][-1]["strength"] - one["strengths"][0]["strength"]
            ax.plot([width * bound for bound in one["steerability_95"]], [place, place], color="black", linewidth=1)
    _names(ax, found)
    ax.set_xlabel(f"rise of the margin, {found['unit']}")


def _seconds(ax: Axes, found: MethodComparison) -> None:
    for place, one in enumerate(reversed(found["methods"])):
        ax.barh(place, one["seconds"], color=LIGHT if one["method"] == RANDOM else BLUE)
    _names(ax, found)
    ax.set_xlabel("seconds to fit and calibrate")


def _names(ax: Axes, found: MethodComparison) -> None:
    ax.set_yticks(range(len(found["methods"])), [one["method"] for one in reversed(found["methods"])])
