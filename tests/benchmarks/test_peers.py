"""The benchmark against peers: its processes, its arithmetic, and the weights it hands to llama.cpp."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import gguf
import pytest
import torch
import typer
from safetensors.torch import load_file

from benchmarks.peers.cases import case_of
from benchmarks.peers.commands import Batch, Setup, steps_between
from benchmarks.peers.process import PeerFailed, PeerProcess, running
from benchmarks.peers.report import Outcome
from benchmarks.peers.venvs import VENVS
from benchmarks.peers.write_gguf import write_gguf
from tests.support.tiny import tiny_model

SETUP = Setup("model", "gguf", vocabulary=100, threads=1, rows=2, length=8, steered=False)
PEER = """
import sys
sys.path.append({benchmarks!r})
from commands import serve

class Peer:
    version = "a peer"
    def __init__(self, setup): self.setup = setup
    def prefill(self, batch): print("noise"); return self.setup.threads + batch.rows
    def tokens(self, batch): return batch.prompts
    def decode(self, batch): raise ValueError("it cannot")
    def steered(self, batch): sys.exit(3)

serve(Peer)
"""


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[PeerProcess]:
    script = tmp_path / "peer.py"
    script.write_text(PEER.format(benchmarks=str(Path(__file__).parents[2] / "benchmarks" / "peers")))
    with running((sys.executable, str(script)), SETUP, tmp_path / "log") as process:
        yield process


def ask(peer: PeerProcess, command: str) -> object:
    return peer.ask(command, rows=2, context=3, new=1, seed=5)


def test_a_peer_answers_and_is_stopped_in_between(peer: PeerProcess) -> None:
    assert peer.version == "a peer"
    assert ask(peer, "prefill") == 3
    assert ask(peer, "tokens") == Batch(2, 3, 1, seed=5, vocabulary=100).prompts
    state = Path(f"/proc/{peer.pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    assert state == "T"


def test_what_a_peer_cannot_do_is_told_with_its_reason(peer: PeerProcess) -> None:
    with pytest.raises(PeerFailed, match="it cannot"):
        ask(peer, "decode")
    assert ask(peer, "prefill") == 3


def test_a_peer_that_ends_is_told(peer: PeerProcess) -> None:
    with pytest.raises(PeerFailed, match="ended"):
        ask(peer, "steered")


def test_steps_count_while_all_rows_write() -> None:
    early, late = [0.0, 1.0, 2.0, 4.0], [2.0, 4.0, 7.0]
    assert steps_between([early, late]) == [2.0]


def test_ratios_are_within_pairs() -> None:
    found = Outcome("peer", "B1P32", "ms", ours=(1.0, 4.0, 9.0), theirs=(2.0, 4.0, 3.0)).summary
    assert (found["ratio"], found["ratio_range"]) == (1.0, [0.5, 3.0])


def test_cases_by_name() -> None:
    found = case_of("B16P512")
    assert (found.command, found.rows, found.context, found.unit) == ("decode", 16, 512, "ms")
    with pytest.raises(typer.BadParameter, match="B16P512"):
        case_of("B0P1")


def test_an_environment_counts_once_it_is_as_described(tmp_path: Path) -> None:
    venv = VENVS["llama"]
    assert venv.python(tmp_path) is None
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / ".installed").write_text(venv.description)
    assert venv.python(tmp_path) == tmp_path / "llama" / "bin" / "python"


def test_weights_as_gguf(tmp_path: Path) -> None:
    network = tiny_model("llama").to(torch.bfloat16)
    network.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    written = {tensor.name: tensor for tensor in gguf.GGUFReader(write_gguf(tmp_path)).tensors}
    assert len(written) == len(weights)

    def matrix(name: str) -> torch.Tensor:
        return torch.from_numpy(written[name].data.copy()).view(torch.bfloat16)

    assert torch.equal(matrix("blk.0.ffn_up.weight"), weights["model.layers.0.mlp.up_proj.weight"])
    heads = network.config.num_attention_heads
    query = weights["model.layers.0.self_attn.q_proj.weight"].unflatten(
        0, (heads, 2, -1)
    )  # [heads, half, pair, hidden]
    pairs = matrix("blk.0.attn_q.weight").unflatten(0, (heads, -1, 2))  # [heads, pair, half, hidden]
    assert torch.equal(pairs, query.transpose(1, 2))
