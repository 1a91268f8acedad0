"""The only file that registers forward hooks: `record` reads block outputs, the bank writes shifts into them.

Owns the arithmetic that happens inside a forward pass. Knows nothing of profiles' files, requests or time: rows are
given mixes, and each step is told which rows it runs and at which positions steering holds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from steering_vectors.mixture import Mixture

Rows = slice | torch.Tensor


def block_output(output: Any) -> torch.Tensor:
    """The residual stream in what a decoder block returned, a tensor or a tuple that begins with it."""
    return output if isinstance(output, torch.Tensor) else output[0]


def with_block_output(output: Any, hidden: torch.Tensor) -> Any:
    """`output` with its residual stream replaced, in the form in which the block returned it."""
    if isinstance(output, torch.Tensor):
        return hidden
    return type(output)((hidden, *output[1:]))


@contextmanager
def hooked(modules: Sequence[nn.Module], make: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
    """Register `make(i)` as forward hook of modules[i] while the context lasts."""
    handles = [module.register_forward_hook(make(i)) for i, module in enumerate(modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def record(blocks: Sequence[nn.Module], layers: Sequence[int]) -> Iterator[dict[int, torch.Tensor]]:
    """Collect the output `[batch, positions, hidden]` of the given blocks in the latest forward pass."""
    seen: dict[int, torch.Tensor] = {}

    def make(index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            seen[layers[index]] = block_output(output)

        return hook

    with hooked([blocks[layer] for layer in layers], make):
        yield seen


@dataclass(frozen=True, slots=True)
class Step:
    """Which bank rows run in this forward pass, in batch order, and where steering holds.

    `where` is bool `[rows, positions]`; None means at every position.
    """

    rows: Rows
    where: torch.Tensor | None


class SteeringBank:
    """Per-row shifts for every block, and the hooks that apply them.

    For row r at block l, at steered positions, in this order (DESIGN: what steering does):

        h ← h + shift[l, r];   h ← h − β (h·u) u  for each ablated u;   h ← h · ‖h_before‖ / ‖h‖  if asked

    Hooks are registered once, by `attach`. Outside of a `step`, and at blocks where no row has anything to do, they
    leave the output object as it is.
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
        self._preserving: set[int] = set()
        self._busy: Counter[int] = Counter()  # layer -> rows that act there
        self._step: Step | None = None
        self._handles: list[RemovableHandle] = []

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
        for layer, block in enumerate(self._blocks):
            self._handles.append(block.register_forward_hook(self._hook_for(layer)))

    def detach(self) -> None:
        """Remove the hooks; the model is then untouched."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def write(self, row: int, mixture: Mixture) -> None:
        """Give a row its mix: summed in float32, cast once to the model's dtype."""
        self.clear(row)
        shifts = mixture.shifts()
        for layer, shift in shifts.items():
            self._shift[layer, row] = shift.to(self._shift)
        ablations = mixture.ablations()
        self._shifted[row] = tuple(shifts)
        if ablations:
            self._ablations[row] = {
                layer: [(beta, unit.to(self._shift)) for beta, unit in pairs] for layer, pairs in ablations.items()
            }
        if mixture.preserve_norm:
            self._preserving.add(row)
        self._busy.update(self._layers_of(row))

    def clear(self, row: int) -> None:
        """Make a row unsteered."""
        self._busy.subtract(self._layers_of(row))
        for layer in self._shifted.pop(row, ()):
            self._shift[layer, row] = 0
        self._ablations.pop(row, None)
        self._preserving.discard(row)

    @contextmanager
    def step(self, rows: Rows, where: torch.Tensor | None = None) -> Iterator[None]:
        """Steer the forward passes run inside; refuses nesting."""
        if self._step is not None:
            raise RuntimeError("a steering step is already under way")
        self._step = Step(rows, where)
        try:
            yield
        finally:
            self._step = None

    def _layers_of(self, row: int) -> set[int]:
        return {*self._shifted.get(row, ()), *self._ablations.get(row, {})}

    def _hook_for(self, layer: int) -> Callable[..., Any]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            step = self._step
            if step is None or self._busy[layer] <= 0:
                return None
            return with_block_output(output, self._steer(layer, block_output(output), step))

        return hook

    def _steer(self, layer: int, hidden: torch.Tensor, step: Step) -> torch.Tensor:
        shift = self._shift[layer, step.rows].unsqueeze(1)  # [rows, 1, hidden]
        if step.where is not None:
            shift = shift * step.where.unsqueeze(-1)
        steered = hidden + shift
        if self._ablations or self._preserving:
            self._steer_rows(layer, hidden, steered, step)
        return steered

    def _steer_rows(self, layer: int, before: torch.Tensor, after: torch.Tensor, step: Step) -> None:
        """The operators that differ in kind between rows, one row at a time, into `after`."""
        for index, row in enumerate(self._row_numbers(step.rows)):
            pairs = self._ablations.get(row, {}).get(layer, [])
            preserve = row in self._preserving and layer in self._layers_of(row)
            if not pairs and not preserve:
                continue
            hidden = after[index]
            for beta, unit in pairs:
                hidden = hidden - beta * (hidden @ unit).unsqueeze(-1) * unit
            if preserve:
                norm = hidden.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(hidden.dtype).tiny)
                hidden = hidden * (before[index].norm(dim=-1, keepdim=True) / norm)
            where = None if step.where is None else step.where[index].unsqueeze(-1)
            after[index] = hidden if where is None else torch.where(where, hidden, before[index])

    def _row_numbers(self, rows: Rows) -> list[int]:
        if isinstance(rows, slice):
            return list(range(*rows.indices(self.num_rows)))
        return [int(row) for row in rows.tolist()]


class PositionSelector:
    """Keeps, ahead of the output projection, only the positions whose logits are wanted.

    `select(index)` with int `[rows, k]` makes the model compute logits `[rows, k, vocabulary]`; whatever the
    architecture does after its projection (scaling, soft-capping) still happens.
    """

    def __init__(self, projection: nn.Module) -> None:
        self._index: torch.Tensor | None = None
        self._handle = projection.register_forward_pre_hook(self._hook)

    @contextmanager
    def select(self, index: torch.Tensor) -> Iterator[None]:
        self._index = index
        try:
            yield
        finally:
            self._index = None

    def remove(self) -> None:
        self._handle.remove()

    def _hook(self, _module: nn.Module, args: tuple[Any, ...]) -> Any:
        if self._index is None:
            return None
        hidden = args[0]  # [rows, positions, hidden]
        rows = torch.arange(hidden.shape[0], device=hidden.device).unsqueeze(1)
        return (hidden[rows, self._index], *args[1:])


def trace_calls(
    modules: Sequence[tuple[str, nn.Module]], run: Callable[[], Any]
) -> list[tuple[str, tuple[int, ...] | None]]:
    """Run `run` and tell in which order the named modules returned, with the shape of what each returned.

    The shape is None where the output is not a tensor or a sequence that begins with one.
    """
    calls: list[tuple[str, tuple[int, ...] | None]] = []

    def make(index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple | list) and output else output
            calls.append((modules[index][0], tuple(first.shape) if isinstance(first, torch.Tensor) else None))

        return hook

    with hooked([module for _, module in modules], make):
        run()
    return calls
