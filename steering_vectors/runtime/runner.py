"""Running the model on chunks of several sequences: ids and positions in, logits out.

Three ways, tried in this order and proven by a comparison with the plain model before one is used (`choose_runner`):
batched over the slot cache, row by row over the model's own cache (recurrent and hybrid architectures), and row by row
without a cache. Owns the model while the engine lives. Knows nothing of sampling, text or queues.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator
from collections.abc import Sequence as Items
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from steering_vectors.errors import ModelError
from steering_vectors.models.hooks import PositionSelector, record
from steering_vectors.models.loading import LanguageModel
from steering_vectors.models.transfers import picked, tensor_on
from steering_vectors.runtime.cpu.fused_blocks import fuse
from steering_vectors.runtime.slot_cache import Columns, Rows, SlotCache, Span, install_row_masks
from steering_vectors.steering.bank import SteeringBank

BUCKET = 16  # columns read are rounded up to a multiple of this


@dataclass(frozen=True, slots=True)
class Work:
    """The tokens of one slot to compute: `ids` at positions `start`, …; steered from position `steered_from` on. The
    logits of the last `wanted` of them are asked for, where not only the last one's are."""

    slot: int
    ids: Items[int]
    start: int
    steered_from: int | None = None
    wanted: int = 1

    @property
    def end(self) -> int:
        return self.start + len(self.ids)

    def steered(self) -> list[bool]:
        first = self.end if self.steered_from is None else self.steered_from
        return [position >= first for position in range(self.start, self.end)]


class Runner(ABC):
    """Computes logits and keeps what later steps need.

    Of the blocks in `read`, the outputs as they were steered are left by slot, float32 `[layers, hidden]`: in
    `residuals` those at each row's last token of its latest pass, in `sums` the sum over that pass's tokens.
    """

    path: str
    chunked: bool = True  # whether a prompt may be computed in pieces

    def __init__(self, language_model: LanguageModel, bank: SteeringBank, *, context: int) -> None:
        self.model = language_model.model
        self.bank = bank
        self.context = context
        self.device = language_model.device
        self.residuals: dict[int, torch.Tensor] = {}
        self.sums: dict[int, torch.Tensor] = {}
        self._blocks = language_model.blocks
        self.read: Items[int] = ()

    @contextmanager
    def _recording(self, works: Items[Work], ahead: int = 0) -> Iterator[None]:
        """Keep the residuals of these rows, in this order in the batch, of the one pass run inside; in which as many
        tokens as `ahead` come before theirs."""
        if not self.read:
            yield
            return
        with record(self._blocks, self.read) as outputs:
            yield
        for place, work in enumerate(works):
            rows = torch.stack([outputs[layer][place, ahead : ahead + len(work.ids)].float() for layer in self.read])
            self.residuals[work.slot], self.sums[work.slot] = rows[:, -1], rows.sum(1)

    @abstractmethod
    def forward(self, batch: Items[Work]) -> torch.Tensor:
        """Logits of each row's last token, `[rows, vocabulary]`."""

    @abstractmethod
    def forward_all(self, batch: Items[Work]) -> list[torch.Tensor]:
        """Logits of the wanted ones of each row's tokens, `[tokens, vocabulary]` a row."""

    @property
    def columns(self) -> Columns | None:
        """The state by slot and position; None where it is kept in another form."""
        return None

    def release(self, slot: int) -> None:  # noqa: B027 (optional)
        """Forget a slot's state."""

    def scrub(self, slot: int) -> None:
        """Forget a slot's state and overwrite it: masked keys that are not finite would still spoil the next row."""
        self.release(slot)

    def close(self) -> None:  # noqa: B027 (optional)
        """Leave the model as it was."""


class BatchedRunner(Runner):
    """All rows in one forward pass over the slot cache; `fused`: with the blocks' own forward replaced where `fuse`
    knows a faster one. Raises ModelError if it knows none."""

    path = "batched"

    def __init__(self, language_model: LanguageModel, bank: SteeringBank, *, context: int, fused: bool = False) -> None:
        super().__init__(language_model, bank, context=context)
        projection = self.model.get_output_embeddings()
        if projection is None:
            raise ModelError("the model names no output projection")
        install_row_masks()
        layers = int(self.model.config.get_text_config().num_hidden_layers)
        self.cache = SlotCache(layers=layers, slots=bank.num_rows, context=context)
        self._selector = PositionSelector(projection)
        self._takes_positions = "position_ids" in inspect.signature(self.model.forward).parameters
        self._fused = fuse(self._blocks, bank) if fused else []
        if self._fused:
            self.path = "batched, fused blocks"

    def forward(self, batch: Items[Work]) -> torch.Tensor:
        width = max(len(work.ids) for work in batch)
        rows, padded = self._rows(batch, width)
        logits = self._logits(rows, padded, width, self._tensor([[len(work.ids) - 1] for work in padded]))[:, 0]
        return logits if len(padded) == len(batch) else picked(logits, [work.slot - padded[0].slot for work in batch])

    def forward_all(self, batch: Items[Work]) -> list[torch.Tensor]:
        width = max(len(work.ids) for work in batch)
        rows, padded = self._rows(batch, width)
        most = max(work.wanted for work in batch)
        firsts = [len(work.ids) - work.wanted for work in padded]
        wanted = [[min(first + place, width - 1) for place in range(most)] for first in firsts]
        logits = self._logits(rows, padded, width, self._tensor(wanted))
        places = {work.slot: place for place, work in enumerate(padded)}
        return [logits[places[work.slot], : work.wanted] for work in batch]

    def _logits(self, rows: Rows, batch: list[Work], width: int, wanted: torch.Tensor) -> torch.Tensor:
        """`[rows, k, vocabulary]` at the wanted places `[rows, k]` among each row's tokens."""
        span, ids = self._inputs(batch, rows, width)
        where = self._where(batch, width)
        positions = {"position_ids": span.positions} if self._takes_positions else {}
        with (
            self.cache.spanning(span),
            self.bank.step(rows, where),
            self._selector.select(wanted),
            self._recording(batch),
        ):
            output = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, **positions)
        logits: torch.Tensor = output.logits
        return logits

    @property
    def columns(self) -> Columns:
        return self.cache

    def scrub(self, slot: int) -> None:
        self.cache.zero(slot)

    def close(self) -> None:
        self._selector.remove()
        for block in self._fused:
            block.detach()

    def _rows(self, batch: Items[Work], width: int) -> tuple[Rows, list[Work]]:
        """The batch's slots, as a slice where that is possible: reading the cache is then a view, not a copy.

        A few holes between decoding rows are filled with idle rows, which cost less than a copy.
        """
        first, end = batch[0].slot, batch[-1].slot + 1
        if end - first == len(batch):
            return slice(first, end), list(batch)
        if width == 1 and end - first <= 2 * len(batch):
            by_slot = {work.slot: work for work in batch}
            idle = [by_slot.get(slot) or Work(slot, [0], self.context) for slot in range(first, end)]
            return slice(first, end), idle
        return self._tensor([work.slot for work in batch]), list(batch)

    def _inputs(self, batch: Items[Work], rows: Rows, width: int) -> tuple[Span, torch.Tensor]:
        ids, positions, columns = [], [], []
        for work in batch:
            padding = width - len(work.ids)
            here = list(range(work.start, work.end))
            ids.append([*work.ids, *[0] * padding])
            columns.append(here + [self.context] * padding)
            # an idle row attends to its first column only
            here = here if work.start < self.context else [0]
            positions.append(here + here[-1:] * padding)
        longest = max(row[-1] for row in positions) + 1
        length = min(self.context, -(-longest // BUCKET) * BUCKET)
        tensor = self._tensor
        index = tensor([work.slot for work in batch]).unsqueeze(1)
        return Span(rows, index, tensor(positions), tensor(columns), length), tensor(ids)

    def _where(self, batch: Items[Work], width: int) -> torch.Tensor | None:
        """None, the fast case, if every position of every steered row is steered."""
        steered = [work.steered() for work in batch]
        if all(all(row) for row, work in zip(steered, batch, strict=True) if work.steered_from is not None):
            return None
        return self._tensor([row + [False] * (width - len(row)) for row in steered])

    def _tensor(self, values: Any) -> torch.Tensor:
        return tensor_on(values, self.device)


class RowRunner(Runner):
    """One row after the other, each over the cache that the model itself makes: for architectures whose state is not
    keys and values in columns (recurrent, hybrid, shared layers)."""

    path = "row by row"
    STATES: ClassVar[tuple[str, ...]] = ("past_key_values", "cache_params", "state")

    def __init__(self, language_model: LanguageModel, bank: SteeringBank, *, context: int, chunked: bool) -> None:
        super().__init__(language_model, bank, context=context)
        self.chunked = chunked
        parameters = inspect.signature(self.model.forward).parameters
        self._takes_positions = "position_ids" in parameters
        self._state_name = next((name for name in self.STATES if name in parameters), "")
        if not self._state_name:
            raise ModelError("the model's forward takes no state")
        self._states: dict[int, Any] = {}

    def forward(self, batch: Items[Work]) -> torch.Tensor:
        return torch.stack([logits[-1] for logits in self.forward_all(batch)])

    def forward_all(self, batch: Items[Work]) -> list[torch.Tensor]:
        return [self._row(work)[-work.wanted :] for work in batch]

    def release(self, slot: int) -> None:
        self._states.pop(slot, None)

    def _row(self, work: Work) -> torch.Tensor:
        if work.start == 0:
            self.release(work.slot)
        ids = torch.tensor([list(work.ids)], device=self.device)
        inputs: dict[str, Any] = {"input_ids": ids, "use_cache": True, self._state_name: self._states.get(work.slot)}
        if self._takes_positions:
            inputs["position_ids"] = torch.arange(work.start, work.end, device=self.device).unsqueeze(0)
        where = torch.tensor([work.steered()], device=self.device)
        with self.bank.step(slice(work.slot, work.slot + 1), where), self._recording([work]):
            output = self.model(**inputs)
        self._states[work.slot] = output[self._state_name]
        return last_logits(output, len(work.ids))


class RecomputingRunner(Runner):
    """One row after the other without any cache: slow, and right for whatever computes logits from ids."""

    path = "recomputing"

    def __init__(self, language_model: LanguageModel, bank: SteeringBank, *, context: int) -> None:
        super().__init__(language_model, bank, context=context)
        self._ids: dict[int, list[int]] = {}

    def forward(self, batch: Items[Work]) -> torch.Tensor:
        return torch.stack([logits[-1] for logits in self.forward_all(batch)])

    def forward_all(self, batch: Items[Work]) -> list[torch.Tensor]:
        return [self._row(work)[-work.wanted :] for work in batch]

    def release(self, slot: int) -> None:
        self._ids.pop(slot, None)

    def _row(self, work: Work) -> torch.Tensor:
        self._ids[work.slot] = [*self._ids.get(work.slot, [])[: work.start], *work.ids]
        whole = Work(work.slot, self._ids[work.slot], 0, work.steered_from)
        ids = torch.tensor([whole.ids], device=self.device)
        where = torch.tensor([whole.steered()], device=self.device)
        with self.bank.step(slice(work.slot, work.slot + 1), where), self._recording([work], work.start):
            return last_logits(self.model(input_ids=ids, use_cache=False), len(work.ids))


def last_logits(output: Any, count: int = 1) -> torch.Tensor:
    """Logits of the last positions `[count, vocabulary]` in what a model returned for one row."""
    logits: torch.Tensor = output.logits
    return logits[0, -count:]
