"""Runners compute forward passes over rows of several sequences: token ids and positions in, an `Output` out.

`BatchedRunner` runs any model with plain KV attention in one pass over the slot cache. `choose_runner` compares each
runner with the plain model before it is used.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch

from steering_vectors.errors import ModelError
from steering_vectors.models.forward import takes
from steering_vectors.models.hooks import PositionSelector, record
from steering_vectors.models.loading import LanguageModel
from steering_vectors.models.transfers import picked, tensor_on
from steering_vectors.runtime.slot_cache import AttentionMetadata, Columns, SlotCache, Slots, install_row_masks
from steering_vectors.steering.bank import SteeringBank

BUCKET = 16  # the number of columns read is rounded up to a multiple of this

Residuals = Mapping[int, torch.Tensor]
"""Block outputs after steering, float32 `[hidden]`, by layer."""

Logits = TypeVar("Logits")


@dataclass(frozen=True, slots=True)
class RowInput:
    """The tokens of one slot to compute: `ids` at positions `start`, `start + 1`, ….

    Positions from `steered_from` on are steered, none if it is None. `forward_all` returns the logits of the last
    `wanted` tokens.
    """

    slot: int
    ids: Sequence[int]
    start: int
    steered_from: int | None = None
    wanted: int = 1

    @property
    def end(self) -> int:
        return self.start + len(self.ids)

    def steered(self) -> list[bool]:
        first = self.end if self.steered_from is None else self.steered_from
        return [position >= first for position in range(self.start, self.end)]


@dataclass(frozen=True, slots=True, eq=False)
class Output(Generic[Logits]):
    """What one forward pass computed: the logits of each row of the batch, and by slot the requested block outputs at
    the row's last token (`residuals`) and summed over its tokens (`sums`)."""

    logits: Logits
    residuals: Mapping[int, Residuals] = field(default_factory=dict)
    sums: Mapping[int, Residuals] = field(default_factory=dict)


class Runner(ABC):
    """Computes logits and keeps the state that later passes need.

    A batch has at most one row for each slot, in ascending order of slots. `read` names the layers whose residuals are
    returned.
    """

    path: str
    chunked: bool = True  # whether a prompt may be computed in several passes

    def __init__(self, language_model: LanguageModel, bank: SteeringBank, *, context: int) -> None:
        self.model = language_model.model
        self.bank = bank
        self.context = context
        self.device = language_model.device
        self._blocks = language_model.blocks

    @abstractmethod
    def forward(self, batch: Sequence[RowInput], read: Sequence[int] = ()) -> Output[torch.Tensor]:
        """Logits of each row's last token, `[rows, vocabulary]`. They hold until the next pass."""

    @abstractmethod
    def forward_all(self, batch: Sequence[RowInput], read: Sequence[int] = ()) -> Output[list[torch.Tensor]]:
        """Logits of each row's wanted tokens, `[tokens, vocabulary]` a row."""

    @property
    def columns(self) -> Columns | None:
        """The KV cache by slot and position; None if the state has another form."""
        return None

    def release(self, slot: int) -> None:  # noqa: B027 (optional)
        """Drop a slot's state."""

    def zero_slot(self, slot: int) -> None:
        """Drop a slot's state and overwrite it: non-finite keys would reach the next row even where they are masked."""
        self.release(slot)

    def close(self) -> None:  # noqa: B027 (optional)
        """Remove the hooks from the model."""

    def _recording(self, read: Sequence[int]) -> AbstractContextManager[dict[int, torch.Tensor]]:
        """The requested block outputs of the pass run inside, by layer."""
        return record(self._blocks, read) if read else nullcontext({})


class BatchedRunner(Runner):
    """All rows in one forward pass over the slot cache."""

    path = "batched"

    def __init__(self, language_model: LanguageModel, bank: SteeringBank, *, context: int) -> None:
        super().__init__(language_model, bank, context=context)
        projection = self.model.get_output_embeddings()
        if projection is None:
            raise ModelError("the model names no output projection")
        install_row_masks()
        layers = int(self.model.config.get_text_config().num_hidden_layers)
        self.cache = SlotCache(layers=layers, slots=bank.num_rows, context=context)
        self._selector = PositionSelector(projection)
        self._takes_positions = takes(self.model, "position_ids")

    def forward(self, batch: Sequence[RowInput], read: Sequence[int] = ()) -> Output[torch.Tensor]:
        width = max(len(row.ids) for row in batch)
        slots, rows = self._with_idle_rows(batch, width)
        last = self._tensor([[len(row.ids) - 1] for row in rows])
        selected, recorded = self._pass(slots, rows, width, last, read)
        logits = selected[:, 0]
        if len(rows) != len(batch):
            logits = picked(logits, [row.slot - rows[0].slot for row in batch])
        return output_of(logits, recorded, _places(batch, rows)) if read else Output(logits)

    def forward_all(self, batch: Sequence[RowInput], read: Sequence[int] = ()) -> Output[list[torch.Tensor]]:
        width = max(len(row.ids) for row in batch)
        slots, rows = self._with_idle_rows(batch, width)
        most = max(row.wanted for row in batch)
        firsts = [len(row.ids) - row.wanted for row in rows]
        wanted = self._tensor([[min(first + place, width - 1) for place in range(most)] for first in firsts])
        selected, recorded = self._pass(slots, rows, width, wanted, read)
        places = _places(batch, rows)
        logits = [selected[places[row.slot][0], : row.wanted] for row in batch]
        return output_of(logits, recorded, places)

    def _pass(
        self, slots: Slots, rows: list[RowInput], width: int, wanted: torch.Tensor, read: Sequence[int]
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """Logits `[rows, k, vocabulary]` at the wanted places `[rows, k]` among each row's tokens, and the requested
        block outputs `[rows, width, hidden]` by layer."""
        metadata, ids = self._inputs(rows, slots, width)
        where = self._where(rows, width)
        positions = {"position_ids": metadata.positions} if self._takes_positions else {}
        with (
            self.cache.forward_pass(metadata),
            self.bank.step(slots, where),
            self._selector.select(wanted),
            self._recording(read) as recorded,
        ):
            output = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, **positions)
        return output.logits, recorded

    @property
    def columns(self) -> Columns:
        return self.cache

    def zero_slot(self, slot: int) -> None:
        self.cache.zero(slot)

    def close(self) -> None:
        self._selector.remove()

    def _with_idle_rows(self, batch: Sequence[RowInput], width: int) -> tuple[Slots, list[RowInput]]:
        """The rows to compute and their slots, as a slice if possible: the cache is then read as a view, not a copy.

        A few gaps between decoding rows are filled with idle rows, which cost less than the copy.
        """
        first, end = batch[0].slot, batch[-1].slot + 1
        if end - first == len(batch):
            return slice(first, end), list(batch)
        if width == 1 and end - first <= 2 * len(batch):
            by_slot = {row.slot: row for row in batch}
            filled = [by_slot.get(slot) or RowInput(slot, [0], self.context) for slot in range(first, end)]
            return slice(first, end), filled
        return self._tensor([row.slot for row in batch]), list(batch)

    def _inputs(self, rows: Sequence[RowInput], slots: Slots, width: int) -> tuple[AttentionMetadata, torch.Tensor]:
        ids, positions, columns = [], [], []
        for row in rows:
            padding = width - len(row.ids)
            here = list(range(row.start, row.end))
            ids.append([*row.ids, *[0] * padding])
            columns.append(here + [self.context] * padding)
            # an idle row attends to its first column only
            here = here if row.start < self.context else [0]
            positions.append(here + here[-1:] * padding)
        longest = max(row[-1] for row in positions) + 1
        length = min(self.context, -(-longest // BUCKET) * BUCKET)
        tensor = self._tensor
        index = tensor([row.slot for row in rows]).unsqueeze(1)
        return AttentionMetadata(slots, index, tensor(positions), tensor(columns), length), tensor(ids)

    def _where(self, rows: Sequence[RowInput], width: int) -> torch.Tensor | None:
        """None if every position of every steered row is steered, which is the fast case."""
        steered = [row.steered() for row in rows]
        if all(all(flags) for flags, row in zip(steered, rows, strict=True) if row.steered_from is not None):
            return None
        return self._tensor([flags + [False] * (width - len(flags)) for flags in steered])

    def _tensor(self, values: Any) -> torch.Tensor:
        return tensor_on(values, self.device)


def _places(batch: Sequence[RowInput], rows: Sequence[RowInput]) -> dict[int, tuple[int, slice]]:
    """By slot of the batch, its place among the rows computed, and the positions of its tokens there."""
    places = {row.slot: place for place, row in enumerate(rows)}
    return {row.slot: (places[row.slot], slice(len(row.ids))) for row in batch}


def output_of(
    logits: Logits, recorded: Mapping[int, torch.Tensor], places: Mapping[int, tuple[int, slice]]
) -> Output[Logits]:
    """An output with the residuals of slots, each from a row and positions of block outputs `[rows, positions,
    hidden]`."""
    if not recorded:
        return Output(logits)
    residuals: dict[int, Residuals] = {}
    sums: dict[int, Residuals] = {}
    for slot, (row, positions) in places.items():
        states = torch.stack([hidden[row, positions].float() for hidden in recorded.values()])
        residuals[slot] = dict(zip(recorded, states[:, -1], strict=True))
        sums[slot] = dict(zip(recorded, states.sum(1), strict=True))
    return Output(logits, residuals, sums)
