"""Every thread has its own number of compute threads."""

from __future__ import annotations

import asyncio
import builtins
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from server.engines.config import EngineConfig
from server.engines.torch.engine import TorchEngine
from steering_vectors.models.loading import wrap_model
from steering_vectors.runtime.cpu.threads import processors, run_apart
from tests.support.running import outcome, prompts, request
from tests.support.tiny import tiny_model
from tests.support.tiny_tokenizers import tiny_tokenizer


@pytest.fixture(autouse=True)
def own_number() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Watched(TorchEngine):
    """Records the number of compute threads of each step."""

    def __init__(self, *given: Any, **options: Any) -> None:
        self.counts: set[int] = set()
        super().__init__(*given, **options)

    def step(self) -> None:
        super().step()
        self.counts.add(torch.get_num_threads())


@pytest.mark.parametrize(("own", "others"), [(3, 1), (1, 3)])
def test_the_engine_keeps_its_number_when_others_get_another(own: int, others: int) -> None:
    torch.set_num_threads(own)
    language_model = wrap_model(tiny_model("llama"), tiny_tokenizer())
    engine = Watched(language_model, EngineConfig(slots=2, context=64))
    torch.set_num_threads(others)

    async def main() -> None:
        (ids,) = prompts(language_model, [5])
        await outcome(engine, request(ids, max_tokens=4))
        await engine.close()

    asyncio.run(main())
    assert engine.counts == {own}
    assert torch.get_num_threads() == others


def test_run_apart_does_not_change_the_number_of_threads() -> None:
    torch.set_num_threads(2)

    def work() -> int:
        torch.set_num_threads(3)
        return torch.get_num_threads()

    assert run_apart(work) == 3
    assert torch.get_num_threads() == 2
    assert run_apart(torch.get_num_threads) == 2
    with pytest.raises(ZeroDivisionError):
        run_apart(lambda: 1 // 0)


@pytest.mark.skipif(sys.platform != "linux", reason="affinity is Linux's")
def test_no_more_threads_than_this_process_may_use() -> None:
    allowed = os.sched_getaffinity(0)
    torch.set_num_threads(len(allowed))
    assert processors() <= len(allowed)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert processors() == 1
    finally:
        os.sched_setaffinity(0, allowed)
    torch.set_num_threads(1)  # torch.set_num_threads can lower the number
    assert processors() == 1


@pytest.mark.skipif(sys.platform != "linux", reason="control groups are Linux's")
@pytest.mark.parametrize(("quota", "threads"), [("100000 100000", 1), ("50000 100000", 1), ("max 100000", None)])
def test_no_more_threads_than_the_container_has_time_for(
    quota: str, threads: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cgroup file gives the CPU time, in microseconds per period, that all threads share."""
    (tmp_path / "cpu.max").write_text(quota)
    opened, there = builtins.open, os.path.exists

    def elsewhere(path: Any) -> Any:
        return tmp_path / "cpu.max" if path == "/sys/fs/cgroup/cpu.max" else path

    monkeypatch.setattr(builtins, "open", lambda path, *given, **options: opened(elsewhere(path), *given, **options))
    monkeypatch.setattr(os.path, "exists", lambda path: there(elsewhere(path)))
    allowed = len(os.sched_getaffinity(0))
    torch.set_num_threads(allowed)
    assert processors() == (threads or allowed)
