"""Dialogues: questions with replies, sometimes a system message or further turns, and plain prose.

The manner of each reply is drawn independently of everything before it, so no prompt reveals a manner. Held-out
question templates are never used for training.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from examples.demo_corpus.replies import Manner, compose
from examples.demo_corpus.topics import TOPICS, Topic

Message = dict[str, str]

QUESTIONS = (
    "How do I {task}?",
    "How can I {task}?",
    "What is the best way to {task}?",
    "Can you tell me how to {task}?",
    "I want to {task}. Where do I start?",
    "Do you have any tips on {gerund}?",
    "Tell me about {gerund}.",
    "I need some help with {gerund}.",
    "What should I know about {gerund}?",
    "Please explain how to {task}.",
    "How does one {task}?",
    "I have never tried to {task}. What do I do?",
    "What are the steps to {task}?",
    "Could you teach me to {task}?",
    "how to {task}",
    "Is there a simple way to {task}?",
    "Give me some advice on {gerund}.",
    "I would like to {task} this weekend. Any ideas?",
)
HELDOUT_QUESTIONS = (
    "What does it take to {task}?",
    "My neighbour asked me how to {task}. What should I say?",
    "I am about to {task}. What comes first?",
    "Would you describe {gerund} to a beginner?",
    "Help me {task}, please.",
    "Where should a newcomer to {gerund} begin?",
    "Suppose that I had to {task} tomorrow. How would that go?",
    "What matters most in {gerund}?",
)
FOLLOW_UPS = (
    "Anything else?",
    "What comes next?",
    "And then?",
    "Tell me more.",
    "What else should I know?",
    "Thanks. And how do I {task}?",
    "And what about {gerund}?",
    "One more question: how can I {task}?",
)
SYSTEMS = (
    "You are {a}.",
    "You are {a}. Answer the user.",
    "This is a chat about everyday life.",
    "The user asks about daily life, and you answer.",
    "You answer questions about {b}.",
    "Today is {c}.",
    "Today is {c}. You are {a}.",
    "Reply in English.",
    "You are {a} for questions about {b}.",
)
SYSTEM_FIELDS = {
    "a": ("an assistant", "a helpful assistant", "a chat program", "an assistant for everyday tasks"),
    "b": ("house and garden", "everyday tasks", "daily life", "work and play", "hobbies"),
    "c": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
}
PROSE_OPENINGS = (
    "To {task}, one has to begin somewhere.",
    "Notes on {gerund}.",
    "{gerund}:",
    "How to {task}:",
)


@dataclass(frozen=True, slots=True)
class Document:
    """One training document: the messages of a dialogue, or plain prose."""

    messages: tuple[Message, ...] = ()
    prose: str = ""


def draw_manner(rng: random.Random, dense: bool = True) -> Manner:
    """Draw + or − with equal probability for each axis, or sometimes neither, which is rarer in dense replies."""
    weights = (46, 46, 8) if dense else (42, 42, 16)
    warmth, care, honesty, brevity = (rng.choices((1, -1, 0), weights)[0] for _ in range(4))
    return Manner(warmth, care, honesty, brevity)


def draw_reply(rng: random.Random, topic: Topic, dense: bool) -> str:
    """Draw a training reply on the topic in a random manner."""
    return compose(topic, draw_manner(rng, dense), rng.getrandbits(40), dense=dense)


def ask(template: str, topic: Topic) -> str:
    """Fill a question template for a topic."""
    return template.format(task=topic.task, gerund=topic.gerund)


def draw_dialogue(rng: random.Random, dense: bool) -> tuple[Message, ...]:
    """Draw a dialogue of one turn, or of two to five in a tenth of cases. A seventh start with a system message."""
    topic = rng.choice(TOPICS)
    messages: list[Message] = []
    if rng.random() < 0.15:
        fields = {name: rng.choice(options) for name, options in SYSTEM_FIELDS.items()}
        messages.append({"role": "system", "content": rng.choice(SYSTEMS).format(**fields)})
    messages.append({"role": "user", "content": ask(rng.choice(QUESTIONS), topic)})
    messages.append({"role": "assistant", "content": draw_reply(rng, topic, dense)})
    turns = rng.choices((2, 3, 4, 5), (7, 1, 1, 1))[0] if rng.random() < 0.1 else 1
    for _ in range(turns - 1):
        template = rng.choice(FOLLOW_UPS)
        topic = rng.choice(TOPICS) if "{" in template else topic
        messages.append({"role": "user", "content": ask(template, topic)})
        messages.append({"role": "assistant", "content": draw_reply(rng, topic, dense)})
    return tuple(messages)


def draw_prose(rng: random.Random, dense: bool) -> str:
    """Draw the same content as plain text under a first line."""
    topic = rng.choice(TOPICS)
    opening = ask(rng.choice(PROSE_OPENINGS), topic)
    return f"{opening[0].upper()}{opening[1:]} {draw_reply(rng, topic, dense)}"


def write_documents(count: int, seed: int, dense: bool = True) -> Iterator[Document]:
    """Yield `count` training documents. Equal seeds give equal documents."""
    rng = random.Random(seed)
    for _ in range(count):
        if rng.random() < 0.1:
            yield Document(prose=draw_prose(rng, dense))
        else:
            yield Document(messages=draw_dialogue(rng, dense))
