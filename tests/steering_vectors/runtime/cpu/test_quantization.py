"""8-bit and 4-bit weights: their codes, quantised models, and models that cannot be quantised."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import nn

from server.engines.torch.build import build_engine
from server.settings import ConfigurationError, Settings, load_settings
from server.state import Service
from steering_vectors.errors import ModelError
from steering_vectors.models.loading import LanguageModel, load_model, wrap_model
from steering_vectors.runtime.choose_runner import TOLERANCE, disagreement
from steering_vectors.runtime.cpu import kernels as library
from steering_vectors.runtime.cpu.fused_blocks import FusedRunner
from steering_vectors.runtime.cpu.packing import _kernels, pack, quantize_layers
from steering_vectors.runtime.cpu.quantization import GROUP, Kind, Quantized, dequantize, joined, quantize
from steering_vectors.steering.accelerated_bank import AcceleratedBank
from tests.support.running import request, run_all
from tests.support.serving import live_server, save_profiles
from tests.support.tiny import tiny_model
from tests.support.tiny_tokenizers import tiny_tokenizer

KINDS = pytest.mark.parametrize("kind", get_args(Kind))
SIZES = pytest.mark.parametrize(("outputs", "inputs"), [(3, 2), (5, 64), (48, 172), (2000, 300)])
NEEDS_KERNELS = pytest.mark.skipif(_kernels() is None, reason="no such kernels for this processor")


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def largest(weight: torch.Tensor, size: int) -> torch.Tensor:
    """The largest magnitude of each group, repeated for every number in it."""
    parts = weight.abs().split(size, dim=1)
    return torch.cat([part.amax(dim=1, keepdim=True).expand_as(part) for part in parts], dim=1)


@SIZES
def test_eight_bits_are_half_a_step_away_at_most(outputs: int, inputs: int) -> None:
    weight = draw(outputs, inputs)
    found = quantize(weight, "int8")
    assert (found.codes.shape, found.scales.shape) == ((outputs, inputs), (outputs, 1))
    assert found.codes.abs().max() == 127
    step = found.scales.float()
    torch.testing.assert_close(step, largest(weight, inputs)[:, :1] / 127, rtol=2**-8, atol=0)
    assert ((dequantize(found) - weight).abs() <= 0.5001 * step).all()


@SIZES
def test_four_bits_are_an_eighth_of_their_groups_largest_away_at_most(outputs: int, inputs: int) -> None:
    weight = draw(outputs, inputs)
    found = quantize(weight, "int4")
    assert (found.codes.shape, found.scales.shape) == ((outputs, inputs), (outputs, -(-inputs // GROUP)))
    assert (found.codes.min(), found.codes.max()) == (-8, 7) or outputs == 3
    error = (dequantize(found) - weight).square()
    bound = (1.05 * largest(weight, GROUP) / 8).square()
    for one, most in zip(error.split(GROUP, dim=1), bound.split(GROUP, dim=1), strict=True):
        assert (one.sum(dim=1) <= most.sum(dim=1)).all()


@KINDS
def test_representable_weights_are_exact(kind: Kind) -> None:
    generator = torch.Generator().manual_seed(1)
    low, high = (-127, 127) if kind == "int8" else (-8, 7)
    codes = torch.randint(low, high + 1, (40, 96), generator=generator)
    codes[:, ::GROUP] = low  # every group contains its largest magnitude
    digits = torch.randint(17, 32, (40, 1 if kind == "int8" else 3), generator=generator)
    weight = dequantize(Quantized(kind, codes.to(torch.int8), (digits / 1024).bfloat16()))
    assert torch.equal(dequantize(quantize(weight, kind)), weight)


def test_dequantised_int4_weights_are_bfloat16() -> None:
    weight = dequantize(quantize(draw(60, 320) * torch.logspace(-30, 30, 60).unsqueeze(1), "int4"))
    assert torch.equal(weight.bfloat16().float(), weight)


@KINDS
def test_zeros_stay_zeros(kind: Kind) -> None:
    weight = draw(4, 96)
    weight[1], weight[2, 32:64] = 0, 0
    found = dequantize(quantize(weight, kind))
    assert found.isfinite().all()
    assert not found[1].any()
    assert not found[2, 32:64].any()


@KINDS
def test_outputs_are_quantised_each_by_itself(kind: Kind) -> None:
    parts = [draw(outputs, 70, seed=outputs) for outputs in (3, 9, 4000)]
    together, apart = quantize(torch.cat(parts), kind), joined([quantize(part, kind) for part in parts])
    assert torch.equal(together.codes, apart.codes)
    assert torch.equal(together.scales, apart.scales)


def linears(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.modules() if type(module) is nn.Linear]


def quantized_plainly(model: Any, kind: Kind) -> Any:
    """The quantised model as plain modules compute it."""
    quantize_layers(model, [[layer] for layer in linears(model)], kind, "")
    return model


@NEEDS_KERNELS
@KINDS
@pytest.mark.parametrize("tied", [True, False])
def test_a_packed_model_is_the_quantised_model(kind: Kind, tied: bool) -> None:
    model = tiny_model("qwen2", tie_word_embeddings=tied).bfloat16()  # with biases
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    plain = quantized_plainly(tiny_model("qwen2", tie_word_embeddings=tied).bfloat16(), kind)
    assert (sum(pack(model, kind)), linears(model)) == (7 * len(model.model.layers) + 1, [])
    ids = torch.tensor([[5, 9, 3, 7, 11], [4, 8, 2, 6, 10]])
    with torch.inference_mode():
        expected = plain(input_ids=ids, use_cache=False).logits.float()
        error = (model(input_ids=ids, use_cache=False).logits.float() - expected).norm() / expected.norm()
    assert error < 0.02
    for name, parameter in model.named_parameters():  # norms, and the embedding even if it is tied to the output layer
        assert torch.equal(parameter, before[name])
    assert torch.equal(model.get_input_embeddings().weight, before["model.embed_tokens.weight"])


@KINDS
def test_layers_become_what_their_codes_stand_for(kind: Kind) -> None:
    model, same = tiny_model("llama").bfloat16(), tiny_model("llama").bfloat16()
    quantized_plainly(model, kind)
    for layer, before in zip(linears(model), linears(same), strict=True):
        of_layer: Kind = "int8" if layer is model.lm_head else kind
        expected = dequantize(quantize(before.weight, of_layer)).bfloat16()
        assert torch.equal(layer.weight, expected)
        assert not torch.equal(layer.weight, before.weight)


def wrapped(model: Any) -> LanguageModel:
    return wrap_model(model, tiny_tokenizer())


@NEEDS_KERNELS
@KINDS
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_fused_blocks_compute_the_quantised_model(kind: Kind, architecture: str) -> None:
    packed = wrapped(tiny_model(architecture).bfloat16())
    plain = wrapped(quantized_plainly(tiny_model(architecture).bfloat16(), kind))
    pack(packed.model, kind)
    bank = AcceleratedBank.over(packed, rows=4)
    runner = FusedRunner(packed, bank, context=64)
    assert disagreement(runner, plain) <= TOLERANCE[torch.bfloat16]
    runner.close()


@NEEDS_KERNELS
@KINDS
def test_greedy_text_of_the_demo_model_is_that_of_the_quantised_model(kind: Kind) -> None:
    """Tokens are compared until the two best logits are within the rounding of bfloat16."""
    packed = load_model("demo")
    plain = load_model("demo", dtype="float32")
    quantized_plainly(plain.model, kind)
    pack(packed.model, kind)
    prompts = [torch.tensor(plain.tokenizer(text)["input_ids"]).tolist() for text in ("How do I", "My sister", "Tell")]
    found = run_all(packed, [request(ids, max_tokens=24, ignore_eos=True) for ids in prompts], slots=3, context=64)
    for ids, one in zip(prompts, found, strict=True):
        together = torch.tensor([[*ids, *one.ids]])
        with torch.inference_mode():
            logits = plain.model(input_ids=together).logits[0, len(ids) - 1 : -1]
        chosen = logits.gather(1, together[0, len(ids) :].unsqueeze(1)).squeeze(1)
        assert len(one.ids) == 24
        assert (logits.amax(dim=1) - chosen <= 0.08 * logits.std(dim=1)).all()


@NEEDS_KERNELS
@KINDS
def test_a_quantised_server_accepts_profiles_of_the_plain_model(kind: Kind, tmp_path: Path) -> None:
    identity = load_model("demo").identity
    save_profiles(tmp_path, identity, "some")
    prints = []
    for settings in (Settings(slots=2), Settings(slots=2, quantize=kind)):
        engine = build_engine(settings.engine_config())
        with live_server(engine, tmp_path, quantize=settings.quantize) as client:
            assert client.get("/version").json()["quantize"] == settings.quantize
            body = {"model": "demo", "prompt": "Hello", "steering": "some@0.5", "max_tokens": 4}
            answer = client.post("/v1/completions", json=body).json()
            assert answer["steering"][0]["strength"] == 0.5
            prints.append(answer["system_fingerprint"])
        asyncio.run(engine.close())
    assert prints[0] != prints[1]
    assert engine.info.identity == identity


@NEEDS_KERNELS
@pytest.mark.parametrize(
    ("model", "text"),
    [
        (lambda: tiny_model("llama"), "for models in bfloat16, not float32: use dtype bfloat16, or leave quantize out"),
        (lambda: tiny_model("llama").half(), "not float16: use dtype bfloat16"),
        (
            lambda: tiny_model("llama").to("meta"),
            "is for a CPU, not for meta: use device cpu, or leave quantize out",
        ),
        (lambda: tiny_model("gpt2").bfloat16(), "would reach 0% of this architecture's weights"),
        (
            lambda: tiny_model("gpt_oss").bfloat16(),
            "of this architecture's weights, as the others are not those of lin",
        ),
        (lambda: tiny_model("llama", intermediate_size=33).bfloat16(), "a linear layer of 33 inputs cannot be quantis"),
    ],
    ids=["float32", "float16", "device", "Conv1D", "experts", "odd"],
)
def test_models_that_cannot_be_quantised_are_refused(model: Any, text: str) -> None:
    with pytest.raises(ModelError) as failure:
        pack(model(), "int8")
    assert text in failure.value.message
    assert "leave quantize out" in failure.value.message


def test_a_processor_without_kernels_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "NAMES", ("avx2",))
    library.load.cache_clear()
    try:
        with pytest.raises(ModelError, match=r"int4 needs a processor with AVX512-BF16 .*; leave quantize out"):
            pack(tiny_model("llama").bfloat16(), "int4")
    finally:
        library.load.cache_clear()


@NEEDS_KERNELS
def test_a_server_that_cannot_quantise_does_not_start() -> None:
    async def start() -> None:
        service = Service(Settings(quantize="int8", dtype="float32"))
        service.start()
        try:
            await service.wait_ready()
        finally:
            await service.close()

    with pytest.raises(ModelError, match="quantize int8 is for models in bfloat16, not float32"):
        asyncio.run(start())


def test_other_numbers_of_bits_are_refused_by_name() -> None:
    with pytest.raises(
        ConfigurationError, match=r"--quantize \(TRIMTAB_QUANTIZE\): input should be 'int8', 'int4' or 'gguf'"
    ):
        load_settings({"quantize": "int2"})
