"""Directions without what makes texts end sooner or later."""

from __future__ import annotations

import pytest
import torch

from steering_vectors.errors import FitError
from steering_vectors.fitting import endings
from steering_vectors.fitting.endings import without, without_endings
from steering_vectors.fitting.fit import FitSettings
from steering_vectors.measures.steered_model import steerable
from steering_vectors.models.limits import eos_ids
from steering_vectors.models.loading import LanguageModel, wrap_model
from steering_vectors.profiles.profile import Profile
from tests.support.by_hand import shifted
from tests.support.tiny import tiny_model
from tests.support.tiny_tokenizers import tiny_tokenizer

PROMPTS = [[0, *range(first, first + 3 + first % 4)] for first in range(20, 28)]


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    """A model whose texts end now and then."""
    lm = wrap_model(tiny_model("llama"), tiny_tokenizer())
    with torch.no_grad():
        lm.model.get_output_embeddings().weight[list(eos_ids(lm))] *= 6
    return lm


def expected_ends(lm: LanguageModel, texts: list[tuple[list[int], int]], layer: int, shift: torch.Tensor) -> float:
    total = 0.0
    for ids, start in texts:
        with torch.no_grad(), shifted(lm, {layer: shift}, start - 1):
            logits = lm.model(input_ids=torch.tensor([ids])).logits[0, start - 1 : -1]
        total += float(logits.double().softmax(-1)[:, list(eos_ids(lm))].sum())
    return total / len(texts)


@pytest.mark.parametrize("layer", [0, 1])
def test_a_small_shift_changes_no_expected_end(lm: LanguageModel, layer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the texts that the unsteered model writes, where the direction itself changes it."""
    monkeypatch.setattr(endings, "TEXTS", 12)
    monkeypatch.setattr(endings, "TOKENS", 20)
    direction = torch.randn(lm.hidden_size, generator=torch.Generator().manual_seed(1))
    profile = Profile("test", lm.identity, {layer: direction}, "mean-diff")
    kept = without_endings(lm, profile, PROMPTS, seed=4).directions[layer]
    with steerable(lm) as steered:
        steered.write(profile, 0.0)
        texts = [(list(ids), start) for ids, start in steered.continuations((PROMPTS * 2)[:12], tokens=20, seed=4)]
    assert any(ids[-1] in eos_ids(lm) for ids, _ in texts)
    step = 1e-3
    slopes = [
        (expected_ends(lm, texts, layer, step * d) - expected_ends(lm, texts, layer, -step * d)) / (2 * step)
        for d in (direction, kept)
    ]
    assert abs(slopes[1]) < 0.01 * abs(slopes[0])
    removed = direction - kept
    assert float(removed @ kept) == pytest.approx(0, abs=1e-4)  # nothing else is taken
    assert 0 < float(removed.norm()) < float(direction.norm())


def test_each_block_loses_its_own_component() -> None:
    directions = {3: torch.tensor([3.0, 4.0]), 5: torch.tensor([1.0, 1.0])}
    gradients = {3: torch.tensor([0.0, 2.0]), 5: torch.zeros(2), 7: torch.ones(2)}
    found = without(directions, gradients)
    assert list(found) == [3, 5]
    assert found[3].tolist() == [3, 0]
    assert found[5].tolist() == [1, 1]  # nothing to remove
    assert found[3].dtype == torch.float32


def test_a_model_without_an_end_is_refused() -> None:
    lm = wrap_model(tiny_model("llama"), tiny_tokenizer())
    lm.model.generation_config.eos_token_id = lm.model.config.eos_token_id = lm.tokenizer.eos_token = None
    profile = Profile("test", lm.identity, {0: torch.ones(lm.hidden_size)}, "mean-diff")
    assert not eos_ids(lm)
    with pytest.raises(FitError) as refusal:
        without_endings(lm, profile, PROMPTS, seed=0)
    assert refusal.value.message == "keep_endings: the model has no end-of-text token; leave it out"


def test_the_two_settings_that_exclude_each_other() -> None:
    with pytest.raises(FitError) as refusal:
        FitSettings(keep_endings=True, layering="incremental")
    assert refusal.value.message == "keep_endings works with independent layering only: leave one of both out"
