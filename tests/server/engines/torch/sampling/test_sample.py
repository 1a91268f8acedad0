"""The next token: each step against a reference, and independence of the rows from each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from server.engines.protocol import Constraint, SamplingParameters
from server.engines.torch.constraints.matching import GrammarCompiler, Matcher
from server.engines.torch.sampling.request_sampler import RequestSampler, check_vocabulary
from server.engines.torch.sampling.sample import NonFiniteLogits, sample
from server.engines.torch.sampling.truncation import probability_mass, rows_of
from steering_vectors.errors import RequestError
from tests.support.tiny_tokenizers import tiny_tokenizer

VOCAB = 97
GREEDY = SamplingParameters(temperature=0)


def sampler(
    parameters: SamplingParameters,
    *,
    vocab: int = VOCAB,
    eos: Sequence[int] = (0,),
    prompt: Sequence[int] = (1, 2, 2, 3),
    chosen: Sequence[int] = (),
    choice: int = 0,
) -> RequestSampler:
    row = RequestSampler(parameters, vocab_size=vocab, eos_ids=frozenset(eos), prompt_ids=prompt, choice=choice)
    for token_id in chosen:
        row.observe(token_id)
    return row


def random_logits(rows: int, vocab: int = VOCAB, *, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread


def reference(logits: torch.Tensor, wish: SamplingParameters) -> np.ndarray:
    """Probabilities of one row, step by step in float64: temperature, top_k, top_p, min_p."""
    scaled = logits.double().numpy() / wish.temperature
    order = np.argsort(-scaled, kind="stable")
    kept = order[: wish.top_k or None]
    weights = np.exp(scaled - scaled.max())
    weights[weights < 2.0**-40] = 0
    share = np.cumsum(weights[kept]) / weights[kept].sum()
    kept = kept[: int(np.searchsorted(share, wish.top_p - 1e-12)) + 1]
    kept = kept[weights[kept] >= wish.min_p]  # of the likeliest token, which has 1
    probabilities = np.zeros_like(weights)
    probabilities[kept] = weights[kept] / weights[kept].sum()
    return probabilities


def probabilities(logits: torch.Tensor, *parameters: SamplingParameters) -> np.ndarray:
    mass = probability_mass(logits.float().clone(), parameters).double()
    return (mass / mass.sum(dim=-1, keepdim=True)).numpy()


def label(wish: SamplingParameters) -> str:
    return f"T{wish.temperature:g}-k{wish.top_k}-p{wish.top_p:g}-m{wish.min_p:g}"


SHAPES = [
    SamplingParameters(),
    SamplingParameters(temperature=0.3),
    SamplingParameters(temperature=2.5),
    SamplingParameters(top_k=5),
    SamplingParameters(top_k=1),
    SamplingParameters(top_k=1000),
    SamplingParameters(top_p=0.9),
    SamplingParameters(top_p=1e-6),
    SamplingParameters(min_p=0.1),
    SamplingParameters(min_p=1.0),
    SamplingParameters(temperature=1.7, top_k=20, top_p=0.7, min_p=0.05),
    SamplingParameters(temperature=50.0, top_k=40, top_p=0.5),
]


@pytest.mark.parametrize("wish", SHAPES, ids=label)
def test_probabilities_match_the_reference(wish: SamplingParameters) -> None:
    logits = random_logits(8, spread=1.2)
    ours = probabilities(logits, *[wish] * 8)
    for row, expected in zip(ours, map(reference, logits, [wish] * 8), strict=True):
        np.testing.assert_array_equal(row > 0, expected > 0)
        np.testing.assert_allclose(row, expected, rtol=1e-5, atol=1e-9)


def test_rows_keep_their_own_parameters_in_one_batch() -> None:
    logits = random_logits(len(SHAPES))
    for row, expected in zip(probabilities(logits, *SHAPES), map(reference, logits, SHAPES), strict=True):
        np.testing.assert_allclose(row, expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("warper", "wish"),
    [
        (TopKLogitsWarper(7), SamplingParameters(top_k=7)),
        (TopPLogitsWarper(0.6), SamplingParameters(top_p=0.6)),
        (TopPLogitsWarper(0.99), SamplingParameters(top_p=0.99)),
        (MinPLogitsWarper(0.02), SamplingParameters(min_p=0.02)),
    ],
    ids=["top_k", "top_p", "top_p_high", "min_p"],
)
@pytest.mark.parametrize("vocab", [VOCAB, 5003])
def test_the_kept_tokens_are_those_of_transformers(
    warper: LogitsProcessor, wish: SamplingParameters, vocab: int
) -> None:
    logits = random_logits(16, vocab)
    kept = torch.isfinite(warper(torch.zeros(16, 1, dtype=torch.long), logits.clone()))
    np.testing.assert_array_equal(probabilities(logits, *[wish] * 16) > 0, kept.numpy())


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_the_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    prompt, chosen = [1, 5, 5, 9], [9, 20, 21]
    logits = random_logits(200)
    seen = torch.tensor([prompt + chosen] * 200)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(seen, logits.clone()).argmax(-1).tolist()
    wish = SamplingParameters(temperature=0, repetition_penalty=penalty)
    assert sample(logits, [sampler(wish, prompt=prompt, chosen=chosen)] * 200) == expected


def greedy(scores: dict[int, float], wish: SamplingParameters, **options: Sequence[int]) -> int:
    """The greedy choice where these ids have these logits and all others -9."""
    logits = torch.full((1, VOCAB), -9.0)
    for token_id, score in scores.items():
        logits[0, token_id] = score
    return sample(logits, [sampler(wish, **options)])[0]


def test_presence_and_frequency_count_the_completion_only() -> None:
    presence = SamplingParameters(temperature=0, presence_penalty=1.0)
    assert greedy({1: 2.0, 7: 1.5}, presence, prompt=[1, 1]) == 1
    assert greedy({1: 2.0, 7: 1.5}, presence, chosen=[1]) == 7
    assert greedy({1: 2.0, 7: 0.9}, presence, chosen=[1, 1, 1]) == 1  # once, however often
    frequency = SamplingParameters(temperature=0, frequency_penalty=0.5)
    assert greedy({1: 2.0, 7: 0.9}, frequency, chosen=[1, 1]) == 1
    assert greedy({1: 2.0, 7: 0.9}, frequency, chosen=[1, 1, 1]) == 7


def test_penalties_add_up_in_their_order() -> None:
    wish = SamplingParameters(temperature=0, repetition_penalty=2.0, presence_penalty=0.25, frequency_penalty=0.5)
    # 8 / 2 − 0.25 − 2 × 0.5 = 2.75, and −1 × 2 − 0.25 − 0.5 = −2.75
    assert greedy({1: 8.0, 7: 2.74}, wish, chosen=[1, 1]) == 1
    assert greedy({1: 8.0, 7: 2.76}, wish, chosen=[1, 1]) == 7
    assert greedy({1: -1.0, 7: -2.74}, wish, chosen=[1]) == 7
    assert greedy({1: -1.0, 7: -2.76}, wish, chosen=[1]) == 1


def test_counts_of_a_long_completion_are_exact() -> None:
    wish = SamplingParameters(temperature=0, frequency_penalty=0.01)
    chosen = [token_id for token_id in range(60) for _ in range(token_id + 1)]  # id i was chosen i + 1 times
    logits = torch.zeros(1, VOCAB)
    logits[0, 60:] = -9.0
    logits[0, :60] += torch.arange(1, 61) * 0.01  # takes the penalty back
    logits[0, 33] += 0.001
    assert sample(logits, [sampler(wish, prompt=[70], chosen=chosen)]) == [33]


def test_presence_counts_the_completion_only_beside_a_repetition_penalty_too() -> None:
    """Which looks at the prompt, and so has its tokens counted."""
    wish = SamplingParameters(temperature=0, repetition_penalty=1.0001, presence_penalty=1.0, frequency_penalty=0.5)
    assert greedy({1: 2.0, 7: 1.9}, wish, prompt=[1]) == 1
    assert greedy({1: 2.0, 7: 1.9}, wish, prompt=[1], chosen=[1]) == 7


def test_logit_bias_is_added() -> None:
    assert greedy({4: 1.0, 7: 0.0}, SamplingParameters(temperature=0, logit_bias={7: 1.5})) == 7
    assert greedy({4: 1.0, 7: 0.0}, SamplingParameters(temperature=0, logit_bias={4: -100.0, 8: 2.0})) == 7


def test_min_tokens_holds_back_what_would_end_the_text() -> None:
    wish = SamplingParameters(temperature=0, min_tokens=2, stop_token_ids=(5,))
    scores = {0: 3.0, 5: 2.0, 8: 1.0}
    assert greedy(scores, wish) == greedy(scores, wish, chosen=[8]) == 8
    assert greedy(scores, wish, chosen=[8, 8]) == 0
    endless = SamplingParameters(temperature=0, min_tokens=2, stop_token_ids=(5,), ignore_eos=True)
    assert greedy(scores, endless) == 0  # an end-of-sequence token ends nothing here
    assert greedy(scores, wish, eos=[0, VOCAB + 5]) == 8  # an id that only the tokenizer has


def test_greedy_takes_the_lowest_of_equal_logits() -> None:
    logits = torch.zeros(2, VOCAB, dtype=torch.bfloat16)
    logits[0, [40, 60]] = 1
    assert sample(logits, [sampler(GREEDY)] * 2) == [40, 0]


def test_equal_logits_at_the_border_are_kept_from_the_lowest_id_on() -> None:
    logits = torch.zeros(1, 10)
    for wish, kept in ((SamplingParameters(top_k=3), 3), (SamplingParameters(top_p=0.45), 5)):
        assert np.flatnonzero(probabilities(logits, wish)[0]).tolist() == list(range(kept))


@pytest.mark.parametrize("allow_sync", [True, False])
@pytest.mark.parametrize("wish", [SamplingParameters(top_k=1), SamplingParameters(top_p=0.3)], ids=label)
def test_of_two_equal_maxima_the_lower_is_kept(wish: SamplingParameters, allow_sync: bool) -> None:
    logits = torch.full((1, 10), -9.0)
    logits[0, [4, 7]] = 2.0
    assert probability_mass(logits, [wish], allow_sync=allow_sync)[0].nonzero().flatten().tolist() == [4]


@pytest.mark.slow
@pytest.mark.parametrize("wish", SHAPES, ids=label)
def test_probabilities_of_many_equal_logits_match_the_reference(wish: SamplingParameters) -> None:
    """As bfloat16 has them: of those that tie at a border the lowest ids are kept, and no more than are needed."""
    logits = (random_logits(200, 40, spread=1.2) * 2).round() / 2
    for row in logits:  # alone: what one row needs may be done for its neighbours too
        found, expected = probabilities(row[None], wish)[0], reference(row, wish)
        np.testing.assert_array_equal(found > 0, expected > 0)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_float_type_is_accepted_and_left_as_it_is(dtype: torch.dtype) -> None:
    logits = random_logits(4).to(dtype)
    before = logits.clone()
    wishes = [
        GREEDY,
        SamplingParameters(seed=1),
        SamplingParameters(seed=1, top_k=2),
        SamplingParameters(logit_bias={1: 1.0}),
    ]
    tokens = sample(logits, [sampler(wish) for wish in wishes])
    assert tokens[0] == logits[0].float().argmax().item()
    assert torch.equal(logits, before)


def test_no_rows() -> None:
    assert sample(torch.empty(0, VOCAB), []) == []


# Mass


@pytest.mark.parametrize("allow_sync", [True, False])
def test_the_mass_of_the_likeliest_token_is_2_to_the_40(allow_sync: bool) -> None:
    logits = torch.tensor([[-1.0, 3.0, 2.0, -math.inf, -24.0, -25.0]])
    mass = probability_mass(logits.clone(), [SamplingParameters()], allow_sync=allow_sync)
    assert mass.dtype == torch.int64
    weights = [int(2**40 * float(torch.tensor(nats).exp())) for nats in (-4.0, 0.0, -1.0, -math.inf, -27.0, -28.0)]
    assert mass.tolist() == [weights]
    assert weights[4:] == [2, 0]  # 2^-40 is e^-27.7


@pytest.mark.parametrize("allow_sync", [True, False])
@pytest.mark.parametrize(
    ("wish", "kept"),
    [
        (SamplingParameters(top_p=0.02), 1),
        (SamplingParameters(top_p=0.3), 15),  # in float32 the products 0.3 · 50 and 0.6 · 50 are too large
        (SamplingParameters(top_p=0.6), 30),
        (SamplingParameters(top_p=0.6000001), 31),
        (SamplingParameters(top_p=1.0), 50),
        (SamplingParameters(top_k=49), 49),
        (SamplingParameters(top_k=50), 50),
        (SamplingParameters(top_k=51), 50),
        (SamplingParameters(top_k=52), 50),
        (SamplingParameters(top_k=6, top_p=0.5), 3),  # of the mass that top_k left
        (SamplingParameters(min_p=1.0), 50),
    ],
)
def test_the_number_of_equal_tokens_kept_is_exact(wish: SamplingParameters, kept: int, allow_sync: bool) -> None:
    logits = torch.zeros(3, 52)
    logits[:, [2, 7]] = -math.inf
    ids = [one for one in range(52) if one not in (2, 7)][:kept]
    neighbours = [SamplingParameters(), wish, SamplingParameters(temperature=2.0, top_k=1)]
    mass = probability_mass(logits, neighbours, allow_sync=allow_sync)
    assert mass[1].nonzero().flatten().tolist() == ids
    assert mass[1, ids].tolist() == [2**40] * kept
    assert mass.count_nonzero(dim=1).tolist() == [50, kept, 1]


@pytest.mark.parametrize("allow_sync", [True, False])
def test_min_p_keeps_what_is_exactly_as_likely(allow_sync: bool) -> None:
    logits = torch.tensor([[0.0, -1.0, -2.0]])
    second = float(torch.tensor(-1.0).exp())  # its mass is this share of 2^40, exactly
    for min_p, kept in ((second, 2), (math.nextafter(second, 0), 2), (math.nextafter(second, 1), 1), (1e-12, 3)):
        mass = probability_mass(logits.clone(), [SamplingParameters(min_p=min_p)], allow_sync=allow_sync)
        assert mass[0].count_nonzero() == kept


@pytest.mark.parametrize("allow_sync", [True, False])
def test_top_k_counts_only_tokens_that_can_be_drawn(allow_sync: bool) -> None:
    logits = torch.full((1, 20), -math.inf)
    logits[0, [3, 9, 15]] = torch.tensor([0.0, -50.0, -1.0])  # 50 nats below is no mass
    mass = probability_mass(logits, [SamplingParameters(top_k=3)], allow_sync=allow_sync)
    assert mass[0].nonzero().flatten().tolist() == [3, 15]


def test_rows_of_copies_only_a_part() -> None:
    whole = torch.arange(12).reshape(4, 3)
    assert rows_of(whole, range(4)) is whole
    part = rows_of(whole, [0, 3])
    assert part.tolist() == [[0, 1, 2], [9, 10, 11]]
    part.zero_()
    assert whole.sum() == 66


# The draw


def chi_square(observed: np.ndarray, expected: np.ndarray) -> tuple[float, int]:
    """The statistic over tokens with at least 5 expected draws (the rest as one), and its degrees of freedom."""
    common = expected >= 5
    pairs = [*zip(observed[common], expected[common], strict=True), (observed[~common].sum(), expected[~common].sum())]
    pairs = [(seen, wanted) for seen, wanted in pairs if wanted > 0]
    return float(sum((seen - wanted) ** 2 / wanted for seen, wanted in pairs)), len(pairs) - 1


@pytest.mark.parametrize("wish", SHAPES[::2], ids=label)
def test_draws_follow_the_distribution(wish: SamplingParameters) -> None:
    one = random_logits(1, 30, seed=3, spread=1.5)
    wish = SamplingParameters(
        temperature=wish.temperature, top_k=wish.top_k, top_p=wish.top_p, min_p=wish.min_p, seed=11
    )
    rows = [sampler(wish, vocab=30, choice=choice) for choice in range(100)]
    drawn = [token_id for _ in range(80) for token_id in sample(one.expand(100, -1), rows)]
    expected = reference(one[0], wish)
    counts = np.bincount(drawn, minlength=30)
    assert counts[expected == 0].sum() == 0
    statistic, freedom = chi_square(counts, expected * len(drawn))
    assert statistic <= freedom + 4 * math.sqrt(2 * freedom)


def test_the_draw_inverts_the_cumulative_distribution_in_the_vocabularys_order() -> None:
    logits, wish = random_logits(200, seed=5), SamplingParameters(seed=3, temperature=0.8, top_p=0.95)
    rows, twins = ([sampler(wish, choice=choice) for choice in range(200)] for _ in range(2))
    for token_id, row, twin in zip(sample(logits, rows), logits, twins, strict=True):
        cumulative = np.cumsum(reference(row, wish))
        assert token_id == np.searchsorted(cumulative, twin.uniform(), side="right")


@pytest.mark.parametrize("allow_sync", [True, False])
@pytest.mark.parametrize(("rows", "vocab"), [(9, 60_000), (3, 2**18 + 1)], ids=["four_at_a_time", "one_at_a_time"])
def test_rows_of_large_vocabularies_are_drawn_in_parts(rows: int, vocab: int, allow_sync: bool) -> None:
    """On a CPU; each takes its own number, and a greedy one takes none."""
    logits = random_logits(rows, vocab, seed=4)
    wishes = [SamplingParameters(temperature=place != 1, seed=8) for place in range(rows)]
    together, alone = ([sampler(wish, vocab=vocab, choice=i) for i, wish in enumerate(wishes)] for _ in range(2))
    tokens = sample(logits, together, allow_sync=allow_sync)
    assert tokens == [sample(logits[i : i + 1], [row])[0] for i, row in enumerate(alone)]
    assert [row.uniform() for row in together] == [row.uniform() for row in alone]


@pytest.mark.parametrize("allow_sync", [None, True, False])
def test_logits_that_are_all_drawn_from_are_left_as_they_are(allow_sync: bool | None) -> None:
    logits = random_logits(3)
    before = logits.clone()
    sample(logits, [sampler(SamplingParameters(top_k=2)) for _ in range(3)], allow_sync=allow_sync)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("allow_sync", [True, False])
def test_token_0_is_a_token_as_any_other(allow_sync: bool) -> None:
    logits = torch.full((3, VOCAB), -math.inf)
    logits[:, 0] = 1.0
    logits[1, 5] = 2.0
    wishes = [SamplingParameters(), SamplingParameters(logit_bias={5: -100.0}), GREEDY]
    assert sample(logits, [sampler(wish) for wish in wishes], allow_sync=allow_sync) == [0, 0, 0]


class FixedStream(RequestSampler):
    """A row whose stream says what the test wants."""

    number = 0.0

    def uniform(self) -> float:
        return self.number


@pytest.mark.parametrize("number", [0.0, math.nextafter(1.0, 0.0), 1.0])
def test_tokens_without_probability_are_never_drawn(number: float) -> None:
    logits = torch.full((1, 50_000), -math.inf)
    logits[0, 7_000:40_000] = 0.0
    row = FixedStream(SamplingParameters(), vocab_size=50_000, eos_ids=frozenset(), prompt_ids=[1])
    row.number = number
    assert sample(logits, [row]) == [7_000 if number == 0 else 39_999]


def test_the_smallest_temperatures_are_greedy() -> None:
    logits = random_logits(1)
    for temperature in (1e-5, 1e-35, 5e-324):
        assert sample(logits, [sampler(SamplingParameters(temperature=temperature))]) == [logits.argmax().item()]


def draws(seed: int | None, choice: int = 0, count: int = 40) -> list[int]:
    row = sampler(SamplingParameters(seed=seed), choice=choice)
    return [sample(random_logits(1, seed=step), [row])[0] for step in range(count)]


def test_a_seed_repeats_its_draws() -> None:
    assert draws(5) == draws(5)
    seeds = [5, 6, -5, 0, -1, 2**63 - 1, -(2**63)]
    assert len({tuple(draws(seed)) for seed in seeds}) == len(seeds)


def test_choices_of_one_seed_differ_and_choice_0_is_the_default() -> None:
    assert len({tuple(draws(5, choice)) for choice in range(8)}) == 8
    row = RequestSampler(SamplingParameters(seed=5), vocab_size=VOCAB, eos_ids=frozenset(), prompt_ids=[1])
    assert row.uniform() == sampler(SamplingParameters(seed=5), choice=0).uniform()


def test_no_seed_means_another_stream_each_time() -> None:
    assert draws(None) != draws(None)


def test_a_stream_is_the_same_on_every_machine() -> None:
    first = [sampler(SamplingParameters(seed=seed), choice=choice).uniform() for seed, choice in ((0, 0), (-7, 3))]
    assert first == [0.13167005029529244, 0.43981312186299415]


# Independence


Wishes = st.builds(
    SamplingParameters,
    temperature=st.sampled_from([0.0, 0.4, 1.0, 3.0]),
    top_p=st.sampled_from([1.0, 0.9, 0.3]),
    top_k=st.sampled_from([0, 1, 6, 200]),
    min_p=st.sampled_from([0.0, 0.05]),
    repetition_penalty=st.sampled_from([1.0, 1.2]),
    presence_penalty=st.sampled_from([0.0, 0.5]),
    frequency_penalty=st.sampled_from([0.0, 0.3]),
    logit_bias=st.sampled_from([{}, {3: 2.0, 90: -4.0}]),
    min_tokens=st.sampled_from([0, 3]),
    seed=st.integers(-(2**63), 2**63 - 1),
)


@pytest.mark.slow
@settings(max_examples=40)
@given(wishes=st.lists(Wishes, min_size=1, max_size=8), seed=st.integers(0, 1000))
def test_a_rows_tokens_are_the_same_alone_and_among_any_neighbours(wishes: list[SamplingParameters], seed: int) -> None:
    together, alone = ([sampler(wish, choice=i) for i, wish in enumerate(wishes)] for _ in range(2))
    for step in range(4):
        logits = random_logits(len(wishes), seed=seed + step)
        tokens = sample(logits, together)
        assert tokens == [sample(logits[i : i + 1], [row])[0] for i, row in enumerate(alone)]
        for token_id, row, twin in zip(tokens, together, alone, strict=True):
            row.observe(token_id)
            twin.observe(token_id)


@pytest.mark.parametrize("vocab", [31, 1001, 49_157])
@pytest.mark.parametrize("wish", SHAPES, ids=label)
def test_a_rows_mass_is_bitwise_the_same_alone_and_in_a_batch(wish: SamplingParameters, vocab: int) -> None:
    logits = random_logits(5, vocab, seed=2)
    neighbours = [SamplingParameters(top_k=3), wish, SamplingParameters(temperature=0.5, top_p=0.99), wish, wish]
    together = probability_mass(logits.clone(), neighbours)
    for place in (1, 3, 4):
        assert torch.equal(together[place], probability_mass(logits[place : place + 1].clone(), [wish])[0])


# Grammars

TOKENIZER = tiny_tokenizer()
END = 1  # </s>
WIDE = len(TOKENIZER) + 16  # the model's vocabulary is larger than the tokenizer's
DIGITS = TOKENIZER.convert_tokens_to_ids([*"0123456789"])
COMPILER = GrammarCompiler(TOKENIZER, frozenset({END}))


def constrained(text: str, wish: SamplingParameters = GREEDY, *, chosen: str = "", choice: int = 0) -> RequestSampler:
    """A row that must match a regular expression, and has begun."""
    matcher = Matcher(COMPILER.compile(Constraint("regex", text)))
    row = RequestSampler(
        wish, vocab_size=WIDE, eos_ids=frozenset({END}), prompt_ids=[5], choice=choice, matcher=matcher
    )
    for token_id in TOKENIZER.convert_tokens_to_ids([*chosen]):
        row.observe(token_id)
    return row


def free(wish: SamplingParameters = GREEDY) -> RequestSampler:
    return sampler(wish, vocab=WIDE, eos=(END,), prompt=(5,))


def best(logits: torch.Tensor, ids: Sequence[int]) -> int:
    return max(ids, key=lambda token_id: float(logits[token_id]))


@pytest.mark.parametrize("allow_sync", [True, False])
def test_a_constrained_row_takes_the_best_of_what_its_grammar_allows(allow_sync: bool) -> None:
    """In any place among rows without a grammar, and the ids beyond the tokenizer's vocabulary are never allowed."""
    logits = random_logits(5, WIDE, seed=7)
    logits[:, -1], logits[:, END] = 50.0, 20.0
    before = logits.clone()
    rows = [free(), constrained("[0-9]+"), free(), constrained("[0-9]+", chosen="4"), constrained("[3-5]")]
    expected = [WIDE - 1, best(logits[1], DIGITS), WIDE - 1, END, best(logits[4], DIGITS[3:6])]
    assert sample(logits, rows, allow_sync=allow_sync) == expected
    assert sample(logits[[1, 3, 4]], [rows[1], rows[3], rows[4]], allow_sync=allow_sync) == [
        expected[place] for place in (1, 3, 4)
    ]
    assert torch.equal(logits, before)


@pytest.mark.parametrize("allow_sync", [True, False])
def test_draws_of_a_constrained_row_follow_the_distribution_of_what_is_allowed(allow_sync: bool) -> None:
    logits = random_logits(1, WIDE, seed=8).expand(60, -1)
    wish = SamplingParameters(seed=5, temperature=1.5)
    rows = [constrained("[2-6]", wish, choice=choice) if choice % 2 else free(wish) for choice in range(60)]
    twins = [sampler(wish, vocab=WIDE, choice=choice) for choice in range(60)]
    allowed = torch.full((WIDE,), -math.inf)
    allowed[DIGITS[2:7]] = logits[0, DIGITS[2:7]]
    cumulative = np.cumsum(reference(allowed, wish))
    tokens = sample(logits, rows, allow_sync=allow_sync)
    for token_id, twin in [*zip(tokens, twins, strict=True)][1::2]:
        assert token_id == np.searchsorted(cumulative, twin.uniform(), side="right")


def test_bias_is_added_before_the_grammar() -> None:
    logits = random_logits(1, WIDE)
    wish = SamplingParameters(temperature=0, logit_bias={DIGITS[8]: 40.0, 60: 90.0})
    assert sample(logits, [constrained("[0-9]", wish)]) == [DIGITS[8]]


@pytest.mark.parametrize("allow_sync", [True, False])
def test_min_tokens_holds_back_the_end_unless_the_grammar_allows_nothing_else(allow_sync: bool) -> None:
    logits = random_logits(4, WIDE, seed=9)
    logits[:, END] = 30.0
    wish = SamplingParameters(temperature=0, min_tokens=3)
    rows = [
        constrained("[0-9]*", wish),  # may end at once
        constrained("[0-9]", wish, chosen="7"),  # can only end
        constrained("[0-9]*", wish, chosen="123"),  # is long enough
        constrained("[0-9]*"),  # has no minimum
    ]
    assert sample(logits, rows, allow_sync=allow_sync) == [best(logits[0], DIGITS), END, END, END]
    stop = replace(wish, stop_token_ids=(DIGITS[2],))
    assert sample(logits[:1], [constrained("[12]", stop)], allow_sync=allow_sync) == [DIGITS[1]]
    assert sample(logits[:1], [constrained("2", stop)], allow_sync=allow_sync) == [DIGITS[2]]


def test_a_row_says_whether_its_grammar_is_complete_or_has_failed() -> None:
    assert (free().complete, free().problem, free().edits_logits) == (False, None, False)
    begun, whole, failed = (constrained("[0-9]", chosen=chosen) for chosen in ("", "7", "x"))
    assert [row.complete for row in (begun, whole, failed)] == [False, True, False]
    assert [row.problem is None for row in (begun, whole, failed)] == [True, True, False]
    assert [row.edits_logits for row in (begun, whole, failed)] == [True] * 3
    with pytest.raises(NonFiniteLogits) as caught:
        sample(random_logits(2, WIDE), [begun, failed])
    assert caught.value.rows == (1,)


# The state of a row


def arrays(wish: SamplingParameters, **options: Sequence[int]) -> dict[int, float] | None:
    counts = sampler(wish, **options).counts
    if counts is None:
        return None
    ids, values = counts.arrays()
    assert (ids.dtype, values.dtype, len(ids)) == (np.int64, np.float32, len(values))
    return dict(zip(ids.tolist(), values.tolist(), strict=True))


def test_only_a_repetition_penalty_counts_the_prompt_and_only_penalties_count() -> None:
    options: dict[str, Sequence[int]] = {"prompt": [3, 1, 3], "chosen": [9, 1, 9]}
    assert arrays(SamplingParameters(), **options) is None
    for wish in (SamplingParameters(presence_penalty=0.5), SamplingParameters(frequency_penalty=-0.5)):
        assert arrays(wish, **options) == {9: 2.0, 1: 1.0}
        assert arrays(wish, prompt=[3]) == {}
    for penalty in (1.5, 0.5):
        wish = SamplingParameters(repetition_penalty=penalty)
        assert arrays(wish, **options) == {3: 0.0, 1: 1.0, 9: 2.0}
        assert arrays(wish, prompt=[3]) == {3: 0.0}
    rng = np.random.default_rng(0)
    prompt, chosen = rng.integers(0, 60, 20).tolist(), rng.integers(0, VOCAB, 300).tolist()
    expected = {token_id: float(chosen.count(token_id)) for token_id in [*prompt, *chosen]}
    assert arrays(SamplingParameters(repetition_penalty=1.5), prompt=prompt, chosen=chosen) == expected


def test_a_row_says_whether_it_edits_logits() -> None:
    for wish in (SamplingParameters(temperature=0.5, top_k=3, top_p=0.5, min_p=0.1, seed=1), GREEDY):
        assert not sampler(wish).edits_logits
    for fields in (
        {"presence_penalty": 0.1},
        {"frequency_penalty": 0.1},
        {"repetition_penalty": 1.1},
        {"logit_bias": {0: 1.0}},
        {"min_tokens": 1},
    ):
        assert sampler(SamplingParameters(**fields)).edits_logits
    row = sampler(SamplingParameters(min_tokens=2), chosen=[5])
    assert row.edits_logits
    row.observe(5)
    assert not row.edits_logits


def test_the_tokens_that_may_not_end_the_text_yet() -> None:
    def forbidden(eos: Sequence[int], stop_ids: Sequence[int] | None = None, **fields: Any) -> list[int] | None:
        wish = SamplingParameters(**fields)
        row = RequestSampler(wish, vocab_size=VOCAB, eos_ids=frozenset(eos), prompt_ids=[1], stop_ids=stop_ids)
        if row.forbidden is None:
            return None
        assert row.forbidden.dtype == np.int64
        return list(row.forbidden)

    assert forbidden([0, 7], stop_token_ids=(3,)) is None
    assert forbidden([7, 0], stop_token_ids=(3, 0), min_tokens=1) == [0, 3, 7]
    assert forbidden([7, 0], stop_token_ids=(3,), min_tokens=1, ignore_eos=True) == [3]
    assert forbidden([7], [9, 2], stop_token_ids=(3,), min_tokens=1) == [2, 7, 9]
    assert forbidden([7], [], stop_token_ids=(3,), min_tokens=1) == [7]
    assert forbidden([VOCAB - 1, VOCAB, VOCAB + 1], min_tokens=1) == [VOCAB - 1]
    assert forbidden([], min_tokens=1) == []


def test_numbers_that_are_taken_back_come_again_before_the_stream_goes_on() -> None:
    row, twin = (sampler(SamplingParameters(seed=4)) for _ in range(2))
    first, second = row.uniform(), row.uniform()
    assert [twin.uniform(), twin.uniform()] == [first, second]
    row.take_back(first)
    assert [row.uniform(), row.uniform()] == [first, twin.uniform()]


def test_a_row_is_greedy_at_temperature_0_alone() -> None:
    assert [sampler(SamplingParameters(temperature=value)).greedy for value in (0, 1e-9, 1.0)] == [True, False, False]


@pytest.mark.parametrize("allow_sync", [True, False])
@pytest.mark.parametrize("edit", [{}, {"min_tokens": 1}], ids=["as_given", "edited"])
def test_a_failed_step_takes_no_number(edit: dict[str, int], allow_sync: bool) -> None:
    rows, twins = ([sampler(SamplingParameters(seed=2, **edit), choice=choice) for choice in (0, 1)] for _ in range(2))
    logits = random_logits(2)
    logits[1, 0] = math.nan  # which min_tokens would hide
    with pytest.raises(NonFiniteLogits, match=r"^no token can be chosen from the logits of rows 1$") as caught:
        sample(logits, rows, allow_sync=allow_sync)
    assert caught.value.rows == (1,)
    assert [row.uniform() for row in rows] == [twin.uniform() for twin in twins]


# Errors


def test_rows_without_a_choice_are_named() -> None:
    logits = random_logits(6)
    logits[1, 5], logits[2, :], logits[4, 9], logits[5, 3] = math.nan, -math.inf, math.inf, -math.inf
    for wish in (GREEDY, SamplingParameters()):
        with pytest.raises(NonFiniteLogits, match="rows 1, 2, 4") as caught:
            sample(logits, [sampler(wish) for _ in range(6)])
        assert caught.value.rows == (1, 2, 4)


def test_a_row_whose_edits_leave_no_token_is_named_by_its_place_in_the_batch() -> None:
    logits = torch.full((3, VOCAB), -math.inf)
    logits[:, 0] = 1.0
    rows = [sampler(GREEDY), sampler(SamplingParameters()), sampler(SamplingParameters(min_tokens=1))]
    with pytest.raises(NonFiniteLogits) as caught:
        sample(logits, rows)
    assert caught.value.rows == (2,)


@pytest.mark.parametrize(
    ("wish", "param"),
    [
        (SamplingParameters(logit_bias={VOCAB: 1.0}), "logit_bias"),
        (SamplingParameters(logit_bias={-1: 1.0}), "logit_bias"),
        (SamplingParameters(stop_token_ids=(3, VOCAB)), "stop_token_ids"),
    ],
)
def test_ids_beyond_the_vocabulary_are_refused(wish: SamplingParameters, param: str) -> None:
    token_id = -1 if -1 in wish.logit_bias else VOCAB
    with pytest.raises(RequestError) as caught:
        check_vocabulary(wish, VOCAB)
    assert str(caught.value) == f"{param} names token {token_id}, but this model's token ids go from 0 to {VOCAB - 1}"
    assert caught.value.param == param


def test_the_first_and_the_last_id_of_the_vocabulary_are_accepted() -> None:
    check_vocabulary(SamplingParameters(logit_bias={0: 1.0, VOCAB - 1: 1.0}, stop_token_ids=(0, VOCAB - 1)), VOCAB)


@pytest.mark.parametrize("wish", SHAPES, ids=label)
@pytest.mark.parametrize("spread", [0.0, 0.01, 2.0, 30.0])
def test_without_looking_at_values_the_mass_is_bitwise_the_same(wish: SamplingParameters, spread: float) -> None:
    """What is done on a GPU: equal logits, few values many times, narrow and wide distributions."""
    logits = spread * torch.randn(6, 700, generator=torch.Generator().manual_seed(5))
    logits[1] = logits[1].round()
    logits[2, 100:] = -math.inf
    logits[3, ::3] = logits[3, 0]
    parameters = [wish] * 6
    unseen = probability_mass(logits.clone(), parameters, allow_sync=False)
    assert torch.equal(unseen, probability_mass(logits.clone(), parameters))


def test_without_looking_at_values_the_tokens_are_the_same() -> None:
    """Rows of all kinds in one batch; and where one is not sound, the others' next draw is the one they would have."""
    wishes = [*SHAPES, SamplingParameters(temperature=0.0), SamplingParameters(presence_penalty=1.0, min_tokens=2)]
    logits = 2 * torch.randn(len(wishes), 300, generator=torch.Generator().manual_seed(6))

    def sides() -> list[list[RequestSampler]]:
        return [[sampler(replace(wish, seed=7), vocab=300) for wish in wishes] for _ in range(2)]

    seen, unseen = sides()
    broken = logits.clone()
    broken[0, 5], broken[3] = math.nan, -math.inf
    for rows, waits in ((seen, True), (unseen, False)):
        with pytest.raises(NonFiniteLogits) as failure:
            sample(broken, rows, allow_sync=waits)
        assert failure.value.rows == (0, 3)
    for _ in range(20):
        tokens = [sample(logits, rows, allow_sync=waits) for rows, waits in ((seen, True), (unseen, False))]
        assert tokens[0] == tokens[1]
        for rows in (seen, unseen):
            for row, token in zip(rows, tokens[0], strict=True):
                row.observe(token)
