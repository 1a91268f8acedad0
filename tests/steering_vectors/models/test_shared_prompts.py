"""Prompts are shared by models whose logits do not change, whoever asks first."""

from __future__ import annotations

import pytest
import torch

from steering_vectors.models.hooks import intercepting
from steering_vectors.models.loading import LanguageModel, wrap_model
from steering_vectors.models.shared_prompts import SharedPrompts, shares_prompts
from tests.support.tiny import tiny_model
from tests.support.tiny_tokenizers import tiny_tokenizer

PROMPT, RESTS = [5, 6, 7, 8], [[9, 10, 11], [12, 13, 14]]


def tiny(architecture: str) -> LanguageModel:
    return wrap_model(tiny_model(architecture), tiny_tokenizer())


@pytest.mark.parametrize(
    ("architecture", "shares"), [("llama", True), ("gpt2", True), ("mamba", False), ("gemma3_text", False)]
)
def test_the_finding_does_not_depend_on_hooks_or_on_training(architecture: str, shares: bool) -> None:
    plain, hooked = tiny(architecture), tiny(architecture)
    assert shares_prompts(plain) == shares
    hooked.model.train()
    projection = hooked.model.get_output_embeddings()
    assert projection is not None
    with intercepting(projection):
        assert shares_prompts(hooked) == shares
    assert hooked.model.training


def test_rows_leave_the_prompts_as_they_were() -> None:
    lm = tiny("llama")
    whole = lm.model(input_ids=torch.tensor([[*PROMPT, *rest] for rest in RESTS])).logits[:, -3:]
    cache = SharedPrompts(lm)
    with torch.no_grad():
        lm.model(input_ids=torch.tensor([PROMPT]), past_key_values=cache, use_cache=True)
        size = cache.nbytes
        cache.share(torch.tensor([0, 0]))
        for _ in range(2):
            found = lm.model(input_ids=torch.tensor(RESTS), past_key_values=cache, use_cache=True).logits
            torch.testing.assert_close(found, whole, atol=1e-5, rtol=1e-5)
            assert cache.nbytes == size > 0
