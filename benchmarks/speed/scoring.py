"""The speed of scoring texts: `/v1/completions` with `echo`, compared with batched forward passes of the model.

    python -m benchmarks.speed.scoring --model demo|DIR|SHAPE [--texts 1000] [--length 24] [--pairs 5] [--json FILE]

The floor is a plain loop: right-padded batches of as many rows as the server has slots, one forward pass each,
log-softmax, and the log-probabilities of the texts' tokens. Both run with the same number of threads, in pairs of
alternating order. Each pair has new texts of the same lengths, and the first pair warms up. The median of the pairs'
ratios is printed with its range. The command fails if a log-probability of any pair differs by more than `BOUNDS`.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import httpx
import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.common.serving import serving
from benchmarks.common.shapes import SHAPES, model_of, save_shape
from steering_vectors.models.loading import LanguageModel

Texts = list[list[int]]
Scored = tuple[float, list[list[float]]]  # seconds, and log-probabilities of each text's tokens except the first
Pair = tuple[Scored, Scored]  # raw, echo

BOUNDS = {"float32": 1e-4, "bfloat16": 0.25}  # nats; bfloat16 rounds logits of about 10 to 1/16


def main(
    model: Annotated[str, typer.Option(help="demo, a directory, or a shape with random weights.")] = "demo",
    texts: Annotated[int, typer.Option(help="How many texts.")] = 1000,
    length: Annotated[int, typer.Option(help="Tokens of the longest text; the shortest has half as many.")] = 24,
    slots: Annotated[int, typer.Option(help="Rows of the server, and of the raw batches.")] = 16,
    pairs: Annotated[int, typer.Option(help="Number of measured pairs.")] = 5,
    threads: Annotated[int, typer.Option(help="Torch threads of both sides.")] = 1,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    out: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    if dtype not in BOUNDS:
        raise typer.BadParameter(f"--dtype is {' or '.join(BOUNDS)}, not {dtype}")
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as scratch:
        source = str(save_shape(model, Path(scratch), dtype=getattr(torch, dtype))) if model in SHAPES else model
        plain = model_of(source, dtype=getattr(torch, dtype))
        settings = {"slots": slots, "threads": threads, "dtype": dtype, "max_queue": 2 * texts}
        with serving(source, Path(scratch) / "profiles", **settings) as server:
            runs = []
            for pair in range(pairs + 1):
                ids = _texts(plain.vocab_size, texts, length, pair)
                runs.append(_in_turn(pair, partial(_raw, plain, ids, slots), partial(_echo, server.url, ids)))
    figures = _figures(sum(map(len, ids)), runs[1:]) | {"texts": texts, "model": model, "slots": slots}
    figures |= {"threads": threads, "dtype": dtype, "largest_difference": max(map(largest_difference, runs))}
    _show(figures)
    if out is not None:
        out.write_text(json.dumps(figures, indent=2) + "\n")
    if not figures["largest_difference"] <= BOUNDS[dtype]:
        sys.exit(f"a log-probability differs by {figures['largest_difference']:.2g}, more than {BOUNDS[dtype]:g}")


def _texts(vocabulary: int, count: int, length: int, pair: int) -> Texts:
    """Random ids, different in each pair, with the same lengths in all pairs."""
    lengths = torch.randint(length // 2, length + 1, (count,), generator=torch.Generator().manual_seed(0)).tolist()
    draw = torch.Generator().manual_seed(1 + pair)
    return [torch.randint(3, vocabulary, (size,), generator=draw).tolist() for size in lengths]


def _in_turn(pair: int, raw: Callable[[], Scored], echo: Callable[[], Scored]) -> Pair:
    """The results of both sides, raw first. The order of the runs alternates."""
    if pair % 2:
        echoed = echo()
        return raw(), echoed
    plain = raw()
    return plain, echo()


def _raw(model: LanguageModel, texts: Texts, rows: int) -> Scored:
    began, found = time.perf_counter(), []
    with torch.inference_mode():
        for start in range(0, len(texts), rows):
            found += _forward(model, texts[start : start + rows])
    return time.perf_counter() - began, found


def _forward(model: LanguageModel, batch: Texts) -> list[list[float]]:
    width = max(map(len, batch))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in batch])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in batch])
    log_probs = model.model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float().log_softmax(-1)
    chosen = log_probs[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1).tolist()
    return [row[: len(text) - 1] for row, text in zip(chosen, batch, strict=True)]


def _echo(url: str, texts: Texts) -> Scored:
    """Score the texts over HTTP in one request, as lm-evaluation-harness does."""
    body = {"model": _served(url), "prompt": texts, "echo": True, "max_tokens": 0, "logprobs": 0}
    began = time.perf_counter()
    response = httpx.post(f"{url}/v1/completions", json=body, timeout=600)
    response.raise_for_status()
    choices = response.json()["choices"]
    seconds = time.perf_counter() - began
    return seconds, [choice["logprobs"]["token_logprobs"][1:] for choice in choices]


def _served(url: str) -> str:
    name: str = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
    return name


def largest_difference(run: Pair) -> float:
    """The largest difference between both sides' log-probabilities of a token; nan if one is not a number."""
    (_, raw), (_, echoed) = run
    differences = [abs(a - b) for one, other in zip(raw, echoed, strict=True) for a, b in zip(one, other, strict=True)]
    return math.nan if any(map(math.isnan, differences)) else max(differences)


def _figures(tokens: int, runs: Sequence[Pair]) -> dict[str, Any]:
    """Rates, and the ratio of echo's rate to raw's. `tokens` is the number of tokens of each pair."""
    ratios = sorted(raw[0] / echo[0] for raw, echo in runs)
    return {
        "tokens": tokens,
        "raw_tokens_per_second": [round(tokens / raw[0]) for raw, _ in runs],
        "echo_tokens_per_second": [round(tokens / echo[0]) for _, echo in runs],
        "ratio": round(median(ratios), 3),
        "ratio_range": [round(ratios[0], 3), round(ratios[-1], 3)],
    }


def _show(figures: dict[str, Any]) -> None:
    table = Table("pair", "raw tok/s", "echo tok/s", title=f"{figures['model']}: {figures['texts']} texts")
    for place, row in enumerate(zip(figures["raw_tokens_per_second"], figures["echo_tokens_per_second"], strict=True)):
        table.add_row(str(place), *map(str, row))
    Console().print(table)
    low, high = figures["ratio_range"]
    Console().print(f"echo relative to raw, median of the pairs: {figures['ratio']} ({low} to {high})")
    Console().print(f"largest difference of a log-probability: {figures['largest_difference']:.2g}")


if __name__ == "__main__":
    typer.run(main)
