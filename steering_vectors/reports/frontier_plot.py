"""How reward against divergence is shown: a sentence and a drawing.

Owns wording and layout. Knows nothing of how anything was measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NEAR_CHANCE = 0.6  # of the area under a scorer's curve


def frontier_sentence(reward: Mapping[str, Any]) -> str:
    """What the profile gains for its cost, against the best that the samples show, and how far to trust the scorer."""
    if "note" in reward:
        return f"Reward against KL was not measured: {reward['note']}."
    scorer, points = reward["scorer"], reward["strengths"]
    base = next(one["reward"] for one in points if one["strength"] == 0)
    told = [f"At strength {points[-1]['strength']:+g} the reward ({scorer['name']}) {_gain(points[-1], base)}"]
    if compared := [one for one in points if one["share"] is not None]:
        best = compared[-1]
        where = "" if best is points[-1] else f"; at {best['strength']:+g} it {_gain(best, base)}"
        told[0] += f"{where}, where the KL-regularised optimum moves it by {best['optimum'] - base:+.3g}"
        told[0] += f" ({best['share']:.0%} of that)."
    else:
        told[0] += f"; what the optimum gains there, {reward['samples_per_prompt']} samples per prompt do not show."
    trust = "." if scorer["auc"] >= NEAR_CHANCE else ": hardly better than chance, so read little into it."
    tested = f"on {scorer['tested_texts']} held-out responses its AUC is {scorer['auc']:.2f}"
    told.append(f"It is in {scorer['unit']}; {tested}{trust}")
    return " ".join(told)


def _gain(point: Mapping[str, Any], base: float) -> str:
    return f"moves by {point['reward'] - base:+.3g} for {point['kl']:.3g} nats of KL per text"


def draw_frontier(ax: Axes, name: str, reward: Mapping[str, Any]) -> None:
    """Reward against KL: the profile at every strength, and the optimum's frontier towards high and low reward."""
    best = reward["optimum"]
    if best:
        points = sorted(best, key=lambda one: one["reward"])
        kl, rewards = ([one[key] for one in points] for key in ("kl", "reward"))
        ax.plot(kl, rewards, color="#777777", linewidth=1, label="KL-regularised optimum")
    ax.axvline(reward["kl_limit"], color="#777777", linestyle=":", linewidth=1, label="log of the samples")
    points = reward["strengths"]
    low, high = ([abs(one["reward_95"][end] - one["reward"]) for one in points] for end in (0, 1))
    ax.errorbar(
        [one["kl"] for one in points], [one["reward"] for one in points], [low, high],
        color="#0b6e99", marker="o", capsize=3, label=name,
    )  # fmt: skip
    for one in points:
        place = (one["kl"], one["reward"])
        ax.annotate(f"{one['strength']:+g}", place, textcoords="offset points", xytext=(5, 5), fontsize="small")
    ax.set(xlabel="KL, nats per text", ylabel=f"reward, {reward['scorer']['unit']}", title="Reward against KL")
    ax.legend(fontsize="small")
