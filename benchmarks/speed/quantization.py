"""The cost of 8-bit and 4-bit weights: next-token distributions compared with the plain model, unsteered and steered.

    python -m benchmarks.speed.quantization                                      # the demo model, by its profile `warm`
    python -m benchmarks.speed.quantization --model DIR --yelp DIR_OF_YELP       # a model of stories, by sentiment

The texts are sampled from the plain model at temperature 1 after held-out prompts. A profile is fitted on the plain
model in bfloat16 and steers all models. KL is in nats per position, from the plain model with the same steering. The
effect of steering is KL(steered‖unsteered) of the same model. `packed` is the plain model with --cpu-prepack, which
rounds at other places.
"""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Annotated, Any, get_args

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.quality.dose_response import PREFERENCES
from benchmarks.quality.sentiment import OPENINGS, unpaired
from steering_vectors import Profile, fit, load_model, load_pairs
from steering_vectors.data.batches import Encoded
from steering_vectors.data.chat import encode_prompt
from steering_vectors.data.corpus import sampling_prompts
from steering_vectors.measures.divergence import kl_divergence
from steering_vectors.measures.steered_model import steerable
from steering_vectors.models.loading import LanguageModel
from steering_vectors.runtime.cpu.packing import pack
from steering_vectors.runtime.cpu.quantization import Kind

STRENGTHS = (0.0, 1.0)


def main(
    model: Annotated[str, typer.Option(help="demo, or a directory.")] = "demo",
    manner: Annotated[str, typer.Option(help="The demo model's profile.")] = "warm",
    yelp: Annotated[Path | None, typer.Option(help="Directory with sentiment.dev.0 and sentiment.dev.1.")] = None,
    texts: Annotated[int, typer.Option(help="Number of scored texts.")] = 64,
    out: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    plain = load_model(model, dtype="bfloat16")
    profile = _fitted(plain, manner, yelp)
    examples = _written(plain, _prompts(plain, manner) if yelp is None else _openings(plain), texts)
    base = measure(plain, profile, examples)
    found = {"bfloat16": compared(base, base)}
    for kind in (None, *get_args(Kind)):
        packed = load_model(model, dtype="bfloat16")
        pack(packed.model, kind)
        found[kind or "packed"] = compared(measure(packed, profile, examples), base)
    _show(found, model)
    if out is not None:
        out.write_text(json.dumps(found, indent=1) + "\n")


def measure(
    language_model: LanguageModel, profile: Profile, examples: list[Encoded]
) -> dict[float, tuple[torch.Tensor, float]]:
    """Log-probabilities `[positions, vocabulary]` and the perplexity of the texts, by strength."""
    found = {}
    with steerable(language_model) as steered:
        for strength in STRENGTHS:
            steered.write(profile, strength)
            predictions = torch.cat(list(steered.predictions(examples, steer=strength != 0)))
            sums, counts = steered.log_likelihoods(examples, steer=strength != 0)
            found[strength] = (predictions, math.exp(-float(sums.sum() / counts.sum())))
    return found


def compared(
    quantised: dict[float, tuple[torch.Tensor, float]], plain: dict[float, tuple[torch.Tensor, float]]
) -> dict[str, Any]:
    figures: dict[str, Any] = {"positions": len(plain[0.0][0])}
    for strength in STRENGTHS:
        ours, theirs = quantised[strength][0], plain[strength][0]
        figures[f"at {strength:g}"] = {
            "kl": float(kl_divergence(ours, theirs).mean()),
            "same_first": float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()),
            "perplexity": quantised[strength][1],
        }
    figures["steering_kl"] = float(kl_divergence(quantised[1.0][0], quantised[0.0][0]).mean())
    return figures


def _fitted(language_model: LanguageModel, manner: str, yelp: Path | None) -> Profile:
    if yelp is None:
        return fit(language_model, None, load_pairs(PREFERENCES / f"{manner}.train.jsonl"), name=manner)
    with tempfile.TemporaryDirectory() as directory:
        return fit(language_model, None, load_pairs(unpaired(yelp, 1500, Path(directory))), name="positive")


def _prompts(language_model: LanguageModel, manner: str) -> list[list[int]]:
    pairs = load_pairs(PREFERENCES / f"{manner}.heldout.jsonl")
    return sampling_prompts(language_model.tokenizer, pairs, max_tokens=None, seed=0)


def _openings(language_model: LanguageModel) -> list[list[int]]:
    return [encode_prompt(language_model.tokenizer, opening) for opening in OPENINGS]


def _written(language_model: LanguageModel, prompts: list[list[int]], count: int) -> list[Encoded]:
    """Sample texts from the plain model."""
    chosen = [prompts[index % len(prompts)] for index in range(count)]
    with steerable(language_model) as steered:
        return steered.continuations(chosen, tokens=48, seed=0)


def _show(found: dict[str, dict[str, Any]], title: str) -> None:
    table = Table(
        "", "strength", "KL from plain", "same first token", "perplexity", "KL of steering",
        title=f"{title}, {found['bfloat16']['positions']} positions",
    )  # fmt: skip
    for kind, figures in found.items():
        for strength in STRENGTHS:
            at = figures[f"at {strength:g}"]
            cells = (f"{at['kl']:.5f}", f"{at['same_first']:.3f}", f"{at['perplexity']:.3f}")
            table.add_row(kind, f"{strength:g}", *cells, f"{figures['steering_kl']:.4f}" if strength else "")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
