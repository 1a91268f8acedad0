"""How likely each token is to be drawn, in whole numbers: temperature, top-k, top-p and min-p.

Only integers are summed, so that the order of summation cannot show in a row's result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from server.engines.protocol import SamplingParameters
from steering_vectors.models.transfers import picked, tensor_on

_UNIT = 2**40  # mass of a row's likeliest token; 2^22 such tokens still sum within an int64
_BUCKETS, _PER_NAT = 4096, 128.0  # 32 nats below the maximum: what lies lower has no mass
_MIN_TEMPERATURE = 1e-30  # a smaller one would vanish in float32, and 0 / 0 is not a number


def probability_mass(logits: Tensor, parameters: Sequence[SamplingParameters], *, allow_sync: bool = True) -> Tensor:
    """Integer weights `[rows, vocabulary]` in proportion to each row's probabilities; 0 for what cannot be drawn.

    Float32 `logits` are used up as working space. The likeliest token has 2^40; what is less likely than 2^-40 of it
    has 0. Temperature, top_k, top_p (of the mass that top_k left) and min_p are applied, penalties are not.
    `allow_sync`: values may be copied to the host early (CPU).
    """
    scaled = logits.sub_(logits.amax(dim=-1, keepdim=True))
    if any(wish.temperature != 1 for wish in parameters):
        temperatures = [[max(wish.temperature, _MIN_TEMPERATURE)] for wish in parameters]
        scaled.div_(tensor_on(temperatures, scaled.device, scaled.dtype))
    mass = scaled.exp().mul_(_UNIT).long()
    if index := [place for place, wish in enumerate(parameters) if 0 < wish.top_k < mass.shape[1]]:
        present = (rows_of(mass, index) > 0).long()
        need = tensor_on([[parameters[place].top_k] for place in index], mass.device)
        _zero_below(scaled, mass, index, present, need.minimum(present.sum(dim=-1, keepdim=True)), allow_sync)
    if index := [place for place, wish in enumerate(parameters) if wish.top_p < 1]:
        part = rows_of(mass, index)
        total = part.sum(dim=-1, keepdim=True)
        share = tensor_on([[parameters[place].top_p] for place in index], mass.device, torch.float64)
        _zero_below(scaled, mass, index, part, (share * total).ceil().long().clamp(min=1).minimum(total), allow_sync)
    if any(wish.min_p for wish in parameters):
        floor = [[math.ceil(wish.min_p * _UNIT)] for wish in parameters]
        mass.masked_fill_(mass < tensor_on(floor, mass.device), 0)
    return mass


def _zero_below(
    scaled: Tensor, mass: Tensor, index: Sequence[int], weight: Tensor, need: Tensor, allow_sync: bool
) -> None:
    """Zero the mass of all but the fewest likeliest tokens whose weights sum to `need` `[rows, 1]` or more.

    Equal values are kept from the lowest id on. Needs 0 < need ≤ sum. With `allow_sync` a histogram and a sort of one
    bucket, which is fastest on a CPU; else a radix select, which copies nothing to the host.
    """
    likeliest_mask = _by_histogram if allow_sync else _by_radix_select  # [rows, vocabulary]
    part = rows_of(mass, index).mul_(likeliest_mask(rows_of(scaled, index), weight, need))
    if part is not mass:
        mass[tensor_on(list(index), mass.device)] = part


def _by_histogram(scaled: Tensor, weight: Tensor, need: Tensor) -> Tensor:
    """A histogram finds the bucket in which the sum is reached, and only that bucket's tokens are sorted: sorting a
    vocabulary costs twenty times as much."""
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


def _by_radix_select(scaled: Tensor, weight: Tensor, need: Tensor) -> Tensor:
    """Sync-free variant for CUDA: radix select of the threshold (11+10+10 bits).

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
        found = torch.searchsorted(reached, need - before)  # [rows, 1]
        before += (reached - weights).gather(-1, found)
        inside = inside * (digit == found)
        border = border << bits | found
    last = inside.cumsum(dim=-1) - inside < need - before  # among equals the lowest ids
    return (distance < border) | ((distance == border) & last)


def rows_of(whole: Tensor, index: Sequence[int]) -> Tensor:
    """These rows, ascending; not a copy where they are all."""
    return whole if len(index) == len(whole) else picked(whole, index)
