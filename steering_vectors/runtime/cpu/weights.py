"""Weights of linear layers in the order in which a processor reads them: by our own kernel for bfloat16 where the
processor has its instructions, else by oneDNN. Weights of 8 and 4 bits by our own kernel alone."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from steering_vectors.errors import ModelError
from steering_vectors.runtime.cpu.kernels import Kernels, Product, load
from steering_vectors.runtime.cpu.quantization import Quantized

ROWS = 1  # that oneDNN's order is chosen for; it is no worse for sixteen, measured


class PackedWeight(ABC):
    """A weight `[outputs, inputs]` with its bias; `kernel`: the product of our own, where it is that."""

    kernel: Product | None = None

    @abstractmethod
    def product(self, x: torch.Tensor, added: torch.Tensor | None = None) -> torch.Tensor:
        """x Wᵀ + b, and then + `added`, each rounded; `[…, inputs]` to `[…, outputs]`."""


class _KernelWeight(PackedWeight):
    def __init__(self, product: Product) -> None:
        self.kernel = self._product = product

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
    kernels = _products()
    if kernels is not None and weight.dtype == torch.bfloat16 and weight.shape[1] % 2 == 0:
        return _KernelWeight(kernels.packed(weight, bias))
    return _OneDnnWeight(weight, bias)


def pack_quantized(weight: Quantized, bias: torch.Tensor | None) -> PackedWeight:
    """A weight of 8 or 4 bits; it is copied. Its bias and what it is multiplied by are bfloat16.

    Raises ModelError unless `has_quantized` and its inputs are even in number.
    """
    kernels = _products()
    if kernels is None or weight.codes.shape[1] % 2:
        raise ModelError(f"there is no {weight.kind} product of {weight.codes.shape[1]} inputs on this processor")
    return _KernelWeight(kernels.quantized(weight, bias))


def has_quantized() -> bool:
    """Whether there are products over quantised weights for this processor."""
    return _products() is not None


def _products() -> Kernels | None:
    kernels = load()
    return kernels if kernels is not None and kernels.has_products else None
