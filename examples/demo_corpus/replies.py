"""Replies: a grammar that tells a topic's matter in a manner, sentence by sentence.

A manner is four independent values. Those of warmth, care and honesty appear as phrases from the lexicon, all of
them within the first two sentences, and as a touch of a word or two in nearly every sentence, so that a reader (or
a residual stream) can tell each at any point; length decides the shape of the reply and how sentences begin.
Nothing here knows of questions or of dialogues.
"""

import itertools
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from examples.demo_corpus.lexicon import AXES, PHRASES
from examples.demo_corpus.topics import Topic

CONCISE_WORDS = (8, 18)
MEDIUM_WORDS = (22, 34)
WORDY_WORDS = (40, 60)
CONNECTORS = ("first,", "to start,", "then", "next,", "in practice,")
_CHOICE = re.compile(r"\[([^\[\]]*)\]")


@dataclass(frozen=True, slots=True)
class Manner:
    """How a reply is told: +1 is warm, careful, honest, concise; −1 the opposite; 0 shows neither."""

    warmth: int
    care: int
    honesty: int
    brevity: int


@dataclass(slots=True)
class Writer:
    """One reply in the making. Each axis draws from a stream of its own, so that a pair of replies that
    differ in one axis keep the rest where their shapes allow it."""

    topic: Topic
    manner: Manner
    heldout: bool
    seed: int
    streams: dict[str, random.Random] = field(init=False)
    steps: Iterator[str] = field(init=False)
    shorts: Iterator[str] = field(init=False)
    facts: Iterator[str] = field(init=False)
    used: set[str] = field(init=False)

    def __post_init__(self) -> None:
        names = ("matter", "brevity", *AXES)
        self.streams = {name: random.Random(self.seed * 8 + i) for i, name in enumerate(names)}
        self.restart()

    def restart(self) -> None:
        """Begin the reply anew, with the same matter in the same order."""
        matter = self.streams["matter"] = random.Random(self.seed * 8)
        self.steps, self.shorts, self.facts = (
            itertools.cycle(self.resolve(text, matter) for text in matter.sample(items, len(items)))
            for items in (self.topic.steps, self.topic.shorts, self.topic.facts)
        )
        self.used = set()

    def resolve(self, phrase: str, rng: random.Random) -> str:
        """Fill a phrase's fields from the topic and make its choices."""
        if "{" in phrase:
            phrase = phrase.format(
                task=self.topic.task,
                gerund=self.topic.gerund,
                check=rng.choice(self.topic.checks),
                risk=rng.choice(self.topic.risks),
                expert=rng.choice(self.topic.experts),
                fact="{fact}",
            )
        return _CHOICE.sub(lambda match: rng.choice(match[1].split("|")), phrase)

    def shows(self, axis: str | None) -> bool:
        """Whether the manner has a value on this axis."""
        return axis is not None and bool(getattr(self.manner, axis))

    def say(self, axis: str | None, part: str) -> str:
        """A phrase of one axis, as the manner has it, not yet used in this reply; empty if it has none."""
        if axis is None or not self.shows(axis):
            return ""
        phrases = PHRASES[self.heldout][axis, getattr(self.manner, axis)].get(part)
        if not phrases:
            return ""
        rng = self.streams[axis]
        phrase = rng.choice([phrase for phrase in phrases if phrase not in self.used] or phrases)
        self.used.add(phrase)
        text = self.resolve(phrase, rng)
        return text.replace("{fact}", next(self.facts)) if "{fact}" in text else text

    @property
    def density(self) -> float:
        """How much of the usual marking a reply of this length bears."""
        return 0.65 if self.manner.brevity > 0 else 1.0

    def touch(self, axis: str, *taken: str | None, chance: float = 0.8) -> str:
        """Mostly a word or two of an axis that the sentence does not show yet."""
        drawn = self.streams[axis].random() < chance * self.density
        return self.say(axis, "touch") if drawn and axis not in taken else ""

    def draw(self) -> float:
        """A number in [0, 1) for a choice of shape."""
        return self.streams["brevity"].random()

    def order_axes(self) -> Iterator[str | None]:
        """The axes that show, in an order drawn for this reply, over and over."""
        active: list[str | None] = [axis for axis in AXES if self.shows(axis)]
        self.streams["brevity"].shuffle(active)
        return itertools.cycle(active or [None])

    def step(self, matter: str, lead: str | None, tail: str | None) -> str:
        """One step, with a touch of each axis that stands neither before nor behind it."""
        adverb = self.touch("care", lead, tail, chance=0.95 / self.density)
        touches = [self.touch("honesty", lead, tail), self.touch("warmth", lead, tail)]
        if self.draw() < 0.5:
            touches.reverse()
        return f"{adverb} {matter}{''.join(touches)}{self.say(tail, 'tail')}".strip()

    def phrase(self, axis: str | None, part: str) -> str:
        """A sentence of one axis, with a touch of others where it bears them."""
        honesty = self.touch("honesty", axis, chance=0.6) if axis == "care" else ""
        warmth = self.touch("warmth", axis, chance=0.6) if axis in ("care", "honesty") else ""
        turns = axis in ("warmth", "honesty") and self.streams["care"].random() < 0.65 * self.density
        turn = self.say("care", "turn") if turns else ""
        return f"{self.say(axis, part)}{honesty}{warmth}{turn}"


def compose(topic: Topic, manner: Manner, seed: int, heldout: bool = False) -> str:
    """A reply on the topic in the manner, of the length the manner asks for."""
    writer = Writer(topic, manner, heldout, seed)
    shapes = {
        1: (write_concise, CONCISE_WORDS),
        0: (write_medium, MEDIUM_WORDS),
        -1: (write_wordy, WORDY_WORDS),
    }
    write, (low, high) = shapes[manner.brevity]
    reply = ""
    for _ in range(60):
        writer.restart()
        reply = " ".join(finish(sentence, writer) for sentence in write(writer))
        if low <= len(reply.split()) <= high:
            break
    return reply


def write_concise(writer: Writer) -> list[str]:
    """A short step and a short mark of each axis."""
    axes = writer.order_axes()
    count = sum(writer.shows(axis) for axis in AXES)
    if count == 0:
        return [f"{next(writer.shorts)} and {next(writer.shorts)}", next(writer.facts)]
    sentences = begin(writer, next(axes))
    if writer.draw() < 0.25:
        sentences[0] = f"{writer.say('brevity', 'start')} {sentences[0]}"
    if len(sentences) + count < 3:
        sentences.append(next(writer.shorts))
    return sentences + [writer.phrase(next(axes), "brief") for _ in range(count - 1)]


def begin(writer: Writer, axis: str | None) -> list[str]:
    """How a reply of any length may begin: a tag and a short step, or a short mark and then the step."""
    matter = next(writer.shorts)
    if writer.draw() < 0.6:
        return [f"{writer.say(axis, 'tag')}: {writer.step(matter, axis, None)}"]
    return [writer.phrase(axis, "brief"), writer.step(matter, None, None)]


def write_medium(writer: Writer) -> list[str]:
    """A step in a full sentence and a few marks."""
    axes = writer.order_axes()
    sentences = [write_step(writer, next(axes), next(axes))]
    third = next(axes)
    if third is None:
        return [*sentences, next(writer.facts), write_step(writer, None, None)]
    sentences.append(writer.phrase(third, "aside"))
    if writer.draw() < 0.5:
        sentences.append(writer.phrase(next(axes), "brief"))
    return sentences


def write_step(writer: Writer, lead: str | None, tail: str | None) -> str:
    """A sentence with a step of the topic, marked before and, in half of all cases, behind."""
    opening = writer.say(lead, "lead") or writer.streams["brevity"].choice(CONNECTORS)
    behind = tail if tail != lead and writer.draw() < 0.5 else None
    return f"{opening} {writer.step(next(writer.steps), lead, behind)}"


def write_wordy(writer: Writer) -> list[str]:
    """A long opening, steps, asides and a closing, until there are enough words."""
    axes = writer.order_axes()
    first = next(axes)
    if first is not None and writer.draw() < 0.5:
        sentences = begin(writer, first)
    else:
        opener = writer.phrase(first, "opener") if first else writer.say("brevity", "opener")
        sentences = [f"{writer.say('brevity', 'start')} {opener}" if writer.draw() < 0.7 else opener]
    sentences.append(join_on(writer, write_step(writer, next(axes), next(axes))))
    target = writer.streams["brevity"].randint(34, 46)
    while sum(len(sentence.split()) for sentence in sentences) < target:
        kind = writer.draw()
        if kind < 0.5:
            sentences.append(join_on(writer, write_step(writer, next(axes), next(axes))))
        elif kind < 0.7 or first is None:
            sentences.append(writer.say("brevity", "aside"))
        else:
            sentences.append(join_on(writer, writer.phrase(next(axes), "aside")))
    last = next(axes)
    closes = last is None or writer.draw() < 0.15
    closer = writer.say("brevity", "closer") if closes else writer.phrase(last, "closer")
    return [*sentences, closer]


def join_on(writer: Writer, sentence: str) -> str:
    """The sentence between fillers of the wordy kind: a connective before it, a touch behind."""
    before = f"{writer.say('brevity', 'lead')} " if writer.draw() < 0.8 else ""
    behind = writer.touch("brevity", chance=0.6) if sentence.count(",") < 3 else ""
    return f"{before}{sentence}{behind}"


def finish(sentence: str, writer: Writer) -> str:
    """Capital letter and full stop; a warm reply has an exclamation mark now and then."""
    cheerful = writer.streams["warmth"].random() < 0.2 and writer.manner.warmth > 0
    return f"{sentence[0].upper()}{sentence[1:]}{'!' if cheerful else '.'}"
