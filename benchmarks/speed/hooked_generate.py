"""transformers' `generate` with trimtab's hooks and one steering for all rows, as a comparison without an engine."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from steering_vectors.models.loading import LanguageModel
from steering_vectors.profiles.profile import Profile
from steering_vectors.steering.generate import steer


class Clock(StoppingCriteria):  # type: ignore[misc]
    """Never stops, and records the time of each token. `generate` synchronises with the device there."""

    def __init__(self) -> None:
        self.stamps: list[float] = []

    def __call__(self, ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        if ids.device.type == "cuda":
            torch.cuda.synchronize(ids.device)
        self.stamps.append(time.perf_counter())
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)


def milliseconds(
    language_model: LanguageModel, profile: Profile, prompts: list[list[int]], *, steps: int, repeats: int
) -> float:
    """Milliseconds of the median step of rows of equal length, after a run that warms up."""
    settings = language_model.model.generation_config
    eos, settings.eos_token_id = settings.eos_token_id, None
    medians = []
    try:
        for _ in range(repeats + 1):
            clock = Clock()
            ids = torch.tensor(prompts, device=language_model.device)
            with torch.inference_mode(), steer(language_model, profile, 1.0):
                language_model.model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=False,
                    max_new_tokens=steps,
                    pad_token_id=0,
                    stopping_criteria=StoppingCriteriaList([clock]),
                )
            medians.append(median(b - a for a, b in zip(clock.stamps, clock.stamps[1:], strict=False)))
    finally:
        settings.eos_token_id = eos
    return 1e3 * median(medians[1:])
