"""Forward hooks: reading blocks' outputs, changing them, selecting positions. No other file registers hooks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from steering_vectors.errors import FitError


def block_output(output: Any) -> torch.Tensor:
    """The residual stream in a decoder block's output, which is a tensor or a tuple that begins with it."""
    hidden: torch.Tensor = output if isinstance(output, torch.Tensor) else output[0]
    return hidden


def with_block_output(output: Any, hidden: torch.Tensor) -> Any:
    if isinstance(output, torch.Tensor):
        return hidden
    return type(output)((hidden, *output[1:]))


@contextmanager
def registered(handles: Sequence[RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def record(
    blocks: Sequence[nn.Module], layers: Sequence[int], read: Callable[[torch.Tensor], Any] | None = None
) -> Iterator[dict[int, Any]]:
    """Collect the outputs `[batch, positions, hidden]` of these blocks in the latest forward pass, by layer, or what
    `read` makes of each at once."""
    seen: dict[int, Any] = {}

    def keep(layer: int, _module: nn.Module, _args: Any, output: Any) -> None:
        hidden = block_output(output)
        seen[layer] = hidden if read is None else read(hidden)

    with registered([blocks[layer].register_forward_hook(partial(keep, layer)) for layer in layers]):
        yield seen


class _Stopped(Exception):
    """Ends a forward pass early."""


@contextmanager
def stopping_after(block: nn.Module) -> Iterator[None]:
    """End a forward pass, and the context, once a block has run. Hooks that were registered before still see it."""

    def hook(_module: nn.Module, _args: Any, _output: Any) -> None:
        raise _Stopped

    with suppress(_Stopped), registered([block.register_forward_hook(hook)]):
        yield


@contextmanager
def intercepting(projection: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collect what the output projection takes, `[rows, positions, hidden]`, in the passes run inside.

    The projection computes the logits of the last position only.
    """
    taken: list[torch.Tensor] = []

    def hook(_module: nn.Module, args: tuple[Any, ...]) -> Any:
        taken.append(args[0])
        return (args[0][:, -1:].contiguous(), *args[1:])  # torch copies the weights for every row of a strided input

    with registered([projection.register_forward_pre_hook(hook)]):
        yield taken


@contextmanager
def giving(projection: nn.Module, hidden: torch.Tensor) -> Iterator[None]:
    """Compute the logits of `hidden` `[1, k, hidden]` in the passes run inside, whatever the model computed."""
    with registered([projection.register_forward_pre_hook(lambda _module, args: (hidden, *args[1:]))]):
        yield


@contextmanager
def adding(block: nn.Module, shift: torch.Tensor, where: torch.Tensor) -> Iterator[None]:
    """Add `shift` `[hidden]` to a block's output at `where` (bool `[batch, positions]`) in the passes run inside.

    Gradients flow to the shift, unlike to the bank's buffer.
    """

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        hidden = block_output(output)
        return with_block_output(output, hidden + (where.unsqueeze(-1) * shift).to(hidden))

    with registered([block.register_forward_hook(hook)]):
        yield


@contextmanager
def hiding(blocks: Sequence[nn.Module], columns: torch.Tensor) -> Iterator[None]:
    """Hide `columns` (bool `[batch, positions]`) from all other positions in these blocks, in the passes run inside.

    A pass may run the last positions only, after those in a cache. It raises FitError if a block takes no attention
    mask, or one of another form.
    """

    def hook(block: nn.Module, args: Any, kwargs: Any) -> Any:
        call = inspect.signature(block.forward).bind(*args, **kwargs)
        if "attention_mask" not in call.signature.parameters:
            raise FitError(f"{type(block).__name__} takes no attention mask, so no token can be hidden from it")
        call.arguments["attention_mask"] = hide(call.arguments.get("attention_mask"), columns)
        return call.args, call.kwargs

    with registered([block.register_forward_pre_hook(hook, with_kwargs=True) for block in blocks]):
        yield


def hide(mask: torch.Tensor | None, columns: torch.Tensor) -> torch.Tensor:
    """A mask `[rows, 1, q, k]` under which `columns` (bool `[rows, k]`) are seen by themselves alone. The queries are
    the last q of the positions.

    `mask` is what a block takes: None for causal attention, bool (True is seen), or numbers added to the scores. The
    result has the same dtype, bool for None. Raises FitError for any other form (two dimensions, or made for another
    kernel).
    """
    length = columns.shape[1]
    if mask is None:
        places = torch.arange(length, device=columns.device)
        mask = (places.unsqueeze(1) >= places).expand(1, 1, length, length)
    if not isinstance(mask, torch.Tensor) or mask.dim() != 4 or mask.shape[-1] != length or mask.shape[-2] > length:
        raise FitError("the blocks' attention masks have a form in which no token can be hidden")
    queries = columns[:, length - mask.shape[-2] :]
    barred = ~queries[:, None, :, None] & columns[:, None, None, :]
    if mask.dtype == torch.bool:
        return mask & ~barred
    return mask.masked_fill(barred, torch.finfo(mask.dtype).min)


def hook_outputs(
    blocks: Sequence[nn.Module], hook_for: Callable[[int], Callable[[nn.Module, Any, Any], Any]]
) -> list[RemovableHandle]:
    return [block.register_forward_hook(hook_for(layer)) for layer, block in enumerate(blocks)]


def hook_passes(model: nn.Module, begin: Callable[[Any, Any], None], end: Callable[[], None]) -> list[RemovableHandle]:
    """Call `begin` with the arguments of every forward pass before it, and `end` after it, even if it fails."""
    return [
        model.register_forward_pre_hook(lambda _module, args, kwargs: begin(args, kwargs), with_kwargs=True),
        model.register_forward_hook(lambda *_: end(), always_call=True),
    ]


def raw_outputs(blocks: Sequence[nn.Module], run: Callable[[], Any]) -> list[Any]:
    """What each block returned while `run` ran."""
    found: dict[int, Any] = {}

    def keep(layer: int, _module: nn.Module, _args: Any, output: Any) -> None:
        found[layer] = output

    with registered([block.register_forward_hook(partial(keep, layer)) for layer, block in enumerate(blocks)]):
        run()
    return [found[layer] for layer in range(len(blocks))]


@contextmanager
def resumed(blocks: Sequence[nn.Module], outputs: Sequence[Any], layer: int, hidden: torch.Tensor) -> Iterator[None]:
    """Skip the computation of the blocks up to `layer` in the passes run inside: that block's output is `hidden`.

    Their hooks still run. `outputs` are outputs of all blocks in an earlier pass, whose form is kept.
    """

    def skipping(place: int) -> Callable[..., Any]:
        def forward(hidden_states: torch.Tensor, *_args: Any, **_kwargs: Any) -> Any:
            return with_block_output(outputs[place], hidden if place == layer else hidden_states)

        return forward

    skipped = [(block, vars(block).get("forward")) for block in blocks[: layer + 1]]
    for place, (block, _) in enumerate(skipped):
        block.forward = skipping(place)
    try:
        yield
    finally:
        for block, replaced in skipped:
            if replaced is None:
                del block.forward
            else:
                block.forward = replaced


class PositionSelector:
    """Changes what the output projection is computed from: only the positions whose logits are wanted.

    What the architecture does after its projection (scaling, soft-capping) still happens.
    """

    def __init__(self, projection: nn.Module) -> None:
        self._change: Callable[[torch.Tensor], torch.Tensor] | None = None
        self._handle = projection.register_forward_pre_hook(self._hook)

    @contextmanager
    def select(self, index: torch.Tensor) -> Iterator[None]:
        """Compute logits `[rows, k, vocabulary]` at positions `[rows, k]`."""
        with self._changing(lambda hidden: _at(hidden, index)):
            yield

    @contextmanager
    def take(self, index: torch.Tensor) -> Iterator[list[torch.Tensor]]:
        """Collect the projection's input at positions `[rows, k]`, and compute the logits of one position only."""
        taken: list[torch.Tensor] = []

        def change(hidden: torch.Tensor) -> torch.Tensor:
            taken.append(_at(hidden, index))
            return hidden[:, :1]

        with self._changing(change):
            yield taken

    def remove(self) -> None:
        self._handle.remove()

    @contextmanager
    def _changing(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
        self._change = change
        try:
            yield
        finally:
            self._change = None

    def _hook(self, _module: nn.Module, args: tuple[Any, ...]) -> Any:
        return None if self._change is None else (self._change(args[0]), *args[1:])


def _at(hidden: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    rows = torch.arange(hidden.shape[0], device=hidden.device).unsqueeze(1)
    return hidden[rows, index]


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One call of a module: the tensors it took, and the residual stream it returned.

    `returned` is None for an output that the bank cannot write into: not a tensor, nor a tuple or list that begins
    with one.
    """

    name: str
    given: tuple[torch.Tensor, ...]
    returned: torch.Tensor | None


def trace_calls(modules: Sequence[tuple[str, nn.Module]], run: Callable[[], Any]) -> list[Call]:
    """The calls of the named modules while `run` runs, in the order in which they returned."""
    calls: list[Call] = []

    def note(name: str, _module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given = tuple(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        first = output[0] if type(output) in (tuple, list) and output else output
        calls.append(Call(name, given, first if isinstance(first, torch.Tensor) else None))

    with registered([module.register_forward_hook(partial(note, name), with_kwargs=True) for name, module in modules]):
        run()
    return calls
