"""Choosing the next token of every row of a batch from its logits.

The order is: penalties, bias, minimum length, grammar, truncation (`truncation`), then the draw from the row's own
random stream (`request_sampler`). Rows with different parameters share each tensor operation, yet a row's token depends
on its own logits and stream alone, bit for bit: besides elementwise operations and maxima only integers are summed, so
the order of summation cannot show.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from server.engines.torch.constraints.matching import allowed_tokens
from server.engines.torch.sampling.request_sampler import RequestSampler, TokenIds, Values
from server.engines.torch.sampling.truncation import probability_mass, rows_of
from steering_vectors.models.transfers import sent, tensor_on

_CACHED_LOGITS = 2**18  # logits; larger buffers are slower, most of all where memory is handed out page by page


class NonFiniteLogits(Exception):
    """Some rows hold NaN or +inf, or nothing above -inf, before or after penalties; `rows` are their batch indices."""

    def __init__(self, rows: Sequence[int]) -> None:
        self.rows = tuple(rows)
        super().__init__(f"no token can be chosen from the logits of rows {', '.join(map(str, self.rows))}")


@torch.no_grad()
def sample(logits: Tensor, rows: Sequence[RequestSampler], *, allow_sync: bool | None = None) -> list[int]:
    """The next token id of every row; logits `[rows, vocabulary]` of any float dtype are left as they are.

    -inf excludes a token. Among equal logits the lowest id wins, in argmax as at the border of top-k and top-p. A row
    with a temperature takes one number from its stream. Raises NonFiniteLogits; whatever is raised, none was taken.
    `allow_sync`: values may be copied to the host early, which saves work on a CPU; None means on a CPU only.
    """
    allow_sync = logits.device.type == "cpu" if allow_sync is None else allow_sync
    assert logits.shape[0] == len(rows)
    logits = logits.float() if logits.dtype == torch.float64 else logits
    tokens = _likeliest(logits)
    if allow_sync:
        _refuse(tokens.tolist())
    if any(row.edits_logits for row in rows):
        logits = logits.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        _edit(logits, rows)
        tokens = torch.where(tokens < 0, tokens, _likeliest(logits))
        if allow_sync:
            _refuse(tokens.tolist())
    drawn = [place for place, row in enumerate(rows) if not row.greedy]
    numbers = [rows[place].uniform() for place in drawn]
    on_cpu = logits.device.type == "cpu"
    size = max(1, _CACHED_LOGITS // logits.shape[1] if on_cpu else len(drawn))  # of rows that are drawn together
    try:
        for start in range(0, len(drawn), size):
            part = slice(start, start + size)
            _draw(logits, rows, drawn[part], numbers[part], tokens, allow_sync=allow_sync)
        found: list[int] = tokens.tolist()
        _refuse(found)
    except Exception:
        for place, number in zip(drawn, numbers, strict=True):
            rows[place].take_back(number)
        raise
    return found


def _likeliest(logits: Tensor) -> Tensor:
    """The argmax of every row, -1 where the row is not finite. A NaN is the maximum, so the maxima show it."""
    highest, best = logits.max(dim=-1)
    return torch.where(highest.isfinite(), best, -1)


def _refuse(tokens: Sequence[int]) -> None:
    """Raise NonFiniteLogits if some rows have no token."""
    if broken := [place for place, token_id in enumerate(tokens) if token_id < 0]:
        raise NonFiniteLogits(broken)


def _edit(logits: Tensor, rows: Sequence[RequestSampler]) -> None:
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


def _constrain(logits: Tensor, rows: Sequence[RequestSampler]) -> None:
    """Exclude what a row's grammar does not allow, and what ends the text too early unless nothing else is left."""
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


def _penalise(flat: Tensor, starts: Sequence[int], rows: Sequence[RequestSampler]) -> None:
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
    rows: Sequence[RequestSampler],
    part: Sequence[int],
    numbers: Sequence[float],
    tokens: Tensor,
    *,
    allow_sync: bool,
) -> None:
    """Write a token for each row of a part into `tokens`, where it has one: its cumulative mass is inverted, in the
    order of the vocabulary, at its number in [0, 1)."""
    places = slice(None) if len(part) == len(rows) else tensor_on(list(part), logits.device)
    scratch = logits[places].to(torch.float32, copy=isinstance(places, slice))
    if not allow_sync:
        finite = tokens[places] >= 0
        scratch.masked_fill_(~finite.unsqueeze(-1), 0)  # a NaN must not become an index
    mass = probability_mass(scratch, [rows[place].parameters for place in part], allow_sync=allow_sync)
    cumulative = mass.cumsum(dim=-1)
    total = cumulative[:, -1:]
    uniform = tensor_on(numbers, logits.device, torch.float64).unsqueeze(-1)
    target = (uniform * total).long().minimum(total - 1)  # the product may be rounded up to the total
    drawn = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    tokens[places] = drawn if allow_sync else torch.where(finite, drawn, -1)


def _tensor(like: Tensor, array: TokenIds | Values) -> Tensor:
    return sent(torch.from_numpy(array), like.device)
