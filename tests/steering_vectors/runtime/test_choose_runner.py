"""Every architecture is served by the fastest runner whose logits equal those of the plain model."""

from __future__ import annotations

import pytest
import torch

from server.engines.config import EngineConfig
from server.engines.torch.engine import TorchEngine
from steering_vectors.errors import ModelError
from steering_vectors.models.limits import context_limit
from steering_vectors.models.loading import LanguageModel, wrap_model
from steering_vectors.runtime.choose_runner import choose_runner, disagreement
from steering_vectors.runtime.row_runners import RecomputingRunner, RowRunner
from steering_vectors.runtime.runner import BatchedRunner
from steering_vectors.steering.accelerated_bank import AcceleratedBank
from tests.support.running import plan, prompts, random_profile, reference_ids, request, run_all
from tests.support.tiny import OTHERS, REQUIRED, STEERABLE, tiny_model
from tests.support.tiny_tokenizers import tiny_tokenizer

pytestmark = pytest.mark.slow

# Models without slot batching: recurrent and hybrid state, or masks and positions that they compute themselves.
NOT_BATCHED = {
    "bamba": RowRunner,
    "bart": RowRunner,
    "falcon_h1": RowRunner,
    "falcon_mamba": RowRunner,
    "gpt_neo": RowRunner,
    "granitemoehybrid": RowRunner,
    "jamba": RowRunner,
    "lfm2": RowRunner,
    "mamba": RowRunner,
    "mamba2": RowRunner,
    "minimax": RowRunner,
    "nemotron_h": RowRunner,
    "openai-gpt": RecomputingRunner,
    "qwen3_next": RowRunner,
    "recurrent_gemma": RecomputingRunner,
    "rwkv": RowRunner,
    "zamba2": RowRunner,
}
SLOW = {"bamba", "falcon_h1", "mamba2", "granitemoehybrid", "zamba2"}  # reference kernels in plain Python


def tiny(architecture: str, **overrides: object) -> LanguageModel:
    return wrap_model(tiny_model(architecture, **overrides), tiny_tokenizer(), name=architecture)


def bank_for(language_model: LanguageModel) -> AcceleratedBank:
    return AcceleratedBank.over(language_model, rows=4)


# ALiBi, attention sinks, soft-capping, chunked attention, layers without positions, latent attention
PECULIAR = ("bloom", "mpt", "gpt_oss", "gemma2", "llama4_text", "smollm3", "deepseek_v3")


@pytest.mark.parametrize("architecture", [*REQUIRED, *PECULIAR])
def test_greedy_text_equals_transformers(architecture: str) -> None:
    """Alone, and in chunks beside steered rows, over texts longer than sliding windows."""
    language_model = tiny(architecture)
    rows = prompts(language_model, [11, 3, 30, 19])
    expected = [reference_ids(language_model, ids, 24) for ids in rows]
    profile = random_profile(language_model, scale=2.0)
    requests = [request(ids, max_tokens=24, ignore_eos=True) for ids in rows]
    neighbours = [request(ids, plan(profile, (-1.0) ** i), max_tokens=30) for i, ids in enumerate(rows)]
    alone = run_all(language_model, requests[:1], slots=1, context=96)
    together = run_all(language_model, [*neighbours, *requests], slots=8, context=96, prefill_chunk=16)
    assert alone[0].ids == expected[0]
    assert [one.ids for one in together[4:]] == expected


@pytest.mark.parametrize("architecture", REQUIRED)
def test_required_architectures_run_batched(architecture: str) -> None:
    language_model = tiny(architecture)
    runner = choose_runner(language_model, bank_for(language_model), context=96)
    assert type(runner) is BatchedRunner
    runner.close()


@pytest.mark.parametrize("architecture", sorted((set(OTHERS) & set(STEERABLE)) - SLOW))
def test_other_architectures_are_served_by_what_agrees(architecture: str) -> None:
    language_model = tiny(architecture)
    runner = choose_runner(language_model, bank_for(language_model), context=64)
    assert type(runner) is NOT_BATCHED.get(architecture, BatchedRunner)
    assert disagreement(runner, language_model) < 1e-3
    runner.close()


@pytest.mark.parametrize("architecture", ["mamba", "jamba", "rwkv", "recurrent_gemma", "gpt_neo", "qwen3_next"])
def test_fallbacks_steer_and_equal_transformers(architecture: str) -> None:
    language_model = tiny(architecture)
    rows = prompts(language_model, [9, 4])
    expected = [reference_ids(language_model, ids, 12) for ids in rows]
    profile = random_profile(language_model, scale=3.0)
    plain = [request(ids, max_tokens=12, ignore_eos=True) for ids in rows]
    steered = [request(ids, plan(profile), max_tokens=12, ignore_eos=True) for ids in rows]
    outcomes = run_all(language_model, [*plain, *steered], slots=3, context=64)
    assert [one.ids for one in outcomes[:2]] == expected
    assert [one.ids for one in outcomes[2:]] != expected
    assert [one.end.steered_tokens for one in outcomes] == [0, 0, 12, 12]


def test_no_runner_agrees_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose logits change from call to call cannot be served."""
    language_model = tiny("llama")
    language_model.model.model.layers[0].mlp.act_fn = torch.nn.Dropout(0.5).train()
    with pytest.raises(ModelError, match="cannot be served"):
        choose_runner(language_model, bank_for(language_model), context=64)


def test_context_is_bounded_by_the_model() -> None:
    language_model = tiny("gpt2")
    assert context_limit(language_model) == 256
    with pytest.raises(ModelError, match="a context of 300 tokens is more than the model's 256"):
        TorchEngine(language_model, EngineConfig(context=300))


def test_context_stays_where_rotary_frequencies_do_not_depend_on_neighbours() -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "original_max_position_embeddings": 64,
    }
    language_model = tiny("phi3", rope_parameters=rope, original_max_position_embeddings=64)
    assert context_limit(language_model) == 64


def test_hooks_are_removed_when_the_engine_closes() -> None:
    language_model = tiny("llama")
    run_all(language_model, [request(prompts(language_model, [5])[0])])
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in language_model.model.modules()]
    assert sum(hooks) == 0
