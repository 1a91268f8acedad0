"""RAHF and other methods on the demo model: four manners, at equal KL where it can be set.

    python -m benchmarks.rivals.rahf --out results [--seeds 0,1,2] [--workers 2]

Each cell (a manner, a seed, a method) runs in its own process with one thread and writes one JSON file. An interrupted
run continues with the missing cells. Then a table is printed; `--table` writes it as Markdown and `--plots` as SVG.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.quality.manners import MANNERS
from benchmarks.rivals.rahf_cell import ADAPTERS, METHODS
from benchmarks.rivals.rahf_report import print_table, read_cells, write_plots, write_table

CELL = "benchmarks.rivals.rahf_cell"


def main(
    out: Annotated[Path, typer.Option(help="Directory of the cells' files and the tuned weights.")],
    manners: Annotated[str, typer.Option(help="Which manners, comma-separated.")] = ",".join(MANNERS),
    methods: Annotated[str, typer.Option(help="Which methods, comma-separated.")] = ",".join(METHODS),
    seeds: Annotated[str, typer.Option(help="Which seeds, comma-separated.")] = "0,1,2",
    workers: Annotated[int, typer.Option(help="Number of cells at a time, with one thread each.")] = 2,
    table: Annotated[Path | None, typer.Option(help="Write the table as Markdown here.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Write the plots into this directory.")] = None,
    report_only: Annotated[bool, typer.Option("--report-only", help="Run nothing; report the existing cells.")] = False,
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    cells = [
        (manner, int(seed), method)
        for seed in seeds.split(",")
        for method in ordered(methods.split(","))
        for manner in manners.split(",")
    ]
    failed = [] if report_only else run_all([cell for cell in cells if not file_of(out, *cell).exists()], out, workers)
    found = read_cells(out)
    print_table(found)
    if table is not None:
        write_table(found, table)
    if plots is not None:
        write_plots(found, plots)
    for name, reason in failed:
        print(f"failed: {name}: {reason}", file=sys.stderr)
    raise typer.Exit(1 if failed else 0)


def ordered(methods: list[str]) -> list[str]:
    """The methods in the order of the table, with adapters last, because they use the first step's cached weights."""
    unknown = set(methods) - set(METHODS)
    if unknown:
        raise typer.BadParameter(f"unknown methods: {', '.join(sorted(unknown))}; use {', '.join(METHODS)}")
    return sorted(methods, key=lambda name: (name in ADAPTERS, METHODS.index(name)))


def file_of(out: Path, manner: str, seed: int, method: str) -> Path:
    return out / f"{manner}-{seed}-{method}.json"


def run_all(cells: list[tuple[str, int, str]], out: Path, workers: int) -> list[tuple[str, str]]:
    """Run the cells. Returns the names of failed cells, with the last line of each error."""
    failed = []
    columns = (*Progress.get_default_columns(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar, ThreadPoolExecutor(workers) as pool:
        task = bar.add_task("cells", total=len(cells))
        for name, error in (one.result() for one in as_completed(list(submitted(pool, cells, out)))):
            bar.update(task, advance=1, description=name)
            if error:
                failed.append((name, error))
    return failed


def submitted(pool: ThreadPoolExecutor, cells: list[tuple[str, int, str]], out: Path) -> Iterator:
    for cell in cells:
        yield pool.submit(run_cell, *cell, out)


def run_cell(manner: str, seed: int, method: str, out: Path) -> tuple[str, str]:
    """Run one cell in its own process. Returns its name and its error, which is empty on success."""
    file = file_of(out, manner, seed, method)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRIMTAB_CACHE": str(out / "cache"),
    }
    command = [sys.executable, "-m", CELL, manner, str(seed), method, str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = done.stderr.strip().splitlines()
    return file.stem, "" if done.returncode == 0 else (lines[-1] if lines else f"status {done.returncode}")


if __name__ == "__main__":
    typer.run(main)
