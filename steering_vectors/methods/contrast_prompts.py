"""The difference that an instruction makes in an untuned model, and the options of methods that use instructions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from steering_vectors.methods.registry import Directions, Method, Task, option
from steering_vectors.models.limits import context_limit
from steering_vectors.tuning.instructions import DEFAULTS, Instructions, instructions_for
from steering_vectors.tuning.paired_reading import Twin, Weights, mean_differences, own_weights
from steering_vectors.tuning.twins import twins_of


@dataclass(frozen=True, slots=True)
class InstructionOptions:
    """Options of the methods that use instructions."""

    goal: str = option("", f"Default instructions: {', '.join(DEFAULTS)}. Empty: the profile's name, if it is one.")
    positive: str = option("", "Your own instruction p⁺; needs `negative` too.")
    negative: str = option("", "Your own opposite instruction p⁻; needs `positive` too.")
    responses: int = option(512, "Read at most this many responses, both sides together.")

    def instructions(self, name: str) -> Instructions:
        """The instructions of a fit whose profile has this name."""
        return instructions_for(self.goal or name, self.positive or None, self.negative or None)


def task_twins(task: Task, options: InstructionOptions, *, max_twins: int | None) -> list[Twin]:
    """The responses of both sides of the training data, each under both instructions."""
    return twins_of(
        task.lm.tokenizer,
        [*task.positives, *task.negatives],
        [*task.positive_ids, *task.negative_ids],
        options.instructions(task.name),
        limit=context_limit(task.lm),
        max_twins=max_twins,
        seed=task.seed,
    )


def instruction_difference(task: Task) -> Directions:
    """d = mean over responses r, and their tokens t, of h_t(p⁺, q, r) − h_t(p⁻, q, r)

    Preferred and rejected responses are read in the same way, so the labels have no effect. The model must follow
    instructions.

    Paper: Representation Engineering (arXiv:2310.01405); RAHF's second step (arXiv:2312.15997) without its first.
    """
    options = task.read_options(InstructionOptions)
    return mean_directions(task, task_twins(task, options, max_twins=options.responses))


def mean_directions(task: Task, twins: Sequence[Twin], weights: Weights = own_weights) -> Directions:
    """`mean_differences` of a task, in float32."""
    found = mean_differences(task.lm, twins, task.layers, tokens=task.tokens, weights=weights, progress=task.progress)
    return {layer: direction.to(torch.float32) for layer, direction in found.items()}


METHOD = Method(
    "contrast-prompts",
    instruction_difference,
    options=InstructionOptions,
    direction="mean over r of h(p⁺, q, r) − h(p⁻, q, r)",
    paper="Representation Engineering (arXiv:2310.01405)",
    reads_labels=False,
)
