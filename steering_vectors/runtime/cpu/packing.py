"""Packing and quantising a model's linear layers for a CPU.

Weights are packed once, and layers that read the same input are joined into one product. A plain bf16 matrix-vector
product reads memory at half the rate of a packed one, and one wide product costs less than several narrow ones. Which
layers share an input is found by a dry run, not by names.
"""

from __future__ import annotations

import ctypes
import logging
import sys
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from steering_vectors.errors import ModelError
from steering_vectors.models import gguf_codes
from steering_vectors.models.gguf_codes import CODE_TYPES, GROUP, Codes, load_codes
from steering_vectors.models.hooks import trace_calls
from steering_vectors.runtime.cpu.kernels import GroupedProduct, Kernels, Product, load
from steering_vectors.runtime.cpu.quantization import Kind, Quantized, dequantize, joined, quantize

logger = logging.getLogger(__name__)

Stored = Quantized | Codes | None  # a weight that is packed as such, or None for a plain one

DTYPES = (torch.bfloat16, torch.float32)
ROWS = 1  # the batch size oneDNN optimises its layout for; measured, it is no worse for sixteen
SMALL = 2**22  # float32 weights below are not packed: oneDNN took 1.0 to 1.5 times as long, and 0.5 to 1.1 above
# Relative error of logits that sums in another order make.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.03}
UNPACKED = "leave cpu_prepack out"
MIN_SHARE = 0.5  # of the weights besides embeddings and output layer that must be quantised


class OneDnnProduct:
    """x Wᵀ + b over a weight in oneDNN's layout."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._bias = bias
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS)

    def __call__(self, x: torch.Tensor, added: torch.Tensor | None = None) -> torch.Tensor:
        """x Wᵀ + b, rounded, and then + `added`; `[…, inputs]` to `[…, outputs]`."""
        found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")
        return found if added is None else found.add_(added)

    def weight(self) -> torch.Tensor:
        """The weight that was packed, `[outputs, inputs]`."""
        dense: torch.Tensor = self._packed.to_dense()
        return dense


class SideBySide:
    """Products of the same input, whose outputs are concatenated."""

    def __init__(self, products: Sequence[PackedProduct]) -> None:
        self._products = products

    def __call__(self, x: torch.Tensor, added: torch.Tensor | None = None) -> torch.Tensor:
        """x Wᵀ + b, rounded, and then + `added`; `[…, inputs]` to `[…, outputs]`."""
        found = torch.cat([product(x) for product in self._products], dim=-1)
        return found if added is None else found.add_(added)


class JoinedProduct:
    """x Wᵀ + b by torch's own product."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight, self._bias = weight, bias

    def __call__(self, x: torch.Tensor, added: torch.Tensor | None = None) -> torch.Tensor:
        """x Wᵀ + b, and then + `added`; `[…, inputs]` to `[…, outputs]`."""
        found = nn.functional.linear(x, self._weight, self._bias)
        return found if added is None else found.add_(added)

    def weight(self) -> torch.Tensor:
        """The weight `[outputs, inputs]`."""
        return self._weight


PackedProduct = Product | GroupedProduct | OneDnnProduct | JoinedProduct | SideBySide


def packed_product(layers: Sequence[nn.Linear], stored: Sequence[Stored]) -> PackedProduct:
    """The product with these layers' weights, which are copied: by this package's kernels if the processor has the
    instructions, else by oneDNN or, where that is no faster, by torch."""
    runs = [list(run) for _, run in groupby(zip(layers, stored, strict=True), key=lambda pair: _kind(pair[1]))]
    products = [_product_of([layer for layer, _ in run], [one for _, one in run]) for run in runs]
    return products[0] if len(products) == 1 else SideBySide(products)


def _kind(stored: Stored) -> str | None:
    return None if stored is None else stored.kind


def _product_of(layers: Sequence[nn.Linear], stored: Sequence[Stored]) -> PackedProduct:
    """One product of weights of the same kind."""
    kernels, bias = _kernels(), _joined_bias(layers)
    if quantized := [one for one in stored if isinstance(one, Quantized)]:
        assert kernels is not None, "checked before the layers were quantised"
        return kernels.quantized(joined(quantized), bias)
    if codes := [one for one in stored if isinstance(one, Codes)]:
        library = load()
        assert library is not None, "checked before the codes were loaded"
        return library.grouped(gguf_codes.joined(codes), bias)
    weight = torch.cat([layer.weight.detach() for layer in layers])
    if kernels is not None and weight.dtype == torch.bfloat16 and weight.shape[1] % 2 == 0:
        return kernels.packed(weight, bias)
    if (library := load()) is not None and _is_grouped(weight):
        return library.grouped(weight, bias)
    if weight.dtype == torch.float32 and weight.numel() < SMALL:
        return JoinedProduct(weight, bias)
    return OneDnnProduct(weight, bias)


def _kernels() -> Kernels | None:
    kernels = load()
    return kernels if kernels is not None and kernels.has_products else None


class _JointProduct:
    """x Wᵀ + b over a packed weight, for one layer or several with the same input.

    The first layer that is called computes for all, and each takes its part once.
    """

    def __init__(self, layers: Sequence[nn.Linear], stored: Sequence[Stored]) -> None:
        self._sizes = [layer.out_features for layer in layers]
        self.product = packed_product(layers, stored)
        self.embedding: nn.Embedding | None = None  # that reads its rows from the product
        self.is_quantized = any(one is not None for one in stored)
        self._input: torch.Tensor | None = None
        self._parts: list[torch.Tensor | None] = []

    def part(self, index: int, given: torch.Tensor) -> torch.Tensor:
        if len(self._sizes) == 1:
            return self.product(given)
        if self._input is not given or self._parts[index] is None:
            self._input, self._parts = given, list(torch.split(self.product(given), self._sizes, dim=-1))
        part = self._parts[index]
        assert part is not None
        self._parts[index] = None
        if not any(one is not None for one in self._parts):
            self._input = None
        return part

    def weights(self) -> list[torch.Tensor]:
        """The layers' weights, each in memory of its own."""
        assert not isinstance(self.product, SideBySide), "checked before"
        return [part.clone() for part in torch.split(self.product.weight(), self._sizes)]


def joint_product(layers: Sequence[PackedLinear]) -> PackedProduct:
    """The one product of these layers. Raises ModelError if they were not packed as one, in this order."""
    joint = {layer.joint for layer in layers}
    if len(joint) != 1 or [layer.index for layer in layers] != list(range(len(layers))):
        raise ModelError("these layers do not share one weight")
    return joint.pop().product


class PackedLinear(nn.Module):
    """Replaces an `nn.Linear` and computes the same up to the order of sums.

    `plain` is the layer, for `unpack`, in a tuple so that it is no child. It has no weight meanwhile, unless another
    module has the same and does not read it from the product.
    """

    def __init__(self, layer: nn.Linear, joint: _JointProduct, index: int) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.joint, self.index, self.plain = joint, index, (layer,)

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        return self.joint.part(self.index, given)


def pack(
    model: nn.Module, kind: Kind | Literal["gguf"] | None = None, *, dtype: torch.dtype | None = None
) -> list[int]:
    """Replace the linear layers that a pass over two tokens calls. Until `unpack`, the model is for inference on this
    CPU. Returns for each product of such a pass how many layers it joins.

    With a `kind`, their weights are quantised first; gguf takes the codes of the GGUF file that the model was converted
    from, and converts the rest of the model to `dtype`, if it is given. Raises ModelError if this CPU has no such
    products for the model, or if the model's code uses more of a linear layer than its product. The model is then as
    before, but if it was to be quantised it cannot be used.
    """
    remedy = UNPACKED if kind is None else "leave quantize out"
    if kind == "gguf":
        _check_codes(model, dtype or next(model.parameters()).dtype, remedy)
    elif kind is not None:
        _check_quantizes(model, kind, remedy)
    elif not packs(model):
        raise ModelError(f"oneDNN packs no weights of this kind here; {remedy}")
    codes = coded_layers(model) if kind == "gguf" else {}
    groups = _groups(model, codes, dtype)
    stored: dict[nn.Linear, Stored] = {}
    if kind == "gguf":
        stored.update(take_codes(model, groups, codes, remedy))
        del codes
        model.to(dtype=dtype)
    elif kind is not None:
        stored.update(quantize_layers(model, groups, kind, remedy))
    plain = _dry_run(model)
    sizes = [len(group) for group in groups]
    _swap(model, groups, stored)
    del stored
    _release_checkpoint(model)
    try:
        error = float((_dry_run(model) - plain).norm() / plain.norm())
    except Exception as failure:  # a model's code may do anything with a layer that is no nn.Linear
        _restore(model, kind)
        raise ModelError(f"this architecture's linear layers cannot be packed ({failure}); {remedy}") from failure
    if not error <= TOLERANCE[next(model.parameters()).dtype]:
        _restore(model, kind)
        raise ModelError(f"with packed weights the model's logits differ by {error:.2g}; {remedy}")
    return sizes


def unpack(model: nn.Module) -> None:
    """Put the layers that `pack` replaced back, with the same weights bit for bit. They are read from the products, one
    after the other, so that there are never two copies of all.

    Raises ModelError if the weights were quantised.
    """
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, PackedLinear)
    ]
    if any(packed.joint.is_quantized for _, _, packed in places):
        raise ModelError("quantised weights cannot be unpacked: load the model again")
    of_joint: dict[_JointProduct, list[nn.Linear]] = {}
    for parent, name, packed in sorted(places, key=lambda place: place[2].index):
        of_joint.setdefault(packed.joint, []).append(packed.plain[0])
        setattr(parent, name, packed.plain[0])
    del places
    while of_joint:
        joint, layers = of_joint.popitem()
        if joint.embedding is not None:
            vars(joint.embedding).pop("forward")
        for layer, weight in zip(layers, joint.weights(), strict=True):
            if not layer.weight.numel():
                layer.weight.data = weight
    _trim_heap()


def is_packed(model: nn.Module) -> bool:
    """Whether any layer of the model is packed."""
    return any(isinstance(module, PackedLinear) for module in model.modules())


def _restore(model: nn.Module, kind: str | None) -> None:
    if kind is None:
        unpack(model)


def _swap(model: nn.Module, groups: list[list[nn.Linear]], stored: dict[nn.Linear, Stored]) -> None:
    """Pack group after group and drop the plain weights of each, so that there are never two copies of all."""
    parents = {id(child): (parent, name) for parent in model.modules() for name, child in parent.named_children()}
    uses, embeddings = _uses(model), _embeddings(model)
    for group in groups:
        joint = _JointProduct(group, [stored.pop(layer, None) for layer in group])
        of_weight = embeddings.get(id(group[0].weight))
        if of_weight is not None and isinstance(joint.product, GroupedProduct):
            joint.embedding = of_weight
            of_weight.forward = joint.product.rows  # type: ignore[method-assign, assignment]
            uses[id(of_weight.weight)] -= 1
        for index, layer in enumerate(group):
            parent, name = parents[id(layer)]
            setattr(parent, name, PackedLinear(layer, joint, index))
            vars(layer).pop("forward", None)  # over codes, see `take_codes`
            if layer.weight is not None and uses[id(layer.weight)] == 1:
                layer.weight.data = layer.weight.data.new_empty(0)
            if layer.bias is not None:
                layer.bias.data = layer.bias.data.clone()


def _uses(model: nn.Module) -> Counter[int]:
    """By a parameter's id, how many modules have it."""
    return Counter(id(one) for module in model.modules() for one in module.parameters(recurse=False))


def _embeddings(model: nn.Module) -> dict[int, nn.Embedding]:
    """By a float32 weight's id, the embedding that shares it with one linear layer, if the weight can be a product of
    this package, which holds its numbers."""
    uses = _uses(model)
    return {
        id(module.weight): module
        for module in model.modules()
        if type(module) is nn.Embedding
        and module.max_norm is None
        and uses[id(module.weight)] == 2
        and _is_grouped(module.weight)
    }


def _is_grouped(weight: torch.Tensor) -> bool:
    return weight.dtype == torch.float32 and weight.shape[1] % GROUP == 0 and load() is not None


def _release_checkpoint(model: nn.Module) -> None:
    """Copy what was not packed: a view of the mapped checkpoint file would keep all of the file in memory."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    _trim_heap()


def _trim_heap() -> None:
    """Return the plain weights' memory to the system, which glibc would keep."""
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)


def packs(model: nn.Module) -> bool:
    """Whether oneDNN packs weights of the model's dtype on its device, which for bfloat16 needs AVX512 or better."""
    parameter = next(model.parameters())
    return parameter.device.type == "cpu" and _packs(parameter.dtype)


def _packs(dtype: torch.dtype) -> bool:
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not available or dtype not in DTYPES:
        return False
    return dtype != torch.bfloat16 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _groups(
    model: nn.Module, codes: Collection[nn.Linear] = (), dtype: torch.dtype | None = None
) -> list[list[nn.Linear]]:
    """The linear layers called in a dry run. Consecutive ones with the very same input tensor form a group.

    A layer in float32, or to be in this `dtype`, that shares its weight, as an output layer does with the embeddings,
    is packed if it has codes, or if embeddings can be read from the product. Elsewhere it stays plain: a copy would
    take more memory than the little time that it saves is worth.
    """
    uses, embeddings = _uses(model), _embeddings(model)
    layers = [
        module
        for module in model.modules()
        if type(module) is nn.Linear
        and module.weight.dtype in DTYPES
        and not (
            (dtype or module.weight.dtype) == torch.float32
            and uses[id(module.weight)] > 1
            and id(module.weight) not in embeddings
            and module not in codes
        )
    ]
    calls = trace_calls([(str(place), layer) for place, layer in enumerate(layers)], lambda: _dry_run(model))
    counts = Counter(call.name for call in calls)
    groups: list[list[nn.Linear]] = []
    last: torch.Tensor | None = None
    for call in calls:
        layer, given = layers[int(call.name)], call.given[0]
        if counts[call.name] > 1:
            last = None
        elif given is last and groups[-1][0].weight.dtype == layer.weight.dtype:
            groups[-1].append(layer)
        else:
            groups.append([layer])
            last = given
    return groups


@torch.inference_mode()
def _dry_run(model: nn.Module) -> torch.Tensor:
    ids = torch.arange(1, 3, device=next(model.parameters()).device).unsqueeze(0)
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits.float()
    return logits


def _joined_bias(layers: Sequence[nn.Linear]) -> torch.Tensor | None:
    if all(layer.bias is None for layer in layers):
        return None
    (dtype,) = {layer.bias.dtype for layer in layers if layer.bias is not None}
    return torch.cat(
        [
            torch.zeros(layer.out_features, dtype=dtype) if layer.bias is None else layer.bias.detach()
            for layer in layers
        ]
    )


def _check_quantizes(model: nn.Module, kind: Kind, remedy: str) -> None:
    """Raise ModelError, with the remedy, unless this machine has products of quantised weights for the model."""
    parameter = next(model.parameters())
    if parameter.device.type != "cpu":
        raise ModelError(f"quantize {kind} is for a CPU, not for {parameter.device}: use device cpu, or {remedy}")
    if _kernels() is None:
        raise ModelError(
            f"quantize {kind} needs a processor with AVX512-BF16 and AVX512-VBMI (from Zen 4 or Sapphire Rapids on) "
            f"and the kernels that are compiled at installation where there is a C++ compiler; {remedy}"
        )
    if parameter.dtype != torch.bfloat16:
        dtype = str(parameter.dtype).removeprefix("torch.")
        raise ModelError(f"quantize {kind} is for models in bfloat16, not {dtype}: use dtype bfloat16, or {remedy}")


def _check_codes(model: nn.Module, dtype: torch.dtype, remedy: str) -> None:
    """Raise ModelError, with the remedy, unless this machine has products of a GGUF file's codes for the model."""
    parameter = next(model.parameters())
    if parameter.device.type != "cpu":
        raise ModelError(f"quantize gguf is for a CPU, not for {parameter.device}: use device cpu, or {remedy}")
    if load() is None:
        raise ModelError(
            "quantize gguf needs a processor with AVX2 and the kernels that are compiled at installation where there "
            f"is a C++ compiler; {remedy}"
        )
    if not _packs(dtype):
        name = str(dtype).removeprefix("torch.")
        raise ModelError(f"quantize gguf computes in float32 here, not in {name}: use dtype float32, or {remedy}")


def coded_layers(model: nn.Module) -> dict[nn.Linear, Codes]:
    """The linear layers whose weights have a type of CODE_TYPES in the GGUF file that the model was converted from."""
    config = getattr(model, "config", None)
    source = str(getattr(config, "name_or_path", ""))
    known = load_codes(Path(source)) if source else {}
    names = {id(one): name for name, one in model.named_parameters(remove_duplicate=False) if name in known}
    layers = [module for module in model.modules() if type(module) is nn.Linear]
    return {layer: known[names[id(layer.weight)]] for layer in layers if id(layer.weight) in names}


def take_codes(
    model: nn.Module, groups: Sequence[Sequence[nn.Linear]], codes: Mapping[nn.Linear, Codes], remedy: str
) -> dict[nn.Linear, Codes]:
    """The codes of the layers in groups. Each of these layers gives up its plain weight, and makes the one that its
    codes stand for whenever it is called, so that the packed model is compared with the same numbers.

    Embeddings stay as they are, even if the output layer shares their weight. Raises ModelError if the model is not a
    GGUF file, or if these layers are not most of its weights.
    """
    types = ", ".join(CODE_TYPES)
    if not codes:
        raise ModelError(f"quantize gguf is for a GGUF file with weights of the types {types}, as it is; {remedy}")
    layers = [layer for group in groups for layer in group if layer in codes]
    share = _share_inside(model, layers)
    if share < MIN_SHARE:
        raise ModelError(
            f"quantize gguf would reach {share:.0%} of this model's weights, as the others are not those of linear "
            f"layers or not of the types {types}; {remedy}"
        )
    found = {}
    for layer in layers:
        found[layer] = codes[layer]
        layer.forward = partial(_dequantised_product, found[layer], layer.bias)  # type: ignore[method-assign]
        layer.weight = None  # type: ignore[assignment]
    message = "%d linear layers keep the file's codes, %.1f %% of the weights besides embeddings and the output layer"
    logger.info(message, len(layers), 100 * share)
    return found


def _dequantised_product(codes: Codes, bias: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    return nn.functional.linear(x, codes.dequantized(x.dtype), bias)


def quantize_layers(
    model: nn.Module, groups: Sequence[Sequence[nn.Linear]], kind: Kind, remedy: str
) -> dict[nn.Linear, Quantized]:
    """Quantise layers, those of a group to the same kind. Each then has the plain weight that its codes represent, so
    that the packed model is compared with the same numbers.

    The output layer has 8 bits even if the others have 4. Embeddings stay as they are, even if the output layer shares
    their weight. Raises ModelError if the layers are not most of the model's weights, or one has an odd number of
    inputs.
    """
    layers = [layer for group in groups for layer in group]
    if odd := next((layer.in_features for layer in layers if layer.in_features % 2), None):
        raise ModelError(f"a linear layer of {odd} inputs cannot be quantised, an odd number; {remedy}")
    output, share = _output_layer(model), _share_inside(model, layers)
    if share < MIN_SHARE:
        raise ModelError(
            f"quantize {kind} would reach {share:.0%} of this architecture's weights, as the others are not those of "
            f"linear layers; {remedy}"
        )
    quantized = {}
    for group in groups:
        of_group: Kind = "int8" if output in group else kind
        for layer in group:
            quantized[layer] = quantize(layer.weight, of_group)
            plain = dequantize(quantized[layer]).to(layer.weight.dtype)
            layer.weight = nn.Parameter(plain, requires_grad=False)  # a new one: embeddings may share the old one
    message = "%d linear layers are quantised to %s, %.1f %% of the weights besides embeddings and the output layer"
    logger.info(message, len(layers), kind, 100 * share)
    return quantized


def _output_layer(model: nn.Module) -> nn.Module | None:
    find = getattr(model, "get_output_embeddings", None)
    found: nn.Module | None = find() if callable(find) else None
    return found


def _share_inside(model: nn.Module, layers: Sequence[nn.Linear]) -> float:
    """The share of these layers in all matrices but embeddings and the output layer."""
    output = _output_layer(model)
    layers = [layer for layer in layers if layer is not output]
    others = [module for module in model.modules() if module is not output and not isinstance(module, nn.Embedding)]
    every = sum(one.numel() for module in others for one in module.parameters(recurse=False) if one.dim() >= 2)
    return sum(layer.weight.numel() for layer in layers) / every if every else 0.0
