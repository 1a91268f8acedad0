"""Evaluations as one HTML page with plots."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from steering_vectors.measures import results
from steering_vectors.reports.html import BLUE, GREY, LIGHT, ORANGE, document, draw_costs, lead, line, plots, table
from steering_vectors.reports.trust import trust_section

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NEAR_CHANCE = 0.6  # AUC


def render_report(evaluations: Sequence[results.Evaluation]) -> str:
    """Return the page for one or several evaluations. Raises FitError without matplotlib."""
    names = ", ".join(one["profile"] for one in evaluations)
    return document(names, f"What steering does: {names}", "".join(map(_section, evaluations)), list(evaluations))


def _section(one: results.Evaluation) -> str:
    title = f"{one['profile']} ({one['method']}, blocks {', '.join(map(str, one['layers']))}) on {one['model']}"
    parts = [_preferences(one)] if results.has_preferences(one) else []
    parts += [trust_section(one)] if results.has_trust(one) else []
    return f"<h2>{html.escape(title)}</h2>{''.join(parts)}"


def _preferences(one: results.PreferenceEvaluation) -> str:
    drawings = [lambda ax: _margins(ax, one), lambda ax: draw_costs(ax, one["costs"], "Cost")]
    if "slopes" in one:
        drawings.append(lambda ax: _slopes(ax, one["slopes"]))
    reward = one["reward"]
    if "note" not in reward:
        drawings.append(lambda ax: _frontier(ax, one["profile"], reward))
    notes = "".join(f"<p>Note: {html.escape(note)}.</p>" for note in one["data"]["notes"])
    return (
        f"{lead(headline(one))}<p>{html.escape(frontier_sentence(one['reward']))}</p>"
        f"{plots(drawings)}{_table(one)}{_controls(one)}{notes}"
    )


def headline(one: results.PreferenceEvaluation) -> str:
    """Describe the main result in a sentence or two."""
    low, high, change = one["strengths"][0], one["strengths"][-1], margin_change(one["strengths"])
    text = (
        f"From strength {low['strength']:+g} to {high['strength']:+g} the margin of preferred over rejected responses "
        f"moves by {change:+.3g} {one['unit']}, on {one['data']['read']} held-out rows."
    )
    if one["random"]:
        others = [margin_change(control["strengths"]) for control in one["random"]]
        within = min(others) <= change <= max(others)
        text += (
            f" {len(others)} random directions of the same norm move it by {min(others):+.3g} to {max(others):+.3g}: "
            f"the profile is {'within' if within else 'outside'} their range."
        )
    if "anti_steerable" in one:
        text += f" {one['anti_steerable']:.0%} of the rows move in the other direction."
    return text


def margin_change(points: Sequence[results.StrengthMargins]) -> float:
    """The change of the margin from the lowest strength to the highest."""
    return points[-1]["margin"] - points[0]["margin"]


def prompting_estimates(
    one: results.PreferenceEvaluation | results.MethodComparison,
) -> list[tuple[str, results.MarginEstimate]]:
    """The measured estimates of the prompting baseline, by sign."""
    found = (("positive", one["prompting"].get("positive")), ("negative", one["prompting"].get("negative")))
    return [(sign, estimate) for sign, estimate in found if estimate is not None]


def _margins(ax: Axes, one: results.PreferenceEvaluation) -> None:
    for index, control in enumerate(one["random"]):
        label = "random directions" if index == 0 else None
        ax.plot(*line(control["strengths"], "margin"), color=LIGHT, linewidth=1, label=label)
    strengths, margins = line(one["strengths"], "margin")
    ax.plot(strengths, margins, color=BLUE, marker="o", label=one["profile"])
    if "margin_95" in one["strengths"][0]:
        low, high = zip(*(point["margin_95"] for point in one["strengths"]), strict=True)
        ax.fill_between(strengths, low, high, color=BLUE, alpha=0.15)
    for (sign, found), style in zip(prompting_estimates(one), ("--", ":"), strict=False):
        ax.axhline(found["margin"], color=ORANGE, linestyle=style, label=f"{sign} instruction")
    ax.set(xlabel="strength", ylabel=f"margin, {one['unit']}", title="Preferred over rejected")
    ax.legend(fontsize="small")


def _slopes(ax: Axes, slopes: Sequence[float]) -> None:
    ax.hist(slopes, bins=30, color=BLUE)
    ax.axvline(0, color="#1c1c1c", linewidth=1)
    ax.set(xlabel="slope of a row's margin over strength", ylabel="rows", title="Steerability by row")


def frontier_sentence(reward: results.RewardReport | results.NotMeasured) -> str:
    """Describe the profile's gain for its cost, the optimum that the samples show, and the quality of the reward."""
    if "note" in reward:
        return f"Reward against KL was not measured: {reward['note']}."
    scorer, points = reward["scorer"], reward["strengths"]
    base = next(one["reward"] for one in points if one["strength"] == 0)
    said = [f"At strength {points[-1]['strength']:+g} the reward ({scorer['name']}) {_gain(points[-1], base)}"]
    compared = [
        (one, one["optimum"], one["share"]) for one in points if one["optimum"] is not None and one["share"] is not None
    ]
    if compared:
        point, best, share = compared[-1]
        where = "" if point is points[-1] else f"; at {point['strength']:+g} it {_gain(point, base)}"
        said[0] += f"{where}, where the KL-regularised optimum moves it by {best - base:+.3g} ({share:.0%} of that)."
    else:
        said[0] += f"; {reward['samples_per_prompt']} samples per prompt do not show the optimum's gain there."
    trust = "." if scorer["auc"] >= NEAR_CHANCE else ", hardly better than chance, so it is not reliable."
    tested = f"on {scorer['tested_texts']} held-out responses its AUC is {scorer['auc']:.2f}"
    said.append(f"The reward is in {scorer['unit']}; {tested}{trust}")
    return " ".join(said)


def _gain(point: results.RewardPoint, base: float) -> str:
    return f"moves by {point['reward'] - base:+.3g} for {point['kl']:.3g} nats of KL per text"


def _frontier(ax: Axes, name: str, reward: results.RewardReport) -> None:
    if reward["optimum"]:
        ordered = sorted(reward["optimum"], key=lambda one: one["reward"])
        ax.plot(*line(ordered, "reward", "kl"), color=GREY, linewidth=1, label="KL-regularised optimum")
    ax.axvline(reward["kl_limit"], color=GREY, linestyle=":", linewidth=1, label="log of the samples")
    points = reward["strengths"]
    low, high = ([abs(one["reward_95"][end] - one["reward"]) for one in points] for end in (0, 1))
    ax.errorbar(*line(points, "reward", "kl"), [low, high], color=BLUE, marker="o", capsize=3, label=name)
    for one in points:
        place = (one["kl"], one["reward"])
        ax.annotate(f"{one['strength']:+g}", place, textcoords="offset points", xytext=(5, 5), fontsize="small")
    ax.set(xlabel="KL, nats per text", ylabel=f"reward, {reward['scorer']['unit']}", title="Reward against KL")
    ax.legend(fontsize="small")


def _table(one: results.PreferenceEvaluation) -> str:
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


def _controls(one: results.PreferenceEvaluation) -> str:
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


def _with_interval(point: results.MarginEstimate, key: Literal["margin", "accuracy"]) -> str:
    interval = point.get("margin_95") if key == "margin" else point.get("accuracy_95")
    return f"{point[key]:.3f}" + (f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else "")
