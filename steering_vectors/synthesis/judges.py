"""Judges of two answers: the model itself or an endpoint, asked for A or B in both orders, or a person by a file.

A judge gives votes, which are stored as they are. `decide` makes decisions of the votes of all cases together, because
a judge's preference for a position can only be told from many cases. It is removed as the mean log-odds of A over both
orders of all cases, for each wording (compare Zhao et al., arXiv:2102.09690; Zheng et al., arXiv:2309.03882).
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from steering_vectors.data.chat import Message, continuation, encode_prompt
from steering_vectors.errors import DataError, FitError
from steering_vectors.measures.steered_model import SteeredModel, steerable
from steering_vectors.models.limits import context_limit
from steering_vectors.models.loading import LanguageModel
from steering_vectors.models.tokenizers import chat_template
from steering_vectors.synthesis.endpoint import Endpoint, EndpointError, first_choice, text_of
from steering_vectors.synthesis.folder import Folder, Row, by_key, key_of

WORDINGS = (
    "Two assistants answered the same message.\n\n{case}\n\n{question} Reply with one letter, A or B.",
    "Compare two answers.\n\n{case}\n\nQuestion: {question}\nWrite A for Answer A, or B for Answer B.",
    "You judge a contest between answer A and answer B.\n\n{case}\n\n{question} Say only A or B.",
)
CHUNK = 32  # cases that are judged together
CONNECTIONS = 8
TOP = 20  # log-probabilities that are asked for, the most that OpenAI's API gives
LETTER = re.compile(r"\b([AB])\b")
PERSON = math.log(19)  # a person's choice counts as a probability of 0.95
REPEATED = 10  # one of so many cases is put to a person twice, in the other order
BALLOT = ("a", "b", "tie")

Outcome = Literal["first", "second", "unsure", "inconsistent"]


@dataclass(frozen=True, slots=True)
class Case:
    """Two answers to a prompt, and what they are compared by. `exchange` holds what each side said next, by round."""

    question: str
    prompt: str
    first: str
    second: str
    exchange: tuple[tuple[str, str], ...] = ()

    @property
    def key(self) -> str:
        return key_of(self.question, self.prompt, self.first, self.second, list(map(list, self.exchange)))

    def shown(self, swapped: bool) -> str:
        """The case as a judge reads it. If `swapped`, the first answer is B."""
        a, b = (self.second, self.first) if swapped else (self.first, self.second)
        parts = [f"Message:\n{self.prompt}", f"Answer A:\n{a}", f"Answer B:\n{b}"]
        for first, second in self.exchange:
            a, b = (second, first) if swapped else (first, second)
            parts += [f"The author of Answer A says:\n{a}", f"The author of Answer B says:\n{b}"]
        return "\n\n".join(parts)


@dataclass(frozen=True, slots=True)
class Vote:
    """One answer of a judge: the log-odds that the first answer is the better one. `swapped` says that it stood as B,
    `wording` which question was asked. `mass` is P(A) + P(B), which is small if the judge does not understand."""

    log_odds: float
    swapped: bool = False
    wording: int = 0
    mass: float = 1.0

    def row(self) -> Row:
        return {
            "log_odds": round(self.log_odds, 5),
            "swapped": self.swapped,
            "wording": self.wording,
            "mass": round(self.mass, 5),
        }


@dataclass(frozen=True, slots=True)
class Rule:
    """When a verdict counts: the probability of the better answer is at least `confidence`, it is the same in both
    orders, and at least the share `agreement` of the wordings agree with it."""

    confidence: float = 0.6
    agreement: float = 1.0

    def __post_init__(self) -> None:
        if not 0.5 <= self.confidence < 1:
            raise FitError(f"confidence must be from 0.5 to below 1, not {self.confidence:g}")


@dataclass(frozen=True, slots=True)
class Decision:
    """What the votes of a case say, without the judge's preference for a position. `probability` is that of the first
    answer being better. `agreement` is the share of wordings, each over both orders, that agree with the whole."""

    log_odds: float
    consistent: bool
    agreement: float
    outcome: Outcome

    @property
    def probability(self) -> float:
        return 1 / (1 + math.exp(-max(-700.0, self.log_odds)))

    def row(self) -> Row:
        return {
            "probability": round(self.probability, 4),
            "consistent": self.consistent,
            "agreement": round(self.agreement, 3),
        }


class Judge(Protocol):
    """Anything that compares answers. `name` is stored with its votes; a judge that is `biased` may prefer a position,
    and sees each case in both."""

    name: str
    biased: bool

    def votes(self, cases: Sequence[Case]) -> Iterator[tuple[Vote, ...]]:
        """Yield the votes of each case, in their order, as soon as they are there."""
        ...


def decide(votes: Sequence[Sequence[Vote]], rule: Rule, *, biased: bool) -> list[Decision]:
    """A decision for the votes of each case."""
    bias = position_bias([vote for one in votes for vote in one]) if biased else {}
    return [_decision([_corrected(vote, bias) for vote in one], rule) for one in votes]


def position_bias(votes: Sequence[Vote]) -> dict[int, float]:
    """The mean log-odds of A for each wording. What the answers say cancels if each case was seen in both orders."""
    seen = defaultdict(list)
    for vote in votes:
        seen[vote.wording].append(-vote.log_odds if vote.swapped else vote.log_odds)
    return {wording: sum(one) / len(one) for wording, one in seen.items()}


def _corrected(vote: Vote, bias: Mapping[int, float]) -> Vote:
    shift = bias.get(vote.wording, 0.0)
    return Vote(vote.log_odds + (shift if vote.swapped else -shift), vote.swapped, vote.wording, vote.mass)


def _decision(votes: Sequence[Vote], rule: Rule) -> Decision:
    total = _mean([vote.log_odds for vote in votes])
    orders = [[vote.log_odds for vote in votes if vote.swapped is swapped] for swapped in (False, True)]
    consistent = all(_mean(one) * total > 0 for one in orders if one) if total else False
    wordings = {vote.wording for vote in votes}
    means = [_mean([vote.log_odds for vote in votes if vote.wording == wording]) for wording in wordings]
    agreement = _mean([float(one * total > 0) for one in means])
    outcome: Outcome = "first" if total > 0 else "second"
    if not consistent or agreement < rule.agreement:
        outcome = "inconsistent" if any(vote.log_odds for vote in votes) else "unsure"
    elif abs(total) < math.log(rule.confidence / (1 - rule.confidence)):
        outcome = "unsure"
    return Decision(total, consistent, agreement, outcome)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


class ModelJudge:
    """The loaded model, unsteered: the log-probabilities of A and B as its first token, in both orders."""

    biased = True

    def __init__(self, lm: LanguageModel, *, wordings: int = 1) -> None:
        self._lm, self._wordings = lm, _checked_wordings(wordings)
        self.name = f"{lm.identity.id} ({lm.identity.fingerprint[:8]}), {wordings} wordings"
        self._letters: dict[str, list[int]] = {}

    def votes(self, cases: Sequence[Case]) -> Iterator[tuple[Vote, ...]]:
        """Raises DataError for a case that does not fit the model's context."""
        if not cases:
            return
        with steerable(self._lm) as model:
            for start in range(0, len(cases), CHUNK):
                yield from self._chunk(model, cases[start : start + CHUNK])

    def _chunk(self, model: SteeredModel, cases: Sequence[Case]) -> list[tuple[Vote, ...]]:
        asked = [(number, *ask) for number in range(len(cases)) for ask in _asks(self._wordings)]
        prompts = [self._encoded(cases[number], wording, swapped) for number, wording, swapped in asked]
        letters = self._letter_ids(prompts[0])
        examples = [([*prompt, letters["A"][0]], len(prompt)) for prompt in prompts]
        found: dict[int, list[Vote]] = defaultdict(list)
        for scored in model.scored(examples):
            logs = model.log_probs(model.final(scored, False))
            for place, row in zip(scored.batch.indices, logs, strict=True):
                number, wording, swapped = asked[place]
                a, b = (float(torch.logsumexp(row[ids], 0)) for ids in (letters["A"], letters["B"]))
                found[number].append(_vote(a, b, swapped, wording))
        ordered = [sorted(found[number], key=lambda vote: (vote.wording, vote.swapped)) for number in range(len(cases))]
        return [tuple(one) for one in ordered]

    def _encoded(self, case: Case, wording: int, swapped: bool) -> list[int]:
        text = _worded(case, wording, swapped)
        if chat_template(self._lm.tokenizer) is None:
            ids = encode_prompt(self._lm.tokenizer, f"{text}\n\nLetter:")
        else:
            ids = encode_prompt(self._lm.tokenizer, (Message("user", text),))
        limit = context_limit(self._lm)
        if limit is not None and len(ids) >= limit:
            raise DataError(
                f"the judge reads {len(ids)} tokens for the prompt {case.prompt[:60]!r}, but its context holds "
                f"{limit}: use shorter answers or fewer rounds"
            )
        return ids

    def _letter_ids(self, prompt: Sequence[int]) -> dict[str, list[int]]:
        """The tokens that may begin a reply of A and of B, with and without a space before the letter."""
        if not self._letters:
            for letter in "AB":
                starts = [continuation(self._lm.tokenizer, prompt, text)[0] for text in (letter, f" {letter}")]
                self._letters[letter] = list(dict.fromkeys(starts))
            shared = set(self._letters["A"]) & set(self._letters["B"])  # a token of the space alone
            self._letters = {key: [id for id in ids if id not in shared] for key, ids in self._letters.items()}
        return self._letters


class EndpointJudge:
    """An OpenAI-compatible endpoint: the log-probabilities of A and B, or the share of sampled replies.

    With `samples` it replies so many times at temperature 1 in each order, for endpoints without log-probabilities.
    """

    biased = True

    def __init__(self, endpoint: Endpoint, *, wordings: int = 1, samples: int = 0) -> None:
        self._endpoint, self._wordings, self._samples = endpoint, _checked_wordings(wordings), samples
        self.name = f"{endpoint.name}, {wordings} wordings" + (f", {samples} samples" if samples else "")

    def votes(self, cases: Sequence[Case]) -> Iterator[tuple[Vote, ...]]:
        """Raises EndpointError."""
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            for start in range(0, len(cases), CHUNK):
                yield from pool.map(self._one, cases[start : start + CHUNK])

    def _one(self, case: Case) -> tuple[Vote, ...]:
        read = self._sampled if self._samples else self._scored
        return tuple(read(_worded(case, *ask), *ask) for ask in _asks(self._wordings))

    def _scored(self, text: str, wording: int, swapped: bool) -> Vote:
        message = (Message("user", text),)
        answer = self._endpoint.chat(message, max_tokens=1, temperature=0, logprobs=True, top_logprobs=TOP)
        try:
            listed = first_choice(answer)["logprobs"]["content"][0]["top_logprobs"]
            logs = [(str(one["token"]).strip(), float(one["logprob"])) for one in listed]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise EndpointError(
                f"{self._endpoint.url} gives no log-probabilities: judge by sampled replies, as in --judge-samples 5"
            ) from error
        floor = min((log for _, log in logs), default=0.0)  # what is not listed is at most as likely
        sums = {letter: _log_sum([log for token, log in logs if token == letter]) for letter in "AB"}
        if sums["A"] is None and sums["B"] is None:
            return Vote(0.0, swapped, wording, 0.0)
        a, b = (floor if one is None else one for one in (sums["A"], sums["B"]))
        return _vote(a, b, swapped, wording)

    def _sampled(self, text: str, wording: int, swapped: bool) -> Vote:
        counts = {"A": 0, "B": 0}
        for seed in range(self._samples):
            answer = self._endpoint.chat((Message("user", text),), max_tokens=8, temperature=1, seed=seed)
            if letter := LETTER.search(text_of(first_choice(answer))):
                counts[letter[1]] += 1
        odds = math.log((counts["A"] + 0.5) / (counts["B"] + 0.5))
        return Vote(-odds if swapped else odds, swapped, wording, (counts["A"] + counts["B"]) / self._samples)


class PersonJudge:
    """A person, who fills `better` in a file with a, b or tie.

    Which answer is a is drawn for each case. One case in ten stands there again, the other way round, to see whether
    the person agrees with himself or herself.
    """

    biased = False
    name = "person"

    def __init__(self, folder: Folder, file: str = "ballots.jsonl") -> None:
        self._folder, self._file = folder, file

    def votes(self, cases: Sequence[Case]) -> Iterator[tuple[Vote, ...]]:
        """Raises DataError, after the cases were written to the file, while some have no answer."""
        known = by_key(self._folder.rows(self._file, ("key",)))
        ballots = [_ballot(case, again) for case in cases for again in (False, True) if not again or _is_repeated(case)]
        ballots.sort(key=lambda row: row["key"].endswith("+"))  # the repeated ones last
        if missing := [row for row in ballots if row["key"] not in known]:
            self._folder.append(self._file, missing)
            known |= by_key(missing)
        path = str(self._folder.file(self._file))
        waiting = [row for row in ballots if not known[row["key"]].get("better")]
        if waiting:
            raise DataError(
                f"{len(waiting)} of {len(ballots)} comparisons have no answer yet: fill `better` with a, b or tie, and "
                "run the command again",
                path=path,
            )
        for case in cases:
            yield tuple(self._vote(case, known, again, path) for again in (False, True)[: 1 + _is_repeated(case)])

    @staticmethod
    def _vote(case: Case, known: Mapping[str, Row], again: bool, path: str) -> Vote:
        key, swapped = f"{case.key}{'+' * again}", _is_swapped(case) is not again
        better = str(known[key]["better"]).strip().lower()
        if better not in BALLOT:
            raise DataError(f"`better` of {key} is {better!r}, not one of {', '.join(BALLOT)}", path=path)
        odds = {"a": PERSON, "b": -PERSON, "tie": 0.0}[better]
        return Vote(-odds if swapped else odds, swapped)


def _ballot(case: Case, again: bool) -> Row:
    swapped = _is_swapped(case) is not again
    a, b = (case.second, case.first) if swapped else (case.first, case.second)
    row: Row = {"key": f"{case.key}{'+' * again}", "better": "", "question": case.question, "prompt": case.prompt}
    row |= {"a": a, "b": b}
    if case.exchange:
        row["exchange"] = [list(reversed(one)) if swapped else list(one) for one in case.exchange]
    return row


def _is_swapped(case: Case) -> bool:
    return int(case.key, 16) % 2 == 1


def _is_repeated(case: Case) -> bool:
    return int(case.key[:-1], 16) % REPEATED == 0


def votes_of(row: Mapping[str, Any], path: str) -> tuple[Vote, ...]:
    """The votes of a stored row. Raises DataError for a row that was edited into something else."""
    try:
        return tuple(
            Vote(float(one["log_odds"]), bool(one["swapped"]), int(one["wording"]), float(one.get("mass", 1)))
            for one in row["votes"]
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"the verdict {row.get('key')} has no votes that can be read: delete the line", path=path
        ) from error


def judged(
    folder: Folder, file: str, judge: Judge, cases: Sequence[Case], progress: Any = None, stage: str = "judge"
) -> list[tuple[Vote, ...]]:
    """The votes of each case, from the file where they are there already; new ones are added to it.

    A case is judged again if its texts, its question or the judge change.
    """
    path = str(folder.file(file))
    keys = [key_of(case.key, judge.name) for case in cases]
    known = {key: votes_of(row, path) for key, row in by_key(folder.rows(file, ("key",))).items()}
    missing = {key: case for key, case in zip(keys, cases, strict=True) if key not in known}
    done, total = len(cases) - len(missing), len(cases)
    for (key, case), votes in zip(missing.items(), judge.votes(list(missing.values())), strict=True):
        row = {"key": key, "judge": judge.name, "votes": [vote.row() for vote in votes]}
        folder.append(file, [{**row, "prompt": case.prompt, "first": case.first, "second": case.second}])
        known[key] = votes
        done += 1
        if progress is not None:
            progress(stage, done, total)
    return [known[key] for key in keys]


def _checked_wordings(count: int) -> int:
    if not 1 <= count <= len(WORDINGS):
        raise FitError(f"wordings must be from 1 to {len(WORDINGS)}, not {count}")
    return count


def _asks(wordings: int) -> list[tuple[int, bool]]:
    return [(wording, swapped) for wording in range(wordings) for swapped in (False, True)]


def _worded(case: Case, wording: int, swapped: bool) -> str:
    return WORDINGS[wording].format(case=case.shown(swapped), question=case.question)


def _vote(a: float, b: float, swapped: bool, wording: int) -> Vote:
    """A vote from the log-probabilities of A and B."""
    return Vote(b - a if swapped else a - b, swapped, wording, math.exp(a) + math.exp(b))


def _log_sum(logs: Sequence[float]) -> float | None:
    return math.log(sum(map(math.exp, logs))) if logs else None
