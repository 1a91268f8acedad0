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
