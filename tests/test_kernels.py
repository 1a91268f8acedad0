"""The compiled kernels and the blocks made of them, against plain torch and plain modelling code."""

from __future__ import annotations

import asyncio

import pytest
import torch
from torch import nn

from server.engine.cpu.blocks import can_fuse
from server.engine.cpu.library import Heads, Kernels, load
from server.engine.engine import TorchEngine
from server.engine.packing import pack
from steering_vectors.models import wrap_model
from tests.running import mixture, prompts, random_profile, request, run_all
from tests.tiny import tiny_model
from tests.tiny_tokenizers import tiny_tokenizer

pytestmark = pytest.mark.skipif(load() is None, reason="no kernels were compiled for this processor")

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3}  # relative, of a norm


def kernels() -> Kernels:
    found = load()
    assert found is not None
    return found


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_alike(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    error = (found.float() - expected.float()).norm() / expected.float().norm()
    assert float(error) <= TOLERANCE[expected.dtype]


@DTYPES
@pytest.mark.parametrize(("rows", "size"), [(1, 576), (3, 40), (64, 577)])
def test_a_norm_is_torchs(dtype: torch.dtype, rows: int, size: int) -> None:
    x, weight = draw(rows, 1, size, dtype=dtype), draw(size, dtype=dtype, seed=1)
    wide = x.float()
    expected = weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(dtype)
    assert_alike(kernels().norm(x, weight, 1e-5), expected)


@DTYPES
def test_a_gated_unit_is_torchs(dtype: torch.dtype) -> None:
    both = 4 * draw(20, 1, 2 * 1031, dtype=dtype)
    both[0, 0, :8] = torch.tensor([0, -1e-30, 90, -90, 1e4, -1e4, 3e38, -3e38])
    gate, up = both.chunk(2, dim=-1)
    found = kernels().gated(both)
    assert_alike(found[1:], (nn.functional.silu(gate) * up)[1:])
    torch.testing.assert_close(found[0], (nn.functional.silu(gate) * up)[0])


def test_what_is_no_number_stays_none() -> None:
    both = torch.tensor([[float("nan"), 1.0, 2.0, float("nan")]])
    assert kernels().gated(both).isnan().all()
    assert kernels().gated(both.bfloat16()).isnan().all()


def rotated(x: torch.Tensor, turn: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """`[rows, heads, size]` as Llama's code turns it."""
    cosines, sines = turn
    one, other = x.chunk(2, dim=-1)
    return x * cosines + torch.cat([-other, one], dim=-1) * sines


@DTYPES
@pytest.mark.parametrize(("heads", "groups", "size"), [(9, 3, 64), (14, 2, 64), (4, 4, 32), (8, 1, 24), (4, 2, 128)])
@pytest.mark.parametrize("norms", [False, True])
def test_attention_is_torchs(dtype: torch.dtype, heads: int, groups: int, size: int, norms: bool) -> None:
    rows, length, slots = 4, 75, 6
    joined = draw(rows, 1, (heads + 2 * groups) * size, dtype=dtype)
    turn = (draw(rows, 1, size, dtype=dtype, seed=1), draw(rows, 1, size, dtype=dtype, seed=2))
    keys, values = (draw(slots, groups, 90, size, dtype=dtype, seed=seed) for seed in (3, 4))
    keys[:, :, 80:] = float("nan")  # nobody looks there
    values[:, :, 80:] = float("nan")
    where, columns = torch.tensor([[5], [0], [3], [2]]), torch.tensor([[74], [20], [0], [33]])
    places = torch.arange(length)
    mask = (places <= columns)[:, None, None]
    mask[1, ..., :7] = False  # a window
    mask[3, ..., 5] = False  # a hole
    scaling, weights = size**-0.5, [draw(size, dtype=dtype, seed=seed) for seed in (5, 6)]
    described = Heads(heads, groups, size, scaling, *(weights if norms else (None, None)), epsilon=1e-6)

    queries, new_keys, new_values = joined.view(rows, -1, size).split([heads, groups, groups], dim=1)
    if norms:
        queries, new_keys = (
            kernels().norm(x.contiguous(), weight, 1e-6) for x, weight in zip((queries, new_keys), weights, strict=True)
        )
    expected_keys, expected_values = keys.clone(), values.clone()
    expected_keys[where[:, 0], :, columns[:, 0]] = rotated(new_keys, turn)
    expected_values[where[:, 0], :, columns[:, 0]] = new_values
    expected = nn.functional.scaled_dot_product_attention(
        rotated(queries, turn).unsqueeze(2).float(),
        expected_keys[where[:, 0], :, :length].float(),
        expected_values[where[:, 0], :, :length].float(),
        attn_mask=mask,
        scale=scaling,
        enable_gqa=True,
    ).to(dtype)
    found = kernels().attend(described, joined, turn, keys, values, where, columns, mask)
    assert_alike(found, expected.reshape(rows, 1, heads * size))
    torch.testing.assert_close(keys, expected_keys, equal_nan=True)
    torch.testing.assert_close(values, expected_values, equal_nan=True)


needs_products = pytest.mark.skipif(
    load() is not None and not kernels().has_products, reason="this processor has no bfloat16 products"
)


@needs_products
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8, 16, 31])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 48), (576, 1000), (1536, 17), (2, 1)])
def test_a_product_is_torchs(rows: int, inputs: int, outputs: int) -> None:
    x, weight = draw(rows, 1, inputs, dtype=torch.bfloat16), draw(outputs, inputs, dtype=torch.bfloat16, seed=1)
    bias, added = (draw(*shape, dtype=torch.bfloat16, seed=2) for shape in ((outputs,), (rows, 1, outputs)))
    packed = kernels().pack(weight)
    for given, more in ((None, None), (bias, None), (bias, added), (None, added)):
        expected = nn.functional.linear(x, weight, given)
        expected = expected if more is None else expected + more
        assert_alike(kernels().product(x, packed, outputs, given, more), expected)


@needs_products
def test_a_row_of_a_product_is_what_it_is_alone() -> None:
    x, weight = draw(37, 1, 96, dtype=torch.bfloat16), draw(200, 96, dtype=torch.bfloat16, seed=1)
    packed = kernels().pack(weight)
    together = kernels().product(x, packed, 200)
    for row in range(37):
        assert torch.equal(kernels().product(x[row : row + 1], packed, 200), together[row : row + 1])


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
@DTYPES
def test_fused_blocks_write_what_plain_ones_write(architecture: str, dtype: torch.dtype) -> None:
    plain = wrap_model(tiny_model(architecture).to(dtype), tiny_tokenizer())
    fused = wrap_model(tiny_model(architecture).to(dtype), tiny_tokenizer())
    assert not can_fuse(fused.blocks)  # their weights are not packed
    pack(fused.model)
    profile = random_profile(plain, scale=2.0)
    rows = zip(prompts(plain, [9, 20, 5]), (None, mixture(profile), mixture(profile, -1.0)), strict=True)
    wanted = [request(ids, steering, max_tokens=20, ignore_eos=True) for ids, steering in rows]
    found, expected = (run_all(one, wanted, slots=2, context=64) for one in (fused, plain))
    assert can_fuse(fused.blocks)
    if dtype == torch.float32:
        assert [one.ids for one in found] == [one.ids for one in expected]
    else:  # logits of random weights lie closer together than bfloat16's rounding
        assert [one.ids[:1] for one in found] == [one.ids[:1] for one in expected]


@pytest.mark.parametrize(("architecture", "path"), [("qwen3", "batched, fused blocks"), ("gemma2", "batched")])
def test_the_engine_tells_whether_blocks_are_fused(architecture: str, path: str) -> None:
    language_model = wrap_model(tiny_model(architecture), tiny_tokenizer())
    pack(language_model.model)
    engine = TorchEngine(language_model, slots=2, context=64)
    assert engine.stats().path == path
    asyncio.run(engine.close())
    assert all("forward" not in vars(block) for block in language_model.blocks)  # as they were
