"""Weights of linear layers in the order in which a processor reads them: by our own kernel for bfloat16 where the
processor has its instructions, else by oneDNN."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from server.engine.cpu.library import Kernels, Product, load

ROWS = 1  # that oneDNN's order is chosen for; it is no worse for sixteen, measured


class PackedWeight(ABC):
    """A weight `[outputs, inputs]` with its bias; `kernel`: the product of our own, where it is that."""

    kernel: Product | None = None

    @abstractmethod
    def product(self, x: torch.Tensor, added: torch.Tensor | None = None) -> torch.Tensor:
        """x Wᵀ + b, and then + `added`, each rounded; `[…, inputs]` to `[…, outputs]`."""


class _KernelWeight(PackedWeight):
    def __init__(self, kernels: Kernels, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.kernel = self._product = kernels.packed(weight, bias)

    def product(self, x: torch.Tensor, added: torch.Tensor | None = None) -> torch.Tensor:
        return self._product(x.contiguous(), added)


class _OneDnnWeight(PackedWeight):
    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._bias = bias
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS)

    def product(self, x: torch.Tensor, added: torch.Tensor | None = None) -> torch.Tensor:
        found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")
        return found if added is None else found.add_(added)


def pack_weight(weight: torch.Tensor, bias: torch.Tensor | None) -> PackedWeight:
    """The weight for this processor; it is copied."""
    kernels = load()
    suits = weight.dtype == torch.bfloat16 and weight.shape[1] % 2 == 0
    if kernels is not None and kernels.has_products and suits:
        return _KernelWeight(kernels, weight, bias)
    return _OneDnnWeight(weight, bias)
