"""A model's fingerprint does not depend on its storage, and differs for other weights or another shape."""

from __future__ import annotations

import re
from itertools import combinations
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from steering_vectors.models.fingerprint import fingerprint_checkpoint, fingerprint_parameters, weight_files
from steering_vectors.models.loading import load_model, wrap_model
from tests.support.tiny import ARCHITECTURES, REQUIRED, save_tiny, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("qwen3_moe", tmp_path_factory.mktemp("models") / "tiny")


def stored(directory: Path, model_directory: Path) -> str:
    return fingerprint_checkpoint(directory, load_model(str(model_directory)).model.config)


def test_loading_does_not_change_it(directory: Path) -> None:
    by_dtype = {load_model(str(directory), dtype=dtype).identity.fingerprint for dtype in ("float32", "bfloat16")}
    assert by_dtype == {stored(directory, directory)}
    assert re.fullmatch("[0-9a-f]{64}", by_dtype.pop())


def test_shards_do_not_change_it(directory: Path, tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe")
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(weight_files(tmp_path)) > 2
    assert stored(tmp_path, directory) == stored(directory, directory)


def test_other_files_beside_the_weights_do_not_change_it(directory: Path, tmp_path: Path) -> None:
    before = stored(directory, directory)
    tiny_model("qwen3_moe").save_pretrained(tmp_path, max_shard_size="60KB")
    save_file({"adapter": torch.ones(3)}, tmp_path / "adapter_model.safetensors")
    assert stored(tmp_path, directory) == before


def test_without_an_index_all_files_count(tmp_path: Path) -> None:
    for name in ("b", "a"):
        save_file({name: torch.ones(2)}, tmp_path / f"{name}.safetensors")
    assert [file.name for file in weight_files(tmp_path)] == ["a.safetensors", "b.safetensors"]


def test_other_weights_change_it(directory: Path, tmp_path: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    save_file({**tensors, name: tensors[name] * 1.01}, tmp_path / "model.safetensors")
    assert stored(tmp_path, directory) != stored(directory, directory)


def test_another_name_of_a_tensor_changes_it(directory: Path, tmp_path: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors["model.other.weight"] = tensors.pop("model.norm.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    assert stored(tmp_path, directory) != stored(directory, directory)


def test_scalars_and_empty_tensors_are_read(tmp_path: Path) -> None:
    config = tiny_model("llama").config

    def of(scalar: float) -> str:
        save_file({"scalar": torch.tensor(scalar), "empty": torch.zeros(0, 4)}, tmp_path / "model.safetensors")
        return fingerprint_checkpoint(tmp_path, config)

    assert of(1.0) == of(1.0) != of(2.0)


def test_a_model_in_memory_is_known_by_its_parameters() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    first = wrap_model(model, tokenizer).identity.fingerprint
    assert first == fingerprint_parameters(tiny_model("llama")) == wrap_model(model, tokenizer).identity.fingerprint
    model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    assert wrap_model(model, tokenizer).identity.fingerprint != first


def test_another_shape_is_another_model() -> None:
    assert fingerprint_parameters(tiny_model("llama")) != fingerprint_parameters(
        tiny_model("llama", num_hidden_layers=2)
    )
    assert fingerprint_parameters(tiny_model("llama")) != fingerprint_parameters(
        tiny_model("llama", num_attention_heads=2)
    )


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_has_one_that_any_parameter_changes(architecture: str) -> None:
    model = tiny_model(architecture)
    first = fingerprint_parameters(model)
    assert re.fullmatch("[0-9a-f]{64}", first)
    parameters = list(model.parameters())
    for parameter in (parameters[0], parameters[len(parameters) // 2], parameters[-1]):
        kept = parameter.clone()
        parameter += 1
        assert fingerprint_parameters(model) != first
        parameter.copy_(kept)
        assert fingerprint_parameters(model) == first


def test_two_architectures_share_one_only_if_they_share_all_parameters() -> None:
    models = {architecture: tiny_model(architecture) for architecture in REQUIRED}
    prints = {architecture: fingerprint_parameters(model) for architecture, model in models.items()}
    for one, other in combinations(REQUIRED, 2):
        first, second = (dict(models[name].named_parameters()) for name in (one, other))
        alike = first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
        assert (prints[one] == prints[other]) == alike
    assert len(set(prints.values())) == len(REQUIRED) - 1  # Llama and Mistral differ only in the window
