"""Tuning a model on preference data: the options, weights, batches and cache that methods with a first step share."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import ClassVar, TypeVar

import torch

from steering_vectors.errors import FitError
from steering_vectors.methods.contrast_prompts import InstructionOptions, task_twins
from steering_vectors.methods.registry import Task, option
from steering_vectors.models.hooks import hiding
from steering_vectors.models.loading import LanguageModel
from steering_vectors.progress import Progress
from steering_vectors.tuning.cache import tuned_directory
from steering_vectors.tuning.paired_reading import Twin, packed_readings, pad_id, parted
from steering_vectors.tuning.response_likelihoods import response_log_likelihoods
from steering_vectors.tuning.trainable_weights import FullWeights, LoraShape, LoraWeights, TunedWeights
from steering_vectors.tuning.training import Run, TrainingSchedule, train

LEARNING_RATES = {"lora": 1e-3, "full": 2e-5}  # the paper tunes all weights; low-rank updates need larger steps
BLOCKS = ("lower", "all")
MIN_STEPS = 75
PASS_TOKENS = 768  # of the passes whose activations are kept for one gradient
Sample = TypeVar("Sample")


@dataclass(frozen=True, slots=True)
class TuningOptions(InstructionOptions):
    """Options of the first step, which tunes the model.

    With `blocks=lower` the blocks above the highest one that is read stay untuned, so the tuned blocks must express the
    difference in a way that the untuned ones understand. Such a difference steers the untuned model.
    """

    paper_epochs: ClassVar[float] = 2.0

    tuning: str = option("lora", "lora or full; full needs dtype float32.")
    epochs: float = option(0.0, "Passes over the training data. 0: the paper's number, or enough for 75 steps.")
    batch: int = option(16, "Samples per step.")
    learning_rate: float = option(0.0, "AdamW's peak learning rate. 0: 1e-3 for lora, 2e-5 for full.")
    rank: int = option(16, "Rank of the LoRA.")
    targets: str = option("all-linear", "Modules of the LoRA: peft's names, comma-separated, or all-linear.")
    blocks: str = option("lower", "Tuned blocks: lower (up to the highest one that is read) or all.")

    def schedule(self, samples: int) -> TrainingSchedule:
        """The steps and learning rates for this number of samples. Raises FitError for unusable options."""
        for name, value, known in (("tuning", self.tuning, LEARNING_RATES), ("blocks", self.blocks, BLOCKS)):
            if value not in known:
                raise FitError(f"option {name} is {value!r}, not one of {', '.join(known)}")
        if self.batch < 1 or self.epochs < 0:
            raise FitError("option batch must be positive, and epochs must not be negative")
        steps = max(
            math.ceil((self.epochs or self.paper_epochs) * samples / self.batch), 1 if self.epochs else MIN_STEPS
        )
        return TrainingSchedule(steps, self.learning_rate or LEARNING_RATES[self.tuning])

    def last_block(self, layers: Sequence[int]) -> int | None:
        """The highest tuned block if these layers are read; None for all blocks."""
        return max(layers) if self.blocks == "lower" else None


def both_sides(task: Task, options: TuningOptions) -> tuple[list[Twin], list[Twin]]:
    """The preferred and the rejected responses, each under both instructions."""
    good = replace(task, negatives=(), negative_ids=())
    bad = replace(task, positives=(), positive_ids=())
    return task_twins(good, options, max_twins=None), task_twins(bad, options, max_twins=None)


@contextmanager
def tuned_weights(
    task: Task, options: TuningOptions, names: Sequence[str], beside: Mapping[str, LoraShape]
) -> Iterator[TunedWeights]:
    """Add weights of these names to the model until the context ends, and adapters of the shapes in `beside`.

    Raises FitError for `beside` with full tuning.
    """
    last = options.last_block(task.layers)
    if options.tuning == "full":
        if beside:
            raise FitError("a LoRA cannot be fitted to a fully tuned model; use option tuning=lora")
        weights: TunedWeights = FullWeights(task.lm, names, last)
    else:
        shape = LoraShape(rank=options.rank, alpha=2 * options.rank, targets=options.targets, last_block=last)
        weights = LoraWeights(task.lm, {**dict.fromkeys(names, shape), **beside}, task.seed)
    try:
        yield weights
    finally:
        weights.close()


def tune(
    task: Task,
    weights: TunedWeights,
    name: str,
    options: TuningOptions,
    samples: Sequence[Sample],
    loss: Callable[[Sequence[Sample]], torch.Tensor],
    twins: Sequence[Sequence[Twin]],
    twins_of: Callable[[Sample], Sequence[Twin]],
) -> None:
    """Train one set of weights on the samples, or load it from the cache, whose key is a hash of all inputs.

    `loss` is a mean over samples, and reads each of the twins that `twins_of` gives.
    """
    schedule = options.schedule(len(samples))
    settings = {**asdict(options), "responses": 0, "baseline": "", "goal": "", "name": name, "seed": task.seed}
    settings["last_block"] = options.last_block(task.layers)
    file = tuned_directory(task.lm, twins, settings) / f"{name}.safetensors"
    run = Run(weights, name, schedule, file, task.seed)
    train_on(task.lm, run, samples, options.batch, loss, twins_of, progress=task.progress, stage=f"tune {name}")


def train_on(
    lm: LanguageModel,
    run: Run,
    samples: Sequence[Sample],
    batch: int,
    loss: Callable[[Sequence[Sample]], torch.Tensor],
    twins_of: Callable[[Sample], Sequence[Twin]],
    *,
    progress: Progress | None,
    stage: str,
) -> None:
    """Train a run to its end on batches of the samples, with dropout. `loss` is a mean over samples."""
    lm.model.train()
    try:
        train(
            run,
            lambda step: losses_in_parts(drawn(samples, batch, step, run.seed), loss, twins_of),
            progress=progress,
            stage=stage,
        )
    finally:
        lm.model.eval()


def losses_in_parts(
    batch: Sequence[Sample],
    loss: Callable[[Sequence[Sample]], torch.Tensor],
    twins_of: Callable[[Sample], Sequence[Twin]],
    budget: int = PASS_TOKENS,
) -> Iterator[torch.Tensor]:
    """The loss of a batch, a mean over samples, as the shares of its parts. A part has samples of similar length, of at
    most `budget` tokens with padding (at least one sample)."""
    for part in parted(batch, budget, twins_of):
        yield loss(part) * (len(part) / len(batch))


def drawn(samples: Sequence[Sample], batch: int, step: int, seed: int) -> list[Sample]:
    """The samples of a step. Each epoch goes through all of them in a new order."""
    places = (divmod(place, len(samples)) for place in range(step * batch, (step + 1) * batch))
    return [samples[_order(len(samples), epoch, seed)[index]] for epoch, index in places]


@functools.lru_cache(maxsize=4)
def _order(count: int, epoch: int, seed: int) -> tuple[int, ...]:
    order = list(range(count))
    random.Random(f"{seed}-{epoch}").shuffle(order)
    return tuple(order)


def mean_log_likelihoods(
    lm: LanguageModel, twins: Sequence[Twin], unseeing: Sequence[torch.nn.Module] = ()
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean log-probability of the responses' tokens after both prompts, `[twins]` each.

    In the `unseeing` blocks, other tokens do not attend to the tokens at which the prompts differ.
    """
    means = []
    for side in packed_readings(twins, pad_id(lm), lm.device):
        sums, counts = response_log_likelihoods(lm, side, lambda part: hiding(unseeing, part.instruction))
        means.append(sums / counts)
    return means[0], means[1]
