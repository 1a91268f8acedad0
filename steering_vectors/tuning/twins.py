"""Preference examples as responses under two instructions."""

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
    max_twins: int | None = None,
    seed: int = 0,
) -> list[Twin]:
    """The examples' responses, each under both instructions; a sample of `max_twins` of them, drawn from `seed`.

    A response keeps its token ids after the plain prompt, so both sides read the same tokens and none has a second BOS.
    Examples that exceed `limit` tokens with an instruction are left out. Raises FitError if none is left.
    """
    order = list(range(len(examples)))
    if max_twins is not None and len(order) > max_twins:
        order = sorted(random.Random(seed).sample(order, max_twins))
    known: dict[int, int] = {}
    twins = [_twin(tokenizer, examples[index], encoded[index], instructions, known) for index in order]
    fitting = [twin for twin in twins if limit is None or twin.length <= limit]
    if not fitting:
        shortest = min((twin.length for twin in twins), default=0)
        raise FitError(
            f"no example fits the model's context of {limit} tokens with an instruction before it (the shortest has "
            f"{shortest} tokens): use shorter instructions or examples"
        )
    return fitting


def _twin(
    tokenizer: PreTrainedTokenizerBase,
    example: Example,
    encoded: Encoded,
    instructions: Instructions,
    known: dict[int, int],
) -> Twin:
    """Equal token ids are the same object in all twins, through `known`, which saves three quarters of the memory."""
    ids, start = encoded
    sides = [
        encode_prompt(tokenizer, instructed(tokenizer, example.prompt, text) or "")
        for text in (instructions.positive, instructions.negative)
    ]
    parts = (sides[0], sides[1], ids[start:], ids[:start])
    return Twin(*(tuple(known.setdefault(token, token) for token in part) for part in parts))
