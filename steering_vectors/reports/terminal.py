"""Terminal output of the commands: progress bars on stderr, summaries and tables on stdout."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from steering_vectors import progress
from steering_vectors.measures.results import Evaluation, PreferenceEvaluation, has_preferences, has_trust
from steering_vectors.profiles.metadata import Calibration, LongTextCheck, Metrics, range_text
from steering_vectors.reports.evaluation import frontier_sentence, margin_change, prompting_estimates
from steering_vectors.reports.text_check import check_sentences
from steering_vectors.reports.trust import print_trust

if TYPE_CHECKING:
    from steering_vectors.profiles.gate import Gate
    from steering_vectors.profiles.profile import Profile

STAGES = {
    "capture": "reading activations",
    "layers": "choosing layers",
    "calibrate": "calibrating the unit",
    "curve": "measuring the safe range",
    "texts": "checking long texts",
    "contrast": "reading under instructions",
    "evaluate": "evaluating",
    "trust": "measuring trust",
    "reward": "sampling for reward",
    "answers": "writing answers",
    "judge": "judging",
    "evaluation answers": "writing answers with the profile",
    "evaluation judge": "judging the profile",
    "rounds": "rounds",
}


@contextmanager
def progress_on_stderr(*, quiet: bool) -> Iterator[progress.Progress | None]:
    """Show a progress bar per stage on stderr while the context lasts, or lines if stderr is no terminal; yields None
    if `quiet`."""
    if quiet:
        yield None
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield progress.ProgressLines(lambda line: print(line, file=sys.stderr, flush=True), STAGES)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[detail]}"),
    )
    bars, tasks = Progress(*columns, console=console), dict[str, Any]()

    def show(stage: str, done: int, total: int, /, detail: str = "") -> None:
        if stage not in tasks:
            bars.start()  # not earlier, so that an early error prints no empty bar
            tasks[stage] = bars.add_task(STAGES.get(stage, stage), total=total, detail="")
        bars.update(tasks[stage], completed=done, total=total, detail=detail)

    try:
        yield show
    finally:
        if bars.live.is_started:
            bars.stop()


def print_fit(profile: Profile, path: Path) -> None:
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"[bold]{profile.name}[/] → {escape(str(path))}")
    console.print(f"method {profile.method}, layers {', '.join(map(str, profile.layers))}, unit {profile.unit:.4g}")
    console.print(f"{_cost_line(profile.calibration)}; safe range {range_text(profile.safe_range)}")
    if check := profile.calibration.get("long_texts"):
        _print_check(console, check, profile.safe_range)
    _print_gate(console, profile.gate)
    _print_propensity(console, profile.metrics)
    print_notes(console, _notes_of(profile))
    console.print(f"Show everything: trimtab show {escape(str(path))}")


def print_profile(profile: Profile, path: Path) -> None:
    """Print everything about a profile except its vectors."""
    console = Console(highlight=False, soft_wrap=True)
    model = profile.model
    console.print(f"[bold]{profile.name}[/]  {escape(str(path))}")
    console.print(f"version {profile.version}, made {profile.created_at} by trimtab {profile.trimtab_version}")
    if profile.description:
        console.print(escape(profile.description))
    console.print(
        f"model {escape(model.id)}: {model.architecture}, {model.num_layers} blocks of {model.hidden_size}, "
        f"fingerprint {model.fingerprint}"
    )
    console.print(f"chat template {profile.chat_template_sha256 or 'none'}")
    console.print(
        f"operator {profile.operator}, apply to {profile.apply_to}, layering {profile.layering}, "
        f"strengths {range_text(profile.safe_range)}"
    )
    console.print(f"method {profile.method}{_listed(profile.method_options)}")
    console.print(f"data{_listed(profile.data)}")
    console.print(_cost_line(profile.calibration))
    curve = profile.calibration.get("curve", [])
    shown = ("curve", "long_texts", "notes")
    rest = {key: value for key, value in profile.calibration.items() if key not in shown}
    console.print(f"calibration{_listed(rest)}")
    if curve:
        table = Table("strength", "KL per token", "perplexity")
        for point in curve:
            table.add_row(f"{point['strength']:+g}", f"{point['kl']:.3f}", f"{point['perplexity']:.2f}")
        console.print(table)
    if check := profile.calibration.get("long_texts"):
        _print_check(console, check, profile.safe_range)
        console.print(_check_table(check))
        console.print(_position_table(check))
    console.print(_layer_table(profile))
    _print_gate(console, profile.gate)
    _print_quality(console, profile.metrics)
    _print_propensity(console, profile.metrics)
    if choice := profile.metrics.get("layer_choice"):
        console.print(f"layer choice by {choice['criterion']}: {_ranked(choice['scores'])}")
        if sampled := choice.get("sampled"):
            console.print(f"of these, by the texts they write: {_ranked(sampled)}")
    print_notes(console, _notes_of(profile))


def _print_check(console: Console, check: LongTextCheck, safe_range: tuple[float, float]) -> None:
    for sentence in check_sentences(check, safe_range):
        console.print(escape(sentence))


def _check_table(check: LongTextCheck) -> Table:
    """Endings, repetition and costs of long texts by strength."""
    table = Table("strength", "ended", "repeating", "KL per token", "perplexity", "‖shift‖/‖h‖")
    for point in check["points"]:
        table.add_row(
            f"{point['strength']:+g}",
            f"{point['ended']:.0%}",
            f"{point['repeating']:.0%}",
            f"{point['kl']:.3f}",
            f"{point['perplexity']:.2f}",
            f"{point['shift_ratio']:.3f}",
        )
    return table


def _position_table(check: LongTextCheck) -> Table:
    """KL and perplexity of long texts by strength and position."""
    spans = sorted({(one["start"], one["end"]) for point in check["points"] for one in point["positions"]})
    table = Table("KL, perplexity", *(f"tokens {start + 1} to {end}" for start, end in spans))
    for point in check["points"]:
        at = {(one["start"], one["end"]): f"{one['kl']:.3f}, {one['perplexity']:.1f}" for one in point["positions"]}
        table.add_row(f"{point['strength']:+g}", *(at.get(span, "") for span in spans))
    return table


def _print_gate(console: Console, gate: Gate | None) -> None:
    if gate is None:
        return
    line = f"gate: steers prompts whose similarity at block {gate.layer} is {gate.side} {gate.threshold:.3g}"
    found = gate.metrics
    if "f1_heldout" in found:
        line += f" (F1 {found['f1_train']:.2f} on its training prompts, {found['f1_heldout']:.2f} on held-out ones)"
    console.print(line)


def _ranked(scores: Mapping[str, float]) -> str:
    ranked = sorted(scores.items(), key=lambda item: -item[1])
    return ", ".join(f"{window}: {score:.4g}" for window, score in ranked)


def _cost_line(calibration: Calibration) -> str:
    if "kl_at_1" not in calibration:
        return "not calibrated: strength 1 adds the unscaled direction"
    line = f"strength 1 costs {calibration['kl_at_1']:.3g} nats of KL per token"
    if (per_character := calibration.get("kl_per_character")) is not None:
        line += f", {per_character:.3g} per character"
    return line + f" (budget {calibration['kl_budget']:g} per token)"


def print_evaluation(one: Evaluation) -> None:
    """Print the figures and controls of every suite in an evaluation."""
    console = Console(highlight=False, soft_wrap=True)
    if has_preferences(one):
        _print_preferences(console, one)
    if has_trust(one):
        print_trust(console, one)


def _print_preferences(console: Console, one: PreferenceEvaluation) -> None:
    console.print(f"[bold]{one['profile']}[/] ({one['method']}), {one['data']['read']} held-out rows")
    table = Table("strength", f"margin ({one['unit']})", "accuracy", "KL per token", "perplexity")
    for point, cost in zip(one["strengths"], one["costs"], strict=True):
        table.add_row(
            f"{point['strength']:+g}",
            f"{point['margin']:.3f}",
            f"{point['accuracy']:.3f}",
            f"{cost['kl']:.3f}",
            f"{cost['perplexity']:.2f}",
        )
    console.print(table)
    if "steerability" in one:
        low, high = one["steerability_95"]
        console.print(
            f"steerability {one['steerability']:.3f} per unit of strength (95 %: {low:.3f} to {high:.3f}); "
            f"{one['anti_steerable']:.0%} of the rows move in the other direction"
        )
    if one["random"]:
        moves = [margin_change(control["strengths"]) for control in one["random"]]
        own = margin_change(one["strengths"])
        console.print(
            f"lowest to highest strength: {own:+.3f}; random directions {min(moves):+.3f} to {max(moves):+.3f}"
        )
    for sign, found in prompting_estimates(one):
        console.print(f"{sign} instruction instead: margin {found['margin']:.3f}, accuracy {found['accuracy']:.3f}")
    if "note" in one["prompting"]:
        print_notes(console, [one["prompting"]["note"]])
    console.print(escape(frontier_sentence(one["reward"])))
    print_notes(console, one["data"]["notes"])


def _layer_table(profile: Profile) -> Table:
    """Norms of the direction, of the shift at strength 1 and of the residual stream, by block."""
    accuracies = profile.metrics.get("projection_accuracy", {})
    table = Table("layer", "‖d‖", "‖shift at 1‖", "median ‖h‖", "ratio", "held-out accuracy")
    for layer, shift in profile.shift_norms().items():
        residual = profile.residual_norms.get(layer)
        table.add_row(
            str(layer),
            f"{float(profile.directions[layer].norm()):.4g}",
            f"{shift:.4g}",
            f"{residual:.4g}" if residual else "",
            f"{shift / residual:.3f}" if residual else "",
            f"{accuracies[str(layer)]:.3f}" if str(layer) in accuracies else "",
        )
    return table


def _print_quality(console: Console, metrics: Metrics) -> None:
    if not (quality := metrics.get("data_quality")):
        return
    length = quality["length"]
    console.print(
        f"{quality['rows']} training rows at block {quality['layer']}: agreement {quality['agreement']:.3f} "
        f"({quality['significance']:.1f} standard deviations above random labels), reproducibility "
        f"{quality['reproducibility']:.3f}, separation {quality['separation']:.2f}"
    )
    console.print(
        f"length: preferred responses have more tokens in {length['longer_tokens']:.0%} of pairs and more characters "
        f"in {length['longer_characters']:.0%}; within a side, its correlation with the projection is "
        f"{length['correlation']:.2f}, which explains {length['explained']:.0%} of the distance"
    )


def _print_propensity(console: Console, metrics: Metrics) -> None:
    report = metrics.get("propensity")
    if not report:
        return
    table = Table("strength", f"margin ({report['unit']})", "accuracy")
    for one in report["strengths"]:
        table.add_row(f"{one['strength']:+g}", f"{one['margin']:.3f}", f"{one['accuracy']:.3f}")
    console.print(f"preferred over rejected, on {report['rows']} held-out rows:")
    console.print(table)
    if "anti_steerable" in report:
        console.print(f"{report['anti_steerable']:.0%} of these rows move in the other direction")


def _notes_of(profile: Profile) -> Iterable[str]:
    """The notes of a profile's fit and of its calibration."""
    return dict.fromkeys((*profile.metrics.get("notes", ()), *profile.calibration.get("notes", ())))


def print_notes(console: Console, notes: Iterable[str]) -> None:
    for note in notes:
        console.print(f"[yellow]note:[/] {escape(note)}")


def _listed(values: Mapping[str, object]) -> str:
    text = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in values.items())
    return escape(f": {text}") if text else ""
