"""Packed and joined linear layers, compared with plain ones."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from steering_vectors.errors import ModelError
from steering_vectors.models.loading import LanguageModel, load_model, wrap_model
from steering_vectors.runtime.cpu.packing import PackedLinear, is_packed, pack, packs, unpack
from tests.support.running import plan, prompts, random_profile, request, run_all
from tests.support.tiny import STEERABLE, tiny_model
from tests.support.tiny_tokenizers import tiny_tokenizer

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


def linears(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.modules() if type(module) is nn.Linear]


LOOKS_AT_WEIGHTS = ["falcon_mamba", "mamba", "mamba2"]  # their code reads the dtype of the output layer's weight


@pytest.mark.slow
@pytest.mark.parametrize("architecture", sorted(set(STEERABLE) - set(LOOKS_AT_WEIGHTS)))
def test_logits_are_those_of_the_plain_model(architecture: str) -> None:
    model = tiny_model(architecture)
    ids = torch.tensor([[5, 9, 3, 7, 11], [4, 8, 2, 6, 10]])
    with torch.inference_mode():
        plain = model(input_ids=ids, use_cache=False).logits
        before = len(linears(model))
        joined = pack(model)
        assert 0 < sum(joined) == before - len(linears(model))
        assert all(joined)
        for _ in range(2):
            torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, plain, rtol=1e-4, atol=1e-4)


def test_layers_of_one_input_are_one_product() -> None:
    model = tiny_model("qwen2")  # with biases on queries, keys and values
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    assert pack(model) == [3, 1, 2, 1] * len(model.model.layers) + [1]
    assert attention.q_proj.joint is attention.k_proj.joint is attention.v_proj.joint
    assert mlp.gate_proj.joint is mlp.up_proj.joint is not mlp.down_proj.joint


def test_joined_layers_read_the_current_input() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(8, 4), nn.Linear(8, 6, bias=False)
            self.embedding = nn.Embedding(9, 8)

        def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> SimpleNamespace:
            x = self.embedding(input_ids)
            return SimpleNamespace(logits=torch.cat([self.one(x), self.other(x)], dim=-1))

    torch.manual_seed(0)
    model = Two()
    plain = [nn.Linear(8, 4), nn.Linear(8, 6, bias=False)]
    for mine, theirs in zip(plain, (model.one, model.other), strict=True):
        mine.load_state_dict(theirs.state_dict())
    assert (pack(model), pack(model)) == ([2], [])
    calls: list[tuple[Callable[[torch.Tensor], torch.Tensor], nn.Linear]] = list(
        zip((model.one, model.other), plain, strict=True)
    )
    with torch.inference_mode():
        first, second = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
        for given, which in ((first, 0), (second, 0), (first, 0), (first, 0), (first, 1), (second, 1), (second, 0)):
            packed, layer = calls[which]
            torch.testing.assert_close(packed(given), layer(given))


BFLOAT16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
NEEDS_BFLOAT16 = pytest.mark.skipif(not BFLOAT16, reason="oneDNN packs no bfloat16 on this processor")


@pytest.mark.skipif(BFLOAT16, reason="oneDNN packs bfloat16 on this processor")
def test_a_processor_without_bfloat16_is_refused() -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    assert not packs(model)
    with pytest.raises(ModelError, match="oneDNN packs no weights of this kind here; leave cpu_prepack out"):
        pack(model)


@NEEDS_BFLOAT16
def test_bfloat16_agrees_within_its_rounding() -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    assert packs(model)
    ids = torch.tensor([[5, 9, 3, 7, 11]])
    with torch.inference_mode():
        plain = model(input_ids=ids, use_cache=False).logits.float()
        pack(model)
        error = (model(input_ids=ids, use_cache=False).logits.float() - plain).norm() / plain.norm()
    assert error < 0.02


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="what is mapped is told by Linux")
def test_packing_unmaps_the_checkpoint(tmp_path: Path) -> None:
    def is_mapped() -> bool:
        gc.collect()
        return str(tmp_path) in Path("/proc/self/maps").read_text()

    tiny_model("llama").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    language_model = load_model(str(tmp_path))
    assert is_mapped()
    pack(language_model.model)
    assert not is_mapped()


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt_oss"])
def test_greedy_tokens_stay_the_same(architecture: str) -> None:
    plain = wrap_model(tiny_model(architecture), tiny_tokenizer())
    packed = wrap_model(tiny_model(architecture), tiny_tokenizer())
    pack(packed.model)
    assert any(isinstance(module, PackedLinear) for module in packed.model.modules())
    profile = random_profile(plain, scale=2.0)

    def texts(language_model: LanguageModel) -> list[tuple[int, ...]]:
        rows = zip(prompts(plain, [9, 20, 5]), (None, plan(profile), plan(profile, -1.0)), strict=True)
        wanted = [request(ids, steering, max_tokens=20, ignore_eos=True) for ids, steering in rows]
        return [one.ids for one in run_all(language_model, wanted, slots=2, context=64)]

    assert texts(packed) == texts(plain)


@pytest.mark.parametrize("architecture", LOOKS_AT_WEIGHTS)
def test_code_that_wants_more_than_a_product_is_refused(architecture: str) -> None:
    with pytest.raises(ModelError, match=r"cannot be packed \(.*no attribute 'weight'\); leave cpu_prepack out"):
        pack(tiny_model(architecture))


@pytest.mark.skipif(BFLOAT16, reason="oneDNN packs bfloat16 on this processor")
def test_a_processor_without_bfloat16_packing_is_refused() -> None:
    with pytest.raises(ModelError, match="oneDNN packs no weights of this kind here; leave cpu_prepack out"):
        pack(tiny_model("llama").to(torch.bfloat16))


def test_formats_without_packing_are_refused() -> None:
    with pytest.raises(ModelError, match="oneDNN packs no weights of this kind here; leave cpu_prepack out"):
        pack(tiny_model("llama").to(torch.float16))


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt_oss", "gemma3_text"])
def test_unpacked_layers_are_the_plain_ones(architecture: str) -> None:
    model = tiny_model(architecture)
    before, layers = weights(model), linears(model)
    parameters = {id(parameter) for parameter in model.parameters()}
    pack(model)
    assert is_packed(model)
    unpack(model)
    assert not is_packed(model)
    assert list(map(id, linears(model))) == list(map(id, layers))
    assert {id(parameter) for parameter in model.parameters()} == parameters
    after = weights(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_unpacked_model_can_be_trained() -> None:
    model = tiny_model("llama").requires_grad_(True)
    pack(model)
    unpack(model)
    model(input_ids=torch.tensor([[5, 9, 3]]), use_cache=False).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=NEEDS_BFLOAT16)])
def test_weights_shared_with_embeddings_stay_shared(dtype: torch.dtype) -> None:
    model = tiny_model("llama", tie_word_embeddings=True).to(dtype)
    shared = model.model.embed_tokens.weight
    assert model.lm_head.weight is shared
    before, ids = shared.detach().clone(), torch.tensor([[0, 5, 17], [99, 5, 31]])
    pack(model)
    assert isinstance(model.lm_head, PackedLinear)
    assert model.model.embed_tokens.weight is shared
    assert shared.numel() == (0 if dtype == torch.float32 else before.numel())  # float32 is held once, in the product
    assert torch.equal(model.model.embed_tokens(ids), before[ids])
    unpack(model)
    assert model.lm_head.weight is shared is model.model.embed_tokens.weight
    assert torch.equal(shared, before)
    assert torch.equal(model.model.embed_tokens(ids), before[ids])


@pytest.mark.parametrize("change", ["odd width", "three users", "own class"])
def test_a_shared_weight_that_embeddings_cannot_read_from_a_product_stays_plain(change: str) -> None:
    model = tiny_model("llama", tie_word_embeddings=True, **({"hidden_size": 24} if change == "odd width" else {}))
    if change == "three users":
        model.other = torch.nn.Embedding(*model.lm_head.weight.shape, _weight=model.lm_head.weight)
        model.other.weight = model.lm_head.weight
    elif change == "own class":
        model.model.embed_tokens.__class__ = type("Scaled", (torch.nn.Embedding,), {})
    pack(model)
    assert type(model.lm_head) is torch.nn.Linear
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "forward" not in vars(model.model.embed_tokens)


def test_packing_holds_no_plain_weights() -> None:
    model = tiny_model("llama")
    layers = linears(model)
    pack(model)
    assert {layer.weight.numel() for layer in layers} == {0}


@pytest.mark.parametrize("architecture", LOOKS_AT_WEIGHTS)
def test_a_model_that_cannot_be_packed_stays_as_it_was(architecture: str) -> None:
    model = tiny_model(architecture)
    before, ids = weights(model), torch.tensor([[5, 9, 3, 7, 11]])
    plain = model(input_ids=ids, use_cache=False).logits
    with pytest.raises(ModelError, match="cannot be packed"):
        pack(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(model).items())
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, plain)
