"""Hooks that read block outputs, replace them and select positions."""

from __future__ import annotations

import pytest
import torch

from steering_vectors.models.blocks import find_blocks
from steering_vectors.models.hooks import PositionSelector, record, with_block_output
from tests.support.tiny import REQUIRED, tiny_model

IDS = torch.randint(2, 300, (3, 10), generator=torch.Generator().manual_seed(0))


def test_record_reads_the_blocks_asked_for_in_the_latest_pass() -> None:
    model = tiny_model("gpt2")
    blocks = find_blocks(model)
    with record(blocks, [2, 0]) as seen:
        model(IDS[:, :4])
        hidden_states = model(IDS, output_hidden_states=True).hidden_states
    assert sorted(seen) == [0, 2]
    assert torch.equal(seen[0], hidden_states[1])
    assert not torch.equal(seen[2], hidden_states[3])  # the last entry is after the final norm
    held = seen[2]
    model(IDS[:1])
    assert seen[2] is held


def test_block_outputs_keep_their_form() -> None:
    old, new = torch.zeros(1), torch.ones(1)
    assert with_block_output(old, new) is new
    assert with_block_output((old, "cache"), new) == (new, "cache")
    assert with_block_output([old, None], new) == [new, None]


@pytest.mark.parametrize("architecture", REQUIRED)
def test_selected_positions_equal_a_slice_of_all_logits(architecture: str) -> None:
    model = tiny_model(architecture)
    index = torch.tensor([[9, 0], [3, 3], [5, 9]])
    selector = PositionSelector(model.get_output_embeddings())
    full = model(IDS).logits
    with selector.select(index):
        chosen = model(IDS).logits
    assert chosen.shape == (3, 2, full.shape[-1])
    torch.testing.assert_close(chosen, full[torch.arange(3).unsqueeze(1), index])
    assert torch.equal(model(IDS).logits, full)
    selector.remove()
    assert not any(module._forward_pre_hooks for module in model.modules())
