"""Debate: answers from two opposed perspectives, rebuttals, a judge, and pairs of the verdicts that hold.

Irving, Christiano and Amodei (2018, arXiv:1805.00899) proposed it for questions that a judge cannot answer alone. Khan
et al. (2024, arXiv:2402.06782) measured that it helps judges who know less than those who debate. Here both sides write
a first answer and then argue for it, and the judge compares the first answers with the arguments beside them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from steering_vectors.data.cells import is_blank
from steering_vectors.data.chat import ROLES, Message
from steering_vectors.data.sources import find_data
from steering_vectors.data.tables import read_table
from steering_vectors.errors import DataError, FitError
from steering_vectors.progress import Progress
from steering_vectors.synthesis.folder import Folder, Row, is_storable, key_of
from steering_vectors.synthesis.judges import Case, Decision, Judge, Rule, Vote, decide, judged, position_bias
from steering_vectors.synthesis.templates import EVERYDAY
from steering_vectors.synthesis.writers import Ask, Length, Voice, Writer, seed_of, stored_texts

ANSWERS, REBUTTALS, VERDICTS, PAIRS = "answers.jsonl", "rebuttals.jsonl", "verdicts.jsonl", "pairs.jsonl"
MAX_ROUNDS = 5
SIDES = ("first", "second")
OTHER = "Another assistant gave this answer:\n\n{other}\n\nIn one or two sentences, say why your answer is better."
REPLY = "The other assistant says:\n\n{other}\n\nReply in one or two sentences, and defend your answer."

Prompt = tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class DebateSettings:
    """Options of `debate`.

    - `first`, `second`: the perspectives, which must differ.
    - `question`: what the judge is asked. `rounds`: of rebuttals; 0 judges the answers alone.
    - `length`, `rebuttal`: how answers and rebuttals are drawn. `rule`: which verdicts count.
    """

    first: Voice
    second: Voice
    question: str = "Which answer is better?"
    rounds: int = 1
    length: Length = field(default_factory=Length)
    rebuttal: Length = field(default_factory=lambda: Length(tokens=64))
    rule: Rule = field(default_factory=Rule)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.first == self.second:
            raise FitError("both sides are the same: give them different instructions, or different steerings")
        if not 0 <= self.rounds <= MAX_ROUNDS:
            raise FitError(f"rounds must be from 0 to {MAX_ROUNDS}, not {self.rounds}")
        if not self.question.strip() or not is_storable(self.question):
            raise FitError("the judge's question is empty, or no valid Unicode")

    @property
    def voices(self) -> tuple[Voice, Voice]:
        return self.first, self.second


@dataclass(frozen=True, slots=True)
class Debated:
    """What `debate` found: the file of pairs, how many there are, and figures of the verdicts."""

    file: Path
    pairs: int
    figures: dict[str, Any]
    decisions: list[Decision | None]
    """One for each prompt; None where both answers are equal or one is empty."""


def debate(
    prompts: Sequence[Prompt],
    folder: Path,
    settings: DebateSettings,
    writer: Writer,
    judge: Judge,
    *,
    progress: Progress | None = None,
) -> Debated:
    """Have both sides answer each prompt and argue, judge them, and write the pairs of the verdicts that count.

    What the folder holds is not done again. Raises DataError for a file that cannot be used, or if no verdict counts.
    """
    if not prompts:
        raise DataError("there is no prompt to debate")
    with Folder(folder) as files:
        answers = _answers(files, prompts, settings, writer, progress)
        exchanges = _rebuttals(files, prompts, answers, settings, writer, progress)
        places = [place for place, pair in enumerate(answers) if _differ(pair)]
        cases = [
            Case(settings.question, shown(prompts[place]), *answers[place], tuple(exchanges[place])) for place in places
        ]
        votes = judged(files, VERDICTS, judge, cases, progress)
        found = decide(votes, settings.rule, biased=judge.biased)
        rows = [
            _pair(prompts[place], answers[place], decision, settings, writer, judge, case)
            for place, decision, case in zip(places, found, cases, strict=True)
            if decision.outcome in SIDES
        ]
        figures = _figures(len(prompts), found, votes, judge)
        if not rows:
            raise DataError(
                f"no verdict on {len(prompts)} prompts counts ({_listed(figures['outcomes'])}): lower the confidence, "
                "use sides that differ more, or name a better judge",
                path=str(files.file(VERDICTS)),
            )
        files.made(PAIRS, key_of(rows), lambda: rows)
        by_place = dict(zip(places, found, strict=True))
        decisions = [by_place.get(place) for place in range(len(prompts))]
        return Debated(files.file(PAIRS), len(files.rows(PAIRS)), figures, decisions)


def read_prompts(path: str) -> list[Prompt]:
    """The prompts of a file: one a line in .txt, else the column `prompt` of a table, of texts or of messages.

    Equal prompts are read once. An empty path means everyday questions. Raises DataError.
    """
    if not path:
        return [(Message("user", question),) for question in EVERYDAY]
    found: list[Prompt] = []
    if path.endswith(".txt"):
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError("the file cannot be read as UTF-8", path=path) from error
        found += [(Message("user", line.strip()),) for line in lines if line.strip()]
    else:
        for row in read_table(find_data(path)).rows:
            cells = row.cells if isinstance(row.cells, dict) else {}
            try:
                found.append(_prompt(cells.get("prompt")))
            except ValueError as error:
                raise DataError(str(error), path=path, line=row.line, field="prompt") from error
    if not found:
        raise DataError("it holds no prompt", path=path)
    return list(dict.fromkeys(found))


def _prompt(value: Any) -> Prompt:
    if isinstance(value, str) and not is_blank(value):
        return (Message("user", value),)
    if not isinstance(value, list) or not value:
        raise ValueError("it must be a text, or a list of messages")
    for one in value:
        if not isinstance(one, dict) or one.get("role") not in ROLES or not isinstance(one.get("content"), str):
            raise ValueError(f"a message has a role ({', '.join(ROLES)}) and a text as content")
    return tuple(Message(one["role"], one["content"]) for one in value)


def shown(prompt: Prompt) -> str:
    """A prompt as a judge reads it: the message, or the conversation with its roles."""
    if len(prompt) == 1:
        return prompt[0].content
    return "\n\n".join(f"{message.role}: {message.content}" for message in prompt)


def _answers(
    files: Folder, prompts: Sequence[Prompt], settings: DebateSettings, writer: Writer, progress: Progress | None
) -> list[tuple[str, str]]:
    """Both sides' answers to each prompt, with the same random numbers."""
    wanted = [
        ({"side": side, "prompt": shown(prompt), **_described(voice)}, Ask(prompt, voice, _seed(prompt, settings)))
        for side, voice in zip(SIDES, settings.voices, strict=True)
        for prompt in prompts
    ]
    rows = stored_texts(files, ANSWERS, wanted, writer, settings.length, progress, "answers")
    texts = [row["text"].strip() for row in rows]
    return list(zip(texts[: len(prompts)], texts[len(prompts) :], strict=True))


def _rebuttals(
    files: Folder,
    prompts: Sequence[Prompt],
    answers: Sequence[tuple[str, str]],
    settings: DebateSettings,
    writer: Writer,
    progress: Progress | None,
) -> list[list[tuple[str, str]]]:
    """What both sides say in each round. Each speaks to what the other said in the round before."""
    places = [place for place, pair in enumerate(answers) if _differ(pair)]
    talks = {
        (place, side): (*prompts[place], Message("assistant", answers[place][side]))
        for place in places
        for side in (0, 1)
    }
    last = {(place, side): answers[place][side] for place, side in talks}
    exchanges: list[list[tuple[str, str]]] = [[] for _ in prompts]
    for number in range(1, settings.rounds + 1):
        wanted = []
        cells = [(place, side) for side in (0, 1) for place in places]
        for place, side in cells:
            text = (OTHER if number == 1 else REPLY).format(other=last[place, 1 - side])
            talks[place, side] = (*talks[place, side], Message("user", text))
            voice = settings.voices[side]
            row = {"round": number, "side": SIDES[side], "prompt": shown(prompts[place]), **_described(voice)}
            wanted.append((row, Ask(talks[place, side], voice, _seed(talks[place, side], settings))))
        rows = stored_texts(files, REBUTTALS, wanted, writer, settings.rebuttal, progress, f"rebuttals {number}")
        for cell, row in zip(cells, rows, strict=True):
            last[cell] = row["text"].strip()
            talks[cell] = (*talks[cell], Message("assistant", last[cell]))
        for place in places:
            exchanges[place].append((last[place, 0], last[place, 1]))
    return exchanges


def _differ(pair: tuple[str, str]) -> bool:
    """Whether both answers have a text, and not the same."""
    return bool(pair[0] and pair[1]) and pair[0] != pair[1]


def _seed(talk: Prompt, settings: DebateSettings) -> int:
    return seed_of([[one.role, one.content] for one in talk], settings.seed)


def _described(voice: Voice) -> Row:
    return {"instruction": voice.instruction, "steering": voice.steering}


def _side(voice: Voice, writer: Writer) -> Row:
    return {**_described(voice), "writer": writer.source(voice)}


def _pair(
    prompt: Prompt,
    answers: tuple[str, str],
    decision: Decision,
    settings: DebateSettings,
    writer: Writer,
    judge: Judge,
    case: Case,
) -> Row:
    """A row of preference data: the answer that won over the other, and how that came about."""
    winner = SIDES.index(decision.outcome)
    chosen, rejected = answers[winner], answers[1 - winner]
    return {
        "prompt": [{"role": one.role, "content": one.content} for one in prompt],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
        "provenance": {
            "case": case.key,
            "chosen_side": _side(settings.voices[winner], writer),
            "rejected_side": _side(settings.voices[1 - winner], writer),
            "question": settings.question,
            "rounds": settings.rounds,
            "judge": judge.name,
            **decision.row(),
        },
    }


def _figures(
    prompts: int, decisions: Sequence[Decision], votes: Sequence[Sequence[Vote]], judge: Judge
) -> dict[str, Any]:
    flat = [vote for one in votes for vote in one]
    count = max(1, len(decisions))
    return {
        "prompts": prompts,
        "judged": len(decisions),
        "outcomes": dict(Counter(one.outcome for one in decisions)),
        "consistent": sum(one.consistent for one in decisions) / count,
        "agreement": sum(one.agreement for one in decisions) / count,
        "mass": sum(vote.mass for vote in flat) / max(1, len(flat)),
        "position_bias": {str(key): value for key, value in position_bias(flat).items()} if judge.biased else {},
        "judge": judge.name,
    }


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name}: {count}" for name, count in counts.items()) or "all answers are equal or empty"
