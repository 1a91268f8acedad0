"""The steering bank: a shift for each row and block, and the hooks that add it to the residual stream."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn
from torch.linalg import vector_norm
from torch.utils.hooks import RemovableHandle

from steering_vectors.errors import SteeringError
from steering_vectors.models.hooks import block_output, hook_outputs, hook_passes, registered, with_block_output
from steering_vectors.models.transfers import sent, tensor_on
from steering_vectors.profiles.mixture import Mixture, Shifts

if TYPE_CHECKING:
    from steering_vectors.models.loading import LanguageModel

Rows = slice | torch.Tensor
Hook = Callable[[nn.Module, Any, Any], Any]
MIN_NORM = 1e-12


@dataclass(frozen=True)
class Step:
    """The bank rows of one forward pass, in batch order, and the positions that are steered.

    `where` is bool `[rows, positions]`; None means every position. `buffer` is the bank's, `[layers, rows, hidden]`.
    """

    rows: Rows
    where: torch.Tensor | None
    buffer: torch.Tensor

    @cached_property
    def shifts(self) -> Sequence[torch.Tensor]:
        """`[rows, 1, hidden]` of each block."""
        return self.buffer[:, self.rows].unsqueeze(2).unbind()


def shifts_in(mixture: Mixture, dtype: torch.dtype) -> Shifts:
    """A mix's shifts in a model's dtype, on the CPU. Raises SteeringError if one is too large for it."""
    shifts = mixture.shifts()
    largest = torch.finfo(dtype).max
    if shifts.layers and not (shifts.bound <= largest or float(shifts.rows.abs().max()) <= largest):  # NaN is not
        raise SteeringError("the shift overflows the model's dtype: use a smaller strength", param="strength")
    return Shifts(shifts.layers, shifts.rows.to(dtype))


class SteeringBank:
    """Per-row shifts for every block, and the hooks that apply them.

    For row r at block l, at steered positions, in this order:

        h ← h + shift[l, r];   h ← h − β (h·u) u  for each ablated u;   h ← h · ‖h_before‖ / ‖h‖  if asked

    Hooks are registered once, by `attach`. They return nothing outside of a `step`, and at blocks where no row is
    steered. A step of a single row steers every row of the batch alike.
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
        self._ablations: dict[int, dict[int, list[tuple[float, torch.Tensor]]]] = {}  # row -> layer -> (β, u)
        self._shifted: dict[int, tuple[int, ...]] = {}  # row -> layers with a shift
        self._preserving: set[int] = set()  # rows whose norms are kept
        self._busy: Counter[int] = Counter()  # layer -> number of rows that are steered there
        self._step: Step | None = None
        self._always = False  # whether the current step adds at every block
        self._claimed: int | None = None  # the layer whose block adds its shifts itself
        self._handles: list[RemovableHandle] = []
        self._watcher: Callable[[int, Mixture | None], None] | None = None

    @classmethod
    def over(cls, language_model: LanguageModel, *, rows: int) -> Self:
        """A bank for a model's blocks, in its dtype and on its device, not attached yet."""
        lm = language_model
        return cls(lm.blocks, rows=rows, hidden_size=lm.hidden_size, dtype=lm.dtype, device=lm.device)

    @property
    def num_rows(self) -> int:
        return self._shift.shape[1]

    @property
    def shift(self) -> torch.Tensor:
        """The buffer, `[layers, rows, hidden]` in the model's dtype."""
        return self._shift

    @property
    def only_adds(self) -> bool:
        """Whether the buffer is all that steers the rows: none ablates a direction or keeps norms."""
        return not (self._ablations or self._preserving)

    def attach(self) -> None:
        """Register the hooks. Done once for the life of a model."""
        if self._handles:
            raise RuntimeError("the bank's hooks are registered already")
        self._handles = hook_outputs(self._blocks, self._hook_for)

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def watch(self, watcher: Callable[[int, Mixture | None], None]) -> None:
        """Call `watcher` before each change with the row and its mix, None for a row that is cleared."""
        self._watcher = watcher

    def write(self, row: int, mixture: Mixture) -> None:
        """Give a row its mix: summed in float32, cast once to the model's dtype.

        Raises SteeringError, with the row as it was, if a shift is too large for the dtype.
        """
        shifts = shifts_in(mixture, self._shift.dtype)
        self._announce(row, mixture)
        self._replace(row, mixture, shifts)

    def clear(self, row: int) -> None:
        """Make a row unsteered."""
        self._announce(row, None)
        self._erase(row)

    @contextmanager
    def step(self, rows: Rows, where: torch.Tensor | None = None, *, always: bool = False) -> Iterator[None]:
        """Steer the forward passes run inside. Steps cannot be nested.

        With `always` the buffer is added at every block, zeros included, so that a recorded step does not depend on
        which rows are steered now. No row may then ablate directions or keep norms.
        """
        if always and not self.only_adds:
            raise RuntimeError("a row ablates or keeps norms, which a recorded step cannot follow")
        if self._step is not None:
            raise RuntimeError("a steering step is already under way")
        self._step, self._always = Step(rows, where, self._shift), always
        try:
            yield
        finally:
            self._step = self._claimed = None
            self._always = False

    @contextmanager
    def steps(self, model: nn.Module, where: Callable[[Any, Any], torch.Tensor | None]) -> Iterator[None]:
        """Make every forward pass of `model` a step of all rows, at the positions `where(args, kwargs)`."""

        def begin(args: Any, kwargs: Any) -> None:
            self._step = Step(slice(None), where(args, kwargs), self._shift)

        def end() -> None:
            self._step = None

        with registered(hook_passes(model, begin, end)):
            yield

    def _acts(self, layer: int) -> bool:
        return self._always or self._busy[layer] > 0

    def _announce(self, row: int, mixture: Mixture | None) -> None:
        if self._watcher is not None:
            self._watcher(row, mixture)

    def _replace(self, row: int, mixture: Mixture, shifts: Shifts) -> None:
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

    def _note_norm(self, row: int, mixture: Mixture) -> None:
        (self._preserving.add if mixture.preserve_norm else self._preserving.discard)(row)

    def _layers_of(self, row: int) -> set[int]:
        return {*self._shifted.get(row, ()), *self._ablations.get(row, {})}

    def _hook_for(self, layer: int) -> Hook:
        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            step = self._step
            if step is None or not self._acts(layer):
                return None
            return self._steered_output(layer, output, step)

        return hook

    def _steered_output(self, layer: int, output: Any, step: Step) -> Any:
        hidden = block_output(output)
        shift = step.shifts[layer].to(hidden)
        steered = hidden + (shift if step.where is None else shift * step.where.unsqueeze(-1))
        if not self.only_adds:
            self._steer_rows(layer, hidden, steered, step)
        return with_block_output(output, steered)

    def _steer_rows(self, layer: int, before: torch.Tensor, after: torch.Tensor, step: Step) -> None:
        """Apply the operators that differ in kind between rows, one row at a time, in float32, into `after`."""
        for row, index in self._places(step.rows):
            pairs = self._ablations.get(row, {}).get(layer, [])
            preserve = row in self._preserving and layer in self._layers_of(row)
            if not pairs and not preserve:
                continue
            hidden = ablated(after[index].float(), pairs)
            if preserve:  # a zero vector stays zero
                norms = [vector_norm(each, dim=-1, keepdim=True) for each in (before[index].float(), hidden)]
                hidden = hidden * (norms[0] / norms[1].clamp_min(MIN_NORM))
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
