"""Runners that compute one row after the other, for architectures that the slot cache does not fit."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch

from steering_vectors.errors import ModelError
from steering_vectors.models.forward import last_logits, state_argument, takes
from steering_vectors.models.loading import LanguageModel
from steering_vectors.runtime.runner import Output, Residuals, RowInput, Runner, output_of
from steering_vectors.steering.bank import SteeringBank


class _OneByOne(Runner):
    """Computes each row in a forward pass of its own."""

    def forward(self, batch: Sequence[RowInput], read: Sequence[int] = ()) -> Output[torch.Tensor]:
        output = self.forward_all(batch, read)
        return Output(torch.stack([logits[-1] for logits in output.logits]), output.residuals, output.sums)

    def forward_all(self, batch: Sequence[RowInput], read: Sequence[int] = ()) -> Output[list[torch.Tensor]]:
        logits: list[torch.Tensor] = []
        residuals: dict[int, Residuals] = {}
        sums: dict[int, Residuals] = {}
        for row in batch:
            output = self._row(row, read)
            logits.append(output.logits[-row.wanted :])
            residuals.update(output.residuals)
            sums.update(output.sums)
        return Output(logits, residuals, sums)

    @abstractmethod
    def _row(self, row: RowInput, read: Sequence[int]) -> Output[torch.Tensor]:
        """The logits of all of a row's tokens, `[tokens, vocabulary]`."""


class RowRunner(_OneByOne):
    """Runs over the cache that the model itself makes: for architectures whose state is not keys and values by
    position (recurrent, hybrid, layers that share a cache)."""

    path = "row by row"

    def __init__(self, language_model: LanguageModel, bank: SteeringBank, *, context: int, chunked: bool) -> None:
        super().__init__(language_model, bank, context=context)
        self.chunked = chunked
        self._takes_positions = takes(self.model, "position_ids")
        state_name = state_argument(self.model)
        if state_name is None:
            raise ModelError("the model's forward takes no state")
        self._state_name = state_name
        self._states: dict[int, Any] = {}

    def release(self, slot: int) -> None:
        self._states.pop(slot, None)

    def _row(self, row: RowInput, read: Sequence[int]) -> Output[torch.Tensor]:
        if row.start == 0:
            self.release(row.slot)
        ids = torch.tensor([list(row.ids)], device=self.device)
        inputs: dict[str, Any] = {"input_ids": ids, "use_cache": True, self._state_name: self._states.get(row.slot)}
        if self._takes_positions:
            inputs["position_ids"] = torch.arange(row.start, row.end, device=self.device).unsqueeze(0)
        where = torch.tensor([row.steered()], device=self.device)
        with self.bank.step(slice(row.slot, row.slot + 1), where), self._recording(read) as recorded:
            output = self.model(**inputs)
        self._states[row.slot] = output[self._state_name]
        return output_of(last_logits(output, len(row.ids)), recorded, {row.slot: (0, slice(None))})


class RecomputingRunner(_OneByOne):
    """Runs without any cache: slow, and correct for every model that computes logits from ids."""

    path = "recomputing"

    def __init__(self, language_model: LanguageModel, bank: SteeringBank, *, context: int) -> None:
        super().__init__(language_model, bank, context=context)
        self._ids: dict[int, list[int]] = {}

    def release(self, slot: int) -> None:
        self._ids.pop(slot, None)

    def _row(self, row: RowInput, read: Sequence[int]) -> Output[torch.Tensor]:
        self._ids[row.slot] = [*self._ids.get(row.slot, [])[: row.start], *row.ids]
        whole = RowInput(row.slot, self._ids[row.slot], 0, row.steered_from)
        ids = torch.tensor([whole.ids], device=self.device)
        where = torch.tensor([whole.steered()], device=self.device)
        with self.bank.step(slice(row.slot, row.slot + 1), where), self._recording(read) as recorded:
            output = self.model(input_ids=ids, use_cache=False)
        return output_of(last_logits(output, len(row.ids)), recorded, {row.slot: (0, slice(row.start, row.end))})
