"""Differences between a model's block outputs over one response after two prompts, token by token.

Both readings must have the same position ids at the response's tokens, or their difference contains a position offset.
Therefore the shorter prompt is padded on the left and masked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from steering_vectors.data.batches import DEFAULT_BATCH_TOKENS
from steering_vectors.errors import FitError
from steering_vectors.measures.activations import Tokens
from steering_vectors.models.forward import takes
from steering_vectors.models.hooks import record
from steering_vectors.models.loading import LanguageModel
from steering_vectors.progress import Progress


@dataclass(frozen=True, slots=True)
class Twin:
    """Token ids of a response and of two prompts for it. The response does not begin with a second BOS.

    `plain` is the prompt without an instruction, if there is one.
    """

    positive: tuple[int, ...]
    negative: tuple[int, ...]
    response: tuple[int, ...]
    plain: tuple[int, ...] = ()

    @property
    def prompt_length(self) -> int:
        return max(len(self.positive), len(self.negative))

    @property
    def length(self) -> int:
        return self.prompt_length + len(self.response)

    @property
    def shared(self) -> tuple[int, int]:
        """The lengths of the prompts' common prefix and common suffix, which do not overlap."""
        shorter = min(len(self.positive), len(self.negative))
        if self.positive == self.negative:
            return shorter, 0
        suffix = _common_prefix(self.positive[::-1], self.negative[::-1], shorter)
        return _common_prefix(self.positive, self.negative, shorter - suffix), suffix


def plain_twin(ids: Sequence[int], start: int) -> Twin:
    """A response that begins at `start`, with the same prompt on both sides."""
    prompt = tuple(ids[:start])
    return Twin(prompt, prompt, tuple(ids[start:]), prompt)


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """A batch of one side. Responses begin at column `start` in every row.

    `positions` are counted from the start of the longer prompt of a twin, so they are equal on both sides at the
    response.
    """

    start: int
    ids: torch.Tensor  # [rows, columns]
    mask: torch.Tensor  # [rows, columns] bool
    positions: torch.Tensor  # [rows, columns]
    response: torch.Tensor  # [rows, columns - start] bool
    instruction: torch.Tensor  # [rows, columns] bool: True where the prompts of both sides differ


Weights = Callable[[int], AbstractContextManager[object]]
"""A context in which the model has the weights for side 0 (positive) or 1 (negative)."""


def own_weights(_side: int) -> AbstractContextManager[object]:
    """The model's own weights for both sides."""
    return nullcontext()


def mean_differences(
    lm: LanguageModel,
    twins: Sequence[Twin],
    layers: Sequence[int],
    *,
    tokens: Tokens = "response",
    weights: Weights = own_weights,
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
    progress: Progress | None = None,
) -> dict[int, torch.Tensor]:
    """Mean of h⁺ − h⁻ over responses and their tokens (or their last token), float64 `[hidden]` per block.

    h⁺ is the block's output after the positive prompt, h⁻ after the negative one. `weights` gives the context for each
    side. Memory does not grow with the number of responses. Raises FitError if an activation is not finite.
    """
    if not twins:
        raise FitError("there are no responses to read under both prompts; add rows")
    layers = sorted(set(layers))
    total = torch.zeros(len(layers), lm.hidden_size, dtype=torch.float64)
    done = 0
    for group in grouped(twins, batch_tokens):
        total += _group_difference(lm, group, layers, tokens, weights)
        done += len(group)
        if progress is not None:
            progress("contrast", done, len(twins))
    if not bool(total.isfinite().all()):
        raise FitError("a block's output is not finite: load the model with dtype float32")
    return {layer: total[k] / len(twins) for k, layer in enumerate(layers)}


def grouped(twins: Sequence[Twin], budget: int) -> Iterator[list[Twin]]:
    """Yield batches of similar length, longest first, of at most `budget` tokens with padding (at least one twin)."""
    order = sorted(twins, key=lambda twin: -twin.length)
    while order:
        most = order[: max(1, budget // order[0].length)]
        width = max(twin.prompt_length for twin in most) + max(len(twin.response) for twin in most)
        rows = max(1, budget // width)
        yield order[:rows]
        order = order[rows:]


def readings(group: Sequence[Twin], pad: int, device: torch.device | str) -> tuple[Reading, Reading]:
    """Both sides of a group. Prompts are padded on the left to the same length, responses on the right."""
    start = max(twin.prompt_length for twin in group)
    begins = torch.tensor([start - twin.prompt_length for twin in group])
    return (
        _reading([(twin.positive, twin) for twin in group], start, begins, pad, device),
        _reading([(twin.negative, twin) for twin in group], start, begins, pad, device),
    )


def read(lm: LanguageModel, reading: Reading, layers: Sequence[int]) -> torch.Tensor:
    """Block outputs at the response's columns, float32 `[layers, rows, response, hidden]`, with gradients."""
    head = {"logits_to_keep": 1} if takes(lm.model, "logits_to_keep") else {}
    with record(lm.blocks, layers) as outputs:
        lm.model(**forward_arguments(lm, reading), **head, use_cache=False)
    return torch.stack([outputs[layer][:, reading.start :].float() for layer in layers])


def forward_arguments(lm: LanguageModel, reading: Reading) -> dict[str, torch.Tensor]:
    """The arguments of the model's forward: ids, and mask and positions if the architecture takes them."""
    arguments = {"input_ids": reading.ids}
    if takes(lm.model, "attention_mask"):
        arguments["attention_mask"] = reading.mask.long()
    if takes(lm.model, "position_ids"):
        arguments["position_ids"] = reading.positions
    return arguments


def differences(
    lm: LanguageModel, group: Sequence[Twin], layers: Sequence[int], weights: Weights
) -> tuple[torch.Tensor, torch.Tensor]:
    """h⁺ − h⁻ at the response's columns, float32 `[layers, rows, response, hidden]`, without gradients; and a mask of
    the columns that hold a token, bool `[rows, response]`."""
    sides = readings(group, pad_id(lm), lm.device)
    outputs = []
    for index, side in enumerate(sides):
        with weights(index), torch.no_grad():
            outputs.append(read(lm, side, layers))
    return outputs[0] - outputs[1], sides[0].response


def _group_difference(
    lm: LanguageModel, group: Sequence[Twin], layers: Sequence[int], tokens: Tokens, weights: Weights
) -> torch.Tensor:
    """Sum over the group's responses, float64 `[layers, hidden]`."""
    difference, response = differences(lm, group, layers, weights)
    if tokens == "last":
        response = response & (response.cumsum(1) == response.sum(1, keepdim=True))
    difference = difference.masked_fill(~response[None, :, :, None], 0)
    means = difference.sum(2) / response.sum(1)[None, :, None]
    return means.sum(1).double().cpu()


def _reading(
    rows: Sequence[tuple[tuple[int, ...], Twin]],
    start: int,
    begins: torch.Tensor,
    pad: int,
    device: torch.device | str,
) -> Reading:
    width = max(len(twin.response) for _, twin in rows)
    ids = torch.full((len(rows), start + width), pad)
    mask, instruction = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
    for row, (prompt, twin) in enumerate(rows):
        first, end = start - len(prompt), start + len(twin.response)
        ids[row, first:end] = torch.tensor([*prompt, *twin.response])
        mask[row, first:end] = True
        heads, tails = twin.shared
        instruction[row, first + heads : start - tails] = True
    positions = (torch.arange(ids.shape[1]) - begins.unsqueeze(1)).clamp_min(0)
    placed = [tensor.to(device) for tensor in (ids, mask, positions, mask[:, start:], instruction)]
    return Reading(start, *placed)


def _common_prefix(one: Sequence[int], other: Sequence[int], limit: int) -> int:
    """The length of the common prefix, at most `limit`."""
    return next((place for place in range(limit) if one[place] != other[place]), limit)


def pad_id(lm: LanguageModel) -> int:
    """A token id for padding. It is always masked."""
    pad = lm.tokenizer.pad_token_id
    return int(pad) if isinstance(pad, int) else 0
