"""What the shipped profile `cheerful` does to a real chat model's replies, by a judge that fitting never saw.

    python -m benchmarks.quality.shipped [--texts 4] [--tokens 60] [--controls 4] [--seed 0] [--json FILE]

SmolLM2-135M-Instruct answers 24 everyday questions several times each, at strengths from −2 to 2. The judge is VADER, a
lexicon of sentiment made by others (Hutto and Gilbert, 2014): its compound score from −1 to 1, and the share of replies
that it calls negative (−0.05 or less). Random directions with the norms of the profile's shift are controls, at the
strengths −1 and 1, and so is the system prompt "Be cheerful." without steering. KL(steered‖base) per token and the
perplexity of the replies under the unsteered model are the costs. Intervals (95 %) resample questions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from steering_vectors import Profile, load_model, load_profile
from steering_vectors.data.chat import Message, encode_prompt
from steering_vectors.measures.controls import bootstrap, random_controls
from steering_vectors.measures.steered_model import SteeredModel, steerable
from steering_vectors.profiles.shipped import shipped_profiles

STRENGTHS = (-2.0, -1.0, 0.0, 1.0, 2.0)
NEGATIVE = -0.05  # VADER's own threshold
PROMPT = "Be cheerful."
QUESTIONS = (
    "How was your day?",
    "What do you think of Mondays?",
    "Tell me about the weather today.",
    "What should I have for dinner?",
    "How do I get to the station?",
    "What is your favourite season?",
    "Tell me about your neighbours.",
    "How was the film last night?",
    "What do you think of my new haircut?",
    "Is it worth learning to play the piano?",
    "How do you feel about winter?",
    "What happened at work this week?",
    "Tell me about the city where you live.",
    "How is the coffee here?",
    "What do you think about getting up early?",
    "How was the train ride?",
    "Should I go to the party tonight?",
    "Tell me about your last holiday.",
    "What is it like to own a dog?",
    "How did the football match go?",
    "What do you think of supermarkets?",
    "How was school as a child?",
    "Tell me about your garden.",
    "What do you think of long meetings?",
)


@dataclass(frozen=True, slots=True)
class Figures:
    """One condition: the mean compound score and the share of negative replies, each with its interval, and costs."""

    condition: str
    compound: float
    compound_interval: tuple[float, float]
    negative: float
    negative_interval: tuple[float, float]
    kl: float
    perplexity: float
    example: str


def main(
    texts: Annotated[int, typer.Option(help="Replies to each question.")] = 4,
    tokens: Annotated[int, typer.Option(help="Tokens of a reply, at most.")] = 60,
    controls: Annotated[int, typer.Option(help="Random directions.")] = 4,
    seed: Annotated[int, typer.Option(help="Of sampling and of the random directions.")] = 0,
    out: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    lm = load_model("smollm2")
    profile = load_profile(shipped_profiles(lm.identity)["cheerful"])
    plain = [encode_prompt(lm.tokenizer, [Message("user", question)]) for question in QUESTIONS]
    asked = [
        encode_prompt(lm.tokenizer, [Message("system", PROMPT), Message("user", question)]) for question in QUESTIONS
    ]
    runs: list[tuple[str, Profile, float, Sequence[list[int]]]] = [
        (f"{profile.name} at {strength:+g}", profile, strength, plain) for strength in STRENGTHS
    ]
    for control in random_controls(profile, controls, seed=seed):
        runs += [(f"{control.name} at {strength:+g}", control, strength, plain) for strength in (-1.0, 1.0)]
    runs.append((f"system prompt: {PROMPT}", profile, 0.0, asked))
    found = []
    with steerable(lm) as steered, Progress() as progress:
        for name, one, strength, prompts in progress.track(runs, description="conditions"):
            found.append(measured(steered, name, one, strength, prompts, texts, tokens, seed))
    show(found)
    if out is not None:
        out.write_text(json.dumps([asdict(one) for one in found], indent=1) + "\n")


def measured(
    steered: SteeredModel,
    name: str,
    profile: Profile,
    strength: float,
    prompts: Sequence[list[int]],
    texts: int,
    tokens: int,
    seed: int,
) -> Figures:
    rows = [prompt for prompt in prompts for _ in range(texts)]
    (sampled,) = steered.sample_and_compare(profile, [strength], rows, tokens=tokens, seed=seed)
    written = steered.lm.tokenizer.batch_decode(sampled.texts, skip_special_tokens=True)
    judge = SentimentIntensityAnalyzer()
    scores = np.array([judge.polarity_scores(text)["compound"] for text in written]).reshape(len(prompts), texts)
    count = max(sampled.tokens, 1)

    def mean(of: np.ndarray) -> tuple[float, tuple[float, float]]:
        return float(of.mean()), bootstrap(lambda questions: float(of[questions].mean()), len(of))

    return Figures(
        name,
        *mean(scores),
        *mean((scores <= NEGATIVE).astype(float)),
        kl=float(sampled.divergences.sum()) / count,
        perplexity=math.exp(-float(sampled.likelihoods.sum()) / count),
        example=" ".join(written[0].split()),
    )


def show(found: Sequence[Figures]) -> None:
    table = Table("condition", "compound", "negative", "KL", "perplexity", title="VADER on replies of SmolLM2-135M")
    for one in found:
        low, high = one.compound_interval
        least, most = one.negative_interval
        table.add_row(
            one.condition,
            f"{one.compound:+.2f} ({low:+.2f} to {high:+.2f})",
            f"{one.negative:.0%} ({least:.0%} to {most:.0%})",
            f"{one.kl:.3f}",
            f"{one.perplexity:.1f}",
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    typer.run(main)
