"""`trimtab distill` and `trimtab distill-method`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from steering_vectors.cli.flags import (
    METHOD,
    OUTPUT,
    TRAINING,
    AsJson,
    Columns,
    Device,
    Dtype,
    MethodOptions,
    Model,
    Pairs,
    ProfileName,
    Profiles,
    Seed,
    SkipBadRows,
    SkipLongRows,
)
from steering_vectors.cli.inputs import check_empty, find_profile, load_data, load_quietly, parse_options

if TYPE_CHECKING:
    from steering_vectors.distillation.lora import Distilled, DistillOptions

Adapter = Annotated[Path, typer.Option(help="The folder to write the adapter to.", rich_help_panel=OUTPUT)]
Steps = Annotated[
    int | None, typer.Option(help="Training steps; the paper's number by default.", rich_help_panel=TRAINING)
]
Batch = Annotated[
    int | None, typer.Option(help="Responses per step; the paper's number by default.", rich_help_panel=TRAINING)
]
LearningRate = Annotated[
    float | None,
    typer.Option(help="The peak learning rate of AdamW; the paper's by default.", rich_help_panel=TRAINING),
]
Rank = Annotated[int, typer.Option(help="The rank of the LoRA; its alpha is twice that.", rich_help_panel=TRAINING)]
Targets = Annotated[
    str,
    typer.Option(
        help="Modules of the LoRA, comma-separated, or all-linear; peft's choice if empty.", rich_help_panel=TRAINING
    ),
]


def distill(
    profile: ProfileName,
    model: Model,
    data: Pairs,
    out: Adapter,
    strength: Annotated[float, typer.Option(help="The strength to turn into weights.")] = 1.0,
    steps: Steps = None,
    batch: Batch = None,
    learning_rate: LearningRate = None,
    rank: Rank = 8,
    targets: Targets = "",
    columns: Columns = "",
    skip_bad_rows: SkipBadRows = False,
    skip_long_rows: SkipLongRows = False,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    seed: Seed = 0,
    profiles: Profiles = Path("profiles"),
    as_json: AsJson = False,
) -> None:
    """Fit a LoRA to a profile's shift, on the responses of preference data."""
    from steering_vectors.distillation.lora import distill as fit_lora
    from steering_vectors.distillation.lora import paper_settings
    from steering_vectors.profiles.files import load_profile
    from steering_vectors.reports.terminal import progress_on_stderr

    check_empty(out)
    stored = load_profile(find_profile(profile, profiles))
    settings = paper_settings("rahf-scit", **_training(steps, batch, learning_rate, rank, targets, seed))
    pairs = load_data(data, columns, skip_bad_rows)
    lm = load_quietly(model, dtype, device)
    with progress_on_stderr(quiet=as_json) as progress:
        found = fit_lora(
            lm, stored, pairs, out, settings, strength=strength, skip_long_rows=skip_long_rows, progress=progress
        )
    source = {"profile": stored.name, "version": stored.version}
    print_made({"adapter": str(out), **source, **_figures(found)}, as_json)


def distill_method(
    method: Annotated[str, typer.Argument(help="The method: rahf-scit or rahf-dual.")],
    model: Model,
    data: Pairs,
    out: Adapter,
    goal: Annotated[
        str,
        typer.Option(help="Use the default instructions of this goal, as of a profile's name.", rich_help_panel=METHOD),
    ] = "",
    option: MethodOptions = None,
    layers: Annotated[
        str,
        typer.Option(help="The target blocks: 12, 10-20 or 3,5,7; the middle ones if empty.", rich_help_panel=METHOD),
    ] = "",
    strength: Annotated[
        float, typer.Option(help="The factor α of the difference per token.", rich_help_panel=METHOD)
    ] = 5.0,
    steps: Steps = None,
    batch: Batch = None,
    learning_rate: LearningRate = None,
    rank: Rank = 8,
    targets: Targets = "",
    columns: Columns = "",
    skip_bad_rows: SkipBadRows = False,
    skip_long_rows: SkipLongRows = False,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Fit a LoRA to a method's difference per token, as RAHF does.

    The method's first step tunes the model, or takes its weights from the cache of `trimtab fit`.
    """
    from steering_vectors.distillation.lora import MethodTarget, paper_settings
    from steering_vectors.distillation.lora import distill_method as fit_lora
    from steering_vectors.fitting.layers import parse_layers
    from steering_vectors.reports.terminal import progress_on_stderr

    check_empty(out)
    target = MethodTarget(method, goal, parse_options(option or []), strength=strength)
    settings = paper_settings(method, **_training(steps, batch, learning_rate, rank, targets, seed))
    pairs = load_data(data, columns, skip_bad_rows)
    lm = load_quietly(model, dtype, device)
    if layers:
        target = replace(target, layers=parse_layers(layers, lm.num_layers) or ())
    with progress_on_stderr(quiet=as_json) as progress:
        found = fit_lora(lm, target, pairs, out, settings, skip_long_rows=skip_long_rows, progress=progress)
    print_made({"adapter": str(out), "method": method, **_figures(found)}, as_json)


def _training(
    steps: int | None, batch: int | None, learning_rate: float | None, rank: int, targets: str, seed: int
) -> DistillOptions:
    """The training options that differ from the paper's."""
    options: DistillOptions = {"rank": rank, "alpha": 2 * rank, "targets": targets, "seed": seed}
    if steps is not None:
        options["steps"] = steps
    if batch is not None:
        options["batch"] = batch
    if learning_rate is not None:
        options["learning_rate"] = learning_rate
    return options


def _figures(found: Distilled) -> dict[str, object]:
    return {
        "layers": list(found.layers),
        "distance_before": found.before,
        "distance_after": found.after,
        "ratio": found.ratio,
        "rows": found.rows,
    }


def print_made(figures: Mapping[str, object], as_json: bool) -> None:
    """Print what was written and how good it is, one figure per line."""
    if as_json:
        print(json.dumps(figures, ensure_ascii=False))
        return
    for key, value in figures.items():
        print(f"{key.replace('_', ' ')}: {value:.4g}" if isinstance(value, float) else f"{key}: {value}")
