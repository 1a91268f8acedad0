"""Whether a round of debate makes a judge's verdicts agree better with the truth, and a profile fitted on them better.

    python -m benchmarks.quality.debated --out DIR [--model demo] [--prompts 200] [--rounds 0,1]
    python -m benchmarks.quality.debated --out DIR --model smollm2 --data DIR

Two perspectives answer each prompt: a profile at strengths 1 and −1, or two opposed instructions. The model judges the
answers alone (0 rounds) and after rebuttals. The truth is known by a rule that takes no part: for the demo model the
classifier of manners (warm), for SmolLM2 VADER's compound score (cheerful), where the answers differ by at least 0.2.
Then a profile is fitted on the pairs of each, and the rule judges its texts at strength 1 against unsteered ones, on
other prompts. SmolLM2's prompts are short instructions of Alpaca, from
`alpaca/instructions.5000.json` in the folder of data; the demo model's are those of its preferences.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.quality.judges import compound
from benchmarks.quality.manners import score
from steering_vectors import FitSettings, LanguageModel, fit, load_model, load_pairs, load_profile
from steering_vectors.data.chat import Message
from steering_vectors.errors import DataError, TrimtabError
from steering_vectors.measures.controls import bootstrap
from steering_vectors.profiles.shipped import shipped_profiles
from steering_vectors.synthesis.debate import ANSWERS, VERDICTS, DebateSettings, Prompt, debate, read_prompts, shown
from steering_vectors.synthesis.folder import Folder
from steering_vectors.synthesis.judges import ModelJudge, Rule, decide, votes_of
from steering_vectors.synthesis.writers import Ask, Length, LocalWriter, Voice, seed_of

DIFFERENT = 0.2  # of the score, between answers whose truth is known
MAX_CHARACTERS = 80  # of a prompt
TEXTS = 3
TESTED = 48  # prompts on which a profile is tested


@dataclass(frozen=True, slots=True)
class Subject:
    """What two sides differ in, and the rule that knows the truth."""

    adjective: str
    opposite: str
    score: Callable[[str], float]

    def sides(self, kind: str) -> tuple[Voice, Voice]:
        if kind == "profiles":
            return Voice(steering=f"{self.adjective}@1"), Voice(steering=f"{self.adjective}@-1")
        return Voice(f"Answer in a very {self.adjective} way."), Voice(f"Answer in a very {self.opposite} way.")


WARM = Subject("warm", "cold", lambda text: float(score("warm", text)))
CHEERFUL = Subject("cheerful", "gloomy", compound)


def main(
    out: Annotated[Path, typer.Option(help="The folder of all files.")],
    data: Annotated[Path, typer.Option(help="The folder with alpaca/instructions.5000.json.")] = Path(),
    prompts: Annotated[int, typer.Option(help="The number of prompts.")] = 200,
    model: Annotated[str, typer.Option(help="demo or smollm2.")] = "demo",
    rounds: Annotated[str, typer.Option(help="Rounds of rebuttals to compare.")] = "0,1",
    sides: Annotated[str, typer.Option(help="profiles, instructions or both.")] = "profiles,instructions",
    wordings: Annotated[int, typer.Option(help="Wordings of the judge's question.")] = 2,
    confidence: Annotated[float, typer.Option(help="Of a verdict that counts.")] = 0.5,
    agreement: Annotated[float, typer.Option(help="Share of the wordings that must agree.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of everything.")] = 0,
) -> None:
    lm = load_model(model)
    if model == "demo":
        subject, texts = WARM, read_prompts("demo:warm")
        profile = fit(lm, load_pairs("demo:warm"), FitSettings(name="warm", text_tokens=0, seed=seed))
    else:
        subject, texts = CHEERFUL, alpaca(data)
        profile = load_profile(shipped_profiles(lm.identity)["cheerful"])
    asked, others = texts[:prompts], texts[prompts : prompts + TESTED]
    writer = LocalWriter(lm, {subject.adjective: profile})
    found = []
    for name in sides.split(","):
        first, second = subject.sides(name)
        for number in map(int, rounds.split(",")):
            settings = DebateSettings(
                first,
                second,
                f"Which answer is more {subject.adjective}?",
                number,
                Length(48),
                Length(40),
                Rule(confidence, agreement),
                seed,
            )
            folder = out / f"{name}-{number}"
            if number and (source := out / f"{name}-0" / ANSWERS).is_file() and not folder.exists():
                folder.mkdir(parents=True)
                (folder / ANSWERS).write_bytes(source.read_bytes())
            judge = ModelJudge(lm, wordings=wordings)
            row = {"sides": name, "rounds": number}
            try:
                result = debate(asked, folder, settings, writer, judge)
                row |= {**result.figures, **gain(lm, result.file, others, subject, seed)}
            except DataError as error:  # no verdict may count, which is a result
                row |= {"pairs": 0, "fit": error.message}
            row |= measured(folder, settings.rule, subject)
            print(json.dumps(row))
            found.append(row)
    (out / "debated.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    show(found)


def alpaca(data: Path) -> list[Prompt]:
    rows = json.loads((data / "alpaca" / "instructions.5000.json").read_text(encoding="utf-8"))
    texts = dict.fromkeys(row["instruction"] for row in rows if len(row["instruction"]) <= MAX_CHARACTERS)
    return [(Message("user", text),) for text in texts]


def measured(folder: Path, rule: Rule, subject: Subject) -> dict[str, Any]:
    """How often the verdict is the truth: over all prompts whose truth is known, and over those that make pairs."""
    rows = Folder(folder).rows(VERDICTS)
    decisions = decide([votes_of(row, VERDICTS) for row in rows], rule, biased=True)
    right, sure, first = [], [], []
    for row, decision in zip(rows, decisions, strict=True):
        sides = [subject.score(row[side]) for side in ("first", "second")]
        if abs(sides[0] - sides[1]) < DIFFERENT:
            continue
        first.append(float(sides[0] > sides[1]))
        right.append(float((decision.log_odds > 0) == (sides[0] > sides[1])))
        if decision.outcome in ("first", "second"):
            sure.append(right[-1])
    return {
        "consistent": float(np.mean([one.consistent for one in decisions])),
        "mass": float(np.mean([vote["mass"] for row in rows for vote in row["votes"]])),
        "first_better": estimate(first),
        "known": len(right),
        "right": estimate(right),
        "sure": len(sure),
        "right_if_sure": estimate(sure),
    }


def gain(lm: LanguageModel, file: Path, prompts: Sequence[Prompt], subject: Subject, seed: int) -> dict[str, Any]:
    """What a profile on the pairs does to the score at strength 1, in texts after other prompts."""
    pairs = sum(bool(line.strip()) for line in file.read_text(encoding="utf-8").splitlines())
    try:
        profile = fit(lm, load_pairs(file), FitSettings(name="debated", text_tokens=0, seed=seed))
    except TrimtabError as error:
        return {"pairs": pairs, "fit": error.message}
    writer = LocalWriter(lm, {profile.name: profile}, allow_beyond_safe=True)
    asks = [
        Ask(prompt, voice, seed_of(shown(prompt), text, seed))
        for voice in (Voice(), Voice(steering=profile.name))
        for prompt in prompts
        for text in range(TEXTS)
    ]
    scores = np.array([subject.score(one.text) for one in writer.write(asks, Length(48))])
    change = np.diff(scores.reshape(2, len(prompts), TEXTS), axis=0)[0].mean(1)
    return {"pairs": pairs, "gain": estimate(change.tolist()), "kl": profile.calibration["kl_at_1"]}


def estimate(values: Sequence[float]) -> list[float]:
    """The mean and its interval."""
    if not values:
        return [math.nan] * 3
    array = np.array(values)
    return [float(array.mean()), *bootstrap(lambda rows: float(array[rows].mean()), len(array))]


def show(rows: Sequence[dict[str, Any]]) -> None:
    table = Table("sides", "rounds", "known", "verdict is true", "sure", "of these", "pairs", "gain of the profile")
    for one in rows:
        figures = [
            "" if one.get(key) is None else "{:.3f} ({:.3f} to {:.3f})".format(*one[key])
            for key in ("right", "right_if_sure", "gain")
        ]
        table.add_row(
            one["sides"], str(one["rounds"]), str(one["known"]), figures[0], str(one["sure"]), figures[1],
            str(one["pairs"]), figures[2] or one.get("fit", ""),
        )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
