"""Gradients of likelihoods with respect to shifts equal finite differences of plain passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch

from steering_vectors.data.batches import Encoded
from steering_vectors.measures import gradients
from steering_vectors.measures.gradients import ending_gradients, likelihood_gradients
from steering_vectors.models.limits import eos_ids
from steering_vectors.models.loading import LanguageModel, wrap_model
from tests.support.by_hand import shifted
from tests.support.tiny import tiny_model
from tests.support.tiny_tokenizers import tiny_tokenizer

EXAMPLES: list[Encoded] = [([0, 5, 9, 30, 41], 2), ([7, 8, 9, 10, 11, 12, 13, 14], 5), ([0, 77, 3], 1), ([4, 6], 0)]
SHARING: list[Encoded] = [([3, 1, 4, 1, 5, 9, 2, 6, 5, *range(20 + n, 22 + 2 * n)], 9) for n in range(5)]
STEP = 0.01


def mean_likelihood(lm: LanguageModel, logs: torch.Tensor, response: list[int]) -> float:
    return float(logs.gather(1, torch.tensor(response).unsqueeze(1)).mean())


def ends(lm: LanguageModel, logs: torch.Tensor, response: list[int]) -> float:
    (end,) = eos_ids(lm)
    return float(logs[:, end].exp().sum())


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3_text"])
@pytest.mark.parametrize(("examples", "budget"), [(EXAMPLES, 12), (SHARING, 64)])
@pytest.mark.parametrize(("gradients_of", "value"), [(likelihood_gradients, mean_likelihood), (ending_gradients, ends)])
def test_the_gradient_of_every_layer_equals_finite_differences(
    architecture: str,
    examples: list[Encoded],
    budget: int,
    gradients_of: Callable[..., Mapping[int, torch.Tensor]],
    value: Callable[[LanguageModel, torch.Tensor, list[int]], float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gradients, "BATCH_TOKENS", budget)  # several batches
    lm = wrap_model(tiny_model(architecture), tiny_tokenizer())
    layers = list(range(lm.num_layers))
    if gradients_of is ending_gradients:
        with torch.no_grad():  # so that texts may end
            lm.model.get_output_embeddings().weight[list(eos_ids(lm))] *= 8
    found = gradients_of(lm, examples, layers)
    draw = torch.Generator().manual_seed(3)
    for layer in layers:
        direction = torch.randn(lm.hidden_size, generator=draw)

        def mean(sign: float, layer: int = layer, direction: torch.Tensor = direction) -> float:
            """Its mean over examples with the shift added from the last prompt token on."""
            total = 0.0
            for ids, start in examples:
                first = max(start, 1)
                with torch.no_grad(), shifted(lm, {layer: sign * STEP * direction}, first - 1):
                    logs = lm.model(input_ids=torch.tensor([list(ids)])).logits[0, first - 1 : -1].log_softmax(-1)
                total += value(lm, logs, list(ids[first:]))
            return total / len(examples)

        slope = (mean(1.0) - mean(-1.0)) / (2 * STEP)
        assert float(found[layer] @ direction) == pytest.approx(slope, rel=0.02, abs=2e-3)


def test_the_weights_are_as_before() -> None:
    lm = wrap_model(tiny_model("llama"), tiny_tokenizer())
    learning = {name: parameter.requires_grad for name, parameter in lm.model.named_parameters()}
    likelihood_gradients(lm, EXAMPLES, [0])
    assert {name: parameter.requires_grad for name, parameter in lm.model.named_parameters()} == learning
    assert all(parameter.grad is None for parameter in lm.model.parameters())
    assert not any(block._forward_hooks for block in lm.blocks)
