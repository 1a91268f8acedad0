"""RAHF (arXiv:2312.15997): tune a model on preferences, then read the difference in its activations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch.nn.functional import logsigmoid

from steering_vectors.errors import FitError
from steering_vectors.methods.contrast_prompts import mean_directions
from steering_vectors.methods.registry import Directions, Method, Task, option
from steering_vectors.methods.tuned import TuningOptions, both_sides, mean_log_likelihoods, tune, tuned_weights
from steering_vectors.models.hiding import check_hiding
from steering_vectors.tuning.paired_reading import Twin, Weights, alone, own_weights, packed_readings, pad_id
from steering_vectors.tuning.response_likelihoods import response_log_likelihoods
from steering_vectors.tuning.trainable_weights import LoraShape, TunedWeights

NONE_BESIDE: Mapping[str, LoraShape] = MappingProxyType({})
BASELINES = ("untuned", "none")
SIGHTS = ("lower", "all")


@dataclass(frozen=True, slots=True)
class ScitOptions(TuningOptions):
    """Options of `rahf-scit`.

    Blocks that see the instruction can read the manner from its tokens. Then the response's tokens, whose difference is
    read, need not carry it; `instruction=lower` prevents this.
    """

    smoothing: float = option(0.2, "ε of the contrastive term.")
    baseline: str = option("untuned", "untuned subtracts the untuned model's difference; none keeps it, as the paper.")
    instruction: str = option("lower", "Blocks that see the instruction: lower (up to the highest read) or all.")

    def check(self) -> None:
        """Raise FitError for an unknown value."""
        for name, value, known in (("baseline", self.baseline, BASELINES), ("instruction", self.instruction, SIGHTS)):
            if value not in known:
                raise FitError(f"option {name} is {value!r}, not one of {', '.join(known)}")

    def unseeing(self, task: Task) -> Sequence[torch.nn.Module]:
        """The blocks that cannot see the instruction. Raises FitError if it cannot be hidden from them."""
        first = max(task.layers) + 1
        if self.instruction == "all" or first == len(task.lm.blocks):
            return ()
        check_hiding(task.lm, first)
        return task.lm.blocks[first:]


@dataclass(frozen=True, slots=True)
class DualOptions(TuningOptions):
    """Options of `rahf-dual`. The paper trains for three epochs."""

    paper_epochs: ClassVar[float] = 3.0


@dataclass(frozen=True, slots=True, eq=False)
class FirstStep:
    """The result of the first step: weights, their names for p⁺ and p⁻, and the responses under both."""

    weights: TunedWeights
    names: tuple[str, str]
    twins: tuple[Twin, ...]

    def side(self, index: int) -> AbstractContextManager[None]:
        """A context with the weights for side 0 (p⁺) or 1 (p⁻)."""
        return self.weights.use(self.names[index])


Beside = Mapping[str, LoraShape]


@contextmanager
def scit_tuned(task: Task, beside: Beside = NONE_BESIDE) -> Iterator[FirstStep]:
    """Single contrastive instruction tuning: each preferred response belongs to p⁺ and each rejected one to p⁻; with
    P = exp(mean token log-probability of r) and s = P_match / (P_match + P_mismatch),

        L = −log P_match + (1−ε)(−log s) + ε(−log(1−s)),   ε = 0.2

    Paper: RAHF-SCIT (arXiv:2312.15997, §3), with the token shift and the response mask that its code lacks. There every
    block sees the instruction (`instruction=all`).
    """
    options, (good, bad) = task.read_options(ScitOptions), scit_sides(task)
    options.check()
    unseeing = options.unseeing(task)
    samples = [(twin, 1.0) for twin in good] + [(twin, -1.0) for twin in bad]

    def loss(batch: Sequence[tuple[Twin, float]]) -> torch.Tensor:
        labels = torch.tensor([label for _, label in batch], device=task.lm.device)
        positive, negative = mean_log_likelihoods(task.lm, [twin for twin, _ in batch], unseeing)
        return contrastive_loss(positive, negative, labels, options.smoothing)

    with tuned_weights(task, options, ["scit"], beside) as weights:
        tune(task, weights, "scit", options, samples, loss, (good, bad), _both_readings)
        yield FirstStep(weights, ("scit", "scit"), (*good, *bad))


@contextmanager
def dual_tuned(task: Task, beside: Beside = NONE_BESIDE) -> Iterator[FirstStep]:
    """Two models from one base, each supervised on one side of the data under p⁺: L = −mean log-probability of a
    response's tokens. Both read a text under p⁺.

    Paper: RAHF-Dual (arXiv:2312.15997, §3).
    """
    options, (good, bad) = task.read_options(DualOptions), dual_sides(task)

    def loss(batch: Sequence[Twin]) -> torch.Tensor:
        reading, _ = packed_readings(batch, pad_id(task.lm), task.lm.device)
        sums, counts = response_log_likelihoods(task.lm, reading)
        return -(sums / counts).mean()

    with tuned_weights(task, options, ["good", "bad"], beside) as weights:
        for name, side in (("good", good), ("bad", bad)):
            tune(task, weights, name, options, side, loss, (side,), alone)
        yield FirstStep(weights, ("good", "bad"), (*good, *bad))


def scit_sides(task: Task) -> tuple[list[Twin], list[Twin]]:
    """The preferred and the rejected responses, each under p⁺ and p⁻."""
    return both_sides(task, task.read_options(ScitOptions))


def dual_sides(task: Task) -> tuple[list[Twin], list[Twin]]:
    """The preferred and the rejected responses, each under p⁺ alone."""
    good, bad = (
        [replace(twin, negative=twin.positive) for twin in side]
        for side in both_sides(task, task.read_options(DualOptions))
    )
    return good, bad


class Tuned(Protocol):
    def __call__(self, task: Task, beside: Beside = ..., /) -> AbstractContextManager[FirstStep]: ...


class FirstStepKind(NamedTuple):
    """How a variant tunes, and which responses it reads."""

    tuned: Tuned
    sides: Callable[[Task], tuple[list[Twin], list[Twin]]]


FIRST_STEPS = {
    "rahf-scit": FirstStepKind(scit_tuned, scit_sides),
    "rahf-dual": FirstStepKind(dual_tuned, dual_sides),
}


def scit_difference(task: Task) -> Directions:
    """d = mean over responses r, and their tokens t, of h_t(p⁺, q, r) − h_t(p⁻, q, r), in the model of `scit_tuned`

    With baseline=untuned the same difference in the untuned model is subtracted. It is the trace of the instructions'
    words, which is also in a model that does not follow them. The paper subtracts nothing.
    """
    options = task.read_options(ScitOptions)
    with scit_tuned(task) as first:
        found = _read(task, first.twins, options.responses, first.side)
        if options.baseline == "untuned":
            plain = _read(task, first.twins, options.responses, own_weights)
            found = {layer: direction - plain[layer] for layer, direction in found.items()}
    return found


def dual_difference(task: Task) -> Directions:
    """d = mean over responses r, and their tokens t, of h_t^good(p⁺, q, r) − h_t^bad(p⁺, q, r), by `dual_tuned`."""
    with dual_tuned(task) as first:
        return _read(task, first.twins, task.read_options(DualOptions).responses, first.side)


def target_blocks(num_layers: int) -> tuple[int, ...]:
    """The block that is read unless layers are given: the middle one, as in the paper, where upper blocks hurt.

    The paper reads every second block from .28 to .53 of the depth, in a model of 32.
    """
    return ((num_layers - 1) // 2,)


def contrastive_loss(
    positive: torch.Tensor, negative: torch.Tensor, labels: torch.Tensor, smoothing: float
) -> torch.Tensor:
    """SCIT's loss from the responses' mean token log-probabilities under p⁺ and p⁻, `[rows]`; labels are ±1."""
    match, mismatch = torch.where(labels > 0, positive, negative), torch.where(labels > 0, negative, positive)
    odds = match - mismatch  # log s − log(1 − s)
    contrast = -(1 - smoothing) * logsigmoid(odds) - smoothing * logsigmoid(-odds)
    return (contrast - match).mean()


def _both_readings(sample: tuple[Twin, float]) -> tuple[Twin, Twin]:
    """The twin of SCIT's sample, once for each instruction under which it is read."""
    return sample[0], sample[0]


def _read(task: Task, twins: Sequence[Twin], max_responses: int, weights: Weights) -> Directions:
    """The second step as vectors: mean differences between the two readings of responses from both sides."""
    return mean_directions(task, twins[:: -(-len(twins) // max_responses)], weights)


SCIT = Method(
    "rahf-scit",
    scit_difference,
    options=ScitOptions,
    layers=target_blocks,
    direction="mean over r of h(p⁺, q, r) − h(p⁻, q, r) in a model tuned to answer r⁺ under p⁺ and r⁻ under p⁻",
    paper="RAHF-SCIT (arXiv:2312.15997)",
)
DUAL = Method(
    "rahf-dual",
    dual_difference,
    options=DualOptions,
    layers=target_blocks,
    direction="mean over r of h_good(p⁺, q, r) − h_bad(p⁺, q, r), from two models tuned on r⁺ and on r⁻",
    paper="RAHF-Dual (arXiv:2312.15997)",
)
