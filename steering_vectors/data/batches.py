"""Right-padded batches of token sequences with a bounded number of tokens, sorted by length or by shared prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

Order = Callable[[int], tuple[object, ...]]
"""The sort key of an example, by its index."""

Rows = list[tuple[int, int]]
"""The rows of a batch: an example, and the number of its tokens in the shared prompt."""

Encoded = tuple[Sequence[int], int]
"""Token ids of a prompt with its response, and the index of the response's first token."""

DEFAULT_BATCH_TOKENS = 4096
SHARED_PART = 4  # batches of shared prompts have so many times fewer tokens: less padding, about as fast
WORTHWHILE = 0.95  # of the tokens without shared prompts
SIMILAR = 1.3  # factor between lengths that count as equal


@dataclass(frozen=True, slots=True, eq=False)
class Prompts:
    """Prompts that the rows of a batch continue, without each prompt's last token: row r continues `owners[r]`."""

    ids: torch.Tensor  # [prompts, positions], padded on the right
    lengths: torch.Tensor  # [prompts]
    owners: torch.Tensor  # [rows]

    @property
    def mask(self) -> torch.Tensor:
        """True at tokens, False at padding: bool `[prompts, positions]`."""
        return torch.arange(self.ids.shape[1], device=self.ids.device) < self.lengths.unsqueeze(1)


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """The rows of a forward pass. Row r holds example `indices[r]`, or what comes after the prompt that it shares."""

    indices: tuple[int, ...]
    ids: torch.Tensor  # [rows, positions], padded on the right
    lengths: torch.Tensor  # [rows]
    starts: torch.Tensor  # [rows], the response's first token
    prompts: Prompts | None = None

    @property
    def positions(self) -> torch.Tensor:
        return torch.arange(self.ids.shape[1], device=self.ids.device)  # [positions]

    @property
    def mask(self) -> torch.Tensor:
        """True at tokens, False at padding: bool `[rows, positions]`."""
        return self.positions < self.lengths.unsqueeze(1)

    @property
    def response(self) -> torch.Tensor:
        """True at the response's tokens: bool `[rows, positions]`."""
        return self.mask & (self.positions >= self.starts.unsqueeze(1))


def batches(
    examples: Sequence[Encoded],
    budget: int,
    device: torch.device | str = "cpu",
    *,
    share: bool = False,
    kept: bool = False,
) -> Iterator[Batch]:
    """Yield the examples, longest first, in batches of at most `budget` tokens with padding (at least one row each).

    With `share`, rows with the same prompt share it where fewer tokens are computed then; prompts that are `kept` for
    many passes do not count. Such a batch has at most a quarter of the budget in prompts and a quarter in rows without
    them.

    The order depends only on the examples, so equal examples give equal batches.
    """
    plan = _planned(examples, budget, [0] * len(examples), lambda index: (-len(examples[index][0]), index))
    if share:
        cuts = [max(0, start - 1) for _, start in examples]
        plans = [_planned(examples, budget, cuts, order) for order in _orders(examples, cuts)]
        shared = min(plans, key=lambda plan: _tokens(examples, plan, kept))
        if _tokens(examples, shared, kept) < WORTHWHILE * _tokens(examples, plan):
            plan = shared
    for rows in plan:
        yield _batch(examples, rows, device)


def _tokens(examples: Sequence[Encoded], plan: Sequence[Rows], kept: bool = False) -> int:
    """The tokens that batches compute, padding included; those of prompts only if they are not kept."""
    total = 0
    for rows in plan:
        prompts = set() if kept else {tuple(examples[index][0][:cut]) for index, cut in rows}
        rest = max(len(examples[index][0]) - cut for index, cut in rows)
        total += len(prompts) * max(map(len, prompts), default=0) + len(rows) * rest
    return total


def _orders(examples: Sequence[Encoded], cuts: Sequence[int]) -> Iterator[Order]:
    """Sort keys under which rows with the same prompt are together, longest first: by similar lengths of prompts and
    then by the rest, or the other way round."""
    heads = [tuple(ids[:cut]) for (ids, _), cut in zip(examples, cuts, strict=True)]
    longest: dict[tuple[int, ...], int] = {}
    for head, (ids, _) in zip(heads, examples, strict=True):
        longest[head] = max(longest.get(head, 0), len(ids) - len(head))

    def key(index: int, first: int, second: int) -> tuple[object, ...]:
        similar = int(math.log(1 + first) / math.log(SIMILAR))
        return -similar, -second, heads[index], -len(examples[index][0]), index

    yield lambda index: key(index, len(heads[index]), longest[heads[index]])
    yield lambda index: key(index, longest[heads[index]], len(heads[index]))


def _planned(examples: Sequence[Encoded], budget: int, cuts: Sequence[int], order: Order) -> list[Rows]:
    """Fill batches one after the other, with the first `cuts[index]` tokens of each example in shared prompts."""
    plan: list[Rows] = []
    heads: set[tuple[int, ...]] = set()
    head_width = width = 0
    for index in sorted(range(len(examples)), key=order):
        ids, cut = examples[index][0], cuts[index]
        head = tuple(ids[:cut])
        wider, longer = max(head_width, cut), max(width, len(ids) - cut)
        prompts, count = len(heads | {head}) * wider, 1 + (len(plan[-1]) if plan else 0)
        part = budget // SHARED_PART if wider else budget
        full = prompts > part or count * longer > part or count * (wider + longer) > budget
        if not plan or full or bool(cut) != bool(head_width):  # an empty prompt has nothing to attend to
            plan.append([])
            heads, wider, longer = set(), cut, len(ids) - cut
        plan[-1].append((index, cut))
        heads.add(head)
        head_width, width = wider, longer
    return plan


def _batch(examples: Sequence[Encoded], rows: Rows, device: torch.device | str) -> Batch:
    chosen = [(examples[index], cut) for index, cut in rows]
    heads: dict[tuple[int, ...], int] = {}
    owners = [heads.setdefault(tuple(ids[:cut]), len(heads)) for (ids, _), cut in chosen]
    prompts = None
    if any(heads):
        prompts = Prompts(*_padded(list(heads), device), torch.tensor(owners, device=device))
    ids, lengths = _padded([ids[cut:] for (ids, _), cut in chosen], device)
    starts = torch.tensor([start - cut for (_, start), cut in chosen], device=device)
    return Batch(tuple(index for index, _ in rows), ids, lengths, starts, prompts)


def _padded(rows: Sequence[Sequence[int]], device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows padded on the right with zeros, and their lengths."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)
    return ids, torch.tensor([len(row) for row in rows], device=device)


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """A batch, the positions `[rows, k]` whose logits predict its responses, and which of them are valid."""

    batch: Batch
    index: torch.Tensor
    valid: torch.Tensor

    @property
    def targets(self) -> torch.Tensor:
        """The tokens that are predicted, `[positions]`."""
        following = (self.index + 1).clamp_max(self.batch.ids.shape[1] - 1)
        return self.batch.ids.gather(1, following)[self.valid]


def scored_batches(
    examples: Sequence[Encoded],
    budget: int,
    device: torch.device | str = "cpu",
    *,
    share: bool = False,
    kept: bool = False,
) -> Iterator[Scored]:
    """Yield `batches` with the positions that predict their responses. The first token of a response is predicted if
    there is a token before it."""
    for batch in batches(examples, budget, device, share=share, kept=kept):
        first = batch.starts.clamp_min(1)
        counts = (batch.lengths - first).clamp_min(0)
        steps = torch.arange(max(int(counts.max()), 1), device=batch.ids.device)
        valid = steps < counts.unsqueeze(1)
        index = (first - 1).unsqueeze(1) + steps
        yield Scored(batch, torch.where(valid, index, 0).clamp_max(batch.ids.shape[1] - 2).clamp_min(0), valid)
