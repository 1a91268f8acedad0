"""Random directions with the same KL per token as a profile, on the prompts of a benchmark.

A profile's unit is calibrated on held-out prompts of its training file. On other prompts its KL differs, so it is
measured again on the benchmark's prompts, and random directions are calibrated to that value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from steering_vectors import Profile
from steering_vectors.fitting.calibration import ROWS, SAMPLED_TOKENS, UnitSearch
from steering_vectors.measures.steered_model import steerable
from steering_vectors.models.loading import LanguageModel

Prompts = Sequence[Sequence[int]]


def kl_on(
    language_model: LanguageModel, profile: Profile, prompts: Prompts, *, tokens: int = SAMPLED_TOKENS, seed: int = 0
) -> float:
    """KL(steered‖base) in nats per token at strength 1, over texts sampled as in calibration."""
    rows = [prompts[index % len(prompts)] for index in range(max(ROWS, len(prompts)))]
    with steerable(language_model) as steered:
        (found,) = steered.sample_and_compare(profile, [1.0], rows, tokens=tokens, seed=seed)
    return float(found.divergences.sum()) / max(found.tokens, 1)


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
    rows = [prompts[index % len(prompts)] for index in range(max(ROWS, len(prompts)))]
    found = []
    with steerable(language_model) as steered:
        for index, control in enumerate(controls):
            reached, _ = UnitSearch(steered, control, rows, tokens, 0, None).find_unit(budget)
            found.append(replace(control, name=f"equal-kl-{index}", unit=reached.coefficient))
    return found
