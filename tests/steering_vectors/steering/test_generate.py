"""`steer` around transformers' generate, compared with a loop that recomputes everything with explicit shifts."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import steering_vectors
from steering_vectors import Mixture, Term, steer
from steering_vectors.errors import ProfileMismatch, SteeringError
from steering_vectors.models.loading import wrap_model
from tests.support.tiny import STEERABLE, tiny_blocks, tiny_model, tiny_tokenizer
from tests.support.tiny_profiles import tiny_profile

pytestmark = pytest.mark.slow

IDS = torch.randint(2, 300, (2, 11), generator=torch.Generator().manual_seed(7))
TOKENS = 12
MIXES_ROWS = ("rwkv",)  # transformers' code for its state is wrong for more than one row


def generated(model: PreTrainedModel, ids: torch.Tensor = IDS, **options: Any) -> torch.Tensor:
    """Greedy continuation, int `[rows, TOKENS]`."""
    mask = options.pop("attention_mask", torch.ones_like(ids))
    options = {"max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 1, **options}
    return model.generate(ids, attention_mask=mask, **options)[:, ids.shape[1] :]


def shifted_logits(
    architecture: str, model: PreTrainedModel, ids: torch.Tensor, shifts: Mapping[int, torch.Tensor], first: int
) -> torch.Tensor:
    """Logits of one pass over all ids, with each shift added from position `first` on."""

    def hook_for(shift: torch.Tensor) -> Any:
        def hook(_module: Any, _args: Any, output: Any) -> Any:
            hidden = (output if isinstance(output, torch.Tensor) else output[0]).clone()
            hidden[:, first:] += shift
            return hidden if isinstance(output, torch.Tensor) else type(output)((hidden, *output[1:]))

        return hook

    blocks = tiny_blocks(architecture, model)
    handles = [blocks[layer].register_forward_hook(hook_for(shift)) for layer, shift in shifts.items()]
    logits: torch.Tensor = model(ids, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return logits


def recomputed(
    architecture: str, model: PreTrainedModel, shifts: Mapping[int, torch.Tensor], first: int = IDS.shape[1] - 1
) -> torch.Tensor:
    """Greedy continuation of IDS, recomputed from scratch at each token."""
    ids = IDS
    for _ in range(TOKENS):
        logits = shifted_logits(architecture, model, ids, shifts, first)
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    return ids[:, IDS.shape[1] :]


@pytest.mark.parametrize("architecture", STEERABLE)
def test_generate_equals_recomputing_with_explicit_shifts(architecture: str) -> None:
    """With and without a KV cache."""
    model = tiny_model(architecture)
    profile = tiny_profile(model, unit=0.5)
    shifts = {layer: 0.8 * 0.5 * direction for layer, direction in profile.directions.items()}
    reference = recomputed(architecture, model, shifts)
    with steer(model, profile, strength=0.8):
        cached = generated(model)
        uncached = generated(model, use_cache=False)
    assert torch.equal(uncached, reference)
    if architecture in MIXES_ROWS:
        with steer(model, profile, strength=0.8):
            cached = torch.cat([generated(model, ids) for ids in IDS.split(1)])
    assert torch.equal(cached, reference)
    assert not torch.equal(reference, generated(model))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3_text", "mamba"])
def test_apply_to_all_steers_the_prompt_too(architecture: str) -> None:
    model = tiny_model(architecture)
    profile = tiny_profile(model, unit=0.5)
    reference = recomputed(architecture, model, {layer: 0.5 * d for layer, d in profile.directions.items()}, first=0)
    with steer(model, profile, apply_to="all"):
        assert torch.equal(generated(model), reference)
        assert torch.equal(generated(model, use_cache=False), reference)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_strength_0_is_the_plain_model_bit_for_bit(architecture: str) -> None:
    model = tiny_model(architecture)
    options = {"output_logits": True, "return_dict_in_generate": True, "max_new_tokens": TOKENS, "pad_token_id": 1}
    plain = model.generate(IDS, do_sample=False, **options)
    with steer(model, tiny_profile(model), strength=0.0) as mixture:
        same = model.generate(IDS, do_sample=False, **options)
    assert mixture.is_neutral
    assert torch.equal(plain.sequences, same.sequences)
    assert all(torch.equal(one, other) for one, other in zip(plain.logits, same.logits, strict=True))


@pytest.mark.parametrize("architecture", ["llama", "rwkv", "mamba", "minimax"])
def test_calls_in_one_context_do_not_disturb_each_other(architecture: str) -> None:
    """Each call begins a new sequence: a longer one, a shorter one, and one that continues the last."""
    model = tiny_model(architecture)
    profile = tiny_profile(model)
    with steer(model, profile):
        first = generated(model)
    prompts = [IDS, IDS[:, :4], torch.cat([IDS, first], dim=1), IDS[:, :1], IDS]
    for options in ({}, {"use_cache": False}):
        with steer(model, profile):
            together = [generated(model, ids, **options) for ids in prompts]
        for ids, answer in zip(prompts, together, strict=True):
            with steer(model, profile):
                assert torch.equal(generated(model, ids, **options), answer)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "falcon_alibi", "gemma3_text"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_a_left_padded_batch_equals_its_rows(architecture: str, use_cache: bool) -> None:
    model = tiny_model(architecture)
    profile = tiny_profile(model, unit=0.7)
    lengths = (11, 4, 7)
    ids, mask = torch.ones(3, 11, dtype=torch.long), torch.zeros(3, 11, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, 11 - length :], mask[row, 11 - length :] = IDS[row % 2, :length], 1
    with steer(model, profile):
        batch = generated(model, ids, attention_mask=mask, use_cache=use_cache)
        alone = [generated(model, IDS[row % 2 : row % 2 + 1, :length]) for row, length in enumerate(lengths)]
    assert torch.equal(batch, torch.cat(alone))


def test_a_right_padded_batch_is_refused() -> None:
    model = tiny_model("llama")
    mask = torch.ones_like(IDS)
    mask[1, -2:] = 0
    with steer(model, tiny_profile(model)), pytest.raises(SteeringError, match="padded on the right"):
        generated(model, attention_mask=mask)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"prefill_chunk_size": 4}, {"cache_implementation": "static"}])
def test_other_ways_to_generate(options: dict[str, Any]) -> None:
    """Beams multiply the rows, a prompt comes in chunks, and a cache is longer than its content."""
    model = tiny_model("llama")
    profile = tiny_profile(model)
    with steer(model, profile):
        answer = generated(model, disable_compile=True, **options)
        uncached = generated(model, use_cache=False, num_beams=options.get("num_beams", 1))
    assert torch.equal(answer, uncached)


def test_prompts_given_by_name_or_as_embeddings() -> None:
    model = tiny_model("llama")
    embeddings = model.get_input_embeddings()(IDS)
    with steer(model, tiny_profile(model)):
        answer = generated(model)
        by_name = model.generate(input_ids=IDS, max_new_tokens=TOKENS, do_sample=False, eos_token_id=None)
        embedded = model.generate(inputs_embeds=embeddings, max_new_tokens=TOKENS, do_sample=False, eos_token_id=None)
        from_nothing = model.generate(max_new_tokens=TOKENS, do_sample=False, eos_token_id=None)
        from_bos = generated(model, torch.zeros(1, 1, dtype=torch.long))
    assert torch.equal(by_name[:, IDS.shape[1] :], answer)
    assert torch.equal(embedded, answer)
    assert torch.equal(from_nothing[:, 1:], from_bos)


def test_a_prefix_in_the_cache() -> None:
    model = tiny_model("llama")
    with steer(model, tiny_profile(model)):
        answer = generated(model)
    prefix = model(IDS[:, :6], use_cache=True).past_key_values
    with steer(model, tiny_profile(model)):
        assert torch.equal(generated(model, past_key_values=prefix), answer)


def test_single_passes() -> None:
    """Outside generate the whole input is the prompt, unless `prompt_length` is given."""
    model = tiny_model("llama")
    profile = tiny_profile(model, layers=(1,))

    references = {first: shifted_logits("llama", model, IDS, profile.directions, first) for first in (3, 10)}
    shorter = shifted_logits("llama", model, IDS[:, :3], profile.directions, 2)
    assert not torch.equal(shorter[:, -1], references[10][:, 2])
    with steer(model, profile):
        assert torch.equal(model(IDS).logits, references[10])
        assert torch.equal(model(input_ids=IDS).logits, references[10])
        assert torch.equal(model(IDS[:, :3]).logits, shorter)
    with steer(model, profile, prompt_length=4):
        assert torch.equal(model(IDS).logits, references[3])
        cache = model(IDS[:, :2], use_cache=True).past_key_values
        rest = model(IDS[:, 2:], past_key_values=cache).logits
    torch.testing.assert_close(rest, references[3][:, 2:])
    with pytest.raises(SteeringError, match="prompt_length is 0"), steer(model, profile, prompt_length=0):
        pass


def test_a_custom_loop_with_a_cache() -> None:
    model = tiny_model("mamba")
    with steer(model, tiny_profile(model)):
        expected = generated(model)
        output, tokens = model(IDS, use_cache=True), []
        for _ in range(TOKENS):
            tokens.append(output.logits[:, -1:].argmax(-1))
            output = model(tokens[-1], cache_params=output.cache_params, use_cache=True)
    assert torch.equal(torch.cat(tokens, dim=1), expected)


def test_several_profiles_a_mixture_and_a_subset_of_layers() -> None:
    model = tiny_model("llama")
    warm, terse = tiny_profile(model, "warm"), tiny_profile(model, "terse", (1,), seed=1)
    with steer(model, [(warm, 0.5), (terse, -0.25)]) as applied:
        listed = generated(model)
    assert [term.strength for term in applied.terms] == [0.5, -0.25]
    with steer(model, Mixture((Term(warm, 0.5), Term(terse, -0.25)))):
        assert torch.equal(generated(model), listed)
    with steer(model, warm, 0.5), steer(model, terse, -0.25):
        nested = generated(model)
    assert torch.equal(nested, listed)
    with steer(model, warm, 1.5, layers=[2]):
        subset = generated(model)
    assert torch.equal(subset, recomputed("llama", model, {2: 1.5 * warm.directions[2]}))


def test_a_language_model_is_steered_alike() -> None:
    model = tiny_model("gpt2")
    lm = wrap_model(model, tiny_tokenizer())
    profile = tiny_profile(model, operator="ablate")
    with steer(model, profile, preserve_norm=True):
        expected = generated(model)
    with steer(lm, profile, preserve_norm=True):
        assert torch.equal(generated(lm.model), expected)


def test_a_model_in_bfloat16() -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    profile = tiny_profile(model, unit=0.37)
    reference = recomputed("llama", model, {k: (0.37 * d).to(torch.bfloat16) for k, d in profile.directions.items()})
    with steer(model, profile):
        assert torch.equal(generated(model, use_cache=False), reference)
        assert generated(model).shape == reference.shape
    assert not torch.equal(reference, generated(model, use_cache=False))


def test_afterwards_the_model_is_as_before() -> None:
    model = tiny_model("llama")
    attributes, plain = set(vars(model)), generated(model)
    with steer(model, tiny_profile(model)):
        pass
    with pytest.raises(IndexError), steer(model, tiny_profile(model)):
        generated(model, torch.tensor([[9999]]))
    assert set(vars(model)) == attributes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(generated(model), plain)


def test_another_models_profile() -> None:
    model, other = tiny_model("llama"), tiny_model("llama", rms_norm_eps=0.1, vocab_size=380)
    profile = tiny_profile(other)
    with pytest.raises(ProfileMismatch, match="whose weights differ from"), steer(model, profile):
        pass
    with steer(model, profile, allow_model_mismatch=True):
        generated(model)
    wide = tiny_profile(tiny_model("llama", hidden_size=64))
    with pytest.raises(ProfileMismatch, match="hidden size 64"), steer(model, wide, allow_model_mismatch=True):
        pass
    assert not any(module._forward_hooks for module in model.modules())


def test_a_mixture_takes_no_strength_or_layers() -> None:
    model = tiny_model("llama")
    profile = tiny_profile(model)
    for options in ({"strength": 0.5}, {"layers": [0]}):
        with (
            pytest.raises(SteeringError, match="belong to a single profile"),
            steer(model, [(profile, 1.0)], **options),
        ):
            pass
    for options in ({"apply_to": "all"}, {"preserve_norm": True}):
        with pytest.raises(SteeringError, match="has its own"), steer(model, Mixture(), **options):
            pass
    with pytest.raises(SteeringError, match="beyond its safe range"), steer(model, profile, 3.0):
        pass


def test_the_public_interface_is_imported_at_its_first_use() -> None:
    code = "import sys, steering_vectors; print('torch' in sys.modules, *steering_vectors.__all__)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert printed == ["False", *steering_vectors.__all__]
    for name in steering_vectors.__all__:
        assert getattr(steering_vectors, name).__name__ == name
        assert name in dir(steering_vectors)
    with pytest.raises(AttributeError, match="module 'steering_vectors' has no attribute 'nothing'"):
        _ = steering_vectors.nothing
