"""The blocks of a profile: how `--layers` is read, and the automatic choice against a computation by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from steering_vectors.data.batches import Encoded
from steering_vectors.data.corpus import Sides
from steering_vectors.errors import FitError
from steering_vectors.fitting import layers as layer_choice
from steering_vectors.fitting.layers import (
    Estimate,
    Evidence,
    LayerChoice,
    WindowSearch,
    candidate_layers,
    choose_layers,
    margin_gradients,
    parse_layers,
)
from steering_vectors.measures.gradients import likelihood_gradients
from steering_vectors.measures.steered_model import SteeredModel, steerable
from steering_vectors.models.loading import LanguageModel, wrap_model
from steering_vectors.profiles.profile import Profile
from tests.support.by_hand import shifted
from tests.support.planted import BAD as BAD_LETTER
from tests.support.planted import GOOD as GOOD_LETTER
from tests.support.planted import planted_model, planted_task
from tests.support.tiny import tiny_model
from tests.support.tiny_tokenizers import tiny_tokenizer

pytestmark = pytest.mark.slow

Window = tuple[int, ...]


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return wrap_model(tiny_model("llama"), tiny_tokenizer())


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("auto", None),
        ("3", (3,)),
        ("3-3", (3,)),
        ("1-3", (1, 2, 3)),
        ("5,3, 3", (3, 5)),
        ("0-1,4", (0, 1, 4)),
        ([2, 0], (0, 2)),
    ],
)
def test_layers_are_read(text: str | list[int], layers: tuple[int, ...] | None) -> None:
    assert parse_layers(text, 8) == layers


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("8", "layer 8 is out of range: this model has blocks 0 to 7"),
        ("5-12", "layer 8 is out of range: this model has blocks 0 to 7"),
        ("3-1", "layers '3-1': 3-1 runs downwards; write 1-3"),
        ("", "layers '' cannot be read; write auto, 12, 10-20 (both ends included) or 3,5,7"),
        ("-1", "layers '-1' cannot be read; write auto, 12, 10-20 (both ends included) or 3,5,7"),
        ("middle", "layers 'middle' cannot be read; write auto, 12, 10-20 (both ends included) or 3,5,7"),
        ([], "the list of layers is empty; write auto, 12, 10-20 or 3,5,7"),
    ],
)
def test_layers_that_cannot_be_read(text: str | list[int], message: str) -> None:
    with pytest.raises(FitError) as refusal:
        parse_layers(text, 8)
    assert refusal.value.message == message


@pytest.mark.parametrize(
    ("blocks", "last"), [(1, 0), (2, 0), (3, 1), (7, 4), (8, 5), (10, 7), (20, 16), (32, 26), (80, 67)]
)
def test_the_last_blocks_are_no_candidates(blocks: int, last: int) -> None:
    assert candidate_layers(blocks) == tuple(range(last + 1))


def planted_choice(monkeypatch: pytest.MonkeyPatch, sign: int) -> LayerChoice:
    """Of eight blocks six are candidates; block 3 has the planted direction, the others have random ones."""
    monkeypatch.setattr(layer_choice, "READ_TEXTS", 16)
    monkeypatch.setattr(layer_choice, "READ_TOKENS", 12)
    lm, axis = planted_model(num_hidden_layers=8)
    task = planted_task(lm, "mean-diff", candidate_layers(lm.num_layers))
    draw = torch.Generator().manual_seed(7)
    directions = {layer: torch.randn(lm.hidden_size, generator=draw) for layer in task.layers}
    directions = {layer: direction / direction.norm() for layer, direction in directions.items()} | {3: sign * axis}
    norms = {layer: one.residual_norm for layer, one in task.statistics.items()}
    profile = Profile("planted", lm.identity, directions, "made", residual_norms=norms)
    odds = torch.zeros(lm.vocab_size)
    for letter, value in ((GOOD_LETTER, 2.0), (BAD_LETTER, -2.0)):
        odds[lm.tokenizer.encode(letter, add_special_tokens=False)] = value
    prompts = [lm.tokenizer(f"Ask {row} again, ")["input_ids"] for row in range(12)]
    sides = Sides(tuple(task.positive_ids), tuple(task.negative_ids), task.paired)
    evidence = Evidence(prompts, margin_gradients(lm, sides, profile.layers), odds)
    with steerable(lm) as steered:
        return choose_layers(steered, profile, evidence, kl_budget=0.1, seed=0)


def test_the_block_that_has_the_planted_direction_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A score of 1 means that it is the best block by both effects, and that both are positive."""
    choice = planted_choice(monkeypatch, 1)
    assert choice.layers == (3,)
    assert choice.scores[3,] == choice.sampled[3,] == 1
    assert {window for window in choice.scores if len(window) == 1} == {(layer,) for layer in range(6)}
    assert max(score for window, score in choice.scores.items() if 3 not in window) < 0.8


def test_a_block_that_has_the_opposite_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = planted_choice(monkeypatch, -1)
    assert 3 not in choice.layers
    assert choice.scores[3,] == min(score for window, score in choice.scores.items() if len(window) == 1) < 0


def log_probs(
    lm: LanguageModel, text: Encoded, shifts: Mapping[int, torch.Tensor]
) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """Log-probabilities of a response's tokens, and each block's mean output over them, with the shifts added."""
    ids, start = text
    means: dict[int, torch.Tensor] = {}

    def keep(layer: int) -> Any:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            means[layer] = (output if isinstance(output, torch.Tensor) else output[0])[0, start:].mean(0)

        return hook

    with torch.no_grad(), shifted(lm, shifts, start - 1):
        handles = [block.register_forward_hook(keep(layer)) for layer, block in enumerate(lm.blocks)]
        logits = lm.model(input_ids=torch.tensor([list(ids)])).logits
        for handle in handles:
            handle.remove()
    return logits[0, start - 1 : -1].log_softmax(-1), means


class ByHand:
    """The effects of a window, one text at a time, with plain hooks. Only the samples come from the steered model."""

    def __init__(self, steered: SteeredModel, profile: Profile, evidence: Evidence, budget: float, seed: int) -> None:
        self.steered, self.profile, self.evidence = steered, profile, evidence
        self.budget, self.seed, self.ratio = budget, seed, 0.15
        self.texts = self.sampled(profile, 0.0, layer_choice.TEXTS, layer_choice.TEXT_TOKENS)

    def sampled(self, profile: Profile, strength: float, count: int, tokens: int) -> list[Encoded]:
        self.steered.write(profile, strength)
        prompts = (list(self.evidence.prompts) * count)[:count]
        return self.steered.continuations(prompts, tokens=tokens, seed=self.seed)

    def cost(self, window: Window, unit: float) -> tuple[float, float]:
        divergence = change = count = 0.0
        for text in self.texts:
            base, _ = log_probs(self.steered.lm, text, {})
            logs, _ = log_probs(self.steered.lm, text, {one: unit * self.profile.directions[one] for one in window})
            divergence += float((logs.exp() * (logs - base)).sum())
            change += float(((logs.exp() - base.exp()) @ self.evidence.log_odds).sum())
            count += len(base)
        return divergence / count, change / count

    def estimate(self, window: Window) -> Estimate:
        directions, norms = self.profile.directions, self.profile.residual_norms
        largest = min(norms[one] / float(directions[one].norm()) for one in window)
        first = self.ratio * largest
        if not 0.5 <= self.cost(window, first)[0] / self.budget <= 2.0:
            first = min(first * math.sqrt(self.budget / self.cost(window, first)[0]), largest)
        divergence, lexical = self.cost(window, first)
        unit = min(first * math.sqrt(self.budget / divergence), largest)
        self.ratio = unit / largest
        pull = sum(float(self.evidence.gradients[one] @ directions[one]) for one in window)
        return Estimate(unit, lexical * unit / first, unit * pull)

    def reading(self, window: Window, unit: float) -> float:
        directions = self.profile.directions
        part = replace(self.profile, unit=unit, directions={one: directions[one] for one in window})
        sides = []
        for strength in (1.0, -1.0):
            texts = self.sampled(part, strength, layer_choice.READ_TEXTS, layer_choice.READ_TOKENS)
            total, count = dict.fromkeys(directions, torch.zeros(())), 0
            for ids, start in texts:
                tokens = len(ids) - start - 1  # the last one is not read
                if tokens:
                    means = log_probs(self.steered.lm, (ids[:-1], start), {})[1]
                    total = {one: total[one] + tokens * means[one] for one in directions}
                count += tokens
            sides.append({one: total[one] / count for one in directions})
        gains = [
            float((sides[0][one] - sides[1][one]) @ directions[one] / directions[one].square().sum())
            for one in directions
        ]
        return sum(gains) / len(gains)


def shares(effects: Mapping[Window, tuple[float, float]], best: tuple[float, float]) -> dict[Window, float]:
    """The mean of both effects relative to the best, of those that are positive; the second effect if none is."""
    found = {}
    for window, effect in effects.items():
        parts = [mine / most for mine, most in zip(effect, best, strict=True) if most > 0]
        found[window] = sum(parts) / len(parts) if parts else effect[1]
    return found


@pytest.mark.parametrize(
    ("norms", "budget", "reached"),
    [((50.0, 50.0), 0.1, True), ((0.5, 0.5), 0.1, False), ((50.0, 50.0), 0.9, True), ((50.0, 0.5), 0.1, True)],
)
def test_the_scores_are_those_of_a_computation_by_hand(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch, norms: tuple[float, float], budget: float, reached: bool
) -> None:
    """A block of small norm does not reach a large budget; the coefficient is then the largest one."""
    for name, value in {"TEXTS": 5, "TEXT_TOKENS": 4, "READ_TEXTS": 7, "READ_TOKENS": 5}.items():
        monkeypatch.setattr(layer_choice, name, value)
    draw = torch.Generator().manual_seed(1)
    directions = {layer: torch.randn(lm.hidden_size, generator=draw) for layer in (0, 1)}
    gradients = {layer: torch.randn(lm.hidden_size, generator=draw) for layer in (0, 1)}
    profile = Profile("made", lm.identity, directions, "made", residual_norms=dict(enumerate(norms)))
    evidence = Evidence([[0, 9, 8], [0, 20, 21, 22], [0, 30]], gradients, torch.randn(lm.vocab_size, generator=draw))
    calls: list[tuple[str, int, int]] = []
    with steerable(lm) as steered:
        steered.batch_tokens = 16  # several batches
        choice = choose_layers(
            steered, profile, evidence, kl_budget=budget, seed=3, progress=lambda *call: calls.append(call[:3])
        )
        hand = ByHand(steered, profile, evidence, budget, 3)
        estimates = {window: hand.estimate(window) for window in choice.scores}
        readings = {window: hand.reading(window, estimates[window].coefficient) for window in choice.sampled}
        assert (hand.cost((0,), norms[0] / float(directions[0].norm()))[0] > budget) == reached
    assert choice.coefficient == pytest.approx(estimates[choice.layers].coefficient, rel=1e-4)
    effects = {window: (one.lexical, one.pull) for window, one in estimates.items()}
    best = (max(effects[0,][0], effects[1,][0]), max(effects[0,][1], effects[1,][1]))
    assert choice.scores == pytest.approx(shares(effects, best), rel=1e-3, abs=1e-4)
    assert set(choice.sampled) == set(sorted(choice.scores, key=lambda window: -choice.scores[window])[:3])
    written = {window: (estimates[window].lexical, readings[window]) for window in choice.sampled}
    most = (max(one[0] for one in written.values()), max(one[1] for one in written.values()))
    assert choice.sampled == pytest.approx(shares(written, most), rel=1e-3, abs=1e-4)
    count = len(choice.scores) + len(choice.sampled)
    assert calls == [*(("layers", done, 9) for done in range(1, count + 1)), ("layers", count, count)]


class MadeEffects(WindowSearch):
    """The search over windows whose effects are given. The reading is the pull unless it is given too."""

    def __init__(
        self,
        lm: LanguageModel,
        blocks: int,
        effects: Mapping[Window, tuple[float, float]],
        readings: Mapping[Window, float] | None = None,
    ) -> None:
        self.given, self.read, self.calls = effects, readings or {}, list[tuple[str, int, int]]()
        profile = Profile(
            "made",
            replace(lm.identity, num_layers=blocks),
            dict.fromkeys(range(blocks), torch.ones(lm.hidden_size)),
            "made",
        )
        evidence = Evidence([], {}, torch.zeros(lm.vocab_size))
        with steerable(lm) as steered:
            super().__init__(steered, profile, evidence, [], 0.1, 0, lambda *call: self.calls.append(call[:3]))

    def _estimate(self, profile: Profile) -> Estimate:
        return Estimate(float(profile.layers[0]), *self.given.get(profile.layers, (0.1, 0.1)))

    def _reading(self, window: Window) -> float:
        return self.read.get(window, self.given.get(window, (0.1, 0.1))[1])


def test_single_blocks_are_tried_over_the_model_and_then_around_the_best(lm: LanguageModel) -> None:
    search = MadeEffects(lm, 40, {(22,): (1.0, 2.0), (23,): (1.3, 2.4), (24,): (1.2, 2.5)})
    choice = search.choose()
    assert (choice.layers, choice.coefficient) == ((23,), 23.0)
    first = [(layer,) for layer in range(1, 40, 3)]
    assert list(choice.scores) == [*first, (20,), (21,), (23,), (24,), (22, 23), (23, 24)]
    assert choice.scores[22,] == 1.0
    assert choice.scores[23,] == (1.3 / 1.0 + 2.4 / 2.0) / 2
    assert choice.scores[1,] == (0.1 / 1.0 + 0.1 / 2.0) / 2
    assert choice.sampled == {(23,): (1 + 2.4 / 2.5) / 2, (24,): (1.2 / 1.3 + 1) / 2, (22,): (1 / 1.3 + 2 / 2.5) / 2}
    assert search.calls == [*(("layers", done, 23) for done in range(1, 23)), ("layers", 22, 22)]


def test_progress_ends_only_when_the_choice_does(lm: LanguageModel) -> None:
    wider = {(22,): 2.0, (22, 23): 3.0, (22, 23, 24): 4.0, (22, 23, 24, 25): 5.0}
    search = MadeEffects(lm, 40, {window: (value, value) for window, value in wider.items()})
    assert search.choose().layers == (22, 23, 24, 25)
    assert search.calls == [*(("layers", done, max(23, done + 1)) for done in range(1, 27)), ("layers", 26, 26)]


@pytest.mark.parametrize(
    ("blocks", "tried"),
    [
        (1, [0]),
        (16, [*range(16)]),
        (17, [1, 3, 5, 7, 9, 11, 13, 15, 0, 2]),
        (33, [*range(1, 33, 3), 0, 2, 3]),
    ],
)
def test_at_most_16_single_blocks_are_tried_first(lm: LanguageModel, blocks: int, tried: list[int]) -> None:
    """All are equally good, so the first is taken as the best."""
    choice = MadeEffects(lm, blocks, {}).choose()
    assert [window[0] for window in choice.scores if len(window) == 1] == tried


def test_a_window_grows_by_its_better_neighbour_up_to_four_blocks(lm: LanguageModel) -> None:
    wider = {(3,): 1.0, (2, 3): 1.2, (3, 4): 1.1, (2, 3, 4): 1.3, (2, 3, 4, 5): 1.4, (1, 2, 3, 4): 1.38}
    choice = MadeEffects(lm, 8, {window: (value, value) for window, value in wider.items()}).choose()
    assert choice.layers == (2, 3, 4, 5)
    assert {window for window in choice.scores if len(window) > 1} == {*wider, (1, 2, 3)} - {(3,)}
    assert set(choice.sampled) == {(2, 3, 4, 5), (1, 2, 3, 4), (2, 3, 4)}


@pytest.mark.parametrize(("wider", "layers"), [(1.0499, (0,)), (1.05, (0,)), (1.0501, (0, 1))])
def test_a_wider_window_must_be_better_by_5_percent(lm: LanguageModel, wider: float, layers: Window) -> None:
    assert MadeEffects(lm, 2, {(0,): (1.0, 1.0), (0, 1): (wider, wider)}).choose().layers == layers


def test_a_window_of_blocks_with_one_effect_each_is_compared_with_its_own_best_block(lm: LanguageModel) -> None:
    """Here no single block has a score of 1."""
    choice = MadeEffects(lm, 2, {(0,): (1.0, 0.5), (1,): (0.5, 1.0), (0, 1): (0.9, 0.9)}).choose()
    assert choice.scores == {(0,): 0.75, (1,): 0.75, (0, 1): 0.9}
    assert choice.layers == (0, 1)


def test_the_margin_s_gradient_is_that_of_preferred_less_rejected_examples(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of as many examples as are read, in the order of the layers."""
    monkeypatch.setattr(layer_choice, "PULL_ROWS", 3)
    sides = Sides(
        tuple(([0, 9, n, n + 1], 2) for n in range(20, 29)), tuple(([0, 9, n], 2) for n in range(40, 49)), paired=True
    )
    found = margin_gradients(lm, sides, [2, 0])
    few = sides.thinned(3)
    preferred, rejected = (likelihood_gradients(lm, side, [2, 0]) for side in (few.positives, few.negatives))
    assert list(found) == [2, 0]
    for place, layer in enumerate(found):
        torch.testing.assert_close(found[layer], preferred[place] - rejected[place])


def test_what_the_best_few_write_decides_between_them(lm: LanguageModel) -> None:
    estimates = {(0,): (1.0, 1.0), (1,): (0.9, 0.9), (2,): (0.8, 0.8), (3,): (0.7, 0.7)}
    readings = {(0,): 0.2, (1,): 1.0, (2,): 0.9, (3,): 9.0}
    choice = MadeEffects(lm, 4, estimates, readings).choose()
    assert choice.layers == (1,)
    assert choice.sampled == {
        (0,): pytest.approx(0.6), (1,): pytest.approx(0.95), (2,): pytest.approx((0.8 + 0.9) / 2),
    }  # fmt: skip


def test_an_effect_that_no_block_has_is_left_out(lm: LanguageModel) -> None:
    choice = MadeEffects(lm, 2, {(0,): (-1.0, 0.5), (1,): (0.0, 0.25), (0, 1): (-9.0, 0.5)}).choose()
    assert choice.scores == {(0,): 1.0, (1,): 0.5, (0, 1): 1.0}
    assert choice.sampled == choice.scores
    assert choice.layers == (0,)


def test_with_no_effect_at_all_the_second_one_counts(lm: LanguageModel) -> None:
    choice = MadeEffects(lm, 2, {(0,): (-1.0, -0.5), (1,): (-0.5, -0.75), (0, 1): (-9.0, -0.1)}).choose()
    assert choice.scores == choice.sampled == {(0,): -0.5, (1,): -0.75, (0, 1): -0.1}
    assert choice.layers == (0,)  # a wider window must have a positive score


def test_the_last_search_compares_widths_from_narrow_to_wide(lm: LanguageModel) -> None:
    """Each wider window is compared with the best narrower one so far."""
    effects = {(1,): 1.0, (0, 1): 1.06, (0, 1, 2): 1.12}
    assert MadeEffects(lm, 3, {window: (value, value) for window, value in effects.items()}).choose().layers == (
        0, 1, 2,
    )  # fmt: skip
