"""Replies: a grammar that writes a topic's content in a manner, sentence by sentence.

A manner has four independent values. Warmth, care and honesty appear as phrases from the lexicon. Every sentence shows
one axis, as a remark or around a step of the topic, and the axes take turns. A reply keeps to one pole of each axis. A
dense reply has touches of the other axes in nearly every sentence, so that each axis shows at any point. Length decides
the shape of the reply and how sentences begin.
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
    """The manner of a reply: +1 is warm, careful, honest, concise; −1 is the opposite; 0 is neither."""

    warmth: int
    care: int
    honesty: int
    brevity: int


@dataclass(slots=True)
class Writer:
    """Writes one reply. Each axis has its own random stream, so that two replies that differ in one axis share the rest
    if their shapes allow it."""

    topic: Topic
    manner: Manner
    heldout: bool
    dense: bool
    seed: int
    streams: dict[str, random.Random] = field(init=False)
    steps: Iterator[str] = field(init=False)
    shorts: Iterator[str] = field(init=False)
    facts: Iterator[str] = field(init=False)
    turns: Iterator[str | None] = field(init=False)
    used: set[str] = field(init=False)

    def __post_init__(self) -> None:
        names = ("brevity", *AXES)
        self.streams = {name: random.Random(self.seed * 8 + i) for i, name in enumerate(names, 1)}
        self.order_axes()  # the committed replies were drawn after an order that none of them follows

    def restart(self) -> None:
        """Start the reply, or start it again, with the same content in the same order."""
        matter = random.Random(self.seed * 8)
        self.steps, self.shorts, self.facts = (
            itertools.cycle(self.resolve(text, matter) for text in matter.sample(items, len(items)))
            for items in (self.topic.steps, self.topic.shorts, self.topic.facts)
        )
        self.used = set()
        self.turns = self.order_axes()

    def resolve(self, phrase: str, rng: random.Random) -> str:
        """Fill a phrase's fields from the topic, and draw its choices."""
        if "{" in phrase:
            phrase = phrase.format(
                task=self.topic.task,
                gerund=self.topic.gerund,
                check=rng.choice(self.topic.checks),
                risk=rng.choice(self.topic.risks),
                expert=rng.choice(self.topic.experts),
                fact="{fact}",
            )
        if "[" in phrase:
            phrase = _CHOICE.sub(lambda match: rng.choice(match[1].split("|")), phrase)
        return phrase

    def shows(self, axis: str | None) -> bool:
        """Whether the manner has a value on this axis."""
        return axis is not None and bool(getattr(self.manner, axis))

    def say(self, axis: str | None, part: str) -> str:
        """A phrase for the manner's pole of an axis that this reply has not used yet; empty if the manner has none."""
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

    def draw(self) -> float:
        """A random number in [0, 1) for a choice of shape."""
        return self.streams["brevity"].random()

    def order_axes(self) -> Iterator[str | None]:
        """Yield the shown axes in a random order for this reply, repeatedly."""
        active: list[str | None] = [axis for axis in AXES if self.shows(axis)]
        self.streams["brevity"].shuffle(active)
        return itertools.cycle(active or [None])

    def step(self, matter: str, lead: str | None, tail: str | None) -> str:
        """A step with its tail, and with touches of the axes that are neither before nor after it."""
        if self.dense:
            return f"{self.touched(matter, lead, tail)}{self.say(tail, 'tail')}"
        if tail is not None:
            return f"{matter}{self.say(tail, 'tail')}"
        others = [axis for axis in AXES if self.shows(axis) and axis != lead]
        if not others or self.draw() < 0.5:
            return matter
        axis = self.streams["brevity"].choice(others)
        touch = self.say(axis, "touch")
        return f"{touch} {matter}" if axis == "care" else f"{matter}{touch}"

    def touched(self, matter: str, *taken: str | None) -> str:
        """A step of a dense reply, with an adverb of care before it and words of honesty and warmth after it."""
        chance = 0.5 if self.manner.brevity > 0 else 0.75
        touch = {axis: self.say(axis, "touch") for axis in AXES if axis not in taken and self.draw() < chance}
        behind = [touch.get("honesty", ""), touch.get("warmth", "")]
        if self.draw() < 0.5:
            behind.reverse()
        return f"{touch.get('care', '')} {matter}{''.join(behind)}".strip()

    def remark(self, axis: str | None, part: str) -> str:
        """A sentence of one axis, which may end in a touch of another."""
        doubt = self.dense and axis == "care" and self.draw() < 0.5
        honesty = self.say("honesty", "touch") if doubt else ""
        to_reader = axis in ("care", "honesty") and self.shows("warmth") and self.draw() < (0.55 if self.dense else 0.3)
        return f"{self.say(axis, part)}{honesty}{self.say('warmth', 'touch') if to_reader else ''}"


def compose(topic: Topic, manner: Manner, seed: int, *, heldout: bool = False, dense: bool = True) -> str:
    """Write a reply on the topic in the manner. A dense reply shows the manner in nearly every sentence."""
    writer = Writer(topic, manner, heldout, dense, seed)
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
    """A short step and a short phrase of each axis."""
    count = sum(writer.shows(axis) for axis in AXES)
    if count == 0:
        return [f"{next(writer.shorts)} and {next(writer.shorts)}", next(writer.facts)]
    sentences = begin(writer)
    if writer.draw() < 0.25:
        sentences[0] = f"{writer.say('brevity', 'start')} {sentences[0]}"
    return sentences + [writer.remark(next(writer.turns), "brief") for _ in range(max(1, count - 1))]


def begin(writer: Writer) -> list[str]:
    """The start of a reply of any length: a tag and a short step, or a short phrase and then the step."""
    axis, matter = next(writer.turns), next(writer.shorts)
    tagged = writer.draw() < 0.6
    if writer.dense:
        matter = writer.touched(matter, axis)
    if tagged:
        return [f"{writer.say(axis, 'tag')}: {matter}"]
    return [writer.remark(axis, "brief"), matter]


def write_medium(writer: Writer) -> list[str]:
    """A step in a full sentence, phrases of the axes, and usually a second step."""
    if not any(writer.shows(axis) for axis in AXES):
        return [write_step(writer), next(writer.facts), write_step(writer)]
    sentences = [writer.remark(next(writer.turns), "brief")] if writer.draw() < 0.4 else []
    sentences += [write_step(writer), writer.remark(next(writer.turns), "aside")]
    if writer.draw() < 0.6:
        sentences.append(writer.step(next(writer.shorts), None, None))
    return [*sentences, writer.remark(next(writer.turns), "brief")]


def write_step(writer: Writer) -> str:
    """A sentence with a step of the topic, and a phrase before or after it."""
    axis, matter = next(writer.turns), next(writer.steps)
    if axis is None or writer.draw() < 0.35:
        return f"{writer.streams['brevity'].choice(CONNECTORS)} {writer.step(matter, None, axis)}"
    return f"{writer.say(axis, 'lead')} {writer.step(matter, axis, None)}"


def write_wordy(writer: Writer) -> list[str]:
    """A long opening, or a usual start, followed by sentences until there are enough words."""
    first = next(writer.turns)
    if writer.dense and first is not None and writer.draw() < 0.4:
        return write_on(writer, begin(writer))
    opener = writer.remark(first, "opener") if first else writer.say("brevity", "opener")
    return write_on(writer, [f"{writer.say('brevity', 'start')} {opener}" if writer.draw() < 0.5 else opener])


def write_on(writer: Writer, sentences: list[str]) -> list[str]:
    """Add steps, asides and a closing to the start of a wordy reply."""
    sentences.append(join_on(writer, write_step(writer)))
    shows = any(writer.shows(axis) for axis in AXES)
    target = writer.streams["brevity"].randint(34, 46)
    while sum(len(sentence.split()) for sentence in sentences) < target:
        kind = writer.draw()
        if kind < 0.45:
            sentences.append(join_on(writer, write_step(writer)))
        elif kind < 0.7 or not shows:
            sentences.append(writer.say("brevity", "aside"))
        else:
            sentences.append(join_on(writer, writer.remark(next(writer.turns), "aside")))
    last = next(writer.turns)
    return [*sentences, writer.remark(last, "closer") if last else writer.say("brevity", "closer")]


def join_on(writer: Writer, sentence: str) -> str:
    """Add wordy fillers to a sentence: a connective before it, a touch after it."""
    before = f"{writer.say('brevity', 'lead')} " if writer.draw() < 0.6 else ""
    behind = writer.say("brevity", "touch") if sentence.count(",") < 2 and writer.draw() < 0.4 else ""
    return f"{before}{sentence}{behind}"


def finish(sentence: str, writer: Writer) -> str:
    """Add a capital letter and a full stop, or sometimes an exclamation mark in a warm reply."""
    cheerful = writer.streams["warmth"].random() < 0.2 and writer.manner.warmth > 0
    return f"{sentence[0].upper()}{sentence[1:]}{'!' if cheerful else '.'}"
