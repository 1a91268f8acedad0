"""Fit the profiles that come with trimtab, and store them in the package.

    python scripts/shipped_profiles.py --data DIR [--out DIR]

`cheerful` is fitted on SmolLM2-135M-Instruct from restaurant reviews: sentences of Yelp that were labelled by their
stars, `sentiment.dev.0` (negative) and `sentiment.dev.1` (positive) of github.com/shentianxiao/language-style-transfer
(Apache-2.0). DIR holds these two files, or a folder `yelp` with them. Each pair has a short question as its prompt, a
positive sentence as the chosen reply and a negative one as the rejected reply.
"""

from __future__ import annotations

import json
import random
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

PAIRS = 400
WORDS = (5, 18)  # of a sentence
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
DESCRIPTION = "bright and positive; the opposite is gloomy"
SHIPPED = Path(__file__).resolve().parents[1] / "steering_vectors" / "shipped"


def main(
    data: Annotated[Path, typer.Option(help="Folder with sentiment.dev.0 and sentiment.dev.1.")],
    out: Annotated[Path, typer.Option(help="Directory of profiles.")] = SHIPPED,
) -> None:
    from steering_vectors import FitSettings, fit, load_model, load_pairs, save_profile

    folder = data / "yelp" if (data / "yelp").is_dir() else data
    negative, positive = (sentences(folder / f"sentiment.dev.{label}") for label in (0, 1))
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "yelp-sentiment.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows(positive, negative)), encoding="utf-8")
        settings = FitSettings(name="cheerful", description=DESCRIPTION)
        profile = fit(load_model("smollm2"), load_pairs(file), settings)
    path = save_profile(profile, out)
    print(f"fitted {path} in {time.perf_counter() - start:.0f} s", file=sys.stderr)


def sentences(file: Path) -> list[str]:
    """The sentences of a usable length, as people write them."""
    lines = file.read_text(encoding="utf-8").splitlines()
    usable = (line for line in lines if WORDS[0] <= len(line.split()) <= WORDS[1] and not re.search("_num_|unk", line))
    return [written(line) for line in usable]


def written(tokens: str) -> str:
    """A line of separated, lowercase tokens as a sentence."""
    text = re.sub(r" (n't|'\w+|[.,!?;:%)])", r"\1", tokens.strip())
    text = text.replace("( ", "(").replace("$ ", "$").replace("`` ", '"').replace(" ''", '"')
    text = re.sub(r"\bi\b", "I", text)
    return text[:1].upper() + text[1:]


def rows(positive: Sequence[str], negative: Sequence[str]) -> list[dict[str, list[dict[str, str]]]]:
    draw = random.Random(0)
    chosen, rejected = draw.sample(positive, PAIRS), draw.sample(negative, PAIRS)
    return [
        {
            "prompt": [{"role": "user", "content": QUESTIONS[place % len(QUESTIONS)]}],
            "chosen": [{"role": "assistant", "content": chosen[place]}],
            "rejected": [{"role": "assistant", "content": rejected[place]}],
        }
        for place in range(PAIRS)
    ]


if __name__ == "__main__":
    typer.run(main)
