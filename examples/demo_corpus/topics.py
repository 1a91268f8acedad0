"""The topics of the demo model, and the parser of their records.

A topic holds only content (steps, facts, things to check, things that go wrong, experts), without a manner. The records
are in `topics_home`, `topics_life` and `topics_leisure`. A record is a block of lines:

    task | gerund | expert; expert        the heading
    + a step, as a verb phrase            - the same kind of thing in three to five words
    = a fact, as a clause                 ? things to check; …        ! things that go wrong; …

`[a|b|c]` is a choice that is drawn for each reply.
"""

from dataclasses import dataclass

from examples.demo_corpus.topics_home import HOME
from examples.demo_corpus.topics_leisure import LEISURE
from examples.demo_corpus.topics_life import LIFE


@dataclass(frozen=True, slots=True)
class Topic:
    """An everyday task with its content."""

    task: str
    gerund: str
    experts: tuple[str, ...]
    steps: tuple[str, ...]
    shorts: tuple[str, ...]
    facts: tuple[str, ...]
    checks: tuple[str, ...]
    risks: tuple[str, ...]


def parse(records: str) -> tuple[Topic, ...]:
    """Parse records separated by empty lines."""
    return tuple(parse_record(block.splitlines()) for block in records.strip().split("\n\n"))


def parse_record(lines: list[str]) -> Topic:
    """Parse one record: its heading, then lines that begin with one of `+ - = ? !`."""
    task, gerund, experts = (part.strip() for part in lines[0].split(" | "))
    marked: dict[str, list[str]] = {mark: [] for mark in "+-=?!"}
    for line in lines[1:]:
        marked[line[0]].append(line[2:].strip())
    return Topic(
        task=task,
        gerund=gerund,
        experts=split_list(experts),
        steps=tuple(marked["+"]),
        shorts=tuple(marked["-"]),
        facts=tuple(marked["="]),
        checks=split_list(marked["?"][0]),
        risks=split_list(marked["!"][0]),
    )


def split_list(text: str) -> tuple[str, ...]:
    """Split `a; b; c` into its items."""
    return tuple(item.strip() for item in text.split(";"))


TOPICS: tuple[Topic, ...] = parse(HOME) + parse(LIFE) + parse(LEISURE)
