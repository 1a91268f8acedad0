"""Texts that are sampled together equal those sampled one at a time, and what is read in them equals plain passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch

from steering_vectors.measures import sampling, steered_model
from steering_vectors.measures.sampling import Sampler
from steering_vectors.measures.steered_model import KeptTexts, SteeredModel, steerable
from steering_vectors.models.limits import eos_ids
from steering_vectors.models.loading import LanguageModel, wrap_model
from steering_vectors.profiles.mixture import Mixture, Term
from steering_vectors.profiles.profile import Profile
from tests.support.by_hand import shifted
from tests.support.tiny import tiny_model
from tests.support.tiny_tokenizers import tiny_tokenizer

SHARED = [0, 9, 17, 4]
PROMPTS = [[*SHARED, 30, 31], [*SHARED, 30, 31], [*SHARED, 40], [7], [*SHARED, 30, 31, 32, 33, 34], SHARED]
STRENGTHS = (1.0, 0.0, -0.5)
TOKENS = 7


def lm_of(architecture: str) -> LanguageModel:
    lm = wrap_model(tiny_model(architecture), tiny_tokenizer())
    (end,) = eos_ids(lm)
    with torch.no_grad():
        lm.model.get_output_embeddings().weight[end] *= 6  # so that texts end at different lengths
    return lm


def profile_for(lm: LanguageModel, *, late: bool = False) -> Profile:
    """A profile of the first and the last block, or of the second one only."""
    draw = torch.Generator().manual_seed(0)
    layers = (1,) if late else (0, lm.num_layers - 1)
    directions = {layer: torch.randn(lm.hidden_size, generator=draw) for layer in layers}
    return Profile("test", lm.identity, directions, "mean-diff", unit=0.3)


def plain_log_probs(
    lm: LanguageModel, shifts: Mapping[int, torch.Tensor], prompt: Sequence[int], text: Sequence[int]
) -> torch.Tensor:
    with torch.no_grad(), shifted(lm, shifts, len(prompt) - 1):
        logits = lm.model(input_ids=torch.tensor([[*prompt, *text]]), use_cache=False).logits[0].float()
    found: torch.Tensor = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return found


@pytest.mark.parametrize(
    ("architecture", "rows", "late"),
    [("llama", 2, False), ("llama", 4, True), ("llama", 64, False), ("gpt2", 64, True), ("gemma3_text", 4, True)],
)
def test_texts_of_several_strengths_equal_those_of_one_strength_and_one_prompt(
    architecture: str, rows: int, late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "_rows_that_fit", lambda lm, context: rows)
    monkeypatch.setattr(sampling, "PREFILL_TOKENS", 5)
    lm = lm_of(architecture)
    profile = profile_for(lm, late=late)
    with steerable(lm) as steered:
        together = steered.sample_and_compare(profile, STRENGTHS, PROMPTS, tokens=TOKENS, seed=3, read=[0, 1])
        for strength, found in zip(STRENGTHS, together, strict=True):
            steered.write(profile, strength)
            assert steered.sample(PROMPTS, tokens=TOKENS, seed=3) == found.texts
    uniforms = torch.rand(len(PROMPTS), TOKENS, generator=torch.Generator().manual_seed(3))
    lengths = set()
    for strength, found in zip(STRENGTHS, together, strict=True):
        shifts = {layer: strength * profile.unit * d for layer, d in profile.injected().items()}
        for index, (prompt, text) in enumerate(zip(PROMPTS, found.texts, strict=True)):
            lengths.add(len(text))
            logs, base = plain_log_probs(lm, shifts, prompt, text), plain_log_probs(lm, {}, prompt, text)
            cumulative = logs.exp().cumsum(-1)
            drawn = [int((row <= uniforms[index, step] * row[-1]).sum()) for step, row in enumerate(cumulative)]
            assert drawn == text
            likelihood = base.gather(1, torch.tensor(text).unsqueeze(1)).sum()
            assert float(found.likelihoods[index]) == pytest.approx(float(likelihood), rel=1e-4, abs=1e-4)
            divergence = float((logs.exp() * (logs - base)).sum())
            assert float(found.divergences[index]) == pytest.approx(divergence, rel=1e-3, abs=1e-5)
        assert strength or not found.divergences.any()
    assert len(lengths) > 2  # some ended early


def test_the_unsteered_model_reads_in_the_blocks_from_the_first_steered_one_on(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = lm_of("llama")
    computed = [0] * lm.num_layers
    profile = profile_for(lm, late=True)
    with steerable(lm) as steered:
        sampler = steered._sampler_for(PROMPTS, TOKENS)
        uniforms = torch.rand(1, TOKENS, generator=torch.Generator().manual_seed(3))
        with monkeypatch.context() as patch:
            for layer, block in enumerate(lm.blocks):
                patch.setattr(block, "forward", counted(block.forward, computed, layer))
            (found,) = sampler.sample([Mixture((Term(profile, 1.0),))], [[7]], uniforms, compared=1)
    assert computed == [found.tokens, *[2 * found.tokens] * (lm.num_layers - 1)]


def counted(forward: Callable[..., Any], counts: list[int], layer: int) -> Callable[..., Any]:
    """The same function, which counts the rows that it is called with."""

    def counting(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        counts[layer] += len(hidden_states)
        return forward(hidden_states, *args, **kwargs)

    return counting


@pytest.mark.parametrize("late", [False, True])
def test_the_activations_are_those_of_the_unsteered_model(late: bool) -> None:
    lm = lm_of("llama")
    profile = profile_for(lm, late=late)
    with steerable(lm) as steered:
        together = steered.sample_and_compare(profile, STRENGTHS, PROMPTS, tokens=TOKENS, seed=3, read=[0, 1])
    for found in together:
        read = []
        for prompt, text in zip(PROMPTS, found.texts, strict=True):
            with torch.no_grad():
                ids = torch.tensor([[*prompt, *text[:-1]]])
                states = lm.model(input_ids=ids, output_hidden_states=True).hidden_states
            read.append(torch.stack([states[1][0, len(prompt) :], states[2][0, len(prompt) :]]))
        assert found.activations is not None
        torch.testing.assert_close(found.activations, torch.cat(read, dim=1).mean(1), rtol=1e-3, atol=1e-4)


def test_the_rows_fit_the_memory() -> None:
    lm = lm_of("llama")
    assert sampling._rows_that_fit(lm, 64) == sampling.MAX_ROWS
    config = lm.model.config
    position = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    assert sampling._rows_that_fit(lm, sampling.CACHE_BYTES // position // 7) == 6
    assert sampling._rows_that_fit(lm, sampling.CACHE_BYTES) == 2


def test_the_context_is_rounded_up_within_the_model_s_limit() -> None:
    lm = lm_of("llama")  # whose limit is 256 tokens
    assert [Sampler.context_for(lm, longest) for longest in (1, 16, 17, 250)] == [16, 16, 32, 256]


@pytest.mark.parametrize(
    ("architecture", "resumes"), [("llama", True), ("gpt2", True), ("mamba", True), ("rwkv", None), ("bloom", True)]
)
def test_kept_texts_give_what_whole_passes_give(
    architecture: str, resumes: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where logits are computed for three positions at a time, and steering begins after a kept layer."""
    lm = lm_of(architecture)
    profile = profile_for(lm)
    late = Profile("late", lm.identity, {lm.num_layers - 1: profile.directions[0]}, "mean-diff", unit=0.5)
    examples = [([*prompt, 50, 51, 52], len(prompt)) for prompt in PROMPTS]
    with steerable(lm) as steered:
        steered.batch_tokens = 20
        assert resumes is None or steered.resumes == resumes
        monkeypatch.setattr(steered_model, "MAX_LOGITS", 3 * lm.vocab_size)
        kept = steered.kept(examples, [0, 1])
        for one in (profile, late):
            steered.write(one, 1.0)
            assert_equal(kept, steered, one.layers[0])


@pytest.mark.parametrize("room", [0, 2**27])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_kept_texts_that_share_prompts_are_measured_as_alone(
    architecture: str, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where there is no room to keep the prompts."""
    monkeypatch.setattr(steered_model, "KEPT_BYTES", room)
    lm = lm_of(architecture)
    late = Profile("late", lm.identity, {lm.num_layers - 1: profile_for(lm).directions[0]}, "mean-diff", unit=0.5)
    prompt = list(range(10, 22))
    examples = [([first, *prompt, 50 + n, 51, 52], 1 + len(prompt)) for n in range(5) for first in (3, 4 + n)]
    with steerable(lm) as steered:
        kept = steered.kept(examples, [0])
        assert all(part.scored.batch.prompts is not None for part in kept._parts)
        for one in (profile_for(lm), late):
            steered.write(one, 1.0)
            for _ in range(2):  # a pass leaves the prompts as they were
                found = kept.divergences(one.layers[0])[0]
                alone = [steered.divergences([example])[0] for example in examples]
                torch.testing.assert_close(found, torch.cat(alone), rtol=1e-4, atol=1e-5)


def assert_equal(kept: KeptTexts, steered: SteeredModel, first: int) -> None:
    for found, expected in (
        (kept.divergences(first), steered.divergences(kept.examples)),
        (kept.log_likelihoods(first, steer=True), steered.log_likelihoods(kept.examples, steer=True)),
        (kept.log_likelihoods(first, steer=False), steered.log_likelihoods(kept.examples, steer=False)),
    ):
        torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5)
        assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("architecture", ["llama", "mamba"])
def test_texts_at_another_temperature(architecture: str) -> None:
    lm = lm_of(architecture)
    profile, temperature = profile_for(lm), 0.5
    uniforms = torch.rand(len(PROMPTS), TOKENS, generator=torch.Generator().manual_seed(3))
    shifts = {layer: profile.unit * d for layer, d in profile.injected().items()}
    with steerable(lm) as steered:
        steered.steer(Mixture((Term(profile, 1.0),), allow_beyond_safe=True))
        texts = steered.draw_texts(PROMPTS, uniforms, temperature=temperature)
        assert texts != steered.draw_texts(PROMPTS, uniforms)
    for index, (prompt, text) in enumerate(zip(PROMPTS, texts, strict=True)):
        logs = plain_log_probs(lm, shifts, prompt, text)
        cumulative = (logs / temperature).softmax(-1).cumsum(-1)
        assert [int((row <= uniforms[index, step] * row[-1]).sum()) for step, row in enumerate(cumulative)] == text
