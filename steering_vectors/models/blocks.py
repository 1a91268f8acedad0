"""Finding a model's decoder blocks by a dry run, not by names."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn
from transformers import PreTrainedModel

from steering_vectors.errors import ModelError, first_line
from steering_vectors.models.hooks import Call, trace_calls

DRY_RUN_TOKENS = 3


def hidden_size_of(model: PreTrainedModel) -> int:
    """Width of the residual stream, whatever the configuration calls it and however wide the embedding is."""
    return int(model.config.get_text_config(decoder=True).hidden_size)


def find_blocks(model: PreTrainedModel) -> tuple[nn.Module, ...]:
    """The decoder blocks: a list of modules that each run once in a forward pass and pass a residual stream
    `[batch, positions, hidden]` from one to the next, as a tensor or first in a tuple.

    Of several such lists it is the one as long as the configuration says, else the longest; of equals (blocks, and the
    parts of a block) the one that finishes last. Raises ModelError if there is none.
    """
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    members = [(f"{name}.{i}", member) for name, modules in lists.items() for i, member in enumerate(modules)]
    calls = trace_calls(members, lambda: _dry_run(model))
    shape = (1, DRY_RUN_TOKENS, hidden_size_of(model))
    candidates = [name for name, modules in lists.items() if _carries(name, len(modules), calls, shape)]
    if not candidates:
        raise ModelError(
            f"no decoder blocks were found in {type(model).__name__}: no list of modules hands a residual stream of "
            f"width {shape[-1]} from one to the next. This architecture cannot be steered yet."
        )
    expected = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    finished = [call.name for call in calls]

    def rank(name: str) -> tuple[bool, int, int]:
        length = len(lists[name])
        return length == expected, length, finished.index(f"{name}.{length - 1}")

    return tuple(lists[max(candidates, key=rank)])


def _carries(name: str, length: int, calls: list[Call], shape: tuple[int, ...]) -> bool:
    """Whether each member of a list ran once, in order, and took what the one before it returned."""
    names = [f"{name}.{i}" for i in range(length)]
    ours = [call for call in calls if call.name in set(names)]
    return (
        length > 0
        and [call.name for call in ours] == names
        and all(call.returned is not None and tuple(call.returned.shape) == shape for call in ours)
        and all(any(tensor is before.returned for tensor in call.given) for before, call in pairwise(ours))
    )


def _dry_run(model: PreTrainedModel) -> None:
    ids = torch.arange(1, DRY_RUN_TOKENS + 1, device=model.device).unsqueeze(0)
    try:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
    except Exception as error:  # an architecture's own code may raise anything
        raise ModelError(
            f"{type(model).__name__} cannot run on token ids alone, so its blocks cannot be found: {first_line(error)}"
        ) from error
