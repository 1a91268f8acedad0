"""Instructions that ask a model for a behaviour (p⁺) and for its opposite (p⁻), and how a prompt carries one.

Owns the wording of the defaults, per goal, and where an instruction stands in a prompt. Knows nothing of models or of
what is computed under an instruction.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from steering_vectors.data.chat import Message, Prompt, render_chat
from steering_vectors.errors import FitError, RequestError

GENERAL = "general"


@dataclass(frozen=True, slots=True)
class Instructions:
    """p⁺ and p⁻: the same demand, and its mirror."""

    positive: str
    negative: str

    def __post_init__(self) -> None:
        if not self.positive.strip() or not self.negative.strip():
            raise FitError("an instruction is empty; say what is wanted, and what is not")
        if self.positive == self.negative:
            raise FitError("both instructions are the same; the negative one must ask for the opposite")


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
    """The default instructions of a goal (`general` if it is none of them), with either replaced by one's own."""
    default = DEFAULTS.get(goal, DEFAULTS[GENERAL])
    if (positive is None) != (negative is None):
        raise FitError("give both instructions, positive and negative, or neither")
    return default if positive is None or negative is None else Instructions(positive, negative)


def instructed(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, instruction: str) -> Prompt:
    """The prompt with the instruction ahead of it.

    Messages carry it in their system message, which is made if there is none; where the chat template refuses system
    messages, the first message begins with it. A plain text, or no prompt at all, is preceded by it and an empty line.
    """
    if prompt is None or isinstance(prompt, str):
        return f"{instruction}\n\n{prompt or ''}"
    first, *rest = prompt
    if first.role == "system":
        return (_led(first, instruction), *rest)
    messages = (Message("system", instruction), *prompt)
    try:
        render_chat(tokenizer, messages)
    except RequestError:
        return (_led(first, instruction), *rest)
    return messages


def _led(message: Message, instruction: str) -> Message:
    return Message(message.role, f"{instruction}\n\n{message.content}")
