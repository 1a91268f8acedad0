"""Sentiment on a real model and real data: story models steered by the sentiment of restaurant reviews.

A profile is fitted on labelled sentences (Yelp, unpaired) and served. Stories are continued at five strengths, and with
random directions of equal norm and of equal KL at strengths -1 and 1. The KL is the profile's on the openings of these
stories, not on its calibration prompts. The measure is the share of positive words among the positive and negative
words of a list that fitting does not use.

    python -m benchmarks.quality.sentiment --model DIR --data DIR_OF_YELP [--tokens 80]
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.common.serving import Server, serving
from benchmarks.quality.equal_kl import at_equal_kl, kl_on
from steering_vectors import Profile, fit, load_model, load_pairs, save_profile
from steering_vectors.data.chat import encode_prompt
from steering_vectors.measures.controls import bootstrap, random_controls, span

Shares = Mapping[float, float]

STRENGTHS = (-1.0, -0.5, 0.0, 0.5, 1.0)
MIN_RISE = 0.15
OPENINGS = (
    "Once upon a time, there was a little girl named Lily. She",
    "One day, Tom and his dog went to the park. They",
    "The old man lived in a small house. Every morning he",
    "Sara and Ben were at school. The teacher said",
    "In the forest there was a big tree. Under the tree",
    "Mia wanted to help her mom in the kitchen. She",
    "A bird sat on the roof of the house. It",
    "Max had a new toy car. He took it to",
    "It was a rainy day and the children stayed inside. They",
    "The cat looked at the box. It was",
    "Anna and her brother walked to the river. There they",
    "One night, the boy could not sleep. He",
    "The farmer had a cow and a horse. One day",
    "Lucy found a key in the garden. She",
    "Jack met a man at the store. The man",
    "The bus came late. Ella and her friend",
)
POSITIVE = frozenset(
    """
    happy happily glad joy joyful fun funny smile smiled smiles smiling laugh laughed laughing laughs love loved loves
    loving lovely nice kind kindly good great wonderful beautiful pretty best better proud excited enjoy enjoyed
    sweet yummy tasty delicious friend friends friendly hug hugged hugs play played playing thank thanked thanks safe
    warm bright shiny sunny amazing special perfect brave smart win won cheer cheered clap clapped giggled pleased
    grateful favorite helpful gentle cozy magic magical delight delighted
    """.split()
)
NEGATIVE = frozenset(
    """
    sad sadly unhappy cry cried cries crying tears angry mad scared scary afraid fear hurt hurts pain bad badly mean
    nasty hate hated hates ugly worst worse terrible horrible awful sorry lost alone lonely broke broken break dirty
    sick ill dark cold wrong fight fought fighting yell yelled shout shouted hit worried worry upset naughty trouble
    dangerous danger fell ruined spoiled stupid rude cruel mess messy tired bored boring disappointed ashamed no not
    never nothing dead died stole
    """.split()
)


def main(
    model: Annotated[str, typer.Option(help="Directory of the model.")],
    data: Annotated[Path, typer.Option(help="Directory with sentiment.dev.0 and sentiment.dev.1.")],
    tokens: Annotated[int, typer.Option(help="Length of a continuation.")] = 80,
    rows: Annotated[int, typer.Option(help="Sentences per label.")] = 1500,
    samples: Annotated[int, typer.Option(help="Continuations per strength.")] = 512,
    randoms: Annotated[int, typer.Option(help="Random directions.")] = 10,
    method: Annotated[str, typer.Option(help="Method of fitting.")] = "mean-diff",
    layers: Annotated[str, typer.Option(help="Layers, as in fit.")] = "auto",
    out: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    language_model = load_model(model)
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        pairs = load_pairs(str(unpaired(data, rows, folder)))
        profile = fit(language_model, None, pairs, name="positive", method=method, layers=layers)
        equal_norm = random_controls(profile, randoms)
        prompts = [encode_prompt(language_model.tokenizer, opening) for opening in OPENINGS]
        cost = kl_on(language_model, profile, prompts)
        controls = {"equal norm": equal_norm, "equal KL": at_equal_kl(language_model, equal_norm, prompts, cost)}
        for one in (profile, *chain.from_iterable(controls.values())):
            save_profile(one, folder / "profiles")
        with serving(model, folder / "profiles") as server:
            result = measure(server, profile, controls, samples, tokens) | {"kl_on_openings": cost}
    show(result, language_model.name, method, samples)
    if out is not None:
        out.write_text(json.dumps(result, indent=1))
    raise typer.Exit(0 if result["holds"] else 1)


def unpaired(data: Path, rows: int, folder: Path) -> Path:
    """Write the first `rows` sentences of each label in the unpaired format."""
    path = folder / "sentences.jsonl"
    lines = [
        json.dumps({"completion": sentence, "label": bool(label)})
        for label in (0, 1)
        for sentence in (data / f"sentiment.dev.{label}").read_text().splitlines()[:rows]
    ]
    path.write_text("\n".join(lines))
    return path


def measure(
    server: Server, profile: Profile, controls: dict[str, list[Profile]], samples: int, tokens: int
) -> dict[str, Any]:
    counts = {s: continued(server, profile.name, s, samples, tokens) for s in STRENGTHS}
    shares = {s: share(pairs) for s, pairs in counts.items()}
    steps = []
    for before, after in pairwise(STRENGTHS):
        a, b = counts[before], counts[after]
        steps.append(bootstrap(lambda rows, a=a, b=b: share(b[rows]) - share(a[rows]), samples))
    random_shares = {
        kind: {s: [share(continued(server, one.name, s, samples, tokens)) for one in ones] for s in (-1.0, 1.0)}
        for kind, ones in controls.items()
    }
    low, high = counts[-1.0], counts[1.0]
    return {
        "shares": shares,
        "steps_95": steps,
        "rise": shares[1.0] - shares[-1.0],
        "rise_95": bootstrap(lambda rows: share(high[rows]) - share(low[rows]), samples),
        "random": random_shares,
        "layers": list(profile.layers),
        "unit": profile.unit,
        "kl_at_1": profile.calibration["kl_at_1"],
        "random_units": [one.unit for one in controls["equal KL"]],
        "metrics": dict(profile.metrics),
        **verdict(shares, steps, random_shares),
    }


def verdict(
    shares: Shares, steps: Sequence[tuple[float, float]], random: Mapping[str, Mapping[float, Sequence[float]]]
) -> dict[str, Any]:
    """Check the shares. `random` holds each direction's share, by kind of control and strength.

    `holds` means that no step is significantly downwards, that the rise is at least 0.15 and larger than the change of
    every random direction, and that the share at +1 is above those of all random directions of both kinds and signs.
    `below_random` says whether the share at −1 is below all of them.
    """
    drawn = [value for kind in random.values() for values in kind.values() for value in values]
    moved = [abs(b - a) for kind in random.values() for a, b in zip(kind[-1.0], kind[1.0], strict=True)]
    rise = shares[1.0] - shares[-1.0]
    found = {
        "no_step_down": all(high >= 0 for _, high in steps),
        "rises": rise >= MIN_RISE and rise > max(moved),
        "above_random": shares[1.0] > max(drawn),
    }
    return {**found, "holds": all(found.values()), "below_random": shares[-1.0] < min(drawn), "random_rise": max(moved)}


def continued(server: Server, profile: str, strength: float, samples: int, tokens: int) -> np.ndarray:
    """The number of positive and of negative words in every continuation, `[samples, 2]`."""
    bodies = [
        {
            "prompt": OPENINGS[seed % len(OPENINGS)],
            "profile": profile,
            "strength": strength,
            "seed": seed,
            "max_tokens": tokens,
        }
        for seed in range(samples)
    ]
    return np.array([word_counts(answer["text"]) for answer in server.generate_all(bodies)])


def word_counts(text: str) -> tuple[int, int]:
    words = re.findall(r"[a-z]+", text.lower())
    return sum(word in POSITIVE for word in words), sum(word in NEGATIVE for word in words)


def share(counts: np.ndarray) -> float:
    """The share of positive words among positive and negative ones, over all samples."""
    positive, negative = counts.sum(0)
    return float(positive / max(1, positive + negative))


def show(result: dict[str, Any], model: str, method: str, samples: int) -> None:
    table = Table(title=f"Share of positive words, {model}, {method}, {samples} continuations")
    for column in ("", *(f"α {s:+g}" for s in STRENGTHS)):
        table.add_column(column, justify="right")
    table.add_row("share", *(f"{value:.3f}" for value in result["shares"].values()))
    table.add_row("step, 95 %", "", *(f"{low:+.3f} to {high:+.3f}" for low, high in result["steps_95"]))
    for kind, values in result["random"].items():
        cells = ("{:.3f}–{:.3f}".format(*span(values[s])) if s in values else "" for s in STRENGTHS)
        table.add_row(f"random, {kind}", *cells)
    console = Console(width=140)
    console.print(table)
    low, high = result["rise_95"]
    console.print(
        f"rise {result['rise']:.3f} (95 % {low:.3f}–{high:.3f}); blocks {result['layers']}, unit {result['unit']:.4g}, "
        f"KL at 1 {result['kl_at_1']:.3f}, on the openings {result['kl_on_openings']:.3f}; largest random rise "
        f"{result['random_rise']:.3f}; holds: {result['holds']}, -1 below random: {result['below_random']}"
    )


if __name__ == "__main__":
    typer.run(main)
