"""`amplify`: rounds of answers, verdicts and refinement, until nothing is gained any more.

In each round the version that is served writes pairs of answers, a judge compares them, and `refine` makes the next
version of the verdicts of all rounds, which is promoted if it passes the gates. All that was written and judged is in a
folder, so a run that was killed goes on where it was.
"""

from __future__ import annotations

import math
import random
import secrets
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from typing_extensions import TypedDict

from server.learning.feedback_source import FeedbackSource
from server.learning.held_out import is_held_out, prompt_key
from server.learning.paired_bootstrap import paired_mean
from server.learning.refine import DifferenceRecord, RefineSettings, refine
from server.profiles.audit import Author
from server.profiles.candidates import Candidates
from steering_vectors.data.chat import Example, Message, encode_prompt
from steering_vectors.errors import DataError, FitError
from steering_vectors.fitting.calibration import DEFAULT_KL_BUDGET, SAMPLED_TOKENS
from steering_vectors.measures.curve import measure_points
from steering_vectors.measures.steered_model import steerable
from steering_vectors.models.loading import LanguageModel
from steering_vectors.profiles.files import read_profile
from steering_vectors.profiles.profile import Profile
from steering_vectors.profiles.shipped import shipped_profiles
from steering_vectors.progress import Progress
from steering_vectors.synthesis.debate import Prompt, shown
from steering_vectors.synthesis.folder import Folder, Row
from steering_vectors.synthesis.judges import Case, Judge, Rule, decide, judged
from steering_vectors.synthesis.writers import Ask, Length, LocalWriter, Voice, seed_of, stored_texts

FIRST, ANSWERS, VERDICTS, VOTES, ROUNDS = (
    "first.safetensors", "answers.jsonl", "verdicts.jsonl", "votes.jsonl", "rounds.jsonl",
)  # fmt: skip
NEAR, FAR = "near", "far"
TEST_SHARE = 0.5  # of held-out prompts, that no gate uses either
MIN_TEST_PROMPTS = 8
AUDITED = 1000  # latest changes of a profile, among which those of an interrupted round are looked for

Outcome = Literal["first", "rejected", "promoted"]


@dataclass(frozen=True, slots=True)
class AmplifySettings:
    """Options of `amplify`.

    - `refine`: how each round refines. Its feedback, canary share, author and KL budget are set by the round.
    - `folder`: of the work. `prompts`: to answer, of which `refine.heldout_fraction` are held out by their hashes; one
      half of these decides on promotions, the other one is the test set of the win rate.
    - `rounds`: at most. `pairs`: prompts that are answered twice in a round, one half at the strengths `near`, the
      other one at `far`, each as far as the safe range goes. `length`: how answers are drawn.
    - `question`: what the judge is asked. `rule`: which verdicts count. `test_answers`: of each version to each test
      prompt.
    - `kl_growth`: the factor by which the KL budget grows after a promotion, and in the first round. `kl_budget`: at
      which it is spent, in nats per token; 0 for twice the first version's budget.
    - `patience`: rounds in a row without a gain after which it stops.

    Raises FitError for values that cannot be used.
    """

    refine: RefineSettings
    folder: Path
    prompts: tuple[Prompt, ...]
    rounds: int = 5
    pairs: int = 96
    near: tuple[float, float] = (1.0, 1.0)
    far: tuple[float, float] = (1.5, -1.5)
    question: str = "Which answer is better?"
    length: Length = field(default_factory=Length)
    rule: Rule = field(default_factory=Rule)
    test_answers: int = 2
    kl_growth: float = 1.2
    kl_budget: float = 0.0
    patience: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.rounds, self.pairs, self.test_answers, self.patience) < 1:
            raise FitError("rounds, pairs, test answers and patience must be at least 1")
        if not 1 <= self.kl_growth < math.inf:
            raise FitError(f"kl_growth must be at least 1, not {self.kl_growth:g}")
        if not 0 <= self.kl_budget < math.inf:
            raise FitError(f"kl_budget must be a number that is not negative, not {self.kl_budget:g}")
        if self.far[0] == self.far[1]:
            raise FitError("the two far strengths must differ")
        count = sum(map(self.is_test, self.prompts))
        if count < MIN_TEST_PROMPTS:
            raise FitError(
                f"{count} of {len(self.prompts)} prompts are test prompts, and {MIN_TEST_PROMPTS} are needed: give "
                f"about {round(2 * MIN_TEST_PROMPTS / (TEST_SHARE * self.refine.heldout_fraction))} prompts"
            )

    def is_test(self, prompt: Prompt) -> bool:
        """Whether a prompt is in the test set: in no fit, no gate and no vote."""
        key = prompt_key(prompt)
        return is_held_out(key, self.refine.heldout_fraction) and is_held_out(f"test/{key}", TEST_SHARE)


class Round(TypedDict):
    """A line of `rounds.jsonl`. Line 0 is the first version.

    `version` is served after the round, `budget` the KL budget at which its candidate was fitted. `win` is the rate at
    which the judge prefers the served version's answers to the first one's on test prompts, ties by half; `kl` and
    `perplexity` are those of its texts after these prompts. `pairs` counts verdicts by kind and outcome, and `gain`,
    `gates` and `trust` are `refine`'s.
    """

    run: str
    profile: str
    judge: str
    round: int
    outcome: Outcome
    reason: str
    version: str
    budget: float
    pairs: dict[str, dict[str, int]]
    votes: int
    gain: DifferenceRecord | None
    gates: list[Any]
    trust: dict[str, Any]
    win: DifferenceRecord
    kl: float
    perplexity: float
    seconds: float
    cpu_seconds: float


class AmplifyReport(TypedDict):
    """What came of an amplification. `best` is the round with the highest win rate."""

    profile: str
    folder: str
    stopped: str
    best: int
    kl_budget: float
    rounds: list[Round]


def amplify(
    settings: AmplifySettings, judge: Judge, progress: Progress | None = None, *, lm: LanguageModel | None = None
) -> AmplifyReport:
    """Let a judge and `refine` improve a profile round by round. Each promotion is a change of the profile directory
    with a line in its audit log, and can be rolled back.

    What the folder holds is not done again. It stops after `rounds`, after `patience` rounds in a row in which nothing
    was promoted or the win rate reached no new height, or when the KL budget is spent.

    `lm` is the model, if it is loaded already. Raises DataError for a folder of other work, or if the profile was
    changed meanwhile, and what `refine`, the judge and the profile store raise.
    """
    with Folder(settings.folder) as files:
        return _Amplification(settings, judge, progress, lm or settings.refine.model.load(), files).run()


def stop_reason(rows: Sequence[Round], rounds: int, patience: int, kl_budget: float) -> str:
    """Why no round should follow these; an empty text if one should."""
    idle, best = 0, 0.5
    for row in rows[1:]:
        idle = 0 if row["outcome"] == "promoted" and row["win"]["value"] > best else idle + 1
        best = max(best, row["win"]["value"])
    spent = max((row["budget"] for row in rows if row["outcome"] != "rejected"), default=0.0)
    if max(rows[-1]["kl"], spent) >= kl_budget * (1 - 1e-9):
        return "the KL budget is spent"
    if idle >= patience:
        return f"no gain in {idle} rounds"
    return "all rounds are done" if rows[-1]["round"] >= rounds else ""


@dataclass(slots=True)
class _Shown:
    """Progress of the steps of a round as details of the bar of rounds."""

    progress: Progress | None
    rounds: int
    number: int = 0

    def __call__(self, stage: str, done: int, total: int, /, detail: str = "") -> None:
        if self.progress is not None:
            told = f"{stage} {done}/{total} {detail}".strip()
            self.progress("rounds", max(0, self.number - 1), self.rounds, detail=f"round {self.number}: {told}")

    def end(self, detail: str) -> None:
        if self.progress is not None:
            self.progress("rounds", self.number, self.rounds, detail=detail)


class _Amplification:
    """One run, within the lock of its folder."""

    def __init__(
        self, settings: AmplifySettings, judge: Judge, progress: Progress | None, lm: LanguageModel, files: Folder
    ) -> None:
        self._settings, self._judge, self._lm, self._files = settings, judge, lm, files
        self._name = settings.refine.name
        self._store = settings.refine.directory.store(shipped_profiles())
        self._candidates = Candidates(self._store)
        self._progress = _Shown(progress, settings.rounds)
        self._test = [prompt for prompt in settings.prompts if settings.is_test(prompt)]
        self._asked = [prompt for prompt in settings.prompts if not settings.is_test(prompt)]
        self._rows = cast("list[Round]", files.rows(ROUNDS, ("run", "profile", "judge", "version")))

    def run(self) -> AmplifyReport:
        self._begin()
        settings, budget = self._settings, self._kl_budget()
        while not (reason := stop_reason(self._rows, settings.rounds, settings.patience, budget)):
            self._append(self._round(len(self._rows)))
        rates = [row["win"]["value"] for row in self._rows]
        return {
            "profile": self._name,
            "folder": str(settings.folder),
            "stopped": reason,
            "best": rates.index(max(rates)),
            "kl_budget": budget,
            "rounds": self._rows,
        }

    def _begin(self) -> None:
        """Measure the first version, or check that the folder is of this work."""
        if not self._rows:
            version = self._candidates.served(self._name)
            _write(self._files.file(FIRST), self._store.read(self._name, version))
        self._first = read_profile(self._files.file(FIRST).read_bytes(), self._name)
        self._first.check_model(self._lm.identity)
        if not self._rows:
            self._append(self._measured_first(version))
        row = self._rows[0]
        if (row["profile"], row["judge"]) != (self._name, self._judge.name):
            raise DataError(
                f"{self._files.path} holds rounds of the profile {row['profile']} by the judge {row['judge']}: name "
                "another folder"
            )

    def _kl_budget(self) -> float:
        return self._settings.kl_budget or 2 * _budget_of(self._first)

    def _append(self, row: Round) -> None:
        self._files.append(ROUNDS, [cast(Row, row)])
        self._rows.append(row)

    def _measured_first(self, version: str) -> Round:
        began = time.monotonic(), time.process_time()
        kl, perplexity = self._costs(self._first)
        even: DifferenceRecord = {"value": 0.5, "low": 0.5, "high": 0.5, "prompts": len(self._test)}
        return {
            "run": secrets.token_hex(4), "profile": self._name, "judge": self._judge.name, "round": 0,
            "outcome": "first", "reason": "", "version": version, "budget": _budget_of(self._first), "pairs": {},
            "votes": 0, "gain": None, "gates": [], "trust": {}, "win": even, "kl": kl, "perplexity": perplexity,
            "seconds": _since(time.monotonic(), began[0]), "cpu_seconds": _since(time.process_time(), began[1]),
        }  # fmt: skip

    def _round(self, number: int) -> Round:
        began = time.monotonic(), time.process_time()
        self._progress.number = number
        before = self._rows[-1]
        author = f"trimtab amplify {before['run']}/{number}"
        entry = self._entry(author)
        if entry is None and self._candidates.served(self._name) != before["version"]:
            raise DataError(
                f"the profile {self._name} was changed since round {number - 1}: roll it back to "
                f"{before['version'][:8]}, or name another folder"
            )
        pairs, votes = self._voted(number, before["version"])
        budget = self._next_budget(before)
        refined = self._refined(author, budget) if entry is None else self._resumed(entry, author)
        promoted = refined["outcome"] == "promoted"
        version = refined["candidate"] if promoted else before["version"]
        win, costs = before["win"], (before["kl"], before["perplexity"])
        if promoted:
            served = self._store.load(self._name, version)
            win, costs = self._win(served), self._costs(served)
        self._progress.end(f"{refined['outcome']}, win rate {win['value']:.0%}")
        return {
            "run": before["run"], "profile": self._name, "judge": self._judge.name, "round": number,
            "outcome": refined["outcome"], "reason": refined["reason"], "version": version, "budget": budget,
            "pairs": pairs, "votes": votes, "gain": refined["gain"], "gates": refined["gates"],
            "trust": refined["trust"], "win": win, "kl": costs[0], "perplexity": costs[1],
            "seconds": _since(time.monotonic(), began[0]), "cpu_seconds": _since(time.process_time(), began[1]),
        }  # fmt: skip

    def _next_budget(self, before: Round) -> float:
        """A budget at which nothing was promoted is not raised further."""
        held = [row["budget"] for row in self._rows if row["outcome"] != "rejected"][-1]
        growth = 1.0 if before["outcome"] == "rejected" else self._settings.kl_growth
        return min(held * growth, max(held, self._kl_budget()))

    # Answers and verdicts.

    def _voted(self, number: int, version: str) -> tuple[dict[str, dict[str, int]], int]:
        """Have the served version answer, and store the verdicts of the round as votes. Returns the counts of verdicts
        by kind and outcome, and the votes of all rounds."""
        settings = self._settings
        profile = self._store.load(self._name, version)
        picked = list(self._picked(number))
        asks: list[tuple[Row, Ask]] = []
        for place, (prompt, kind) in enumerate(picked):
            for side, strength in enumerate(settings.near if kind == NEAR else settings.far):
                seed = _seed(prompt, number, place, side, settings.seed)
                row = {"round": number, "kind": kind, "side": side, "prompt": shown(prompt)}
                asks.append(_ask(row, prompt, "current", _within(profile, strength), seed))
        texts = self._texts({"current": profile}, asks)
        answers = list(zip(texts[::2], texts[1::2], strict=True))
        counts: dict[str, Counter[str]] = {NEAR: Counter(), FAR: Counter()}
        votes: list[Row] = []
        for (prompt, kind), pair, outcome in zip(picked, answers, self._verdicts(picked, answers), strict=True):
            counts[kind][outcome] += 1
            if outcome in ("first", "second"):
                chosen, rejected = pair if outcome == "first" else pair[::-1]
                votes.append(_vote(prompt, chosen, rejected, number, kind))
        known = [row for row in self._files.rows(VOTES) if row.get("round") != number]
        self._files.write(VOTES, [*known, *votes])
        return {kind: dict(found) for kind, found in counts.items()}, len(known) + len(votes)

    def _picked(self, number: int) -> Iterator[tuple[Prompt, str]]:
        """The prompts of a round and the kinds of their pairs. All prompts are used before one is used again."""
        order: list[Prompt] = []
        while len(order) < self._settings.pairs:
            again = list(self._asked)
            random.Random(seed_of(self._settings.seed, number, len(order))).shuffle(again)
            order += again
        for place, prompt in enumerate(order[: self._settings.pairs]):
            yield prompt, FAR if place % 2 else NEAR

    def _texts(self, profiles: dict[str, Profile], asks: Sequence[tuple[Row, Ask]]) -> list[str]:
        """The texts in the order of `asks`, written in batches of one steering."""
        order = sorted(range(len(asks)), key=lambda place: asks[place][1].voice.steering)
        writer = LocalWriter(self._lm, profiles)
        wanted = [asks[place] for place in order]
        rows = stored_texts(self._files, ANSWERS, wanted, writer, self._settings.length, self._progress, "answers")
        found = dict(zip(order, rows, strict=True))
        return [found[place]["text"] for place in range(len(asks))]

    def _verdicts(self, picked: Sequence[tuple[Prompt, str]], answers: Sequence[tuple[str, str]]) -> list[str]:
        """The outcome of each pair. Equal answers are not judged; nor is a pair with an empty one."""
        places = [place for place, pair in enumerate(answers) if pair[0] != pair[1] and all(map(str.strip, pair))]
        cases = [Case(self._settings.question, shown(picked[place][0]), *answers[place]) for place in places]
        votes = judged(self._files, VERDICTS, self._judge, cases, self._progress)
        decisions = decide(votes, self._settings.rule, biased=self._judge.biased)
        found = {place: one.outcome for place, one in zip(places, decisions, strict=True)}
        return [found.get(place, "equal") for place in range(len(answers))]

    # The next version.

    def _refined(self, author: str, budget: float) -> dict[str, Any]:
        given = replace(
            self._settings.refine,
            feedback=FeedbackSource(file=self._files.file(VOTES)),
            canary_share=0.0,
            author=Author(author),
            kl_budget=budget,
            bounds=replace(
                self._settings.refine.bounds,
                max_kl_ratio=self._settings.refine.bounds.max_kl_ratio * self._settings.kl_growth,
            ),
        )
        return cast("dict[str, Any]", refine(given, self._progress, lm=self._lm))

    def _entry(self, author: str) -> dict[str, Any] | None:
        """The line of the audit log of a refinement that was interrupted before its round was written down."""
        entries = self._store.audit.read(AUDITED, self._name)
        return next((one for one in entries if one["action"] == "refine" and one.get("key") == author), None)

    def _resumed(self, entry: dict[str, Any], author: str) -> dict[str, Any]:
        """What the refinement reported, but for trust. A candidate that was staged and not yet promoted is promoted."""
        trial = self._candidates.trial(self._name)
        if trial is not None and trial.phase == "canary" and trial.candidate == entry["to_version"]:
            self._candidates.promote(self._name, trial, 0.0, Author(author), entry.get("reason", ""), {})
        served, promoted = self._candidates.served(self._name), entry["to_version"] != entry["from_version"]
        if served != entry["to_version"]:
            raise DataError(
                f"the profile {self._name} was changed since it was refined: roll it back to "
                f"{entry['to_version'][:8]}, or name another folder"
            )
        figures = entry.get("figures", {})
        return {
            "outcome": "promoted" if promoted else "rejected",
            "reason": entry.get("reason", ""),
            "candidate": entry["to_version"],
            "gain": figures.get("gain"),
            "gates": figures.get("gates", []),
            "trust": {},
        }

    # Figures.

    def _win(self, served: Profile) -> DifferenceRecord:
        """How often the judge prefers the served version's answers to test prompts, with the same random numbers."""
        settings = self._settings
        asks: list[tuple[Row, Ask]] = []
        picked = [(prompt, "test") for prompt in self._test for _ in range(settings.test_answers)]
        for place, (prompt, _) in enumerate(picked):
            draw = place % settings.test_answers
            for name, profile in (("current", served), ("first", self._first)):
                row = {"test": draw, "prompt": shown(prompt)}
                strength = _within(profile, settings.refine.strength)
                asks.append(_ask(row, prompt, name, strength, _seed(prompt, "test", draw, settings.seed)))
        texts = self._texts({"current": served, "first": self._first}, asks)
        answers = list(zip(texts[::2], texts[1::2], strict=True))
        worth = {"first": 1.0, "second": 0.0}
        values = np.array([worth.get(outcome, 0.5) for outcome in self._verdicts(picked, answers)])
        found = paired_mean(values, [prompt_key(prompt) for prompt, _ in picked], seed=settings.seed)
        low, high = max(found.low, 0.0), min(found.high, 1.0)
        return {"value": found.value, "low": low, "high": high, "prompts": found.prompts}

    def _costs(self, profile: Profile) -> tuple[float, float]:
        """KL per token, and perplexity under the unsteered model, of texts after the test prompts."""
        settings = self._settings
        prompts = [encode_prompt(self._lm.tokenizer, prompt) for prompt in self._test]
        strength = _within(profile, settings.refine.strength)
        with steerable(self._lm) as steered:
            (point,) = measure_points(steered, profile, [strength], prompts, tokens=SAMPLED_TOKENS, seed=settings.seed)
        return point.kl, point.perplexity


def _ask(row: Row, prompt: Prompt, name: str, strength: float, seed: int) -> tuple[Row, Ask]:
    return {**row, "strength": strength}, Ask(prompt, Voice(steering=f"{name}@{strength:.6f}"), seed)


def _seed(prompt: Prompt, *parts: object) -> int:
    return seed_of([[one.role, one.content] for one in prompt], *parts)


def _within(profile: Profile, strength: float) -> float:
    """A strength as far as the safe range goes."""
    return math.copysign(min(abs(strength), profile.safe_limit(strength)), strength)


def _vote(prompt: Prompt, chosen: str, rejected: str, number: int, kind: str) -> Row:
    """A row in TRL's format."""
    return {
        "prompt": [{"role": one.role, "content": one.content} for one in prompt],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
        "round": number,
        "strengths": kind,
    }


def _budget_of(profile: Profile) -> float:
    return profile.calibration.get("kl_budget", DEFAULT_KL_BUDGET)


def _since(now: float, then: float) -> float:
    return round(now - then, 2)


def _write(path: Path, data: bytes) -> None:
    partial = path.with_name(f".{path.name}.part")
    partial.write_bytes(data)
    partial.replace(path)


def prompts_of(examples: Sequence[Example]) -> tuple[Prompt, ...]:
    """The distinct prompts of examples, as messages."""
    found: dict[Prompt, None] = {}
    for example in examples:
        prompt = example.prompt
        if prompt:
            found[(Message("user", prompt),) if isinstance(prompt, str) else prompt] = None
    return tuple(found)
