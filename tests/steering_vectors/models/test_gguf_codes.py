"""The codes of GGUF weights: what they stand for, and which a conversion keeps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from gguf.quants import dequantize, quantize

from steering_vectors.errors import ModelError
from steering_vectors.models.gguf import convert_gguf
from steering_vectors.models.gguf_codes import CODE_TYPES, OUTPUTS, Codes, joined, load_codes, save_codes
from steering_vectors.models.loading import LanguageModel, load_model
from tests.support.gguf_files import Type, small_qwen, write_gguf

KINDS = pytest.mark.parametrize("kind", CODE_TYPES)


@pytest.fixture(scope="module", autouse=True)
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRIMTAB_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def codes_of(weight: torch.Tensor, kind: str) -> Codes:
    return Codes(kind, torch.from_numpy(quantize(weight.numpy(), Type[kind])))


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@KINDS
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 32), (5, 96), (OUTPUTS + 3, 64)])
def test_codes_stand_for_what_the_gguf_library_computes(kind: str, outputs: int, inputs: int) -> None:
    codes = codes_of(draw(outputs, inputs), kind)
    expected = torch.from_numpy(dequantize(codes.groups.numpy(), Type[kind]))
    assert (codes.outputs, codes.inputs) == (outputs, inputs)
    assert torch.equal(codes.dequantized(), expected)
    assert torch.equal(codes.dequantized(torch.bfloat16), expected.bfloat16())


@KINDS
def test_parts_are_scales_least_values_and_codes(kind: str) -> None:
    codes = codes_of(draw(7, 96), kind)
    scales, least, numbers = codes.parts()
    assert (scales.shape, scales.dtype) == ((7, 3), torch.float16)
    assert (least is not None) == (kind == "Q4_1")
    assert (numbers.shape, numbers.dtype) == ((7, 3, 32), torch.uint8)
    assert int(numbers.max()) < 2**codes.type.bits
    lowest = -codes.type.middle * scales.float() if least is None else least.float()
    weight = scales.float().unsqueeze(-1) * numbers.float() + lowest.unsqueeze(-1)
    assert torch.equal(weight.flatten(1), codes.dequantized())


@KINDS
def test_joined_codes_are_rows_one_below_the_other(kind: str) -> None:
    parts = [codes_of(draw(outputs, 64, seed=outputs), kind) for outputs in (3, 20)]
    assert torch.equal(joined(parts).dequantized(), torch.cat([part.dequantized() for part in parts]))


def test_codes_are_stored_as_they_are(tmp_path: Path) -> None:
    codes = {f"{kind}.weight": codes_of(draw(5, 64), kind) for kind in CODE_TYPES}
    save_codes(codes, tmp_path)
    found = load_codes(tmp_path)
    assert {name: one.kind for name, one in found.items()} == {name: one.kind for name, one in codes.items()}
    assert all(torch.equal(found[name].groups, one.groups) for name, one in codes.items())
    assert load_codes(tmp_path / "nothing") == {}


@pytest.mark.slow
@KINDS
def test_a_conversion_keeps_the_codes_of_all_matrices(demo: LanguageModel, tmp_path: Path, kind: str) -> None:
    """In the demo model the rows of queries and keys have another order than in the file."""
    file = write_gguf(demo.model, demo.tokenizer, tmp_path / "demo.gguf", Type[kind])
    found = load_codes(convert_gguf(file))
    matrices = {name: weight for name, weight in demo.model.named_parameters() if weight.dim() == 2}
    assert found.keys() == matrices.keys()
    for name, weight in matrices.items():
        exact = dequantize(quantize(weight.detach().numpy(), Type[kind]), Type[kind])
        assert torch.equal(found[name].dequantized(), torch.from_numpy(exact)), name


@pytest.mark.slow
def test_other_types_have_no_codes(demo: LanguageModel, tmp_path: Path) -> None:
    kinds = {"attn_v.weight": Type.Q5_0, "ffn_down.weight": Type.F16, "attn_q.weight": Type.Q4_0}
    file = write_gguf(demo.model, demo.tokenizer, tmp_path / "demo.gguf", Type.Q8_0, kinds=kinds)
    found = load_codes(convert_gguf(file))
    assert not [name for name in found if "v_proj" in name or "down_proj" in name]
    assert {one.kind for name, one in found.items() if "q_proj" in name} == {"Q4_0"}
    assert {one.kind for name, one in found.items() if "k_proj" in name} == {"Q8_0"}
    half = convert_gguf(write_gguf(demo.model, demo.tokenizer, tmp_path / "half.gguf", Type.F16))
    assert load_codes(half) == {}


@pytest.mark.slow
def test_an_output_layer_has_codes_of_its_own(demo: LanguageModel, tmp_path: Path) -> None:
    model = small_qwen(demo.vocab_size)
    file = write_gguf(model, demo.tokenizer, tmp_path / "qwen.gguf", Type.Q8_0, kinds={"output.weight": Type.Q4_1})
    lm = load_model(str(file), dtype="float32")
    found = load_codes(Path(lm.model.config.name_or_path))
    assert found["lm_head.weight"].kind == "Q4_1"
    assert len(found) == 7 * 2 + 2
    for name, weight in lm.model.named_parameters():
        if weight.dim() == 2:
            assert torch.equal(found[name].dequantized(torch.bfloat16).float(), weight), name


@pytest.mark.slow
def test_a_conversion_leaves_the_gguf_library_as_it_was(demo: LanguageModel, tmp_path: Path) -> None:
    """Meanwhile it shares a reader and a table of names with transformers."""
    import gguf

    before = gguf.GGUFReader, gguf.get_tensor_name_map
    file = write_gguf(demo.model, demo.tokenizer, tmp_path / "demo.gguf", Type.Q8_0)
    convert_gguf(file)
    (tmp_path / "broken.gguf").write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ModelError):
        convert_gguf(tmp_path / "broken.gguf")
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before
