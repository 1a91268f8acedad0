"""`trimtab bake`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from steering_vectors.cli.distill import print_made
from steering_vectors.cli.flags import OUTPUT, AsJson, Device, Dtype, Model, ProfileName, Profiles
from steering_vectors.cli.inputs import check_empty, find_profile, load_quietly
from steering_vectors.errors import FitError


def bake(
    profile: ProfileName,
    model: Model,
    out: Annotated[Path, typer.Option(help="The folder to write the model to.", rich_help_panel=OUTPUT)],
    strength: Annotated[float, typer.Option(help="The strength to turn into weights.")] = 1.0,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    profiles: Profiles = Path("profiles"),
    as_json: AsJson = False,
) -> None:
    """Fold a profile's shift into a model's weights, as biases.

    The model then computes what a request with `apply_to: "all"` computes.
    """
    from steering_vectors.distillation.baking import bake as bake_profile
    from steering_vectors.profiles.files import load_profile

    check_empty(out)
    stored = load_profile(find_profile(profile, profiles))
    lm = load_quietly(model, dtype, device)
    baked = bake_profile(lm, stored, strength)
    try:
        baked.save_pretrained(out)
        lm.tokenizer.save_pretrained(out)
    except OSError as error:
        raise FitError(f"the model cannot be written to {out}: {error}") from error
    print_made({"model": str(out), "profile": stored.name, "version": stored.version, "strength": strength}, as_json)
