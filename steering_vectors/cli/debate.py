"""`trimtab debate`: preference pairs from two perspectives that argue before a judge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.console import Console
from rich.markup import escape

from steering_vectors.cli import flags
from steering_vectors.cli.roles import ADDRESS, MODEL, ApiKeys, Judging, Temperature, Tokens, roles
from steering_vectors.errors import FitError
from steering_vectors.reports.terminal import print_notes, progress_on_stderr

if TYPE_CHECKING:
    from steering_vectors.profiles.profile import Profile
    from steering_vectors.synthesis.debate import Debated

Instruction = Annotated[str, flags.in_data(help="The instruction of this side, as a system prompt.")]
Steering = Annotated[
    str, flags.in_data(help="The profiles of this side, such as cheerful@0.8+polite@-0.3, found in --profiles.")
]


def debate(
    model: flags.Model,
    *,
    prompts: Annotated[
        str, flags.in_data(help="Prompts: lines of a .txt file, or the column `prompt`; everyday questions if empty.")
    ] = "",
    first: Instruction = "",
    second: Instruction = "",
    first_steering: Steering = "",
    second_steering: Steering = "",
    rounds: Annotated[int, flags.in_data(min=0, max=5, help="Rounds of rebuttals.")] = 1,
    question: Annotated[str, flags.in_data(help="What the judge is asked.")] = "Which answer is better?",
    writer: Annotated[str, flags.in_data(help=f"Who writes: model, or {ADDRESS}.")] = MODEL,
    judging: Judging,
    api_key: ApiKeys = None,
    answer_tokens: Tokens = 96,
    rebuttal_tokens: Annotated[int, flags.in_data(min=1, help="The maximum number of tokens of a rebuttal.")] = 64,
    temperature: Temperature = 0.8,
    seed: flags.Seed = 0,
    profiles: flags.Profiles = Path("profiles"),
    folder: Annotated[Path, flags.in_output(help="The folder of the work; the pairs are its file pairs.jsonl.")] = Path(
        "debate"
    ),
    as_json: flags.AsJson = False,
) -> None:
    """Have two perspectives answer prompts and argue, and keep the pairs on which a judge's verdict is sure.

    Every step is a file in the folder. Edit any of them and run the command again: it goes on from what is there.
    """
    from steering_vectors.synthesis.debate import DebateSettings, debate, read_prompts
    from steering_vectors.synthesis.folder import Folder
    from steering_vectors.synthesis.writers import Length, Voice

    settings = DebateSettings(
        first=Voice(first, first_steering),
        second=Voice(second, second_steering),
        question=question,
        rounds=rounds,
        length=Length(answer_tokens, temperature),
        rebuttal=Length(rebuttal_tokens, temperature),
        rule=judging.rule(),
        seed=seed,
    )
    asked = read_prompts(prompts)
    loaded = _profiles((first_steering, second_steering), profiles) if writer == MODEL else []
    lm = model.load()
    with roles(lm, api_key, writer, judging.judge) as who:
        judge = who.judge(judging, Folder(folder), may_be_none=False)
        if judge is None:
            raise FitError("a debate needs a judge")
        with progress_on_stderr(quiet=as_json) as progress:
            found = debate(asked, folder, settings, who.writer(writer, "--writer", loaded), judge, progress=progress)
    if as_json:
        print(json.dumps({"path": str(found.file), "pairs": found.pairs, **found.figures}, ensure_ascii=False))
    else:
        _print(found)


def _profiles(steerings: tuple[str, str], directory: Path) -> list[Profile]:
    from steering_vectors.synthesis.writers import parse_steering

    names = dict.fromkeys(name for steering in steerings for name, _ in parse_steering(steering))
    return flags.load_profiles(list(names), directory)


def _print(found: Debated) -> None:
    from steering_vectors.data.preferences import MIN_ROWS

    console = Console(highlight=False, soft_wrap=True)
    figures = found.figures
    outcomes = ", ".join(f"{name} {count}" for name, count in figures["outcomes"].items())
    console.print(f"{found.pairs} pairs from {figures['prompts']} prompts → {escape(str(found.file))}")
    console.print(f"verdicts: {outcomes}")
    console.print(
        f"judge {escape(figures['judge'])}: the same in both orders in {figures['consistent']:.0%}, agreement of "
        f"wordings {figures['agreement']:.0%}"
    )
    if found.pairs < MIN_ROWS:
        print_notes(console, [f"`trimtab fit` needs at least {MIN_ROWS} pairs: add prompts"])
