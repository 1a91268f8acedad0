"""HTML pages as single files, with their plots and their data embedded."""

from __future__ import annotations

import html
import io
import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from steering_vectors.errors import FitError
from steering_vectors.profiles.metadata import CurvePointRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREY, LIGHT = "#0b6e99", "#c2571a", "#777777", "#bbbbbb"  # the colours of plots
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1c1c1c }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.5rem }
table { border-collapse: collapse } td, th { padding: .3rem .8rem; border-bottom: 1px solid #ddd; text-align: right }
td:first-child, th:first-child { text-align: left } .lead { font-size: 1.15rem }
.facts { margin-top: 1.5rem } .facts td { overflow-wrap: anywhere; text-align: left; vertical-align: top }
.facts td:first-child { white-space: nowrap }
.plots { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem } .plots svg { max-width: 100%; height: auto }
@media (max-width: 50rem) { .plots { display: block } table { display: block; overflow-x: auto } }
.better { background: #dcefe3 } .worse { background: #f7dfd6 } .side { background: #f3ecd2 } small { color: #555 }
""".strip()


def document(title: str, heading: str, body: str, data: object) -> str:
    """Return the file. `body` is HTML, `title` and `heading` are text, `data` is embedded as JSON for machines."""
    stored = json.dumps(data).replace("</", "<\\/")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>'
        f"<h1>{html.escape(heading)}</h1>{body}"
        f'<script type="application/json" id="data">{stored}</script></body></html>\n'
    )


def plots(drawings: Sequence[Callable[[Axes], None]]) -> str:
    """Plots side by side, as inline SVG. Raises FitError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise FitError("a page with plots needs matplotlib: pip install 'trimtab[report]'") from error
    drawn = ""
    for draw in drawings:
        canvas, buffer = Figure(figsize=(5.2, 3.6), layout="constrained"), io.StringIO()
        draw(canvas.subplots())
        canvas.savefig(buffer, format="svg", metadata={"Date": None})
        drawn += buffer.getvalue()[buffer.getvalue().index("<svg") :]
    return f'<div class="plots">{drawn}</div>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, style: str = "") -> str:
    """A table of text cells; `style` is a class of the style sheet."""
    cells = "".join(f"<th>{html.escape(one)}</th>" for one in head)
    lines = "".join("<tr>" + "".join(f"<td>{html.escape(one)}</td>" for one in row) + "</tr>" for row in rows)
    return f"<table{f' class={style}' if style else ''}>{f'<tr>{cells}</tr>' if head else ''}{lines}</table>"


def lead(sentence: str) -> str:
    return f'<p class="lead">{html.escape(sentence)}</p>'


def draw_costs(
    ax: Axes,
    points: Sequence[CurvePointRecord],
    title: str,
    *,
    budget: float | None = None,
    safe_range: tuple[float, float] | None = None,
) -> None:
    """KL and perplexity against strength, with a budget of KL and the ends of the safe range if they are given."""
    ax.plot(*line(points, "kl"), color=BLUE, marker="o", label="KL per token")
    if budget:
        ax.axhline(budget, color=BLUE, linestyle=":", linewidth=1, label="budget")
    if safe_range is not None:
        ax.axvline(safe_range[0], color=GREY, linestyle="--", linewidth=1)
        ax.axvline(safe_range[1], color=GREY, linestyle="--", linewidth=1, label="safe range")
    ax.set(xlabel="strength", ylabel="KL, nats per token", title=title)
    right = ax.twinx()
    right.plot(*line(points, "perplexity"), color=ORANGE, marker="s", label="perplexity")
    right.set_ylabel("perplexity under the unsteered model")
    lines = [one for one in (*ax.lines, *right.lines) if not str(one.get_label()).startswith("_")]
    ax.legend(lines, [str(one.get_label()) for one in lines], loc="upper center", fontsize="small")


def line(points: Sequence[Mapping[str, Any]], key: str, over: str = "strength") -> tuple[list[float], list[float]]:
    """Two values of points, for a plot."""
    return [point[over] for point in points], [point[key] for point in points]
