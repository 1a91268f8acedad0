"""Scores, divergences and samples equal those of one plain pass per text, steered and unsteered."""

from __future__ import annotations

import math

import pytest
import torch

from steering_vectors.data.batches import Encoded
from steering_vectors.measures.divergence import kl_divergence
from steering_vectors.measures.steered_model import steerable
from steering_vectors.models.limits import eos_ids
from steering_vectors.models.loading import LanguageModel, wrap_model
from steering_vectors.models.shared_prompts import shares_prompts
from steering_vectors.profiles.profile import Profile
from tests.support.by_hand import shifted
from tests.support.tiny import tiny_model
from tests.support.tiny_tokenizers import tiny_tokenizer

ARCHITECTURES = ["llama", "gpt2", "gemma3_text", "mamba", "rwkv", "openai-gpt", "recurrent_gemma"]
EXAMPLES: list[Encoded] = [([0, 5, 9, 30, 41], 2), ([7, 8, 9, 10, 11, 12, 13, 14], 5), ([0, 77, 3], 1), ([4, 6], 0)]


PROMPTS = ([3, 1, 4, 1, 5, 9, 2, 6, 5], [2, 7, 1, 8, 2, 8])
SHARING: list[Encoded] = [([*PROMPTS[n % 2], *range(20 + n, 22 + 2 * n)], len(PROMPTS[n % 2])) for n in range(6)]


def lm_of(architecture: str) -> LanguageModel:
    return wrap_model(tiny_model(architecture), tiny_tokenizer())


def profile_for(lm: LanguageModel) -> Profile:
    draw = torch.Generator().manual_seed(0)
    directions = {layer: torch.randn(lm.hidden_size, generator=draw) for layer in (0, lm.num_layers - 1)}
    return Profile("test", lm.identity, directions, "mean-diff", unit=0.3)


def plain_logits(lm: LanguageModel, profile: Profile | None, ids: list[int], start: int) -> torch.Tensor:
    """Logits `[positions, vocabulary]` of one text. Plain hooks add the shift from the last prompt token on."""

    shifts = {} if profile is None else {layer: profile.unit * d for layer, d in profile.injected().items()}
    with torch.no_grad(), shifted(lm, shifts, max(start, 1) - 1):
        logits: torch.Tensor = lm.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()
    return logits


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("examples", "budget"), [(EXAMPLES, 16), (SHARING, 96)])
def test_scores_and_divergences_equal_plain_passes(architecture: str, examples: list[Encoded], budget: int) -> None:
    lm = lm_of(architecture)
    profile = profile_for(lm)
    with steerable(lm) as steered:
        steered.write(profile, 1.0)
        steered.batch_tokens = budget
        if examples is SHARING:
            assert any(scored.batch.prompts for scored in steered.scored(examples)) == shares_prompts(lm)
        scores = [steered.log_likelihoods(examples, steer=steer) for steer in (False, True)]
        divergences, counts = steered.divergences(examples)
    for i, (ids, start) in enumerate(examples):
        first = max(start, 1)
        logs = [plain_logits(lm, one, list(ids), start).log_softmax(-1)[first - 1 : -1] for one in (None, profile)]
        for (sums, tokens), log in zip(scores, logs, strict=True):
            expected = log.gather(1, torch.tensor(list(ids[first:])).unsqueeze(1)).sum()
            assert float(sums[i]) == pytest.approx(float(expected), rel=1e-4, abs=1e-4)
            assert int(tokens[i]) == len(ids) - first == int(counts[i])
        expected = (logs[1].exp() * (logs[1] - logs[0])).sum()
        assert float(divergences[i]) == pytest.approx(float(expected), rel=1e-3, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_samples_equal_those_drawn_one_text_at_a_time(architecture: str) -> None:
    lm = lm_of(architecture)
    profile, prompts = profile_for(lm), [[0, 9, 17], [5], [3, 4, 5, 6, 7, 8, 9]]
    with steerable(lm) as steered:
        steered.write(profile, 1.0)
        texts = steered.sample(prompts, tokens=6, seed=3)
    uniforms = torch.rand(3, 6, generator=torch.Generator().manual_seed(3))
    for i, prompt in enumerate(prompts):
        drawn: list[int] = []
        while len(drawn) < 6 and not set(drawn) & eos_ids(lm):
            chances = plain_logits(lm, profile, [*prompt, *drawn], len(prompt))[-1].softmax(-1).cumsum(0)
            drawn.append(int((chances <= uniforms[i, len(drawn)] * chances[-1]).sum()))
        assert texts[i] == drawn


def test_texts_end_with_their_eos_token() -> None:
    lm = lm_of("llama")
    (end,) = eos_ids(lm)
    with torch.no_grad():
        lm.model.get_output_embeddings().weight[end] *= 12
    with steerable(lm) as steered:
        texts = steered.sample([[0, token] for token in range(20, 60)], tokens=8, seed=0)
    assert any(len(text) < 8 for text in texts)
    assert all(end not in text[:-1] and (len(text) == 8 or text[-1] == end) for text in texts)


def test_draws_follow_the_model_s_distribution() -> None:
    lm = lm_of("llama")
    with steerable(lm) as steered:
        texts = steered.sample([[0, 9, 17]] * 4000, tokens=1, seed=1)
    chances = plain_logits(lm, None, [0, 9, 17], 3)[-1].softmax(-1)
    seen = torch.bincount(torch.tensor([text[0] for text in texts]), minlength=lm.vocab_size) / 4000
    assert float((seen - chances).abs().max()) < 4 * math.sqrt(float(chances.max()) / 4000)


def test_a_barred_token_costs_nothing() -> None:
    base = torch.tensor([0.0, 1.0, -torch.inf]).log_softmax(0)
    steered = torch.tensor([1.0, 0.0, -torch.inf]).log_softmax(0)
    assert 0 < float(kl_divergence(steered, base)) < 1


def test_the_model_is_untouched_afterwards() -> None:
    lm = lm_of("llama")
    before = plain_logits(lm, None, [0, 5, 9], 1)
    with steerable(lm) as steered:
        steered.write(profile_for(lm), 1.0)
        steered.sample([[0, 5]], tokens=3, seed=0)
    assert torch.equal(plain_logits(lm, None, [0, 5, 9], 1), before)
    assert not any(block._forward_hooks for block in lm.blocks)
