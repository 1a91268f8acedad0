"""Preference data encoded for one model, checked against its context limit, and the prompts to sample from."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from steering_vectors.data.batches import Encoded
from steering_vectors.data.chat import Example, encode_example, encode_prompt
from steering_vectors.data.preferences import Preferences
from steering_vectors.errors import DataError, RequestError
from steering_vectors.models.limits import context_limit
from steering_vectors.models.loading import LanguageModel

MAX_PROMPTS = 96  # for calibration
PROMPT_WORDS = 5  # words of a completion that replace a missing prompt

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Sides:
    """Encoded preferred and rejected examples. If `paired`, entry i of both comes from one row."""

    positives: tuple[Encoded, ...]
    negatives: tuple[Encoded, ...]
    paired: bool

    def thinned(self, size: int) -> Sides:
        return Sides(spread(self.positives, size), spread(self.negatives, size), self.paired)


def spread(examples: Sequence[Item], size: int) -> tuple[Item, ...]:
    """At most `size` evenly spaced examples."""
    count = len(examples)
    return tuple(examples) if count <= size else tuple(examples[i * count // size] for i in range(size))


@dataclass(frozen=True, slots=True)
class Corpus:
    """Preference data with the tokens of every example. `long_rows` counts the rows that were too long."""

    pairs: Preferences
    encoded: Mapping[Example, Encoded]
    long_rows: int = 0

    def sides(self) -> Sides:
        positives, negatives = (tuple(self.encoded[one] for one in side) for side in self.pairs.sides())
        return Sides(positives, negatives, self.pairs.paired)

    def split(self, fraction: float, seed: int, *, min_side: int) -> tuple[Corpus, Corpus]:
        first, second = self.pairs.split(fraction, seed, min_side=min_side)
        return replace(self, pairs=first), replace(self, pairs=second)


def encode_corpus(
    tokenizer: PreTrainedTokenizerBase, pairs: Preferences, *, limit: int | None, skip_long_rows: bool = False
) -> Corpus:
    """Encode every row. Raises DataError for a row of more than `limit` tokens, or leaves it out if `skip_long_rows`.

    Enough rows must remain. Rows are never truncated, because half a response may express another preference.
    """
    encoded: dict[Example, Encoded] = {}
    for side, number, example in _numbered(pairs):
        try:
            encoded[example] = encode_example(tokenizer, example)
        except (DataError, RequestError) as error:
            raise DataError(f"{_name(side, number, example)}: {error.message}") from error
    long = {one for one, (ids, _) in encoded.items() if limit is not None and len(ids) > limit}
    if not long:
        return Corpus(pairs, encoded)
    kept = pairs.select({row for row, item in enumerate(pairs.items()) if not long.intersection(item)})
    if not skip_long_rows:
        side, number, example = next(one for one in _numbered(pairs) if one[2] in long)
        raise DataError(
            f"{_name(side, number, example)} has {len(encoded[example][0])} tokens, but the model's context holds "
            f"{limit}; {pairs.rows - kept.rows} of {pairs.rows} rows are too long; leave them out with "
            "skip_long_rows (rows are never truncated)",
            path=pairs.source or None,
        )
    kept.check(left_out=f"{pairs.rows - kept.rows} exceed the model's context of {limit} tokens")
    return Corpus(kept, encoded, pairs.rows - kept.rows)


def sampling_prompts(
    tokenizer: PreTrainedTokenizerBase, pairs: Preferences, *, max_tokens: int | None, seed: int
) -> list[list[int]]:
    """Draw up to 96 distinct prompts of at most `max_tokens` tokens. Equal seeds draw equal prompts.

    If the rows have no prompts, the first five words of their completions are used. Raises DataError if no prompt is
    short enough.
    """
    examples = [*pairs.positives, *pairs.negatives]
    prompts = [encode_prompt(tokenizer, prompt) for prompt in dict.fromkeys(one.prompt for one in examples) if prompt]
    if not prompts:
        starts = dict.fromkeys(" ".join(one.completion.split()[:PROMPT_WORDS]) for one in examples)
        prompts = [list(encode_example(tokenizer, Example(None, start))[0]) for start in starts if start]
    short = [prompt for prompt in prompts if max_tokens is None or len(prompt) <= max_tokens]
    if not short:
        raise DataError(
            f"none of the {len(prompts)} held-out prompts leaves room to sample in the model's context: the shortest "
            f"has {min(map(len, prompts), default=0)} tokens, but {max_tokens} fit; add rows with shorter prompts",
            path=pairs.source or None,
        )
    return random.Random(seed).sample(short, min(MAX_PROMPTS, len(short)))


def prompts_with_room(lm: LanguageModel, pairs: Preferences, *, room: int, seed: int) -> list[list[int]]:
    """`sampling_prompts` that leave room for `room` more tokens in the model's context."""
    limit = context_limit(lm)
    return sampling_prompts(lm.tokenizer, pairs, max_tokens=None if limit is None else limit - room, seed=seed)


def _numbered(pairs: Preferences) -> Iterator[tuple[str, int, Example]]:
    for side, examples in (("positive", pairs.positives), ("negative", pairs.negatives)):
        for number, example in enumerate(examples, start=1):
            yield side, number, example


def _name(side: str, number: int, example: Example, length: int = 40) -> str:
    """The name of an example in errors."""
    text = " ".join(example.completion.split())
    shown = text if len(text) <= length else f"{text[: length - 1]}…"
    return f"{side} example {number} ({shown!r})"
