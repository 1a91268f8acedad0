"""The memory layouts in which the kernels read weights, as defined in `tiles.hpp` and `quantized.hpp`.

Sixteen outputs form a block; the last block is padded with zeros.
"""

from __future__ import annotations

import torch

from steering_vectors.runtime.cpu.quantization import Quantized

LANES = 16  # outputs in a block


def packed_weight(weight: torch.Tensor) -> torch.Tensor:
    """A bfloat16 weight `[outputs, inputs]` as `[blocks, inputs / 2, 16, 2]`."""
    whole = _whole(weight)
    return whole.view(-1, LANES, weight.shape[1] // 2, 2).transpose(1, 2).contiguous()


def packed_codes(weight: Quantized) -> torch.Tensor:
    """8-bit codes as bytes `[blocks, vectors, 64]`, or 4-bit codes as 16-bit words `[blocks, vectors, 32]`.

    A vector holds two pairs of inputs in 8 bits, four in 4 bits.
    """
    if weight.kind == "int8":
        return _bytes(_pairs(weight.codes, 2))
    return _words(_pairs(weight.codes, 4))


def packed_scales(weight: Quantized) -> torch.Tensor:
    """The scales of a quantised weight as `[blocks, groups, 16]`."""
    return _whole(weight.scales).view(-1, LANES, weight.scales.shape[1]).transpose(1, 2).contiguous()


def _whole(rows: torch.Tensor) -> torch.Tensor:
    """The rows in bfloat16, with zeros appended to fill the last block."""
    count = -(-len(rows) // LANES) * LANES
    whole = torch.zeros(count, rows.shape[1], dtype=torch.bfloat16)
    whole[: len(rows)] = rows
    return whole


def _pairs(codes: torch.Tensor, steps: int) -> torch.Tensor:
    """Codes as `[blocks, vectors, steps, 32]`: a step is one pair of inputs of sixteen outputs."""
    outputs, inputs = codes.shape
    blocks, vectors = -(-outputs // LANES), -(-inputs // (2 * steps))
    whole = torch.zeros(blocks * LANES, vectors * 2 * steps, dtype=torch.int8)
    whole[:outputs, :inputs] = codes
    return whole.view(blocks, LANES, vectors, steps, 2).permute(0, 2, 3, 1, 4).reshape(blocks, vectors, steps, 32)


def _bytes(codes: torch.Tensor) -> torch.Tensor:
    """Sign and magnitude, eight codes of one pair beside eight of the other."""
    signed = codes.abs() | (codes < 0).to(torch.int8) * -128
    return signed.view(*codes.shape[:3], 4, 8).transpose(2, 3).contiguous()


def _words(codes: torch.Tensor) -> torch.Tensor:
    """Words of four nibbles, one of each pair."""
    nibbles = (codes & 15).to(torch.int32)
    words = sum(nibbles[:, :, pair] << 4 * pair for pair in range(4))
    assert isinstance(words, torch.Tensor)
    return words.to(torch.uint16).contiguous()
