"""Choosing the next token of every row of a batch from its logits.

Owns the order of the steps: penalties, bias, minimum length, grammar, then `probabilities`, then the draw from a row's
own stream (`row_sampler`). Rows with different parameters share each tensor operation, yet a row's token depends on its
own logits and stream alone, bit for bit: besides elementwise operations and maxima only integers are summed, so no
order of summation can show. Knows nothing of models, text, slots or time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from server.engines.torch.constraints.matching import allowed_tokens
from server.engines.torch.sampling.request_sampler import RowSampler, TokenIds, Values
from server.engines.torch.sampling.truncation import probability_mass, rows_of
from steering_vectors.models.transfers import sent, tensor_on

_CACHED = 2**18  # logits; larger buffers are slower, most of all where memory is handed out page by page


class NonFiniteLogits(Exception):
    """Some rows hold NaN or +inf, or nothing above -inf, before or after penalties; `rows` are their batch indices."""

    def __init__(self, rows: Sequence[int]) -> None:
        self.rows = tuple(rows)
        super().__init__(f"no token can be chosen from the logits of rows {', '.join(map(str, self.rows))}")


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
    part = rows_of(logits, places).masked_fill_(sent(torch.from_numpy(~allowed), logits.device), -math.inf)
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


def _tensor(like: Tensor, array: TokenIds | Values) -> Tensor:
    return sent(torch.from_numpy(array), like.device)
