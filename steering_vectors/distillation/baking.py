"""Baking: a profile's shift folded into a model's weights, as biases of layers that write to the residual stream."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from steering_vectors.errors import FitError
from steering_vectors.models.blocks import find_blocks
from steering_vectors.models.hooks import record
from steering_vectors.models.loading import LanguageModel
from steering_vectors.profiles.mixture import Mixture, Term
from steering_vectors.profiles.profile import Profile

PROBE_TOKENS = 5
FLAG = "mlp_bias"  # the configuration's switch for biases


@torch.no_grad()
def bake(lm: LanguageModel, profile: Profile, strength: float = 1.0) -> PreTrainedModel:
    """Return a copy of the model that computes what steering with `apply_to="all"` at `strength` computes.

    The shift of block l is added to the last bias in that block whose change moves the block's output by the same
    vector. Biases are tried in turn, so this works for any architecture with such a bias. Models of the Llama family
    get zero biases first. The copy is in memory; save it with `save_pretrained`.

    Raises FitError for operator "ablate" and for an architecture without such a bias, ProfileMismatch for a profile of
    another model, SteeringError for a strength beyond the safe range.
    """
    profile.check_model(lm.identity, allow_mismatch=False)
    if profile.operator != "add":
        raise FitError(f"profile {profile.name!r} ablates, which a bias cannot do: steer with requests instead")
    shifts = Mixture((Term(profile, strength),)).shifts().by_layer()
    model = _with_biases(lm.model)
    blocks = find_blocks(model)
    for layer, shift in shifts.items():
        bias = _writer(model, blocks, layer, shift.to(lm.model.device))
        bias.add_(shift.to(bias))
    return model


def _with_biases(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the model, with zero biases if its configuration allows biases and has none."""
    if getattr(model.config, FLAG, None) is not False:
        return copy.deepcopy(model)
    config = copy.deepcopy(model.config)
    setattr(config, FLAG, True)
    biased = type(model)(config).to(model.device, model.dtype)
    missing, unexpected = biased.load_state_dict(model.state_dict(), strict=False)
    if unexpected or not all(name.endswith(".bias") for name in missing):
        raise FitError(f"{type(model).__name__} cannot get biases: its weights do not fit {FLAG}=true; distil instead")
    parameters = dict(biased.named_parameters())
    for name in missing:
        parameters[name].zero_()
    biased.generation_config = model.generation_config
    return biased.eval().requires_grad_(False)


def _writer(model: PreTrainedModel, blocks: tuple[nn.Module, ...], layer: int, shift: torch.Tensor) -> nn.Parameter:
    """The bias in a block whose change moves the block's output by the same vector at every position."""
    before = _output(model, blocks, layer)
    largest = float(before.abs().max()) + float(shift.abs().max())
    tolerance = 8 * torch.finfo(model.dtype).eps * largest  # a few rounding errors
    linear = [module for module in blocks[layer].modules() if isinstance(module, nn.Linear | Conv1D)]
    for bias in (module.bias for module in reversed(linear)):
        if not isinstance(bias, nn.Parameter) or bias.shape != shift.shape:
            continue
        kept = bias.clone()
        bias.add_(shift.to(bias))
        moved = _output(model, blocks, layer) - before
        bias.copy_(kept)
        if torch.allclose(moved, shift.float().expand_as(moved), atol=tolerance, rtol=0):
            return bias
    raise FitError(
        f"{type(model).__name__} has no bias that is added to the residual stream in block {layer}, so the profile "
        "cannot be baked: steer with requests, or distil it into a LoRA"
    )


def _output(model: PreTrainedModel, blocks: tuple[nn.Module, ...], layer: int) -> torch.Tensor:
    ids = torch.arange(1, PROBE_TOKENS + 1, device=model.device).unsqueeze(0)
    with record(blocks, [layer]) as outputs:
        model(input_ids=ids, use_cache=False)
    found: torch.Tensor = outputs[layer].float()
    return found
