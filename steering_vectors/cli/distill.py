"""`trimtab distill`, `trimtab distill-method` and `trimtab bake`: profiles as weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import steering_vectors
from steering_vectors.cli import flags
from steering_vectors.errors import FitError
from steering_vectors.reports.terminal import print_notes, progress_on_stderr

Adapter = Annotated[Path, flags.in_output(help="The folder to write the adapter to.")]
Strength = Annotated[float, typer.Option(help="The strength to turn into weights.")]


@dataclass(frozen=True, slots=True)
class TrainingFlags:
    steps: Annotated[int | None, flags.in_training(help="Training steps; the paper's number by default.")] = None
    batch: Annotated[int | None, flags.in_training(help="Responses per step; the paper's number by default.")] = None
    learning_rate: Annotated[
        float | None, flags.in_training(help="The peak learning rate of AdamW; the paper's by default.")
    ] = None
    rank: Annotated[int, flags.in_training(help="The rank of the LoRA; its alpha is twice that.")] = 8
    targets: Annotated[
        str, flags.in_training(help="Modules of the LoRA, comma-separated, or all-linear; peft's choice if empty.")
    ] = ""

    def settings(self, method: str, seed: int) -> steering_vectors.DistillSettings:
        given = {name: value for name, value in asdict(self).items() if value is not None}
        return steering_vectors.paper_settings(method, **given, alpha=2 * self.rank, seed=seed)


def distill(
    profile: flags.ProfileName,
    model: flags.Model,
    data: flags.Data,
    out: Adapter,
    training: TrainingFlags,
    strength: Strength = 1.0,
    seed: flags.Seed = 0,
    profiles: flags.Profiles = Path("profiles"),
    as_json: flags.AsJson = False,
) -> None:
    """Fit a LoRA to a profile's shift, on the responses of preference data."""
    flags.check_empty(out)
    (stored,) = flags.load_profiles([profile], profiles)
    settings = training.settings("rahf-scit", seed)
    pairs, lm, skip = data.load(), model.load(), data.skip_long_rows
    with progress_on_stderr(quiet=as_json) as progress:
        found = steering_vectors.distill(
            lm, stored, pairs, out, settings, strength=strength, skip_long_rows=skip, progress=progress
        )
    source = {"profile": stored.name, "version": stored.version}
    _print_made({"adapter": str(out), **source, **_figures(found)}, as_json, found.notes)


def distill_method(
    method: Annotated[str, typer.Argument(help="The method: rahf-scit or rahf-dual.")],
    model: flags.Model,
    data: flags.Data,
    out: Adapter,
    *,
    goal: Annotated[
        str, flags.in_method(help="Use the default instructions of this goal, as of a profile's name.")
    ] = "",
    option: flags.MethodOptions = None,
    layers: Annotated[
        str, flags.in_method(help="The target blocks: 12, 10-20 or 3,5,7; the middle ones if empty.")
    ] = "",
    strength: Annotated[float, flags.in_method(help="The factor α of the difference per token.")] = 5.0,
    training: TrainingFlags,
    seed: flags.Seed = 0,
    as_json: flags.AsJson = False,
) -> None:
    """Fit a LoRA to a method's difference per token, as RAHF does.

    The method's first step tunes the model, or takes its weights from the cache of `trimtab fit`.
    """
    from steering_vectors.fitting.layers import parse_layers

    flags.check_empty(out)
    target = steering_vectors.MethodTarget(method, goal, flags.parse_options(option or []), strength=strength)
    settings = training.settings(method, seed)
    pairs, lm = data.load(), model.load()
    if layers:
        target = replace(target, layers=parse_layers(layers, lm.num_layers) or ())
    with progress_on_stderr(quiet=as_json) as progress:
        found = steering_vectors.distill_method(
            lm, target, pairs, out, settings, skip_long_rows=data.skip_long_rows, progress=progress
        )
    _print_made({"adapter": str(out), "method": method, **_figures(found)}, as_json, found.notes)


def bake(
    profile: flags.ProfileName,
    model: flags.Model,
    out: Annotated[Path, flags.in_output(help="The folder to write the model to.")],
    strength: Strength = 1.0,
    profiles: flags.Profiles = Path("profiles"),
    as_json: flags.AsJson = False,
) -> None:
    """Fold a profile's shift into a model's weights, as biases.

    The model then computes what a request with `apply_to: "all"` computes.
    """
    flags.check_empty(out)
    (stored,) = flags.load_profiles([profile], profiles)
    lm = model.load()
    baked = steering_vectors.bake(lm, stored, strength)
    try:
        baked.save_pretrained(out)
        lm.tokenizer.save_pretrained(out)
    except OSError as error:
        raise FitError(f"the model cannot be written to {out}: {error}") from error
    _print_made({"model": str(out), "profile": stored.name, "version": stored.version, "strength": strength}, as_json)


def _figures(found: steering_vectors.Distilled) -> dict[str, object]:
    return {
        "layers": list(found.layers),
        "distance_before": found.before,
        "distance_after": found.after,
        "ratio": found.ratio,
        "rows": found.rows,
    }


def _print_made(figures: Mapping[str, object], as_json: bool, notes: Sequence[str] | None = None) -> None:
    """Print what was written and how good it is, one figure per line."""
    if as_json:
        print(json.dumps({**figures, **({} if notes is None else {"notes": notes})}, ensure_ascii=False))
        return
    for key, value in figures.items():
        print(f"{key.replace('_', ' ')}: {value:.4g}" if isinstance(value, float) else f"{key}: {value}")
    print_notes(Console(highlight=False, soft_wrap=True), notes or ())
