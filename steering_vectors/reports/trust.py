"""The trust suite in reports: a section of the page, and tables for the terminal."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from steering_vectors.measures.results import ControlPoint, TrustEvaluation, TrustPoint, VerticalReport
from steering_vectors.reports.html import BLUE, LIGHT, ORANGE, lead, plots, table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

AIMS = {"higher": "higher is better", "lower": "lower is better", "half": "0.5 is best"}
CLASSES = {"better": "better", "worse": "worse", "other side": "side"}
NO_CHANGE = "no change"
PART_STYLES = ("--", ":", "-.")  # of the lines of groups of rows; more groups are not drawn


def trust_section(one: TrustEvaluation) -> str:
    """The headline, a plot per vertical, and the changes of every figure, also by group of rows."""
    verticals = one["trust"]
    drawn = plots([_plot(name, found) for name, found in verticals.items()])
    rows = [
        [name, found["figures"][title]["measure"], AIMS[found["figures"][title]["aim"]], points]
        for name, found in verticals.items()
        for title, points in _series(found).items()
    ]
    changes = _change_table(["vertical", "figure", "better"], rows)
    notes = [
        [name, str(found["rows"]), str(found["left_out"]), " ".join([found["note"], *found["remarks"]])]
        for name, found in verticals.items()
    ]
    measured = table(["vertical", "rows", "left out", "how it is measured"], notes)
    return (
        f"<h3>Trust</h3>{lead(trust_headline(one))}{drawn}"
        f"{changes}<p>{html.escape(reading_note(verticals))}</p>{_groups(verticals)}{measured}"
    )


def trust_headline(one: TrustEvaluation) -> str:
    """Describe every vertical at the highest and the lowest strength."""
    points = next(iter(one["trust"].values()))["strengths"]
    ends = [index for index in (len(points) - 1, 0) if points[index]["strength"]]
    return " ".join(_at_strength(one["trust"], index) for index in ends)


def _at_strength(verticals: Mapping[str, VerticalReport], index: int) -> str:
    points = {name: found["strengths"][index] for name, found in verticals.items()}
    changed = [
        f"{name} {point['change']} ({point['delta']:+.3g}{_beside_controls(point)})"
        for name, point in points.items()
        if point["change"] != NO_CHANGE
    ]
    same = [name for name, point in points.items() if point["change"] == NO_CHANGE]
    said = "; ".join([*changed, *([f"no change in {', '.join(same)}"] if same else [])])
    return f"At strength {next(iter(points.values()))['strength']:+g}: {said}."


def reading_note(verticals: Mapping[str, VerticalReport]) -> str:
    """Explain the tables, and how many changes are expected by chance."""
    found = next(iter(verticals.values()))
    randoms = len(found["random"])
    intervals = sum(
        bool(point["strength"]) * (1 + len(point["figures"]))
        for one in verticals.values()
        for point in one["strengths"]
    )
    text = (
        "Changes are relative to strength 0 and paired by row, with 95 % bootstrap intervals; “no change” means that "
        f"the interval contains 0. Of these {intervals} intervals, about {max(1, round(intervals / 20))} would exclude "
        "0 by chance."
    )
    if not randoms:
        return f"{text} No random directions were measured."
    return (
        f"{text} {randoms} random direction{'s' if randoms > 1 else ''} of the same norm, at the same strength and at "
        "the opposite one if it is measured, show the effect of any shift of that size; “within random” marks a change "
        f"inside their range. Another random direction would be outside it with a probability of 1 in {randoms + 1} or "
        "more."
    )


def print_trust(console: Console, one: TrustEvaluation) -> None:
    """Print the value of every figure at strength 0, and its changes."""
    verticals = one["trust"]
    console.print(f"[bold]{one['profile']}[/] ({one['method']}), trust relative to strength 0")
    strengths = [point["strength"] for point in next(iter(verticals.values()))["strengths"] if point["strength"]]
    table = Table("vertical", "figure", "at 0", *(f"{strength:+g}" for strength in strengths))
    for name, found in verticals.items():
        for title, points in _series(found).items():
            changes = [f"{p['delta']:+.3f} {_word(p)}" for s, p in points.items() if s]
            table.add_row(name, title, f"{points[0.0]['value']:.3f}", *changes)
    console.print(table)
    for name, found in verticals.items():
        left_out = f", {found['left_out']} left out (too long or unusable)" if found["left_out"] else ""
        console.print(f"{name}: {found['rows']} rows{left_out}")
        for remark in found["remarks"]:
            console.print(f"[yellow]note:[/] {escape(remark)}")
    console.print(trust_headline(one))


def _series(
    found: VerticalReport, points: Sequence[TrustPoint] | Sequence[ControlPoint] | None = None
) -> dict[str, dict[float, Any]]:
    """The points of each figure by strength, of the profile or of `points`. The main figure comes first."""
    first, *others = found["figures"]
    points = found["strengths"] if points is None else points
    return {first: {point["strength"]: point for point in points}} | {
        name: {point["strength"]: point["figures"][name] for point in points} for name in others
    }


def _word(point: Mapping[str, Any]) -> str:
    return str(point["change"]) + ("" if point["change"] == NO_CHANGE else _beside_controls(point))


def _beside_controls(point: Mapping[str, Any]) -> str:
    return ", within random" if point.get("beyond_random") is False else ""


def _plot(name: str, found: VerticalReport) -> Callable[[Axes], None]:
    """A plot of the main figure, or of the next one that changes with strength if the main one does not."""
    series = _series(found)
    shown = next((one for one, points in series.items() if len({p["value"] for p in points.values()}) > 1), None)
    shown = shown or next(iter(series))

    def draw(ax: Axes) -> None:
        for index, control in enumerate(found["random"]):
            label = "random directions" if index == 0 else None
            _draw_line(ax, _series(found, control["strengths"])[shown], color=LIGHT, linewidth=1, label=label)
        _draw_profile(ax, series[shown])
        parts = list(found["strengths"][0]["parts"])
        if shown == next(iter(series)) and len(parts) <= len(PART_STYLES):
            for part, style in zip(parts, PART_STYLES, strict=False):
                points = {p["strength"]: p["parts"][part] for p in found["strengths"]}
                _draw_line(ax, points, color=BLUE, linestyle=style, label=part)
        figure_of = found["figures"][shown]
        if figure_of["reference"] is not None:
            label = "no skill or bias"
            ax.axhline(figure_of["reference"], color=ORANGE, linewidth=1, linestyle="--", label=label)
        ax.set_xlabel("strength", fontsize="small")
        ax.set_title(f"{name}: {AIMS[figure_of['aim']]}\n{figure_of['measure']}", fontsize="small")
        ax.figure.legend(loc="outside lower center", ncols=2, fontsize="small", frameon=False)

    return draw


def _draw_profile(ax: Axes, points: Mapping[float, Any]) -> None:
    """Draw values with a band for their intervals, and error bars for the intervals of the paired changes."""
    strengths, values = list(points), [point["value"] for point in points.values()]
    low, high = zip(*(point["value_95"] for point in points.values()), strict=True)
    ax.fill_between(strengths, low, high, color=BLUE, alpha=0.15, label="95 % of the value")
    ends = [[end - point["delta"] for end in point["delta_95"]] for point in points.values()]
    spans = [[max(-below, 0.0) for below, _ in ends], [max(above, 0.0) for _, above in ends]]
    ax.errorbar(
        strengths, values, yerr=spans, color=BLUE, marker="o", capsize=3, label="profile, bars: 95 % of the change"
    )


def _draw_line(ax: Axes, points: Mapping[float, Any], **style: Any) -> None:
    ax.plot(list(points), [point["value"] for point in points.values()], **style)


def _groups(verticals: Mapping[str, VerticalReport]) -> str:
    """The main figures by group of rows, collapsed."""
    rows = [
        [
            name,
            f"{part} ({group['rows']} rows)",
            AIMS[found["aim"]],
            {p["strength"]: p["parts"][part] for p in found["strengths"]},
        ]
        for name, found in verticals.items()
        for part, group in found["strengths"][0]["parts"].items()
    ]
    if not rows:
        return ""
    return (
        f"<details><summary>By group of rows</summary>{_change_table(['vertical', 'rows', 'better'], rows)}</details>"
    )


def _change_table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    strengths = [strength for strength in rows[0][-1] if strength]
    cells = "".join(f"<th>{html.escape(one)}</th>" for one in [*head, "at 0", *(f"{s:+g}" for s in strengths)])
    lines = []
    for *words, points in rows:
        names = "".join(f"<td>{html.escape(word)}</td>" for word in words)
        base = f"<td>{_with_interval(points[0.0], 'value', '.3f')}</td>"
        changes = [
            f'<td class="{CLASSES.get(one["change"], "")}">{_with_interval(one, "delta", "+.3f")}<br>'
            f"{html.escape(_word(one))}</td>"
            for one in (points[strength] for strength in strengths)
        ]
        lines.append(f"<tr>{names}{base}{''.join(changes)}</tr>")
    return f"<table><tr>{cells}</tr>{''.join(lines)}</table>"


def _with_interval(point: Mapping[str, Any], key: str, form: str) -> str:
    low, high = point[f"{key}_95"]
    return f"{point[key]:{form}}<br><small>{low:{form}} to {high:{form}}</small>"
