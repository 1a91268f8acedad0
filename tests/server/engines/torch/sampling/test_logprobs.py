"""Log-probabilities and divergences against plain float64 references."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from server.engines.protocol import SamplingParameters, TokenLogprob
from server.engines.torch.sampling.logprobs import divergence, token_logprobs
from server.engines.torch.sampling.request_sampler import RequestSampler
from server.engines.torch.sampling.sample import sample
from steering_vectors.measures.divergence import kl_divergence

VOCAB = 97
EXACT = {"abs": 3e-6, "rel": 1e-6}  # of float32


def random_logits(rows: int, vocab: int = VOCAB, *, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def log_softmax(row: torch.Tensor) -> np.ndarray:
    values = row.double().numpy()
    highest = values.max()
    return values - highest - np.log(np.exp(values - highest).sum())


def by_hand(row: torch.Tensor, token_id: int, top: int) -> TokenLogprob:
    """A stable sort of the row's logits lists the lowest id first among equals."""
    logprobs = log_softmax(row)
    order = np.argsort(-row.double().numpy(), kind="stable")[:top]
    return TokenLogprob(token_id, logprobs[token_id], tuple((int(one), logprobs[one]) for one in order))


def assert_equal(found: Sequence[TokenLogprob], expected: Sequence[TokenLogprob]) -> None:
    assert [one.token_id for one in found] == [one.token_id for one in expected]
    assert [one.logprob for one in found] == pytest.approx([one.logprob for one in expected], **EXACT)
    for ours, reference in zip(found, expected, strict=True):
        assert [token_id for token_id, _ in ours.top] == [token_id for token_id, _ in reference.top]
        assert [value for _, value in ours.top] == pytest.approx([value for _, value in reference.top], **EXACT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("tops", [(0, 0, 0, 0), (1, 1, 1, 1), (5, 0, 20, 1), (VOCAB - 1, VOCAB, VOCAB + 1, 500)])
def test_each_row_has_its_tokens_logprob_and_its_likeliest_tokens(dtype: torch.dtype, tops: Sequence[int]) -> None:
    logits, token_ids = random_logits(4).to(dtype), [0, 50, VOCAB - 1, 50]
    before = logits.clone()
    found = token_logprobs(logits, token_ids, tops)
    assert_equal(found, [by_hand(*one) for one in zip(logits, token_ids, tops, strict=True)])
    assert torch.equal(logits, before)


def test_the_results_are_plain_numbers() -> None:
    """They are written as JSON."""
    [found] = token_logprobs(random_logits(1), [3], [2])
    assert isinstance(found, TokenLogprob)
    assert type(found.token_id) is int
    assert type(found.logprob) is float
    assert type(found.top) is tuple
    assert [tuple(map(type, pair)) for pair in found.top] == [(int, float)] * 2
    assert [type(pair) for pair in found.top] == [tuple] * 2


def test_a_tokens_logprob_is_bitwise_the_one_in_the_list() -> None:
    logits = random_logits(VOCAB)
    for found in token_logprobs(logits, range(VOCAB), [VOCAB] * VOCAB):
        assert dict(found.top)[found.token_id] == found.logprob


def test_logits_beyond_the_range_of_the_exponential() -> None:
    first, second = token_logprobs(torch.tensor([[5000.0, 0.0, 4000.0], [-3e38, -3e38, 0.0]]), [1, 2], [3, 1])
    assert first == TokenLogprob(1, -5000.0, ((0, 0.0), (2, -1000.0), (1, -5000.0)))
    assert second == TokenLogprob(2, 0.0, ((2, 0.0),))


def test_a_row_does_not_depend_on_what_its_neighbours_list() -> None:
    logits = (random_logits(6) * 2).round() / 2  # many are equal
    token_ids, tops = [5, 4, 3, 2, 1, 0], [3, 20, 0, 1, 7, VOCAB]
    alone = [token_logprobs(logits[row : row + 1], [token_ids[row]], [tops[row]])[0] for row in range(6)]
    assert token_logprobs(logits, token_ids, tops) == alone


@pytest.mark.parametrize("vocab", [10, 40, VOCAB, 1000, 50_000])
@pytest.mark.parametrize("top", [1, 2, 3, 9])
def test_of_equal_logits_the_lowest_ids_are_listed_in_ascending_order(vocab: int, top: int) -> None:
    """Wherever the end of the list cuts through them, which `torch.topk` leaves open."""
    logits = torch.zeros(3, vocab)
    logits[1, [4, 7]] = 2.0
    logits[2, [8, 9]] = -1.0
    found = token_logprobs(logits, [0, 0, 0], [top] * 3)
    listed = [[token_id for token_id, _ in one.top] for one in found]
    assert listed == [[*range(top)], [4, 7, 0, 1, 2, 3, 5, 6, 8][:top], [*range(8), *range(10, vocab), 8][:top]]


@pytest.mark.parametrize("top", range(1, 12))
def test_lists_of_bfloat16_logits_are_those_of_a_stable_sort(top: int) -> None:
    logits = random_logits(64, 300, seed=top).bfloat16()
    found = token_logprobs(logits, [0] * 64, [top] * 64)
    assert_equal(found, [by_hand(row, 0, top) for row in logits])
    greedy = RequestSampler(SamplingParameters(temperature=0), vocab_size=300, eos_ids=frozenset(), prompt_ids=[1])
    assert [one.top[0][0] for one in found] == sample(logits, [greedy] * 64)


def test_logits_that_differ_keep_their_order_where_their_logprobs_are_equal() -> None:
    logits = torch.tensor([[1.0, 1.0 + 2**-23, 100.0]])
    [found] = token_logprobs(logits, [0], [3])
    assert found.top == ((2, 0.0), (1, -99.0), (0, -99.0))


def test_an_excluded_token_has_minus_infinity() -> None:
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]])
    [found] = token_logprobs(logits, [2], [4])
    half = pytest.approx(-math.log(2), **EXACT)
    assert found == TokenLogprob(2, -math.inf, ((1, half), (3, half), (0, -math.inf), (2, -math.inf)))


def test_a_row_that_is_not_finite_leaves_its_neighbours_alone() -> None:
    logits = random_logits(3)
    logits[0], logits[1, 5] = math.nan, math.nan
    first, second, third = token_logprobs(logits, [1, 1, 1], [3, 3, 3])
    assert np.isnan([first.logprob, second.logprob]).all()
    assert_equal([third], [by_hand(logits[2], 1, 3)])


def test_no_rows() -> None:
    assert token_logprobs(torch.empty(0, VOCAB), [], []) == []


@pytest.mark.parametrize(("token_ids", "tops"), [([1, 2, 3], [0, 0]), ([1, 2, 3], [0] * 4), ([1], [0, 0, 0])])
def test_each_row_needs_a_token_and_a_length(token_ids: Sequence[int], tops: Sequence[int]) -> None:
    with pytest.raises(ValueError, match=r"zip\(\) argument"):
        token_logprobs(random_logits(3), token_ids, tops)


# Divergence


def kl(steered: torch.Tensor, base: torch.Tensor) -> float:
    p, q = log_softmax(steered), log_softmax(base)
    kept = p > -math.inf
    return float((np.exp(p[kept]) * (p[kept] - q[kept])).sum())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("vocab", [2, VOCAB, 5000])
def test_the_divergence_is_that_of_the_definition(dtype: torch.dtype, vocab: int) -> None:
    steered, base = random_logits(2, vocab).to(dtype)
    found = divergence(steered, base)
    assert type(found) is float
    assert found == pytest.approx(kl(steered, base), rel=1e-5, abs=1e-6)
    assert divergence(base, steered) == pytest.approx(kl(base, steered), rel=1e-5, abs=1e-6)


def test_the_divergence_of_two_coins() -> None:
    fair, biased = torch.tensor([0.0, 0.0]), torch.tensor([math.log(3.0), 0.0])
    assert divergence(biased, fair) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), abs=1e-6)
    assert divergence(fair, biased) == pytest.approx(0.5 * math.log(2 / 3) + 0.5 * math.log(2), abs=1e-6)


def test_the_divergence_is_never_negative() -> None:
    """Though the sum in float32 of two rows that are nearly alike may be."""
    pairs = [(row, row + 1e-7 * random_logits(1, seed=seed)[0]) for seed, row in enumerate(random_logits(50))]
    raw = [float(kl_divergence(p.log_softmax(0), q.log_softmax(0))) for p, q in pairs]
    assert min(raw) < 0
    assert [divergence(*pair) for pair in pairs] == [max(value, 0.0) for value in raw]
    assert [divergence(row, row) for row, _ in pairs] == [0.0] * 50


def test_excluded_tokens_in_the_divergence() -> None:
    steered, base = random_logits(2)
    both, one = [4, 9], [4, 9, 30]
    steered[one] = -math.inf
    base[both] = -math.inf
    assert divergence(steered, base) == pytest.approx(kl(steered, base), rel=1e-5)
    assert divergence(base, steered) == math.inf  # the base allows a token that the other excludes
