"""Quantisation of weights to 8 or 4 bits: integer codes and scales, w ≈ s · q.

Rounding is symmetric and to the nearest, with no calibration data. In 8 bits each output has one scale,
s = max|w| / 127 (as in LLM.int8(), arXiv:2208.07339). In 4 bits each output has one for every GROUP inputs,
s = f · m / −8, where m is the weight of largest magnitude with its sign, so that all sixteen codes are used (GGML's
Q4_0), and f is the one of FACTORS with the least squared error. Scales are bfloat16; those of 4 bits have so few digits
that s · q is exact in bfloat16 too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

Kind = Literal["int8", "int4"]
GROUP = 32  # inputs that share a scale in 4 bits
FACTORS = (1.0, 0.95, 0.9, 0.85, 0.8, -1.0, -0.95, -0.9, -0.85, -0.8)  # a smaller scale clips the largest weight
CHUNK = 2**18  # weights quantised at a time, so that they stay in the processor's cache


@dataclass(frozen=True, slots=True, eq=False)
class Quantized:
    """A quantised weight: `codes` int8 `[outputs, inputs]`, `scales` bfloat16 `[outputs, groups]`."""

    kind: Kind
    codes: torch.Tensor
    scales: torch.Tensor


def quantize(weight: torch.Tensor, kind: Kind) -> Quantized:
    """The codes and scales of a floating point weight `[outputs, inputs]`."""
    encode = _bytes if kind == "int8" else _nibbles
    parts = torch.split(weight.detach(), max(1, CHUNK // weight.shape[1]))
    found = [encode(_grouped(part.float(), kind)) for part in parts]
    codes = torch.cat([part.to(torch.int8).flatten(1)[:, : weight.shape[1]] for part, _ in found])
    return Quantized(kind, codes, torch.cat([scales for _, scales in found]))


def dequantize(quantized: Quantized) -> torch.Tensor:
    """The weight `[outputs, inputs]` that the codes represent, float32."""
    inputs = quantized.codes.shape[1]
    groups = _grouped(quantized.codes.float(), quantized.kind)
    return (groups * quantized.scales.float().unsqueeze(-1)).flatten(1)[:, :inputs]


def joined(parts: Sequence[Quantized]) -> Quantized:
    """Weights of the same inputs and kind, concatenated along their outputs."""
    kinds = {part.kind for part in parts}
    (kind,) = kinds
    return Quantized(kind, torch.cat([part.codes for part in parts]), torch.cat([part.scales for part in parts]))


def _bytes(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """8-bit codes `[outputs, groups, inputs]` and scales `[outputs, groups]`."""
    scales = (groups.abs().amax(dim=-1) / 127).bfloat16()
    return _rounded(groups, scales, -127, 127), scales


def _nibbles(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """4-bit codes and scales of the same shapes."""
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
    """bfloat16 numbers of five binary digits: a product with a code of three has eight, as many as bfloat16."""
    bits = numbers.bfloat16().view(torch.int16)
    return ((bits + 4) & ~7).view(torch.bfloat16)


def _rounded(groups: torch.Tensor, scales: torch.Tensor, lowest: int, highest: int) -> torch.Tensor:
    divisors = scales.float().masked_fill(scales == 0, 1.0).unsqueeze(-1)
    return (groups / divisors).round_().clamp_(lowest, highest)


def _grouped(weight: torch.Tensor, kind: Kind) -> torch.Tensor:
    """`[outputs, groups, inputs of a group]`; the last group is padded with zeros."""
    outputs, inputs = weight.shape
    size = inputs if kind == "int8" else GROUP
    padded = torch.nn.functional.pad(weight, (0, -inputs % size))
    return padded.view(outputs, -1, size)
