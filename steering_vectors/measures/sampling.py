"""Sampling many texts at once through the runner that serving uses.

The tokens that prompts share are computed once, rows that ended are not computed, and the unsteered model can read each
text while it is written, at the price of one more row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch

from steering_vectors.measures.divergence import kl_divergence
from steering_vectors.models.hooks import record
from steering_vectors.models.limits import context_limit, eos_ids
from steering_vectors.models.loading import LanguageModel
from steering_vectors.profiles.mixture import Mixture
from steering_vectors.runtime.choose_runner import choose_runner
from steering_vectors.runtime.runner import RowInput
from steering_vectors.steering.accelerated_bank import AcceleratedBank

MAX_ROWS = 128
CACHE_BYTES = 256 * 2**20  # for keys and values; more for a large model, see CACHE_SHARE
CACHE_SHARE = 1 / 8  # of the weights' bytes
CONTEXT_STEP = 64
MAX_LENGTH_GAP = 32  # tokens between the shortest and the longest prompt that are sampled together
PREFILL_TOKENS = 2048  # prompt tokens of one pass


@dataclass(slots=True, eq=False)
class Sampled:
    """Texts by prompt, and what the unsteered model reads in them.

    `divergences` is Σ KL(steered‖base) in nats and `likelihoods` Σ log P_base over each text's tokens, float64
    `[texts]`. `activations` `[layers, hidden]` is the unsteered blocks' mean output over all tokens but each text's
    last.
    """

    texts: list[list[int]]
    divergences: torch.Tensor
    likelihoods: torch.Tensor
    activations: torch.Tensor | None = None

    @property
    def tokens(self) -> int:
        return sum(map(len, self.texts))


@dataclass(slots=True, eq=False)
class _Row:
    """A text in the making."""

    index: int
    prompt: Sequence[int]
    text: list[int] = field(default_factory=list)

    @property
    def position(self) -> int:
        """Of the token that is computed next: the prompt's last one, or the latest one drawn."""
        return len(self.prompt) - 1 + len(self.text)

    @property
    def token(self) -> int:
        return self.text[-1] if self.text else self.prompt[-1]


class Sampler:
    """Rows of a slot cache in which texts are written. `close` it to remove its hooks."""

    def __init__(self, lm: LanguageModel, *, context: int) -> None:
        self._lm, self.context = lm, context
        self._rows = _rows_that_fit(lm, context)
        self._bank = AcceleratedBank.over(lm, rows=self._rows)
        self._stack = ExitStack()
        self._bank.attach()
        self._stack.callback(self._bank.detach)
        self._runner = choose_runner(lm, self._bank, context=context, static=False)
        self._stack.callback(self._runner.close)
        self._eos = torch.tensor(sorted(eos_ids(lm)), dtype=torch.long, device=lm.device)

    @staticmethod
    def context_for(lm: LanguageModel, longest: int) -> int:
        """The context of a sampler for prompts that with their texts have `longest` tokens."""
        rounded, limit = -(-longest // CONTEXT_STEP) * CONTEXT_STEP, context_limit(lm)
        return rounded if limit is None else max(longest, min(rounded, limit))

    @property
    def batched(self) -> bool:
        """Whether rows are computed together, over keys and values by position."""
        return self._runner.columns is not None

    def close(self) -> None:
        self._stack.close()

    def sample(
        self,
        mixture: Mixture,
        prompts: Sequence[Sequence[int]],
        uniforms: torch.Tensor,
        *,
        compare: bool = False,
        read: Sequence[int] = (),
    ) -> Sampled:
        """Continue each prompt by up to as many tokens as `uniforms` `[prompts, tokens]` has columns, steered from the
        last prompt token on.

        With `compare`, the unsteered model reads the texts too, which gives divergences and likelihoods, and the
        activations of the layers `read`.
        """
        found = Sampled([[] for _ in prompts], *torch.zeros(2, len(prompts), dtype=torch.float64))
        width = 2 if compare and not mixture.is_neutral else 1
        for slot in range(self._rows):
            if slot % width:
                self._bank.clear(slot)
            else:
                self._bank.write(slot, mixture)
        sums, count = torch.zeros(len(read), self._lm.hidden_size, dtype=torch.float64), 0
        with torch.inference_mode():
            for group in similar([len(prompt) for prompt in prompts], self._rows // width):
                rows = [_Row(index, prompts[index]) for index in group]
                self._prefill(rows, width)
                for read_sums, tokens in self._write(rows, width, uniforms, found, read, compare):
                    sums, count = sums + read_sums, count + tokens
        if read:
            found.activations = (sums / max(count, 1)).float()
        return found

    def _prefill(self, rows: Sequence[_Row], width: int) -> None:
        """Compute all prompt tokens but the last, each distinct prompt once, and copy them to the rows that share
        them."""
        owners: dict[tuple[int, ...], int] = {}
        for place, row in enumerate(rows):
            owners.setdefault(tuple(row.prompt[:-1]), place * width)
        heads = sorted(owners, key=lambda head: owners[head])
        shared = _common(heads) if len(heads) > 1 else 0
        if shared:
            self._compute([(owners[heads[0]], heads[0][:shared])], 0)
            for head in heads[1:]:
                self._copy(owners[heads[0]], owners[head], shared)
        self._compute([(owners[head], head[shared:]) for head in heads if len(head) > shared], shared)
        for place, row in enumerate(rows):
            owner = owners[tuple(row.prompt[:-1])]
            for slot in range(place * width, place * width + width):
                if slot != owner:
                    self._copy(owner, slot, len(row.prompt) - 1)

    def _compute(self, parts: Sequence[tuple[int, Sequence[int]]], start: int) -> None:
        """Compute unsteered tokens of slots from position `start` on, at most PREFILL_TOKENS with padding in a pass."""
        while parts:
            longest = min(max(len(ids) for _, ids in parts), PREFILL_TOKENS)
            now = parts[: max(1, PREFILL_TOKENS // longest)]
            self._runner.forward([RowInput(slot, ids[:longest], start, start + len(ids)) for slot, ids in now])
            rest = [(slot, ids[longest:]) for slot, ids in now if len(ids) > longest]
            if rest:
                self._compute(rest, start + longest)
            parts = parts[len(now) :]

    def _write(
        self, rows: list[_Row], width: int, uniforms: torch.Tensor, found: Sampled, read: Sequence[int], compare: bool
    ) -> Iterator[tuple[torch.Tensor, int]]:
        """Draw the texts of rows, and yield the sums of the activations read, `[layers, hidden]`, with their number."""
        live = rows
        while live:
            batch = []
            for place, row in enumerate(live):
                batch.append(RowInput(place * width, [row.token], row.position, len(row.prompt) - 1))
                if width == 2:
                    batch.append(RowInput(place * width + 1, [row.token], row.position))
            with record(self._lm.blocks, read, lambda hidden: hidden[width - 1 :: width, 0].double()) as seen:
                logits = self._runner.forward(batch).logits
            if read:
                started = [place for place, row in enumerate(live) if row.text]
                yield torch.stack([seen[layer][started].sum(0).cpu() for layer in read]), len(started)
            steps = torch.tensor([[row.index, len(row.text)] for row in live]).unbind(1)
            steered = torch.log_softmax(logits[::width].float(), dim=-1)
            drawn = draw(steered, uniforms[steps].to(steered.device))
            if compare:
                base = torch.log_softmax(logits[1::2].float(), dim=-1) if width == 2 else steered
                found.divergences[steps[0]] += kl_divergence(steered, base).double().cpu()
                found.likelihoods[steps[0]] += base.gather(1, drawn.unsqueeze(1)).squeeze(1).double().cpu()
            ended = torch.isin(drawn, self._eos).tolist()
            for row, token in zip(live, drawn.tolist(), strict=True):
                row.text.append(token)
            live = self._compacted(live, ended, width, uniforms.shape[1])
        for row in rows:
            found.texts[row.index] = row.text

    def _compacted(self, rows: list[_Row], ended: Sequence[bool], width: int, tokens: int) -> list[_Row]:
        """The rows that go on, moved together to the first slots."""
        going = [None if end or len(row.text) == tokens else row for row, end in zip(rows, ended, strict=True)]
        for place in range(len(going)):
            while going and going[-1] is None:
                going.pop()
            if place < len(going) and going[place] is None:
                row = going.pop()
                assert row is not None
                for offset in range(width):
                    self._copy(len(going) * width + offset, place * width + offset, row.position)
                going[place] = row
        return [row for row in going if row is not None]

    def _copy(self, source: int, target: int, length: int) -> None:
        columns = self._runner.columns
        assert columns is not None
        columns.copy(source, target, length)


def draw(scores: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Sample a token per row by inverse transform: the first whose cumulative probability exceeds the row's number.

    `scores` are logits or log-probabilities `[rows, vocabulary]`, `uniforms` `[rows]` in [0, 1).
    """
    cumulative = torch.softmax(scores.float(), dim=-1).cumsum(-1)
    target = uniforms.unsqueeze(1) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(1).clamp_max(scores.shape[-1] - 1)


def _rows_that_fit(lm: LanguageModel, context: int) -> int:
    """An even number of slots whose keys and values take CACHE_BYTES, or CACHE_SHARE of a large model's weights."""
    config = lm.model.config.get_text_config()
    queries = int(getattr(config, "num_attention_heads", 1) or 1)
    heads = int(getattr(config, "num_key_value_heads", None) or queries)
    size = int(getattr(config, "head_dim", None) or lm.hidden_size // queries)
    position = 2 * lm.num_layers * heads * size * lm.dtype.itemsize
    budget = max(CACHE_BYTES, int(CACHE_SHARE * sum(one.nbytes for one in lm.model.parameters())))
    return 2 * max(1, min(MAX_ROWS, budget // (position * (context + 1))) // 2)


def similar(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Indices in groups of at most `size`, by length, within MAX_LENGTH_GAP."""
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: (lengths[index], index)):
        if groups and len(groups[-1]) < size and lengths[index] - lengths[groups[-1][0]] <= MAX_LENGTH_GAP:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def _common(heads: Sequence[tuple[int, ...]]) -> int:
    """The number of tokens with which all begin."""
    first, last = min(heads), max(heads)
    return next((place for place, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), len(first))
