"""The picture of an amplification: win rate and KL by round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from steering_vectors.errors import FitError
from steering_vectors.reports.html import BLUE, GREY, ORANGE


def draw_rounds(rows: Sequence[Mapping[str, Any]], path: Path, budget: float) -> None:
    """Draw the rows of `rounds.jsonl` into a file, in the format of its suffix. `budget` is that of KL, in nats per
    token. Raises FitError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise FitError("a picture needs matplotlib: pip install 'trimtab[report]'") from error
    canvas = Figure(figsize=(6.4, 4.0), layout="constrained")
    ax = canvas.subplots()
    rounds = [row["round"] for row in rows]
    wins = [row["win"] for row in rows]
    ends = [[one["value"] - one["low"] for one in wins], [one["high"] - one["value"] for one in wins]]
    rates = [one["value"] for one in wins]
    ax.errorbar(rounds, rates, yerr=ends, color=BLUE, marker="o", capsize=3, label="win rate over the first version")
    ax.axhline(0.5, color=GREY, linestyle=":", linewidth=1)
    rejected = [row for row in rows if row["outcome"] == "rejected"]
    ax.plot(
        [row["round"] for row in rejected],
        [row["win"]["value"] for row in rejected],
        "x", color=GREY, markersize=12, label="nothing promoted",
    )  # fmt: skip
    ax.set(xlabel="round", ylabel="win rate on test prompts", ylim=(0, 1), xticks=rounds, title=rows[0]["profile"])
    right = ax.twinx()
    right.plot(rounds, [row["kl"] for row in rows], color=ORANGE, marker="s", label="KL per token")
    right.axhline(budget, color=ORANGE, linestyle=":", linewidth=1, label="KL budget")
    right.set(ylabel="KL, nats per token", ylim=(0, None))
    handles, labels = ax.get_legend_handles_labels()
    more, others = right.get_legend_handles_labels()
    ax.legend([*handles, *more], [*labels, *others], loc="lower right", fontsize="small")
    canvas.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else {})
