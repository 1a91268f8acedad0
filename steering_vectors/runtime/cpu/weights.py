"""Packed weights of linear layers and their products: by this package's kernels in bfloat16 and 8 or 4 bits, if the
processor has the instructions, else by oneDNN."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from steering_vectors.errors import ModelError
from steering_vectors.runtime.cpu.kernels import Kernels, Product, load
from steering_vectors.runtime.cpu.quantization import Quantized

ROWS = 1  # the batch size oneDNN optimises its layout for; measured, it is no worse for sixteen


class PackedWeight(ABC):
    """A packed weight `[outputs, inputs]` with its bias. `kernel` is this package's product, if it is used."""

    kernel: Product | None = None

    @abstractmethod
    def product(self, x: torch.Tensor, added: torch.Tensor | None = None) -> torch.Tensor:
        """x Wᵀ + b, rounded, then + `added`, rounded; `[…, inputs]` to `[…, outputs]`."""


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
    """A weight packed for this processor; it is copied."""
    kernels = _products()
    if kernels is not None and weight.dtype == torch.bfloat16 and weight.shape[1] % 2 == 0:
        return _KernelWeight(kernels.packed(weight, bias))
    return _OneDnnWeight(weight, bias)


def pack_quantized(weight: Quantized, bias: torch.Tensor | None) -> PackedWeight:
    """A weight of 8 or 4 bits, packed; it is copied. Its bias and its inputs are bfloat16.

    Raises ModelError unless `has_quantized`, and for an odd number of inputs.
    """
    kernels = _products()
    if kernels is None or weight.codes.shape[1] % 2:
        raise ModelError(f"there is no {weight.kind} product of {weight.codes.shape[1]} inputs on this processor")
    return _KernelWeight(kernels.quantized(weight, bias))


def has_quantized() -> bool:
    """Whether this processor has products of quantised weights."""
    return _products() is not None


def _products() -> Kernels | None:
    kernels = load()
    return kernels if kernels is not None and kernels.has_products else None
