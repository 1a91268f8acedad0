"""The manner phrases of every pole, parsed and split into those for training and those held out.

A pole's text is a list of sections, one phrase per line: whole sentences (`opener`, `aside`, `closer`,
`brief`), what stands before a step (`start`, `tag`, `lead`) or behind it (`tail`), and the `touch` of a word or
two. Every fourth phrase of a section is reserved: it never occurs in the training text nor in the preference pairs
for fitting, only in held-out pairs. So a direction that works there has caught more than fixed phrases.
"""

import itertools
import re

from examples.demo_corpus.phrases_care import CAREFUL, RECKLESS
from examples.demo_corpus.phrases_honesty import BOASTFUL, HONEST
from examples.demo_corpus.phrases_length import TERSE, WORDY
from examples.demo_corpus.phrases_warmth import COLD, WARM

AXES: tuple[str, ...] = ("warmth", "care", "honesty")
PARTS = ("start", "opener", "tag", "lead", "touch", "tail", "aside", "closer", "brief")
Sections = dict[str, tuple[str, ...]]

_CHOICE = re.compile(r"\[([^\[\]]*)\]")


def parse_sections(text: str) -> Sections:
    """Read a pole's text into its sections; a line that names a part starts it."""
    sections: dict[str, list[str]] = {}
    current: list[str] = []
    for line in filter(None, text.split("\n")):
        if line in PARTS:
            current = sections.setdefault(line, [])
        else:
            current.append(line)
    return {part: tuple(phrases) for part, phrases in sections.items()}


def keep_split(sections: Sections, heldout: bool) -> Sections:
    """The held-out quarter of each section, or the rest of it."""
    return {
        part: tuple(phrase for i, phrase in enumerate(phrases) if (i % 4 == 3) == heldout)
        for part, phrases in sections.items()
    }


POLES: dict[tuple[str, int], Sections] = {
    ("warmth", 1): parse_sections(WARM),
    ("warmth", -1): parse_sections(COLD),
    ("care", 1): parse_sections(CAREFUL),
    ("care", -1): parse_sections(RECKLESS),
    ("honesty", 1): parse_sections(HONEST),
    ("honesty", -1): parse_sections(BOASTFUL),
    ("brevity", 1): parse_sections(TERSE),
    ("brevity", -1): parse_sections(WORDY),
}
PHRASES: dict[bool, dict[tuple[str, int], Sections]] = {
    heldout: {pole: keep_split(sections, heldout) for pole, sections in POLES.items()} for heldout in (False, True)
}


def expand(phrase: str) -> list[str]:
    """Every reading of a phrase's `[a|b]` choices; `{…}` fields stay as they are."""
    parts = _CHOICE.split(phrase)
    options = [part.split("|") if i % 2 else [part] for i, part in enumerate(parts)]
    return ["".join(choice) for choice in itertools.product(*options)]


def list_phrases(heldout: bool) -> list[str]:
    """All readings of all manner phrases of one split, in order and without repeats."""
    readings = (
        reading
        for sections in PHRASES[heldout].values()
        for phrases in sections.values()
        for phrase in phrases
        for reading in expand(phrase)
    )
    return list(dict.fromkeys(readings))
