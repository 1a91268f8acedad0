"""Decoding over static buffers: a step reads only tensors at fixed addresses, so it can be recorded and replayed.

A step computes one token of each of the slots 0 … rows - 1 and reads a number of cache columns. Both numbers are
rounded up to buckets, and each pair of buckets has one step. Everything that differs between two runs of a step lies in
buffers: the tokens, their positions, the columns they are written to, and the bank's shifts, which every block adds,
zeros included. Slots that are not in the batch are computed too and write to the spare column. All steps leave their
logits in one buffer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from steering_vectors.errors import first_line
from steering_vectors.models.loading import LanguageModel
from steering_vectors.models.transfers import staged
from steering_vectors.runtime.runner import BatchedRunner, Output, RowInput
from steering_vectors.runtime.slot_cache import AttentionMetadata
from steering_vectors.steering.accelerated_bank import AcceleratedBank

logger = logging.getLogger(__name__)

MIN_COLUMNS = 128
WARM_UP = 2  # runs of a step before it is recorded as a CUDA graph
ID, POSITION, COLUMN, PLACE = range(4)


Replay = Callable[[], None]
"""Runs a step again, over the current contents of its buffers."""

Recorder = Callable[[Callable[[], None]], Replay]
"""Makes a step replayable. It may run the step any number of times first: the inputs are the real ones."""


def run_as_it_is(step: Callable[[], None]) -> Replay:
    """Record nothing: each replay runs the step again. Works on any device."""
    return step


def bucket(count: int, least: int, most: int) -> int:
    """The smallest power of two times `least` that is at least `count`, but at most `most`."""
    size = least
    while size < count:
        size *= 2
    return min(size, most)


class InputBuffer:
    """What a step reads besides the caches and the bank, int64 `[slots, 4]`.

    The first three numbers of a row are its slot's token, position and column. The fourth is in batch order: the slots
    whose logits are wanted.
    """

    def __init__(self, slots: int, spare: int, device: torch.device) -> None:
        self._idle = torch.tensor([[0, 0, spare, 0]] * slots)
        self.slots = torch.arange(slots, device=device).unsqueeze(1)  # [slots, 1]
        self.tensor = self._idle.to(device, copy=True)

    def fill(self, batch: Sequence[RowInput], rows: int) -> None:
        """Copy the batch to the device without waiting for it."""
        values = self._idle[:rows].clone()
        slots = torch.tensor([row.slot for row in batch])
        values[slots, :PLACE] = torch.tensor([[row.ids[0], row.start, row.start] for row in batch])
        values[: len(batch), PLACE] = slots
        self.tensor[:rows].copy_(staged(values, self.tensor.device), non_blocking=True)


class StaticRunner(BatchedRunner):
    """Computes decoding rows over static buffers.

    Prompts, passes whose residuals are read, and steering that does more than add are computed as by BatchedRunner.
    """

    path = "batched, decoding over static buffers"
    bank: AcceleratedBank

    def __init__(
        self, language_model: LanguageModel, bank: AcceleratedBank, *, context: int, record: Recorder = run_as_it_is
    ) -> None:
        super().__init__(language_model, bank, context=context)
        self._input_buffer = InputBuffer(bank.num_rows, context, self.device)
        self._logits_buffer: torch.Tensor | None = None  # [slots, vocabulary]
        self._record = record
        self._replays: dict[tuple[int, int], Replay] = {}

    def forward(self, batch: Sequence[RowInput], read: Sequence[int] = ()) -> Output[torch.Tensor]:
        if read or not self._is_static(batch):
            return super().forward(batch, read)
        rows = bucket(batch[-1].slot + 1, 1, self.bank.num_rows)
        columns = bucket(max(row.end for row in batch), min(MIN_COLUMNS, self.context), self.context)
        self._input_buffer.fill(batch, rows)
        if (rows, columns) not in self._replays:
            self._replays[rows, columns] = self._recorded(rows, columns)
        self._replays[rows, columns]()
        assert self._logits_buffer is not None
        if batch[-1].slot + 1 == len(batch):
            return Output(self._logits_buffer[: len(batch)])
        return Output(self._logits_buffer.index_select(0, self._input_buffer.tensor[: len(batch), PLACE]))

    def step(self, rows: int, columns: int) -> Callable[[], None]:
        """A step over the slots below `rows` that reads so many columns."""
        inputs, every = self._input_buffer.tensor[:rows], slice(0, rows)
        positions = inputs[:, POSITION : POSITION + 1]
        metadata = AttentionMetadata(
            every, self._input_buffer.slots[:rows], positions, inputs[:, COLUMN : COLUMN + 1], columns
        )
        arguments: dict[str, Any] = {"position_ids": positions} if self._takes_positions else {}

        def compute() -> None:
            with self.cache.forward_pass(metadata), self.bank.step(every, always=True):
                output = self.model(
                    input_ids=inputs[:, ID : ID + 1], past_key_values=self.cache, use_cache=True, **arguments
                )
            logits = output.logits[:, -1]
            if self._logits_buffer is None:
                self._logits_buffer = logits.new_empty(self.bank.num_rows, logits.shape[-1])
            self._logits_buffer[:rows].copy_(logits)

        return compute

    def _recorded(self, rows: int, columns: int) -> Replay:
        """The step, recorded. If that fails after others were recorded (out of memory), it is run as it is."""
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
        """Whether each row is one token, steered by the bank's shifts alone or not at all."""
        return self.bank.only_adds and all(
            len(row.ids) == 1 and (row.steered_from is None or row.start >= row.steered_from) for row in batch
        )


class GraphRecorder:
    """Records steps on one CUDA device as graphs. The tensors that a step reads must stay at their addresses.

    All graphs share one memory pool, which is safe because they never run at the same time and copy their results to a
    buffer outside of the pool.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Callable[[], None]) -> Replay:
        """Run the step a few times, so that everything made at first use exists, then record it.

        Raises RuntimeError if the step does what a graph cannot hold, such as waiting for the device.
        """
        current = torch.cuda.current_stream(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(current):  # a recording that fails would leave the side stream the current one
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                for _ in range(WARM_UP):
                    step()
            current.wait_stream(self._stream)
            # other threads may use the device meanwhile, to check a profile
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                step()
        return graph.replay


class GraphRunner(StaticRunner):
    """The static runner on a CUDA device, its steps replayed as graphs.

    A graph is recorded when its pair of buckets first comes up, which takes as long as a few tens of steps. There are
    dozens of pairs, few of which a server meets, so recording all of them would only delay the start.
    """

    path = "batched, CUDA graphs"

    def __init__(self, language_model: LanguageModel, bank: AcceleratedBank, *, context: int) -> None:
        super().__init__(language_model, bank, context=context, record=GraphRecorder(language_model.device))
