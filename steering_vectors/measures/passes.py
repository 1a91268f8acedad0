"""Forward passes over batches of examples. Prompts that rows share are computed once, where the model's cache allows
it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from steering_vectors.data.batches import Batch, Encoded, Scored, batches, scored_batches
from steering_vectors.models.forward import takes
from steering_vectors.models.hooks import stopping_after
from steering_vectors.models.loading import LanguageModel
from steering_vectors.models.shared_prompts import SharedPrompts, shares_prompts


def batches_for(lm: LanguageModel, examples: Sequence[Encoded], budget: int) -> Iterator[Batch]:
    return batches(examples, budget, lm.device, share=shares_prompts(lm))


def scored_batches_for(
    lm: LanguageModel, examples: Sequence[Encoded], budget: int, *, kept: bool = False
) -> Iterator[Scored]:
    return scored_batches(examples, budget, lm.device, share=shares_prompts(lm), kept=kept)


def prompt_cache(lm: LanguageModel, batch: Batch) -> SharedPrompts | None:
    """Compute the prompts that a batch shares, without gradients. None if there are none."""
    prompts = batch.prompts
    if prompts is None:
        return None
    cache = SharedPrompts(lm)
    places = torch.arange(prompts.ids.shape[1], device=prompts.ids.device).expand_as(prompts.ids)
    with torch.no_grad(), stopping_after(lm.blocks[-1]):
        lm.model(
            input_ids=prompts.ids,
            attention_mask=prompts.mask.long(),
            position_ids=places,
            past_key_values=cache,
            use_cache=True,
        )
    cache.share(prompts.owners)
    return cache


def run(lm: LanguageModel, batch: Batch, cache: SharedPrompts | None) -> Any:
    """Run the model over a batch, after the `prompt_cache` of the batch."""
    prompts = batch.prompts
    if prompts is None:
        seen = {"attention_mask": batch.mask.long()} if takes(lm.model, "attention_mask") else {}
        return lm.model(input_ids=batch.ids, use_cache=False, **seen)
    return lm.model(
        input_ids=batch.ids,
        attention_mask=torch.cat([prompts.mask[prompts.owners], batch.mask], 1).long(),
        position_ids=prompts.lengths[prompts.owners].unsqueeze(1) + batch.positions,
        past_key_values=cache,
        use_cache=True,
    )
