"""The memory of a fit, which must not grow with the number of pairs.

Every fit (`trimtab fit` on the demo model) is a process, whose peak resident set the kernel reports. The rows are those
of the embedded set or of a file, repeated with a number in the prompt if there are too few. A process that only calls
`load_pairs` is measured too, because the rows themselves may grow. Growth is measured between the last two numbers,
because few rows do not fill a batch. The choice of blocks and the calibration are left out by default, because they
sample equally many texts for any number of rows.

    python -m benchmarks.speed.fit_memory [--rows 200,1000,2000] [--methods mean-diff,probe] [--data FILE] [--json FILE]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from steering_vectors.data.chat import Example
from steering_vectors.data.sources import load_pairs

ROOT = Path(__file__).resolve().parents[2]
METHODS = "mean-diff,probe,rahf-scit"
STEPS = 20  # of tuning, for any number of rows
BATCH = 16
LOADING = "import sys, torch, transformers; from steering_vectors import load_pairs; load_pairs(sys.argv[1])"


def main(
    rows: Annotated[str, typer.Option(help="Numbers of pairs, comma-separated.")] = "200,1000,2000",
    methods: Annotated[str, typer.Option(help="Methods of fitting, comma-separated.")] = METHODS,
    data: Annotated[str, typer.Option(help="Preference pairs, as in fit; bad rows are skipped.")] = "demo:warm",
    model: Annotated[str, typer.Option(help="The model, as in fit.")] = "demo",
    layers: Annotated[str, typer.Option(help="Blocks, as in fit.")] = "4",
    calibrate: Annotated[bool, typer.Option("--calibrate", help="Calibrate as well.")] = False,
    out: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    counts = [int(count) for count in rows.split(",")]
    common = ["--model", model, "--layers", layers, *([] if calibrate else ["--no-calibrate"])]
    found: dict[str, dict[int, float]] = {"(rows alone)": {}, **{method: {} for method in methods.split(",")}}
    with tempfile.TemporaryDirectory() as directory:
        for count in counts:
            file = write_rows(data, count, Path(directory))
            found["(rows alone)"][count] = peak([sys.executable, "-c", LOADING, str(file)], Path(directory))
            for method in methods.split(","):
                found[method][count] = peak(command(common, file, method, count, Path(directory)), Path(directory))
                print(f"{method}, {count} pairs: {found[method][count]:.0f} MiB", file=sys.stderr, flush=True)
    show(found, counts)
    if out is not None:
        out.write_text(json.dumps({"unit": "MiB of peak resident set", "peaks": found}, indent=1))


def write_rows(data: str, count: int, directory: Path) -> Path:
    """Write `count` distinct pairs, repeated with a number in the prompt if there are too few."""
    pairs = load_pairs(data, skip_bad_rows=True).pairs()
    file = directory / f"{count}.jsonl"
    with file.open("w", encoding="utf-8") as lines:
        for number in range(count):
            turn, place = divmod(number, len(pairs))
            lines.write(json.dumps(row(*pairs[place], f" ({turn})" if turn else "")) + "\n")
    return file


def row(positive: Example, negative: Example, mark: str) -> dict[str, Any]:
    sides = {"chosen": positive.completion, "rejected": negative.completion}
    if positive.prompt is None:
        return {"prompt": mark.strip() or "-", **sides}
    if isinstance(positive.prompt, str):
        return {"prompt": positive.prompt + mark, **sides}
    *before, last = ({"role": one.role, "content": one.content} for one in positive.prompt)
    replies = {key: [{"role": "assistant", "content": text}] for key, text in sides.items()}
    return {"prompt": [*before, {**last, "content": last["content"] + mark}], **replies}


def command(common: list[str], file: Path, method: str, count: int, directory: Path) -> list[str]:
    fit = [sys.executable, "-m", "server.cli", "fit", "memory", *common, "--data", str(file), "--json"]
    fit += ["--method", method, "--out", str(directory / "profiles"), "--skip-long-rows"]
    if method.startswith("rahf"):
        samples = 2 * 0.8 * count if method == "rahf-scit" else 0.8 * count
        fit += ["-o", f"epochs={STEPS * BATCH / samples:.6f}", "-o", f"batch={BATCH}"]
    return fit


def peak(words: list[str], directory: Path) -> float:
    """Run a process and return its peak resident set in MiB, as the kernel reports it."""
    environment = {**os.environ, "TRIMTAB_CACHE": str(directory / "cache")}
    process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(words)} ended with status {os.waitstatus_to_exitcode(status)}")
    return usage.ru_maxrss / 1024


def show(found: dict[str, dict[int, float]], counts: list[int]) -> None:
    table = Table(title="Peak resident set, MiB")
    for column in ("method", *(f"{count} pairs" for count in counts), "last growth"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for method, peaks in found.items():
        growth = peaks[counts[-1]] - peaks[counts[-2]] if len(counts) > 1 else 0.0
        table.add_row(method, *(f"{peaks[count]:.0f}" for count in counts), f"{growth:+.0f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
