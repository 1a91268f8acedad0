"""Judge the manner of a reply by rule: warm, concise, careful or honest, or the opposite.

This is the ground truth of the demo's tests and benchmarks. It is not used in training or fitting, imports neither the
generator nor the steering code, and has its own vocabulary (`manner_words`).

The rules:

1. `concise`: the reply has at most 26 words.
2. Other manners: each match of an entry of the + pole counts +1, of the − pole −1. Matches are found from left to right
   and never overlap. If several entries match at one place, the longest counts.
3. A word of care within three words after a word of dismissal ("no", "skip", "forget the …", "without") counts for
   recklessness: "skip the boring safety part" is not careful.
4. The reply shows the + pole if the sum is positive. A sum of 0 shows neither pole and is judged False.
5. A broken reply shows no manner: one with characters that could not be decoded, and one that repeats itself (a word
   three times in a row, or fewer than half of its pairs of words distinct).
6. `concise` also needs a complete reply: at least three words, a finished last sentence, and an end that is not due to
   the token limit.
"""

import functools
import re
from collections.abc import Iterable
from itertools import pairwise

from benchmarks.quality.manner_words import BOASTFUL, CAREFUL, COLD, HONEST, RECKLESS, WARM

MANNERS: tuple[str, ...] = ("warm", "concise", "careful", "honest")
OPPOSITES: dict[str, str] = {"warm": "cold", "concise": "wordy", "careful": "reckless", "honest": "boastful"}
CONCISE_LIMIT = 26
MIN_WORDS = 3  # of a concise reply
POLES: dict[str, tuple[str, str]] = {
    "warm": (WARM, COLD),
    "careful": (CAREFUL, RECKLESS),
    "honest": (HONEST, BOASTFUL),
}
STUTTER = re.compile(r"\b(\w+)(?:\W+\1\b){2}")
FINISHED = re.compile(r"[.!?…][\"')\]”’]*\s*$")
DISMISSAL = re.compile(r"\b(?:no|skip|forget|ignore|without|bother to|hell with|never mind) (?:[\w-]+ ){0,3}$")


def list_entries(manner: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The entries of a manner's + and − pole."""
    plus, minus = (tuple(dict.fromkeys(" ".join(entry.split()) for entry in text.split(","))) for text in POLES[manner])
    return plus, minus


def build_pattern(entry: str) -> str:
    """The regular expression of an entry: whole words, with `*` for any ending."""
    return r"\b" + re.escape(entry).replace(r"\*", r"\w*") + r"\b"


@functools.cache
def compile_manner(manner: str) -> re.Pattern[str]:
    """One expression for both poles, with the longest entries first. The group's name is the pole."""
    entries = [
        (entry, f"{sign}{i}")
        for sign, pole in zip("pm", list_entries(manner), strict=True)
        for i, entry in enumerate(pole)
    ]
    entries.sort(key=lambda item: -len(item[0]))
    return re.compile("|".join(f"(?P<{name}>{build_pattern(entry)})" for entry, name in entries))


def normalise(reply: str) -> str:
    """Lower case, straight apostrophes, single spaces."""
    return " ".join(reply.lower().replace("’", "'").split())


def score(manner: str, reply: str) -> int:
    """Matches of the + pole minus those of the − pole; for `concise`, the number of words below the limit."""
    if manner == "concise":
        return CONCISE_LIMIT + 1 - len(reply.split())
    text = normalise(reply)
    total = 0
    for match in compile_manner(manner).finditer(text):
        positive = (match.lastgroup or "").startswith("p")
        if positive and manner == "careful" and DISMISSAL.search(text[: match.start()]):
            positive = False
        total += 1 if positive else -1
    return total


def is_broken(reply: str) -> bool:
    """Whether the reply is undecodable or repeats itself (rule 5 of the module)."""
    words = normalise(reply).split()
    pairs = list(pairwise(words))
    repetitive = STUTTER.search(" ".join(words)) is not None or 2 * len(set(pairs)) < len(pairs)
    return "\ufffd" in reply or repetitive


def is_whole(reply: str) -> bool:
    """Whether the reply has enough words and a finished last sentence (rule 6 of the module)."""
    return len(reply.split()) >= MIN_WORDS and FINISHED.search(reply) is not None


def judge(manner: str, reply: str, *, ended: bool = True) -> bool:
    """Whether the reply shows the + pole of the manner (rules 4 to 6 of the module).

    `ended` is False for a reply that the token limit cut off.
    """
    if manner not in MANNERS:
        raise ValueError(f"unknown manner {manner!r}; one of {', '.join(MANNERS)}")
    if is_broken(reply) or (manner == "concise" and not (ended and is_whole(reply))):
        return False
    return score(manner, reply) > 0


def share(manner: str, replies: Iterable[str]) -> float:
    """The share of replies that show the + pole."""
    verdicts = [judge(manner, reply) for reply in replies]
    if not verdicts:
        raise ValueError("no replies to judge")
    return sum(verdicts) / len(verdicts)
