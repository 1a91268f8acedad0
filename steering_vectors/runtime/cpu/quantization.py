"""Weights of linear layers in 8 or 4 bits: whole numbers, and scales by which they are multiplied.

Owns the arithmetic: from numbers to codes and back. Symmetric rounding to the nearest, with nothing fitted to data:
w ≈ s · q. In 8 bits one scale for each output, s = max|w| / 127 (as LLM.int8() has it, arXiv:2208.07339). In 4 bits one
for each output and GROUP neighbouring inputs: s = f · m / −8, where m is the number of largest magnitude with its sign,
so that all sixteen codes are of use (GGML's Q4_0), and f among FACTORS is the one of least squared error. Scales are
bfloat16, those of 4 bits of so few digits that s · q is one too; codes are found with them as they are stored. Knows
nothing of kernels or models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

Kind = Literal["int8", "int4"]
GROUP = 32  # inputs that share a scale in 4 bits
FACTORS = (1.0, 0.95, 0.9, 0.85, 0.8, -1.0, -0.95, -0.9, -0.85, -0.8)  # a smaller scale cuts the largest number off
CHUNK = 2**18  # numbers that are quantised at a time, so that they stay in the cache


@dataclass(frozen=True, slots=True, eq=False)
class Quantized:
    """A weight: `codes` int8 `[outputs, inputs]`, `scales` bfloat16 `[outputs, groups]`."""

    kind: Kind
    codes: torch.Tensor
    scales: torch.Tensor


def quantize(weight: torch.Tensor, kind: Kind) -> Quantized:
    """The codes and scales for a weight `[outputs, inputs]` of floating point numbers."""
    encode = _bytes if kind == "int8" else _nibbles
    parts = torch.split(weight.detach(), max(1, CHUNK // weight.shape[1]))
    found = [encode(_grouped(part.float(), kind)) for part in parts]
    codes = torch.cat([part.to(torch.int8).flatten(1)[:, : weight.shape[1]] for part, _ in found])
    return Quantized(kind, codes, torch.cat([scales for _, scales in found]))


def dequantize(quantized: Quantized) -> torch.Tensor:
    """The weight `[outputs, inputs]` that the codes stand for, float32."""
    inputs = quantized.codes.shape[1]
    groups = _grouped(quantized.codes.float(), quantized.kind)
    return (groups * quantized.scales.float().unsqueeze(-1)).flatten(1)[:, :inputs]


def joined(parts: Sequence[Quantized]) -> Quantized:
    """Weights of the same inputs and kind as one, their outputs one after the other."""
    kinds = {part.kind for part in parts}
    (kind,) = kinds
    return Quantized(kind, torch.cat([part.codes for part in parts]), torch.cat([part.scales for part in parts]))


def _bytes(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes `[outputs, groups, inputs]` of 8 bits, and scales `[outputs, groups]`."""
    scales = (groups.abs().amax(dim=-1) / 127).bfloat16()
    return _rounded(groups, scales, -127, 127), scales


def _nibbles(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of 4 bits."""
    largest = groups.gather(-1, groups.abs().argmax(dim=-1, keepdim=True)).squeeze(-1)
    scales = _short(largest / -8)
    least = torch.full_like(largest, torch.inf)
    for factor in FACTORS:
        tried = _short(largest * (factor / -8))
        error = (_rounded(groups, tried, -8, 7) * tried.float().unsqueeze(-1)).sub_(groups).square_().sum(dim=-1)
        scales = torch.where(error < least, tried, scales)
        least = torch.minimum(error, least)
    return _rounded(groups, scales, -8, 7), scales


def _short(numbers: torch.Tensor) -> torch.Tensor:
    """bfloat16 numbers of five binary digits: times codes of three they have eight, which are as many as there are."""
    bits = numbers.bfloat16().view(torch.int16)
    return ((bits + 4) & ~7).view(torch.bfloat16)


def _rounded(groups: torch.Tensor, scales: torch.Tensor, lowest: int, highest: int) -> torch.Tensor:
    divisors = scales.float().masked_fill(scales == 0, 1.0).unsqueeze(-1)
    return (groups / divisors).round_().clamp_(lowest, highest)


def _grouped(weight: torch.Tensor, kind: Kind) -> torch.Tensor:
    """`[outputs, groups, inputs of a group]`; the last group is filled up with zeros."""
    outputs, inputs = weight.shape
    size = inputs if kind == "int8" else GROUP
    padded = torch.nn.functional.pad(weight, (0, -inputs % size))
    return padded.view(outputs, -1, size)
