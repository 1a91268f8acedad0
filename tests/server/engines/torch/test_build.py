"""Whether an engine's weights are packed: by default, and as configured."""

from __future__ import annotations

import asyncio
import platform
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from server.engines.torch.build import build_engine
from server.settings import load_settings
from steering_vectors.errors import ModelError
from steering_vectors.runtime.cpu.kernels import load
from steering_vectors.runtime.cpu.packing import is_packed
from tests.support.running import outcomes, request
from tests.support.tiny import tiny_model
from tests.support.tiny_tokenizers import tiny_tokenizer

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or load() is None or platform.machine() != "x86_64",
    reason="this machine has no oneDNN or no kernels",
)
NOT_FUSED = "plain: in float32 packed weights are faster in fused blocks only, which this model cannot have here"


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[str], str]:
    def save(architecture: str) -> str:
        tiny_model(architecture).save_pretrained(tmp_path)
        tiny_tokenizer().save_pretrained(tmp_path)
        return str(tmp_path)

    return save


@pytest.mark.parametrize(
    ("architecture", "given", "path", "said"),
    [
        ("llama", None, "batched, fused blocks", "packed: 22 linear layers in 13 products, for fused blocks"),
        ("llama", True, "batched, fused blocks", "packed, as configured"),
        ("llama", False, "batched", "plain, as configured"),
        ("gemma3_text", None, "batched", NOT_FUSED),
        ("gemma3_text", True, "batched", "packed, as configured"),
    ],
)
def test_what_was_chosen_is_logged_once_and_is_true(
    saved: Callable[[str], str],
    architecture: str,
    given: bool | None,
    path: str,
    said: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "server.engines.torch.build")
    options = {} if given is None else {"cpu_prepack": given}
    engine = build_engine(load_settings({"model": saved(architecture), "slots": 2, **options}).engine_config())
    try:
        assert [one.getMessage() for one in caplog.records] == [f"the weights are {said}"]
        assert engine.info.path == path
        assert is_packed(engine._language_model.model) == said.startswith("packed")
    finally:
        asyncio.run(engine.close())


def test_what_cannot_be_packed_is_an_error_only_if_it_was_asked_for(
    saved: Callable[[str], str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "server.engines.torch.build")
    options = {"model": saved("llama"), "slots": 2, "dtype": "float16"}
    with pytest.raises(ModelError, match="oneDNN packs no weights of this kind here; leave cpu_prepack out"):
        build_engine(load_settings({**options, "cpu_prepack": True}).engine_config())
    asyncio.run(build_engine(load_settings(options).engine_config()).close())
    assert [one.getMessage() for one in caplog.records] == [
        "the weights are plain: oneDNN packs no weights in float16 here"
    ]


def test_greedy_tokens_are_those_of_the_plain_model(saved: Callable[[str], str]) -> None:
    model = saved("llama")

    def texts(**options: bool) -> list[tuple[int, ...]]:
        engine = build_engine(load_settings({"model": model, "slots": 2, **options}).engine_config())

        async def run() -> list[tuple[int, ...]]:
            prompts = ([5, 9, 3, 7, 11], list(range(4, 40)), [8, 2])
            found = await outcomes(engine, *(request(ids, max_tokens=20, ignore_eos=True) for ids in prompts))
            await engine.close()
            return [one.ids for one in found]

        return asyncio.run(run())

    assert texts() == texts(cpu_prepack=False)


@pytest.mark.parametrize(("given", "value"), [(None, None), ("true", True), ("false", False), ("on", True)])
def test_the_environment_has_three_values(
    monkeypatch: pytest.MonkeyPatch, given: str | None, value: bool | None
) -> None:
    if given is not None:
        monkeypatch.setenv("TRIMTAB_CPU_PREPACK", given)
    assert load_settings().engine_config().cpu_prepack is value


def test_a_revision_reaches_the_loader() -> None:
    with pytest.raises(ModelError, match=r"^revision 'v1' is for hub ids, and demo is not one: leave it out$"):
        build_engine(load_settings({"model": "demo", "revision": "v1"}).engine_config())
