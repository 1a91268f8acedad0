"""A profile from a sentence: contrast instructions and questions, answers of both sides, a judge, a fit, an evaluation.

The steps are those of persona vectors (Chen et al. 2025, arXiv:2507.21509), with two differences. Answers are read
after the question alone, not after the instruction that they were written under, because that is how a profile is
served. And the judge compares the two answers to a question instead of grading each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from steering_vectors.data.chat import Message
from steering_vectors.data.sources import load_pairs
from steering_vectors.errors import DataError, FitError, ProfileError
from steering_vectors.evaluation.preference_suite import EvaluationSettings, evaluate
from steering_vectors.fitting.calibration import DEFAULT_KL_BUDGET
from steering_vectors.fitting.fit import FitSettings, fit
from steering_vectors.measures.long_texts import DEFAULT_TEXT_TOKENS
from steering_vectors.models.loading import LanguageModel
from steering_vectors.profiles.files import load_profile, save_profile
from steering_vectors.profiles.metadata import OptionValue
from steering_vectors.profiles.profile import NAME_PATTERN, NAME_RULE, Profile
from steering_vectors.progress import Progress
from steering_vectors.synthesis.behaviour import measure_behaviour
from steering_vectors.synthesis.brief import Brief, brief_in
from steering_vectors.synthesis.folder import Folder, Row, key_of
from steering_vectors.synthesis.judges import Case, Decision, Judge, Rule, decide, judged, position_bias
from steering_vectors.synthesis.templates import Trait
from steering_vectors.synthesis.writers import Ask, Length, Voice, Writer, seed_of, stored_texts

DESCRIPTION, ANSWERS, VERDICTS = "description.json", "answers.jsonl", "verdicts.jsonl"
PAIRS, HELD_OUT, FIT, EVALUATION = "pairs.jsonl", "held_out_pairs.jsonl", "fit.json", "evaluation.json"
MIN_PAIRS = 24  # for a fit; it holds out a fifth of them, and splits that again
MIN_HELD_OUT = 16  # for an evaluation
STRENGTHS = (-1.0, 0.0, 1.0)
SIDES = ("positive", "negative")
TELLS = 0.6  # of the pairs; a judge that names fewer right says little


@dataclass(frozen=True, slots=True)
class DescribeSettings:
    """Options of `describe`.

    - `name`: of the profile. `opposite`: what the other side should be like; by default the sentence's opposite.
    - `instructions`, `questions`: how many are made for a folder that has none; templates have five pairs of
      instructions. One question in four is held out for the evaluation.
    - `samples`: answers to each question under each instruction. `length`: how they are drawn.
    - `rule`: which verdicts count.
    - `method`, `options`, `layers`, `kl_budget`, `text_tokens`: as in `FitSettings`.
    - `randoms`: random directions at the same KL, as controls of the evaluation. `evaluate=False` leaves it out.
    """

    name: str
    opposite: str = ""
    instructions: int = 5
    questions: int = 48
    samples: int = 1
    length: Length = field(default_factory=Length)
    rule: Rule = field(default_factory=Rule)
    method: str = "mean-diff"
    options: Mapping[str, OptionValue] = field(default_factory=dict)
    layers: str = "auto"
    kl_budget: float = DEFAULT_KL_BUDGET
    text_tokens: int = DEFAULT_TEXT_TOKENS
    randoms: int = 2
    evaluate: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("instructions", 1), ("questions", 12), ("samples", 1), ("randoms", 0)):
            if getattr(self, name) < least:
                raise FitError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if not NAME_PATTERN.fullmatch(self.name):
            raise ProfileError(f"{self.name!r} is not a profile name; {NAME_RULE}")

    def fit_settings(self, description: str) -> FitSettings:
        return FitSettings(
            name=self.name,
            description=description,
            method=self.method,
            options=self.options,
            layers=self.layers,
            kl_budget=self.kl_budget,
            text_tokens=self.text_tokens,
            seed=self.seed,
        )


@dataclass(frozen=True, slots=True)
class Participants:
    """Who does what: `brief` writes instructions and questions (None: templates), `answers` writes both sides, and
    `judge` compares them (None: every pair of different answers is kept)."""

    answers: Writer
    brief: Writer | None = None
    judge: Judge | None = None


@dataclass(frozen=True, slots=True)
class Candidate:
    """Two answers to a question, under both instructions of a pair."""

    question: str
    held_out: bool
    positive: Row
    negative: Row

    @property
    def texts(self) -> tuple[str, str]:
        return self.positive["text"], self.negative["text"]

    @property
    def fault(self) -> str:
        """Why the pair cannot be used whatever a judge says."""
        first, second = (" ".join(text.split()) for text in self.texts)
        if not first or not second:
            return "an answer is empty"
        return "both answers are equal" if first == second else ""


@dataclass(frozen=True, slots=True)
class Described:
    """What `describe` made: the profile, its file, figures of the pairs, of the judge and of the profile, and notes."""

    profile: Profile
    file: Path
    folder: Path
    pairs: dict[str, Any]
    judge: dict[str, Any] | None
    evaluation: dict[str, Any] | None
    notes: list[str]


def describe(
    lm: LanguageModel,
    sentence: str,
    folder: Path,
    out: Path,
    settings: DescribeSettings,
    participants: Participants,
    *,
    progress: Progress | None = None,
) -> Described:
    """Make a profile from a sentence in a folder, and store it in the directory `out`.

    What the folder holds already is used as it is, and only what depends on a change is made again. Raises DataError if
    the folder belongs to another sentence, if a file cannot be read, and if too few pairs survive the judge; FitError
    if no profile can be fitted to them.
    """
    trait = Trait(sentence, settings.opposite)
    fitting = settings.fit_settings(trait.clean)  # refuses bad values before any work
    with Folder(folder) as files:
        _check_description(files, trait)
        brief = brief_in(
            files,
            trait,
            instructions=settings.instructions,
            questions=settings.questions,
            writer=participants.brief,
            seed=settings.seed,
        )
        candidates = _answered(files, brief, settings, participants.answers, progress)
        decisions, judge_figures = _judged(files, trait, candidates, settings, participants.judge, progress)
        counts = _write_pairs(files, candidates, decisions, participants)
        profile, path = _fitted(lm, files, out, fitting, counts, progress)
        evaluation = None
        if settings.evaluate:
            evaluation = _evaluated(lm, files, trait, brief, profile, settings, participants, progress)
    notes = [*_judge_notes(judge_figures), *profile.metrics.get("notes", [])]
    return Described(profile, path, folder, counts, judge_figures, evaluation, notes)


def _check_description(files: Folder, trait: Trait) -> None:
    known, mine = files.values(DESCRIPTION), {"sentence": trait.clean, "opposite": trait.opposite}
    if not known:
        files.set_values(DESCRIPTION, mine)
    elif {**known, **mine} != known:
        raise DataError(
            f"{files.path} holds the work for the sentence {known.get('sentence')!r} (opposite "
            f"{known.get('opposite') or 'not given'!r}): name another folder"
        )


def _answered(
    files: Folder, brief: Brief, settings: DescribeSettings, writer: Writer, progress: Progress | None
) -> list[Candidate]:
    """The answers of both sides to all questions. Those that are not in the folder are written, and stored at once."""
    cells = [
        (question, pair, sample)
        for pair in brief.instructions
        for question in brief.questions
        for sample in range(settings.samples)
    ]
    wanted = []
    for side in SIDES:  # texts that are written together share their instruction
        for question, pair, sample in cells:
            instruction = pair.positive if side == "positive" else pair.negative
            row = {"question": question.text, "side": side, "instruction": instruction, "sample": sample}
            seed = seed_of(question.text, instruction, sample, settings.seed)
            wanted.append((row, Ask((Message("user", question.text),), Voice(instruction), seed)))
    rows = stored_texts(files, ANSWERS, wanted, writer, settings.length, progress, "answers")
    pairs = zip(cells, rows[: len(cells)], rows[len(cells) :], strict=True)
    return [Candidate(question.text, question.held_out, good, bad) for (question, _, _), good, bad in pairs]


def _judged(
    files: Folder,
    trait: Trait,
    candidates: Sequence[Candidate],
    settings: DescribeSettings,
    judge: Judge | None,
    progress: Progress | None,
) -> tuple[list[Decision | None], dict[str, Any] | None]:
    """A decision for each candidate, None without a judge and where it cannot be used, and figures of the judge."""
    usable = [place for place, one in enumerate(candidates) if not one.fault]
    if judge is None or not usable:
        return [None] * len(candidates), None
    cases = [Case(trait.question, candidates[place].question, *candidates[place].texts) for place in usable]
    votes = judged(files, VERDICTS, judge, cases, progress)
    found = decide(votes, settings.rule, biased=judge.biased)
    decisions: list[Decision | None] = [None] * len(candidates)
    for place, decision in zip(usable, found, strict=True):
        decisions[place] = decision
    flat = [vote for one in votes for vote in one]
    figures = {
        "name": judge.name,
        "cases": len(cases),
        "names_positive": _share(one.log_odds > 0 for one in found),
        "consistent": _share(one.consistent for one in found),
        "mass": sum(vote.mass for vote in flat) / len(flat),
        "position_bias": {str(key): value for key, value in position_bias(flat).items()} if judge.biased else {},
    }
    return decisions, figures


def _write_pairs(
    files: Folder, candidates: Sequence[Candidate], decisions: Sequence[Decision | None], participants: Participants
) -> dict[str, Any]:
    """Write the pairs that count, and the held-out ones. Returns how many there are, and why others were dropped."""
    dropped: Counter[str] = Counter()
    kept, held_out = [], []
    for candidate, decision in zip(candidates, decisions, strict=True):
        reason = candidate.fault or _objection(decision)
        if candidate.held_out:
            if not candidate.fault:
                held_out.append(_pair(candidate, decision, participants))
        elif reason:
            dropped[reason] += 1
        else:
            kept.append(_pair(candidate, decision, participants))
    files.made(PAIRS, key_of(kept), lambda: kept)
    files.made(HELD_OUT, key_of(held_out), lambda: held_out)
    return {
        "candidates": sum(not one.held_out for one in candidates),
        "kept": len(kept),
        "dropped": dict(dropped.most_common()),
        "in_file": len(files.rows(PAIRS)),
        "held_out": len(files.rows(HELD_OUT)),
    }


def _objection(decision: Decision | None) -> str:
    if decision is None or decision.outcome == "first":
        return ""
    return {
        "second": "the judge prefers the other side",
        "unsure": "the judge is not sure",
        "inconsistent": "the judge contradicts itself",
    }[decision.outcome]


def _pair(candidate: Candidate, decision: Decision | None, participants: Participants) -> Row:
    """A row of preference data, with what it comes from."""
    provenance: Row = {
        "instructions": [candidate.positive["instruction"], candidate.negative["instruction"]],
        "answers": [candidate.positive["key"], candidate.negative["key"]],
        "writer": candidate.positive["writer"],
    }
    if decision is not None and participants.judge is not None:
        provenance |= {"judge": participants.judge.name, **decision.row()}
    chosen, rejected = ([{"role": "assistant", "content": text}] for text in candidate.texts)
    prompt = [{"role": "user", "content": candidate.question}]
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "provenance": provenance}


def _fitted(
    lm: LanguageModel,
    files: Folder,
    out: Path,
    settings: FitSettings,
    counts: Mapping[str, Any],
    progress: Progress | None,
) -> tuple[Profile, Path]:
    """The profile of the pairs, from its file if it was fitted to the same pairs with the same settings."""
    if counts["in_file"] < MIN_PAIRS:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in counts["dropped"].items()) or "none was dropped"
        raise DataError(
            f"only {counts['in_file']} of {counts['candidates']} pairs survived ({reasons}); at least {MIN_PAIRS} are "
            "needed: edit the instructions so that both sides differ more, add questions or samples, lower the "
            "confidence, or name a better judge",
            path=str(files.file(PAIRS)),
        )
    inputs = key_of(files.sha256(PAIRS), asdict(settings), lm.identity.fingerprint)
    known, path = files.values(FIT), out / f"{settings.name}.safetensors"
    if known.get("inputs") == inputs and path.is_file():
        stored = load_profile(path)
        if stored.version == known.get("version"):
            return stored, path
    pairs = load_pairs(files.file(PAIRS))
    path = save_profile(fit(lm, pairs, settings, progress=progress), out)
    profile = load_profile(path)
    files.set_values(FIT, {"inputs": inputs, "version": profile.version, "file": str(path)})
    return profile, path


def _evaluated(
    lm: LanguageModel,
    files: Folder,
    trait: Trait,
    brief: Brief,
    profile: Profile,
    settings: DescribeSettings,
    participants: Participants,
    progress: Progress | None,
) -> dict[str, Any]:
    """Margins on the held-out pairs, and what the judge says of the answers to the held-out questions."""
    judge = participants.judge
    inputs = key_of(profile.version, files.sha256(HELD_OUT), asdict(settings), "" if judge is None else judge.name)
    known = files.values(EVALUATION)
    if known.get("inputs") == inputs:
        return known
    found: dict[str, Any] = {"inputs": inputs}
    if len(files.rows(HELD_OUT)) >= MIN_HELD_OUT:
        found["preferences"] = evaluate(
            lm,
            profile,
            load_pairs(files.file(HELD_OUT)),
            EvaluationSettings(STRENGTHS, randoms=settings.randoms, reward_samples=0, seed=settings.seed),
            instructions=brief.instructions[0],
            progress=progress,
        )
    else:
        found["note"] = f"margins need {MIN_HELD_OUT} held-out pairs: hold out more questions"
    questions = [one.text for one in brief.questions if one.held_out]
    if judge is not None and questions:
        found["behaviour"] = measure_behaviour(
            lm,
            profile,
            questions,
            trait.question,
            brief.instructions[0],
            judge,
            files,
            length=settings.length,
            randoms=settings.randoms,
            seed=settings.seed,
            progress=progress,
        )
    files.set_values(EVALUATION, found)
    return found


def _judge_notes(figures: Mapping[str, Any] | None) -> list[str]:
    if figures is None:
        return ["no judge read the answers: whether both sides differ is not known"]
    notes = []
    if figures["names_positive"] < TELLS:
        notes.append(
            f"the judge names the side that was instructed in {figures['names_positive']:.0%} of the pairs only, where "
            "half would be chance: either both sides hardly differ, or the judge cannot tell"
        )
    if figures["mass"] < 0.5:
        notes.append(
            f"the judge would begin its reply with A or B with a probability of {figures['mass']:.0%} only: it may not "
            "understand the question"
        )
    return notes


def _share(values: Any) -> float:
    listed = list(values)
    return sum(listed) / len(listed) if listed else 0.0
