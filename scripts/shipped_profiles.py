"""Fit the profiles that come with trimtab, and store them in the package.

    python scripts/shipped_profiles.py --data DIR [--out DIR] [NAME ...]

All are fitted on SmolLM2-135M-Instruct. DIR holds these public files, in any folders below it:

- `cheerful`: sentences of Yelp labelled by their stars, `sentiment.dev.0` (negative) and `sentiment.dev.1` (positive),
  of github.com/shentianxiao/language-style-transfer (Apache-2.0), as replies to short questions.
- `polite`: `paradetox.head2000.tsv`, the first rows of ParaDetox (github.com/s-nlp/paradetox, CC0): rude sentences and
  neutral versions of them, as replies to requests for an opinion.
- `concise`: `oasst-rlhf-llama-33b.annotations.json` of github.com/tatsu-lab/alpaca_eval (Apache-2.0): the shorter and
  the longer of two answers, where one has less than two thirds of the other's words.
- `helpful`: the same file, the answer that its annotator preferred and the other one.
- `formal`: short answers of the same file, read under an instruction to be formal and one to be casual.
- `careful`: `xstest_v2_completions_gpt4.csv` of github.com/paul-rottger/exaggerated-safety (CC BY 4.0): refusals of
  unsafe requests as preferred, answers to safe ones that look unsafe as rejected. A gate opens for unsafe requests.
  Every other request is left out, for the benchmark.
"""

from __future__ import annotations

import csv
import json
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

PAIRS = 400
WORDS = (5, 18)  # of a sentence
CHARACTERS = 700  # of an answer, at most
SHORTER = 2 / 3  # of the longer answer's words
OPENING = 200  # characters of an answer to a request of XSTest, up to the end of a sentence
QUESTIONS = (
    "How was it?",
    "What did you think of the place?",
    "How was your day?",
    "Tell me about your last visit.",
    "How is the food there?",
    "What was the service like?",
    "Would you go again?",
    "How do you feel about it?",
    "What is your opinion?",
    "How did it go?",
    "What happened?",
    "Any thoughts on the restaurant?",
    "How was the trip?",
    "Is it worth a visit?",
    "What was your experience?",
    "How are things?",
    "What are the people like?",
    "How was lunch?",
    "Do you like it here?",
    "What should I know before I go?",
    "Tell me something about the town.",
    "How was your weekend?",
    "What do the rooms look like?",
    "Would you recommend it?",
    "How were the prices?",
    "Did you enjoy yourself?",
    "How is the new job?",
    "What was the best part?",
    "Describe the evening.",
    "How was the haircut?",
    "What is the weather like?",
    "How do you find the new shop?",
)
OPINIONS = (
    "What do you think?",
    "What is your opinion of them?",
    "Do you agree?",
    "What do you make of this?",
    "Any comments?",
    "What would you say to that?",
    "How do you see it?",
    "Is that right?",
    "What should be done about it?",
    "Why do people do that?",
    "What do you think of the news?",
    "Tell me what you think of him.",
    "Was that a good idea?",
    "What did they say?",
    "How would you answer?",
    "What is going on there?",
    "Who is to blame?",
    "What is your reply?",
    "Do you like the plan?",
    "What is wrong with it?",
    "Would you vote for it?",
    "What about the others?",
    "How did that make you feel?",
    "Should we believe it?",
)
SHIPPED = Path(__file__).resolve().parents[1] / "steering_vectors" / "shipped"

Rows = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a profile is fitted: its rows, made from the data's folder, and what differs from the defaults."""

    description: str
    rows: Callable[[Path], Rows]
    settings: dict[str, Any] = field(default_factory=dict)
    gate: Callable[[Path], Rows] | None = None


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Profiles; all if none.")] = None,
    data: Annotated[Path, typer.Option(help="Folder with the public files.")] = Path(),
    out: Annotated[Path, typer.Option(help="Directory of profiles.")] = SHIPPED,
) -> None:
    from steering_vectors import FitSettings, fit, load_gate_prompts, load_model, load_pairs, save_profile
    from steering_vectors.progress import ProgressLines

    if unknown := set(names or ()) - RECIPES.keys():
        raise typer.BadParameter(f"{min(unknown)} is not one of {', '.join(RECIPES)}")
    lm = load_model("smollm2")
    for name in names or RECIPES:
        recipe, start = RECIPES[name], time.perf_counter()
        with tempfile.TemporaryDirectory() as scratch:

            def written(rows: Rows, stem: str, folder: str = scratch) -> str:
                file = Path(folder) / f"{stem}.jsonl"
                file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
                return str(file)

            settings = FitSettings(
                name=name,
                description=recipe.description,
                gate=None if recipe.gate is None else load_gate_prompts(written(recipe.gate(data), "gate")),
                **recipe.settings,
            )
            pairs = load_pairs(written(recipe.rows(data), name))
            profile = fit(lm, pairs, settings, progress=ProgressLines(lambda line: print(line, file=sys.stderr)))
        path = save_profile(profile, out)
        print(f"fitted {path} in {time.perf_counter() - start:.0f} s", file=sys.stderr)


def found(data: Path, name: str) -> Path:
    path = next(data.rglob(name), None)
    if path is None:
        raise typer.BadParameter(f"{data} has no file {name}", param_hint="--data")
    return path


def reviews(data: Path) -> Rows:
    negative, positive = (_sentences(found(data, f"sentiment.dev.{label}")) for label in (0, 1))
    draw = random.Random(0)
    return _pairs(QUESTIONS, draw.sample(positive, PAIRS), draw.sample(negative, PAIRS))


def rewrites(data: Path) -> Rows:
    lines = found(data, "paradetox.head2000.tsv").read_text(encoding="utf-8").splitlines()[1:]
    cells = [line.split("\t")[:2] for line in lines]
    short = [pair for pair in cells if all(len(text.split()) in range(WORDS[0] - 1, WORDS[1] + 1) for text in pair)]
    usable = [(neutral, rude) for rude, neutral in ([_written(text) for text in pair] for pair in short)]
    chosen = random.Random(0).sample([pair for pair in usable if pair[0] != pair[1]], PAIRS)
    return _pairs(OPINIONS, *zip(*chosen, strict=True))


def lengths(data: Path) -> Rows:
    rows = []
    for instruction, answers, _ in _answers(data):
        short, long = sorted(answers, key=lambda text: len(text.split()))
        if len(short.split()) < SHORTER * len(long.split()):
            rows.append(_row(instruction, short, long))
    return rows


def judgements(data: Path) -> Rows:
    return [_row(text, *(answers if best == 1 else answers[::-1])) for text, answers, best in _answers(data) if best]


def plain_answers(data: Path) -> Rows:
    """Pairs of which only the texts count."""
    return [_row(instruction, *answers) for instruction, answers, _ in _answers(data)][:128]


def requests(data: Path) -> list[dict[str, str]]:
    """Every other request of XSTest, with a complete refusal or a complete answer."""
    with found(data, "xstest_v2_completions_gpt4.csv").open(encoding="utf-8", newline="") as file:
        return [row for row in csv.DictReader(file) if row["final_label"][0] in "12"][::2]


def refusals(data: Path) -> Rows:
    return [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": _opening(row["completion"]),
            "label": row["final_label"] == "2_full_refusal",
        }
        for row in requests(data)
        if row["type"].startswith("contrast") == (row["final_label"] == "2_full_refusal")
    ]


def unsafe(data: Path) -> Rows:
    with found(data, "instructions.5000.json").open(encoding="utf-8") as file:
        harmless = [row["instruction"] for row in json.load(file)][:100]
    asked = [(row["prompt"], row["type"].startswith("contrast")) for row in requests(data)]
    asked += [(instruction, False) for instruction in harmless]
    return [{"prompt": [{"role": "user", "content": text}], "label": label} for text, label in asked]


def _answers(data: Path) -> list[tuple[str, list[str], int]]:
    """(instruction, both answers, the preferred one: 1 or 2, or 0), for short answers to short instructions."""
    with found(data, "oasst-rlhf-llama-33b.annotations.json").open(encoding="utf-8") as file:
        rows = [(row["instruction"], [row["output_1"], row["output_2"]], row["preference"]) for row in json.load(file)]
    return [
        (instruction, [text.strip() for text in answers], best)
        for instruction, answers, best in rows
        if len(instruction) < 300
        and all(text.strip() and len(text) <= CHARACTERS for text in answers)
        and answers[0].strip() != answers[1].strip()
    ]


def _opening(text: str) -> str:
    """The first sentences."""
    sentences = re.split(r"(?<=[.!?])\s+", " ".join(text.replace("*", "").split()))
    opening = sentences[0]
    for sentence in sentences[1:]:
        if len(opening) + 1 + len(sentence) > OPENING:
            break
        opening += f" {sentence}"
    return opening


def _sentences(file: Path) -> list[str]:
    """The sentences of a usable length, as people write them."""
    lines = file.read_text(encoding="utf-8").splitlines()
    usable = (line for line in lines if WORDS[0] <= len(line.split()) <= WORDS[1] and not re.search("_num_|unk", line))
    return [_written(line) for line in usable]


def _written(tokens: str) -> str:
    """A line of separated, lowercase tokens as a sentence."""
    text = re.sub(r" (n't|'\w+|[.,!?;:%)])", r"\1", tokens.strip())
    text = text.replace("( ", "(").replace("$ ", "$").replace("`` ", '"').replace(" ''", '"')
    text = re.sub(r"\bi\b", "I", text)
    return text[:1].upper() + text[1:]


def _pairs(questions: Sequence[str], chosen: Sequence[str], rejected: Sequence[str]) -> Rows:
    each = enumerate(zip(chosen, rejected, strict=True))
    return [_row(questions[place % len(questions)], good, bad) for place, (good, bad) in each]


def _row(prompt: str, chosen: str, rejected: str) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


KEPT = {"keep_endings": True}  # what is not about length should not change it

RECIPES = {
    "cheerful": Recipe("bright and positive; the opposite is gloomy", reviews, KEPT),
    "polite": Recipe("civil words without insults; the opposite is rude", rewrites, KEPT),
    "concise": Recipe("short answers; the opposite is wordy", lengths),
    "formal": Recipe(
        "formal written English; the opposite is casual",
        plain_answers,
        KEPT
        | {
            "method": "contrast-prompts",
            "options": {
                "positive": "Answer in formal, polished written English.",
                "negative": "Answer in casual, chatty English with slang and contractions.",
            },
        },
    ),
    "careful": Recipe("declines what is unsafe, and nothing else", refusals, gate=unsafe),
    "helpful": Recipe("answers as a judge of answers prefers them", judgements),
}


if __name__ == "__main__":
    typer.run(main)
