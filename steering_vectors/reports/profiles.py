"""Profiles as one HTML page: their shifts, their cost, and their similarity."""

from __future__ import annotations

import html
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

import torch

from steering_vectors.profiles.files import profile_summary
from steering_vectors.profiles.metadata import PropensityReport, range_text
from steering_vectors.profiles.profile import Profile
from steering_vectors.reports.html import BLUE, ORANGE, document, draw_costs, lead, line, plots, table
from steering_vectors.reports.text_check import check_sentences

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_LABELLED = 12  # cells per side that can show their values
PLOTTED = ("metrics", "direction_norms", "residual_norms")


def render_portraits(profiles: Sequence[Profile]) -> str:
    """Return the page for one or several profiles. Raises FitError without matplotlib."""
    labels = labelled(profiles)
    names = ", ".join(labels)
    body = "".join(_section(label, profile) for label, profile in labels.items())
    if len(labels) > 1:
        body += _comparison(labels)
    return document(names, f"Profiles: {names}", body, [profile_summary(profile) for profile in profiles])


def labelled(profiles: Sequence[Profile]) -> dict[str, Profile]:
    """The profiles by unique labels: the name, with the start of the version if names are equal."""
    counts = Counter(profile.name for profile in profiles)
    labels: dict[str, Profile] = {}
    for number, profile in enumerate(profiles, start=1):
        label = profile.name if counts[profile.name] == 1 else f"{profile.name}#{profile.version[:8] or number}"
        labels[label if label not in labels else f"{label} ({number})"] = profile
    return labels


def headline(profile: Profile) -> str:
    """Describe a profile, its cost and its safe range in a sentence."""
    blocks = "block" if len(profile.layers) == 1 else "blocks"
    verb = "removes" if profile.operator == "ablate" else "adds"
    where = "everywhere" if profile.apply_to == "all" else "from the last prompt token on"
    cost = "it is not calibrated, so the cost of strength 1 is unknown"
    if (kl := profile.calibration.get("kl_at_1")) is not None:
        cost = f"strength 1 costs {kl:.3g} nats of KL per token"
    return (
        f"{profile.name} ({profile.method}) {verb} its direction at {blocks} {', '.join(map(str, profile.layers))} of "
        f"{profile.model.id}, {where}; {cost}, and {_range(profile)}."
    )


def _range(profile: Profile) -> str:
    if not profile.calibration.get("curve"):
        return f"strengths of {range_text(profile.safe_range)} are allowed, but the range was not measured"
    bound = profile.calibration.get("perplexity_bound")
    within = f" (perplexity within {bound:g} times the unsteered)" if bound else ""
    return f"strengths of {range_text(profile.safe_range)} are safe{within}"


def block_cosines(profile: Profile) -> torch.Tensor:
    """Cosines between the stored directions of the profile's blocks, float64 `[layers, layers]`."""
    units = torch.stack([_unit(profile.directions[layer]) for layer in profile.layers])
    return units @ units.T


def common_cosines(one: Profile, other: Profile) -> dict[int, float]:
    """Cosines between the stored directions of two profiles at their common blocks; empty for different models."""
    if one.model.fingerprint != other.model.fingerprint:
        return {}
    common = sorted(set(one.layers) & set(other.layers))
    return {layer: float(_unit(one.directions[layer]) @ _unit(other.directions[layer])) for layer in common}


def _unit(direction: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(direction.double(), dim=0)


def _section(label: str, profile: Profile) -> str:
    check = profile.calibration.get("long_texts")
    found = check_sentences(check, profile.safe_range) if check else ()
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in (*found, *profile.metrics.get("notes", ())))
    return (
        f"<h2>{html.escape(label)}</h2>{lead(headline(profile))}"
        f"{plots(list(_drawings(profile)))}{f'<ul>{notes}</ul>' if notes else ''}"
        f"{table([], _facts(profile), style='facts')}"
    )


def _drawings(profile: Profile) -> Iterator[Callable[[Axes], None]]:
    yield lambda ax: _norms(ax, profile)
    if len(profile.layers) > 1:
        names = [str(layer) for layer in profile.layers]
        yield lambda ax: _heat(ax, block_cosines(profile).tolist(), names, "Cosine between blocks", "block")
    if curve := profile.calibration.get("curve"):
        budget = profile.calibration.get("kl_budget")
        yield lambda ax: draw_costs(ax, curve, "Cost of strength", budget=budget, safe_range=profile.safe_range)
    if profile.metrics.get("propensity"):
        yield lambda ax: _propensity(ax, profile.metrics["propensity"])


def _norms(ax: Axes, profile: Profile) -> None:
    shifts = profile.shift_norms()
    ax.bar([str(layer) for layer in shifts], list(shifts.values()), color=BLUE, width=0.6)
    ax.margins(x=max(0.05, 0.5 - 0.1 * len(shifts)))
    ax.set(xlabel="block", ylabel="norm", title="Shift at strength 1")
    ratios = {layer: shifts[layer] / norm for layer in shifts if (norm := profile.residual_norms.get(layer))}
    if not ratios:
        return
    right = ax.twinx()
    right.plot([str(layer) for layer in ratios], list(ratios.values()), color=ORANGE, marker="o", linestyle="--")
    right.set_ylabel("share of the residual stream's norm", color=ORANGE)
    right.set_ylim(bottom=0)


def _propensity(ax: Axes, report: PropensityReport) -> None:
    ax.plot(*line(report["strengths"], "margin"), color=BLUE, marker="o")
    for one in report["strengths"]:
        place = (one["strength"], one["margin"])
        ax.annotate(f"{one['accuracy']:.0%}", place, textcoords="offset points", xytext=(4, 6))
    ax.margins(0.15)
    title = f"Preferred over rejected, {report['rows']} held-out rows"
    ax.set(xlabel="strength (and accuracy)", ylabel=f"margin, {report['unit']}", title=title)


def _heat(ax: Axes, values: Sequence[Sequence[float]], names: Sequence[str], title: str, axis: str) -> None:
    """A square of cosines, drawn as a mesh so that the SVG holds no image."""
    mesh = ax.pcolormesh(values, cmap="RdBu_r", vmin=-1, vmax=1)
    ticks = [place + 0.5 for place in range(len(names))]
    ax.set(title=title, xlabel=axis, ylabel=axis, aspect="equal")
    ax.set_xticks(ticks, names, rotation=0 if max(map(len, names)) < 4 else 30)
    ax.set_yticks(ticks, names)
    ax.invert_yaxis()
    if len(names) > MAX_LABELLED:
        ax.figure.colorbar(mesh, ax=ax)
        return
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            if not math.isnan(value):
                colour = "white" if abs(value) > 0.6 else "black"
                ax.text(j + 0.5, i + 0.5, f"{value:.2f}", ha="center", va="center", color=colour, fontsize="small")


def _comparison(labels: Mapping[str, Profile]) -> str:
    """The similarity of profiles that belong to the same model and share blocks."""
    means: dict[tuple[str, str], float] = {}
    rows, remarks = [], []
    for one, other in combinations(labels, 2):
        if found := common_cosines(labels[one], labels[other]):
            means[one, other] = means[other, one] = sum(found.values()) / len(found)
            by_block = ", ".join(f"block {layer}: {value:+.3f}" for layer, value in found.items())
            rows.append([f"{one} and {other}", f"{means[one, other]:+.3f}", by_block])
        elif labels[one].model.fingerprint != labels[other].model.fingerprint:
            remarks.append(f"{one} and {other} belong to different models, so their directions cannot be compared.")
        else:
            remarks.append(f"{one} and {other} have no block in common.")
    square = [[1.0 if one == other else means.get((one, other), math.nan) for other in labels] for one in labels]
    drawn = plots([lambda ax: _heat(ax, square, list(labels), "Mean cosine", "")])
    body = f"{drawn}{table(['profiles', 'mean cosine', 'at common blocks'], rows)}" if rows else ""
    return f"<h2>Between profiles</h2>{body}" + "".join(f"<p>{html.escape(remark)}</p>" for remark in remarks)


def _facts(profile: Profile) -> list[list[str]]:
    """The metadata, one row per field."""
    facts: dict[str, Any] = {
        key: value
        for key, value in profile_summary(profile).items()
        if key not in PLOTTED and value not in ("", {}, None)
    }
    if quality := profile.metrics.get("data_quality"):
        facts["data_quality"] = quality
    if "calibration" in facts:
        shown_elsewhere = ("curve", "long_texts")
        facts["calibration"] = {key: value for key, value in facts["calibration"].items() if key not in shown_elsewhere}
    return [[key.replace("_", " "), _shown(value)] for key, value in facts.items()]


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key.replace('_', ' ')} {_shown(one)}" for key, one in value.items())
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)
