"""Gradients of a model's likelihoods with respect to shifts of its blocks' outputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from steering_vectors.data.batches import Encoded
from steering_vectors.measures.passes import prompt_cache, run, scored_batches_for
from steering_vectors.models.hooks import PositionSelector, adding
from steering_vectors.models.loading import LanguageModel

BATCH_TOKENS = 256  # of one pass, whose activations are kept for the way back


def likelihood_gradients(lm: LanguageModel, examples: Sequence[Encoded], layers: Sequence[int]) -> torch.Tensor:
    """The gradient of the mean log-likelihood per token of responses with respect to a shift at each layer, added from
    the last prompt token on: float32 `[layers, hidden]`.

    One backward pass gives it for all layers.
    """
    total = torch.zeros(len(layers), lm.hidden_size)
    selector = PositionSelector(lm.model.get_output_embeddings())
    shifts = [torch.zeros(lm.hidden_size, device=lm.device, requires_grad=True) for _ in layers]
    try:
        with _frozen(lm.model), torch.enable_grad():
            for scored in scored_batches_for(lm, examples, BATCH_TOKENS):
                batch, valid = scored.batch, scored.valid
                where = batch.mask & (batch.positions >= (batch.starts.clamp_min(1) - 1).unsqueeze(1))
                cache = prompt_cache(lm, batch)
                with ExitStack() as stack:
                    for layer, shift in zip(layers, shifts, strict=True):
                        stack.enter_context(adding(lm.blocks[layer], shift, where))
                    stack.enter_context(selector.select(scored.index))
                    logits = run(lm, batch, cache).logits[valid]
                losses = torch.nn.functional.cross_entropy(logits.float(), scored.targets, reduction="none")
                weights = (1 / valid.sum(1, keepdim=True).clamp_min(1)).expand_as(valid)[valid]
                gradients = torch.autograd.grad(-(losses * weights).sum() / len(examples), shifts)
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
