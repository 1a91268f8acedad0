"""Captured statistics equal those of a plain pass over each example, alone and unpadded."""

from __future__ import annotations

import pytest
import torch

from steering_vectors.data.batches import Encoded, batches
from steering_vectors.errors import FitError
from steering_vectors.measures import activations
from steering_vectors.measures.activations import NormHistogram, capture, pooled
from steering_vectors.models.hooks import record
from steering_vectors.models.loading import LanguageModel, wrap_model
from tests.support.tiny import tiny_model
from tests.support.tiny_tokenizers import tiny_tokenizer


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return wrap_model(tiny_model("llama"), tiny_tokenizer())


def examples(count: int, seed: int) -> list[Encoded]:
    """Random ids of random lengths, with a response of at least one token."""
    draw = torch.Generator().manual_seed(seed)
    made: list[Encoded] = []
    for _ in range(count):
        start, length = (int(torch.randint(1, 9, (1,), generator=draw)) for _ in range(2))
        made.append((torch.randint(2, 380, (start + length,), generator=draw).tolist(), start))
    return made


def sharing(prompts: int, responses: int, seed: int) -> list[Encoded]:
    """So many responses of 1 to 5 tokens to each prompt, which has 2 to 12."""
    draw = torch.Generator().manual_seed(seed)
    made: list[Encoded] = []
    for start in torch.randint(2, 13, (prompts,), generator=draw).tolist():
        prompt = torch.randint(2, 380, (start,), generator=draw).tolist()
        for length in torch.randint(1, 6, (responses,), generator=draw).tolist():
            made.append((prompt + torch.randint(2, 380, (length,), generator=draw).tolist(), start))
    return made


def outputs(lm: LanguageModel, example: Encoded, layer: int) -> torch.Tensor:
    """The block's output at the response's tokens, from a pass over this example only."""
    ids, start = example
    with torch.no_grad(), record(lm.blocks, [layer]) as seen:
        lm.model(input_ids=torch.tensor([list(ids)]), use_cache=False)
    return seen[layer][0, start:]


def test_batches_are_bounded_sorted_and_complete() -> None:
    rows = examples(40, 0)
    made = list(batches(rows, 40))
    assert sorted(index for batch in made for index in batch.indices) == list(range(40))
    widths = [batch.ids.shape[1] for batch in made]
    assert widths == sorted(widths, reverse=True)
    assert all(batch.ids.numel() <= 40 for batch in made)
    for batch in made:
        for row, index in enumerate(batch.indices):
            ids, start = rows[index]
            assert batch.ids[row, : len(ids)].tolist() == list(ids)
            assert batch.response[row].nonzero().flatten().tolist() == list(range(start, len(ids)))


@pytest.mark.parametrize("budget", [48, 200, 10_000])
def test_shared_prompts_and_rows_are_bounded_and_complete(budget: int) -> None:
    rows = sharing(6, 5, 0) + examples(7, 1)
    made = list(batches(rows, budget, share=True))
    assert any(batch.prompts for batch in made)
    assert sorted(index for batch in made for index in batch.indices) == list(range(len(rows)))
    computed = sum(batch.ids.numel() + (batch.prompts.ids.numel() if batch.prompts else 0) for batch in made)
    assert computed < 0.95 * sum(batch.ids.numel() for batch in batches(rows, budget))
    for batch in made:
        prompts = batch.prompts
        width = 0 if prompts is None else prompts.ids.shape[1]
        assert batch.ids.shape[0] == 1 or batch.ids.shape[0] * (width + batch.ids.shape[1]) <= budget
        for row, index in enumerate(batch.indices):
            ids, start = rows[index]
            head: list[int] = []
            if prompts is not None:
                owner = prompts.owners[row]
                head = prompts.ids[owner, : prompts.lengths[owner]].tolist()
                assert len(head) == start - 1 > 0
            assert head + batch.ids[row, : batch.lengths[row]].tolist() == list(ids)
            assert len(head) + batch.response[row].nonzero().flatten()[0] == start


def test_prompts_are_not_shared_where_that_saves_little() -> None:
    assert not any(batch.prompts for batch in batches(examples(40, 0), 200, share=True))


def test_prompts_of_one_row_each_are_shared_if_they_are_kept_for_many_passes() -> None:
    rows = [([place, *range(10, 22), 7, 8], 13) for place in range(6)]
    assert not any(batch.prompts for batch in batches(rows, 400, share=True))
    (batch,) = batches(rows, 400, share=True, kept=True)
    assert batch.prompts is not None
    assert batch.prompts.lengths.tolist() == [12] * 6
    assert batch.ids.shape == (6, 3)


def test_an_example_longer_than_the_budget_runs_alone() -> None:
    assert [batch.indices for batch in batches([([5] * 9, 1), ([5] * 9, 1)], 4)] == [(0,), (1,)]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "gemma3_text", "mamba"])
@pytest.mark.parametrize("tokens", ["response", "last"])
def test_padded_batches_equal_single_rows(architecture: str, tokens: activations.Tokens) -> None:
    lm = wrap_model(tiny_model(architecture), tiny_tokenizer())
    rows, layers = examples(12, 1) + sharing(3, 4, 2), list(range(lm.num_layers))
    found: dict[int, torch.Tensor] = {}
    for part in pooled(lm, rows, layers, tokens=tokens, batch_tokens=64):
        found.update(zip(part.indices, part.vectors, strict=True))
    for index, example in enumerate(rows):
        for k, layer in enumerate(layers):
            hidden = outputs(lm, example, layer)
            expected = hidden[-1] if tokens == "last" else hidden.mean(0)
            torch.testing.assert_close(found[index][k], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch_tokens", [1, 50, 10_000])
def test_statistics_equal_a_plain_reference(lm: LanguageModel, batch_tokens: int) -> None:
    positives, negatives = examples(11, 2), examples(7, 3)
    statistics = capture(lm, positives, negatives, [2, 0], paired=False, batch_tokens=batch_tokens)
    assert sorted(statistics) == [0, 2]
    for layer, one in statistics.items():
        sides = [torch.stack([outputs(lm, row, layer).mean(0) for row in side]) for side in (positives, negatives)]
        norms = torch.cat([outputs(lm, row, layer).norm(dim=-1) for row in (*positives, *negatives)])
        torch.testing.assert_close(one.positive_mean.float(), sides[0].mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one.difference.float(), sides[0].mean(0) - sides[1].mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one.positives, sides[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one.negatives, sides[1], rtol=1e-4, atol=1e-5)
        assert one.residual_norm == pytest.approx(float(norms.double().quantile(0.5)), rel=0.02)


def test_weighted_means_equal_those_of_repeated_rows(lm: LanguageModel) -> None:
    positives, negatives, weights = examples(9, 2), examples(7, 3), ([1.0, 2.0, 3.0] * 3, [2.0] * 3 + [1.0] * 4)
    repeated = [
        [row for row, count in zip(side, counts, strict=True) for _ in range(int(count))]
        for side, counts in zip((positives, negatives), weights, strict=True)
    ]
    found = capture(lm, positives, negatives, [1], paired=False, batch_tokens=64, weights=weights)[1]
    expected = capture(lm, *repeated, [1], paired=False, batch_tokens=64)[1]
    torch.testing.assert_close(found.positive_mean, expected.positive_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.negative_mean, expected.negative_mean, rtol=1e-5, atol=1e-6)
    plain = capture(lm, positives, negatives, [1], paired=False, batch_tokens=64)[1]
    assert found.unweighted is not None
    torch.testing.assert_close(found.unweighted, plain.difference, rtol=1e-6, atol=1e-7)
    assert found.sample_weights is not None
    assert [side.tolist() for side in found.sample_weights] == list(weights)
    assert (plain.sample_weights, plain.unweighted) == (None, None)


def test_the_sample_is_bounded_seeded_and_aligned(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "SAMPLE_ROWS", 5)
    rows = examples(20, 4)
    first, again, other = (
        capture(lm, rows, rows, [1], paired=True, seed=seed, batch_tokens=64)[1] for seed in (0, 0, 1)
    )
    assert first.positives.shape == (5, lm.hidden_size)
    assert torch.equal(first.positives, again.positives)
    assert not torch.equal(first.positives, other.positives)
    torch.testing.assert_close(first.positives, first.negatives)
    assert torch.equal(first.positive_mean, other.positive_mean)


def test_without_a_sample_a_few_vectors_are_kept_at_spaced_blocks(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, layers = examples(12, 5), [0, 1, 2]
    whole = capture(lm, rows, rows, layers, paired=True)
    few = capture(lm, rows, rows, layers, paired=True, keep_sample=False)
    for layer in layers:
        assert torch.equal(few[layer].positives, whole[layer].positives)
        assert torch.equal(few[layer].positive_mean, whole[layer].positive_mean)
    monkeypatch.setattr(activations, "CHECK_ROWS", 8)
    monkeypatch.setattr(activations, "CHECK_BYTES", 2 * 4 * 8 * lm.hidden_size)  # of one block
    bounded = capture(lm, rows, rows, layers, paired=True, keep_sample=False)
    assert [len(bounded[layer].positives) for layer in layers] == [0, 8, 0]
    kept, others = bounded[1].sampled
    assert kept == others
    assert torch.equal(bounded[1].positives, whole[1].positives[list(kept)])
    assert torch.equal(bounded[1].positive_mean, whole[1].positive_mean)


def test_progress_counts_every_example(lm: LanguageModel) -> None:
    seen: list[tuple[str, int, int]] = []
    rows = examples(9, 6)
    capture(lm, rows, rows, [0], paired=True, batch_tokens=40, progress=lambda *told: seen.append(told))
    assert seen[-1] == ("capture", 18, 18)
    assert [done for _, done, _ in seen] == sorted({done for _, done, _ in seen})


def test_an_infinite_activation_names_the_block() -> None:
    model = tiny_model("llama")
    lm = wrap_model(model, tiny_tokenizer())
    with torch.no_grad():
        next(iter(lm.blocks[1].parameters())).fill_(float("inf"))
    rows = examples(2, 7)
    with pytest.raises(FitError, match="block 1's output is not finite"):
        capture(lm, rows, rows, [0, 1], paired=True)


@pytest.mark.parametrize("size", [1, 2, 999, 10_000])
def test_the_running_median_is_close(size: int) -> None:
    values = torch.rand(size, generator=torch.Generator().manual_seed(size)) * 40 + 3
    histogram = NormHistogram()
    for chunk in values.split(100):
        histogram.add(chunk)
    assert histogram.median() == pytest.approx(float(values.quantile(0.5)), rel=0.4 if size == 2 else 0.012)
    assert NormHistogram().median() == 0.0
