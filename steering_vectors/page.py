"""The pieces of a page that stands alone: its style, drawings inside it, tables.

Knows nothing of what is shown.
"""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from steering_vectors.errors import FitError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1c1c1c }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.5rem }
table { border-collapse: collapse } td, th { padding: .3rem .8rem; border-bottom: 1px solid #ddd; text-align: right }
td:first-child, th:first-child { text-align: left } .lead { font-size: 1.15rem }
.plots { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem } .plots svg { max-width: 100%; height: auto }
@media (max-width: 50rem) { .plots { display: block } table { display: block; overflow-x: auto } }
.better { background: #dcefe3 } .worse { background: #f7dfd6 } .side { background: #f3ecd2 } small { color: #555 }
""".strip()


def figure(draw: Callable[[Axes], None]) -> str:
    """A drawing as inline SVG. Raises FitError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise FitError("a report needs matplotlib: pip install 'trimtab[report]'") from error
    drawing = Figure(figsize=(5.2, 3.6), layout="constrained")
    draw(drawing.subplots())
    buffer = io.StringIO()
    drawing.savefig(buffer, format="svg", metadata={"Date": None})
    drawn = buffer.getvalue()
    return drawn[drawn.index("<svg") :]


def line(points: Sequence[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    return [point["strength"] for point in points], [point[key] for point in points]


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = "".join(f"<th>{html.escape(one)}</th>" for one in head)
    lines = "".join("<tr>" + "".join(f"<td>{html.escape(one)}</td>" for one in row) + "</tr>" for row in rows)
    return f"<table><tr>{cells}</tr>{lines}</table>"
