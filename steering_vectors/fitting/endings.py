"""Removes from directions, to first order, what changes the probability that a text ends.

A direction from preference data usually makes the end of a text a little more or less likely. This adds up over a long
text, which then ends much sooner or later than the unsteered model's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from steering_vectors.errors import FitError
from steering_vectors.measures.gradients import ending_gradients
from steering_vectors.measures.steered_model import steerable
from steering_vectors.models.limits import eos_ids
from steering_vectors.models.loading import LanguageModel
from steering_vectors.profiles.profile import Profile

TEXTS = 32
TOKENS = 128  # of a text, at most


def without_endings(lm: LanguageModel, profile: Profile, prompts: Sequence[Sequence[int]], *, seed: int) -> Profile:
    """The profile with g(d·g)/(g·g) taken from each direction d, where g is the gradient of the expected number of ends
    of text with respect to a shift at that block.

    The expectation is over 32 texts of up to 128 tokens that the unsteered model writes after the prompts. The weights
    must not be packed. Raises FitError for a model without an end-of-text token.
    """
    if not eos_ids(lm):
        raise FitError("keep_endings: the model has no end-of-text token; leave it out")
    with steerable(lm) as steered:
        steered.write(profile, 0.0)
        rows = [prompts[i % len(prompts)] for i in range(TEXTS)]
        texts = steered.continuations(rows, tokens=TOKENS, seed=seed)
    gradients = ending_gradients(lm, texts, profile.layers)
    return replace(profile, directions=without(profile.directions, gradients))


def without(directions: Mapping[int, torch.Tensor], gradients: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
    """Each direction without its component along the gradient of its block, float32 `[hidden]`."""
    units = {layer: torch.nn.functional.normalize(gradients[layer].double(), dim=0) for layer in directions}
    return {
        layer: (direction.double() - (direction.double() @ units[layer]) * units[layer]).float()
        for layer, direction in directions.items()
    }
