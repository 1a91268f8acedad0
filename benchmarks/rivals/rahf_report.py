"""The experiment's cells as a table and as plots.

Every figure is the mean over the seeds and manners of the existing cells. Intervals are cluster bootstrap over prompts:
all seeds answer the same prompts, so a prompt is drawn with all its replies.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from benchmarks.quality.manners import MANNERS
from benchmarks.rivals.rahf_cell import METHODS, SAMPLES
from steering_vectors.measures.controls import bootstrap

Cell = dict[str, Any]
LINEAR = 0.3  # nats; the axis is linear below
LATER_COLOURS = ("black", "saddlebrown", "darkgreen", "navy", "crimson", "indigo", "teal", "olive", "gray", "gold")
COLUMNS = ("method", *MANNERS, "mean +1", "mean −1", "accuracy", "KL", "perplexity", "seconds", "peak MB", "stored kB")


def read_cells(folder: Path) -> list[Cell]:
    return [json.loads(file.read_text()) for file in sorted(folder.glob("*-*-*.json"))]


def wanted(cell: Cell) -> dict[str, Any]:
    """The measurements at +1, or of the plain model."""
    found: dict[str, Any] = cell["conditions"].get("+1") or cell["conditions"]["0"]
    return found


def rows_of(cells: Sequence[Cell]) -> list[list[str]]:
    rows = []
    for method in METHODS:
        own = [cell for cell in cells if cell["method"] == method]
        if own:
            rows.append([method, *(share(of(own, manner)) for manner in MANNERS), *summary(own)])
    return rows


def of(cells: Sequence[Cell], manner: str) -> list[Cell]:
    return [cell for cell in cells if cell["manner"] == manner]


def share(cells: Sequence[Cell]) -> str:
    """The mean share in the wanted manner at +1 with its interval, and the share at −1 if it was measured."""
    if not cells:
        return "–"
    marks = marks_of(cells, "+1")
    low, high = bootstrap(lambda prompts: float(marks[:, prompts].mean()), marks.shape[1])
    return f"{marks.mean():.2f} ({low:.2f}–{high:.2f})"


def marks_of(cells: Sequence[Cell], name: str) -> np.ndarray:
    """Whether each reply is in the wanted manner: `[cells × replies per prompt, prompts]`."""
    texts = [cell["conditions"].get(name, wanted(cell))["marks"] for cell in cells]
    by_prompt = [np.array([float(mark) for mark in text]).reshape(SAMPLES, -1) for text in texts]
    return np.concatenate(by_prompt)


def summary(cells: Sequence[Cell]) -> list[str]:
    negative = [cell for cell in cells if "-1" in cell["conditions"]]
    return [
        f"{marks_of(cells, '+1').mean():.2f}",
        f"{marks_of(negative, '-1').mean():.2f}" if negative else "–",
        f"{mean(cells, lambda cell: wanted(cell)['accuracy']):.2f}",
        f"{mean(cells, lambda cell: wanted(cell)['kl']):.3f}",
        f"{mean(cells, lambda cell: wanted(cell)['perplexity']):.2f}",
        f"{np.median([cell['seconds'] for cell in cells]):.0f}",
        f"{np.median([cell['peak_bytes'] for cell in cells]) / 1e6:.0f}",
        f"{np.median([cell['stored_bytes'] for cell in cells]) / 1e3:.1f}",
    ]


def mean(cells: Sequence[Cell], value: Callable[[Cell], float]) -> float:
    return float(np.mean([value(cell) for cell in cells]))


def print_table(cells: Sequence[Cell]) -> None:
    table = Table(title=title(cells))
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in rows_of(cells):
        table.add_row(*row)
    Console(width=200).print(table)


def title(cells: Sequence[Cell]) -> str:
    seeds = sorted({cell["seed"] for cell in cells})
    return f"Share of replies in the wanted manner at +1; {len(cells)} cells, seeds {', '.join(map(str, seeds))}"


def write_table(cells: Sequence[Cell], file: Path) -> None:
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    lines += [f"| {' | '.join(row)} |" for row in rows_of(cells)]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_plots(cells: Sequence[Cell], folder: Path) -> None:
    """Draw share against cost, one panel per manner: `rahf-shares.svg`."""
    folder.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(11, 8), layout="constrained")
    methods = [method for method in METHODS if any(cell["method"] == method for cell in cells)]
    colours = {
        method: f"C{index % 10}" if index < 10 else LATER_COLOURS[index % 10] for index, method in enumerate(methods)
    }
    for axes, manner in zip(figure.subplots(2, 2).flat, MANNERS, strict=True):
        draw(axes, of(cells, manner), methods, colours)
        axes.set(title=manner, xlabel="KL from the plain model, nats per token", ylabel="share in the manner")
        axes.set_ylim(0, 1.03)
        axes.set_xscale("symlog", linthresh=LINEAR)  # dpo costs twenty times as much as the others
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize="small")
    figure.savefig(folder / "rahf-shares.svg", metadata={"Date": None})


def draw(axes: Any, cells: Sequence[Cell], methods: Sequence[str], colours: dict[str, str]) -> None:
    """Draw every method's mean over seeds at +1 and, as a hollow marker, at −1."""
    for index, method in enumerate(methods):
        own = [cell for cell in cells if cell["method"] == method]
        marker = "os^vDP*X<>hd"[index % 12]
        for name, fill in (("+1", colours[method]), ("0", colours[method]), ("-1", "none")):
            points = [cell["conditions"][name] for cell in own if name in cell["conditions"]]
            if points:
                kl, shares = (float(np.mean([point[key] for point in points])) for key in ("kl", "share"))
                axes.plot(
                    kl, shares, marker, color=colours[method], markerfacecolor=fill,
                    label=method if name != "-1" else None,
                )  # fmt: skip
