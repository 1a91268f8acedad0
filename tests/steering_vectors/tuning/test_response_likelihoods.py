"""Gradients of micro-batches against those of the whole batch, computed plainly from all logits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from steering_vectors.methods.bipo import BaseMargins, bidirectional_loss
from steering_vectors.methods.tuned import losses_in_parts, mean_log_likelihoods
from steering_vectors.models.hooks import adding, hiding, record
from steering_vectors.models.loading import LanguageModel, wrap_model
from steering_vectors.models.shared_prompts import shares_prompts
from steering_vectors.tuning import response_likelihoods
from steering_vectors.tuning.paired_reading import (
    Twin,
    alone,
    mean_differences,
    packed_readings,
    pad_id,
    parted,
    readings,
)
from steering_vectors.tuning.response_likelihoods import response_log_likelihoods
from steering_vectors.tuning.trainable_weights import Dropout, FullWeights, LoraShape, LoraWeights, TunedWeights
from tests.support.tiny import HIDDEN, tiny_model
from tests.support.tiny_tokenizers import VOCAB, tiny_tokenizer

SHARING = ("llama", "gpt2", "gpt_neox", "opt", "falcon", "falcon_alibi", "cohere", "deepseek_v3", "qwen3")
NOT_SHARING = ("gemma2", "mistral", "gemma3_text", "bloom", "mamba", "rwkv", "falcon_h1", "mpt")
PREFIX = tuple(range(100, 112))


def tiny(architecture: str) -> LanguageModel:
    return wrap_model(tiny_model(architecture), tiny_tokenizer())


def twins(*, instructed: bool = False) -> list[Twin]:
    """Responses of unequal lengths after prompts of unequal lengths, which begin alike."""
    draw = torch.Generator().manual_seed(0)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 300, (length,), generator=draw).tolist())

    made = []
    for prompt, response in ((1, 9), (6, 2), (3, 5), (8, 8), (2, 1), (4, 3)):
        question = ids(prompt)
        positive = (*PREFIX, *question)
        negative = (*PREFIX[:2], *PREFIX[5:], *question) if instructed else positive
        made.append(Twin(positive, negative, ids(response)))
    return made


def plain_log_likelihood(lm: LanguageModel, prompt: Sequence[int], twin: Twin) -> torch.Tensor:
    """log P(response | prompt), from all logits of one row."""
    ids = torch.tensor([[*prompt, *twin.response]])
    logits = lm.model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.float().log_softmax(-1).gather(1, torch.tensor(twin.response)[:, None]).sum()


def plain_loss(lm: LanguageModel, batch: Sequence[Twin]) -> torch.Tensor:
    rows = [plain_log_likelihood(lm, twin.positive, twin) / len(twin.response) for twin in batch]
    return -torch.stack(rows).mean()


def loss_of(lm: LanguageModel, batch: Sequence[Twin]) -> torch.Tensor:
    reading, _ = packed_readings(batch, pad_id(lm), "cpu")
    sums, counts = response_log_likelihoods(lm, reading)
    return -(sums / counts).mean()


@contextmanager
def trained(lm: LanguageModel, weights: TunedWeights) -> Iterator[list[torch.nn.Parameter]]:
    """Trainable weights that already differ from the model's, without dropout."""
    lm.model.eval()
    with weights.use("one"):
        draw, parameters = torch.Generator().manual_seed(1), weights.parameters("one")
        with torch.no_grad():
            for parameter in parameters:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=draw))
        yield parameters
    weights.close()


def gradients(parameters: Sequence[torch.nn.Parameter], losses: Iterator[torch.Tensor]) -> list[torch.Tensor]:
    for loss in losses:
        loss.backward()  # type: ignore[no-untyped-call]
    found = [torch.zeros_like(one) if one.grad is None else one.grad.clone() for one in parameters]
    for parameter in parameters:
        parameter.grad = None
    return found


def check_equal(found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> None:
    largest = max(float(one.abs().max()) for one in wanted)
    assert largest > 1e-3
    for one, other in zip(found, wanted, strict=True):
        assert float((one - other).abs().max()) < 2e-5 * max(1.0, largest)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three positions go through the output projection at a time."""
    monkeypatch.setattr(response_likelihoods, "MAX_LOGITS", 3 * VOCAB)


@pytest.mark.parametrize("budget", [1, 60, 10_000])
@pytest.mark.parametrize("architecture", ["llama", "cohere", "gemma2", "opt", "mistral"])
def test_parts_have_the_gradient_of_the_whole_batch(architecture: str, budget: int) -> None:
    lm = tiny(architecture)
    weights = LoraWeights(lm, {"one": LoraShape(rank=4, alpha=8, last_block=1)}, seed=0)
    with trained(lm, weights) as parameters:
        wanted = gradients(parameters, iter([plain_loss(lm, twins())]))
        parts = losses_in_parts(twins(), lambda part: loss_of(lm, part), alone, budget)
        check_equal(gradients(parameters, parts), wanted)


def test_whatever_a_model_does_to_its_logits_is_done() -> None:
    lm = tiny("llama")

    def changed(_module: Any, _args: Any, output: Any) -> Any:
        output.logits = output.logits.exp() + torch.arange(VOCAB) / VOCAB
        return output

    with trained(lm, LoraWeights(lm, {"one": LoraShape(rank=4)}, seed=0)) as parameters:
        usual = gradients(parameters, iter([plain_loss(lm, twins())]))
        lm.model.register_forward_hook(changed)
        wanted = gradients(parameters, iter([plain_loss(lm, twins())]))
        check_equal(gradients(parameters, iter([loss_of(lm, twins())])), wanted)
    assert max(float((one - other).abs().max()) for one, other in zip(usual, wanted, strict=True)) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [*SHARING, *NOT_SHARING])
def test_a_prefix_is_shared_where_that_changes_no_gradient(architecture: str) -> None:
    lm = tiny(architecture)
    assert shares_prompts(lm) == (architecture in SHARING)
    shift = torch.zeros(lm.hidden_size, requires_grad=True)
    wanted = torch.autograd.grad(_shifted(lm, shift, share=False), shift)[0]
    found = torch.autograd.grad(_shifted(lm, shift, share=True), shift)[0]
    assert float(wanted.abs().max()) > 1e-4
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-3)


def _shifted(lm: LanguageModel, shift: torch.Tensor, *, share: bool) -> torch.Tensor:
    """The loss with a shift of every token's output of block 0."""

    def around(part: Any) -> Any:
        return adding(lm.blocks[0], shift, torch.ones_like(part.mask))

    groups = [twins()] if share else [[twin] for twin in twins()]
    total = torch.zeros(())
    for group in groups:
        reading, _ = packed_readings(group, pad_id(lm), "cpu")
        assert (reading.prefix >= len(PREFIX)) == share
        total = total + response_log_likelihoods(lm, reading, around)[0].sum()
    return total


def test_full_weights_have_the_gradient_of_the_whole_batch() -> None:
    """The output projection is trained too."""
    lm = tiny("llama")
    with trained(lm, FullWeights(lm, ["one"])) as parameters:
        wanted = gradients(parameters, iter([plain_loss(lm, twins())]))
        parts = losses_in_parts(twins(), lambda part: loss_of(lm, part), alone, 60)
        check_equal(gradients(parameters, parts), wanted)


@pytest.mark.parametrize("sign", [1, -1])
def test_bipo_in_parts_has_the_gradient_of_the_whole_batch(sign: int) -> None:
    lm, each = tiny("llama"), twins()
    pairs = list(zip(each[::2], each[1::2], strict=True))
    vector = torch.linspace(-1, 1, lm.hidden_size).requires_grad_()

    def steered(twin: Twin) -> torch.Tensor:
        where = torch.arange(len(twin.positive) + len(twin.response)) >= len(twin.positive) - 1
        with adding(lm.blocks[1], sign * vector, where[None]):
            return plain_log_likelihood(lm, twin.positive, twin)

    margins = [
        steered(good)
        - steered(bad)
        - (plain_log_likelihood(lm, good.positive, good) - plain_log_likelihood(lm, bad.positive, bad))
        for good, bad in pairs
    ]
    wanted = torch.autograd.grad(-torch.nn.functional.logsigmoid(sign * 0.5 * torch.stack(margins)).mean(), vector)[0]
    base = BaseMargins(lm)
    for part in losses_in_parts(pairs, lambda part: bidirectional_loss(lm, 1, vector, part, base, sign, 0.5), list, 50):
        part.backward()  # type: ignore[no-untyped-call]
    assert vector.grad is not None
    torch.testing.assert_close(vector.grad, wanted, atol=1e-6, rtol=1e-3)


def test_the_unsteered_margin_of_a_pair_is_computed_once() -> None:
    lm, each = tiny("llama"), twins()
    pairs, base = list(zip(each[::2], each[1::2], strict=True)), BaseMargins(lm)
    first = base.of(pairs)
    with record(lm.blocks, [0]) as passes:
        assert torch.equal(base.of([*pairs[::-1], pairs[0]]), first[[2, 1, 0, 0]])
    assert not passes


def test_an_instruction_is_hidden_in_a_shared_prefix_too() -> None:
    lm = tiny("llama")
    batch = twins(instructed=True)
    together = mean_log_likelihoods(lm, batch, lm.blocks[1:])
    assert packed_readings(batch, pad_id(lm), "cpu")[0].prefix >= len(PREFIX)
    for row, twin in enumerate(batch):
        for side, reading in zip(together, readings([twin], pad_id(lm), "cpu"), strict=True):
            sums, counts = response_log_likelihoods(lm, reading, lambda part: hiding(lm.blocks[1:], part.instruction))
            torch.testing.assert_close(side[row], (sums / counts)[0], atol=1e-5, rtol=1e-5)


def test_reading_stops_after_the_highest_block_that_is_read() -> None:
    lm = tiny("llama")
    assert shares_prompts(lm)
    with record(lm.blocks, [2]) as above:
        found = mean_differences(lm, twins(instructed=True), [0, 1])
    assert not above
    each = [mean_differences(lm, [twin], [0, 1]) for twin in twins(instructed=True)]
    for layer in (0, 1):
        torch.testing.assert_close(
            found[layer], torch.stack([one[layer] for one in each]).mean(0), atol=1e-5, rtol=1e-4
        )


class LargestLogits(TorchDispatchMode):
    """The number of rows of the largest tensor whose last dimension is the vocabulary, except the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in tree_leaves(result):
            if isinstance(one, torch.Tensor) and one.shape[-1:] == (VOCAB,) and one.shape[-2:] != (HIDDEN, VOCAB):
                self.rows = max(self.rows, one.numel() // VOCAB)
        return result


@pytest.mark.parametrize("full", [False, True])
def test_no_tensor_holds_the_logits_of_all_positions(full: bool) -> None:
    lm = tiny("llama")
    batch = [Twin((5, 6), (5, 6), tuple(range(10, 60))) for _ in range(4)]
    weights = FullWeights(lm, ["one"]) if full else LoraWeights(lm, {"one": LoraShape(rank=4)}, seed=0)
    with trained(lm, weights), LargestLogits() as largest:
        loss_of(lm, batch).backward()  # type: ignore[no-untyped-call]
    assert largest.rows == len(batch)  # the model's own last logits; parts have three rows


def test_parts_compute_the_fewest_tokens() -> None:
    prompt = tuple(range(20))
    batch = [Twin((*prompt, k), (*prompt, k), (1,) * length) for k, length in enumerate((40, 1, 39, 2, 38, 1))]
    parts = parted(batch, 1000, alone)
    assert [[len(twin.response) for twin in part] for part in parts] == [[40, 39, 38], [2, 1, 1]]
    assert [len(part) for part in parted(batch, 130, alone)] == [1, 2, 3]
    assert [len(part) for part in parted(batch, 1, alone)] == [1] * 6
    pairs = list(zip(batch[::2], batch[1::2], strict=True))
    assert [len(part) for part in parted(pairs, 260, list)] == [1, 2]


def test_dropout_keeps_the_mean() -> None:
    torch.manual_seed(0)
    hidden = torch.ones(400, 501, requires_grad=True)
    dropped = Dropout(0.05)(hidden)
    share = float((dropped == 0).float().mean())
    assert share == pytest.approx(0.05, abs=0.002)
    assert float(dropped.detach().mean()) == pytest.approx(1, abs=0.002)
    assert torch.equal(torch.autograd.grad(dropped.sum(), hidden)[0], dropped.detach())
    torch.manual_seed(0)
    assert torch.equal(Dropout(0.05)(hidden), dropped)
    assert Dropout(0.05).eval()(hidden) is hidden
