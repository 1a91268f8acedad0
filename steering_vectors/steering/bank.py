"""The bank of shifts: what steers each row of a batch, and the arithmetic of it inside a forward pass.

Knows nothing of profiles' files, requests or time: rows are given mixes, and each step is told which rows it runs and
at which positions steering holds. Its hooks are registered by `hooks`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from steering_vectors.errors import SteeringError
from steering_vectors.models.hooks import block_output, hook_outputs, hook_passes, registered, with_block_output
from steering_vectors.models.transfers import sent, tensor_on
from steering_vectors.profiles.mixture import Mixture, Shifts

if TYPE_CHECKING:
    from steering_vectors.models.loading import LanguageModel

Rows = slice | torch.Tensor
TINY = 1e-12


@dataclass(frozen=True)
class Step:
    """Which bank rows run in this forward pass, in batch order, and where steering holds.

    `where` is bool `[rows, positions]`; None means at every position. `always`: at every block, also where the rows'
    shifts are zeros now: what is recorded once and replayed must not depend on which rows are steered today.
    """

    rows: Rows
    where: torch.Tensor | None
    bank: torch.Tensor
    always: bool = False

    @cached_property
    def shifts(self) -> Sequence[torch.Tensor]:
        """`[rows, 1, hidden]` of each block."""
        return self.bank[:, self.rows].unsqueeze(2).unbind()


def shifts_in(mixture: Mixture, dtype: torch.dtype) -> Shifts:
    """A mix's shifts in a model's dtype, on the CPU. Raises SteeringError if one is too large for it."""
    shifts = mixture.shifts()
    largest = torch.finfo(dtype).max
    if shifts.layers and not (shifts.bound <= largest or float(shifts.rows.abs().max()) <= largest):  # NaN is not
        raise SteeringError("the shift overflows the model's dtype: use a smaller strength", param="strength")
    return Shifts(shifts.layers, shifts.rows.to(dtype))


class SteeringBank:
    """Per-row shifts for every block, and the hooks that apply them.

    For row r at block l, at steered positions, in this order (DESIGN: what steering does):

        h ← h + shift[l, r];   h ← h − β (h·u) u  for each ablated u;   h ← h · ‖h_before‖ / ‖h‖  if asked

    Hooks are registered once, by `attach`. Outside of a `step`, and at blocks where no row has anything to do, they
    leave the output object as it is. A step of a single row steers a batch of any size alike.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        *,
        rows: int,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        self._blocks = list(blocks)
        self._shift = torch.zeros(len(blocks), rows, hidden_size, dtype=dtype, device=device)
        self._largest = torch.finfo(dtype).max
        self._ablations: dict[int, dict[int, list[tuple[float, torch.Tensor]]]] = {}  # row -> layer -> (β, u)
        self._shifted: dict[int, tuple[int, ...]] = {}  # row -> layers with a shift
        self._preserving: set[int] = set()
        self._busy: Counter[int] = Counter()  # layer -> rows that act there
        self._step: Step | None = None
        self._claimed: int | None = None  # the layer whose block adds its shifts itself
        self._handles: list[RemovableHandle] = []
        self._watcher: Callable[[int, Mixture | None], None] | None = None

    def watch(self, watcher: Callable[[int, Mixture | None], None]) -> None:
        """Have `watcher` called before each change with the row and its mix, None for one that is cleared."""
        self._watcher = watcher

    @classmethod
    def over(cls, language_model: LanguageModel, *, rows: int) -> SteeringBank:
        """A bank for a model's blocks, in its dtype and on its device, not attached yet."""
        lm = language_model
        return cls(lm.blocks, rows=rows, hidden_size=lm.hidden_size, dtype=lm.dtype, device=lm.device)

    @property
    def num_rows(self) -> int:
        return self._shift.shape[1]

    @property
    def shift(self) -> torch.Tensor:
        """The buffer itself, `[layers, rows, hidden]` in the model's dtype."""
        return self._shift

    def attach(self) -> None:
        """Register the hooks. Done once for the life of a model."""
        if self._handles:
            raise RuntimeError("the bank's hooks are registered already")
        self._handles = hook_outputs(self._blocks, self._hook_for)

    def detach(self) -> None:
        """Remove the hooks; the model is then untouched."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def check(self, mixture: Mixture) -> Shifts:
        """The mix's shifts per block, in the model's dtype. Raises SteeringError if one is too large for it."""
        return shifts_in(mixture, self._shift.dtype)

    def write(self, row: int, mixture: Mixture) -> None:
        """Give a row its mix: summed in float32, cast once to the model's dtype.

        Raises SteeringError, with the row as it was, if a shift is too large for the dtype.
        """
        if self._rescale(row, mixture):
            return
        shifts = self.check(mixture)
        if self._watcher is not None:
            self._watcher(row, mixture)
        if self._shifted.get(row) == shifts.layers and not mixture.ablations() and row not in self._ablations:
            self._put(row, shifts)  # another strength of the same profiles: the common change
            self._note_norm(row, mixture)
            return
        self._erase(row)
        self._put(row, shifts)
        self._shifted[row] = shifts.layers
        if ablations := mixture.ablations():
            device = self._shift.device
            self._ablations[row] = {
                layer: [(beta, unit.to(device)) for beta, unit in pairs] for layer, pairs in ablations.items()
            }
        self._note_norm(row, mixture)
        self._busy.update(self._layers_of(row))

    def _rescale(self, row: int, mixture: Mixture) -> bool:
        """Give a row another strength of the one profile that it has at all blocks, in one operation: the most common
        change. False, and nothing is done, if this is another one."""
        scaled = mixture.scaled() if self._shift.device.type == "cpu" else None
        if scaled is None or row in self._ablations:
            return False
        unit, factor = scaled
        known = self._shifted.get(row) == unit.layers and len(unit.layers) == len(self._blocks)
        if not known or not unit.bound * abs(factor) <= self._largest:
            return False
        if self._watcher is not None:
            self._watcher(row, mixture)
        torch.mul(unit.rows, factor, out=self._shift[:, row])
        self._note_norm(row, mixture)
        return True

    def _note_norm(self, row: int, mixture: Mixture) -> None:
        (self._preserving.add if mixture.preserve_norm else self._preserving.discard)(row)

    def clear(self, row: int) -> None:
        """Make a row unsteered."""
        if self._watcher is not None:
            self._watcher(row, None)
        self._erase(row)

    def _erase(self, row: int) -> None:
        self._busy.subtract(self._layers_of(row))
        if self._shifted.pop(row, ()):
            self._shift[:, row] = 0
        self._ablations.pop(row, None)
        self._preserving.discard(row)

    def _put(self, row: int, shifts: Shifts) -> None:
        if len(shifts.layers) == len(self._blocks):
            self._shift[:, row] = sent(shifts.rows, self._shift.device)
        elif shifts.layers:
            layers = tensor_on(list(shifts.layers), self._shift.device)
            self._shift[layers, row] = sent(shifts.rows, self._shift.device)

    @property
    def only_adds(self) -> bool:
        """Whether what the rows' shifts hold is all that steers them: a step with `always` is then the whole of it."""
        return not (self._ablations or self._preserving)

    @contextmanager
    def step(self, rows: Rows, where: torch.Tensor | None = None, *, always: bool = False) -> Iterator[None]:
        """Steer the forward passes run inside; refuses nesting. `always`: see `Step`; it bears additions alone."""
        if self._step is not None:
            raise RuntimeError("a steering step is already under way")
        if always and not self.only_adds:
            raise RuntimeError("a row ablates or keeps norms, which a recorded step cannot follow")
        self._step = Step(rows, where, self._shift, always)
        try:
            yield
        finally:
            self._step = self._claimed = None

    def claim(self, layer: int, rows: int) -> torch.Tensor | None:
        """The shifts `[rows, 1, hidden]` of the step under way, for a block that adds them to its output itself: its
        hook then leaves that output alone. None where there is nothing to add, or more to do than to add them to so
        many rows at all positions: then the hook does all of it."""
        step = self._step
        if step is None or step.where is not None or not self.only_adds or not self._acts(layer, step):
            return None
        shifts = step.shifts[layer]
        if len(shifts) != rows:
            return None
        self._claimed = layer
        return shifts

    def _acts(self, layer: int, step: Step) -> bool:
        return step.always or self._busy[layer] > 0

    @contextmanager
    def steps(self, model: nn.Module, where: Callable[[Any, Any], torch.Tensor | None]) -> Iterator[None]:
        """Make every forward pass of `model` a step of all rows, at the positions `where(args, kwargs)` tells."""

        def begin(args: Any, kwargs: Any) -> None:
            self._step = Step(slice(None), where(args, kwargs), self._shift)

        def end() -> None:
            self._step = None

        with registered(hook_passes(model, begin, end)):
            yield

    def _layers_of(self, row: int) -> set[int]:
        return {*self._shifted.get(row, ()), *self._ablations.get(row, {})}

    def _hook_for(self, layer: int) -> Callable[..., Any]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            step = self._step
            if step is None or not self._acts(layer, step):
                return None
            if self._claimed == layer:
                self._claimed = None
                return None
            if step.where is None and type(output) is torch.Tensor and self.only_adds:
                return output + step.shifts[layer]  # what is most common, without a call between
            return with_block_output(output, self._steer(layer, block_output(output), step))

        return hook

    def _steer(self, layer: int, hidden: torch.Tensor, step: Step) -> torch.Tensor:
        shift = step.shifts[layer].to(hidden)
        steered = hidden + (shift if step.where is None else shift * step.where.unsqueeze(-1))
        if not self.only_adds:
            self._steer_rows(layer, hidden, steered, step)
        return steered

    def _steer_rows(self, layer: int, before: torch.Tensor, after: torch.Tensor, step: Step) -> None:
        """The operators that differ in kind between rows, one row at a time, in float32, into `after`."""
        for row, index in self._places(step.rows):
            pairs = self._ablations.get(row, {}).get(layer, [])
            preserve = row in self._preserving and layer in self._layers_of(row)
            if not pairs and not preserve:
                continue
            hidden = ablated(after[index].float(), pairs)
            if preserve:
                hidden = with_norm_of(before[index].float(), hidden)
            hidden = hidden.to(after.dtype)
            where = None if step.where is None else step.where[index].unsqueeze(-1)
            after[index] = hidden if where is None else torch.where(where, hidden, before[index])

    def _places(self, rows: Rows) -> list[tuple[int, slice]]:
        """Bank rows and their places in the batch; a single row takes all of it."""
        numbers = range(self.num_rows)[rows] if isinstance(rows, slice) else [int(row) for row in rows.tolist()]
        if len(numbers) == 1:
            return [(numbers[0], slice(None))]
        return [(row, slice(place, place + 1)) for place, row in enumerate(numbers)]


def ablated(hidden: torch.Tensor, pairs: Sequence[tuple[float, torch.Tensor]]) -> torch.Tensor:
    """h − β (h·u) u for each (β, u), one after the other; `hidden` is float32 `[…, hidden]`."""
    for beta, unit in pairs:
        hidden = hidden - beta * (hidden @ unit).unsqueeze(-1) * unit
    return hidden


def with_norm_of(reference: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """`hidden` scaled to the norms of `reference`, both float32 `[…, hidden]`; a zero vector stays zero."""
    norms = [torch.linalg.vector_norm(each, dim=-1, keepdim=True) for each in (reference, hidden)]
    scaled: torch.Tensor = hidden * (norms[0] / norms[1].clamp_min(TINY))
    return scaled
