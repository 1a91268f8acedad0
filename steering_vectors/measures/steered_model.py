"""A model steered by one profile, for offline measurements: log-probabilities, divergences and samples.

Steering begins at the last prompt token. Logits are computed for a bounded number of positions at a time, so memory
does not grow with the vocabulary times the tokens of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from steering_vectors.data.batches import DEFAULT_BATCH_TOKENS, Encoded, Scored
from steering_vectors.measures.activations import pooled
from steering_vectors.measures.divergence import kl_divergence
from steering_vectors.measures.passes import prompt_cache, run, scored_batches_for
from steering_vectors.measures.sampling import Sampled, Sampler, draw, similar
from steering_vectors.models.forward import output_projection, projected_logits
from steering_vectors.models.hooks import PositionSelector, raw_outputs, record, resumed
from steering_vectors.models.limits import eos_ids
from steering_vectors.models.loading import LanguageModel
from steering_vectors.models.shared_prompts import SharedPrompts
from steering_vectors.profiles.mixture import Mixture, Term
from steering_vectors.profiles.profile import Profile
from steering_vectors.runtime.cpu.choose_packing import packed
from steering_vectors.steering.bank import SteeringBank

CACHES = ("past_key_values", "cache_params")  # other models are recomputed (RWKV's state is wrong in batches)
MAX_LOGITS = 2**22  # numbers that are computed at once: little enough for the allocator to use the memory again
MAX_SAMPLED_TOKENS = 2**15  # prompts and samples of a batch, which bounds the cache's memory
KEPT_BYTES = 2**27  # of shared prompts and of log-probabilities; the others are computed again
PROBE_TOKENS = 4
TOLERANCE = 1e-3  # relative error of logits from a pass in parts; it sums in the same order, but in other batches


class SteeredModel:
    """A model with a steering bank of one row. `steerable` creates it."""

    def __init__(self, lm: LanguageModel, bank: SteeringBank, selector: PositionSelector) -> None:
        self.lm = lm
        self.batch_tokens = DEFAULT_BATCH_TOKENS  # of one pass
        self._bank = bank
        self._selector = selector
        self._mixture = Mixture(())
        self._sampler: Sampler | None = None

    def close(self) -> None:
        if self._sampler is not None:
            self._sampler.close()

    def write(self, profile: Profile, strength: float) -> None:
        """Steer the following passes with this profile, at any strength."""
        self.steer(_mixture(profile, strength))

    def steer(self, mixture: Mixture) -> None:
        """Steer the following passes with a mixture of profiles."""
        self._mixture = mixture
        self._bank.write(0, mixture)

    def log_likelihoods(self, examples: Sequence[Encoded], *, steer: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """(log P(response | prompt) in nats, number of tokens counted) per example, float64 `[examples]` each.

        The first token of a response is counted if there is a token before it.
        """
        return self._summed(examples, lambda scored: self.chosen(self.final(scored, steer), scored.targets))

    def divergences(self, examples: Sequence[Encoded]) -> tuple[torch.Tensor, torch.Tensor]:
        """(Σ KL(steered‖base) in nats over the response, number of tokens counted) per example, float64."""

        def divergence(scored: Scored) -> torch.Tensor:
            return self.compared(self.final(scored, True), self.final(scored, False), kl_divergence)

        return self._summed(examples, divergence)

    def predictions(self, examples: Sequence[Encoded], *, steer: bool) -> Iterator[torch.Tensor]:
        """Yield the log-probabilities at some positions where responses are predicted, float32 `[positions,
        vocabulary]`.

        The order of positions is the same at every call with these examples.
        """
        for scored in self.scored(examples):
            yield from map(self._log_probs, torch.split(self.final(scored, steer), self._positions_at_once))

    def sample(self, prompts: Sequence[Sequence[int]], *, tokens: int, seed: int) -> list[list[int]]:
        """Continue each prompt by up to `tokens` tokens at temperature 1, steered. The EOS token is included.

        Row i samples by inverse transform from random numbers that depend only on (seed, i), so calls with the same
        seed and slightly different shifts give mostly equal texts.
        """
        uniforms = torch.rand(len(prompts), tokens, generator=torch.Generator().manual_seed(seed))
        return self.draw_texts(prompts, uniforms)

    def draw_texts(
        self, prompts: Sequence[Sequence[int]], uniforms: torch.Tensor, *, temperature: float = 1.0
    ) -> list[list[int]]:
        """`sample` with given random numbers `[prompts, tokens]` in [0, 1), at a temperature above 0."""
        tokens = uniforms.shape[1]
        sampler = self._sampler_for(prompts, tokens)
        if sampler.batched:
            return sampler.sample([self._mixture], prompts, uniforms, temperature=temperature)[0].texts
        texts: dict[int, list[int]] = {}
        lengths = [len(prompt) for prompt in prompts]
        for group in similar(lengths, max(1, MAX_SAMPLED_TOKENS // (max(lengths) + tokens))):
            rows = self._sample_group(
                [prompts[index] for index in group], uniforms[group].to(self.lm.device), temperature
            )
            texts.update(zip(group, rows, strict=True))
        return [texts[index] for index in range(len(prompts))]

    def continuations(self, prompts: Sequence[Sequence[int]], *, tokens: int, seed: int) -> list[Encoded]:
        """Each prompt with its sample, as examples for the other methods."""
        texts = self.sample(prompts, tokens=tokens, seed=seed)
        return [([*prompt, *text], len(prompt)) for prompt, text in zip(prompts, texts, strict=True)]

    def sample_and_compare(
        self,
        profile: Profile,
        strengths: Sequence[float],
        prompts: Sequence[Sequence[int]],
        *,
        tokens: int,
        seed: int,
        compared: int | None = None,
        read: Sequence[int] = (),
    ) -> list[Sampled]:
        """`sample` at each strength, with the same random numbers, and what the unsteered model reads in the texts of
        the first `compared` prompts, or of all: divergences, likelihoods, and the activations of the layers `read` with
        their norms."""
        sampler = self._sampler_for(prompts, tokens)
        compared = len(prompts) if compared is None else min(compared, len(prompts))
        if sampler.batched:
            uniforms = torch.rand(len(prompts), tokens, generator=torch.Generator().manual_seed(seed))
            mixtures = [_mixture(profile, strength) for strength in strengths]
            return sampler.sample(mixtures, prompts, uniforms, compared=compared, read=read)
        found = []
        for strength in strengths:
            self.write(profile, strength)
            examples = self.continuations(prompts, tokens=tokens, seed=seed)
            found.append(self._read(examples, compared, tokens, read))
        return found

    def _read(self, examples: Sequence[Encoded], compared: int, tokens: int, read: Sequence[int]) -> Sampled:
        """The texts, with what the steered and the unsteered model find in the first `compared`."""
        divergences, likelihoods = torch.zeros(2, compared, tokens, dtype=torch.float64)
        for scored in self.scored(examples[:compared]):
            rows, steps = scored.valid.nonzero().cpu().unbind(1)
            places, base = torch.tensor(scored.batch.indices)[rows], self.final(scored, False)
            divergence = self.compared(self.final(scored, True), base, kl_divergence)
            divergences[places, steps] = divergence.double().cpu()
            likelihoods[places, steps] = self.chosen(base, scored.targets).double().cpu()
        found = Sampled([list(ids[start:]) for ids, start in examples], divergences, likelihoods)
        if read:
            parts = list(pooled(self.lm, examples[:compared], read))
            found.activations = torch.cat([part.vectors for part in parts]).mean(0).cpu()
            found.norms = torch.cat([part.norms for part in parts], dim=1).mean(1).cpu()
        return found

    def kept(self, examples: Sequence[Encoded], layers: Sequence[int]) -> KeptTexts:
        """The texts with their unsteered pass, to measure them under steering that begins at any of these layers."""
        return KeptTexts(self, examples, layers)

    def scored(self, examples: Sequence[Encoded]) -> Iterator[Scored]:
        """The batches of examples, with the positions that predict their responses."""
        return scored_batches_for(self.lm, examples, self.batch_tokens)

    def chosen(self, final: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """log P of the tokens `[positions]` at positions with these inputs of the output projection."""
        size = self._positions_at_once
        parts = zip(torch.split(final, size), torch.split(targets, size), strict=True)
        found = [self._log_probs(part).gather(1, tokens.unsqueeze(1)).squeeze(1) for part, tokens in parts]
        return torch.cat(found)

    def log_probs(self, final: torch.Tensor) -> torch.Tensor:
        """Log-probabilities float32 `[positions, vocabulary]` at positions with these inputs of the output
        projection."""
        return torch.cat(list(map(self._log_probs, torch.split(final, self._positions_at_once))))

    def compared(
        self,
        steered: torch.Tensor,
        base: torch.Tensor,
        compare: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        *,
        known: bool = False,
    ) -> torch.Tensor:
        """`compare` of the log-probabilities at positions with these inputs of the output projection, `[positions,
        …]`. If `known`, `base` are log-probabilities already."""
        size = self._positions_at_once
        parts = zip(torch.split(steered, size), torch.split(base, size), strict=True)
        return torch.cat(
            [compare(self._log_probs(one), other if known else self._log_probs(other)) for one, other in parts]
        )

    def final(
        self,
        scored: Scored,
        steer: bool,
        resume: tuple[int, torch.Tensor] | None = None,
        cache: SharedPrompts | None = None,
    ) -> torch.Tensor:
        """The inputs of the output projection at the valid positions, `[positions, hidden]`.

        With `resume` the pass begins after a layer, whose outputs are given. `cache` is the batch's `prompt_cache`,
        which is computed if it is None.
        """
        batch = scored.batch
        where = batch.mask & (batch.positions >= (batch.starts.clamp_min(1) - 1).unsqueeze(1))
        cache = prompt_cache(self.lm, batch) if cache is None else cache
        with torch.no_grad(), ExitStack() as stack:
            taken = stack.enter_context(self._selector.take(scored.index))
            if steer:
                stack.enter_context(self._bank.step(slice(1), where))
            if resume is not None:
                stack.enter_context(resumed(self.lm.blocks, self._block_outputs, *resume))
            run(self.lm, batch, cache)
        return taken[0][scored.valid]

    @cached_property
    def resumes(self) -> bool:
        """Whether a pass may begin at a block: an architecture may hand on more than the residual stream."""
        lm, layer = self.lm, self.lm.num_layers // 2
        scored = next(self.scored([(self._probe, 1)]))
        with record(lm.blocks, [layer]) as seen:
            expected = self.final(scored, False)
        try:
            found = self.final(scored, False, (layer, seen[layer]))
        except Exception:  # an architecture may fail in any way
            return False
        return bool((found - expected).norm() <= TOLERANCE * expected.norm())

    def _summed(
        self, examples: Sequence[Encoded], values: Callable[[Scored], torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The sums of values `[positions]` over each response, and the number of tokens counted."""
        sums, counts = torch.zeros(2, len(examples), dtype=torch.float64)
        for scored in self.scored(examples):
            add_sums(sums, counts, scored, values(scored))
        return sums, counts

    @cached_property
    def _probe(self) -> list[int]:
        return [place % self.lm.vocab_size for place in range(1, 1 + PROBE_TOKENS)]

    @cached_property
    def _block_outputs(self) -> list[Any]:
        """What each block returned in a pass over the probe: the form of its output."""
        ids = torch.tensor([self._probe], device=self.lm.device)
        with torch.no_grad():
            return raw_outputs(self.lm.blocks, lambda: self.lm.model(input_ids=ids, use_cache=False))

    @property
    def _positions_at_once(self) -> int:
        return max(1, MAX_LOGITS // self.lm.vocab_size)

    def _log_probs(self, final: torch.Tensor) -> torch.Tensor:
        """Log-probabilities float32 `[positions, vocabulary]` from the inputs of the output projection."""
        with torch.no_grad():
            logits = projected_logits(self.lm, final, self._block_outputs)
        return torch.log_softmax(logits.float(), dim=-1)

    def _sampler_for(self, prompts: Sequence[Sequence[int]], tokens: int) -> Sampler:
        context = Sampler.context_for(self.lm, max(map(len, prompts), default=1) + tokens)
        if self._sampler is None or self._sampler.context < context:
            self.close()
            self._sampler = Sampler(self.lm, context=context, outputs=self._block_outputs if self.resumes else ())
        return self._sampler

    def _sample_group(
        self, prompts: Sequence[Sequence[int]], uniforms: torch.Tensor, temperature: float
    ) -> list[list[int]]:
        """Sample all rows together from the end of the shortest prompt, over the cache that the model itself makes:
        for architectures that keep no keys and values by position. Longer prompts first keep their own tokens."""
        tokens, lengths = uniforms.shape[1], torch.tensor([len(prompt) for prompt in prompts], device=self.lm.device)
        width = max(map(len, prompts)) + tokens
        padded = [[*prompt, *[0] * (width - len(prompt))] for prompt in prompts]  # aligned on the left
        ids, ends = torch.tensor(padded, device=self.lm.device), lengths + tokens
        eos = torch.tensor(sorted(eos_ids(self.lm)), dtype=torch.long, device=self.lm.device)
        cache: dict[str, Any] = {}
        for position in range(int(lengths.min()), ids.shape[1]):
            logits, cache = self._advance(ids[:, :position], lengths, cache)
            step = (position - lengths).clamp(0, tokens - 1).unsqueeze(1)
            drawn = draw(logits / temperature, uniforms.gather(1, step).squeeze(1))
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


@dataclass(frozen=True, slots=True, eq=False)
class _KeptPart:
    """A batch, the inputs of the output projection `[positions, hidden]`, outputs by layer, and the shared prompts."""

    scored: Scored
    base: torch.Tensor
    outputs: dict[int, torch.Tensor]
    cache: SharedPrompts | None


class KeptTexts:
    """Texts with their unsteered pass: measured again, they cost the blocks from the first steered one on.

    Keeps the outputs of some layers at all positions but those of shared prompts, and the inputs of the output
    projection at the scored ones. Keys and values of shared prompts, and log-probabilities once they were compared, are
    kept up to KEPT_BYTES each.
    """

    def __init__(self, steered: SteeredModel, examples: Sequence[Encoded], layers: Sequence[int]) -> None:
        self._steered, self.examples = steered, examples
        self._parts: list[_KeptPart] = []
        self._log_probs: dict[int, torch.Tensor] = {}  # by part
        self._room = KEPT_BYTES  # for them
        keep, room = layers if steered.resumes else (), KEPT_BYTES
        for scored in scored_batches_for(steered.lm, examples, steered.batch_tokens, kept=True):
            cache = prompt_cache(steered.lm, scored.batch)
            with record(steered.lm.blocks, keep) as outputs:
                final = steered.final(scored, False, cache=cache)
            room -= 0 if cache is None else cache.nbytes
            self._parts.append(_KeptPart(scored, final, dict(outputs), cache if room > 0 else None))

    def divergences(self, first: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`SteeredModel.divergences` of the texts under steering whose first layer is `first`."""
        sums, counts = torch.zeros(2, len(self.examples), dtype=torch.float64)
        for scored, values in self.compared(first, kl_divergence):
            add_sums(sums, counts, scored, values)
        return sums, counts

    def compared(
        self, first: int, compare: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    ) -> Iterator[tuple[Scored, torch.Tensor]]:
        """Yield batches with `compare` of the steered and the unsteered log-probabilities, `[positions, …]`."""
        for number, part in enumerate(self._parts):
            size = len(part.base) * self._steered.lm.vocab_size * torch.float32.itemsize
            if number not in self._log_probs and size <= self._room:
                self._room -= size
                self._log_probs[number] = self._steered.log_probs(part.base)
            base = self._log_probs.get(number)
            final, known = self._final(part, first), base is not None
            yield part.scored, self._steered.compared(final, part.base if base is None else base, compare, known=known)

    def log_likelihoods(self, first: int, *, steer: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """`SteeredModel.log_likelihoods` of the texts under steering whose first layer is `first`."""
        sums, counts = torch.zeros(2, len(self.examples), dtype=torch.float64)
        for part in self._parts:
            final = self._final(part, first) if steer else part.base
            add_sums(sums, counts, part.scored, self._steered.chosen(final, part.scored.targets))
        return sums, counts

    def _final(self, part: _KeptPart, first: int) -> torch.Tensor:
        layer = max((layer for layer in part.outputs if layer <= first), default=None)
        resume = None if layer is None else (layer, part.outputs[layer])
        return self._steered.final(part.scored, True, resume, part.cache)


def add_sums(sums: torch.Tensor, counts: torch.Tensor, scored: Scored, values: torch.Tensor) -> None:
    """Add values `[positions]` of a batch to the sums of its examples, and their numbers to `counts`."""
    rows = torch.tensor(scored.batch.indices)[scored.valid.nonzero()[:, 0].cpu()]
    sums.index_add_(0, rows, values.double().cpu())
    counts.index_add_(0, rows, torch.ones(len(rows), dtype=torch.float64))


def _mixture(profile: Profile, strength: float) -> Mixture:
    return Mixture((Term(profile, strength),), allow_beyond_safe=True)


@contextmanager
def steerable(lm: LanguageModel) -> Iterator[SteeredModel]:
    """Attach a steering bank of one row to a model, whose weights are packed meanwhile where that is faster.

    Raises ModelError if the model has no output projection.
    """
    with packed(lm):
        selector = PositionSelector(output_projection(lm))
        bank = SteeringBank.over(lm, rows=1)
        bank.attach()
        steered = SteeredModel(lm, bank, selector)
        try:
            yield steered
        finally:
            steered.close()
            bank.detach()
            selector.remove()
