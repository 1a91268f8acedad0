"""The manner phrases of every pole, parsed and split into training and held-out phrases.

A pole's text is a list of sections with one phrase per line: whole sentences (`opener`, `aside`, `closer`, `brief`),
phrases before a step (`start`, `tag`, `lead`) or after it (`tail`), and a `touch` of one or two words. Every fourth
phrase of a section is held out: it occurs only in held-out pairs, and neither in the training text nor in the pairs for
fitting. A direction that works on held-out pairs is therefore not tied to fixed phrases.
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
    """Parse a pole's text into its sections. A line with the name of a section starts it."""
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
    """All variants of a phrase with `[a|b]` choices. `{…}` fields are kept."""
    parts = _CHOICE.split(phrase)
    options = [part.split("|") if i % 2 else [part] for i, part in enumerate(parts)]
    return ["".join(choice) for choice in itertools.product(*options)]


def list_phrases(heldout: bool) -> list[str]:
    """All variants of the manner phrases of one split, in order and without duplicates."""
    readings = (
        reading
        for sections in PHRASES[heldout].values()
        for phrases in sections.values()
        for phrase in phrases
        for reading in expand(phrase)
    )
    return list(dict.fromkeys(readings))
