"""Output of the comparison: a table, and a chart of milliseconds per step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

OURS = "trimtab"


@dataclass(frozen=True, slots=True)
class Outcome:
    """The results of one case and one peer: the value of each side in each pair, in the case's unit."""

    peer: str
    case: str
    unit: str
    ours: tuple[float, ...]
    theirs: tuple[float, ...]

    @property
    def ratios(self) -> list[float]:
        return sorted(ours / theirs for ours, theirs in zip(self.ours, self.theirs, strict=True))

    @property
    def summary(self) -> dict[str, Any]:
        ratios = self.ratios
        return {
            "peer": self.peer,
            "case": self.case,
            "unit": self.unit,
            "ours": median(self.ours),
            "ours_range": [min(self.ours), max(self.ours)],
            "theirs": median(self.theirs),
            "theirs_range": [min(self.theirs), max(self.theirs)],
            "ratio": median(ratios),
            "ratio_range": [ratios[0], ratios[-1]],
            "pairs": [list(pair) for pair in zip(self.ours, self.theirs, strict=True)],
        }


def show(outcomes: Sequence[Outcome], title: str, agreement: Mapping[str, float]) -> None:
    """Print a row per outcome. `agreement` is the share of tokens on which a peer agrees with trimtab."""
    table = Table(title=title, caption="ours ÷ peer's: lower is better for ms, higher for tok/s")
    for column in ("peer", "case", "unit", "ours (range)", "peer's (range)", "ours ÷ peer's (range)", "agree"):
        table.add_column(column, justify="left" if column in ("peer", "case", "unit") else "right")
    for outcome in outcomes:
        found = outcome.summary
        table.add_row(
            outcome.peer,
            outcome.case,
            outcome.unit,
            _with_range(found, "ours", ".4g"),
            _with_range(found, "theirs", ".4g"),
            _with_range(found, "ratio", ".3f"),
            f"{agreement[outcome.peer]:.0%}",
        )
    Console(width=120).print(table)


def _with_range(summary: Mapping[str, Any], name: str, form: str) -> str:
    low, high = summary[f"{name}_range"]
    return f"{summary[name]:{form}} ({low:{form}}–{high:{form}})"


def plot(outcomes: Sequence[Outcome], file: Path) -> None:
    """Draw bars of milliseconds per step by case. trimtab's is the median over all pairs of the case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    decoded = [outcome for outcome in outcomes if outcome.unit == "ms"]
    cases = list(dict.fromkeys(outcome.case for outcome in decoded))
    peers = [OURS, *dict.fromkeys(outcome.peer for outcome in decoded)]
    figure, axes = pyplot.subplots(figsize=(9, 4))
    width = 0.8 / len(peers)
    for number, peer in enumerate(peers):
        heights = [_height(decoded, case, peer) for case in cases]
        places = [place + (number - (len(peers) - 1) / 2) * width for place in range(len(cases))]
        axes.bar(places, heights, width, label=peer, color="#c44e20" if peer == OURS else f"{0.25 + 0.12 * number:.2f}")
    axes.set_xticks(range(len(cases)), cases)
    axes.set_ylabel("milliseconds a step")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(file)
    pyplot.close(figure)


def _height(outcomes: Sequence[Outcome], case: str, peer: str) -> float:
    """The median in milliseconds, or 0 if the peer was not measured."""
    found = [outcome for outcome in outcomes if outcome.case == case]
    if peer == OURS:
        return median(value for outcome in found for value in outcome.ours)
    return next((median(outcome.theirs) for outcome in found if outcome.peer == peer), float("nan"))
