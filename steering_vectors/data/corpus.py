"""Preference data encoded for one model, checked against its context limit, and the prompts to sample from."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from steering_vectors.data.batches import Encoded
from steering_vectors.data.chat import Example, encode_example, encode_prompt
from steering_vectors.data.preferences import MAX_SKIP_MESSAGES, Preferences, Side
from steering_vectors.errors import DataError, RequestError
from steering_vectors.models.limits import context_limit
from steering_vectors.models.loading import LanguageModel

MAX_PROMPTS = 96  # for calibration
SIDES: tuple[Side, Side] = ("positive", "negative")
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
    """Preference data with the tokens of every example.

    `first_unusable` says why the first row that the model cannot use was skipped, and `long_rows` counts the rows that
    were too long.
    """

    pairs: Preferences
    encoded: Mapping[Example, Encoded]
    first_unusable: str = ""
    long_rows: int = 0

    @property
    def notes(self) -> list[str]:
        """Sentences for the user about the rows that were left out."""
        notes = []
        if self.pairs.skipped:
            note, first = f"{self.pairs.skipped} bad rows were skipped", self.pairs.first_skipped
            if first:
                note += f"; the first: {first}"
            if self.first_unusable not in ("", first):
                note += f"; the first that this model cannot use: {self.first_unusable}"
            notes.append(note)
        if self.long_rows:
            notes.append(f"{self.long_rows} rows longer than the model's context were left out")
        return notes

    def sides(self) -> Sides:
        positives, negatives = (tuple(self.encoded[one] for one in side) for side in self.pairs.sides())
        return Sides(positives, negatives, self.pairs.paired)

    def split(self, fraction: float, seed: int, *, min_side: int) -> tuple[Corpus, Corpus]:
        first, second = self.pairs.split(fraction, seed, min_side=min_side)
        return replace(self, pairs=first), replace(self, pairs=second)


def corpus_for(lm: LanguageModel, pairs: Preferences, *, skip_long_rows: bool) -> Corpus:
    """`encode_corpus` within a model's context."""
    return encode_corpus(lm.tokenizer, pairs, limit=context_limit(lm), skip_long_rows=skip_long_rows)


def encode_corpus(
    tokenizer: PreTrainedTokenizerBase,
    pairs: Preferences,
    *,
    limit: int | None,
    skip_long_rows: bool = False,
) -> Corpus:
    """Encode every row. Raises DataError, with the line and the column of the row, if one cannot be used.

    Rows that the chat template refuses, that have no token, or one that the model does not have, are left out if
    `pairs` were read with `skip_bad_rows`. Rows of more than `limit` tokens are left out if `skip_long_rows`. Enough
    rows must remain. Rows are never truncated, because half a response may express another preference.
    """
    encoded: dict[Example, Encoded] = {}
    bad: dict[int, tuple[Side, str]] = {}
    long: dict[int, tuple[Side, str]] = {}
    for row, item in enumerate(pairs.items()):
        for side, example in zip(SIDES, item, strict=True):
            if example is None or row in bad:
                continue
            try:
                if example not in encoded:
                    encoded[example] = encode_example(tokenizer, example)
            except RequestError as error:
                bad[row] = "prompt", error.message
            except DataError as error:
                bad[row] = side, error.message
            else:
                size = len(encoded[example][0])
                if limit is not None and size > limit:
                    long.setdefault(row, (side, f"it has {size} tokens, but the model's context holds {limit}"))
    long = {row: fault for row, fault in long.items() if row not in bad}
    if bad and not pairs.skip_bad_rows:
        row, (side, problem) = next(iter(bad.items()))
        remedy = "; correct the row, or skip such rows with skip_bad_rows" if pairs.lines else ""
        raise pairs.error(row, side, f"{problem}; {len(bad)} of {pairs.rows} rows cannot be encoded{remedy}")
    if long and not skip_long_rows:
        row, (side, problem) = next(iter(long.items()))
        remedy = "leave them out with skip_long_rows (rows are never truncated)"
        raise pairs.error(row, side, f"{problem}; {len(long)} of {pairs.rows} rows are too long; {remedy}")
    if not (bad or long):
        return Corpus(pairs, encoded)
    refused = [pairs.error(row, *fault).message for row, fault in bad.items()]
    kept = replace(
        pairs.select(set(range(pairs.rows)) - bad.keys() - long.keys()),
        skipped=pairs.skipped + len(bad),
        skip_messages=(*pairs.skip_messages, *refused)[:MAX_SKIP_MESSAGES],
    )
    left_out = [f"{kept.skipped} bad ones were skipped"] if kept.skipped else []
    if long:
        left_out.append(f"{len(long)} exceed the model's context of {limit} tokens")
    kept.check(left_out=", ".join(left_out))
    return Corpus(kept, encoded, kept.without_path(refused[0]) if refused else "", len(long))


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
