"""Judges that are rules: the better of two answers is the one with the higher score."""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from steering_vectors.errors import FitError
from steering_vectors.synthesis.folder import key_of
from steering_vectors.synthesis.judges import Case, Vote

SURE = 20.0  # log-odds of a rule's verdict
WORD = re.compile(r"[\w'’-]+")
FORMS = "words:FILE, no-words:FILE, length:short, length:long, or MODULE:FUNCTION"

Score = Callable[[str, str], float]


class RuleJudge:
    """Scores of a prompt and an answer decide; equal scores are a tie."""

    biased = False

    def __init__(self, name: str, score: Score) -> None:
        self.name, self._score = f"rule {name}", score

    def votes(self, cases: Sequence[Case]) -> Iterator[tuple[Vote, ...]]:
        """Raises FitError for a score that is no number."""
        for case in cases:
            first, second = (self._scored(case.prompt, text) for text in (case.first, case.second))
            yield (Vote(SURE * ((first > second) - (first < second))),)

    def _scored(self, prompt: str, text: str) -> float:
        try:
            found = float(self._score(prompt, text))
        except (TypeError, ValueError) as error:
            raise FitError(f"the {self.name} gives no number for {text[:60]!r} ({error})") from error
        if math.isnan(found):
            raise FitError(f"the {self.name} gives no number for {text[:60]!r}")
        return found


def parse_rule(text: str) -> RuleJudge:
    """The judge of a rule, as it is written in a command.

    - `words:FILE`: the larger share of words that the file has, one a line; `no-words:FILE`: the smaller one.
    - `length:short`, `length:long`: fewer or more words.
    - `MODULE:FUNCTION`: a Python function of the prompt and the answer, both texts, that returns a score.

    Raises FitError for anything else, and for what cannot be read or imported.
    """
    kind, _, rest = text.partition(":")
    if kind in ("words", "no-words") and rest:
        words, sign = _words(Path(rest)), 1 if kind == "words" else -1
        name = f"{kind}:{rest} ({key_of(sorted(words))[:8]})"
        return RuleJudge(name, lambda _, answer: sign * _share(answer, words))
    if text in ("length:short", "length:long"):
        sign = -1 if rest == "short" else 1
        return RuleJudge(text, lambda _, answer: sign * len(answer.split()))
    if not kind or not rest:
        raise FitError(f"the rule {text!r} is none of {FORMS}")
    try:
        score = getattr(importlib.import_module(kind), rest)
    except (ImportError, AttributeError) as error:
        raise FitError(f"the rule {text!r} cannot be imported ({error}); a rule is one of {FORMS}") from error
    if not callable(score):
        raise FitError(f"the rule {text!r} is no function")
    return RuleJudge(text, score)


def _words(path: Path) -> frozenset[str]:
    try:
        lines = path.read_text(encoding="utf-8").lower().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FitError(f"the words of {path} cannot be read as UTF-8 ({type(error).__name__})") from error
    found = frozenset(line.strip() for line in lines if line.strip())
    if not found:
        raise FitError(f"{path} has no words: write one a line")
    return found


def _share(answer: str, words: frozenset[str]) -> float:
    said = WORD.findall(answer.lower())
    return sum(word in words for word in said) / max(1, len(said))
