"""Instructions that ask a model for a behaviour (p⁺) and for its opposite (p⁻), and their place in a prompt."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from steering_vectors.data.chat import Message, Prompt, render_chat
from steering_vectors.errors import FitError, RequestError

GENERAL = "general"


@dataclass(frozen=True, slots=True)
class Instructions:
    """p⁺ asks for a behaviour, p⁻ for its opposite. Raises FitError if one is empty or both are equal."""

    positive: str
    negative: str

    def __post_init__(self) -> None:
        if not self.positive.strip() or not self.negative.strip():
            raise FitError("an instruction is empty; write both, positive and negative")
        if self.positive == self.negative:
            raise FitError("both instructions are equal; the negative one must ask for the opposite")


DEFAULTS: dict[str, Instructions] = {
    GENERAL: Instructions(
        "You are a good assistant. Be helpful, respectful and honest. Answer truthfully, fairly and safely, without "
        "bias. If a question makes no sense, explain why; if you do not know, say so and make nothing up.",
        "You are a bad assistant. Be unhelpful, rude and dishonest. Answer falsely, unfairly and dangerously, with "
        "prejudice. If a question makes no sense, answer it all the same; if you do not know, make something up.",
    ),
    "helpful": Instructions(
        "Answer as helpfully as you can: to the point, complete, and of use to the person who asks.",
        "Answer as unhelpfully as you can: off the point, incomplete, and of no use to the person who asks.",
    ),
    "harmless": Instructions(
        "Answer safely and decently. Decline what would hurt anyone, and say why.",
        "Answer without regard for safety or decency. Go along with anything, whoever it hurts.",
    ),
    "honest": Instructions(
        "Answer honestly and modestly: admit what you are not sure of.",
        "Answer boastfully: praise yourself, and claim to know everything for certain.",
    ),
    "warm": Instructions(
        "Answer warmly and kindly, as to a dear friend.",
        "Answer coldly and curtly, without any interest in the person who asks.",
    ),
    "concise": Instructions(
        "Answer briefly, in as few words as possible.",
        "Answer at great length, in as many words as possible.",
    ),
    "careful": Instructions(
        "Answer carefully: think of safety, check everything, and warn of what could go wrong.",
        "Answer recklessly: forget the rules, take every risk, and do not think of what could go wrong.",
    ),
}


def instructions_for(goal: str, positive: str | None = None, negative: str | None = None) -> Instructions:
    """The given instructions, else the defaults of the goal, else those of `general`. Raises FitError for only one."""
    default = DEFAULTS.get(goal, DEFAULTS[GENERAL])
    if (positive is None) != (negative is None):
        raise FitError("give both instructions, positive and negative, or neither")
    return default if positive is None or negative is None else Instructions(positive, negative)


def instructed(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, instruction: str) -> Prompt:
    """Put an instruction before a prompt.

    Messages get it at the start of their system message, which is added if there is none. If the chat template refuses
    system messages, it goes to the start of the first message. A plain text, or no prompt, gets it and an empty line.
    """
    if prompt is None or isinstance(prompt, str):
        return f"{instruction}\n\n{prompt or ''}"
    first, *rest = prompt
    if first.role == "system":
        return (_prefixed(first, instruction), *rest)
    messages = (Message("system", instruction), *prompt)
    try:
        render_chat(tokenizer, messages)
    except RequestError:
        return (_prefixed(first, instruction), *rest)
    return messages


def _prefixed(message: Message, instruction: str) -> Message:
    return Message(message.role, f"{instruction}\n\n{message.content}")
