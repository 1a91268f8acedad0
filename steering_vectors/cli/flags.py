"""Flags that several offline commands share, as types for typer. Knows nothing of what the commands do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Option(help="`demo`, a directory, or a hub id.")]
Dtype = Annotated[str, typer.Option(help="auto (the checkpoint's), float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")]
Seed = Annotated[int, typer.Option(help="Equal seeds give equal results.")]
ProfileName = Annotated[str, typer.Argument(help="A profile's file, or its name in --profiles.")]
ProfileNames = Annotated[list[str], typer.Argument(help="Files of profiles, or names in --profiles.")]
Profiles = Annotated[Path, typer.Option(help="Where profiles are kept.")]
KlBudget = Annotated[float, typer.Option(help="Nats of KL per token that strength 1 costs.")]
Columns = Annotated[str, typer.Option(help="Rename columns: prompt=question,chosen=matching.")]
SkipBadRows = Annotated[bool, typer.Option("--skip-bad-rows", help="Leave out unusable rows.")]
SkipLongRows = Annotated[bool, typer.Option("--skip-long-rows", help="Leave out rows longer than the model's context.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead.")]
