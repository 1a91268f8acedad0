"""Products over plain weights and over the codes of GGUF files, and models served from codes, against the weights that
the codes stand for."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf.quants import dequantize, quantize
from torch import nn

from server.engines.torch.build import build_engine
from server.settings import Settings
from steering_vectors.errors import ModelError
from steering_vectors.models.gguf_codes import CODE_TYPES, Codes
from steering_vectors.models.loading import LanguageModel, load_model
from steering_vectors.runtime.choose_runner import choose_runner, disagreement
from steering_vectors.runtime.cpu import kernels as library
from steering_vectors.runtime.cpu.fused_blocks import FusedRunner
from steering_vectors.runtime.cpu.kernels import GroupedProduct, Kernels, compiled, load
from steering_vectors.runtime.cpu.packing import (
    JoinedProduct,
    PackedLinear,
    SideBySide,
    coded_layers,
    pack,
    packed_product,
    take_codes,
)
from steering_vectors.steering.accelerated_bank import AcceleratedBank
from tests.support.gguf_files import Type, write_gguf
from tests.support.running import request, run_all
from tests.support.serving import live_server, save_profiles
from tests.support.tiny import tiny_model

needs_kernels = pytest.mark.skipif(load() is None, reason="no kernels were compiled for this processor")
PLAIN = "float32"
KINDS = pytest.mark.parametrize("kind", [*CODE_TYPES, PLAIN])
SIZES = pytest.mark.parametrize(("outputs", "inputs"), [(1, 32), (37, 64), (70, 544), (192, 1536)])
ROWS = [*range(1, 41), 239, 240, 241, 300]
BOUND = 2e-6  # relative to the norm: sums in float32 of up to 1536 products


@pytest.fixture(scope="module", autouse=True)
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRIMTAB_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module", params=compiled(), ids=lambda path: path.name.partition(".")[0])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    """The kernels for this processor, and those for older instruction sets that it also runs."""
    return Kernels(request.param)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def coded(outputs: int, inputs: int, kind: str, seed: int = 0) -> tuple[Any, torch.Tensor]:
    """A weight's codes, and the weight that the gguf library makes of them; or a plain weight, twice."""
    if kind == PLAIN:
        weight = draw(outputs, inputs, seed=seed)
        return weight, weight
    groups = quantize(draw(outputs, inputs, seed=seed).numpy(), Type[kind])
    return Codes(kind, torch.from_numpy(groups)), torch.from_numpy(dequantize(groups, Type[kind]))


def assert_near(found: torch.Tensor, exact: torch.Tensor) -> None:
    assert found.shape == exact.shape
    assert float((found.double() - exact).norm() / exact.norm()) <= BOUND


@KINDS
@SIZES
def test_a_product_is_that_of_the_librarys_weight(kernels: Kernels, kind: str, outputs: int, inputs: int) -> None:
    codes, weight = coded(outputs, inputs, kind)
    bias, x, added = draw(outputs, seed=1), draw(max(ROWS), inputs, seed=2), draw(max(ROWS), outputs, seed=3)
    plain, biased = kernels.grouped(codes), kernels.grouped(codes, bias)
    exact = x.double() @ weight.double().T
    for rows in ROWS:
        assert_near(plain(x[:rows]), exact[:rows])
        assert_near(biased(x[:rows], added[:rows]), (exact + bias + added)[:rows])


@KINDS
def test_a_row_does_not_depend_on_other_rows(kernels: Kernels, kind: str) -> None:
    codes, _ = coded(70, 544, kind)
    product, x = kernels.grouped(codes), draw(max(ROWS), 544)
    whole = product(x)
    for rows in ROWS:
        assert torch.equal(product(x[-rows:]), whole[-rows:])


@KINDS
def test_a_sum_may_replace_its_addend(kernels: Kernels, kind: str) -> None:
    codes, _ = coded(37, 64, kind)
    product, x, added = kernels.grouped(codes), draw(2, 3, 64), draw(2, 3, 37)
    assert torch.equal(product(x, added), product(x) + added)
    assert product(x).shape == (2, 3, 37)


@KINDS
def test_bfloat16_is_computed_in_float32_and_rounded(kernels: Kernels, kind: str) -> None:
    codes, _ = coded(37, 64, kind)
    product, x, added = kernels.grouped(codes, draw(37)), draw(5, 64).bfloat16(), draw(5, 37).bfloat16()
    assert torch.equal(product(x), product(x.float()).bfloat16())
    assert torch.equal(product(x, added), product(x) + added)


@pytest.mark.parametrize("outputs", [1, 16, 37])
def test_a_plain_weight_is_given_back_bit_for_bit(kernels: Kernels, outputs: int) -> None:
    weight = draw(outputs, 96)
    assert torch.equal(kernels.grouped(weight).weight(), weight)


@needs_kernels
@pytest.mark.parametrize(("inputs", "kind"), [(64, GroupedProduct), (48, JoinedProduct)])
def test_float32_weights_with_whole_groups_of_inputs_are_computed_here(inputs: int, kind: type) -> None:
    layers = [nn.Linear(inputs, outputs, bias=False).requires_grad_(False) for outputs in (8, 24)]
    product = packed_product(layers, [None, None])
    assert type(product) is kind
    x = draw(3, inputs)
    wanted = torch.cat([layer(x) for layer in layers], dim=-1)
    torch.testing.assert_close(product(x), wanted, atol=1e-5, rtol=1e-5)


def layers_of(stored: Sequence[tuple[Codes | None, torch.Tensor]]) -> list[nn.Linear]:
    found = []
    for seed, (_, weight) in enumerate(stored):
        layer = nn.Linear(weight.shape[1], len(weight), bias=seed % 2 == 0)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        found.append(layer.requires_grad_(False))
    return found


@needs_kernels
@pytest.mark.parametrize(
    "kinds",
    [("Q8_0",), ("Q4_1", "Q4_1", "Q4_1"), ("Q4_0", "Q8_0", "Q8_0"), ("Q4_1", None), (None, "Q4_0", None)],
    ids=lambda kinds: "+".join(map(str, kinds)),
)
def test_joined_layers_may_differ_in_type(kinds: Sequence[str | None]) -> None:
    stored: list[tuple[Codes | None, torch.Tensor]] = [
        (None, draw(20 + place, 96, seed=place)) if kind is None else coded(20 + place, 96, kind, seed=place)
        for place, kind in enumerate(kinds)
    ]
    layers, x = layers_of(stored), draw(3, 5, 96)
    product = packed_product(layers, [codes for codes, _ in stored])
    assert isinstance(product, SideBySide) == (len(set(kinds)) > 1)
    exact = torch.cat([layer.double()(x.double()) for layer in layers], dim=-1)
    added = draw(*exact.shape, seed=9)
    assert_near(product(x), exact)
    assert_near(product(x, added.clone()), exact + added)


MIXED = {"attn_v.weight": Type.Q4_0, "ffn_up.weight": Type.F16, "token_embd.weight": Type.Q5_1}


@pytest.fixture(scope="module", params=[*CODE_TYPES, "mixed"])
def file(request: pytest.FixtureRequest, demo: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model as a file of one type, or of several of which two have no codes."""
    mixed = request.param == "mixed"
    kind, kinds = (Type.Q4_1, MIXED) if mixed else (Type[request.param], {})
    path = tmp_path_factory.mktemp("gguf") / f"{request.param}.gguf"
    return write_gguf(demo.model, demo.tokenizer, path, kind, kinds=kinds)


def linears(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.modules() if type(module) is nn.Linear]


def loaded_plainly(file: Path) -> LanguageModel:
    """The file's model, in which plain layers have the weights that the codes stand for."""
    lm = load_model(str(file), dtype="float32")
    take_codes(lm.model, [linears(lm.model)], coded_layers(lm.model), "")
    return lm


@needs_kernels
@pytest.mark.slow
def test_a_packed_model_is_the_files_model(file: Path) -> None:
    packed, plain = load_model(str(file), dtype="float32"), loaded_plainly(file)
    embeddings = plain.model.get_input_embeddings()
    assert sum(pack(packed.model, "gguf")) == 7 * packed.num_layers + 1  # also the output layer that has no codes
    assert linears(packed.model) == []
    ids = torch.tensor([[5, 9, 3, 7, 11], [4, 8, 2, 6, 10]])
    with torch.inference_mode():
        expected = plain.model(input_ids=ids, use_cache=False).logits
        found = packed.model(input_ids=ids, use_cache=False).logits
    assert float((found - expected).norm() / expected.norm()) < 1e-5
    assert torch.equal(packed.model.get_input_embeddings()(ids), embeddings(ids))
    assert packed.identity == plain.identity


@needs_kernels
@pytest.mark.slow
def test_blocks_over_codes_are_fused(file: Path) -> None:
    packed, plain = load_model(str(file), dtype="float32"), loaded_plainly(file)
    pack(packed.model, "gguf")
    runner = choose_runner(packed, AcceleratedBank.over(packed, rows=4), context=64)
    assert isinstance(runner, FusedRunner)
    assert disagreement(runner, plain) <= 1e-5
    runner.close()


@needs_kernels
@pytest.mark.slow
def test_greedy_texts_are_those_of_the_files_model(file: Path) -> None:
    plain, served = loaded_plainly(file), load_model(str(file), dtype="float32")
    pack(served.model, "gguf")
    ids = [torch.tensor(plain.tokenizer(text).input_ids).tolist() for text in ("How do I", "My sister", "Tell me")]
    found, expected = (
        run_all(lm, [request(one, max_tokens=40, ignore_eos=True) for one in ids], slots=3, context=64)
        for lm in (served, plain)
    )
    assert [one.ids for one in found] == [one.ids for one in expected]
    assert all(len(one.ids) == 40 for one in found)


@needs_kernels
@pytest.mark.slow
def test_a_server_keeps_the_codes_and_accepts_profiles_of_the_plain_model(demo: LanguageModel, tmp_path: Path) -> None:
    file = write_gguf(demo.model, demo.tokenizer, tmp_path / "demo.gguf", Type.Q4_1)
    plain = loaded_plainly(file)
    save_profiles(tmp_path, plain.identity, "some")
    settings = Settings(model=str(file), slots=2, quantize="gguf", dtype="float32")
    engine = build_engine(settings.engine_config())
    assert (engine.info.dtype, engine.info.identity) == ("float32", plain.identity)
    with live_server(engine, tmp_path, model=str(file), quantize="gguf") as client:
        assert client.get("/version").json()["quantize"] == "gguf"
        body = {"model": "demo", "prompt": "Hello", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
        texts = [
            client.post("/v1/completions", json={**body, **steering}).json()["choices"][0]["text"]
            for steering in ({}, {"steering": "some@0.5"})
        ]
    asyncio.run(engine.close())
    prompt = torch.tensor([plain.tokenizer("Hello").input_ids])
    written = plain.model.generate(prompt, max_new_tokens=12, min_new_tokens=12, do_sample=False)
    assert texts[0] == plain.tokenizer.decode(written[0, prompt.shape[1] :])
    assert texts[1]


@needs_kernels
@pytest.mark.slow
def test_an_untouched_layer_keeps_its_memory_once(demo: LanguageModel, tmp_path: Path) -> None:
    """Packing releases the plain weights; the embedding stays."""
    lm = load_model(str(write_gguf(demo.model, demo.tokenizer, tmp_path / "demo.gguf", Type.Q8_0)), dtype="float32")
    layers = linears(lm.model)
    pack(lm.model, "gguf")
    assert all(layer.weight is None for layer in layers)
    assert all(isinstance(block.mlp.up_proj, PackedLinear) for block in lm.model.model.layers)
    names = {name for name, weight in lm.model.named_parameters() if weight.dim() == 2}
    assert names == {"model.embed_tokens.weight"}


def assert_refused(model: Any, text: str) -> None:
    with pytest.raises(ModelError) as failure:
        pack(model, "gguf")
    assert text in failure.value.message
    assert "leave quantize out" in failure.value.message


@needs_kernels
@pytest.mark.slow
def test_what_has_no_codes_is_refused_in_a_sentence(demo: LanguageModel, tmp_path: Path) -> None:
    assert_refused(tiny_model("llama"), "quantize gguf is for a GGUF file with weights of the types Q8_0, Q4_0, Q4_1")
    assert_refused(tiny_model("llama").to("meta"), "is for a CPU, not for meta: use device cpu")
    assert_refused(load_model("demo", dtype="float32").model, "quantize gguf is for a GGUF file with weights")
    kinds = {"ffn_up.weight": Type.F16, "ffn_gate.weight": Type.F16, "ffn_down.weight": Type.Q5_0}
    file = write_gguf(demo.model, demo.tokenizer, tmp_path / "demo.gguf", Type.Q8_0, kinds=kinds)
    assert_refused(
        load_model(str(file), dtype="float32").model, "quantize gguf would reach 27% of this model's weights"
    )
    half = write_gguf(demo.model, demo.tokenizer, tmp_path / "half.gguf", Type.F16)
    assert_refused(load_model(str(half), dtype="float32").model, "quantize gguf is for a GGUF file with weights of the")


@needs_kernels
def test_a_dtype_without_products_is_refused() -> None:
    assert_refused(
        tiny_model("llama").half(), "quantize gguf computes in float32 here, not in float16: use dtype float32"
    )


def test_a_processor_without_kernels_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "NAMES", ())
    library.load.cache_clear()
    try:
        assert_refused(tiny_model("llama"), "quantize gguf needs a processor with AVX2")
    finally:
        library.load.cache_clear()
