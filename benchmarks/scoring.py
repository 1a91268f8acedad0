"""How fast given texts are scored: `/v1/completions` with `echo`, against raw batched forward passes of the model.

    python benchmarks/scoring.py --model demo|DIR|SHAPE [--texts 1000] [--length 24] [--pairs 5] [--json FILE]

The floor is what a researcher's own loop does at best: right-padded batches of as many rows as the server has slots,
one forward pass each, log-softmax and the log-probabilities of the texts' tokens. Both run alternately in one process
tree with the same number of threads; medians of the pairs' ratios are quoted. Every log-probability is compared.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import httpx
import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.serving import serving
from benchmarks.shapes import SHAPES, model_of, save_shape
from steering_vectors.models import LanguageModel

Texts = list[list[int]]


def main(
    model: Annotated[str, typer.Option(help="demo, a directory, or a shape with random weights.")] = "demo",
    texts: Annotated[int, typer.Option(help="How many texts.")] = 1000,
    length: Annotated[int, typer.Option(help="Tokens of the longest; the shortest has half of them.")] = 24,
    slots: Annotated[int, typer.Option(help="Rows of the server, and of the raw batches.")] = 16,
    pairs: Annotated[int, typer.Option(help="How often both are measured.")] = 5,
    threads: Annotated[int, typer.Option(help="Threads of torch, for both.")] = 1,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    out: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as scratch:
        source = str(save_shape(model, Path(scratch), dtype=getattr(torch, dtype))) if model in SHAPES else model
        plain = model_of(source, dtype=getattr(torch, dtype))
        ids = _texts(plain, texts, length)
        settings = {"slots": slots, "threads": threads, "dtype": dtype, "max_queue": texts}
        with serving(source, Path(scratch) / "profiles", **settings) as server:
            runs = [(_raw(plain, ids, slots), _echo(server.url, ids)) for _ in range(pairs + 1)][
                1:
            ]  # the first warms up
    _check(runs[-1])
    figures = _figures(ids, runs) | {"model": model, "slots": slots, "threads": threads, "dtype": dtype}
    _show(figures)
    if out is not None:
        out.write_text(json.dumps(figures, indent=2) + "\n")


def _texts(model: LanguageModel, count: int, length: int) -> Texts:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(length // 2, length + 1, (count,), generator=generator).tolist()
    return [torch.randint(3, model.vocab_size, (size,), generator=generator).tolist() for size in lengths]


def _raw(model: LanguageModel, texts: Texts, rows: int) -> tuple[float, list[list[float]]]:
    """Seconds, and the log-probabilities of every text's tokens but the first."""
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


def _echo(url: str, texts: Texts) -> tuple[float, list[list[float]]]:
    """The same over HTTP, in one request, as lm-evaluation-harness and its like send them."""
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


def _check(run: Sequence[tuple[float, list[list[float]]]]) -> None:
    (_, raw), (_, echoed) = run
    worst = max(abs(a - b) for one, other in zip(raw, echoed, strict=True) for a, b in zip(one, other, strict=True))
    Console().print(f"largest difference of a log-probability: {worst:.2g}")


def _figures(texts: Texts, runs: Sequence[Any]) -> dict[str, Any]:
    tokens = sum(map(len, texts))
    return {
        "texts": len(texts),
        "tokens": tokens,
        "raw_tokens_per_second": [round(tokens / raw[0]) for raw, _ in runs],
        "echo_tokens_per_second": [round(tokens / echo[0]) for _, echo in runs],
        "ratio": round(median(raw[0] / echo[0] for raw, echo in runs), 3),
    }


def _show(figures: dict[str, Any]) -> None:
    table = Table("pair", "raw tok/s", "echo tok/s", title=f"{figures['model']}: {figures['texts']} texts")
    for place, row in enumerate(zip(figures["raw_tokens_per_second"], figures["echo_tokens_per_second"], strict=True)):
        table.add_row(str(place), *map(str, row))
    Console().print(table)
    Console().print(f"echo over raw, median of the pairs: {figures['ratio']}")


if __name__ == "__main__":
    typer.run(main)
