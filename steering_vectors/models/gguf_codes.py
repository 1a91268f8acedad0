"""Weights in the codes of a GGUF file: in each output, 32 inputs share a scale d and perhaps a least value m.

A weight is w = d · q + m of an unsigned code q. Without a least value the code in the middle stands for zero. Codes are
kept as the file has them, and in float32 w is the very number that the gguf library computes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

FILE = "codes.safetensors"  # in a converted checkpoint
GROUP = 32  # inputs
OUTPUTS = 2048  # converted at a time, a multiple of every block of outputs in a kernel's layout


@dataclass(frozen=True, slots=True)
class CodeType:
    """How GGUF stores a group: scale and least value in half precision, then the codes."""

    bits: int
    has_least: bool

    @property
    def size(self) -> int:
        """The bytes of a group."""
        return self.header + GROUP * self.bits // 8

    @property
    def header(self) -> int:
        return 4 if self.has_least else 2

    @property
    def middle(self) -> int:
        """The code of zero if there is no least value."""
        return 1 << (self.bits - 1)


CODE_TYPES = {"Q8_0": CodeType(8, False), "Q4_0": CodeType(4, False), "Q4_1": CodeType(4, True)}


@dataclass(frozen=True, slots=True, eq=False)
class Codes:
    """A weight: `groups` uint8 `[outputs, bytes]`, as in the file, of the GGUF type `kind`."""

    kind: str
    groups: torch.Tensor

    @property
    def type(self) -> CodeType:
        return CODE_TYPES[self.kind]

    @property
    def outputs(self) -> int:
        return len(self.groups)

    @property
    def inputs(self) -> int:
        return self.groups.shape[1] // self.type.size * GROUP

    def parts(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Scales and least values, float16 `[outputs, groups]`, and unsigned codes, uint8 `[outputs, groups, 32]`."""
        kind = self.type
        groups = self.groups.view(self.outputs, -1, kind.size)
        scales = groups[..., :2].contiguous().view(torch.float16).squeeze(-1)
        least = groups[..., 2:4].contiguous().view(torch.float16).squeeze(-1) if kind.has_least else None
        stored = groups[..., kind.header :]
        if kind.bits == 4:
            return scales, least, torch.cat([stored & 15, stored >> 4], dim=-1)  # neighbours are sixteen apart
        return scales, least, stored ^ 128  # signed bytes

    def split(self) -> list[Codes]:
        """The weight in parts of OUTPUTS outputs."""
        return [Codes(self.kind, groups) for groups in torch.split(self.groups, OUTPUTS)]

    def dequantized(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight `[outputs, inputs]`, as float32 or rounded from there."""
        whole = torch.empty(self.outputs, self.inputs, dtype=dtype)
        for part, to in zip(self.split(), torch.split(whole, OUTPUTS), strict=True):
            scales, least, codes = part.parts()
            scales = scales.float().unsqueeze(-1)
            lowest = scales * -self.type.middle if least is None else least.float().unsqueeze(-1)
            # rounded once: a product has nineteen binary digits at most
            to.copy_(torch.addcmul(lowest, scales, codes.float()).flatten(1))
        return whole


def joined(parts: Sequence[Codes]) -> Codes:
    """Weights of the same type and inputs, concatenated along their outputs."""
    kinds = {part.kind for part in parts}
    (kind,) = kinds
    return Codes(kind, torch.cat([part.groups for part in parts]))


def save_codes(codes: Mapping[str, Codes], folder: Path) -> None:
    """Write weights, by the names of a checkpoint's parameters, into its folder; no file if there are none."""
    if not codes:
        return
    kinds = {name: one.kind for name, one in codes.items()}
    save_file({name: one.groups for name, one in codes.items()}, folder / FILE, metadata=kinds)


def load_codes(folder: Path) -> dict[str, Codes]:
    """What `save_codes` wrote there; nothing if there is no such file."""
    if not (folder / FILE).is_file():
        return {}
    with safe_open(folder / FILE, framework="pt") as stored:
        kinds = stored.metadata() or {}
        return {name: Codes(kinds[name], stored.get_tensor(name)) for name in stored.keys()}  # noqa: SIM118
