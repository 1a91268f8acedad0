"""Random directions with the same KL per token as a profile, on the prompts of a benchmark.

A profile's unit is calibrated on held-out prompts of its training file. On other prompts its KL differs, so it is
measured again on the benchmark's prompts, and random directions are calibrated to that value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from steering_vectors import Profile
from steering_vectors.fitting.calibration import ROWS, SAMPLED_TOKENS, calibrate_on, cost_of
from steering_vectors.measures.steered_model import steerable
from steering_vectors.models.loading import LanguageModel

Prompts = Sequence[Sequence[int]]


def kl_on(
    language_model: LanguageModel, profile: Profile, prompts: Prompts, *, tokens: int = SAMPLED_TOKENS, seed: int = 0
) -> float:
    """KL(steered‖base) in nats per token at strength 1, over texts sampled as in calibration."""
    rows = [prompts[index % len(prompts)] for index in range(max(ROWS, len(prompts)))]
    with steerable(language_model) as steered:
        steered.write(profile, 1.0)
        texts = steered.continuations(rows, tokens=tokens, seed=seed)
        return cost_of(steered, profile, texts).per_token


def at_equal_kl(
    language_model: LanguageModel,
    controls: Sequence[Profile],
    prompts: Prompts,
    budget: float,
    *,
    tokens: int = SAMPLED_TOKENS,
) -> list[Profile]:
    """The controls, renamed `equal-kl-0` and so on, with units at which strength 1 costs `budget` on these prompts.

    Their safe range is not changed, because a control is compared at the profile's strengths, whatever its fluency.
    """
    found = []
    for index, control in enumerate(controls):
        named = replace(control, name=f"equal-kl-{index}")
        own = calibrate_on(language_model, named, prompts, kl_budget=budget, tokens=tokens)
        found.append(replace(own, max_strength=control.max_strength))
    return found
