"""How much slower decoding and fitting are while other processes keep every processor busy.

    python -m benchmarks.speed.shared_machine [--model smollm2] [--seconds 10] [--spins 0,100,1000,default,trimtab]

A team of OpenMP workers spins while it waits for the next parallel section, and in a section for the last worker. On a
machine that others use too, a worker spins while another process has the processor of the one it waits for. For each
way of waiting (a number for GOMP_SPINCOUNT; `default` leaves it to the library, `trimtab` is what its commands do, see
steering_vectors.runtime.cpu.spinning) a process measures median times alone, and then beside one busy process for each
processor: of a decode step with 1 and with 16 rows on the path of `trimtab serve`, and of a pass over 8 texts of 64
tokens as in a fit. A process that shares its processors with as many busy ones gets half of them, so twice the time is
the floor.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from statistics import median
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from steering_vectors.runtime.cpu.spinning import spinning_unless_shared

ROWS = 16
BUSY = "while True: pass"


def main(
    model: Annotated[str, typer.Option(help="The model, as in `trimtab serve`.")] = "smollm2",
    seconds: Annotated[float, typer.Option(help="Of each measurement.")] = 10.0,
    spins: Annotated[str, typer.Option(help="Spin counts, `default` and `trimtab`.")] = "default,trimtab",
    measure: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    if measure:
        with spinning_unless_shared() if spins == "trimtab" else nullcontext():
            print(json.dumps(measured(model, seconds)), flush=True)
        return
    table = Table("spin count", "work", "alone, ms", "shared, ms", "ratio")
    for spin in spins.split(","):
        for name, (alone, shared) in _in_process(model, seconds, spin).items():
            table.add_row(spin, name, f"{alone:.1f}", f"{shared:.1f}", f"{shared / alone:.2f}")
    Console(width=100).print(table)


def _in_process(model: str, seconds: float, spin: str) -> dict[str, tuple[float, float]]:
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    if spin.isdecimal():
        environment["GOMP_SPINCOUNT"] = spin
    command = [sys.executable, "-m", "benchmarks.speed.shared_machine", "--measure", "--spins", spin]
    done = subprocess.run(
        [*command, "--model", model, "--seconds", str(seconds)],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, tuple[float, float]] = json.loads(done.stdout)
    return found


def measured(model: str, seconds: float) -> dict[str, tuple[float, float]]:
    """Median milliseconds of each kind of work, alone and beside busy processes."""
    works = works_of(model)
    alone = {name: timed(work, seconds) for name, work in works.items()}
    with busy(os.cpu_count() or 1):
        shared = {name: timed(work, seconds) for name, work in works.items()}
    return {name: (alone[name], shared[name]) for name in works}


def works_of(model: str) -> dict[str, Callable[[], object]]:
    import torch

    from steering_vectors import load_model
    from steering_vectors.runtime.choose_runner import choose_runner
    from steering_vectors.runtime.cpu.choose_packing import pack_if_faster
    from steering_vectors.runtime.cpu.threads import processors
    from steering_vectors.runtime.runner import RowInput
    from steering_vectors.steering.accelerated_bank import AcceleratedBank

    torch.set_num_threads(processors())
    lm = load_model(model)
    pack_if_faster(lm)
    bank = AcceleratedBank.over(lm, rows=ROWS)
    bank.attach()
    runner = choose_runner(lm, bank, context=64)
    ids = torch.arange(8 * 64).remainder(lm.vocab_size).view(8, 64)

    def decode(rows: int) -> Callable[[], object]:
        batch = [RowInput(slot, [9], 32) for slot in range(rows)]
        with torch.inference_mode():
            runner.forward([RowInput(slot, list(range(1, 33)), 0) for slot in range(rows)])
        return lambda: runner.forward(batch)

    return {
        "decode, 1 row": decode(1),
        f"decode, {ROWS} rows": decode(ROWS),
        "pass over 512 tokens": lambda: lm.model(input_ids=ids, use_cache=False, logits_to_keep=1),
    }


def timed(work: Callable[[], object], seconds: float) -> float:
    """The median milliseconds of a piece of work, which is repeated for so long, at least three times."""
    import torch

    times: list[float] = []
    with torch.inference_mode():
        work()
        end = time.perf_counter() + seconds
        while len(times) < 3 or time.perf_counter() < end:
            before = time.perf_counter()
            work()
            times.append(1e3 * (time.perf_counter() - before))
    return median(times)


@contextmanager
def busy(count: int) -> Iterator[None]:
    """So many processes that only compute."""
    processes = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


if __name__ == "__main__":
    typer.run(main)
