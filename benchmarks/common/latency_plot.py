"""A plot of the cumulative distribution of waits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter


def draw(seen: Mapping[str, Mapping[str, list[float]]], file: Path, *, title: str) -> None:
    """Draw a panel per kind of wait and a line per run, from `seen[run][kind]` in seconds."""
    panels = list(next(iter(seen.values())))
    figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
    for axes, panel in zip(np.atleast_1d(figure.subplots(1, len(panels), sharey=True)), panels, strict=True):
        for run, waits in seen.items():
            milliseconds = 1e3 * np.sort(waits[panel])
            axes.step(milliseconds, np.linspace(0, 1, len(milliseconds)), where="post", label=run)
        for rank in (0.5, 0.95, 0.99):
            axes.axhline(rank, color="0.8", linewidth=0.8, zorder=0)
        axes.set(xscale="log", xlabel=f"{panel}, ms")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.legend(frameon=False)
    figure.axes[0].set(ylabel="share of waits up to this", yticks=(0, 0.5, 0.95, 1))
    figure.suptitle(title)
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
