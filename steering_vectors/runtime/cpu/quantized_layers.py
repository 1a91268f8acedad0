"""Which linear layers of a model are quantised, and to what; models for which that says little are refused.

Owns the change from a model to the quantised model, before anything is packed: its layers then hold what their codes
stand for, so that whatever is compared with it is compared with the same numbers. The output layer has 8 bits also
where the others have 4, as is usual. An embedding stays as it is, also where the output layer had the same weight:
looking a row up reads little. Knows nothing of products.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import nn

from steering_vectors.errors import ModelError
from steering_vectors.runtime.cpu.quantization import Kind, Quantized, dequantize, quantize
from steering_vectors.runtime.cpu.weights import has_quantized

logger = logging.getLogger(__name__)

LEAST = 0.5  # of the weights besides embeddings and output layer


def check_quantizes(model: nn.Module, kind: Kind, remedy: str) -> None:
    """Raise ModelError, with what to do, unless there are products over quantised weights here."""
    parameter = next(model.parameters())
    if parameter.device.type != "cpu":
        raise ModelError(f"--quantize {kind} is for a CPU, not for {parameter.device}: use --device cpu, or {remedy}")
    if not has_quantized():
        raise ModelError(
            f"--quantize {kind} needs a processor with AVX512-BF16 and AVX512-VBMI (from Zen 4 or Sapphire Rapids on) "
            f"and the kernels that are compiled at installation where there is a C++ compiler; {remedy}"
        )
    if parameter.dtype != torch.bfloat16:
        dtype = str(parameter.dtype).removeprefix("torch.")
        raise ModelError(f"--quantize {kind} is for models in bfloat16, not {dtype}: use --dtype bfloat16, or {remedy}")


def quantize_layers(
    model: nn.Module, groups: Sequence[Sequence[nn.Linear]], kind: Kind, remedy: str
) -> dict[nn.Linear, Quantized]:
    """Quantise layers, those of a group alike; each then has the weight that its codes stand for.

    Raises ModelError if these are not most of the model's weights, or a layer has an odd number of inputs.
    """
    layers = [layer for group in groups for layer in group]
    if odd := next((layer.in_features for layer in layers if layer.in_features % 2), None):
        raise ModelError(f"a linear layer of {odd} inputs cannot be quantised, an odd number; {remedy}")
    output = _output_layer(model)
    share = _share(model, [layer for layer in layers if layer is not output], output)
    if share < LEAST:
        raise ModelError(
            f"--quantize {kind} would reach {share:.0%} of this architecture's weights, as the others are not those of "
            f"linear layers; {remedy}"
        )
    quantized = {}
    for group in groups:
        of_group: Kind = "int8" if output in group else kind
        for layer in group:
            quantized[layer] = quantize(layer.weight, of_group)
            plain = dequantize(quantized[layer]).to(layer.weight.dtype)
            layer.weight = nn.Parameter(plain, requires_grad=False)  # a new one: embeddings may share the old one
    told = "%d linear layers are quantised to %s, %.1f %% of the weights besides embeddings and the output layer"
    logger.info(told, len(layers), kind, 100 * share)
    return quantized


def _output_layer(model: nn.Module) -> nn.Module | None:
    find = getattr(model, "get_output_embeddings", None)
    return find() if callable(find) else None


def _share(model: nn.Module, layers: Sequence[nn.Linear], output: nn.Module | None) -> float:
    """How much of all matrices these layers have, apart from embeddings and the output layer."""
    others = [module for module in model.modules() if module is not output and not isinstance(module, nn.Embedding)]
    every = sum(one.numel() for module in others for one in module.parameters(recurse=False) if one.dim() >= 2)
    return sum(layer.weight.numel() for layer in layers) / every if every else 0.0
