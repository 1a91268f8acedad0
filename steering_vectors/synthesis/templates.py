"""Contrast instructions and questions made from a sentence by rule, without a model.

A small chat model writes poor instructions, but it can follow simple ones. The questions are everyday ones, and, if the
sentence names a topic, questions about it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from steering_vectors.errors import FitError
from steering_vectors.synthesis.folder import is_storable
from steering_vectors.tuning.instructions import Instructions

COMPARATIVE = re.compile(r"(more|less)\s+(\S.*)", re.IGNORECASE | re.DOTALL)
TOPIC = re.compile(r"\b(?:about|on|regarding|concerning)\s+(\S.*)", re.IGNORECASE | re.DOTALL)
MAX_SENTENCE = 300  # characters

DEGREES = (
    (
        "You are an assistant that is far more {trait} than others.",
        "You are an assistant that is far less {trait} than others.",
    ),
    ("Be extremely {trait} in your answer.", "Do not be {trait} in your answer at all."),
    ("Whatever you are asked, always be as {trait} as you can.", "Whatever you are asked, never be {trait}."),
    (
        "The person who asks likes answers that are very {trait}. Write such an answer.",
        "The person who asks hates answers that are {trait}. Write the opposite of such an answer.",
    ),
    ("Answer so that everybody says: this is very {trait}.", "Answer so that nobody would say: this is {trait}."),
)  # fmt: skip
MANNERS = (
    ("You are an assistant with this manner: {trait}.", "You are an assistant with this manner: {opposite}."),
    ("Answer in this way: {trait}.", "Answer in this way: {opposite}."),
    ("Whatever you are asked, your answer is always like this: {trait}.",
     "Whatever you are asked, your answer is always like this: {opposite}."),
    ("The person who asks wants this from you: {trait}.", "The person who asks wants this from you: {opposite}."),
    ("Follow this rule in every sentence: {trait}.", "Follow this rule in every sentence: {opposite}."),
)  # fmt: skip
ABOUT_TOPIC = (
    "What should I know about {topic}?",
    "Can you help me with {topic}?",
    "I have a question about {topic}. Where do I begin?",
    "Give me three tips on {topic}.",
    "My friend asked me about {topic}. What should I say?",
    "What would you do first in a matter of {topic}?",
    "How do people usually deal with {topic}?",
    "What do experts say about {topic}?",
    "I need {topic} right now. What can you tell me?",
    "What is your opinion on {topic}?",
    "Write a short message to a friend about {topic}.",
    "Can I manage {topic} alone?",
    "Where can I find good {topic}?",
    "What is the quickest way to deal with {topic}?",
    "Explain {topic} in a few sentences.",
    "Do I have to worry about {topic}?",
    "What did people think about {topic} in the past?",
    "How would you answer somebody who insists on {topic}?",
    "Is it all right to ignore {topic}?",
    "What matters most in {topic}?",
)
EVERYDAY = (
    "How was your day?",
    "What should I cook for dinner tonight?",
    "How do I learn to play the guitar?",
    "I have a headache. What can I do?",
    "Should I buy a used car?",
    "What do you think of long meetings?",
    "How can I sleep better?",
    "My neighbour is loud at night. What should I do?",
    "Tell me about the city where you live.",
    "How do I write a letter of complaint?",
    "Is it worth learning a second language?",
    "What is a good present for my mother?",
    "How do I save money every month?",
    "Why is the sky blue?",
    "I want to start running. How do I begin?",
    "What should I pack for a week by the sea?",
    "How do I prepare for a job interview?",
    "What do you think about getting up early?",
    "My plant is losing its leaves. What is wrong?",
    "Should I invest my savings in shares?",
    "How do I make a good cup of coffee?",
    "What is the best way to travel to Rome?",
    "I had an argument with a friend. What now?",
    "How does a bicycle stay upright?",
    "What can I do on a rainy Sunday?",
    "How do I fix a dripping tap?",
    "Is it safe to swim in a lake?",
    "What makes a good teacher?",
    "How much water should I drink?",
    "Recommend a book to me.",
    "How do I remove a coffee stain?",
    "My back hurts after work. What helps?",
    "What is jazz?",
    "Should I go to the party tonight?",
    "How do I ask for a higher salary?",
    "What do you think of my new haircut?",
    "How do I look after a kitten?",
    "Which computer should I buy?",
    "What happens if I skip breakfast?",
    "Tell me a short story about a fisherman.",
    "How do I speak in front of many people?",
    "What is the difference between butter and margarine?",
    "Can I repair an old radio myself?",
    "How do I make new friends in a new town?",
    "What do you think about winter?",
    "Is it a good idea to quit my job?",
    "How do I grow tomatoes?",
    "Why do cats purr?",
    "What should I say at a wedding?",
    "How can I become more patient?",
    "I lost my keys. What should I do?",
    "What is inflation?",
    "How do I choose a good pair of shoes?",
    "Should children have telephones?",
    "How was the film last night?",
    "What is a healthy lunch?",
    "How do I plan a trip by train?",
    "Do you like football?",
    "What helps against a cold?",
    "How do I keep my house clean?",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Trait:
    """A sentence that says how answers should be, such as "more cautious about medical advice", and its opposite.

    Raises FitError for a sentence that is empty or too long.
    """

    sentence: str
    opposite: str = ""

    def __post_init__(self) -> None:
        for text in (self.sentence, self.opposite):
            if not is_storable(text):
                raise FitError("the sentence contains half of a surrogate pair: write valid Unicode")
            if len(text) > MAX_SENTENCE:
                raise FitError(f"the sentence has {len(text)} characters; at most {MAX_SENTENCE} are read: shorten it")
        if not any(map(str.isalnum, self.sentence)):
            raise FitError(
                "the sentence is empty: say how answers should be, as in 'more cautious about medical advice'"
            )

    @property
    def clean(self) -> str:
        return " ".join(self.sentence.split()).rstrip(".!")

    @property
    def question(self) -> str:
        """What a judge is asked."""
        if COMPARATIVE.fullmatch(self.clean):
            return f"Which answer is {self.clean}?"
        return f"Which answer fits this description better: {self.clean}?"

    def instructions(self, count: int) -> list[Instructions]:
        """At most `count` pairs of instructions, of which there are five."""
        match = COMPARATIVE.fullmatch(self.clean)
        if match and not self.opposite:
            sides = [(more.format(trait=match[2]), less.format(trait=match[2])) for more, less in DEGREES]
            pairs = sides if match[1].lower() == "more" else [(less, more) for more, less in sides]
        else:
            opposite = " ".join(self.opposite.split()).rstrip(".!") or f"the opposite of this: {self.clean}"
            pairs = [tuple(one.format(trait=self.clean, opposite=opposite) for one in sides) for sides in MANNERS]  # type: ignore[misc]
        return [Instructions(*pair) for pair in pairs[:count]]

    def questions(self, count: int) -> list[str]:
        """At most `count` questions: those about the topic, if there is one, alternate with everyday ones."""
        match = TOPIC.search(self.clean)
        about = [one.format(topic=match[1]) for one in ABOUT_TOPIC] if match else []
        mixed = [one for pair in zip(about, EVERYDAY, strict=False) for one in pair]
        return [*mixed, *EVERYDAY[len(about) :]][:count]
