"""Two processes with half a model each write the same tokens as one process with all of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from server.settings import ConfigurationError, load_settings
from steering_vectors.models.loading import load_model
from tests.support.parallel_worker import CONTEXT, SLOTS, requests
from tests.support.running import run_all
from tests.support.tiny import save_tiny

pytestmark = pytest.mark.slow

gloo = torch.distributed.is_available() and torch.distributed.is_gloo_available()


@pytest.mark.skipif(not gloo, reason="this torch has no gloo")
def test_greedy_tokens_equal_those_of_one_process(tmp_path: Path) -> None:
    """Steered and unsteered rows with reused prefixes, live changes, ablations and projections, in float32."""
    save_tiny("llama", tmp_path / "llama")
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # on a free port
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    as_torchrun = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    common = {**os.environ, **meeting, **as_torchrun}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.support.parallel_worker", str(tmp_path / "llama")],
            env={**common, "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[3],
        )
        for rank in ("0", "1")
    ]
    whole = load_model(str(tmp_path / "llama"), dtype="float32")
    expected = run_all(whole, requests(whole), slots=SLOTS, context=CONTEXT, prefill_chunk=16)
    try:
        ends = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors for _, errors in ends)
    found = json.loads(ends[0][0].splitlines()[-1])
    assert found["ids"] == [list(one.ids) for one in expected]
    assert found["held"] < 0.6 * sum(one.numel() for one in whole.model.parameters())


def test_settings_that_exclude_tensor_parallelism_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ConfigurationError, match="--tensor-parallel needs torchrun"):
        load_settings({"tensor_parallel": True})
    monkeypatch.setenv("RANK", "0")
    assert load_settings({"tensor_parallel": True}).tensor_parallel
    with pytest.raises(ConfigurationError, match="--cpu-prepack does not go with --tensor-parallel"):
        load_settings({"tensor_parallel": True, "cpu_prepack": True})
    with pytest.raises(ConfigurationError, match="--quantize does not go with --tensor-parallel"):
        load_settings({"tensor_parallel": True, "quantize": "int8"})
    with pytest.raises(ConfigurationError, match="with --tensor-parallel give cpu or cuda alone"):
        load_settings({"tensor_parallel": True, "device": "cuda:1"})
