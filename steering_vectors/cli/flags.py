"""Flags that several commands share, as types for typer. `--help` groups flags by the panels named here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

MODEL = "Model"
DATA = "Data"
METHOD = "Method"
CALIBRATION = "Calibration"
MEASUREMENT = "Measurement"
TRAINING = "Training"
OUTPUT = "Output"
PROFILES = "Profiles"

Model = Annotated[str, typer.Option(help="`demo`, a directory, or a Hugging Face model id.", rich_help_panel=MODEL)]
Dtype = Annotated[
    str,
    typer.Option(
        help="auto (the checkpoint's, or float32 on a CPU without bfloat16 products), float32, bfloat16 or float16.",
        rich_help_panel=MODEL,
    ),
]
Device = Annotated[str, typer.Option(help="The device to run on: cpu, cuda, cuda:1, …", rich_help_panel=MODEL)]

Pairs = Annotated[
    str,
    typer.Option(
        help="Preference data: a file, `hf:NAME[:split]`, or an embedded set such as `demo:warm`.",
        rich_help_panel=DATA,
    ),
]
Columns = Annotated[
    str, typer.Option(help="Rename columns, as in prompt=question,chosen=matching.", rich_help_panel=DATA)
]
SkipBadRows = Annotated[
    bool, typer.Option("--skip-bad-rows", help="Skip unusable rows instead of failing.", rich_help_panel=DATA)
]
SkipLongRows = Annotated[
    bool,
    typer.Option(
        "--skip-long-rows", help="Skip rows longer than the model's context instead of failing.", rich_help_panel=DATA
    ),
]

ProfileName = Annotated[str, typer.Argument(help="A profile file, or the name of a profile in --profiles.")]
ProfileNames = Annotated[list[str], typer.Argument(help="Profile files, or names of profiles in --profiles.")]
Profiles = Annotated[Path, typer.Option(help="The directory of profiles.", rich_help_panel=PROFILES)]

KlBudget = Annotated[
    float, typer.Option(help="KL that strength 1 costs, in nats per token.", rich_help_panel=CALIBRATION)
]
MethodOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        "-o",
        help="An option of the method, as KEY=VALUE; can be repeated. `trimtab methods` lists them.",
        rich_help_panel=METHOD,
    ),
]
Layers = Annotated[str, typer.Option(help="auto, 12, 10-20 (both ends included) or 3,5,7.", rich_help_panel=METHOD)]
Strengths = Annotated[
    str, typer.Option(help="Strengths to measure, comma-separated; 0 must be one of them.", rich_help_panel=MEASUREMENT)
]
Report = Annotated[
    Path | None, typer.Option(help="Write an HTML page with plots to this file.", rich_help_panel=OUTPUT)
]
Seed = Annotated[int, typer.Option(help="The random seed. Equal seeds give equal results.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.", rich_help_panel=OUTPUT)]
