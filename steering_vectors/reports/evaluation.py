"""An evaluation as a page to look at: one HTML file with its plots inside, no network.

Owns plots and wording. Knows nothing of how anything was measured.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from steering_vectors.reports.frontier_plot import draw_frontier, frontier_sentence
from steering_vectors.reports.html import document, lead, line, plots, table
from steering_vectors.reports.trust import trust_section

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def render_report(evaluations: Sequence[dict[str, Any]]) -> str:
    """The page for one or several evaluations. Raises FitError without matplotlib."""
    names = ", ".join(one["profile"] for one in evaluations)
    return document(names, f"What steering does: {names}", "".join(map(_section, evaluations)), list(evaluations))


def _section(one: dict[str, Any]) -> str:
    title = f"{one['profile']} ({one['method']}, blocks {', '.join(map(str, one['layers']))}) on {one['model']}"
    parts = [_preferences(one)] if "strengths" in one else []
    parts += [trust_section(one)] if "trust" in one else []
    return f"<h2>{html.escape(title)}</h2>{''.join(parts)}"


def _preferences(one: dict[str, Any]) -> str:
    drawings = [lambda ax: _margins(ax, one), lambda ax: _costs(ax, one)]
    if "slopes" in one:
        drawings.append(lambda ax: _slopes(ax, one))
    if "optimum" in one["reward"]:
        drawings.append(lambda ax: draw_frontier(ax, one["profile"], one["reward"]))
    return (
        f"{lead(headline(one))}<p>{html.escape(frontier_sentence(one['reward']))}</p>"
        f"{plots(drawings)}{_table(one)}{_controls(one)}"
    )


def headline(one: dict[str, Any]) -> str:
    """What a reader should take away, in a sentence or two."""
    low, high, change = one["strengths"][0], one["strengths"][-1], margin_change(one["strengths"])
    text = (
        f"From strength {low['strength']:+g} to {high['strength']:+g} the margin of preferred over rejected responses "
        f"moves by {change:+.3g} {one['unit']}, on {one['data']['read']} held-out rows."
    )
    if one["random"]:
        others = [margin_change(control["strengths"]) for control in one["random"]]
        outside = change > max(others) or change < min(others)
        text += (
            f" {len(others)} random directions of the same norm move it by {min(others):+.3g} to {max(others):+.3g}: "
            f"the profile lies {'outside' if outside else 'within'} their range."
        )
    if "anti_steerable" in one:
        text += f" {one['anti_steerable']:.0%} of the rows move the other way."
    return text


def margin_change(points: Sequence[dict[str, Any]]) -> float:
    """How far the margin moves from the lowest strength to the highest."""
    change: float = points[-1]["margin"] - points[0]["margin"]
    return change


def _margins(ax: Axes, one: dict[str, Any]) -> None:
    for index, control in enumerate(one["random"]):
        label = "random directions" if index == 0 else None
        ax.plot(*line(control["strengths"], "margin"), color="#bbbbbb", linewidth=1, label=label)
    strengths, margins = line(one["strengths"], "margin")
    ax.plot(strengths, margins, color="#0b6e99", marker="o", label=one["profile"])
    if "margin_95" in one["strengths"][0]:
        low, high = zip(*(point["margin_95"] for point in one["strengths"]), strict=True)
        ax.fill_between(strengths, low, high, color="#0b6e99", alpha=0.15)
    for key, style in (("positive", "--"), ("negative", ":")):
        if key in one["prompting"]:
            ax.axhline(one["prompting"][key]["margin"], color="#c2571a", linestyle=style, label=f"{key} instruction")
    ax.set(xlabel="strength", ylabel=f"margin, {one['unit']}", title="Preferred over rejected")
    ax.legend(fontsize="small")


def _costs(ax: Axes, one: dict[str, Any]) -> None:
    strengths, kl = line(one["costs"], "kl")
    ax.plot(strengths, kl, color="#0b6e99", marker="o", label="KL per token")
    ax.set(xlabel="strength", ylabel="KL, nats per token", title="What it costs")
    right = ax.twinx()
    right.plot(*line(one["costs"], "perplexity"), color="#c2571a", marker="s", label="perplexity")
    right.set_ylabel("perplexity under the unsteered model")
    lines = [*ax.lines, *right.lines]
    ax.legend(lines, [str(line.get_label()) for line in lines], loc="upper center", fontsize="small")


def _slopes(ax: Axes, one: dict[str, Any]) -> None:
    ax.hist(one["slopes"], bins=30, color="#0b6e99")
    ax.axvline(0, color="#1c1c1c", linewidth=1)
    ax.set(xlabel="slope of a row's margin over strength", ylabel="rows", title="Steerability by row")


def _table(one: dict[str, Any]) -> str:
    costs = {cost["strength"]: cost for cost in one["costs"]}
    rows = [
        [
            f"{point['strength']:+g}",
            _with_interval(point, "margin"),
            _with_interval(point, "accuracy"),
            f"{costs[point['strength']]['kl']:.3f}",
            f"{costs[point['strength']]['perplexity']:.2f}",
        ]
        for point in one["strengths"]
    ]
    return table(["strength", f"margin, {one['unit']}", "accuracy", "KL per token", "perplexity"], rows)


def _controls(one: dict[str, Any]) -> str:
    rows = [
        [f"{key} instruction, no vector", _with_interval(found, "margin"), _with_interval(found, "accuracy")]
        for key in ("positive", "negative")
        if (found := one["prompting"].get(key))
    ]
    if one["random"]:
        for end in (0, -1):
            margins = [control["strengths"][end]["margin"] for control in one["random"]]
            strength = one["random"][0]["strengths"][end]["strength"]
            rows.append([f"random directions at {strength:+g}", f"{min(margins):.3f} to {max(margins):.3f}", ""])
    ratios = ", ".join(f"block {layer}: {ratio:.3f}" for layer, ratio in one["norm_ratios"].items())
    note = f"<p>{html.escape(one['prompting']['note'])}</p>" if "note" in one["prompting"] else ""
    found = table(["control", "margin", "accuracy"], rows)
    return f"{found}{note}<p>Norm of the shift at strength 1 over the residual stream's: {ratios}.</p>"


def _with_interval(point: dict[str, Any], key: str) -> str:
    interval = point.get(f"{key}_95")
    return f"{point[key]:.3f}" + (f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else "")
