"""From the chunks of a step to forward passes, and back from their output to requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from server.engines.torch.scheduling.request_state import Chunk
from server.engines.torch.token_details import Residuals
from steering_vectors.models.transfers import picked
from steering_vectors.runtime.runner import Output, RowInput, Runner


@dataclass(frozen=True, slots=True, eq=False)
class BatchOutput:
    """What one forward pass computed for a batch of chunks.

    `logits` are of each chunk's last token, `[chunks, vocabulary]`. `all_logits` are those of each chunk's tokens from
    the first scored one on, `[tokens, vocabulary]` a chunk, where the batch scores. `residuals` (at each row's last
    token) and `sums` (over its tokens) are by slot, where a layer was read.
    """

    logits: torch.Tensor
    all_logits: Sequence[torch.Tensor] = ()
    residuals: dict[int, Residuals] = field(default_factory=dict)
    sums: dict[int, Residuals] = field(default_factory=dict)


def run_batch(runner: Runner, batch: Sequence[Chunk]) -> BatchOutput:
    """One forward pass; the logits of the unsteered slots are left with their requests."""
    rows = [
        RowInput(
            chunk.slot, chunk.ids, chunk.start, chunk.state.steering.steered_from, max(1, chunk.end - chunk.scored_from)
        )
        for chunk in batch
    ]
    compared = [chunk for chunk in batch if chunk.state.unsteered_slot is not None]
    if compared:
        rows += [RowInput(chunk.state.unsteered_slot or 0, chunk.ids, chunk.start) for chunk in compared]
        rows.sort(key=lambda row: row.slot)
    places = {row.slot: place for place, row in enumerate(rows)}
    read = layers_to_read(batch)
    if batch[0].scores:
        scored = runner.forward_all(rows, read)
        all_logits = [scored.logits[places[chunk.slot]] for chunk in batch]
        return _output(torch.stack([one[-1] for one in all_logits]), all_logits, rows, scored)
    output = runner.forward(rows, read)
    logits = output.logits
    for chunk in compared:
        chunk.state.unsteered_logits = logits[places[chunk.state.unsteered_slot or 0]]
    if compared:
        logits = picked(logits, [places[chunk.slot] for chunk in batch])
    return _output(logits, [], rows, output)


def _output(
    logits: torch.Tensor, all_logits: list[torch.Tensor], rows: Sequence[RowInput], output: Output[Any]
) -> BatchOutput:
    slots = [row.slot for row in rows]
    residuals, sums = (dict(zip(slots, one, strict=False)) for one in (output.residuals, output.sums))
    return BatchOutput(logits, all_logits, residuals, sums)


def layers_to_read(batch: Sequence[Chunk]) -> list[int]:
    """The blocks whose output is projected before the next tokens are drawn, or decides a gate."""
    projected = {
        layer for chunk in batch if chunk.samples for profile in chunk.state.projected for layer in profile.layers
    }
    return sorted(projected.union(gate.layer for chunk in batch for gate in chunk.state.steering.undecided.values()))
