"""The effect of steering on the demo model: share of replies in the wanted manner against strength, over HTTP.

For every manner, a profile is fitted by mean difference on the training pairs. Its controls are random directions of
the same norm, and the same directions at the profile's KL on the measured prompts. The same held-out prompts and seeds
are used at every strength. A rule-based classifier, which fitting does not use, judges the replies.

    python -m benchmarks.quality.dose_response [--json results.json]
"""

from __future__ import annotations

import json
import sys
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
from benchmarks.quality.manners import is_broken, judge
from steering_vectors import Profile, fit, load_model, load_pairs, save_profile
from steering_vectors.data.chat import Message, encode_prompt
from steering_vectors.measures.controls import bootstrap, random_controls, span
from steering_vectors.models.loading import LanguageModel

MANNERS = ("warm", "concise", "careful", "honest")
STRENGTHS = (-1.0, -0.5, 0.0, 0.5, 1.0)
KINDS = ("random ±1, equal norm", "random ±1, equal KL")
MIN_RISE = 0.3
PREFERENCES = Path(__file__).resolve().parents[2] / "steering_vectors" / "demo" / "preferences"


def main(
    method: Annotated[str, typer.Option(help="Method of fitting.")] = "mean-diff",
    layers: Annotated[str, typer.Option(help="Blocks to steer, as in fit.")] = "auto",
    prompts: Annotated[int, typer.Option(help="Held-out prompts.")] = 64,
    randoms: Annotated[int, typer.Option(help="Random directions per manner.")] = 10,
    max_tokens: Annotated[int, typer.Option(help="Longest reply.")] = 120,
    manners: Annotated[str, typer.Option(help="Which manners, comma-separated.")] = ",".join(MANNERS),
    model: Annotated[str, typer.Option(help="The model; its preference sets must fit it.")] = "demo",
    preferences: Annotated[Path, typer.Option(help="Directory of the preference sets.")] = PREFERENCES,
    out: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    language_model = load_model(model)
    results = {}
    for manner in manners.split(","):
        pairs = load_pairs(preferences / f"{manner}.train.jsonl")
        profile = fit(language_model, None, pairs, name=manner, method=method, layers=layers)
        questions = heldout_prompts(preferences / f"{manner}.heldout.jsonl", prompts)
        results[manner] = measure(model, language_model, profile, questions, randoms, max_tokens)
        print(json.dumps({manner: results[manner]["verdict"]}), file=sys.stderr, flush=True)
    show(results, method, prompts)
    if out is not None:
        out.write_text(json.dumps(results, indent=1))
    raise typer.Exit(0 if all(result["verdict"]["holds"] for result in results.values()) else 1)


def heldout_prompts(file: Path, count: int) -> list[list[dict[str, str]]]:
    """The first `count` distinct prompts of a file of held-out pairs."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    distinct = {json.dumps(row["prompt"]): row["prompt"] for row in rows}
    if len(distinct) < count:
        raise SystemExit(f"{file}: only {len(distinct)} distinct held-out prompts")
    return list(distinct.values())[:count]


def measure(
    model: str,
    language_model: LanguageModel,
    profile: Profile,
    prompts: list[list[dict[str, str]]],
    randoms: int,
    max_tokens: int,
) -> dict[str, Any]:
    manner = profile.name
    equal_norm = random_controls(profile, randoms)
    ids = [encode_prompt(language_model.tokenizer, messages(prompt)) for prompt in prompts]
    cost = kl_on(language_model, profile, ids)
    controls = {"equal norm": equal_norm, "equal KL": at_equal_kl(language_model, equal_norm, ids, cost)}
    with tempfile.TemporaryDirectory() as directory:
        for one in (profile, *chain.from_iterable(controls.values())):
            save_profile(one, Path(directory))
        with serving(model, Path(directory)) as server:
            replies = {s: ask(server, profile.name, s, prompts, max_tokens) for s in STRENGTHS}
            random_shares = {
                kind: {
                    s: [float(judged(manner, ask(server, one.name, s, prompts, max_tokens)).mean()) for one in ones]
                    for s in (-1.0, 1.0)
                }
                for kind, ones in controls.items()
            }
    hits = {s: judged(manner, answers) for s, answers in replies.items()}
    shares = {s: float(marks.mean()) for s, marks in hits.items()}
    gain = hits[1.0] - hits[-1.0]
    return {
        "shares": shares,
        "broken": {s: sum(is_broken(answer["text"]) for answer in answers) for s, answers in replies.items()},
        "cut_off": {s: sum(not has_ended(answer) for answer in answers) for s, answers in replies.items()},
        "random": random_shares,
        "rise": shares[1.0] - shares[-1.0],
        "rise_95": bootstrap(lambda rows: float(gain[rows].mean()), len(prompts)),
        "layers": list(profile.layers),
        "kl_at_1": profile.calibration.get("kl_at_1"),
        "kl_on_prompts": cost,
        "samples": {s: [answer["text"] for answer in answers[:3]] for s, answers in replies.items()},
        "verdict": verdict(shares, random_shares),
    }


def messages(prompt: list[dict[str, str]]) -> tuple[Message, ...]:
    return tuple(Message(**one) for one in prompt)


def verdict(
    shares: Mapping[float, float], random: Mapping[str, Mapping[float, Sequence[float]]]
) -> dict[str, float | bool]:
    """Check the shares. `random` holds each direction's share, by kind of control and strength.

    `holds` means that the share rises at every step of strength, by at least 0.3 in total, and that both ends are
    outside the range of all random directions of both kinds and signs.
    """
    drawn = [value for kind in random.values() for values in kind.values() for value in values]
    rise = shares[1.0] - shares[-1.0]
    found = {
        "rises_at_every_step": all(shares[a] < shares[b] for a, b in pairwise(STRENGTHS)),
        "rises_enough": rise >= MIN_RISE,
        "outside_random": shares[-1.0] < min(drawn) and shares[1.0] > max(drawn),
    }
    return {"rise": rise, **found, "holds": all(found.values())}


def ask(
    server: Server, profile: str, strength: float, prompts: list[list[dict[str, str]]], max_tokens: int
) -> list[dict[str, Any]]:
    bodies = [
        {
            "messages": prompt,
            "profile": profile,
            "strength": strength,
            "seed": seed,
            "max_tokens": max_tokens,
        }
        for seed, prompt in enumerate(prompts)
    ]
    return server.generate_all(bodies)


def judged(manner: str, answers: list[dict[str, Any]]) -> np.ndarray:
    """1 for each reply in the wanted manner, else 0."""
    return np.array([float(judge(manner, answer["text"], ended=has_ended(answer))) for answer in answers])


def has_ended(answer: dict[str, Any]) -> bool:
    return bool(answer["finish_reason"] == "stop")


def show(results: dict[str, Any], method: str, prompts: int) -> None:
    table = Table(title=f"Share of replies in the wanted manner ({method}, {prompts} held-out prompts)")
    for column in ("manner", *(f"α {s:+g}" for s in STRENGTHS), "rise (95 %)", *KINDS, "blocks", "KL at 1", "KL here"):
        table.add_column(column, justify="left" if column == "manner" else "right")
    for manner, result in results.items():
        low, high = result["rise_95"]
        table.add_row(
            manner,
            *(f"{value:.2f}" for value in result["shares"].values()),
            f"{result['rise']:.2f} ({low:.2f}–{high:.2f})",
            *("{:.2f}–{:.2f}".format(*span([*kind[-1.0], *kind[1.0]])) for kind in result["random"].values()),
            ",".join(map(str, result["layers"])),
            f"{result['kl_at_1']:.3f}" if result["kl_at_1"] is not None else "–",
            f"{result['kl_on_prompts']:.3f}",
        )
    Console(width=140).print(table)


if __name__ == "__main__":
    typer.run(main)
