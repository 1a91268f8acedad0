"""Gradients of a model's likelihoods with respect to shifts of its blocks' outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from steering_vectors.data.batches import Encoded, Scored
from steering_vectors.measures.passes import prompt_cache, run, scored_batches_for
from steering_vectors.models.hooks import PositionSelector, adding
from steering_vectors.models.limits import eos_ids
from steering_vectors.models.loading import LanguageModel

BATCH_TOKENS = 256  # of one pass, whose activations are kept for the way back


def likelihood_gradients(lm: LanguageModel, examples: Sequence[Encoded], layers: Sequence[int]) -> torch.Tensor:
    """The gradient of the mean log-likelihood per token of responses with respect to a shift at each layer, added from
    the last prompt token on: float32 `[layers, hidden]`.

    One backward pass gives it for all layers.
    """

    def mean_likelihood(logits: torch.Tensor, scored: Scored) -> torch.Tensor:
        losses = torch.nn.functional.cross_entropy(logits.float(), scored.targets, reduction="none")
        weights = (1 / scored.valid.sum(1, keepdim=True).clamp_min(1)).expand_as(scored.valid)[scored.valid]
        return -(losses * weights).sum()

    return _gradients(lm, examples, layers, mean_likelihood) / len(examples)


def ending_gradients(lm: LanguageModel, examples: Sequence[Encoded], layers: Sequence[int]) -> dict[int, torch.Tensor]:
    """By layer, the gradient `[hidden]` of the expected number of ends of text in a response, Σ P(end) over the
    positions that predict its tokens, with respect to a shift as in `likelihood_gradients`. It is a mean over examples.
    """
    ends = torch.tensor(sorted(eos_ids(lm)), device=lm.device)

    def endings(logits: torch.Tensor, _scored: Scored) -> torch.Tensor:
        return torch.softmax(logits.float(), dim=-1)[:, ends].sum()

    return dict(zip(layers, _gradients(lm, examples, layers, endings) / len(examples), strict=True))


def _gradients(
    lm: LanguageModel,
    examples: Sequence[Encoded],
    layers: Sequence[int],
    value: Callable[[torch.Tensor, Scored], torch.Tensor],
) -> torch.Tensor:
    """The gradient of a sum over batches of values, each from the logits `[positions, vocabulary]` of a batch."""
    total = torch.zeros(len(layers), lm.hidden_size)
    selector = PositionSelector(lm.model.get_output_embeddings())
    shifts = [torch.zeros(lm.hidden_size, device=lm.device, requires_grad=True) for _ in layers]
    try:
        with _frozen(lm.model), torch.enable_grad():
            for scored in scored_batches_for(lm, examples, BATCH_TOKENS):
                batch = scored.batch
                where = batch.mask & (batch.positions >= (batch.starts.clamp_min(1) - 1).unsqueeze(1))
                cache = prompt_cache(lm, batch)
                with ExitStack() as stack:
                    for layer, shift in zip(layers, shifts, strict=True):
                        stack.enter_context(adding(lm.blocks[layer], shift, where))
                    stack.enter_context(selector.select(scored.index))
                    logits = run(lm, batch, cache).logits[scored.valid]
                gradients = torch.autograd.grad(value(logits, scored), shifts)
                total += torch.stack([gradient.float().cpu() for gradient in gradients])
    finally:
        selector.remove()
    return total


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """The weights need no gradients inside, so that their inputs are not kept."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
