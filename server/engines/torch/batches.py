"""From a step's chunks to the runner's work, and from its residuals back to layers.

Owns which slots a pass computes (each chunk's own and, where divergences are wanted, its shadow's) and which blocks it
reads. Knows nothing of tokens drawn or of requests' ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from server.engines.torch.request import Residuals
from server.engines.torch.scheduling.request_state import Chunk
from steering_vectors.models.transfers import picked
from steering_vectors.runtime.runner import Output, RowInput, Runner


class Passes:
    """The forward passes of one runner."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._residuals: dict[int, Residuals] = {}
        self._sums: dict[int, Residuals] = {}

    def forward(self, batch: Sequence[Chunk]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Logits of each chunk's last token `[chunks, vocabulary]`, and those of shadows by request."""
        works, shadowed = self._inputs(batch)
        output = self._runner.forward(works, _layers_to_read(batch))
        self._keep(works, output)
        logits = output.logits
        if not shadowed:
            return logits, {}
        places = {work.slot: place for place, work in enumerate(works)}
        shadows = {chunk.sequence.request.id: logits[places[chunk.sequence.shadow or 0]] for chunk in shadowed}
        return picked(logits, [places[chunk.slot] for chunk in batch]), shadows

    def forward_all(self, batch: Sequence[Chunk]) -> list[torch.Tensor]:
        """Logits of each chunk's tokens from the first scored one on, `[tokens, vocabulary]` a chunk."""
        works, _ = self._inputs(batch)
        output = self._runner.forward_all(works, _layers_to_read(batch))
        self._keep(works, output)
        found = {work.slot: logits for work, logits in zip(works, output.logits, strict=True)}
        return [found[chunk.slot] for chunk in batch]

    def residuals(self) -> dict[int, Residuals]:
        """At each slot's last token of its latest pass, by layer, where they were to be read."""
        return self._residuals

    def sums(self, slot: int) -> Residuals:
        """Over the tokens of a slot's latest pass, by layer."""
        return self._sums[slot]

    def _keep(self, works: list[RowInput], output: Output[Any]) -> None:
        slots = [work.slot for work in works]
        self._residuals = dict(zip(slots, output.residuals, strict=False))
        self._sums = dict(zip(slots, output.sums, strict=False))

    def _inputs(self, batch: Sequence[Chunk]) -> tuple[list[RowInput], list[Chunk]]:
        """The work in order of slots, and the chunks that have a shadow."""
        shadowed = [chunk for chunk in batch if chunk.sequence.shadow is not None]
        works = [
            RowInput(
                chunk.slot, chunk.ids, chunk.start, chunk.sequence.steered_from, max(1, chunk.end - chunk.scored_from)
            )
            for chunk in batch
        ]
        if shadowed:
            works += [RowInput(chunk.sequence.shadow or 0, chunk.ids, chunk.start) for chunk in shadowed]
            works.sort(key=lambda work: work.slot)
        return works, shadowed


def _layers_to_read(batch: Sequence[Chunk]) -> list[int]:
    """The blocks whose output is projected before the next tokens are drawn, or decides a gate."""
    asking = (chunk.sequence.request.projections for chunk in batch if chunk.samples)
    projected = {layer for profiles in asking for profile in profiles for layer in profile.layers}
    return sorted(projected.union(gate.layer for chunk in batch for gate in chunk.sequence.undecided.values()))
