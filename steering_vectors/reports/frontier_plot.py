"""Reward against KL in reports: a sentence and a plot."""

from __future__ import annotations

from typing import TYPE_CHECKING

from steering_vectors.measures.results import NotMeasured, RewardPoint, RewardReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NEAR_CHANCE = 0.6  # AUC


def frontier_sentence(reward: RewardReport | NotMeasured) -> str:
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


def _gain(point: RewardPoint, base: float) -> str:
    return f"moves by {point['reward'] - base:+.3g} for {point['kl']:.3g} nats of KL per text"


def draw_frontier(ax: Axes, name: str, reward: RewardReport) -> None:
    """Draw reward against KL: the profile at each strength, and the optimum towards high and low reward."""
    best = reward["optimum"]
    if best:
        ordered = sorted(best, key=lambda one: one["reward"])
        kl, rewards = [one["kl"] for one in ordered], [one["reward"] for one in ordered]
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
