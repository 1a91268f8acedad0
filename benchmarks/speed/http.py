"""Load on a live server over HTTP: rates, waits for the first and the next token, and CPU time by thread.

    python -m benchmarks.speed.http --model demo|DIR|SHAPE [--streams 16 | --rate 2] [--requests 128] [--plot FILE.svg]
    python -m benchmarks.speed.http --against-engine
    python -m benchmarks.speed.http --model SHAPE --context 2048 --long-prompts --completions 512

`--against-engine` measures output tokens per second over HTTP relative to the engine alone, in pairs. `--long-prompts`
measures the p99 of the wait between tokens relative to its median, while prompts of 1,024 tokens arrive.

Requests are synthetic (`jobs`): streamed, with mixed lengths, profiles and strengths. The server is a local process
with this one as its only client. CPU times come from /proc. Without `--rate`, and always with `--against-engine` and
`--long-prompts`, streams are closed loops.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.common.engine_alone import Alone, engine_alone
from benchmarks.common.jobs import ROUTES, Job, Lengths, Target, lengths_of, make_jobs, target
from benchmarks.common.latencies import check, figures, first_waits, percentiles, waits
from benchmarks.common.latency_plot import draw
from benchmarks.common.load import Client, Done
from benchmarks.common.serving import Server, serving

STEADY = 16  # prompt tokens of the streams that are measured while long prompts arrive
Waits = dict[str, dict[str, list[float]]]


@dataclass(frozen=True, slots=True)
class Plan:
    """The load of a run."""

    target: Target
    settings: dict[str, Any]
    route: Any
    streams: int
    rate: float | None
    requests: int
    seconds: float
    prompts: Lengths
    completions: Lengths
    pairs: int
    long: int
    arrivals: int

    def jobs(self, seed: int) -> list[Job]:
        """The jobs of a run. Different seeds give different jobs, so that no run reuses prefixes of another."""
        return make_jobs(self.target, self.requests, prompts=self.prompts, completions=self.completions, seed=seed)

    def client(self, server: Server) -> Client:
        return Client(server, self.target, self.route, self.seconds)


def main(
    model: Annotated[str, typer.Option(help="demo, a directory, or a shape with random weights.")] = "demo",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "bfloat16",
    streams: Annotated[int, typer.Option(help="Number of concurrent closed loops.")] = 16,
    rate: Annotated[float | None, typer.Option(help="Arrivals per second (Poisson) in place of closed loops.")] = None,
    requests: Annotated[int, typer.Option(help="Number of requests in each run.")] = 128,
    seconds: Annotated[
        float,
        typer.Option(help="Start no request after this time. A run of three times this length fails."),
    ] = 60,
    prompts: Annotated[str, typer.Option(help="Prompt tokens, from:to.")] = "16:128",
    completions: Annotated[str, typer.Option(help="Completion tokens, from:to.")] = "16:128",
    profiles: Annotated[int, typer.Option(help="Number of random profiles.")] = 8,
    route: Annotated[str, typer.Option(help=" or ".join(ROUTES))] = "completions",
    slots: Annotated[int, typer.Option(help="Rows of the server.")] = 20,
    context: Annotated[int | None, typer.Option(help="The server's context; else the model's, up to 4096.")] = None,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 1,
    prepack: Annotated[bool | None, typer.Option(help="As in `trimtab serve`.")] = None,
    engine_process: Annotated[bool, typer.Option(help="Serve with --engine-process.")] = False,
    against_engine: Annotated[bool, typer.Option("--against-engine", help="In pairs with the engine alone.")] = False,
    pairs: Annotated[int, typer.Option(help="How many pairs.")] = 5,
    long_prompts: Annotated[bool, typer.Option("--long-prompts", help="Waits while long prompts arrive.")] = False,
    long: Annotated[int, typer.Option(help="Tokens of a long prompt.")] = 1024,
    arrivals: Annotated[int, typer.Option(help="Number of long prompts; --rate per second, default 0.5.")] = 16,
    out: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the waits here.")] = None,
) -> None:
    if route not in ROUTES or (against_engine and long_prompts):
        raise typer.BadParameter(f"--route is {' or '.join(ROUTES)}; choose one of --against-engine and --long-prompts")
    given = {"slots": slots, "threads": threads, "dtype": dtype, "cpu_prepack": prepack, "context": context}
    settings = {name: value for name, value in given.items() if value is not None}
    with target(model, dtype=dtype, profiles=profiles) as made:
        ranges = (lengths_of(prompts), lengths_of(completions))
        plan = Plan(made, settings, route, streams, rate, requests, seconds, *ranges, pairs, long, arrivals)
        measure = against if against_engine else stalls if long_prompts else load
        with serving(made.source, made.profiles, engine_process=engine_process, **settings) as server:
            found, seen = measure(plan, server)
    head = {
        "model": model,
        **settings,
        "engine_process": engine_process,
        "route": route,
        "streams": streams,
        "rate": rate,
        "profiles": profiles,
    }
    found = {**head, "prompts": prompts, "completions": completions, **found}
    if out is not None:
        out.write_text(json.dumps(found, indent=2) + "\n")
    if plot is not None:
        draw(seen, plot, title=f"{model}, {dtype}: {found['mode']}")


def load(plan: Plan, server: Server) -> tuple[dict[str, Any], Waits]:
    """Measure one run, after a small one that warms up."""
    client = plan.client(server)
    client.timed(client.streams(plan.jobs(1)[: plan.streams], plan.streams))
    jobs = plan.jobs(0)
    work = client.streams(jobs, plan.streams) if plan.rate is None else client.arrivals(jobs, plan.rate)
    done, spent = client.timed(work)
    found = figures(done, spent)
    show(found, f"{len(done)} requests")
    return {"mode": "load", **found}, {"load": seen_by(done)}


def against(plan: Plan, server: Server) -> tuple[dict[str, Any], Waits]:
    """Run the same jobs over HTTP and on the engine alone, in pairs of alternating order. The first pair warms up."""
    taken: list[dict[str, Any]] = []
    seen: list[Done] = []
    with engine_alone(plan.target, **plan.settings) as alone:
        for pair in range(plan.pairs + 1):
            jobs = plan.jobs(pair)
            before = alone.run(jobs, plan.streams) if pair % 2 else None
            done, spent = plan.client(server).timed(plan.client(server).streams(jobs, plan.streams))
            engine = before or alone.run(jobs, plan.streams)
            if len(done) < len(jobs):
                raise RuntimeError(f"{len(jobs) - len(done)} requests did not start in time; raise --seconds")
            found = figures(done, spent)
            if pair:
                taken.append(
                    {
                        "http": found,
                        "alone": floor(engine, found["output_tokens"]),
                        "ratio": round(engine.wall / spent.wall, 4),
                    }
                )
                seen += done
    ratio = round(median(pair["ratio"] for pair in taken), 4)
    show_pairs(taken, ratio)
    return {"mode": "against the engine", "ratio": ratio, "pairs": taken}, {"over HTTP": seen_by(seen)}


def floor(engine: Alone, tokens: int) -> dict[str, Any]:
    return {
        "output_tokens_per_second": round(tokens / engine.wall, 1),
        "engine_ms_per_1000_tokens": round(1e6 * engine.threads.engine / tokens, 1),
        "event_loop_ms_per_1000_tokens": round(1e6 * engine.threads.loop / tokens, 1),
        "tokens_per_step": round(tokens / engine.steps, 2),
        "step_ms": round(1e3 * engine.wall / engine.steps, 3),
        "engine_waited_for_a_processor": round(engine.threads.engine_waited / engine.wall, 4),
    }


def stalls(plan: Plan, server: Server) -> tuple[dict[str, Any], Waits]:
    """Measure streams alone, then while long prompts arrive that generate one token each. The streams have short
    prompts and the longest of `completions`, so that they rarely start a new request."""
    room = int(httpx.get(f"{server.url}/v1/models").json()["data"][0]["max_model_len"])
    if room <= plan.long:
        raise typer.BadParameter(
            f"the context of {room} tokens cannot hold prompts of {plan.long}; set --long or --model"
        )
    if plan.settings["slots"] <= plan.streams:
        raise typer.BadParameter("long prompts need more slots than the streams use; raise --slots")
    client, length = plan.client(server), min(plan.completions[1], room - STEADY)
    quiet, spent = client.timed(client.streams(steady(plan.target, length, plan.streams, seed=1), plan.streams))
    coming = make_jobs(plan.target, plan.arrivals, prompts=(plan.long,) * 2, completions=(1, 1), seed=2)
    (done, arrived), both = client.timed(_disturbed(client, plan, length, coming))
    check(arrived)
    found: dict[str, Any] = {"quiet": figures(quiet, spent), "arriving": figures(done, both)}
    for one in found.values():
        one["p99_over_median"] = round(one["between_tokens_ms"]["p99"] / one["between_tokens_ms"]["p50"], 3)
    found["long"] = {"tokens": plan.long, "arrived": len(arrived), "first_token_ms": percentiles(first_waits(arrived))}
    for name in ("quiet", "arriving"):
        show(found[name], name)
    Console().print(
        f"p99 over median of the wait between tokens: {found['arriving']['p99_over_median']} "
        f"(by themselves {found['quiet']['p99_over_median']})"
    )
    return {"mode": "long prompts", **found}, {"by themselves": seen_by(quiet), "as they arrive": seen_by(done)}


async def _disturbed(client: Client, plan: Plan, length: int, coming: list[Job]) -> tuple[list[Done], list[Done]]:
    """The streams continue until the last long prompt is answered."""
    arriving = asyncio.create_task(client.arrivals(coming, plan.rate or 0.5))

    def until_then() -> Iterator[Job]:
        seed = 3
        while not arriving.done():
            yield from steady(plan.target, length, 1, seed=seed)
            seed += 1

    return await client.streams(until_then(), plan.streams), await arriving


def steady(made_for: Target, length: int, count: int, *, seed: int) -> list[Job]:
    return make_jobs(made_for, count, prompts=(STEADY,) * 2, completions=(length,) * 2, seed=seed)


def seen_by(runs: list[Done]) -> dict[str, list[float]]:
    return {"first token": first_waits(runs), "between tokens": waits(runs)}


def show(found: dict[str, Any], title: str) -> None:
    console = Console(width=120)
    console.print(
        f"{title}: {found['requests_per_second']} requests/s, {found['output_tokens_per_second']} output tokens/s, "
        f"{found['rows']} rows decoding, {found['tokens_per_piece']} tokens per piece"
    )
    table = Table("ms", "p50", "p95", "p99", title="Waits")
    for name in ("first_token_ms", "between_tokens_ms"):
        table.add_row(name.removesuffix("_ms").replace("_", " "), *(f"{value:.1f}" for value in found[name].values()))
    console.print(table)
    table = Table("thread", "of the run", "ms per 1,000 tokens", "ms per step", title="Processor time")
    for name, part in found["processors"].items():
        if "of_wall" in part:
            table.add_row(
                name, f"{part['of_wall']:.0%}", f"{part['ms_per_1000_tokens']:.0f}", f"{part['ms_per_step']:.2f}"
            )
    console.print(table)
    waited = found["processors"]["waited_for_a_processor"]
    console.print(f"waiting for a processor: engine {waited['engine']:.0%}, event loop {waited['event loop']:.0%}")


def show_pairs(taken: list[dict[str, Any]], ratio: float) -> None:
    table = Table(title="Output tokens per second, and CPU ms per 1,000 tokens")
    for column in ("pair", "HTTP", "alone", "ratio", "engine, HTTP", "event loop, HTTP", "engine, alone"):
        table.add_column(column, justify="right")
    for place, pair in enumerate(taken):
        over, alone = pair["http"], pair["alone"]
        table.add_row(
            str(place),
            f"{over['output_tokens_per_second']:.0f}",
            f"{alone['output_tokens_per_second']:.0f}",
            f"{pair['ratio']:.3f}",
            f"{over['processors']['engine']['ms_per_1000_tokens']:.0f}",
            f"{over['processors']['event loop']['ms_per_1000_tokens']:.0f}",
            f"{alone['engine_ms_per_1000_tokens']:.0f}",
        )
    Console(width=120).print(table)
    Console().print(f"HTTP relative to the engine alone, median of the pairs: {ratio}")


if __name__ == "__main__":
    typer.run(main)
