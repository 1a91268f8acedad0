"""The engine on a CUDA device; skipped without one. What else is run there is listed in docs/gpu.md."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from server.engines.config import EngineConfig
from server.engines.torch.engine import TorchEngine
from server.engines.torch.sampling.request_sampler import RequestSampler
from server.engines.torch.sampling.sample import sample
from steering_vectors.errors import ModelError
from steering_vectors.models.limits import checked_context
from steering_vectors.models.loading import LanguageModel, wrap_model
from steering_vectors.runtime.choose_runner import choose_runner
from steering_vectors.runtime.memory import CudaMeter, plan_memory
from steering_vectors.runtime.runner import BatchedRunner, RowInput
from steering_vectors.runtime.static_decoding import StaticRunner
from tests.support.running import attached_bank, mixture, prompts, random_profile, request, run_all
from tests.support.tiny import tiny_model
from tests.support.tiny_tokenizers import tiny_tokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
ARCHITECTURES = ["llama", "mistral", "gemma3_text", "gpt2", "falcon_alibi", "gpt_oss"]
SLOTS, CONTEXT = 6, 300


def on_cuda(architecture: str) -> LanguageModel:
    return wrap_model(tiny_model(architecture).to("cuda"), tiny_tokenizer())


@contextmanager
def refusing_to_wait() -> Iterator[None]:
    """Whatever makes the host wait for the device raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_tokens_on_cuda_equal_those_on_the_cpu(architecture: str, graphs: bool) -> None:
    """Float32, eight rows of which half are steered, on more rows than slots: rows join and leave."""
    here = wrap_model(tiny_model(architecture), tiny_tokenizer())
    profile = random_profile(here, scale=2.0)

    def requests() -> list:
        return [
            request(ids, mixture(profile, i % 2), max_tokens=12 + 3 * i, ignore_eos=True)
            for i, ids in enumerate(prompts(here, [5, 30, 11, 2, 19, 8, 23, 14]))
        ]

    found = run_all(on_cuda(architecture), requests(), slots=5, static_decoding=graphs)
    assert [one.ids for one in found] == [one.ids for one in run_all(here, requests(), slots=5)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_graphs_are_what_runs(architecture: str) -> None:
    language_model = on_cuda(architecture)
    with attached_bank(language_model, SLOTS) as bank:
        runner = choose_runner(language_model, bank, context=CONTEXT)
        assert runner.path == "batched, CUDA graphs"
        runner.close()
        runner = choose_runner(language_model, bank, context=CONTEXT, static=False)
        assert type(runner) is BatchedRunner
        runner.close()


def test_what_cannot_be_recorded_is_run_otherwise() -> None:
    """An architecture that asks for a tensor's value within a pass; the recording that failed leaves nothing behind."""
    here, there = wrap_model(tiny_model("dbrx"), tiny_tokenizer()), on_cuda("dbrx")
    with attached_bank(there, SLOTS) as bank:
        runner = choose_runner(there, bank, context=CONTEXT)
        assert type(runner) is BatchedRunner
        runner.close()
    profile = random_profile(here, scale=2.0)
    found, expected = (
        run_all(one, [request([5, 6, 7 + i], mixture(profile, i % 2), max_tokens=8) for i in range(4)])
        for one in (there, here)
    )
    assert [one.ids for one in found] == [one.ids for one in expected]


def test_steering_changed_between_replays_takes_effect() -> None:
    """Nothing is recorded anew; each replay equals the ordinary pass, for strengths, and rows that cease to be steered;
    and for texts that grow into the next bucket of columns."""
    language_model = on_cuda("llama")
    profiles = [random_profile(language_model, f"p{row}", seed=row, scale=2.0) for row in range(3)]
    with attached_bank(language_model, SLOTS) as bank:
        graphs = choose_runner(language_model, bank, context=CONTEXT, static=True)
        ordinary = BatchedRunner(language_model, bank, context=CONTEXT)
        rows = prompts(language_model, [125, 7, 60])
        for runner in (graphs, ordinary):
            runner.forward([RowInput(slot, ids, 0) for slot, ids in enumerate(rows)])
        assert isinstance(graphs, StaticRunner)
        recorded = []
        for step in range(8):
            for row, profile in enumerate(profiles):
                strength = (0.0, 1.0, -0.5, 2.0)[(step + row) % 4]
                bank.write(row, mixture(profile, strength)) if strength else bank.clear(row)
            works = [RowInput(slot, [step + slot], len(ids) + step, 0) for slot, ids in enumerate(rows)]
            found, expected = (runner.forward(works).logits.clone() for runner in (graphs, ordinary))
            assert torch.allclose(found, expected, atol=1e-4, rtol=1e-3), step
            recorded.append(len(graphs._replays))
        assert recorded[0] == recorded[2]
        assert recorded[-1] == recorded[0] + 1
        for runner in (graphs, ordinary):
            runner.close()


def test_a_step_waits_for_nothing_but_its_tokens() -> None:
    """A change of strength, the pass and the choice among logits; the one copy of tokens comes after."""
    language_model = on_cuda("llama")
    profile = random_profile(language_model, scale=2.0)
    with attached_bank(language_model, SLOTS) as bank:
        runner = choose_runner(language_model, bank, context=CONTEXT, static=True)
        runner.forward([RowInput(slot, ids, 0) for slot, ids in enumerate(prompts(language_model, [9, 4]))])
        works = [[RowInput(0, [5], 9 + step, 0), RowInput(1, [6], 4 + step, 0)] for step in range(2)]
        runner.forward(works[0])
        with refusing_to_wait():
            bank.write(0, mixture(profile, 0.5))
            logits = runner.forward(works[1]).logits
        assert logits.isfinite().all()
        runner.close()


@pytest.mark.parametrize("wish", [{"temperature": 0.0}, {"temperature": 0.8, "top_p": 0.9, "top_k": 40, "seed": 3}])
def test_tokens_sampled_on_cuda_equal_those_on_the_cpu(wish: dict[str, float]) -> None:
    parameters = request([1], **wish, presence_penalty=0.5).sampling
    logits = 3 * torch.randn(5, 3000, generator=torch.Generator().manual_seed(1)).round(decimals=1)
    tokens = []
    for device in ("cpu", "cuda"):
        rows = [
            RequestSampler(parameters, vocab_size=3000, eos_ids=frozenset([0]), prompt_ids=[1], choice=choice)
            for choice in range(5)
        ]
        tokens.append(sample(logits.to(device), rows))
    assert tokens[0] == tokens[1]


def test_memory_is_planned() -> None:
    language_model = on_cuda("llama")
    meter = CudaMeter(language_model.device)
    sizes = {"context": checked_context(language_model, None), "tokens": 64}
    slots = plan_memory(language_model, meter, slots=None, utilization=None, **sizes)
    assert slots is not None
    engine_options = {"slots": slots, "context": sizes["context"]}
    assert len(run_all(language_model, [request([5, 6, 7], max_tokens=4)], **engine_options)) == 1
    used, total = meter.used_and_total()
    with pytest.raises(ModelError, match="gpu_memory_utilization"):
        plan_memory(language_model, meter, slots=None, utilization=0.5 * used / total, **sizes)


def test_graphs_that_are_asked_for_and_cannot_be_recorded_are_an_error() -> None:
    with pytest.raises(ModelError, match="leave cuda_graphs out"):
        TorchEngine(on_cuda("mamba"), EngineConfig(cuda_graphs=True))
