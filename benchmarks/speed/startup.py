"""The time from a server's command to ready, by stage, and its memory.

    python -m benchmarks.speed.startup --model demo|DIR|SHAPE [--pairs 5] [--cold] [--json FILE]

The floor is a process that imports torch and transformers and loads the same model by `from_pretrained`. Both run
alternately as new processes, and medians are printed. A server is ready when it prints so on stdout and /ready agrees;
stdout is used so that no request disturbs the loading. Memory is the resident set when ready and after every slot has
been filled, compared with the size of weights and cache, which are allocated at the start. `--cold` first drops the
files of all packages and of the model from the page cache, except those that a running process has mapped.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import httpx
import torch
import typer
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from transformers import AutoConfig

from benchmarks.common.shapes import SHAPES, save_shape
from steering_vectors.models.loading import DEMO, DEMO_DIRECTORY

PATIENCE = 300
MIB = 2**20
SERVER = [sys.executable, "-m", "server.cli", "serve"]
FLOOR = """
import sys, time
began = time.perf_counter()
import torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
imported = time.perf_counter()
torch.set_num_threads(int(sys.argv[3]))
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=sys.argv[2])
print(imported - began, time.perf_counter() - imported, flush=True)
sys.stdin.read()
"""
STAGES = """
import asyncio, json, sys, time
given, seconds, began = json.loads(sys.argv[1]), {}, time.perf_counter()
def note(stage):
    global began
    seconds[stage], began = time.perf_counter() - began, time.perf_counter()
import server.cli
note("the command line")
import torch
note("torch")
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
note("transformers")
import server.app
note("the rest of the server")
from server.settings import load_settings
from server.engines.torch.engine import TorchEngine
from steering_vectors.models.loading import load_model
settings = load_settings(given)
application = server.app.create_app(settings)
note("making the application")
torch.set_num_threads(settings.threads)
language_model = load_model(settings.model, dtype=settings.dtype)
note("loading the model")
from steering_vectors.runtime.cpu.choose_packing import pack_if_faster
from steering_vectors.runtime.cpu.packing import pack
if settings.cpu_prepack is None:
    pack_if_faster(language_model)
elif settings.cpu_prepack:
    pack(language_model.model)
note("packing its weights")
engine = TorchEngine(language_model, settings.engine_config())
note("choosing how to run it")
print(json.dumps(seconds))
asyncio.run(engine.close())
"""


@dataclass(frozen=True, slots=True)
class Started:
    """Seconds since the command, and resident bytes."""

    listens: float
    answers: float
    ready: float
    resident: dict[str, int]
    filled: dict[str, int] | None


def main(
    model: Annotated[str, typer.Option(help="demo, a directory, or a shape with random weights.")] = "demo",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "bfloat16",
    slots: Annotated[int, typer.Option(help="Rows of the server.")] = 16,
    context: Annotated[int, typer.Option(help="The server's context.")] = 512,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 1,
    prepack: Annotated[bool | None, typer.Option(help="As in `trimtab serve`.")] = None,
    pairs: Annotated[int, typer.Option(help="Number of measured pairs. Without --cold, one more pair warms up.")] = 5,
    cold: Annotated[bool, typer.Option("--cold", help="Drop files from the page cache before each start.")] = False,
    fill: Annotated[bool, typer.Option(help="Fill every slot before measuring memory.")] = True,
    out: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        number = getattr(torch, dtype)
        source = str(save_shape(model, Path(scratch), dtype=number)) if model in SHAPES else model
        directory = DEMO_DIRECTORY if source == DEMO else Path(source)
        settings = {"model": source, "dtype": dtype, "slots": slots, "context": context, "threads": threads}
        settings |= {"profiles": scratch} | ({} if prepack is None else {"cpu_prepack": prepack})
        sides: Sequence[Callable[[], Any]] = (
            lambda: start_server(settings, fill=fill),
            lambda: start_floor(directory, dtype, threads),
        )
        taken = [
            in_turn(sides, pair, [*sys.path, str(directory)] if cold else []) for pair in range(pairs + (not cold))
        ]
        figures = {**settings, "model": model, "cold": cold, **figures_of(taken[0 if cold else 1 :])}
        del figures["profiles"]
        figures["stages"] = stages(settings)
        held = {"weights": weights(directory, number), "cache": cache(directory, number, slots, context)}
        figures["bytes"] = held
    show(figures)
    if out is not None:
        out.write_text(json.dumps(figures, indent=2) + "\n")


def in_turn(sides: Sequence[Callable[[], Any]], pair: int, cold: Sequence[str]) -> tuple[Started, dict[str, Any]]:
    """Run both sides in alternating order."""
    found: dict[int, Any] = {}
    for side in ((0, 1), (1, 0))[pair % 2]:
        drop(cold)
        found[side] = sides[side]()
    return found[0], found[1]


def start_server(settings: Mapping[str, Any], *, fill: bool) -> Started:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, **{f"TRIMTAB_{key.upper()}": str(value) for key, value in settings.items()}}
    began = time.perf_counter()
    with process([*SERVER, "--port", str(port)], env=environment) as server:
        with connected(port, server) as connection:
            listens = time.perf_counter() - began
            connection.sendall(b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n")
            connection.recv(1)  # sent once everything is imported
        answers = time.perf_counter() - began
        line = server.stdout.readline()
        ready = time.perf_counter() - began
        url = f"http://127.0.0.1:{port}"
        if "serves" not in line or httpx.get(f"{url}/ready").status_code != 200:
            raise RuntimeError(f"the server did not become ready: {line!r}")
        resident = memory(server.pid)
        if fill:
            fill_slots(url, settings["slots"], settings["context"])
        return Started(listens, answers, ready, resident, memory(server.pid) if fill else None)


def start_floor(directory: Path, dtype: str, threads: int) -> dict[str, Any]:
    began = time.perf_counter()
    command = [sys.executable, "-c", FLOOR, str(directory), dtype, str(threads)]
    with process(command, env=dict(os.environ)) as plain:
        imports, load = map(float, plain.stdout.readline().split())
        return {
            "ready": time.perf_counter() - began,
            "imports": imports,
            "load": load,
            "resident": memory(plain.pid),
        }


@contextmanager
def process(command: list[str], env: dict[str, str]) -> Iterator[Any]:
    """A process whose stdout is read by line, stopped at the end."""
    made = subprocess.Popen(
        command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        yield made
    finally:
        made.terminate()
        made.communicate(timeout=30)


@contextmanager
def connected(port: int, server: subprocess.Popen[str]) -> Iterator[socket.socket]:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            connection = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
            break
        except ConnectionRefusedError:
            if time.monotonic() > deadline or server.poll() is not None:
                raise RuntimeError("the server ended or did not listen in time") from None
            time.sleep(0.01)
    with connection:
        yield connection


def fill_slots(url: str, slots: int, context: int) -> None:
    """Send one request per slot at once, which together fill every column of the cache."""
    model = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
    prompts = [[3 + row] * (context - 1) for row in range(slots)]
    body = {"model": model, "prompt": prompts, "max_tokens": 1, "ignore_eos": True}
    httpx.post(f"{url}/v1/completions", json=body, timeout=PATIENCE).raise_for_status()


def memory(pid: int) -> dict[str, int]:
    """Resident bytes now, those not backed by files, and the peak."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    names = {"all": "VmRSS", "anonymous": "RssAnon", "peak": "VmHWM"}
    return {name: 1024 * int(lines[field].split()[0]) for name, field in names.items()}


def drop(folders: Sequence[str]) -> None:
    """Ask the kernel to drop the pages of all files in these folders. It keeps mapped pages."""
    for file in (file for folder in folders if Path(folder).is_dir() for file in Path(folder).rglob("*")):
        if file.is_file() and file.suffix in (".py", ".pyc", ".so", ".safetensors", ".json"):
            with file.open("rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def stages(settings: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of each stage of a start, run in order in a new process."""
    given = json.dumps(dict(settings))
    told = subprocess.run([sys.executable, "-c", STAGES, given], stdout=subprocess.PIPE, check=True, text=True)
    return {stage: round(seconds, 3) for stage, seconds in json.loads(told.stdout).items()}


def weights(directory: Path, dtype: torch.dtype) -> int:
    """Bytes of a checkpoint's parameters in a dtype."""
    count = 0
    for file in directory.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            count += sum(torch.Size(opened.get_slice(name).get_shape()).numel() for name in opened.keys())  # noqa: SIM118
    return count * dtype.itemsize


def cache(directory: Path, dtype: torch.dtype, slots: int, context: int) -> int:
    """Bytes of the keys and values of all slots, including the spare column of each."""
    config = AutoConfig.from_pretrained(directory).get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * slots * (context + 1) * heads * size * dtype.itemsize)


def figures_of(pairs: Sequence[tuple[Started, dict[str, Any]]]) -> dict[str, Any]:
    servers, floors = [server for server, _ in pairs], [floor for _, floor in pairs]
    return {
        "server_seconds": {
            name: [round(getattr(server, name), 3) for server in servers] for name in ("listens", "answers", "ready")
        },
        "floor_seconds": {name: [round(floor[name], 3) for floor in floors] for name in ("imports", "load", "ready")},
        "ratio": round(median(server.ready / floor["ready"] for server, floor in pairs), 3),
        "resident": {
            "ready": medians([server.resident for server in servers]),
            "filled": medians([server.filled for server in servers if server.filled is not None]),
            "floor": medians([floor["resident"] for floor in floors]),
        },
    }


def medians(found: Sequence[Mapping[str, int]]) -> dict[str, int]:
    return {name: int(median(one[name] for one in found)) for name in found[0]} if found else {}


def show(figures: dict[str, Any]) -> None:
    console = Console(width=120)
    table = Table("seconds", "median", "all", title=f"Start-up of {figures['model']}{', cold' * figures['cold']}")
    server, floor = figures["server_seconds"], figures["floor_seconds"]
    rows = {
        "server listens": server["listens"],
        "server answers /health (imported)": server["answers"],
        "server is ready": server["ready"],
        "floor: imports": floor["imports"],
        "floor: loads": floor["load"],
        "floor: from its command": floor["ready"],
    }
    for name, seconds in rows.items():
        table.add_row(name, f"{median(seconds):.2f}", ", ".join(f"{one:.2f}" for one in seconds))
    console.print(table)
    console.print(f"server over floor, median of the pairs: {figures['ratio']}")
    table = Table("stage, in one process", "seconds")
    for stage, taken in figures["stages"].items():
        table.add_row(stage, f"{taken:.2f}")
    console.print(table)
    show_memory(console, figures)


def show_memory(console: Console, figures: dict[str, Any]) -> None:
    held, resident = figures["bytes"], figures["resident"]
    table = Table(title=f"MiB; weights {held['weights'] / MIB:.1f}, cache {held['cache'] / MIB:.1f}")
    for column in ("process", "resident", "of it no file's", "peak", "resident minus weights and cache"):
        table.add_column(column, justify="left" if column == "process" else "right")
    for name, found in resident.items():
        if found:
            counted = held["weights"] if name == "floor" else sum(held.values())
            table.add_row(name, *(f"{value / MIB:.0f}" for value in (*found.values(), found["all"] - counted)))
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
