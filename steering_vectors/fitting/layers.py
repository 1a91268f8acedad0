"""The blocks that a profile steers: the reading of `--layers`, and the automatic choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from steering_vectors.data.batches import Encoded
from steering_vectors.data.corpus import Sides
from steering_vectors.errors import FitError
from steering_vectors.fitting.calibration import MIN_KL, finite, largest_coefficient
from steering_vectors.measures.divergence import kl_divergence
from steering_vectors.measures.gradients import likelihood_gradients
from steering_vectors.measures.steered_model import SteeredModel
from steering_vectors.models.loading import LanguageModel
from steering_vectors.profiles.profile import Profile
from steering_vectors.progress import Progress

AUTO = "auto"
CANDIDATE_SHARE = 0.85  # of the blocks; after the last ones the shift has little room to act
FIRST_BLOCKS = 16  # single blocks estimated before those around the best
MAX_WINDOW = 4  # blocks
MIN_GAIN = 1.05  # factor by which a wider window must be better
TEXTS = 24
TEXT_TOKENS = 24
PULL_ROWS = 48  # examples per side
SAMPLED_WINDOWS = 3  # the best by estimate
READ_TEXTS = 32
READ_TOKENS = 32
FIRST_RATIO = 0.15  # norm ratio at which a cost is first measured
NEAR = 2.0  # a cost is measured again if it was a larger factor off the budget

Window = tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Evidence:
    """What windows are scored on: held-out prompts, the gradients of the margin of held-out examples by layer (see
    `margin_gradients`), and the log-odds of tokens in the training data."""

    prompts: Sequence[Sequence[int]]
    gradients: Mapping[int, torch.Tensor]  # [hidden] float32
    log_odds: torch.Tensor  # [vocabulary] float32


@dataclass(frozen=True, slots=True)
class Estimate:
    """The coefficient at which a window costs about the budget, and its effects there to first order: the change of a
    token's expected log-odds, and of the margin of held-out examples in nats per token."""

    coefficient: float
    lexical: float
    pull: float


@dataclass(frozen=True, slots=True)
class LayerChoice:
    """The chosen blocks, the coefficient at which they cost about the budget, and the score of each window: by
    estimate, and of the best few by the texts that they write."""

    layers: Window
    coefficient: float
    scores: dict[Window, float]
    sampled: dict[Window, float]


def parse_layers(layers: str | Sequence[int], num_layers: int) -> Window | None:
    """Read `auto` (None), `12`, `10-20` (both ends included), `3,5,7` or a list, as an ascending tuple.

    Raises FitError for anything else, and for blocks that the model does not have.
    """
    if layers == AUTO:
        return None
    parts = layers.split(",") if isinstance(layers, str) else [str(layer) for layer in layers]
    chosen = sorted({layer for part in parts for layer in _range(part, str(layers))})
    if not chosen:
        raise FitError("the list of layers is empty; write auto, 12, 10-20 or 3,5,7")
    for layer in chosen:
        if not 0 <= layer < num_layers:
            raise FitError(f"layer {layer} is out of range: this model has blocks 0 to {num_layers - 1}")
    return tuple(chosen)


def candidate_layers(num_layers: int) -> Window:
    """The candidates of the automatic choice: all blocks but the last 15 %."""
    return tuple(range(max(1, int(CANDIDATE_SHARE * num_layers))))


def margin_gradients(lm: LanguageModel, sides: Sides, layers: Sequence[int]) -> dict[int, torch.Tensor]:
    """By layer, the gradient `[hidden]` of the margin log P(preferred) − log P(rejected) in nats per token, over at
    most 48 examples of each side, with respect to a shift there.

    The weights must not be packed, as products of packed weights have no gradients.
    """
    few = sides.thinned(PULL_ROWS)
    found = [likelihood_gradients(lm, side, layers) for side in (few.positives, few.negatives)]
    return dict(zip(layers, found[0] - found[1], strict=True))


def choose_layers(
    steered: SteeredModel,
    profile: Profile,
    evidence: Evidence,
    *,
    kl_budget: float,
    seed: int,
    progress: Progress | None = None,
) -> LayerChoice:
    """Choose the contiguous window of blocks with the largest effect towards the preferred side at equal cost.

    Every window is estimated first. The unsteered model continues the prompts (24 texts of 24 tokens), and c is the
    coefficient at which the mean KL(steered‖base) over these texts is about the budget, as KL grows as c². Two effects
    are taken to first order in c, both relative to the best single block:

    - lexical: the change of the next token's expected log-odds E_{v~p}[log P(v|preferred)/P(v|rejected)] in these
      texts.
    - pull: the change of the held-out margin, from its gradients.

    Single blocks come first: at most 16 over the model, then those around the best. The best one grows by its lower or
    upper neighbour while that raises the estimate, the mean of both effects, by 5 %, up to four blocks.

    Then the best three windows write texts at c and at −c (32 each, 32 tokens, the same random numbers). Their reading
    is the difference of the unsteered model's mean activations over them, projected on the directions; 1 is the
    distance between the data's preferred and rejected responses. The window with the largest mean of lexical effect and
    reading, each relative to the best, is chosen; a wider one must be better by 5 %.
    """
    steered.write(profile, 0.0)
    prompts = [evidence.prompts[i % len(evidence.prompts)] for i in range(TEXTS)]
    examples = steered.continuations(prompts, tokens=TEXT_TOKENS, seed=seed)
    return WindowSearch(steered, profile, evidence, examples, kl_budget, seed, progress).choose()


class WindowSearch:
    """Estimates each window once, under equal conditions, and chooses among the best by what they write."""

    _best: tuple[float, float]  # the larger of both effects, lexical and pull, over the first single blocks

    def __init__(
        self,
        steered: SteeredModel,
        profile: Profile,
        evidence: Evidence,
        texts: Sequence[Encoded],
        kl_budget: float,
        seed: int,
        progress: Progress | None,
    ) -> None:
        self._steered, self._profile, self._evidence = steered, profile, evidence
        self._budget, self._seed, self._progress = kl_budget, seed, progress
        self._log_odds = evidence.log_odds.to(steered.lm.device)
        self._texts = steered.kept(texts, profile.layers)
        self._ratio = FIRST_RATIO
        self._estimates: dict[Window, Estimate] = {}
        self._readings: dict[Window, float] = {}

    def choose(self) -> LayerChoice:
        layers = self._profile.layers
        stride = -(-len(layers) // FIRST_BLOCKS)
        places = range(stride // 2, len(layers), stride)
        self._set_reference([(layers[place],) for place in places])
        best = max(places, key=lambda place: self._score((layers[place],)))
        around = layers[max(0, best - stride + 1) : best + stride]
        self._grow(max(((layer,) for layer in around), key=self._score))
        sampled = self._sampled_scores()
        window = _widest_worth_it(sampled)
        self._report(done=True)
        scores = {tried: self._score(tried) for tried in self._estimates}
        return LayerChoice(window, self._estimates[window].coefficient, scores, sampled)

    def _set_reference(self, windows: Sequence[Window]) -> None:
        found = [self._measure(window) for window in windows]
        self._best = max(one.lexical for one in found), max(one.pull for one in found)

    def _grow(self, window: Window) -> None:
        while len(window) < MAX_WINDOW:
            neighbours = [layer for layer in (window[0] - 1, window[-1] + 1) if layer in self._profile.layers]
            wider = max((tuple(sorted((*window, one))) for one in neighbours), key=self._score, default=window)
            if self._score(wider) <= max(0.0, MIN_GAIN * self._score(window)):
                return
            window = wider

    def _score(self, window: Window) -> float:
        """Mean of both effects relative to the best single blocks. An effect that no block has is left out."""
        found, (lexical, pull) = self._measure(window), self._best
        return _mean_share([(found.lexical, lexical), (found.pull, pull)], found.pull)

    def _measure(self, window: Window) -> Estimate:
        if window not in self._estimates:
            self._estimates[window] = self._estimate(self._part(window))
            self._report()
        return self._estimates[window]

    def _sampled_scores(self) -> dict[Window, float]:
        """The scores of the windows with the best estimates, from the texts that they write."""
        best = sorted(self._estimates, key=self._score, reverse=True)[:SAMPLED_WINDOWS]
        for window in best:
            self._readings[window] = self._reading(window)
            self._report()
        lexical = max(self._estimates[window].lexical for window in best)
        reading = max(self._readings.values())
        return {
            window: _mean_share(
                [(self._estimates[window].lexical, lexical), (self._readings[window], reading)], self._readings[window]
            )
            for window in best
        }

    def _part(self, window: Window) -> Profile:
        return replace(self._profile, directions={layer: self._profile.directions[layer] for layer in window})

    def _estimate(self, profile: Profile) -> Estimate:
        """The first cost is taken at the norm ratio that the window before had at the budget."""
        largest = largest_coefficient(profile)
        first = self._ratio * largest
        kl, lexical = self._cost(replace(profile, unit=first))
        if not 1 / NEAR <= kl / self._budget <= NEAR:
            first = min(first * (self._budget / max(kl, MIN_KL)) ** 0.5, largest)
            kl, lexical = self._cost(replace(profile, unit=first))
        coefficient = min(first * (self._budget / max(kl, MIN_KL)) ** 0.5, largest)
        self._ratio = coefficient / largest
        slopes = [self._evidence.gradients[layer] @ shift for layer, shift in profile.injected().items()]
        return Estimate(coefficient, lexical * coefficient / first, coefficient * float(sum(slopes)))

    def _cost(self, profile: Profile) -> tuple[float, float]:
        """(mean KL, mean change of the expected log-odds) per token of the unsteered model's texts at strength 1."""

        def compare(steered: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
            return torch.stack([kl_divergence(steered, base), (steered.exp() - base.exp()) @ self._log_odds], dim=1)

        self._steered.write(profile, 1.0)
        values = [values.double().cpu() for _, values in self._texts.compared(profile.layers[0], compare)]
        divergence, expected = torch.cat(values).mean(0).tolist()
        return finite(divergence), expected

    def _reading(self, window: Window) -> float:
        """The distance along the directions between texts sampled at strengths +1 and −1, mean over candidate blocks.

        1 is the distance between the data's preferred and rejected responses.
        """
        profile = replace(self._part(window), unit=self._estimates[window].coefficient)
        rows = [self._evidence.prompts[i % len(self._evidence.prompts)] for i in range(READ_TEXTS)]
        high, low = self._steered.sample_and_compare(
            profile, [1.0, -1.0], rows, tokens=READ_TOKENS, seed=self._seed, read=self._profile.layers
        )
        assert high.activations is not None
        assert low.activations is not None
        directions = torch.stack([self._profile.directions[layer] for layer in self._profile.layers])
        gains = ((high.activations - low.activations) * directions).sum(-1) / directions.square().sum(-1)
        return float(gains.mean())

    def _report(self, *, done: bool = False) -> None:
        if self._progress is not None:
            count = len(self._estimates) + len(self._readings)
            expected = min(len(self._profile.layers), FIRST_BLOCKS) + 4 + SAMPLED_WINDOWS
            self._progress("layers", count, count if done else max(expected, count + 1))


def _mean_share(effects: Sequence[tuple[float, float]], otherwise: float) -> float:
    """Mean of effects relative to the best; those whose best is not positive are left out."""
    shares = [effect / best for effect, best in effects if best > 0]
    return sum(shares) / len(shares) if shares else otherwise


def _widest_worth_it(scores: Mapping[Window, float]) -> Window:
    """The window with the best score, where each must beat narrower ones by MIN_GAIN."""
    chosen, *others = sorted(scores, key=lambda window: (len(window), -scores[window]))
    for window in others:
        if len(window) > len(chosen) and scores[window] > max(0.0, MIN_GAIN * scores[chosen]):
            chosen = window
    return chosen


def _range(part: str, whole: str) -> range:
    first, dash, last = part.strip().partition("-")
    if not first.isdecimal() or (dash and not last.strip().isdecimal()):
        raise FitError(f"layers {whole!r} cannot be read; write auto, 12, 10-20 (both ends included) or 3,5,7")
    if not dash:
        return range(int(first), int(first) + 1)
    if int(last) < int(first):
        raise FitError(f"layers {whole!r}: {part.strip()} runs downwards; write {last.strip()}-{first.strip()}")
    return range(int(first), int(last) + 1)
