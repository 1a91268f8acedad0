"""Decoding over static buffers: a step that reads nothing but what lies at fixed addresses, so that it can be recorded
once and replayed.

A step computes one token of each of the slots 0 … rows - 1 and reads so many columns of each; both are rounded up to
buckets, and there is one step for every pair that came up. What differs between two runs of a step lies in buffers: the
tokens, where they stand, which column they are written to, and the bank's shifts, which every block adds, zeros too.
Slots that do not run compute something as well, and write it to the spare column. Logits are left in one buffer for all
steps, and hold until the next step runs. Knows nothing of how a step is replayed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from steering_vectors.errors import first_line
from steering_vectors.models.loading import LanguageModel
from steering_vectors.models.transfers import staged
from steering_vectors.runtime.runner import BatchedRunner, Output, RowInput
from steering_vectors.runtime.slot_cache import AttentionMetadata
from steering_vectors.steering.accelerated_bank import AcceleratedBank

logger = logging.getLogger(__name__)

LEAST_COLUMNS = 128
ID, POSITION, COLUMN, PLACE = range(4)


class Replay(Protocol):
    """Runs a step again, over what its buffers hold now."""

    def __call__(self) -> None: ...


Recorder = Callable[[Callable[[], None]], Replay]
"""Makes a step replayable. It may run the step any number of times before: its inputs are the real ones."""


def run_as_it_is(step: Callable[[], None]) -> Replay:
    """Record nothing: every replay is a run of its own. On any device."""
    return step


def bucket(count: int, least: int, most: int) -> int:
    """The power of two that holds `count`, from `least` on; `most` where that is less."""
    size = least
    while size < count:
        size *= 2
    return min(size, most)


class Inputs:
    """What a step reads besides the caches and the bank, int64 `[slots, 4]`: each slot's token, its position, the
    column it is written to; and, in the order of the batch instead, the slots whose logits are wanted."""

    def __init__(self, slots: int, spare: int, device: torch.device) -> None:
        self._idle = torch.tensor([[0, 0, spare, 0]] * slots)
        self.slots = torch.arange(slots, device=device).unsqueeze(1)  # [slots, 1]
        self.held = self._idle.to(device, copy=True)

    def fill(self, batch: Sequence[RowInput], rows: int) -> None:
        """One copy, which the host does not wait for."""
        values = self._idle[:rows].clone()
        slots = torch.tensor([work.slot for work in batch])
        values[slots, :PLACE] = torch.tensor([[work.ids[0], work.start, work.start] for work in batch])
        values[: len(batch), PLACE] = slots
        self.held[:rows].copy_(staged(values, self.held.device), non_blocking=True)


class StaticRunner(BatchedRunner):
    """Rows that decode are computed over static buffers, everything else as by the batched runner: prompts, passes
    whose residuals are read, and whatever a bank does besides adding."""

    path = "batched, decoding over static buffers"

    def __init__(
        self, language_model: LanguageModel, bank: AcceleratedBank, *, context: int, record: Recorder = run_as_it_is
    ) -> None:
        super().__init__(language_model, bank, context=context)
        self._inputs_held = Inputs(bank.num_rows, context, self.device)
        self._logits_held: torch.Tensor | None = None  # [slots, vocabulary]
        self._record = record
        self._replays: dict[tuple[int, int], Replay] = {}

    def forward(self, batch: Sequence[RowInput], read: Sequence[int] = ()) -> Output[torch.Tensor]:
        if read or not self._is_static(batch):
            return super().forward(batch, read)
        rows = bucket(batch[-1].slot + 1, 1, self.bank.num_rows)
        columns = bucket(max(work.end for work in batch), min(LEAST_COLUMNS, self.context), self.context)
        self._inputs_held.fill(batch, rows)
        if (rows, columns) not in self._replays:
            self._replays[rows, columns] = self._recorded(rows, columns)
        self._replays[rows, columns]()
        assert self._logits_held is not None
        if batch[-1].slot + 1 == len(batch):
            return Output(self._logits_held[: len(batch)])
        return Output(self._logits_held.index_select(0, self._inputs_held.held[: len(batch), PLACE]))

    def step(self, rows: int, columns: int) -> Callable[[], None]:
        """A step of the slots below `rows` that reads `columns`, and nothing but buffers."""
        inputs, every = self._inputs_held.held[:rows], slice(0, rows)
        positions = inputs[:, POSITION : POSITION + 1]
        metadata = AttentionMetadata(
            every, self._inputs_held.slots[:rows], positions, inputs[:, COLUMN : COLUMN + 1], columns
        )
        arguments: dict[str, Any] = {"position_ids": positions} if self._takes_positions else {}

        def compute() -> None:
            with self.cache.forward_pass(metadata), self.bank.step(every, always=True):
                output = self.model(
                    input_ids=inputs[:, ID : ID + 1], past_key_values=self.cache, use_cache=True, **arguments
                )
            self._keep(output.logits[:, -1])

        return compute

    def _recorded(self, rows: int, columns: int) -> Replay:
        """A step recorded; or as it is, where that fails (for want of memory) although others were recorded before."""
        step = self.step(rows, columns)
        try:
            return self._record(step)
        except RuntimeError as error:
            if not self._replays:
                raise
            logger.warning("a step of %d rows and %d columns is not recorded: %s", rows, columns, first_line(error))
            return run_as_it_is(step)

    def close(self) -> None:
        self._replays.clear()
        super().close()

    def _is_static(self, batch: Sequence[RowInput]) -> bool:
        """Whether a batch is of one token a row, steered by nothing but the bank's shifts or not at all."""
        return self.bank.only_adds and all(
            len(work.ids) == 1 and (work.steered_from is None or work.start >= work.steered_from) for work in batch
        )

    def _keep(self, logits: torch.Tensor) -> None:
        if self._logits_held is None:
            self._logits_held = logits.new_empty(self.bank.num_rows, logits.shape[-1])
        self._logits_held[: len(logits)].copy_(logits)
