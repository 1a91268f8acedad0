"""Right-padded batches of token sequences, sorted by length, with a bounded number of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

Encoded = tuple[Sequence[int], int]
"""Token ids of a prompt with its response, and the index of the response's first token."""

DEFAULT_BATCH_TOKENS = 4096


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """The rows of a forward pass. Row r holds example `indices[r]`."""

    indices: tuple[int, ...]
    ids: torch.Tensor  # [rows, positions], padded on the right
    lengths: torch.Tensor  # [rows]
    starts: torch.Tensor  # [rows], the response's first token

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


def batches(examples: Sequence[Encoded], budget: int, device: torch.device | str = "cpu") -> Iterator[Batch]:
    """Yield the examples, longest first, in batches of at most `budget` tokens with padding (at least one row each).

    The order depends only on the lengths, so equal examples give equal batches.
    """
    order = sorted(range(len(examples)), key=lambda index: (-len(examples[index][0]), index))
    while order:
        longest = len(examples[order[0]][0])
        rows = max(1, budget // longest)
        indices, order = order[:rows], order[rows:]
        chosen = [examples[index] for index in indices]
        yield Batch(
            tuple(indices),
            torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids, _ in chosen], device=device),
            torch.tensor([len(ids) for ids, _ in chosen], device=device),
            torch.tensor([start for _, start in chosen], device=device),
        )


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


def scored_batches(examples: Sequence[Encoded], budget: int, device: torch.device | str = "cpu") -> Iterator[Scored]:
    """Yield `batches` with the positions that predict their responses. The first token of a response is predicted if
    there is a token before it."""
    for batch in batches(examples, budget, device):
        first = batch.starts.clamp_min(1)
        counts = (batch.lengths - first).clamp_min(0)
        steps = torch.arange(max(int(counts.max()), 1), device=batch.ids.device)
        valid = steps < counts.unsqueeze(1)
        index = (first - 1).unsqueeze(1) + steps
        yield Scored(batch, torch.where(valid, index, 0).clamp_max(batch.ids.shape[1] - 2).clamp_min(0), valid)
