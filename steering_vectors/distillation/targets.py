"""Targets of a LoRA: a constant shift of block outputs, or a difference per token from a tuned model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from steering_vectors.methods.rahf import FirstStep
from steering_vectors.models.loading import LanguageModel
from steering_vectors.tuning.paired_reading import Twin, differences


class Target(Protocol):
    """The change of block outputs that a LoRA learns."""

    @property
    def layers(self) -> Sequence[int]: ...

    def shift(self, twins: Sequence[Twin]) -> torch.Tensor:
        """Float32 `[layers, rows, response, hidden]`, or a shape that broadcasts to it; no gradients."""


class ConstantShift:
    """The constant shift that a profile adds at every token."""

    def __init__(self, shifts: Mapping[int, torch.Tensor], device: torch.device | str) -> None:
        self.layers: Sequence[int] = sorted(shifts)
        self._shift = torch.stack([shifts[layer] for layer in self.layers]).to(device)

    def shift(self, twins: Sequence[Twin]) -> torch.Tensor:
        return self._shift[:, None, None]


@dataclass(frozen=True, slots=True)
class TokenDifferences:
    """α·(h_t(p⁺, q, r) − h_t(p⁻, q, r)) at each response token t, read with the weights of RAHF's first step.

    Paper: RAHF (arXiv:2312.15997, §3.3), with α = 5 there.
    """

    lm: LanguageModel
    first: FirstStep
    layers: Sequence[int]
    strength: float

    def shift(self, twins: Sequence[Twin]) -> torch.Tensor:
        return self.strength * differences(self.lm, twins, self.layers, self.first.side)[0]
