"""A trained vector: bi-directional preference optimisation (BiPO)."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch.nn.functional import logsigmoid

from steering_vectors.errors import FitError
from steering_vectors.methods.registry import Directions, Method, Task, option
from steering_vectors.methods.tuned import PASS_TOKENS, drawn, losses_in_parts
from steering_vectors.models.hooks import adding
from steering_vectors.models.loading import LanguageModel
from steering_vectors.tuning.paired_reading import (
    Around,
    Reading,
    Twin,
    no_context,
    packed_readings,
    pad_id,
    parted,
    plain_twin,
)
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
    base = BaseMargins(task.lm)
    return {layer: _train(task, options, pairs, base, layer) for layer in task.layers}


def middle_block(num_layers: int) -> tuple[int, ...]:
    """The block that the paper steers: the middle one."""
    return ((num_layers - 1) // 2,)


class BaseMargins:
    """log P(y⁺|x) − log P(y⁻|x) in the unsteered model. Each pair's is computed once."""

    def __init__(self, lm: LanguageModel) -> None:
        self._lm = lm
        self._known: dict[Pair, torch.Tensor] = {}

    def of(self, pairs: Sequence[Pair]) -> torch.Tensor:
        """Margins in nats, float32 `[pairs]`."""
        missing = [pair for pair in dict.fromkeys(pairs) if pair not in self._known]
        for part in parted(missing, PASS_TOKENS, list) if missing else ():
            with torch.no_grad():
                self._known.update(zip(part, _margins(self._lm, part), strict=True))
        return torch.stack([self._known[pair] for pair in pairs])


def bidirectional_loss(
    lm: LanguageModel,
    layer: int,
    vector: torch.Tensor,
    pairs: Sequence[Pair],
    base: BaseMargins,
    sign: int,
    beta: float,
) -> torch.Tensor:
    """The loss of a batch for one sign d; gradients flow to `vector`."""

    def steering(part: Reading) -> AbstractContextManager[None]:
        if part.response.shape[1] == 0:
            return nullcontext()  # a prefix of the prompts, which is not steered
        return adding(lm.blocks[layer], sign * vector, _steered(part))

    gains = _margins(lm, pairs, steering) - base.of(pairs)
    return -logsigmoid(sign * beta * gains).mean()


def _margins(lm: LanguageModel, pairs: Sequence[Pair], around: Around = no_context) -> torch.Tensor:
    """log P(y⁺|x) − log P(y⁻|x) in nats, float32 `[pairs]`."""
    reading, _ = packed_readings([twin for pair in pairs for twin in pair], pad_id(lm), lm.device)
    sums, _ = response_log_likelihoods(lm, reading, around)
    preferred, rejected = sums.view(-1, 2).unbind(1)
    return preferred - rejected


def _train(task: Task, options: BipoOptions, pairs: Sequence[Pair], base: BaseMargins, layer: int) -> torch.Tensor:
    lm, scale = task.lm, task.statistics[layer].residual_norm / math.sqrt(task.lm.hidden_size)
    vector = torch.zeros(lm.hidden_size, device=lm.device, requires_grad=True)
    optimizer = torch.optim.AdamW([vector], lr=options.step * scale, weight_decay=0.0)

    def loss_of(sign: int) -> Callable[[Sequence[Pair]], torch.Tensor]:
        return lambda part: bidirectional_loss(lm, layer, vector, part, base, sign, options.beta)

    steps, draw = max(1, math.ceil(options.epochs * len(pairs) / options.batch)), random.Random(task.seed)
    for step in range(steps):
        batch, sign = drawn(pairs, options.batch, step, task.seed), draw.choice((-1, 1))
        optimizer.param_groups[0]["lr"] = options.step * scale * (1 - step / steps)
        with torch.enable_grad():
            for loss in losses_in_parts(batch, loss_of(sign), list):
                loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        if task.progress is not None:
            task.progress(f"train block {layer}", step + 1, steps)
    return vector.detach().float().cpu()


def _steered(reading: Reading) -> torch.Tensor:
    """A mask of the tokens from the prompt's last one on, bool `[rows, columns]`."""
    steered = torch.zeros_like(reading.mask)
    steered[:, reading.start :] = reading.response
    steered[:, reading.start - 1 : -1] |= reading.response
    return steered


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
