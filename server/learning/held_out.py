"""The split of prompts into those that are fitted on and those that are held out, which never changes.

A prompt's side follows from its own hash alone. So rows that come later, other settings of a fit, and every later round
leave it where it is: what is held out once is in no fit, ever.
"""

from __future__ import annotations

import hashlib
import json

from steering_vectors.data.chat import Example, Prompt

SALT = "trimtab/held-out/1"


def prompt_key(prompt: Prompt, *texts: str) -> str:
    """What stands for a prompt. Messages that are one user's text are that text, as chats and plain prompts ask the
    same. Without a prompt, the texts stand for it."""
    if prompt is None:
        return json.dumps(["", *sorted(texts)])
    if isinstance(prompt, str):
        return json.dumps([prompt])
    if len(prompt) == 1 and prompt[0].role == "user":
        return json.dumps([prompt[0].content])
    return json.dumps([[message.role, message.content] for message in prompt])


def pair_key(positive: Example, negative: Example) -> str:
    """The key of a pair's prompt."""
    return prompt_key(positive.prompt, positive.completion, negative.completion)


def is_held_out(key: str, fraction: float) -> bool:
    """Whether a prompt is held out, where `fraction` of all prompts are. A larger fraction keeps those of a smaller."""
    digest = hashlib.sha256(f"{SALT}/{key}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < fraction
