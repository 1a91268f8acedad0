"""The compiled kernels and fused blocks, compared with plain torch and modelling code."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import nn

from server.engines.config import EngineConfig
from server.engines.torch.engine import TorchEngine
from steering_vectors.models.loading import LanguageModel, wrap_model
from steering_vectors.runtime.choose_runner import choose_runner
from steering_vectors.runtime.cpu.fused_blocks import FusedRunner, can_fuse
from steering_vectors.runtime.cpu.kernels import (
    Heads,
    Kernels,
    PassInputs,
    WholeBlock,
    compiled,
    load,
    packed_weight,
    unpacked_weight,
)
from steering_vectors.runtime.cpu.packing import pack, packs
from steering_vectors.runtime.cpu.quantization import Kind, Quantized, dequantize, quantize
from steering_vectors.runtime.runner import RowInput
from steering_vectors.steering.accelerated_bank import AcceleratedBank
from tests.support.running import mixture, plan, prompts, random_profile, request, run_all
from tests.support.tiny import tiny_model
from tests.support.tiny_tokenizers import tiny_tokenizer

needs_kernels = pytest.mark.skipif(load() is None, reason="no kernels were compiled for this processor")

packs_bfloat16 = pytest.mark.skipif(
    not packs(torch.nn.Linear(2, 2, dtype=torch.bfloat16)), reason="no weights in bfloat16 are packed on this processor"
)

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3}  # relative to the norm


def fixture_over(libraries: list[Path]) -> Any:
    """The kernels for this processor, and those for older instruction sets that it also runs."""

    @pytest.fixture(scope="module", params=libraries, ids=lambda path: path.name.partition(".")[0])
    def made(request: pytest.FixtureRequest) -> Kernels:
        return Kernels(request.param)

    return made


kernels = fixture_over(compiled())
products = fixture_over([path for path in compiled() if Kernels(path).has_products])


def instructions() -> set[str]:
    """The instruction sets of the processor on Linux; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return {flag for line in lines if line.startswith("flags") for flag in line.partition(":")[2].split()}


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="there is no compiler")
@pytest.mark.skipif(not {"avx2", "fma"} <= instructions(), reason="there are no kernels for this processor")
def test_kernels_are_there_where_they_can_be_compiled() -> None:
    """Without kernels all their tests are skipped and slow serving goes unnoticed."""
    wanted = ["avx512_bf16"] * ({"avx512_bf16", "avx512vbmi"} <= instructions()) + ["avx2"]
    remedy = "install the package again, or run make dev, and read what the compiler says"
    assert [path.name.partition(".")[0] for path in compiled()] == wanted, remedy
    best = load()
    assert best is not None, remedy
    assert best.has_products is ("avx512_bf16" in wanted)


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_alike(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    error = (found.float() - expected.float()).norm() / expected.float().norm()
    assert float(error) <= TOLERANCE[expected.dtype]


@DTYPES
@pytest.mark.parametrize(("rows", "size"), [(1, 576), (3, 40), (64, 577)])
def test_a_norm_is_torchs(kernels: Kernels, dtype: torch.dtype, rows: int, size: int) -> None:
    x, weight = draw(rows, 1, size, dtype=dtype), draw(size, dtype=dtype, seed=1)
    wide = x.float()
    expected = weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(dtype)
    assert_alike(kernels.norm(x, weight, 1e-5), expected)


@DTYPES
def test_a_gated_unit_is_torchs(kernels: Kernels, dtype: torch.dtype) -> None:
    both = 4 * draw(20, 1, 2 * 1031, dtype=dtype)
    both[0, 0, :8] = torch.tensor([0, -1e-30, 90, -90, 1e4, -1e4, 3e38, -3e38])
    gate, up = both.chunk(2, dim=-1)
    found = kernels.gated(both)
    assert_alike(found[1:], (nn.functional.silu(gate) * up)[1:])
    torch.testing.assert_close(found[0], (nn.functional.silu(gate) * up)[0])


def test_nan_stays_nan(kernels: Kernels) -> None:
    both = torch.tensor([[float("nan"), 1.0, 2.0, float("nan")]])
    assert kernels.gated(both).isnan().all()
    assert kernels.gated(both.bfloat16()).isnan().all()


def rotated(x: torch.Tensor, turn: Sequence[torch.Tensor]) -> torch.Tensor:
    """Rotary embedding of `[…, size]` as in Llama's code."""
    cosines, sines = turn
    one, other = x.chunk(2, dim=-1)
    return x * cosines + torch.cat([-other, one], dim=-1) * sines


HEADS = pytest.mark.parametrize(
    ("heads", "groups", "size"), [(9, 3, 64), (14, 2, 64), (4, 4, 32), (8, 1, 24), (4, 2, 128)]
)
LENGTH = 75


def assert_attends(
    kernels: Kernels, described: Heads, where: torch.Tensor, columns: torch.Tensor, mask: torch.Tensor
) -> None:
    """Check attention of bfloat16 or float32 tokens, with keys in `columns` `[rows, queries]` of the slots `where`."""
    dtype = torch.float32 if described.query_norm is None else described.query_norm.dtype
    (rows, queries), (heads, groups, size) = columns.shape, (described.heads, described.groups, described.size)
    joined = draw(rows, queries, (heads + 2 * groups) * size, dtype=dtype)
    turn = (draw(rows, queries, size, dtype=dtype, seed=1), draw(rows, queries, size, dtype=dtype, seed=2))
    keys, values = (draw(6, groups, 90, size, dtype=dtype, seed=seed) for seed in (3, 4))
    keys[:, :, 80:], values[:, :, 80:] = float("nan"), float("nan")  # must not be read

    new = joined.view(rows, queries, -1, size).split([heads, groups, groups], dim=2)
    turned = [
        rotated(kernels.norm(x.contiguous(), weight, 1e-6), [one.unsqueeze(2) for one in turn])
        for x, weight in zip(new[:2], (described.query_norm, described.key_norm), strict=True)
        if weight is not None
    ]
    expected_keys, expected_values = keys.clone(), values.clone()
    for row, slot in enumerate(where[:, 0].tolist()):
        expected_keys[slot, :, columns[row]] = turned[1][row].transpose(0, 1)
        expected_values[slot, :, columns[row]] = new[2][row].transpose(0, 1)
    expected = nn.functional.scaled_dot_product_attention(
        turned[0].transpose(1, 2).float(),
        expected_keys[where[:, 0], :, :LENGTH].float(),
        expected_values[where[:, 0], :, :LENGTH].float(),
        attn_mask=mask,
        scale=described.scaling,
        enable_gqa=True,
    ).to(dtype)
    found = kernels.attend(described, joined, keys, values, PassInputs(turn, where, columns, mask))
    assert_alike(found, expected.transpose(1, 2).reshape(rows, queries, heads * size))
    torch.testing.assert_close(keys, expected_keys, equal_nan=True)
    torch.testing.assert_close(values, expected_values, equal_nan=True)


def described(heads: int, groups: int, size: int, dtype: torch.dtype) -> Heads:
    query_norm, key_norm = (draw(size, dtype=dtype, seed=seed) for seed in (5, 6))
    return Heads(heads, groups, size, size**-0.5, query_norm, key_norm, epsilon=1e-6)


@DTYPES
@HEADS
def test_attention_of_a_token_is_torchs(
    kernels: Kernels, dtype: torch.dtype, heads: int, groups: int, size: int
) -> None:
    where, columns = torch.tensor([[5], [0], [3], [2]]), torch.tensor([[74], [20], [0], [33]])
    mask = (torch.arange(LENGTH) <= columns)[:, None, None]
    mask[1, ..., :7] = False  # a window
    mask[3, ..., 5] = False  # a hole
    assert_attends(kernels, described(heads, groups, size, dtype), where, columns, mask)


def test_attention_without_norms_of_heads_turns_what_it_is_given(kernels: Kernels) -> None:
    size, turn = 16, (draw(2, 1, 16, seed=1), draw(2, 1, 16, seed=2))
    joined, keys, values = draw(2, 1, 3 * size), torch.zeros(2, 1, 9, size), torch.zeros(2, 1, 9, size)
    columns, mask = torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1, 1, 1, dtype=torch.bool)
    slots = torch.tensor([[1], [0]])
    found = kernels.attend(Heads(1, 1, size, 0.25), joined, keys, values, PassInputs(turn, slots, columns, mask))
    torch.testing.assert_close(found, joined[..., 2 * size :])  # with one key, the result is its value
    torch.testing.assert_close(keys[[1, 0], 0, 0], rotated(joined[..., size : 2 * size], turn)[:, 0])


@pytest.mark.parametrize("size", [24, 32, 64, 128])
def test_prompts_are_taken_in_heads_of_whole_blocks(products: Kernels, size: int) -> None:
    one = described(4, 2, size, torch.bfloat16)
    assert products.takes_prompts(one, torch.bfloat16) is (size % 32 == 0)
    assert not products.takes_prompts(one, torch.float32)


@HEADS
@pytest.mark.parametrize("queries", [2, 37])
def test_attention_of_a_prompt_is_torchs(products: Kernels, heads: int, groups: int, size: int, queries: int) -> None:
    one = described(heads, groups, size, torch.bfloat16)
    if size == 24:
        pytest.skip("no whole blocks: attention of prompts is torch's")
    assert products.takes_prompts(one, torch.bfloat16)
    where, starts = torch.tensor([[5], [0], [3]]), torch.tensor([[0], [38], [9]])
    columns = starts + torch.arange(queries)
    mask = (torch.arange(LENGTH) <= columns.unsqueeze(-1)).unsqueeze(1)
    mask[1, ..., :7] = False  # a window
    assert_attends(products, one, where, columns, mask)


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8, 16, 31])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 48), (576, 1000), (1536, 17), (2, 1)])
def test_a_product_is_torchs(products: Kernels, rows: int, inputs: int, outputs: int) -> None:
    x, weight = draw(rows, 1, inputs, dtype=torch.bfloat16), draw(outputs, inputs, dtype=torch.bfloat16, seed=1)
    bias, added = (draw(*shape, dtype=torch.bfloat16, seed=2) for shape in ((outputs,), (rows, 1, outputs)))
    for given, more in ((None, None), (bias, None), (bias, added), (None, added)):
        expected = nn.functional.linear(x, weight, given)
        expected = expected if more is None else expected + more
        assert_alike(products.packed(weight, given)(x, more), expected)


QUANTISED = pytest.mark.parametrize("kind", get_args(Kind))


@QUANTISED
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8, 16, 31])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 48), (576, 1000), (1536, 17), (2, 1), (6, 33), (172, 70)])
def test_a_quantised_product_is_that_of_its_numbers(
    products: Kernels, kind: Kind, rows: int, inputs: int, outputs: int
) -> None:
    x, weight = draw(rows, 1, inputs, dtype=torch.bfloat16), quantize(draw(outputs, inputs, seed=1), kind)
    bias, added = (draw(*shape, dtype=torch.bfloat16, seed=2) for shape in ((outputs,), (rows, 1, outputs)))
    for given, more in ((None, None), (bias, None), (bias, added), (None, added)):
        wide = nn.functional.linear(x.float(), dequantize(weight), None if given is None else given.float())
        expected = wide.bfloat16() if more is None else wide.bfloat16() + more
        assert_alike(products.quantized(weight, given)(x, more), expected)


@QUANTISED
@pytest.mark.parametrize("rows", [1, 2, 4, 9])
def test_whole_numbers_are_multiplied_exactly(products: Kernels, kind: Kind, rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    low, groups = (-127, 1) if kind == "int8" else (-8, 6)
    codes = torch.randint(low, -low, (50, 172), generator=generator, dtype=torch.int8)
    scales = (2.0 ** torch.randint(-3, 4, (50, groups), generator=generator)).bfloat16()
    weight = Quantized(kind, codes, scales)
    x = torch.randint(-9, 10, (rows, 172), generator=generator).bfloat16()
    expected = (x.double() @ dequantize(weight).double().T).float().bfloat16()
    assert torch.equal(products.quantized(weight)(x), expected)


@pytest.mark.parametrize("kind", [None, *get_args(Kind)])
def test_a_row_of_a_product_is_what_it_is_alone(products: Kernels, kind: Kind | None) -> None:
    x, weight = draw(37, 1, 96, dtype=torch.bfloat16), draw(200, 96, dtype=torch.bfloat16, seed=1)
    product = products.packed(weight) if kind is None else products.quantized(quantize(weight, kind))
    together = product(x)
    for rows in (2, 3, 7, 9, 18):
        assert torch.equal(product(x[5 : 5 + rows]), together[5 : 5 + rows])
    for row in range(37):
        assert torch.equal(product(x[row : row + 1]), together[row : row + 1])


@pytest.mark.parametrize("queries", [1, 5])
def test_a_whole_block_is_its_parts_one_after_the_other(products: Kernels, queries: int) -> None:
    rows, size, inner, shape = 3, 48, 96, (6, 2, 20, 16)
    heads = described(4, 2, 16, torch.bfloat16)
    hidden = draw(rows, queries, size, dtype=torch.bfloat16)
    norms = [(draw(size, dtype=torch.bfloat16, seed=seed), 1e-5) for seed in (1, 2)]
    turn = (
        draw(rows, queries, 16, dtype=torch.bfloat16, seed=3),
        draw(rows, queries, 16, dtype=torch.bfloat16, seed=4),
    )
    columns = torch.tensor([[3], [0], [7]]) + torch.arange(queries)
    mask = (torch.arange(16) <= columns.unsqueeze(-1)).unsqueeze(1)
    given = PassInputs(turn, torch.tensor([[4], [0], [2]]), columns, mask)
    kept, other = ([draw(*shape, dtype=torch.bfloat16, seed=seed) for seed in (5, 6)] for _ in range(2))
    joined, output, gate_up, down = (
        products.packed(draw(outputs, inputs, dtype=torch.bfloat16, seed=outputs), draw(outputs, dtype=torch.bfloat16))
        for outputs, inputs in ((128, size), (size, 64), (2 * inner, size), (size, inner))
    )

    seen = products.attend(heads, joined(products.norm(hidden, *norms[0])), kept[0], kept[1], given)
    between = output(seen, hidden)
    expected = down(products.gated(gate_up(products.norm(between, *norms[1]))), between)
    whole = WholeBlock(products, norms, heads, [joined, output, gate_up, down])
    assert torch.equal(whole(hidden, other[0], other[1], given), expected)
    assert all(map(torch.equal, other, kept))
    shift = draw(rows, 1, size, dtype=torch.bfloat16, seed=7)
    assert torch.equal(whole(hidden, other[0], other[1], given, shift), expected + shift)


@pytest.mark.slow
@needs_kernels
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=packs_bfloat16)])
def test_fused_blocks_write_what_plain_ones_write(architecture: str, dtype: torch.dtype) -> None:
    plain = wrap_model(tiny_model(architecture).to(dtype), tiny_tokenizer())
    fused = wrap_model(tiny_model(architecture).to(dtype), tiny_tokenizer())
    if not packs(fused.model):
        pytest.skip("weights of this dtype are not packed on this processor")
    assert not can_fuse(fused.blocks)  # the weights are not packed
    pack(fused.model)
    profile = random_profile(plain, scale=2.0)
    rows = zip(prompts(plain, [9, 20, 5]), (None, plan(profile), plan(profile, -1.0)), strict=True)
    wanted = [request(ids, steering, max_tokens=20, ignore_eos=True) for ids, steering in rows]
    found, expected = (run_all(one, wanted, slots=2, context=64) for one in (fused, plain))
    assert can_fuse(fused.blocks)
    if dtype == torch.float32:  # in bfloat16, logits of random weights differ by less than the rounding
        assert [one.ids for one in found] == [one.ids for one in expected]
    else:
        wide = wrap_model(tiny_model(architecture), tiny_tokenizer())
        exact, rounded, by_blocks = (logits_of(one) for one in (wide, plain, fused))
        assert (by_blocks - exact).norm() <= 2 * (rounded - exact).norm()


def logits_of(language_model: LanguageModel) -> torch.Tensor:
    """Logits in float32 of two prompts and ten fixed tokens after each; one row is steered."""
    bank = AcceleratedBank.over(language_model, rows=2)
    bank.attach()
    runner = choose_runner(language_model, bank, context=64)
    bank.write(0, mixture(random_profile(language_model, scale=2.0)))
    texts = prompts(language_model, [30, 21])
    found = []
    with torch.inference_mode():
        rows = [RowInput(slot, ids[:-10], 0, len(ids) - 11) for slot, ids in enumerate(texts)]
        found.append(runner.forward(rows).logits.float())
        for place in range(-10, 0):
            rows = [RowInput(slot, [ids[place]], len(ids) + place, len(ids) - 11) for slot, ids in enumerate(texts)]
            found.append(runner.forward(rows).logits.float())
    runner.close()
    bank.detach()
    return torch.cat(found)


@needs_kernels
@packs_bfloat16
def test_whole_blocks_steer_as_hooks_do() -> None:
    """Blocks and hooks add the same shifts to the same rows. With ablations, hooks add them."""
    language_model = wrap_model(tiny_model("llama").to(torch.bfloat16), tiny_tokenizer())
    if not packs(language_model.model):
        pytest.skip("bfloat16 weights are not packed on this processor")
    pack(language_model.model)
    bank = AcceleratedBank.over(language_model, rows=3)
    bank.attach()
    runner = FusedRunner(language_model, bank, context=32)
    works = [RowInput(slot, ids, 0, steered_from=0) for slot, ids in enumerate(prompts(language_model, [6, 6, 6]))]
    steered = [random_profile(language_model, seed=seed, scale=2.0) for seed in (0, 1)]
    turned = random_profile(language_model, seed=2, operator="ablate")

    def logits() -> torch.Tensor:
        with torch.inference_mode():
            return runner.forward(works).logits

    plain = logits()
    for row, profile in enumerate(steered):
        bank.write(row, mixture(profile))
    by_blocks = logits()
    assert (by_blocks[:2] != plain[:2]).any(-1).all()
    assert torch.equal(by_blocks[2], plain[2])
    bank.write(2, mixture(turned))  # from here on no block adds a shift itself
    by_hooks = logits()
    assert torch.equal(by_hooks[:2], by_blocks[:2])
    assert not torch.equal(by_hooks[2], plain[2])
    runner.close()
    bank.detach()


@needs_kernels
@pytest.mark.parametrize(("architecture", "path"), [("qwen3", "batched, fused blocks"), ("gemma2", "batched")])
def test_the_engine_reports_whether_blocks_are_fused(architecture: str, path: str) -> None:
    language_model = wrap_model(tiny_model(architecture), tiny_tokenizer())
    pack(language_model.model)
    engine = TorchEngine(language_model, EngineConfig(slots=2, context=64))
    assert engine.info.path == path
    asyncio.run(engine.close())
    assert all("forward" not in vars(block) for block in language_model.blocks)  # restored


@pytest.mark.parametrize(("outputs", "inputs"), [(16, 4), (37, 10), (1, 2)])
def test_a_packed_weight_is_read_back(outputs: int, inputs: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(outputs, inputs).bfloat16()
    assert torch.equal(unpacked_weight(packed_weight(weight))[:outputs], weight)
