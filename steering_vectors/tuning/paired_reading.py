"""Differences between a model's block outputs over one response after two prompts, token by token.

Both readings must have the same position ids at the response's tokens, or their difference contains a position offset.
Therefore the shorter prompt is padded on the left and masked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import torch

from steering_vectors.errors import FitError
from steering_vectors.measures.activations import Tokens
from steering_vectors.models.forward import takes
from steering_vectors.models.hooks import record, stopping_after
from steering_vectors.models.loading import LanguageModel
from steering_vectors.models.shared_prompts import SharedPrompts, shares_prompts
from steering_vectors.progress import Progress

Sample = TypeVar("Sample")
MIN_SHARED = 8  # tokens; a shorter prefix is computed in every row
READ_TOKENS = 1024  # of a pass that reads; more would add padding, not speed


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
    """A batch of one side. The first response begins at column `start`, and with `readings` all of them do.

    `positions` are counted from the start of the longer prompt of a twin, so they are equal on both sides at the
    response. `prefix` is the number of tokens with which all prompts begin, 0 if they begin at unequal positions.
    """

    start: int
    ids: torch.Tensor  # [rows, columns]
    mask: torch.Tensor  # [rows, columns] bool
    positions: torch.Tensor  # [rows, columns]
    response: torch.Tensor  # [rows, columns - start] bool
    instruction: torch.Tensor  # [rows, past + columns] bool: True where the prompts of both sides differ
    prefix: int = 0
    past: int = 0  # columns in the cache, before these

    def split_prefix(self) -> tuple[Reading, Reading]:
        """The prefix as a reading of one row, which has no response, and the rest of every row."""
        begins = self.mask.int().argmax(1)  # [rows]
        first, row = int(begins.min()), int(begins.argmin())  # the longest prompt
        inside = slice(first, first + self.prefix)
        common = Reading(
            self.prefix,
            self.ids[row : row + 1, inside],
            self.mask[row : row + 1, inside],
            self.positions[row : row + 1, inside],
            self.response[row : row + 1, :0],
            self.instruction[row : row + 1, inside],
        )
        columns = torch.arange(inside.stop, self.ids.shape[1], device=self.ids.device)
        rest = columns >= (begins + self.prefix).unsqueeze(1)  # [rows, columns]
        marked = self.instruction[:, inside.stop :] & rest
        return common, Reading(
            self.start - inside.stop,
            self.ids[:, inside.stop :],
            self.mask[:, inside.stop :] & rest,
            self.positions[:, inside.stop :],
            self.response,
            torch.cat([common.instruction.expand(len(self.ids), -1), marked], 1),
            past=self.prefix,
        )


Around = Callable[[Reading], AbstractContextManager[object]]
"""A context for one forward pass over a reading."""


def no_context(_reading: Reading) -> AbstractContextManager[object]:
    return nullcontext()


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
    batch_tokens: int = READ_TOKENS,
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


def parted(samples: Sequence[Sample], budget: int, twins_of: Callable[[Sample], Sequence[Twin]]) -> list[list[Sample]]:
    """Samples of similar length in parts of at most `budget` tokens (at least one sample), so that all parts together
    compute the fewest tokens. A prefix of all prompts is computed once in each part, the rest is padded."""
    order = sorted(samples, key=lambda sample: -max(twin.length for twin in twins_of(sample)))
    twins = [twins_of(sample) for sample in order]
    prompts = [twin.positive for group in twins for twin in group]
    shared = _common_prefix(min(prompts), max(prompts), min(map(len, prompts)))
    best = [(0, 0)]  # tokens of the first samples in their best parts, and where the last of these parts begins
    for end in range(1, len(order) + 1):
        choices = []
        for begin in range(end - 1, -1, -1):
            width = max(twin.length for twin in twins[begin])
            rows = sum(map(len, twins[begin:end]))
            if rows * width > budget and begin < end - 1:
                break
            choices.append((best[begin][0] + shared + rows * (width - shared), begin))
        best.append(min(choices))
    parts, end = list[list[Sample]](), len(order)
    while end:
        begin = best[end][1]
        parts.append(order[begin:end])
        end = begin
    return parts[::-1]


def alone(twin: Twin) -> tuple[Twin]:
    """The twins of a sample that is one twin."""
    return (twin,)


def readings(group: Sequence[Twin], pad: int, device: torch.device | str) -> tuple[Reading, Reading]:
    """Both sides of a group. Prompts are padded on the left to the same length, responses on the right."""
    start = max(twin.prompt_length for twin in group)
    return (
        _reading([(twin.positive, twin) for twin in group], start, pad, device),
        _reading([(twin.negative, twin) for twin in group], start, pad, device),
    )


def packed_readings(group: Sequence[Twin], pad: int, device: torch.device | str) -> tuple[Reading, Reading]:
    """Both sides of a group with the least padding, all of it on the right. Responses begin at unequal columns."""
    return (
        _reading([(twin.positive, twin) for twin in group], None, pad, device),
        _reading([(twin.negative, twin) for twin in group], None, pad, device),
    )


def read(lm: LanguageModel, reading: Reading, layers: Sequence[int]) -> torch.Tensor:
    """Block outputs at the response's columns, float32 `[layers, rows, response, hidden]`, with gradients. Blocks above
    the highest of the layers do not run."""
    columns = reading.response.shape[1]
    with record(lm.blocks, layers) as outputs:
        forward(lm, reading, lambda _part: stopping_after(lm.blocks[max(layers)]))
    return torch.stack([outputs[layer][:, -columns:].float() for layer in layers])


def forward(lm: LanguageModel, reading: Reading, around: Around = no_context, *, keep: int = 1) -> None:
    """Run the model over a reading. The output projection takes the last `keep` positions, or all.

    A prefix that all rows share is computed once, where the model's cache allows it. Then there are two passes: one
    over the prefix, one over the rest of the rows. `around` gives the context of each.
    """
    if reading.prefix < MIN_SHARED or not shares_prompts(lm):
        return _pass(lm, reading, around, keep, None)
    common, rest = reading.split_prefix()
    cache = SharedPrompts(lm)
    _pass(lm, common, around, 1, cache)
    cache.share(torch.zeros(len(rest.ids), dtype=torch.long, device=rest.ids.device))
    return _pass(lm, rest, around, keep, cache)


def _pass(lm: LanguageModel, reading: Reading, around: Around, keep: int, cache: SharedPrompts | None) -> None:
    head = {"logits_to_keep": keep} if takes(lm.model, "logits_to_keep") else {}
    state = {"use_cache": False} if cache is None else {"past_key_values": cache, "use_cache": True}
    with around(reading):
        lm.model(**_arguments(lm, reading), **head, **state)


def _arguments(lm: LanguageModel, reading: Reading) -> dict[str, torch.Tensor]:
    """The arguments of the model's forward: ids, and mask and positions if the architecture takes them."""
    arguments = {"input_ids": reading.ids}
    if takes(lm.model, "attention_mask"):
        seen = reading.mask.new_ones(len(reading.ids), reading.past)
        arguments["attention_mask"] = torch.cat([seen, reading.mask], 1).long()
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
    rows: Sequence[tuple[tuple[int, ...], Twin]], start: int | None, pad: int, device: torch.device | str
) -> Reading:
    """Rows whose responses begin at column `start`; rows that begin at column 0 if it is None."""
    starts = [len(prompt) if start is None else start for prompt, _ in rows]
    ends = [begin + len(twin.response) for begin, (_, twin) in zip(starts, rows, strict=True)]
    ids = torch.full((len(rows), max(ends)), pad)
    mask, response, instruction = torch.zeros(3, *ids.shape, dtype=torch.bool)
    for row, (prompt, twin) in enumerate(rows):
        first, begin, end = starts[row] - len(prompt), starts[row], ends[row]
        ids[row, first:end] = torch.tensor([*prompt, *twin.response])
        mask[row, first:end] = response[row, begin:end] = True
        heads, tails = twin.shared
        instruction[row, first + heads : begin - tails] = True
    zeros = torch.tensor([begin - twin.prompt_length for begin, (_, twin) in zip(starts, rows, strict=True)])
    positions = (torch.arange(ids.shape[1]) - zeros.unsqueeze(1)).clamp_min(0)
    ids, mask, positions, response, instruction = (
        tensor.to(device) for tensor in (ids, mask, positions, response[:, min(starts) :], instruction)
    )
    return Reading(min(starts), ids, mask, positions, response, instruction, prefix=_shared_prefix(rows))


def _shared_prefix(rows: Sequence[tuple[tuple[int, ...], Twin]]) -> int:
    """The number of tokens with which all prompts begin, at the same positions and with the same part of them in the
    instruction. Each prompt's last token, which predicts, is not counted."""
    if len(rows) == 1 or len({twin.prompt_length - len(prompt) for prompt, twin in rows}) > 1:
        return 0
    ends = [(len(prompt) - 1, *twin.shared) for prompt, twin in rows]
    marked = [
        [(token, heads <= place < last + 1 - tails) for place, token in enumerate(prompt[:last])]
        for (prompt, _), (last, heads, tails) in zip(rows, ends, strict=True)
    ]
    least, most = min(marked), max(marked)
    return _common_prefix(least, most, min(len(least), len(most)))


def _common_prefix(one: Sequence[object], other: Sequence[object], limit: int) -> int:
    """The length of the common prefix, at most `limit`."""
    return next((place for place in range(limit) if one[place] != other[place]), limit)


def pad_id(lm: LanguageModel) -> int:
    """A token id for padding. It is always masked."""
    pad = lm.tokenizer.pad_token_id
    return int(pad) if isinstance(pad, int) else 0
