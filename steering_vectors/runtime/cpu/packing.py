"""Linear layers as a processor wants them: weights reordered once, layers that read the same input joined into one.

For a CPU. A plain bf16 matrix-vector product reads memory at half the rate of one over a reordered weight, and one wide
product costs less than several narrow ones. Owns the swap of modules, decided by a dry run, not by names. Knows nothing
of what a layer is for.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from steering_vectors.errors import ModelError
from steering_vectors.models.hooks import trace_inputs
from steering_vectors.runtime.cpu.quantization import Kind, Quantized, joined
from steering_vectors.runtime.cpu.quantized_layers import check_quantizes, quantize_layers
from steering_vectors.runtime.cpu.weights import PackedWeight, pack_quantized, pack_weight

DTYPES = (torch.bfloat16, torch.float32)
TOLERANCE = 0.03  # relative error of logits: sums in another order, in bfloat16


@dataclass(frozen=True, slots=True)
class Packed:
    """What `pack` did: layers that were swapped, and the products that they cost in one pass."""

    layers: int
    products: int


class _Product:
    """x Wᵀ + b over a reordered weight, for one layer or several that are given the same input.

    The first of the layers to be called computes for all; each takes its part once.
    """

    def __init__(self, layers: Sequence[nn.Linear], quantized: Sequence[Quantized]) -> None:
        self._sizes = [layer.out_features for layer in layers]
        if quantized:
            self.weight = pack_quantized(joined(quantized), _joined_bias(layers))
        else:
            self.weight = pack_weight(torch.cat([layer.weight.detach() for layer in layers]), _joined_bias(layers))
        self._input: torch.Tensor | None = None
        self._parts: list[torch.Tensor | None] = []

    def part(self, index: int, given: torch.Tensor) -> torch.Tensor:
        if len(self._sizes) == 1:
            return self.weight.product(given)
        if self._input is not given or self._parts[index] is None:
            self._input, self._parts = given, list(torch.split(self.weight.product(given), self._sizes, dim=-1))
        part = self._parts[index]
        assert part is not None
        self._parts[index] = None
        if not any(one is not None for one in self._parts):
            self._input = None
        return part


def joined_weight(layers: Sequence[PackedLinear]) -> PackedWeight:
    """The weight of these layers together. Raises ModelError if they were not packed as one, in this order."""
    products = {layer.product for layer in layers}
    if len(products) != 1 or [layer.index for layer in layers] != list(range(len(layers))):
        raise ModelError("these layers do not share one weight")
    return products.pop().weight


class PackedLinear(nn.Module):
    """Stands where an `nn.Linear` stood, and computes what it did up to the order of sums."""

    def __init__(self, layer: nn.Linear, product: _Product, index: int) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.product, self.index = product, index

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        return self.product.part(self.index, given)


def pack(model: nn.Module, kind: Kind | None = None) -> Packed:
    """Swap the linear layers that a pass over two tokens calls; the model is for inference on this CPU from then on.

    With a `kind`, their weights are quantised first, and the model is the quantised one. Raises ModelError if this CPU
    has no such products for the model, or the model's code wants more of a linear layer than its product; it is of no
    use then.
    """
    remedy = f"leave --{'cpu-prepack' if kind is None else 'quantize'} out"
    if kind is not None:
        check_quantizes(model, kind, remedy)
    elif not packs(model):
        raise ModelError(f"oneDNN packs no weights of this kind here; {remedy}")
    groups = _groups(model)
    quantized = {} if kind is None else quantize_layers(model, groups, kind, remedy)
    plain = _dry_run(model)
    packed = _swap(model, groups, quantized)
    del groups, quantized  # the plain weights
    _leave_file(model)
    _give_back()
    try:
        error = float((_dry_run(model) - plain).norm() / plain.norm())
    except Exception as failure:  # whatever a model's code does with a layer that is no nn.Linear
        raise ModelError(f"this architecture's linear layers cannot be packed ({failure}); {remedy}") from failure
    if not error <= TOLERANCE:
        raise ModelError(f"with packed weights the model's logits differ by {error:.2g}; {remedy}")
    return packed


def _swap(model: nn.Module, groups: Sequence[Sequence[nn.Linear]], quantized: Mapping[nn.Linear, Quantized]) -> Packed:
    parents = {id(child): (parent, name) for parent in model.modules() for name, child in parent.named_children()}
    for group in groups:
        product = _Product(group, [quantized[layer] for layer in group if layer in quantized])
        for index, layer in enumerate(group):
            parent, name = parents[id(layer)]
            setattr(parent, name, PackedLinear(layer, product, index))
    return Packed(sum(map(len, groups)), len(groups))


def _leave_file(model: nn.Module) -> None:
    """Copy the weights that were not packed: while one of them is a view of the mapped checkpoint, all of it stays
    resident."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def _give_back() -> None:
    """Let the system have what the plain weights took: glibc keeps it, as it lies between what is still in use."""
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)


def packs(model: nn.Module) -> bool:
    """Whether torch has such products for the model's device and number format on this processor."""
    parameter = next(model.parameters())
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not available or parameter.device.type != "cpu":
        return False
    if parameter.dtype == torch.bfloat16:  # for which oneDNN needs AVX-512 or AVX-NE-CONVERT
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return parameter.dtype in DTYPES


def _groups(model: nn.Module) -> list[list[nn.Linear]]:
    """Linear layers called in a dry run, those together that were given the very same tensor one after the other."""
    layers = [module for module in model.modules() if type(module) is nn.Linear and module.weight.dtype in DTYPES]
    calls = trace_inputs(layers, lambda: _dry_run(model))
    counts = {id(layer): sum(other is layer for other, _ in calls) for layer, _ in calls}
    groups: list[list[nn.Linear]] = []
    last: torch.Tensor | None = None
    for layer, given in calls:
        assert isinstance(layer, nn.Linear)
        if counts[id(layer)] > 1:
            last = None
        elif given is last and groups[-1][0].weight.dtype == layer.weight.dtype:
            groups[-1].append(layer)
        else:
            groups.append([layer])
            last = given
    return groups


@torch.inference_mode()
def _dry_run(model: nn.Module) -> torch.Tensor:
    """The logits of two tokens."""
    ids = torch.arange(1, 3, device=next(model.parameters()).device).unsqueeze(0)
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits.float()
    return logits


def _joined_bias(layers: Sequence[nn.Linear]) -> torch.Tensor | None:
    if all(layer.bias is None for layer in layers):
        return None
    return torch.cat(
        [torch.zeros_like(layer.weight[:, 0]) if layer.bias is None else layer.bias.detach() for layer in layers]
    )
