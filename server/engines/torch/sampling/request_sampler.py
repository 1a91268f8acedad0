"""How one request draws its tokens: its parameters, its random stream, and the counts behind its penalties."""

from __future__ import annotations

import hashlib
import random
import secrets
from collections.abc import Collection, Iterable, Sequence

import numpy as np

from server.engines.errors import reject
from server.engines.protocol import SamplingParameters
from server.engines.torch.constraints.matching import Matcher

TokenIds = np.ndarray[tuple[int], np.dtype[np.int64]]
Values = np.ndarray[tuple[int], np.dtype[np.float32]]


def check_vocabulary(parameters: SamplingParameters, vocab_size: int) -> None:
    """Raise RequestError if logit_bias or stop_token_ids name a token that the model does not have."""
    for name, ids in (("logit_bias", parameters.logit_bias), ("stop_token_ids", parameters.stop_token_ids)):
        for token_id in ids:
            reject(
                not 0 <= token_id < vocab_size,
                f"{name} names token {token_id}, but this model's token ids go from 0 to {vocab_size - 1}",
                name,
            )


class _TokenCounts:
    """Distinct ids and how often each was chosen, in arrays that grow by doubling."""

    __slots__ = ("_counts", "_ids", "_places")

    def __init__(self, ids: Iterable[int]) -> None:
        distinct = list(dict.fromkeys(ids))
        self._places = {token_id: place for place, token_id in enumerate(distinct)}
        self._ids: TokenIds = np.array(distinct, dtype=np.int64)
        self._counts: Values = np.zeros(len(distinct), dtype=np.float32)

    def add(self, token_id: int) -> None:
        place = self._places.setdefault(token_id, len(self._places))
        if place == len(self._ids):
            size = max(16, 2 * place)
            self._ids, self._counts = np.resize(self._ids, size), np.resize(self._counts, size)
            self._counts[place:] = 0
        self._ids[place] = token_id
        self._counts[place] += 1

    def arrays(self) -> tuple[TokenIds, Values]:
        """Ids and their counts; an id of the prompt that was not chosen since has count 0."""
        return self._ids[: len(self._places)], self._counts[: len(self._places)]


class RequestSampler:
    """The state of sampling of one choice.

    Prompt ids must lie in the vocabulary. Choice i of a request draws from (seed, i); without a seed one is taken from
    the operating system. `stop_ids` end the text besides `eos_ids`; None means those of the parameters, whose ids must
    lie in the vocabulary too (`check_vocabulary`).
    """

    __slots__ = ("_chosen", "_random", "_unused", "bias", "counts", "forbidden", "matcher", "parameters")

    def __init__(
        self,
        parameters: SamplingParameters,
        *,
        vocab_size: int,
        eos_ids: frozenset[int],
        prompt_ids: Sequence[int],
        choice: int = 0,
        matcher: Matcher | None = None,
        stop_ids: Collection[int] | None = None,
    ) -> None:
        self.parameters = parameters
        self.matcher = matcher
        bias = parameters.logit_bias
        self.bias = (np.array([*bias], np.int64), np.array([*bias.values()], np.float32)) if bias else None
        repetition = parameters.repetition_penalty != 1  # the only penalty that counts the prompt
        penalised = repetition or parameters.presence_penalty or parameters.frequency_penalty
        self.counts = _TokenCounts(prompt_ids if repetition else ()) if penalised else None
        self.forbidden: TokenIds | None = None
        if parameters.min_tokens:
            stops = parameters.stop_token_ids if stop_ids is None else stop_ids
            ending = {*stops, *(() if parameters.ignore_eos else eos_ids)}
            self.forbidden = np.array(sorted(token for token in ending if token < vocab_size), dtype=np.int64)
        self._chosen = 0
        hashed = hashlib.sha256(f"{parameters.seed}/{choice}".encode()).digest()[:8]  # neighbours become unrelated
        seed = secrets.randbits(64) if parameters.seed is None else int.from_bytes(hashed, "big")
        self._random = random.Random(seed)
        self._unused: list[float] = []

    def observe(self, token_id: int) -> None:
        """Note that this token was chosen."""
        self._chosen += 1
        if self.counts is not None:
            self.counts.add(token_id)
        if self.matcher is not None:
            self.matcher.advance(token_id)
        if self._chosen >= self.parameters.min_tokens:
            self.forbidden = None

    @property
    def greedy(self) -> bool:
        return self.parameters.temperature == 0

    @property
    def edits_logits(self) -> bool:
        return any(one is not None for one in (self.counts, self.bias, self.forbidden, self.matcher))

    @property
    def complete(self) -> bool:
        """Whether the grammar allows nothing more."""
        return self.matcher is not None and self.matcher.complete

    @property
    def problem(self) -> str | None:
        """Why the grammar allows no token, if that is so because it has failed."""
        return None if self.matcher is None else self.matcher.problem

    def uniform(self) -> float:
        """The next number in [0, 1) of the random stream."""
        return self._unused.pop() if self._unused else self._random.random()

    def take_back(self, number: float) -> None:
        """Return a number that was not used; it is the next one again."""
        self._unused.append(number)
