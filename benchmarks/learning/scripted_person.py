"""What votes make of a profile: those of a person with a taste, and those of people who vote at random.

    python -m benchmarks.learning.scripted_person [--base warm] [--taste honest] [--votes 60] [--random-raters 10]

A profile of the demo model is served. A scripted person asks questions over HTTP, gets six answers to each, and says
which is the best and which the worst, by a hidden taste. `trimtab refine` makes a candidate of the votes. If it passes
the gates, visitors who share the taste give thumbs, and `trimtab trial` promotes the candidate. Both versions then
answer questions that nobody has voted on, and the taste scores them. `trimtab rollback` must serve the exact bytes of
the version before. As a control, people who vote at random judge pairs of answers: none of their candidates should pass
the gates.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx
import numpy as np
import typer

from benchmarks.common.serving import Server, serving
from benchmarks.learning.people import Person, Prompt, Taste, Visitors, answered, scores_of, vote_at_random
from server.learning.feedback_source import FeedbackSource
from server.learning.paired_bootstrap import paired_difference
from server.learning.refine import ModelChoice, RefineReport, RefineSettings, refine
from server.learning.trial import TrialSettings, look
from server.profiles.candidates import ProfileDirectory
from steering_vectors import FitSettings, fit, load_model, load_pairs, load_profile, save_profile
from steering_vectors.data.sources import DEMO_DIRECTORY

NAME = "assistant"
SHARE = 0.5
VISITORS = 48  # between two looks
MAX_VISITORS = 1200


def main(
    base: Annotated[str, typer.Option(help="The demo's manner that the first version was fitted on.")] = "warm",
    taste: Annotated[str, typer.Option(help="The hidden taste: a manner of the demo, or words (few are better).")] = (
        "honest"
    ),
    votes: Annotated[int, typer.Option(help="Pair votes.")] = 60,
    answers: Annotated[
        int, typer.Option(help="Answers to each question, of which the best and the worst are named.")
    ] = 6,
    quick: Annotated[
        bool, typer.Option("--quick", help="Refine at the first version's blocks, without long texts and trust.")
    ] = False,
    seeds: Annotated[int, typer.Option(help="Runs with the taste, of different people.")] = 1,
    random_raters: Annotated[int, typer.Option(help="Runs with people who vote at random.")] = 10,
    method: Annotated[str, typer.Option(help="The method of refining.")] = "mean-diff",
    first: Annotated[Path | None, typer.Option(help="The file of the first version; by default it is fitted.")] = None,
    out: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        data = first_version(base, Path(folder)) if first is None else first.read_bytes()
        tasteful = []
        for seed in range(seeds):
            with served(data, Path(folder) / f"taste-{seed}") as run:
                tasteful.append(run.with_taste(base, Taste(taste), votes, seed, method, answers, quick))
            show(tasteful[-1])
        with served(data, Path(folder) / "random") as run:
            control = run.at_random(base, votes, random_raters, method) if random_raters else []
    promoted = sum(one["outcome"] != "rejected" for one in control)
    if control:
        print(f"random raters: {promoted} of {len(control)} candidates passed the gates")
    if out is not None:
        out.write_text(json.dumps({"taste": tasteful, "random": control}, indent=1))
    holds = all(one["promoted"] and one["exact_bytes"] and one["truth"]["low"] > 0 for one in tasteful)
    raise typer.Exit(0 if holds and 10 * promoted <= len(control) else 1)


def first_version(manner: str, folder: Path) -> bytes:
    """The file of a profile that was fitted to the base data."""
    profile = fit(load_model("demo"), load_pairs(f"demo:{manner}"), FitSettings(name=NAME))
    return save_profile(profile, folder).read_bytes()


@contextmanager
def served(first: bytes, folder: Path) -> Iterator[Run]:
    """A server with a new feedback database and the first version."""
    profiles, database = folder / "profiles", folder / "feedback.db"
    profiles.mkdir(parents=True)
    (profiles / f"{NAME}.safetensors").write_bytes(first)
    settings = {"feedback_database": str(database), "keep_generations": "forever", "slots": 16}
    with serving("demo", profiles, **settings) as server:
        yield Run(server, profiles, database, first)


@dataclass(frozen=True, slots=True)
class Run:
    """One person at one server."""

    server: Server
    profiles: Path
    database: Path
    first: bytes

    def at_random(self, base: str, votes: int, raters: int, method: str) -> list[RefineReport]:
        """What `refine` says after each of some people has voted at random on the same answers. Each one's votes are
        deleted before the next one comes."""
        pairs, lm, found = answered(self.server, NAME, questions(base, "train", 0)[:votes], 2), load_model("demo"), []
        baseline = load_profile(self.profiles / f"{NAME}.safetensors")
        settings = RefineSettings(
            NAME,
            ModelChoice("demo"),
            FeedbackSource(str(self.database)),
            ProfileDirectory(self.profiles),
            data=f"demo:{base}",
            every_vote=True,
            fit=FitSettings(method=method, layers=baseline.layers, text_tokens=0),
            trust=None,
        )
        for seed in range(raters):
            vote_at_random(self.server, pairs, seed)
            report = refine(settings, lm=lm)
            print(f"random rater {seed}: {report['outcome']} ({report['reason']})", flush=True)
            found.append(report)
            if report["outcome"] == "canary":
                self._command("rollback", NAME)
            httpx.delete(f"{self.server.url}/feedback/users/random-{seed}").raise_for_status()
        return found

    def with_taste(
        self, base: str, taste: Taste, votes: int, seed: int, method: str, answers: int, quick: bool
    ) -> dict[str, Any]:
        """The whole way: votes, a candidate, a trial, a promotion, the truth, and the way back."""
        began = time.monotonic()
        person = Person(self.server, NAME, taste, seed, answers)
        given = person.vote(questions(base, "train", seed), votes)
        voted = time.monotonic()
        report = self.refine(base, method, quick)
        refined = time.monotonic()
        trial = self.trial(taste, float(np.median(person.scores))) if report["outcome"] == "canary" else None
        promoted = trial is not None and trial["action"] == "promoted"
        ended = time.monotonic()
        found = {
            "taste": taste.name,
            "votes": given,
            "promoted": promoted,
            "refine": report,
            "trial": trial,
            "seconds": {"votes": voted - began, "refine": refined - voted, "trial": ended - refined},
            "truth": None,
            "exact_bytes": None,
        }
        if promoted:
            found["truth"] = self.truth(base, taste, report["baseline"], report["candidate"])
            found["exact_bytes"] = self.rolled_back()
        return found

    def refine(self, base: str, method: str, quick: bool) -> dict[str, Any]:
        given = ["--model", "demo", "--data", f"demo:{base}", "--method", method, "--canary-share", str(SHARE)]
        if quick:
            layers = load_profile(self.profiles / f"{NAME}.safetensors").layers
            given += ["--layers", ",".join(map(str, layers)), "--text-tokens", "0", "--trust", ""]
        return self._command("refine", NAME, *given, "--feedback-database", str(self.database))

    def trial(self, taste: Taste, threshold: float) -> dict[str, Any]:
        """Let visitors come until the trial ends."""
        visitors = Visitors(self.server, NAME, taste, threshold)
        asked = questions("warm", "train", 99)
        self._wait_for_canary()
        settings = TrialSettings(NAME, FeedbackSource(str(self.database)), ProfileDirectory(self.profiles))
        for first in range(0, MAX_VISITORS, VISITORS):
            visitors.visit([asked[(first + place) % len(asked)] for place in range(VISITORS)], first)
            report = look(settings)
            if report["action"] != "none":
                break
        return {**report, "visitors": first + VISITORS}

    def truth(self, base: str, taste: Taste, old: str, new: str) -> dict[str, Any]:
        """The taste's scores of both versions' answers to questions of the held-out set."""
        asked = questions(base, "heldout", 0)
        before, after = (scores_of(self.server, f"{NAME}#{version[:12]}", asked, taste) for version in (old, new))
        found = paired_difference(after, before, [json.dumps(prompt) for prompt in asked])
        return {
            "before": float(before.mean()),
            "after": float(after.mean()),
            "gain": found.value,
            "low": found.low,
            "high": found.high,
            "questions": found.prompts,
        }

    def rolled_back(self) -> bool:
        """Whether a rollback restores the first version's bytes, in the directory and at the server."""
        self._command("rollback", NAME)
        last = time.monotonic() + 10
        while time.monotonic() < last:
            if httpx.get(f"{self.server.url}/profiles/{NAME}/file").content == self.first:
                return (self.profiles / f"{NAME}.safetensors").read_bytes() == self.first
            time.sleep(0.2)
        return False

    def _wait_for_canary(self) -> None:
        """Servers notice an alias within a second."""
        for _ in range(100):
            if httpx.get(f"{self.server.url}/profiles/{NAME}").json().get("aliases"):
                return
            time.sleep(0.1)
        raise SystemExit("the server has not noticed the canary")

    def _command(self, *words: str) -> dict[str, Any]:
        """The JSON that a command of trimtab prints."""
        command = [sys.executable, "-m", "server.cli", *words, "--profiles", str(self.profiles), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(words)}: {done.stderr}")
        found: dict[str, Any] = json.loads(done.stdout)
        return found


def questions(manner: str, part: str, seed: int) -> list[Prompt]:
    """The distinct questions of a demo set, in an order of the seed."""
    lines = (DEMO_DIRECTORY / f"{manner}.{part}.jsonl").read_text(encoding="utf-8").splitlines()
    distinct = list({json.dumps(row["prompt"]): row["prompt"] for row in map(json.loads, lines)}.values())
    random.Random(seed).shuffle(distinct)
    return distinct


def show(found: dict[str, Any]) -> None:
    report, seconds, truth = found["refine"], found["seconds"], found["truth"]
    gain = report["gain"]
    print(f"votes          {found['votes']} by the taste {found['taste']!r} in {seconds['votes']:.0f} s")
    low, high = gain["low"], gain["high"]
    print(f"refine         {report['outcome']} in {seconds['refine']:.0f} s: {report['reason']}")
    print(
        f"  held-out votes  {0.5 + gain['value']:.0%} won ({0.5 + low:.0%} to {0.5 + high:.0%}) "
        f"on {gain['prompts']} prompts"
    )
    for gate in report["gates"]:
        print(f"  {gate['name']}: {gate['value']:.3g}, {gate['rule']} {gate['bound']:.3g}")
    if found["trial"] is not None:
        trial = found["trial"]
        rates = [
            f"{trial[side]['good']} of {trial[side]['good'] + trial[side]['bad']}" for side in ("candidate", "baseline")
        ]
        print(f"trial          {trial['action']} in {seconds['trial']:.0f} s: good {rates[0]}, before {rates[1]}")
    if truth is not None:
        print(
            f"ground truth   {truth['before']:.2f} -> {truth['after']:.2f}: "
            f"{truth['gain']:+.2f} ({truth['low']:+.2f} to {truth['high']:+.2f}), {truth['questions']} questions"
        )
        print(f"rollback       exact bytes: {found['exact_bytes']}")
    print(f"in all         {sum(seconds.values()):.0f} s", flush=True)


if __name__ == "__main__":
    typer.run(main)
