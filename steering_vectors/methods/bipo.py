"""A trained vector: bi-directional preference optimisation (BiPO)."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import logsigmoid

from steering_vectors.errors import FitError
from steering_vectors.methods.registry import Directions, Method, Task, option
from steering_vectors.methods.tuned import drawn
from steering_vectors.models.hooks import adding
from steering_vectors.models.loading import LanguageModel
from steering_vectors.tuning.paired_reading import Reading, Twin, pad_id, plain_twin, readings
from steering_vectors.tuning.response_likelihoods import response_log_likelihoods


@dataclass(frozen=True, slots=True)
class BipoOptions:
    """Options of `bipo`."""

    beta: float = option(0.1, "β of the loss.")
    epochs: float = option(4.0, "Passes over the training data.")
    batch: int = option(4, "Pairs per step.")
    step: float = option(0.01, "AdamW's learning rate, in units of the residual stream's root mean square.")


Pair = tuple[Twin, Twin]


def trained_vector(task: Task) -> Directions:
    """v = argmin E over d ∈ {−1, +1} of −log σ(d·β [log π(y⁺|x; h + d·v)/π(y⁺|x) − log π(y⁻|x; h + d·v)/π(y⁻|x)])

    The direct preference loss with a vector in place of the weights, in both directions: adding v must favour the
    preferred response, subtracting it the rejected one. v starts at zero and is added from the last prompt token on, as
    when served. Each block has its own vector.

    Paper: Bi-directional preference optimization (arXiv:2406.00045), which steers all tokens at one middle block.
    """
    if not task.paired:
        raise FitError("bipo needs pairs of a preferred and a rejected response; these rows are not paired")
    options = task.read_options(BipoOptions)
    if min(options.beta, options.epochs, options.step) <= 0 or options.batch < 1:
        raise FitError("options beta, epochs, batch and step must be positive")
    pairs = [
        (_twin(positive), _twin(negative))
        for positive, negative in zip(task.positive_ids, task.negative_ids, strict=True)
    ]
    return {layer: _train(task, options, pairs, layer) for layer in task.layers}


def middle_block(num_layers: int) -> tuple[int, ...]:
    """The block that the paper steers: the middle one."""
    return ((num_layers - 1) // 2,)


def bidirectional_loss(
    lm: LanguageModel, layer: int, vector: torch.Tensor, pairs: Sequence[Pair], sign: int, beta: float
) -> torch.Tensor:
    """The loss of a batch for one sign d; gradients flow to `vector`."""
    twins = [twin for pair in pairs for twin in pair]
    reading, _ = readings(twins, pad_id(lm), lm.device)
    with torch.no_grad():
        base, _ = response_log_likelihoods(lm, reading)
    with adding(lm.blocks[layer], sign * vector, _steered(reading)):
        steered, _ = response_log_likelihoods(lm, reading)
    gains = (steered - base).view(-1, 2)
    return -logsigmoid(sign * beta * (gains[:, 0] - gains[:, 1])).mean()


def _train(task: Task, options: BipoOptions, pairs: Sequence[Pair], layer: int) -> torch.Tensor:
    lm, scale = task.lm, task.statistics[layer].residual_norm / math.sqrt(task.lm.hidden_size)
    vector = torch.zeros(lm.hidden_size, device=lm.device, requires_grad=True)
    optimizer = torch.optim.AdamW([vector], lr=options.step * scale, weight_decay=0.0)
    steps, draw = max(1, math.ceil(options.epochs * len(pairs) / options.batch)), random.Random(task.seed)
    for step in range(steps):
        batch = drawn(pairs, options.batch, step, task.seed)
        optimizer.param_groups[0]["lr"] = options.step * scale * (1 - step / steps)
        with torch.enable_grad():
            loss = bidirectional_loss(lm, layer, vector, batch, draw.choice((-1, 1)), options.beta)
            loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        if task.progress is not None:
            task.progress(f"train block {layer}", step + 1, steps)
    return vector.detach().float().cpu()


def _steered(reading: Reading) -> torch.Tensor:
    """A mask of the tokens from the prompt's last one on, bool `[rows, columns]`."""
    columns = torch.arange(reading.ids.shape[1], device=reading.ids.device)
    return reading.mask & (columns >= reading.start - 1)


def _twin(encoded: tuple[Sequence[int], int]) -> Twin:
    ids, start = encoded
    return plain_twin(ids, max(1, start))  # without a prompt, the first token cannot be predicted


METHOD = Method(
    "bipo",
    trained_vector,
    options=BipoOptions,
    layers=middle_block,
    direction="a vector trained by the preference loss in both directions",
    paper="Bi-directional preference optimization (arXiv:2406.00045)",
)
