"""Evaluations as one HTML page with plots."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from steering_vectors.measures.results import (
    Evaluation,
    MarginEstimate,
    PreferenceEvaluation,
    StrengthMargins,
    has_preferences,
    has_trust,
)
from steering_vectors.reports.frontier_plot import draw_frontier, frontier_sentence
from steering_vectors.reports.html import document, lead, line, plots, table
from steering_vectors.reports.trust import trust_section

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def render_report(evaluations: Sequence[Evaluation]) -> str:
    """Return the page for one or several evaluations. Raises FitError without matplotlib."""
    names = ", ".join(one["profile"] for one in evaluations)
    return document(names, f"What steering does: {names}", "".join(map(_section, evaluations)), list(evaluations))


def _section(one: Evaluation) -> str:
    title = f"{one['profile']} ({one['method']}, blocks {', '.join(map(str, one['layers']))}) on {one['model']}"
    parts = [_preferences(one)] if has_preferences(one) else []
    parts += [trust_section(one)] if has_trust(one) else []
    return f"<h2>{html.escape(title)}</h2>{''.join(parts)}"


def _preferences(one: PreferenceEvaluation) -> str:
    drawings = [lambda ax: _margins(ax, one), lambda ax: _costs(ax, one)]
    if "slopes" in one:
        drawings.append(lambda ax: _slopes(ax, one["slopes"]))
    reward = one["reward"]
    if "note" not in reward:
        drawings.append(lambda ax: draw_frontier(ax, one["profile"], reward))
    return (
        f"{lead(headline(one))}<p>{html.escape(frontier_sentence(one['reward']))}</p>"
        f"{plots(drawings)}{_table(one)}{_controls(one)}"
    )


def headline(one: PreferenceEvaluation) -> str:
    """Describe the main result in a sentence or two."""
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
            f"the profile is {'outside' if outside else 'within'} their range."
        )
    if "anti_steerable" in one:
        text += f" {one['anti_steerable']:.0%} of the rows move in the other direction."
    return text


def margin_change(points: Sequence[StrengthMargins]) -> float:
    """The change of the margin from the lowest strength to the highest."""
    return points[-1]["margin"] - points[0]["margin"]


def prompting_estimates(one: PreferenceEvaluation) -> list[tuple[str, MarginEstimate]]:
    """The measured estimates of the prompting baseline, by sign."""
    found = (("positive", one["prompting"].get("positive")), ("negative", one["prompting"].get("negative")))
    return [(sign, estimate) for sign, estimate in found if estimate is not None]


def _margins(ax: Axes, one: PreferenceEvaluation) -> None:
    for index, control in enumerate(one["random"]):
        label = "random directions" if index == 0 else None
        ax.plot(*line(control["strengths"], "margin"), color="#bbbbbb", linewidth=1, label=label)
    strengths, margins = line(one["strengths"], "margin")
    ax.plot(strengths, margins, color="#0b6e99", marker="o", label=one["profile"])
    if "margin_95" in one["strengths"][0]:
        low, high = zip(*(point["margin_95"] for point in one["strengths"]), strict=True)
        ax.fill_between(strengths, low, high, color="#0b6e99", alpha=0.15)
    for (sign, found), style in zip(prompting_estimates(one), ("--", ":"), strict=False):
        ax.axhline(found["margin"], color="#c2571a", linestyle=style, label=f"{sign} instruction")
    ax.set(xlabel="strength", ylabel=f"margin, {one['unit']}", title="Preferred over rejected")
    ax.legend(fontsize="small")


def _costs(ax: Axes, one: PreferenceEvaluation) -> None:
    strengths, kl = line(one["costs"], "kl")
    ax.plot(strengths, kl, color="#0b6e99", marker="o", label="KL per token")
    ax.set(xlabel="strength", ylabel="KL, nats per token", title="Cost")
    right = ax.twinx()
    right.plot(*line(one["costs"], "perplexity"), color="#c2571a", marker="s", label="perplexity")
    right.set_ylabel("perplexity under the unsteered model")
    lines = [*ax.lines, *right.lines]
    ax.legend(lines, [str(line.get_label()) for line in lines], loc="upper center", fontsize="small")


def _slopes(ax: Axes, slopes: Sequence[float]) -> None:
    ax.hist(slopes, bins=30, color="#0b6e99")
    ax.axvline(0, color="#1c1c1c", linewidth=1)
    ax.set(xlabel="slope of a row's margin over strength", ylabel="rows", title="Steerability by row")


def _table(one: PreferenceEvaluation) -> str:
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


def _controls(one: PreferenceEvaluation) -> str:
    rows = [
        [f"{sign} instruction, no vector", _with_interval(found, "margin"), _with_interval(found, "accuracy")]
        for sign, found in prompting_estimates(one)
    ]
    if one["random"]:
        for end in (0, -1):
            margins = [control["strengths"][end]["margin"] for control in one["random"]]
            strength = one["random"][0]["strengths"][end]["strength"]
            rows.append([f"random directions at {strength:+g}", f"{min(margins):.3f} to {max(margins):.3f}", ""])
    ratios = ", ".join(f"block {layer}: {ratio:.3f}" for layer, ratio in one["norm_ratios"].items())
    note = f"<p>{html.escape(one['prompting']['note'])}</p>" if "note" in one["prompting"] else ""
    found = table(["control", "margin", "accuracy"], rows)
    return f"{found}{note}<p>Norm of the shift at strength 1, relative to the residual stream: {ratios}.</p>"


def _with_interval(point: MarginEstimate, key: Literal["margin", "accuracy"]) -> str:
    interval = point.get("margin_95") if key == "margin" else point.get("accuracy_95")
    return f"{point[key]:.3f}" + (f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else "")
