"""A model steered by one profile, for offline measurements: log-probabilities, divergences and samples.

Steering begins at the last prompt token. The batched sampler uses no padding, so it also works for recurrent models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from steering_vectors.data.batches import DEFAULT_BATCH_TOKENS, Batch, Encoded, batches
from steering_vectors.errors import ModelError
from steering_vectors.measures.divergence import kl_divergence
from steering_vectors.models.forward import takes
from steering_vectors.models.hooks import PositionSelector
from steering_vectors.models.limits import eos_ids
from steering_vectors.models.loading import LanguageModel
from steering_vectors.profiles.mixture import Mixture, Term
from steering_vectors.profiles.profile import Profile
from steering_vectors.steering.bank import SteeringBank

CACHES = ("past_key_values", "cache_params")  # other models are recomputed (RWKV's state is wrong in batches)
MAX_LOGITS = 2**27  # numbers per batch, so a large vocabulary makes batches smaller
MAX_LENGTH_GAP = 32  # tokens between the shortest and the longest prompt of a sampled batch
MAX_SAMPLED_TOKENS = 2**15  # prompts and samples of a batch, which bounds the cache's memory


class SteeredModel:
    """A model with a steering bank of one row. `steerable` creates it."""

    def __init__(self, lm: LanguageModel, bank: SteeringBank, selector: PositionSelector) -> None:
        self.lm = lm
        self.batch_tokens = DEFAULT_BATCH_TOKENS  # of one pass
        self._bank = bank
        self._selector = selector

    def write(self, profile: Profile, strength: float) -> None:
        """Steer the following passes with this profile, at any strength."""
        self._bank.write(0, Mixture((Term(profile, strength),), allow_beyond_safe=True))

    def log_likelihoods(self, examples: Sequence[Encoded], *, steer: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """(log P(response | prompt) in nats, number of tokens counted) per example, float64 `[examples]` each.

        The first token of a response is counted if there is a token before it.
        """

        def chosen(batch: Batch, index: torch.Tensor) -> torch.Tensor:
            targets = batch.ids.gather(1, (index + 1).clamp_max(batch.ids.shape[1] - 1)).unsqueeze(-1)
            return self._log_probs(batch, index, steer).gather(-1, targets).squeeze(-1)

        return self._summed(examples, chosen)

    def divergences(self, examples: Sequence[Encoded]) -> tuple[torch.Tensor, torch.Tensor]:
        """(Σ KL(steered‖base) in nats over the response, number of tokens counted) per example, float64."""

        def divergence(batch: Batch, index: torch.Tensor) -> torch.Tensor:
            return kl_divergence(self._log_probs(batch, index, True), self._log_probs(batch, index, False))

        return self._summed(examples, divergence)

    def predictions(self, examples: Sequence[Encoded], *, steer: bool) -> Iterator[torch.Tensor]:
        """Yield a batch's log-probabilities where responses are predicted, float32 `[positions, vocabulary]`.

        The order of positions is the same at every call with these examples.
        """
        for batch, index, valid in self._scored(examples):
            yield self._log_probs(batch, index, steer)[valid]

    def sample(self, prompts: Sequence[Sequence[int]], *, tokens: int, seed: int) -> list[list[int]]:
        """Continue each prompt by up to `tokens` tokens at temperature 1, steered. The EOS token is included.

        Row i samples by inverse transform from random numbers that depend only on (seed, i), so calls with the same
        seed and slightly different shifts give mostly equal texts.
        """
        uniforms = torch.rand(len(prompts), tokens, generator=torch.Generator().manual_seed(seed))
        texts: dict[int, list[int]] = {}
        for group in _similar([len(prompt) for prompt in prompts], tokens):
            rows = self._sample_group([prompts[index] for index in group], uniforms[group].to(self.lm.device))
            texts.update(zip(group, rows, strict=True))
        return [texts[index] for index in range(len(prompts))]

    def continuations(self, prompts: Sequence[Sequence[int]], *, tokens: int, seed: int) -> list[Encoded]:
        """Each prompt with its sample, as examples for the other methods."""
        texts = self.sample(prompts, tokens=tokens, seed=seed)
        return [([*prompt, *text], len(prompt)) for prompt, text in zip(prompts, texts, strict=True)]

    def _summed(
        self, examples: Sequence[Encoded], values: Callable[[Batch, torch.Tensor], torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The sums of values `[rows, k]` over each response, and the number of tokens counted."""
        sums, counts = torch.zeros(2, len(examples), dtype=torch.float64)
        for batch, index, valid in self._scored(examples):
            sums[list(batch.indices)] = (values(batch, index).double() * valid).sum(1).cpu()
            counts[list(batch.indices)] = valid.sum(1).double().cpu()
        return sums, counts

    def _scored(self, examples: Sequence[Encoded]) -> Iterator[tuple[Batch, torch.Tensor, torch.Tensor]]:
        """Yield batches, the positions `[rows, k]` whose logits predict the response, and a mask of the valid ones."""
        budget = min(self.batch_tokens, MAX_LOGITS // self.lm.vocab_size)
        for batch in batches(examples, budget, self.lm.device):
            first = batch.starts.clamp_min(1)
            counts = (batch.lengths - first).clamp_min(0)
            steps = torch.arange(max(int(counts.max()), 1), device=self.lm.device)
            valid = steps < counts.unsqueeze(1)
            index = (first - 1).unsqueeze(1) + steps
            yield batch, torch.where(valid, index, 0).clamp_max(batch.ids.shape[1] - 2).clamp_min(0), valid

    def _log_probs(self, batch: Batch, index: torch.Tensor, steer: bool) -> torch.Tensor:
        """Log-probabilities at the given positions, float32 `[rows, k, vocabulary]`."""
        where = batch.mask & (batch.positions >= (batch.starts.clamp_min(1) - 1).unsqueeze(1))
        options = {"attention_mask": batch.mask.long()} if takes(self.lm.model, "attention_mask") else {}
        with torch.no_grad(), ExitStack() as stack:
            stack.enter_context(self._selector.select(index))
            if steer:
                stack.enter_context(self._bank.step(slice(1), where))
            logits = self.lm.model(input_ids=batch.ids, use_cache=False, **options).logits
        return torch.log_softmax(logits.float(), dim=-1)

    def _sample_group(self, prompts: Sequence[Sequence[int]], uniforms: torch.Tensor) -> list[list[int]]:
        """Sample all rows together from the end of the shortest prompt. Longer prompts first keep their own tokens."""
        tokens, lengths = uniforms.shape[1], torch.tensor([len(prompt) for prompt in prompts], device=self.lm.device)
        width = max(map(len, prompts)) + tokens
        padded = [[*prompt, *[0] * (width - len(prompt))] for prompt in prompts]  # aligned on the left
        ids, ends = torch.tensor(padded, device=self.lm.device), lengths + tokens
        eos = torch.tensor(sorted(eos_ids(self.lm)), dtype=torch.long, device=self.lm.device)
        cache: dict[str, Any] = {}
        for position in range(int(lengths.min()), ids.shape[1]):
            logits, cache = self._advance(ids[:, :position], lengths, cache)
            step = (position - lengths).clamp(0, tokens - 1).unsqueeze(1)
            drawn = _draw(logits, uniforms.gather(1, step).squeeze(1))
            free = (position >= lengths) & (position < ends)
            ids[:, position] = torch.where(free, drawn, ids[:, position])
            ends = torch.where(free & torch.isin(drawn, eos), position + 1, ends)
            if bool((ends <= position + 1).all()):
                break
        bounds = zip(ids.tolist(), lengths.tolist(), ends.tolist(), strict=True)
        return [row[start:end] for row, start, end in bounds]

    def _advance(
        self, ids: torch.Tensor, lengths: torch.Tensor, cache: dict[str, Any]
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Logits `[rows, vocabulary]` after ids `[rows, positions]`. The cache holds all but the last position."""
        seen = ids.shape[1] - 1 if cache else 0
        positions = torch.arange(seen, ids.shape[1], device=ids.device)
        where = positions >= (lengths - 1).unsqueeze(1)
        last = torch.full((len(ids), 1), ids.shape[1] - 1 - seen, device=ids.device)
        with torch.no_grad(), self._bank.step(slice(1), where), self._selector.select(last):
            output = self.lm.model(input_ids=ids[:, seen:], use_cache=True, **cache)
        memory = {name: output[name] for name in CACHES if output.get(name) is not None}
        return output.logits[:, -1], dict(list(memory.items())[:1])


@contextmanager
def steerable(lm: LanguageModel) -> Iterator[SteeredModel]:
    """Attach a steering bank of one row to a model. Raises ModelError if the model has no output projection."""
    projection = lm.model.get_output_embeddings()
    if projection is None:
        raise ModelError(f"{lm.identity.architecture} has no output projection, so it predicts no tokens")
    bank = SteeringBank.over(lm, rows=1)
    selector = PositionSelector(projection)
    bank.attach()
    try:
        yield SteeredModel(lm, bank, selector)
    finally:
        bank.detach()
        selector.remove()


def _similar(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Group indices by length, within MAX_LENGTH_GAP and, with `tokens` more in each row, MAX_SAMPLED_TOKENS."""
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: (lengths[index], index)):
        room = (lengths[index] + tokens) * (len(groups[-1]) + 1) <= MAX_SAMPLED_TOKENS if groups else False
        if room and lengths[index] - lengths[groups[-1][0]] <= MAX_LENGTH_GAP:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def _draw(logits: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Sample a token per row by inverse transform: the first whose cumulative probability exceeds the row's number."""
    cumulative = torch.softmax(logits.float(), dim=-1).cumsum(-1)
    target = uniforms.unsqueeze(1) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(1).clamp_max(logits.shape[-1] - 1)
