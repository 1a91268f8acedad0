"""trimtab's engine and other engines on the same weights: decode, prefill, and sixteen steerings at once.

    python -m benchmarks.peers.compare --install [--venvs DIR]          # the peers' environments, once
    python -m benchmarks.peers.compare [--venvs DIR] [--peers llama,vllm] [--cases B1P32,prefill] [--pairs 5]
    python -m benchmarks.peers.compare --model smollm2 [--codes] [--peers llama]     # a real model

trimtab and a peer run in a process each. They are measured in pairs of alternating order, and the idle one is stopped.
Figures are medians over the pairs of one run, with their ranges. B16P512 is the milliseconds of a decode step with 16
rows and a context of 512 tokens. `prefill` is 16 prompts of 512 tokens. `steered` is sixteen requests with sixteen
steerings, compared with libraries that steer one request at a time. First, both sides generate a few unsteered tokens
after the same prompts. A peer that agrees on less than 80 % of them runs another model and fails.

Without `--model` the weights are random, of a known shape. With it, a GGUF file is served as `trimtab serve` does by
default, and peers load its weights in bfloat16. `--codes` computes from the file's own codes, and llama.cpp loads the
file itself.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from transformers import AutoConfig, AutoTokenizer

from benchmarks.common.shapes import SHAPES, save_shape
from benchmarks.peers.cases import (
    CHECKED,
    DECODE,
    KINDS,
    MIN_AGREEMENT,
    MIN_AGREEMENT_CODES,
    OURS,
    PREFILL,
    STEERED,
    Case,
    Comparison,
    Kind,
    case_of,
)
from benchmarks.peers.commands import Setup
from benchmarks.peers.process import PeerFailed, running
from benchmarks.peers.report import Outcome, plot, show
from benchmarks.peers.venvs import VENVS
from benchmarks.peers.write_gguf import write_gguf
from steering_vectors.models import gguf_codes
from steering_vectors.models.gguf import SMOLLM2, convert_gguf, find_gguf, smollm2_file

PAGE = 64  # tokens; lengths are rounded up to a multiple
README = Path(__file__).resolve().parents[2] / "README.md"


@dataclass(slots=True)
class Run:
    """The options and the results of a run."""

    cases: list[Case]
    pairs: int
    steps: int
    setup: Setup
    venvs: Path
    logs: Path
    versions: dict[str, str] = field(default_factory=dict)
    agreement: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    outcomes: list[Outcome] = field(default_factory=list)


def main(
    peers: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(KINDS),
    cases: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join((*DECODE, PREFILL, STEERED)),
    pairs: Annotated[int, typer.Option(min=1, help="Number of measured pairs.")] = 5,
    steps: Annotated[int, typer.Option(min=2, help="Steps per measurement; the median is used.")] = 48,
    threads: Annotated[int, typer.Option(min=1, help="Threads of each side.")] = os.cpu_count() or 1,
    steering: Annotated[bool, typer.Option(help="Steer each of our rows differently, llama.cpp's alike.")] = True,
    shape: Annotated[str, typer.Option(help="The shape of a model of Llama's architecture.")] = "smollm2-135m",
    model: Annotated[str | None, typer.Option(help="smollm2 or a GGUF file, in place of random weights.")] = None,
    codes: Annotated[bool, typer.Option("--codes", help="Compute from the codes of --model.")] = False,
    venvs: Annotated[Path, typer.Option(help="Directory of the peers' environments.")] = Path(".venv-peers"),
    install: Annotated[bool, typer.Option("--install", help="Create the environments of --peers and exit.")] = False,
    out: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
    chart: Annotated[Path | None, typer.Option("--plot", help="Draw the milliseconds per step here.")] = None,
) -> None:
    chosen = {name: _kind(name) for name in peers.split(",")}
    if install:
        raise typer.Exit(_install(chosen, venvs))
    wanted = [case_of(name) for name in cases.split(",")]
    if chart is not None and all(case.command != "decode" for case in wanted):
        raise typer.BadParameter("--plot draws decode steps: add a case like B16P512 to --cases")
    if codes and model is None:
        raise typer.BadParameter("--codes needs --model")
    with tempfile.TemporaryDirectory() as scratch:
        sizes = _Sizes(wanted, steps, threads, steering)
        if model is None:
            setup = _random_weights(shape, Path(scratch), sizes)
        else:
            setup = _weights_of(model, Path(scratch), sizes, codes)
        run = Run(wanted, pairs, steps, setup, venvs.absolute(), Path(scratch))
        for name, kind in chosen.items():
            _compare(run, name, kind)
    if run.outcomes:
        weights = f"{shape}, bfloat16" if model is None else f"{model}{', codes of the file' if codes else ''}"
        show(run.outcomes, f"{weights}, {threads} threads, medians of {pairs} pairs", run.agreement)
    for name, why in run.failed.items():
        print(f"{name}: {why}", file=sys.stderr)
    if out is not None:
        out.write_text(json.dumps(_record(run, model or shape), indent=1) + "\n")
    if chart is not None and any(outcome.unit == "ms" for outcome in run.outcomes):
        plot(run.outcomes, chart)
    raise typer.Exit(1 if run.failed else 0)


def _kind(name: str) -> Kind:
    if name not in KINDS:
        raise typer.BadParameter(f"{name!r} is not a peer; use {', '.join(KINDS)}")
    return KINDS[name]


def _install(chosen: dict[str, Kind], venvs: Path) -> int:
    """Create missing environments. Returns the number of failures."""
    failures = 0
    for venv in dict.fromkeys(kind.venv for kind in chosen.values() if kind.venv is not None):
        try:
            VENVS[venv].install(venvs.absolute(), print)
        except subprocess.CalledProcessError as failure:
            failures += 1
            print(f"{venv}: {failure}", file=sys.stderr)
    return min(failures, 1)


@dataclass(frozen=True, slots=True)
class _Sizes:
    cases: list[Case]
    steps: int
    threads: int
    steering: bool

    def setup(self, model: Path, gguf: Path, vocabulary: int, **options: Any) -> Setup:
        longest = max(case.length(self.steps) for case in self.cases)
        return Setup(
            model=str(model),
            gguf=str(gguf),
            vocabulary=vocabulary,
            threads=self.threads,
            rows=max(16, *(case.rows for case in self.cases)),
            length=-(-longest // PAGE) * PAGE,
            steered=self.steering,
            **options,
        )


def _random_weights(shape: str, directory: Path, sizes: _Sizes) -> Setup:
    """Write the weights in both formats and return the setup for the peers."""
    model = save_shape(shape, directory)
    return sizes.setup(model, write_gguf(model), SHAPES[shape]["vocab_size"])


def _weights_of(name: str, directory: Path, sizes: _Sizes, codes: bool) -> Setup:
    """The setup for a GGUF file, and its weights in bfloat16 for llama.cpp unless it loads the file itself."""
    file = smollm2_file() if name == SMOLLM2 else find_gguf(name)
    if file is None:
        raise typer.BadParameter(f"{name!r} is not a GGUF file", param_hint="--model")
    model = convert_gguf(file)
    if not codes:  # other engines take every file of tensors for weights
        model = shutil.copytree(model, directory / "bfloat16", ignore=shutil.ignore_patterns(gguf_codes.FILE))
    gguf = file if codes else write_gguf(model, directory / "bfloat16.gguf")
    vocabulary = AutoConfig.from_pretrained(model).vocab_size
    rows, context, _ = CHECKED
    text = AutoTokenizer.from_pretrained(model)(README.read_text(encoding="utf-8"))["input_ids"][: rows * context]
    return sizes.setup(model, gguf, vocabulary, served=True, codes=codes, text=text)


def _compare(run: Run, name: str, kind: Kind) -> None:
    """Measure one peer in all its cases. Failures are recorded and do not stop the run."""
    cases = [case for case in run.cases if case.command in kind.commands]
    python = Path(sys.executable) if kind.venv is None else VENVS[kind.venv].python(run.venvs)
    variables = {} if kind.venv is None else VENVS[kind.venv].environment(run.venvs)
    if not cases:
        return
    if python is None:
        remedy = f"python -m benchmarks.peers.compare --install --peers {name} --venvs {run.venvs}"
        run.failed[name] = f"skipped: it is not installed in {run.venvs}; run {remedy}"
        return
    try:
        with (
            running(OURS.command(Path(sys.executable)), run.setup, run.logs / "ours.log") as ours,
            running(kind.command(python), run.setup, run.logs / f"{name}.log", variables) as theirs,
        ):
            comparison = Comparison(
                name, ours, theirs, run.steps, MIN_AGREEMENT_CODES if run.setup.codes else MIN_AGREEMENT
            )
            run.versions |= {"trimtab": ours.version, name: theirs.version}
            run.agreement[name] = comparison.agreement()
            for case in cases:
                Console(stderr=True).print(f"{name}: {case.name}", highlight=False)
                run.outcomes.append(comparison.measure(case, run.pairs))
    except PeerFailed as failure:
        run.failed[name] = str(failure)


def _record(run: Run, shape: str) -> dict[str, Any]:
    """The complete result of a run, for a JSON file."""
    return {
        "shape": shape,
        "threads": run.setup.threads,
        "steered": run.setup.steered,
        "pairs": run.pairs,
        "steps": run.steps,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "versions": run.versions,
        "agreement": run.agreement,
        "failed": run.failed,
        "outcomes": [outcome.summary for outcome in run.outcomes],
    }


def _processor() -> str:
    """The processor's name and its bfloat16 instruction sets."""
    file = Path("/proc/cpuinfo")
    if not file.exists():
        return platform.processor()
    fields = dict(line.split("\t", 1) for line in file.read_text().splitlines() if "\t" in line)
    flags = next((value for key, value in fields.items() if key == "flags"), "")
    known = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags.split()]
    return " ".join([fields.get("model name", "").removeprefix(": "), *known])


if __name__ == "__main__":
    typer.run(main)
