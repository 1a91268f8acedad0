"""Choosing the next token of every row of a batch from its logits.

Owns the order of the steps (penalties, bias, minimum length, grammar, temperature, top-k, top-p, min-p, draw), the
random stream of each sequence and the counts behind its penalties. Rows with different parameters share each tensor
operation, yet a row's token depends on its own logits and stream alone, bit for bit: besides elementwise operations and
maxima only integers are summed, so no order of summation can show. Knows nothing of models, text, slots or time.
"""

from __future__ import annotations

import hashlib
import math
import random
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from server.engine.constraints import Matcher, allowed_tokens
from server.engine.errors import reject
from server.engine.protocol import SamplingParameters
from steering_vectors.transfers import picked, sent, tensor_on

_UNIT = 2**40  # mass of a row's likeliest token; 2^22 such tokens still sum within an int64
_BUCKETS, _PER_NAT = 4096, 128.0  # 32 nats below the maximum: what lies lower has no mass
_CACHED = 2**18  # logits; larger buffers are slower, most of all where memory is handed out page by page
_LEAST_TEMPERATURE = 1e-30  # a smaller one would vanish in float32, and 0 / 0 is not a number

_Ids = np.ndarray[tuple[int], np.dtype[np.int64]]
_Values = np.ndarray[tuple[int], np.dtype[np.float32]]
_Head = Callable[[Tensor, Tensor, Tensor], Tensor]


class NonFiniteLogits(Exception):
    """Some rows hold NaN or +inf, or nothing above -inf, before or after penalties; `rows` are their batch indices."""

    def __init__(self, rows: Sequence[int]) -> None:
        self.rows = tuple(rows)
        super().__init__(f"no token can be chosen from the logits of rows {', '.join(map(str, self.rows))}")


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
    """Distinct ids of a sequence and how often each was chosen, in arrays that grow by doubling."""

    __slots__ = ("_counts", "_ids", "_places")

    def __init__(self, ids: Iterable[int]) -> None:
        distinct = list(dict.fromkeys(ids))
        self._places = {token_id: place for place, token_id in enumerate(distinct)}
        self._ids: _Ids = np.array(distinct, dtype=np.int64)
        self._counts: _Values = np.zeros(len(distinct), dtype=np.float32)

    def add(self, token_id: int) -> None:
        place = self._places.setdefault(token_id, len(self._places))
        if place == len(self._ids):
            size = max(16, 2 * place)
            self._ids, self._counts = np.resize(self._ids, size), np.resize(self._counts, size)
            self._counts[place:] = 0
        self._ids[place] = token_id
        self._counts[place] += 1

    def arrays(self) -> tuple[_Ids, _Values]:
        """Ids and their counts; an id of the prompt that was not chosen since has count 0."""
        return self._ids[: len(self._places)], self._counts[: len(self._places)]


class RowSampler:
    """How one sequence draws its tokens: its parameters, its own random stream, the counts of its tokens, and its
    place in a grammar if it has one.

    Ids of the prompt must lie in the vocabulary. Choice i of a request draws from (seed, i), and no seed means one
    from the operating system. Raises RequestError as `check_vocabulary` does.
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
    ) -> None:
        check_vocabulary(parameters, vocab_size)
        self.parameters = parameters
        self.matcher = matcher
        bias = parameters.logit_bias
        self.bias = (np.array([*bias], np.int64), np.array([*bias.values()], np.float32)) if bias else None
        self.counts = _initial_counts(parameters, prompt_ids)
        self.forbidden = _ending_ids(parameters, eos_ids, vocab_size) if parameters.min_tokens else None
        self._chosen = 0
        self._random = random.Random(_stream_seed(parameters.seed, choice))
        self._unused: list[float] = []

    def observe(self, token_id: int) -> None:
        """Take note that this token was chosen for the sequence."""
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
        """Whether the grammar lets nothing follow what was written."""
        return self.matcher is not None and self.matcher.complete

    @property
    def problem(self) -> str | None:
        """Why the grammar allows no token, if that is so because it has failed."""
        return None if self.matcher is None else self.matcher.problem

    def uniform(self) -> float:
        """The next number in [0, 1) of this sequence's stream."""
        return self._unused.pop() if self._unused else self._random.random()

    def take_back(self, number: float) -> None:
        """The number taken last was not used: it is the next one again."""
        self._unused.append(number)


@torch.no_grad()
def sample(logits: Tensor, rows: Sequence[RowSampler], *, waits: bool | None = None) -> list[int]:
    """The next token id of every row; logits `[rows, vocabulary]` of any float dtype are left as they are.

    -inf excludes a token. Among equal logits the lowest id wins, in argmax as at the border of top-k and top-p. A row
    with a temperature takes one number from its stream. Raises NonFiniteLogits, and then none was taken. `waits`: look
    at values on the way, which spares work, and is done on a CPU; else at the end only, by one copy from the device.
    """
    waits = logits.device.type == "cpu" if waits is None else waits
    assert logits.shape[0] == len(rows)
    logits = logits.float() if logits.dtype == torch.float64 else logits
    tokens = _likeliest(logits)
    if waits:
        _refuse(tokens.tolist())
    if any(row.edits_logits for row in rows):
        logits = logits.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        _edit(logits, rows)
        tokens = torch.where(tokens < 0, tokens, _likeliest(logits))
        if waits:
            _refuse(tokens.tolist())
    drawn = [place for place, row in enumerate(rows) if not row.greedy]
    numbers = [rows[place].uniform() for place in drawn]
    for start, part in _parts(drawn, logits):
        _draw(logits, rows, part, numbers[start : start + len(part)], tokens, waits=waits)
    found: list[int] = tokens.tolist()
    try:
        _refuse(found)
    except NonFiniteLogits:
        for place, number in zip(drawn, numbers, strict=True):
            rows[place].take_back(number)
        raise
    return found


def _likeliest(logits: Tensor) -> Tensor:
    """The argmax of every row, -1 where the row is not sound. A NaN wins, so the maxima tell."""
    highest, best = logits.max(dim=-1)
    return torch.where(highest.isfinite(), best, -1)


def _refuse(tokens: Sequence[int]) -> None:
    """Raise NonFiniteLogits if some rows have no token."""
    if broken := [place for place, token_id in enumerate(tokens) if token_id < 0]:
        raise NonFiniteLogits(broken)


def _parts(places: Sequence[int], logits: Tensor) -> Iterator[tuple[int, Sequence[int]]]:
    """Rows to draw together, and how many come before: all on an accelerator, on a CPU as many as its caches hold."""
    size = max(1, _CACHED // logits.shape[1]) if logits.device.type == "cpu" else max(1, len(places))
    return ((start, places[start : start + size]) for start in range(0, len(places), size))


def _edit(logits: Tensor, rows: Sequence[RowSampler]) -> None:
    """Penalties, then bias, then the minimum length, then grammars: each for all rows at once."""
    flat = logits.view(-1)
    starts = range(0, flat.numel(), logits.shape[1])
    _penalise(flat, starts, rows)
    biased = [(start + row.bias[0], row.bias[1]) for start, row in zip(starts, rows, strict=True) if row.bias]
    if biased:
        places, values = (_tensor(flat, np.concatenate(arrays)) for arrays in zip(*biased, strict=True))
        flat[places] += values
    forbidden = [
        start + row.forbidden
        for start, row in zip(starts, rows, strict=True)
        if row.forbidden is not None and row.matcher is None
    ]
    if forbidden:
        flat[_tensor(flat, np.concatenate(forbidden))] = -math.inf
    _constrain(logits, rows)


def _constrain(logits: Tensor, rows: Sequence[RowSampler]) -> None:
    """Bar what a row's grammar does not allow; and what would end the text too early, unless nothing else is left."""
    matchers = {place: row.matcher for place, row in enumerate(rows) if row.matcher is not None}
    if not matchers:
        return
    allowed = allowed_tokens(list(matchers.values()), logits.shape[1])
    for index, place in enumerate(matchers):
        if (early := rows[place].forbidden) is not None and np.delete(allowed[index], early).any():
            allowed[index, early] = False
    places = list(matchers)
    part = _rows(logits, places).masked_fill_(sent(torch.from_numpy(~allowed), logits.device), -math.inf)
    if part is not logits:
        logits[tensor_on(places, logits.device)] = part


def _penalise(flat: Tensor, starts: Sequence[int], rows: Sequence[RowSampler]) -> None:
    """CTRL's repetition penalty (arXiv:1909.05858), then OpenAI's presence and frequency penalties."""
    places, factors, reductions = [], [], []
    for start, row in zip(starts, rows, strict=True):
        if row.counts is not None:
            (ids, counts), wish = row.counts.arrays(), row.parameters
            places.append(start + ids)
            factors.append(np.full(len(ids), wish.repetition_penalty, dtype=np.float32))
            reductions.append(wish.frequency_penalty * counts + wish.presence_penalty * (counts > 0))
    if not places:
        return
    where, factor = _tensor(flat, np.concatenate(places)), _tensor(flat, np.concatenate(factors))
    values = flat[where]
    values = torch.where(values > 0, values / factor, values * factor)
    flat[where] = values - _tensor(flat, np.concatenate(reductions).astype(np.float32))


def _draw(
    logits: Tensor,
    rows: Sequence[RowSampler],
    part: Sequence[int],
    numbers: Sequence[float],
    tokens: Tensor,
    *,
    waits: bool,
) -> None:
    """Write a token for each row of a part into `tokens`, where it has one: its cumulative mass is inverted, in the
    order of the vocabulary, at its number in [0, 1)."""
    places = slice(None) if len(part) == len(rows) else tensor_on(list(part), logits.device)
    scratch = logits[places].to(torch.float32, copy=isinstance(places, slice))
    if not waits:
        sound = tokens[places] >= 0
        scratch.masked_fill_(~sound.unsqueeze(-1), 0)  # no index may come of what is no number
    mass = probability_mass(scratch, [rows[place].parameters for place in part], waits=waits)
    cumulative = mass.cumsum(dim=-1)
    total = cumulative[:, -1:]
    uniform = tensor_on(numbers, logits.device, torch.float64).unsqueeze(-1)
    target = (uniform * total).long().minimum(total - 1)  # the product may be rounded up to the total
    drawn = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    tokens[places] = drawn if waits else torch.where(sound, drawn, -1)


def probability_mass(logits: Tensor, parameters: Sequence[SamplingParameters], *, waits: bool = True) -> Tensor:
    """Integer weights `[rows, vocabulary]` in proportion to each row's probabilities; 0 for what cannot be drawn.

    Float32 `logits` are used up as working space. The likeliest token has 2^40; what is less likely than 2^-40 of it
    has 0. Temperature, top_k, top_p (of the mass that top_k left) and min_p are applied, penalties are not. `waits`:
    values may be looked at on the way.
    """
    scaled = logits.sub_(logits.amax(dim=-1, keepdim=True))
    if any(wish.temperature != 1 for wish in parameters):
        temperatures = [[max(wish.temperature, _LEAST_TEMPERATURE)] for wish in parameters]
        scaled.div_(tensor_on(temperatures, scaled.device, scaled.dtype))
    mass = scaled.exp().mul_(_UNIT).long()
    head = _shortest_head if waits else _shortest_head_unseen
    _keep_top_k(scaled, mass, [wish.top_k for wish in parameters], head)
    _keep_top_p(scaled, mass, [wish.top_p for wish in parameters], head)
    if any(wish.min_p for wish in parameters):
        floor = [[math.ceil(wish.min_p * _UNIT)] for wish in parameters]
        mass.masked_fill_(mass < tensor_on(floor, mass.device), 0)
    return mass


def _keep_top_k(scaled: Tensor, mass: Tensor, top_k: Sequence[int], head: _Head) -> None:
    index = [place for place, k in enumerate(top_k) if 0 < k < mass.shape[1]]
    if index:
        present = (_rows(mass, index) > 0).long()
        need = tensor_on([[top_k[place]] for place in index], mass.device)
        _zero_below(scaled, mass, index, present, need.minimum(present.sum(dim=-1, keepdim=True)), head)


def _keep_top_p(scaled: Tensor, mass: Tensor, top_p: Sequence[float], head: _Head) -> None:
    index = [place for place, p in enumerate(top_p) if p < 1]
    if index:
        part = _rows(mass, index)
        total = part.sum(dim=-1, keepdim=True)
        share = tensor_on([[top_p[place]] for place in index], mass.device, torch.float64)
        _zero_below(scaled, mass, index, part, (share * total).ceil().long().clamp(min=1).minimum(total), head)


def _zero_below(scaled: Tensor, mass: Tensor, index: Sequence[int], weight: Tensor, need: Tensor, head: _Head) -> None:
    keep = head(_rows(scaled, index), weight, need)
    part = _rows(mass, index).mul_(keep)
    if part is not mass:
        mass[tensor_on(list(index), mass.device)] = part


def _shortest_head(scaled: Tensor, weight: Tensor, need: Tensor) -> Tensor:
    """Mask `[rows, vocabulary]` of the fewest likeliest tokens whose weights sum to `need` `[rows, 1]` or more.

    A histogram finds the bucket in which the sum is reached, and only that bucket's tokens are put in order: sorting
    a vocabulary costs twenty times as much. Equal values are kept from the lowest id on. Needs 0 < need ≤ sum.
    """
    bucket = (scaled * -_PER_NAT).clamp_(0, _BUCKETS - 1).long()
    weights = torch.zeros(len(scaled), _BUCKETS, dtype=torch.int64, device=scaled.device)
    weights.scatter_add_(-1, bucket, weight)
    reached = weights.cumsum(dim=-1)
    border = torch.searchsorted(reached, need)  # [rows, 1]
    before = (reached - weights).gather(-1, border)
    inside = bucket == border
    values, ids = scaled.masked_fill(~inside, -math.inf).topk(int(inside.count_nonzero(dim=-1).max()), dim=-1)
    ordered = weight.gather(-1, ids).masked_fill_(values == -math.inf, 0)
    last = torch.searchsorted(before + ordered.cumsum(dim=-1), need)
    threshold = values.gather(-1, last)
    keep = scaled >= threshold
    if bool(((values >= threshold).sum(dim=-1, keepdim=True) > last + 1).any()):
        tied = (scaled == threshold).logical_and_(weight > 0)  # an earlier bound may have left none of its mass
        each = ordered.masked_fill(values != threshold, 0).amax(dim=-1, keepdim=True)
        short = need - before - ordered.masked_fill(values <= threshold, 0).sum(dim=-1, keepdim=True)
        keep &= ~tied | (tied.cumsum(dim=-1) <= (short + each - 1) // each)
    return keep


def _shortest_head_unseen(scaled: Tensor, weight: Tensor, need: Tensor) -> Tensor:
    """The same without looking at any value: the border's bits are found eleven and ten at a time.

    The distance from the maximum, read as an integer, orders tokens as the distance does.
    """
    distance = scaled.abs().view(torch.int32)  # [rows, vocabulary], of 31 bits
    border = torch.zeros_like(need)
    inside = weight  # of the tokens that agree with the border so far
    before = torch.zeros_like(need)  # of those on its near side
    for bits, shift in ((11, 20), (10, 10), (10, 0)):
        digit = (distance >> shift).long() & (2**bits - 1)
        weights = torch.zeros(len(scaled), 2**bits, dtype=torch.int64, device=scaled.device)
        reached = weights.scatter_add_(-1, digit, inside).cumsum(dim=-1)
        found = torch.searchsorted(reached, need - before).clamp_(max=2**bits - 1)  # [rows, 1]
        before += (reached - weights).gather(-1, found)
        inside = inside * (digit == found)
        border = border << bits | found
    last = inside.cumsum(dim=-1) - inside < need - before  # among equals the lowest ids
    return (distance < border) | ((distance == border) & last)


def _rows(whole: Tensor, index: Sequence[int]) -> Tensor:
    """These rows, ascending; not a copy where they are all."""
    return whole if len(index) == len(whole) else picked(whole, index)


def _tensor(like: Tensor, array: _Ids | _Values) -> Tensor:
    return sent(torch.from_numpy(array), like.device)


def _stream_seed(seed: int | None, choice: int) -> int:
    """One 64-bit seed for (seed, choice): neighbouring seeds and choices give unrelated streams."""
    if seed is None:
        return secrets.randbits(64)
    return int.from_bytes(hashlib.sha256(f"{seed}/{choice}".encode()).digest()[:8], "big")


def _initial_counts(parameters: SamplingParameters, prompt_ids: Sequence[int]) -> _TokenCounts | None:
    if parameters.repetition_penalty != 1:
        return _TokenCounts(prompt_ids)
    return _TokenCounts(()) if parameters.presence_penalty or parameters.frequency_penalty else None


def _ending_ids(parameters: SamplingParameters, eos_ids: frozenset[int], vocab_size: int) -> _Ids:
    """What would end the text; with ignore_eos an end-of-sequence token does not."""
    ending = set(parameters.stop_token_ids)
    if not parameters.ignore_eos:
        ending |= {token_id for token_id in eos_ids if token_id < vocab_size}
    return np.array(sorted(ending), dtype=np.int64)
