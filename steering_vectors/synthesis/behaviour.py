"""What a profile does to answers, by a judge: answers with it against answers of the unsteered model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NotRequired, TypedDict

import numpy as np

from steering_vectors.data.chat import Message, encode_prompt
from steering_vectors.fitting.calibration import CalibrationSettings, calibrate_on
from steering_vectors.measures.controls import bootstrap, random_controls
from steering_vectors.measures.results import Interval
from steering_vectors.models.loading import LanguageModel
from steering_vectors.profiles.profile import Profile
from steering_vectors.progress import Progress
from steering_vectors.synthesis.folder import Folder
from steering_vectors.synthesis.judges import Case, Judge, Rule, decide, judged
from steering_vectors.synthesis.writers import Ask, Length, LocalWriter, Voice, seed_of, stored_texts
from steering_vectors.tuning.instructions import Instructions

ANSWERS, VERDICTS = "evaluation_answers.jsonl", "evaluation_verdicts.jsonl"
SAMPLES = 2  # answers to each question


class JudgedVoice(TypedDict):
    """How a voice's answers compare with the unsteered ones to the same questions, with the same random numbers.

    `preferred` is the share that the judge finds better (half for equal texts), `log_odds` the mean of its log-odds,
    both without its preference for a position. Intervals are 95 % bootstrap over questions. `words` is the mean length.
    """

    voice: str
    control: bool
    preferred: NotRequired[float]
    preferred_95: NotRequired[Interval]
    log_odds: NotRequired[float]
    log_odds_95: NotRequired[Interval]
    words: float
    ended: float


def measure_behaviour(
    lm: LanguageModel,
    profile: Profile,
    questions: Sequence[str],
    judge_question: str,
    instructions: Instructions,
    judge: Judge,
    files: Folder,
    *,
    length: Length,
    randoms: int = 2,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[JudgedVoice]:
    """Compare the profile at strengths −1 and 1, random directions at the same KL, and the instructions without a
    profile, with the unsteered model. Texts and votes are kept in the folder."""
    controls = [at_equal_kl(lm, one, questions, profile, seed) for one in random_controls(profile, randoms, seed=seed)]
    steerings = [(one.name, strength) for one in (profile, *controls) for strength in (-1, 1)]
    voices = {
        "unsteered": Voice(),
        **{f"{name}@{strength:+d}": Voice(steering=f"{name}@{strength}") for name, strength in steerings},
        "instruction": Voice(instructions.positive),
        "opposite instruction": Voice(instructions.negative),
    }
    writer = LocalWriter(lm, {one.name: one for one in (profile, *controls)}, allow_beyond_safe=True)
    texts = _written(files, writer, questions, voices, length, seed, progress)
    return _compared(files, judge, judge_question, questions, voices, texts, seed, progress)


def at_equal_kl(lm: LanguageModel, control: Profile, questions: Sequence[str], profile: Profile, seed: int) -> Profile:
    """A random direction with the unit at which strength 1 costs what it costs with the profile."""
    budget = profile.calibration.get("kl_at_1", profile.calibration.get("kl_budget"))
    if budget is None:
        return control
    prompts = [encode_prompt(lm.tokenizer, (Message("user", question),)) for question in questions]
    settings = CalibrationSettings(kl_budget=budget, text_tokens=0, seed=seed)
    return calibrate_on(lm, control, prompts, settings)


def _written(
    files: Folder,
    writer: LocalWriter,
    questions: Sequence[str],
    voices: dict[str, Voice],
    length: Length,
    seed: int,
    progress: Progress | None,
) -> dict[tuple[str, str, int], tuple[str, bool]]:
    """The texts by voice, question and sample, and whether they ended by themselves."""
    cells = [(name, question, sample) for name in voices for question in questions for sample in range(SAMPLES)]
    wanted = [
        (
            {"voice": name, "instruction": voices[name].instruction, "question": question, "sample": sample},
            Ask((Message("user", question),), voices[name], seed_of(question, sample, seed)),
        )
        for name, question, sample in cells
    ]
    rows = stored_texts(files, ANSWERS, wanted, writer, length, progress, "evaluation answers")
    return {cell: (row["text"], bool(row["ended"])) for cell, row in zip(cells, rows, strict=True)}


def _compared(
    files: Folder,
    judge: Judge,
    judge_question: str,
    questions: Sequence[str],
    voices: dict[str, Voice],
    texts: dict[tuple[str, str, int], tuple[str, bool]],
    seed: int,
    progress: Progress | None,
) -> list[JudgedVoice]:
    cells, cases = [], []
    for cell in texts:
        name, question, sample = cell
        first, second = texts[cell][0], texts["unsteered", question, sample][0]
        if name != "unsteered" and first != second:
            cells.append(cell)
            cases.append(Case(judge_question, question, first, second))
    votes = judged(files, VERDICTS, judge, cases, progress, stage="evaluation judge")
    odds = {
        cell: decision.log_odds
        for cell, decision in zip(cells, decide(votes, Rule(), biased=judge.biased), strict=True)
    }
    found = []
    for name in voices:
        mine = [(name, question, sample) for question in questions for sample in range(SAMPLES)]
        one: JudgedVoice = {
            "voice": name,
            "control": name.startswith("random-"),
            "words": float(np.mean([len(texts[cell][0].split()) for cell in mine])),
            "ended": float(np.mean([texts[cell][1] for cell in mine])),
        }
        if name != "unsteered":
            log_odds = np.array([odds.get(cell, 0.0) for cell in mine]).reshape(len(questions), SAMPLES).mean(1)
            shares = np.array([_preferred(odds.get(cell, 0.0)) for cell in mine]).reshape(len(questions), -1).mean(1)
            one["preferred"], one["preferred_95"] = _estimate(shares, seed)
            one["log_odds"], one["log_odds_95"] = _estimate(log_odds, seed)
        found.append(one)
    return found


def _preferred(log_odds: float) -> float:
    return 0.5 if log_odds == 0 else float(log_odds > 0)


def _estimate(values: np.ndarray, seed: int) -> tuple[float, Interval]:
    return float(values.mean()), bootstrap(lambda rows: float(values[rows].mean()), len(values), seed=seed)
