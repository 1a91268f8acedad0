"""Sampling many texts at once through the runner that serving uses.

The tokens that prompts share are computed once, rows that ended are not computed, and the unsteered model can read each
text while it is written, at the price of another row in the blocks from the first steered one on.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch

from steering_vectors.measures.divergence import kl_divergence
from steering_vectors.models.hooks import record, resumed
from steering_vectors.models.limits import context_limit, eos_ids
from steering_vectors.models.loading import LanguageModel
from steering_vectors.profiles.mixture import Mixture
from steering_vectors.runtime.choose_runner import choose_runner
from steering_vectors.runtime.runner import RowInput
from steering_vectors.steering.accelerated_bank import AcceleratedBank

MAX_ROWS = 128
CACHE_BYTES = 448 * 2**20  # for keys and values; more for a large model, see CACHE_SHARE
CACHE_SHARE = 1 / 8  # of the weights' bytes
CONTEXT_STEP = 16
MAX_LENGTH_GAP = 32  # tokens between the shortest and the longest prompt that are sampled together
PREFILL_TOKENS = 2048  # prompt tokens of one pass


@dataclass(slots=True, eq=False)
class Sampled:
    """Texts by prompt that one steering wrote, and what the unsteered model reads in them.

    `token_divergences` is KL(steered‖base) in nats and `token_likelihoods` log P_base at each token of the texts that
    were compared, which are the first ones: float64 `[compared, tokens]`, 0 behind a text's end. `divergences` and
    `likelihoods` are their sums, `[compared]`. `activations` `[layers, hidden]` is the unsteered blocks' mean output
    over all tokens but each text's last, and `norms` `[layers]` its mean norm there.
    """

    texts: list[list[int]]
    token_divergences: torch.Tensor
    token_likelihoods: torch.Tensor
    activations: torch.Tensor | None = None
    norms: torch.Tensor | None = None

    @property
    def divergences(self) -> torch.Tensor:
        return self.token_divergences.sum(1)

    @property
    def likelihoods(self) -> torch.Tensor:
        return self.token_likelihoods.sum(1)

    @property
    def tokens(self) -> int:
        return sum(map(len, self.texts))


@dataclass(slots=True, eq=False)
class _Row:
    """A text in the making: of which steering, and after which prompt. A `reader` is the unsteered model's row for the
    text of another one."""

    steering: int
    index: int
    prompt: Sequence[int]
    text: list[int] = field(default_factory=list)
    reader: bool = False

    @property
    def key(self) -> tuple[int, int]:
        return self.steering, self.index

    @property
    def position(self) -> int:
        """Of the token that is computed next: the prompt's last one, or the latest one drawn."""
        return len(self.prompt) - 1 + len(self.text)

    @property
    def token(self) -> int:
        return self.text[-1] if self.text else self.prompt[-1]


@dataclass(slots=True, eq=False)
class _Task:
    """One call of `sample`: what it asks for, and what was found. `first` is the first layer that is steered. `sums`
    `[mixtures, layers read, hidden + 1]` are of activations and their norms, over `counts` tokens."""

    mixtures: Sequence[Mixture]
    uniforms: torch.Tensor
    compared: int
    read: Sequence[int]
    first: int
    found: list[Sampled]
    sums: torch.Tensor
    counts: torch.Tensor
    temperature: float


class Sampler:
    """Rows of a slot cache in which texts are written. `close` it to remove its hooks.

    `outputs` are the outputs of all blocks in some pass, for an architecture whose passes may begin at a block; without
    them the unsteered model reads texts in all blocks.
    """

    def __init__(self, lm: LanguageModel, *, context: int, outputs: Sequence[Any] = ()) -> None:
        self._lm, self.context, self._outputs = lm, context, outputs
        self._rows = _rows_that_fit(lm, context)
        self._bank = AcceleratedBank.over(lm, rows=self._rows)
        with ExitStack() as stack:
            self._bank.attach()
            stack.callback(self._bank.detach)
            self._runner = choose_runner(lm, self._bank, context=context, static=False)
            stack.callback(self._runner.close)
            self._stack = stack.pop_all()
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
        mixtures: Sequence[Mixture],
        prompts: Sequence[Sequence[int]],
        uniforms: torch.Tensor,
        *,
        compared: int = 0,
        read: Sequence[int] = (),
        temperature: float = 1.0,
    ) -> list[Sampled]:
        """Continue each prompt under each mixture by up to as many tokens as `uniforms` `[prompts, tokens]` has
        columns, steered from the last prompt token on. Rows of all mixtures share batches, which costs less than one
        after the other. Divergences and likelihoods are of temperature 1, whatever texts are drawn at.

        The unsteered model reads the texts of the first `compared` prompts too, which gives divergences and
        likelihoods, and the activations of the layers `read` with their norms. It needs another row for each of them,
        but for those of mixtures without an effect.
        """
        cells = (compared, uniforms.shape[1])
        layers = [term.active_layers[0] for one in mixtures for term in one.terms if not one.is_idle(term)]
        task = _Task(
            mixtures,
            uniforms,
            compared,
            read,
            first=min(layers, default=0) if self._outputs else 0,
            found=[Sampled([[] for _ in prompts], *torch.zeros(2, *cells, dtype=torch.float64)) for _ in mixtures],
            sums=torch.zeros(len(mixtures), len(read), self._lm.hidden_size + 1, dtype=torch.float64),
            counts=torch.zeros(len(mixtures), 1, 1, dtype=torch.float64),
            temperature=temperature,
        )
        units = [
            self._unit(steering, index, prompt, index < compared and not mixture.is_neutral)
            for steering, mixture in enumerate(mixtures)
            for index, prompt in enumerate(prompts)
        ]
        for group in similar([len(unit[0].prompt) for unit in units], self._rows, list(map(len, units))):
            rows = [row for place in group for row in units[place]]
            self._write([row for row in rows if not row.reader], [row for row in rows if row.reader], task)
        for row, *_ in units:
            task.found[row.steering].texts[row.index] = row.text
        if read:
            for one, mean in zip(task.found, (task.sums / task.counts.clamp_min(1)).float(), strict=True):
                one.activations, one.norms = mean[:, :-1], mean[:, -1]
        return task.found

    @staticmethod
    def _unit(steering: int, index: int, prompt: Sequence[int], read: bool) -> list[_Row]:
        """The row of a text, with its reader if it has one."""
        row = _Row(steering, index, prompt)
        return [row, _Row(steering, index, prompt, row.text, reader=True)] if read else [row]

    def _prefill(self, rows: Sequence[_Row]) -> None:
        """Compute all prompt tokens but the last, each distinct prompt once, and copy them to the rows that share
        them."""
        owners: dict[tuple[int, ...], int] = {}
        for place, row in enumerate(rows):
            owners.setdefault(tuple(row.prompt[:-1]), place)
        heads = sorted(owners, key=lambda head: owners[head])
        shared = _common(heads) if len(heads) > 1 else 0
        if shared:
            self._compute([(owners[heads[0]], heads[0][:shared])], 0)
            for head in heads[1:]:
                self._copy(owners[heads[0]], owners[head], shared)
        self._compute([(owners[head], head[shared:]) for head in heads if len(head) > shared], shared)
        for place, row in enumerate(rows):
            owner = owners[tuple(row.prompt[:-1])]
            if place != owner:
                self._copy(owner, place, len(row.prompt) - 1)

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

    def _write(self, writers: list[_Row], readers: list[_Row], task: _Task) -> None:
        """Draw the texts of rows, in slots from 0 on, while the unsteered model reads along in the slots after them."""
        behind = len(writers)
        with torch.inference_mode():
            self._prefill([*writers, *readers])
        for place, row in enumerate([*writers, *readers]):
            self._steer(place, row, task.mixtures)
        while writers:
            with torch.inference_mode():
                logits, outputs = self._pass(writers, 0, {*task.read, task.first - 1} - {-1})
                steered = torch.log_softmax(logits.float(), dim=-1)
                steps = torch.tensor([[row.index, len(row.text)] for row in writers]).unbind(1)
                drawn = draw(steered / task.temperature, task.uniforms[steps].to(steered.device))
                self._compare(writers, readers, behind, steered, drawn, outputs, task)
            ended = set()
            for row, token, end in zip(writers, drawn.tolist(), torch.isin(drawn, self._eos).tolist(), strict=True):
                row.text.append(token)
                if end or len(row.text) == task.uniforms.shape[1]:
                    ended.add(row.key)
            writers = self._compacted(writers, ended, 0, task.mixtures)
            readers = self._compacted(readers, ended, behind, task.mixtures)

    def _pass(
        self, rows: Sequence[_Row], slot: int, layers: Iterable[int]
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """Logits of each row's next token `[rows, vocabulary]`, and outputs by layer `[rows, 1, hidden]`. The first row
        is in `slot`."""
        batch = [
            RowInput(place, [row.token], row.position, None if row.reader else len(row.prompt) - 1)
            for place, row in enumerate(rows, start=slot)
        ]
        with record(self._lm.blocks, sorted(layers)) as outputs:
            return self._runner.forward(batch).logits, outputs

    def _compare(
        self,
        writers: Sequence[_Row],
        readers: Sequence[_Row],
        behind: int,
        steered: torch.Tensor,
        drawn: torch.Tensor,
        outputs: dict[int, torch.Tensor],
        task: _Task,
    ) -> None:
        """Add to the task what the unsteered model reads in the rows that are compared.

        `steered` are the writers' log-probabilities `[rows, vocabulary]`, `drawn` their next tokens and `outputs` their
        block outputs. A row with a reader takes the unsteered values from it, others are unsteered themselves. Readers
        run the blocks from the first steered one on.
        """
        places = [place for place, row in enumerate(writers) if row.index < task.compared]
        if not places:
            return
        base, states = steered[places], {layer: outputs[layer][places, 0].double() for layer in task.read}
        if readers:
            number = {writers[place].key: number for number, place in enumerate(places)}
            numbers = [number[row.key] for row in readers]
            with ExitStack() as stack:
                if task.first:
                    hidden = outputs[task.first - 1][[places[number] for number in numbers]]
                    stack.enter_context(resumed(self._lm.blocks, self._outputs, task.first - 1, hidden))
                logits, outputs = self._pass(readers, behind, [layer for layer in task.read if layer >= task.first])
            base[numbers] = torch.log_softmax(logits.float(), dim=-1)
            for layer, output in outputs.items():
                states[layer][numbers] = output[:, 0].double()
        likelihoods = base.gather(1, drawn[places].unsqueeze(1)).squeeze(1).tolist()
        divergences = kl_divergence(steered[places], base).tolist()
        for place, likelihood, divergence in zip(places, likelihoods, divergences, strict=True):
            row = writers[place]
            one, cell = task.found[row.steering], (row.index, len(row.text))
            one.token_likelihoods[cell] = likelihood
            if not task.mixtures[row.steering].is_neutral:
                one.token_divergences[cell] = divergence
        started = [number for number, place in enumerate(places) if writers[place].text]
        if task.read and started:
            steerings = torch.tensor([writers[places[number]].steering for number in started])
            vectors = torch.stack([states[layer][started].cpu() for layer in task.read], dim=1)
            task.sums.index_add_(0, steerings, torch.cat([vectors, vectors.norm(dim=-1, keepdim=True)], dim=-1))
            task.counts.index_add_(0, steerings, torch.ones(len(started), 1, 1, dtype=torch.float64))

    def _compacted(
        self, rows: Sequence[_Row], ended: Collection[tuple[int, int]], slot: int, mixtures: Sequence[Mixture]
    ) -> list[_Row]:
        """The rows whose texts go on, moved together to the slots from `slot` on, where the first row is."""
        going = [None if row.key in ended else row for row in rows]
        for place in range(len(going)):
            while going and going[-1] is None:
                going.pop()
            if place < len(going) and going[place] is None:
                row = going.pop()
                assert row is not None
                self._copy(slot + len(going), slot + place, row.position)
                self._steer(slot + place, row, mixtures)
                going[place] = row
        return [row for row in going if row is not None]

    def _steer(self, slot: int, row: _Row, mixtures: Sequence[Mixture]) -> None:
        if row.reader:
            self._bank.clear(slot)
        else:
            self._bank.write(slot, mixtures[row.steering])

    def _copy(self, source: int, target: int, length: int) -> None:
        columns = self._runner.columns
        assert columns is not None
        with torch.inference_mode():
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


def similar(lengths: Sequence[int], size: int, widths: Sequence[int] | None = None) -> list[list[int]]:
    """Indices in groups of at most `size`, by length, within MAX_LENGTH_GAP. An index counts as `widths` says, or 1."""
    groups: list[list[int]] = []
    filled = 0
    for index in sorted(range(len(lengths)), key=lambda index: (lengths[index], index)):
        width = 1 if widths is None else widths[index]
        if groups and filled + width <= size and lengths[index] - lengths[groups[-1][0]] <= MAX_LENGTH_GAP:
            groups[-1].append(index)
            filled += width
        else:
            groups.append([index])
            filled = width
    return groups


def _common(heads: Sequence[tuple[int, ...]]) -> int:
    """The number of tokens with which all begin."""
    first, last = min(heads), max(heads)
    return next((place for place, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), len(first))
