"""The orders in which the kernels read weights: sixteen outputs are a block, the last one filled up with zeros.

As `tiles.hpp` and `quantized.hpp` have them.
"""

from __future__ import annotations

import torch

from steering_vectors.runtime.cpu.quantization import Quantized

LANES = 16  # outputs in a block


def ordered(weight: torch.Tensor) -> torch.Tensor:
    """A bfloat16 weight `[outputs, inputs]` as `[blocks, inputs / 2, 16, 2]`."""
    whole = _whole(weight)
    return whole.view(-1, LANES, weight.shape[1] // 2, 2).transpose(1, 2).contiguous()


def ordered_codes(weight: Quantized) -> torch.Tensor:
    """Codes of 8 bits as bytes, `[blocks, vectors, 64]` of two pairs of inputs each, or of 4 bits as words,
    `[blocks, vectors, 32]` of four."""
    if weight.kind == "int8":
        return _bytes(_pairs(weight.codes, 2))
    return _words(_pairs(weight.codes, 4))


def ordered_scales(weight: Quantized) -> torch.Tensor:
    """`[blocks, groups, 16]`."""
    return _whole(weight.scales).view(-1, LANES, weight.scales.shape[1]).transpose(1, 2).contiguous()


def _whole(rows: torch.Tensor) -> torch.Tensor:
    """In bfloat16, with zeros for what is missing of the last block."""
    count = -(-len(rows) // LANES) * LANES
    whole = torch.zeros(count, rows.shape[1], dtype=torch.bfloat16)
    whole[: len(rows)] = rows
    return whole


def _pairs(codes: torch.Tensor, steps: int) -> torch.Tensor:
    """`[blocks, vectors, steps, 32]`: the codes of a vector's pairs of inputs, of sixteen outputs two each."""
    outputs, inputs = codes.shape
    blocks, vectors = -(-outputs // LANES), -(-inputs // (2 * steps))
    whole = torch.zeros(blocks * LANES, vectors * 2 * steps, dtype=torch.int8)
    whole[:outputs, :inputs] = codes
    return whole.view(blocks, LANES, vectors, steps, 2).permute(0, 2, 3, 1, 4).reshape(blocks, vectors, steps, 32)


def _bytes(codes: torch.Tensor) -> torch.Tensor:
    """Sign and magnitude, every eight codes of the one pair beside eight of the other."""
    signed = codes.abs() | (codes < 0).to(torch.int8) * -128
    return signed.view(*codes.shape[:3], 4, 8).transpose(2, 3).contiguous()


def _words(codes: torch.Tensor) -> torch.Tensor:
    """Four nibbles, one of each pair."""
    nibbles = (codes & 15).to(torch.int32)
    words = sum(nibbles[:, :, pair] << 4 * pair for pair in range(4))
    assert isinstance(words, torch.Tensor)
    return words.to(torch.uint16).contiguous()
