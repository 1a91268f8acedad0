"""Random profiles for the tiny models, with seeded directions and the identity of a real or a fictional model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from steering_vectors.models.blocks import find_blocks
from steering_vectors.models.loading import identify
from steering_vectors.profiles.profile import ModelIdentity, Profile
from tests.support.tiny import BLOCKS, HIDDEN

NOWHERE = ModelIdentity("tiny", "LlamaForCausalLM", HIDDEN, BLOCKS, "f" * 64)


def tiny_profile(
    model: PreTrainedModel | ModelIdentity = NOWHERE,
    name: str = "warm",
    layers: Sequence[int] = (0, 2),
    *,
    seed: int = 0,
    **fields: Any,
) -> Profile:
    """A profile with a random direction at each of `layers`; `fields` are the Profile's."""
    identity = model if isinstance(model, ModelIdentity) else identify(model, num_layers=len(find_blocks(model)))
    generator = torch.Generator().manual_seed(seed)
    directions = {layer: torch.randn(identity.hidden_size, generator=generator) for layer in layers}
    return Profile(name=name, model=identity, directions=directions, method="mean-diff", **fields)
