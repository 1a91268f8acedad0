"""`trimtab describe`: a profile from a sentence."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import steering_vectors
from steering_vectors.cli import flags
from steering_vectors.cli.roles import ADDRESS, AUTO, LARGE, MODEL, NONE, ApiKeys, Judging, Temperature, Tokens, roles
from steering_vectors.errors import FitError
from steering_vectors.reports.terminal import print_evaluation, print_fit, print_notes, progress_on_stderr

if TYPE_CHECKING:
    from steering_vectors.synthesis.describe import Described

TEMPLATES = "templates"
FOLDER = Path("described")


def describe(
    sentence: Annotated[str, typer.Argument(help="How answers should be, as in 'more cautious about medical advice'.")],
    model: flags.Model,
    *,
    name: Annotated[str, flags.in_output(help="The name of the profile; made from the sentence if empty.")] = "",
    opposite: Annotated[
        str, flags.in_data(help="What the other side should be like; the sentence's opposite if empty.")
    ] = "",
    writer: Annotated[
        str,
        flags.in_data(
            help="Who writes instructions and questions that are not in the folder: auto (templates for models below a "
            f"billion parameters), templates, model, or {ADDRESS}."
        ),
    ] = AUTO,
    answers: Annotated[str, flags.in_data(help=f"Who writes the answers: model, or {ADDRESS}.")] = MODEL,
    judging: Judging,
    api_key: ApiKeys = None,
    instructions: Annotated[int, flags.in_data(min=1, help="Pairs of instructions; templates have five.")] = 5,
    questions: Annotated[int, flags.in_data(min=12, help="Questions, of which one in four is held out.")] = 48,
    samples: Annotated[int, flags.in_data(min=1, help="Answers to each question under each instruction.")] = 1,
    answer_tokens: Tokens = 96,
    temperature: Temperature = 0.8,
    method: Annotated[str, flags.in_method(help="The method of the fit. See `trimtab methods`.")] = "mean-diff",
    option: flags.MethodOptions = None,
    layers: Annotated[str, flags.in_method(help="auto, 12, 10-20 (both ends included) or 3,5,7.")] = "auto",
    kl_budget: flags.KlBudget = 0.1,
    text_tokens: flags.TextTokens = 160,
    randoms: Annotated[int, flags.in_measurement(min=0, help="The number of random directions to compare with.")] = 2,
    no_evaluate: Annotated[bool, flags.in_measurement("--no-evaluate", help="Leave the evaluation out.")] = False,
    seed: flags.Seed = 0,
    folder: Annotated[
        Path | None, flags.in_output(help="The folder of the work, described/NAME by default; a run goes on there.")
    ] = None,
    out: Annotated[Path, flags.in_output(help="The directory to store the profile in.")] = Path("profiles"),
    as_json: flags.AsJson = False,
) -> None:
    """Make a profile from a sentence: write instructions and questions, answer from both sides, judge, fit, evaluate.

    Every step is a file in the folder. Edit any of them and run the command again: it goes on from what is there.
    """
    from steering_vectors.synthesis.describe import DescribeSettings, Participants, describe
    from steering_vectors.synthesis.folder import Folder
    from steering_vectors.synthesis.writers import Length

    name = name or slug(sentence)
    if not name:
        raise FitError(f"no name can be made from {sentence!r}: give the profile one by --name")
    settings = DescribeSettings(
        name=name,
        opposite=opposite,
        instructions=instructions,
        questions=questions,
        samples=samples,
        length=Length(answer_tokens, temperature),
        rule=judging.rule(),
        method=method,
        options=flags.parse_options(option or []),
        layers=layers,
        kl_budget=kl_budget,
        text_tokens=text_tokens,
        randoms=randoms,
        evaluate=not no_evaluate,
        seed=seed,
    )
    folder = folder or FOLDER / name
    lm = model.load()
    writer, judging = _chosen(lm, writer, judging)
    with roles(lm, api_key, writer, answers, judging.judge) as who:
        brief = None if writer == TEMPLATES else who.writer(writer, "--writer")
        participants = Participants(
            answers=who.writer(answers, "--answers"),
            brief=brief,
            judge=who.judge(judging, Folder(folder), may_be_none=True),
        )
        with progress_on_stderr(quiet=as_json) as progress:
            found = describe(lm, sentence, folder, out, settings, participants, progress=progress)
    if as_json:
        print(json.dumps(_summary(found), ensure_ascii=False))
    else:
        _print(found)


def slug(sentence: str) -> str:
    """A profile's name from a sentence."""
    return re.sub(r"[^a-z0-9]+", "-", sentence.lower())[:64].strip("-")


def _chosen(lm: steering_vectors.LanguageModel, writer: str, judging: Judging) -> tuple[str, Judging]:
    """Who writes the brief and who judges where `auto` is asked for: not a small model, which is said."""
    size = sum(one.numel() for one in lm.model.parameters())
    named = f"{lm.identity.id} has {size / 1e6:.0f} million parameters"
    if writer == AUTO and size < LARGE:
        writer = TEMPLATES
        print(
            f"note: {named}, too few to write good instructions: those that the folder lacks are made from templates "
            "(--writer model asks it all the same)",
            file=sys.stderr,
        )
    if judging.judge == AUTO and size < LARGE:
        judging = replace(judging, judge=NONE)
        print(
            f"note: {named}, too few to judge answers: no judge filters the pairs, and none compares the profile's "
            "answers (--judge names an endpoint or a person, or the model all the same)",
            file=sys.stderr,
        )
    return MODEL if writer == AUTO else writer, judging if judging.judge != AUTO else replace(judging, judge=MODEL)


def _summary(found: Described) -> dict[str, Any]:
    return {
        "path": str(found.file),
        "folder": str(found.folder),
        "pairs": found.pairs,
        "judge": found.judge,
        "evaluation": found.evaluation,
        "profile": steering_vectors.profile_summary(found.profile),
        "notes": found.notes,
    }


def _print(found: Described) -> None:
    console = Console(highlight=False, soft_wrap=True)
    pairs = found.pairs
    console.print(f"folder {escape(str(found.folder))}: {pairs['kept']} of {pairs['candidates']} pairs kept")
    for reason, count in pairs["dropped"].items():
        console.print(f"  dropped {count}: {reason}")
    if judge := found.judge:
        console.print(
            f"judge {escape(judge['name'])}: names the instructed side in {judge['names_positive']:.0%} of "
            f"{judge['cases']} pairs, the same in both orders in {judge['consistent']:.0%}"
        )
    print_fit(found.profile, found.file)
    fitted = set(found.profile.metrics.get("notes", []))
    print_notes(console, [note for note in found.notes if note not in fitted])
    if found.evaluation:
        _print_evaluation(console, found.evaluation)


def _print_evaluation(console: Console, evaluation: dict[str, Any]) -> None:
    if "preferences" in evaluation:
        print_evaluation(evaluation["preferences"])
    if "note" in evaluation:
        print_notes(console, [evaluation["note"]])
    if "behaviour" not in evaluation:
        return
    console.print("the judge compares answers to held-out questions with those of the unsteered model:")
    table = Table("answers", "preferred", "95 %", "log-odds", "words")
    for one in evaluation["behaviour"]:
        figures = ("", "", "")
        if "preferred" in one:
            low, high = one["preferred_95"]
            figures = (f"{one['preferred']:.0%}", f"{low:.0%} to {high:.0%}", f"{one['log_odds']:+.3f}")
        table.add_row(one["voice"], *figures, f"{one['words']:.0f}")
    console.print(table)
