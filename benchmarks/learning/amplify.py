"""Whether a judge makes a profile better round by round, at what KL, and whether a coin changes nothing.

    python -m benchmarks.learning.amplify [--base warm] [--tastes warm,careful] [--seeds 3] [--rounds 10] [--coins 10]

A profile of the demo model is fitted on the base data. `trimtab amplify` lets a rule that knows the truth compare its
answers: the demo's classifier of a manner. Each round's win rate over the first version is measured on prompts that
nothing else uses. As a control, coins are tossed in place of the rule: nothing should be promoted.
"""

from __future__ import annotations

import json
import random
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.quality.manners import is_broken, score
from server.learning.amplify import AmplifySettings, amplify, prompts_of
from server.learning.feedback_source import FeedbackSource
from server.learning.refine import ModelChoice, RefineSettings
from server.profiles.candidates import ProfileDirectory
from steering_vectors import FitSettings, LanguageModel, fit, load_model, load_pairs, save_profile
from steering_vectors.data.sources import DEMO_DIRECTORY
from steering_vectors.reports.rounds import draw_rounds
from steering_vectors.synthesis.judges import Judge
from steering_vectors.synthesis.rule_judges import RuleJudge
from steering_vectors.synthesis.writers import Length

NAME = "assistant"
TOKENS = 60


def main(
    base: Annotated[str, typer.Option(help="The demo's manner that the first version was fitted on.")] = "warm",
    base_rows: Annotated[int, typer.Option(help="Rows of its data.")] = 48,
    tastes: Annotated[
        str, typer.Option(help="The manners that the rule likes, comma-separated; -warm for cold.")
    ] = "warm,careful",
    seeds: Annotated[int, typer.Option(help="Runs with each taste.")] = 1,
    coins: Annotated[int, typer.Option(help="Runs with a coin, of one round each.")] = 0,
    rounds: Annotated[int, typer.Option(help="The maximum number of rounds.")] = 4,
    pairs: Annotated[int, typer.Option(help="Pairs of answers in a round.")] = 120,
    growth: Annotated[float, typer.Option(help="The factor of the KL budget after a promotion.")] = 1.2,
    layers: Annotated[str, typer.Option(help="Blocks that are steered.")] = "3,4,5",
    out: Annotated[Path, typer.Option(help="The folder of figures and pictures.")] = Path("amplify-figures"),
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    lm = load_model("demo")
    with tempfile.TemporaryDirectory() as folder:
        run = Runs(lm, Path(folder), base, base_rows, layers)
        for taste in filter(None, tastes.split(",")):
            for seed in range(seeds):
                judge = RuleJudge(f"manner {taste}", lambda _, text, taste=taste: taste_of(taste, text))
                report = run.amplified(judge, rounds, pairs, growth, seed)
                stem = f"{base}-{taste}-{seed}"
                (out / f"{stem}.json").write_text(json.dumps(report, indent=1))
                draw_rounds(report["rounds"], out / f"{stem}.svg", report["kl_budget"])
                show(stem, report)
        promoted = 0
        for seed in range(coins):
            judge = RuleJudge(
                f"coin {seed}", lambda prompt, text, seed=seed: random.Random(f"{seed}{prompt}{text}").random()
            )
            report = run.amplified(judge, 1, pairs, growth, seed)
            promoted += report["rounds"][1]["outcome"] == "promoted"
            show(f"coin {seed}", report)
    if coins:
        print(f"coins: {promoted} of {coins} candidates were promoted")
        (out / "coins.json").write_text(json.dumps({"coins": coins, "promoted": promoted}))
    raise typer.Exit(0 if 10 * promoted <= coins else 1)


class Runs:
    """Amplifications of one first version."""

    def __init__(self, lm: LanguageModel, folder: Path, base: str, base_rows: int, layers: str) -> None:
        self._lm, self._folder, self._count = lm, folder, 0
        self._fit = FitSettings(name=NAME, layers=layers, text_tokens=0)
        lines = (DEMO_DIRECTORY / f"{base}.train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        self._data = folder / "base.jsonl"
        self._data.write_text("".join(lines[:base_rows]), encoding="utf-8")
        self._prompts = prompts_of(load_pairs(f"demo:{base}").positives)
        self._first = save_profile(fit(lm, load_pairs(self._data), self._fit), folder)

    def amplified(self, judge: Judge, rounds: int, pairs: int, growth: float, seed: int) -> dict[str, Any]:
        began = time.process_time()
        place = self._folder / str(self._count)
        self._count += 1
        (place / "profiles").mkdir(parents=True)
        shutil.copy(self._first, place / "profiles")
        refining = RefineSettings(
            NAME,
            ModelChoice("demo"),
            FeedbackSource(file=place / "unused"),
            ProfileDirectory(place / "profiles"),
            data=str(self._data),
            fit=self._fit,
            trust=None,
        )
        settings = AmplifySettings(
            refining, place / "work", self._prompts[:240], rounds, pairs, length=Length(TOKENS, 1.0),
            test_answers=1, kl_growth=growth, kl_budget=0.4, seed=seed,
        )  # fmt: skip
        report = amplify(settings, judge, lm=self._lm)
        return {**report, "cpu_seconds": time.process_time() - began}


def taste_of(manner: str, text: str) -> float:
    """A score of texts: of a manner of the demo, or of its opposite, as in `-warm`."""
    if is_broken(text):
        return -100.0
    return -float(score(manner[1:], text)) if manner.startswith("-") else float(score(manner, text))


def show(stem: str, report: dict[str, Any]) -> None:
    rows: Sequence[dict[str, Any]] = report["rounds"]
    for row in rows:
        win = row["win"]
        print(
            f"{stem} round {row['round']}: {row['outcome']}, win rate {win['value']:.0%} ({win['low']:.0%} to "
            f"{win['high']:.0%}), KL {row['kl']:.3f}, perplexity {row['perplexity']:.2f}, {row['votes']} votes "
            f"{row['pairs']} {row['reason']}"
        )
    print(f"{stem}: {report['stopped']}, {report['cpu_seconds']:.0f} CPU s", flush=True)


if __name__ == "__main__":
    typer.run(main)
