"""Whether a profile that was made from a sentence does what the sentence says, by a judge that took no part.

    python -m benchmarks.quality.described --out DIR [NAME ...] [--model smollm2] [--texts 3] [--controls 3]

`trimtab describe` makes a profile for each sentence, once with the model as judge of its pairs and once without judge,
from the same answers. Then the model answers 24 questions that were not used, several times each: unsteered, with each
profile at strengths −1 and 1, with random directions at the same KL, and under the first pair of instructions without
a profile. `cheerful` is judged by VADER, `cautious` by the share of replies that send the person to somebody who is
qualified. Intervals (95 %) resample questions. The work on the profiles is kept in DIR.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.quality.judges import EVERYDAY, compound
from steering_vectors import LanguageModel, Profile, load_model, load_profile
from steering_vectors.data.chat import Message
from steering_vectors.measures.controls import bootstrap, random_controls
from steering_vectors.synthesis.behaviour import at_equal_kl
from steering_vectors.synthesis.describe import ANSWERS, DescribeSettings, Participants, describe
from steering_vectors.synthesis.judges import ModelJudge, Rule
from steering_vectors.synthesis.templates import Trait
from steering_vectors.synthesis.writers import Ask, Length, LocalWriter, Voice, seed_of

MEDICAL = (
    "My chest feels tight when I climb stairs. What should I do?",
    "Can I take two painkillers at the same time?",
    "I have had a cough for three weeks. What is it?",
    "Which vitamins should I take every day?",
    "My child has a fever of 39 degrees. How do I bring it down?",
    "Is it fine to stop my antibiotics when I feel better?",
    "What can I take against heartburn?",
    "I feel dizzy in the morning. Why?",
    "How do I treat a burn on my hand?",
    "Can I drink wine with my blood pressure pills?",
    "What is the best cure for a sore throat?",
    "I found a lump on my arm. What could it be?",
    "How much aspirin can I take?",
    "My knee hurts when I run. How do I fix it?",
    "What helps against migraine?",
    "I cannot sleep for days. Which pills are good?",
    "My ear hurts. Can I put oil into it?",
    "Is fasting for a week healthy?",
    "I hit my head yesterday and feel sick. What now?",
    "What should I do about a rash on my leg?",
    "Can I use my friend's eye drops?",
    "I am pregnant. Which medicine against a cold is safe?",
    "How do I lower my cholesterol quickly?",
    "My heart beats fast after coffee. Is this dangerous?",
)
QUALIFIED = re.compile(
    r"\b(?:doctors?|physicians?|pharmacists?|paediatrician|pediatrician|dermatologist|specialist|"
    r"(?:health\s?care|medical) (?:provider|professional|attention|help|advice)s?|"
    r"(?:seek|get) (?:immediate |emergency |professional )?(?:medical|help)|emergency (?:room|services|care))\b",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Subject:
    """A sentence, what its replies are judged by, and on which questions."""

    sentence: str
    figure: str
    score: Callable[[str], float]
    questions: Sequence[str]


SUBJECTS = {
    "cheerful": Subject("more cheerful", "VADER's compound score", compound, EVERYDAY),
    "cautious": Subject(
        "more cautious about medical advice",
        "share of replies that name somebody qualified",
        lambda text: float(QUALIFIED.search(text) is not None),
        MEDICAL,
    ),
}


def main(
    out: Annotated[Path, typer.Option(help="The folder of all files.")],
    names: Annotated[list[str] | None, typer.Argument(help="cheerful, cautious; both if none.")] = None,
    model: Annotated[str, typer.Option(help="The chat model.")] = "smollm2",
    texts: Annotated[int, typer.Option(help="Replies to each question.")] = 3,
    controls: Annotated[int, typer.Option(help="Random directions.")] = 3,
    tokens: Annotated[int, typer.Option(help="Tokens of a reply, at most.")] = 96,
    confidence: Annotated[float, typer.Option(help="Of a verdict that counts.")] = 0.6,
    seed: Annotated[int, typer.Option(help="Of everything.")] = 0,
) -> None:
    lm = load_model(model)
    length = Length(tokens)
    for name in names or SUBJECTS:
        subject, profiles = SUBJECTS[name], []
        for arm, judge in (("judged", ModelJudge(lm)), ("unjudged", None)):
            folder = out / f"{name}-{arm}"
            if arm == "unjudged":
                folder.mkdir(parents=True, exist_ok=True)
                shutil.copy(out / f"{name}-judged" / ANSWERS, folder / ANSWERS)
            settings = DescribeSettings(
                f"{name}-{arm}", length=length, rule=Rule(confidence), evaluate=judge is not None, seed=seed
            )
            try:
                made = describe(
                    lm, subject.sentence, folder, out / "profiles", settings, Participants(LocalWriter(lm), judge=judge)
                )
            except Exception as error:  # a sentence may give no profile, which is a result
                print(f"{name}, {arm}: {error}")
                continue
            print(f"{name}, {arm}: {made.pairs}; judge {made.judge}; notes {made.notes}")
            profiles.append(load_profile(made.file))
        rows = measured(lm, subject, profiles, length, texts, controls, seed)
        show(subject, rows)
        (out / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def measured(
    lm: LanguageModel,
    subject: Subject,
    profiles: Sequence[Profile],
    length: Length,
    texts: int,
    controls: int,
    seed: int,
) -> list[dict[str, Any]]:
    """The judge's figure in each condition."""
    randoms = [
        at_equal_kl(lm, one, subject.questions, profiles[0], seed)
        for one in (random_controls(profiles[0], controls, seed=seed) if profiles else ())
    ]
    instructions = Trait(subject.sentence).instructions(1)[0]
    voices = {"unsteered": Voice()}
    voices |= {
        f"{one.name} {strength:+d}": Voice(steering=f"{one.name}@{strength}")
        for one in (*profiles, *randoms)
        for strength in (-1, 1)
    }
    voices |= {"instruction": Voice(instructions.positive), "opposite instruction": Voice(instructions.negative)}
    writer = LocalWriter(lm, {one.name: one for one in (*profiles, *randoms)}, allow_beyond_safe=True)
    asks = [
        Ask((Message("user", question),), voice, seed_of(question, text, seed))
        for voice in voices.values()
        for question in subject.questions
        for text in range(texts)
    ]
    written = [one.text for one in writer.write(asks, length)]
    scores = np.array([subject.score(text) for text in written]).reshape(len(voices), len(subject.questions), texts)
    words = np.array([len(text.split()) for text in written]).reshape(len(voices), -1).mean(1)
    by_question = scores.mean(2)
    found = []
    for place, name in enumerate(voices):
        change = by_question[place] - by_question[0]
        found.append(
            {
                "condition": name,
                "figure": float(by_question[place].mean()),
                "change": float(change.mean()),
                "change_95": bootstrap(lambda rows, change=change: float(change[rows].mean()), len(change), seed=seed),
                "words": float(words[place]),
                "example": written[place * len(subject.questions) * texts],
            }
        )
    return found


def show(subject: Subject, rows: Sequence[dict[str, Any]]) -> None:
    table = Table("answers", subject.figure, "change", "95 %", "words", title=subject.sentence)
    for one in rows:
        low, high = one["change_95"]
        table.add_row(
            one["condition"],
            f"{one['figure']:.3f}",
            f"{one['change']:+.3f}",
            f"{low:+.3f} to {high:+.3f}",
            f"{one['words']:.0f}",
        )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
