"""Conditions of a model that write and score replies: a vector, an instruction or changed weights.

The cost of a condition is its KL from the plain model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from steering_vectors.data.batches import Encoded
from steering_vectors.data.corpus import Sides
from steering_vectors.fitting.calibration import SAMPLED_TOKENS
from steering_vectors.measures.divergence import kl_divergence
from steering_vectors.measures.propensity import propensity
from steering_vectors.measures.steered_model import SteeredModel, eos_ids
from steering_vectors.profiles.profile import Profile

Ids = list[int]
Rewrite = Callable[[Ids], Ids]
Judge = Callable[[str, bool], bool]  # (reply, whether it ended by itself) → whether it shows the manner


class Condition(Protocol):
    """A way to produce a manner. Replies are token ids, one per plain prompt."""

    def write(self, prompts: Sequence[Ids], *, tokens: int, seed: int) -> list[Ids]: ...

    def divergence(self, examples: Sequence[Encoded]) -> float:
        """Mean KL(condition‖plain) in nats per token of the examples' replies."""

    def accuracy(self, sides: Sides) -> float:
        """The share of pairs whose preferred response is more likely."""


@dataclass(frozen=True, slots=True)
class Vector:
    steered: SteeredModel
    profile: Profile
    strength: float

    def write(self, prompts: Sequence[Ids], *, tokens: int, seed: int) -> list[Ids]:
        self.steered.write(self.profile, self.strength)
        return self.steered.sample(prompts, tokens=tokens, seed=seed)

    def divergence(self, examples: Sequence[Encoded]) -> float:
        self.steered.write(self.profile, self.strength)
        sums, counts = self.steered.divergences(examples)
        return float(sums.sum() / counts.sum())

    def accuracy(self, sides: Sides) -> float:
        self.steered.write(self.profile, self.strength)
        return propensity(self.steered, sides, steer=True).accuracy


@dataclass(frozen=True, slots=True)
class Instructed:
    """A model with an instruction. `prompts` maps a plain prompt to the prompt with the instruction."""

    plain: SteeredModel
    rewrite: Rewrite

    def write(self, prompts: Sequence[Ids], *, tokens: int, seed: int) -> list[Ids]:
        return self.plain.sample([self.rewrite(prompt) for prompt in prompts], tokens=tokens, seed=seed)

    def divergence(self, examples: Sequence[Encoded]) -> float:
        return mean_divergence(
            (one_prediction(self.plain, self._instructed(example)), one_prediction(self.plain, example))
            for example in examples
        )

    def accuracy(self, sides: Sides) -> float:
        positives, negatives = (tuple(map(self._instructed, side)) for side in (sides.positives, sides.negatives))
        return propensity(self.plain, Sides(positives, negatives, sides.paired), steer=False).accuracy

    def _instructed(self, example: Encoded) -> Encoded:
        ids, start = example
        prompt = self.rewrite(list(ids[:start]))
        return [*prompt, *ids[start:]], len(prompt)


@dataclass(frozen=True, slots=True)
class Weights:
    tuned: SteeredModel
    plain: SteeredModel

    def write(self, prompts: Sequence[Ids], *, tokens: int, seed: int) -> list[Ids]:
        return self.tuned.sample(prompts, tokens=tokens, seed=seed)

    def divergence(self, examples: Sequence[Encoded]) -> float:
        pairs = (model.predictions(examples, steer=False) for model in (self.tuned, self.plain))
        return mean_divergence(zip(*pairs, strict=True))

    def accuracy(self, sides: Sides) -> float:
        return propensity(self.tuned, sides, steer=False).accuracy


def measure(
    condition: Condition,
    plain: SteeredModel,
    prompts: Sequence[Ids],
    sides: Sides,
    judge: Judge,
    *,
    tokens: int,
    seed: int,
) -> dict[str, Any]:
    """The share of replies in the wanted manner, their cost, and the accuracy on held-out pairs.

    A reply has ended by itself if its last token is an end-of-text token. KL is over as many tokens as calibration
    samples, because later tokens cost more.
    """
    replies = condition.write(prompts, tokens=tokens, seed=seed)
    examples: list[Encoded] = [([*prompt, *reply], len(prompt)) for prompt, reply in zip(prompts, replies, strict=True)]
    calibrated: list[Encoded] = [(ids[: start + SAMPLED_TOKENS], start) for ids, start in examples]
    texts = plain.lm.tokenizer.batch_decode(replies, skip_special_tokens=True)
    sums, counts = plain.log_likelihoods(examples, steer=False)
    ends = set(eos_ids(plain.lm))
    ended = [bool(reply) and reply[-1] in ends for reply in replies]
    marks = [judge(text, whole) for text, whole in zip(texts, ended, strict=True)]
    return {
        "share": sum(marks) / len(marks),
        "marks": "".join("01"[mark] for mark in marks),
        "ended": sum(ended) / len(ended),
        "kl": condition.divergence(calibrated),
        "perplexity": math.exp(-float(sums.sum() / counts.sum())),
        "accuracy": condition.accuracy(sides),
        "samples": texts[:3],
    }


def mean_divergence(
    pairs: Iterable[tuple[torch.Tensor, torch.Tensor]],
) -> float:
    """Mean of KL(first‖second) over all positions, from pairs of log-probabilities `[positions, vocabulary]`."""
    total = count = 0.0
    for changed, plain in pairs:
        total += float(kl_divergence(changed, plain).double().sum())
        count += len(changed)
    return total / max(count, 1)


def one_prediction(model: SteeredModel, example: Encoded) -> torch.Tensor:
    """Log-probabilities at the tokens of one reply."""
    return torch.cat(list(model.predictions([example], steer=False)))
