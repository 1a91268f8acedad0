"""Preference examples as responses under two instructions.

Owns which examples are read and what their prompts become. Knows nothing of models' outputs or of tuning.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from steering_vectors.data.batches import Encoded
from steering_vectors.data.chat import Example, encode_prompt
from steering_vectors.errors import FitError
from steering_vectors.tuning.instructions import Instructions, instructed
from steering_vectors.tuning.paired_reading import Twin


def twins_of(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    encoded: Sequence[Encoded],
    instructions: Instructions,
    *,
    limit: int | None = None,
    most: int | None = None,
    seed: int = 0,
) -> list[Twin]:
    """The examples' responses, each under both instructions; `most` of them at most, drawn from `seed`.

    A response keeps the token ids it has after the plain prompt, so both sides read the same tokens and none holds a
    second BOS. With an instruction ahead of them some examples may exceed the model's context of `limit` tokens:
    these are left out. Raises FitError if that leaves none.
    """
    order = list(range(len(examples)))
    if most is not None and len(order) > most:
        order = sorted(random.Random(seed).sample(order, most))
    known: dict[int, int] = {}
    twins = [_twin(tokenizer, examples[index], encoded[index], instructions, known) for index in order]
    fitting = [twin for twin in twins if limit is None or twin.length <= limit]
    if not fitting:
        shortest = min((twin.length for twin in twins), default=0)
        raise FitError(
            f"with an instruction ahead of it no example fits the model's context of {limit} tokens (the shortest has "
            f"{shortest}): give shorter instructions or examples"
        )
    return fitting


def _twin(
    tokenizer: PreTrainedTokenizerBase,
    example: Example,
    encoded: Encoded,
    instructions: Instructions,
    known: dict[int, int],
) -> Twin:
    """Equal token ids are one object in all twins, by `known`: a quarter of the memory."""
    ids, start = encoded
    sides = [
        encode_prompt(tokenizer, instructed(tokenizer, example.prompt, text) or "")
        for text in (instructions.positive, instructions.negative)
    ]
    parts = (sides[0], sides[1], ids[start:], ids[:start])
    return Twin(*(tuple(known.setdefault(token, token) for token in part) for part in parts))
