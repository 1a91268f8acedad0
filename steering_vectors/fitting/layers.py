"""The blocks that a profile steers: the reading of `--layers`, and the automatic choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from steering_vectors.data.batches import Encoded
from steering_vectors.errors import FitError
from steering_vectors.fitting.calibration import largest_coefficient
from steering_vectors.measures.activations import pooled
from steering_vectors.measures.divergence import kl_divergence
from steering_vectors.measures.steered_model import SteeredModel
from steering_vectors.profiles.profile import Profile
from steering_vectors.progress import Progress

AUTO = "auto"
CANDIDATE_SHARE = 0.85  # of the blocks; after the last ones the shift has little room to act
FIRST_BLOCKS = 16  # single blocks tried before those around the best
MAX_WINDOW = 4  # blocks
MIN_GAIN = 1.05  # factor by which a wider window must be better
TEXTS = 24
TEXT_TOKENS = 24
READ_TEXTS = 48
READ_TOKENS = 48
FIRST_RATIO = 0.15  # norm ratio at which the cost is first measured

Window = tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Evidence:
    """What windows are scored on: held-out prompts, and the log-odds of tokens in the training data."""

    prompts: Sequence[Sequence[int]]
    log_odds: torch.Tensor  # [vocabulary] float32


@dataclass(frozen=True, slots=True)
class WindowEffect:
    """The effect of a window at the budget: log-odds per token, and the reading of the texts it writes."""

    lexical: float
    reading: float


@dataclass(frozen=True, slots=True)
class LayerChoice:
    """The chosen blocks, and the score of each window that was tried."""

    layers: Window
    scores: dict[Window, float]


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

    The unsteered model first continues the prompts (24 texts of 24 tokens). For each window, a coefficient c is found
    at which the mean KL(steered‖base) over these texts is about the budget. Two effects are measured there:

    - lexical: the change from 0 to c of the next token's expected log-odds E_{v~p}[log P(v|preferred)/P(v|rejected)]
      in these texts.
    - reading: the difference between texts sampled at c and at −c (48 each, 48 tokens, the same random numbers), as
      the unsteered model's mean activations over them, projected on the directions. 1 is the distance between the
      data's preferred and rejected responses.

    Both are divided by √(KL/budget), because an effect grows as c and KL as c². The first sees single tokens, the
    second whole texts. The score is the mean of both, each relative to the best single block. Single blocks are scored
    first: at most 16 over the model, then those around the best. The best one grows by its lower or upper neighbour
    while that raises the score by 5 %, up to four blocks.
    """
    steered.write(profile, 0.0)
    prompts = [evidence.prompts[i % len(evidence.prompts)] for i in range(TEXTS)]
    examples = steered.continuations(prompts, tokens=TEXT_TOKENS, seed=seed)
    return WindowSearch(steered, profile, evidence, examples, kl_budget, seed, progress).choose()


class WindowSearch:
    """Measures each window once, under equal conditions, and chooses the best."""

    _best: WindowEffect  # the larger of each effect over the first single blocks

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
        self._steered, self._profile, self._evidence, self._texts = steered, profile, evidence, texts
        self._budget, self._seed, self._progress = kl_budget, seed, progress
        self._log_odds = evidence.log_odds.to(steered.lm.device)
        self._base = list(steered.predictions(texts, steer=False))
        self._effects: dict[Window, WindowEffect] = {}

    def choose(self) -> LayerChoice:
        layers = self._profile.layers
        stride = -(-len(layers) // FIRST_BLOCKS)
        places = range(stride // 2, len(layers), stride)
        self._set_reference([(layers[place],) for place in places])
        best = max(places, key=lambda place: self._score((layers[place],)))
        around = layers[max(0, best - stride + 1) : best + stride]
        window = self._grow(max(((layer,) for layer in around), key=self._score))
        self._report(done=True)
        return LayerChoice(window, {tried: self._score(tried) for tried in self._effects})

    def _set_reference(self, windows: Sequence[Window]) -> None:
        effects = [self._measure(window) for window in windows]
        self._best = WindowEffect(max(one.lexical for one in effects), max(one.reading for one in effects))

    def _grow(self, window: Window) -> Window:
        while len(window) < MAX_WINDOW:
            neighbours = [layer for layer in (window[0] - 1, window[-1] + 1) if layer in self._profile.layers]
            wider = max((tuple(sorted((*window, one))) for one in neighbours), key=self._score, default=window)
            if self._score(wider) <= max(0.0, MIN_GAIN * self._score(window)):
                break
            window = wider
        return window

    def _score(self, window: Window) -> float:
        """Mean of both effects relative to the best single blocks. An effect that no block has is left out."""
        found = self._measure(window)
        pairs = ((found.lexical, self._best.lexical), (found.reading, self._best.reading))
        shares = [effect / best for effect, best in pairs if best > 0]
        return sum(shares) / len(shares) if shares else found.reading

    def _measure(self, window: Window) -> WindowEffect:
        if window not in self._effects:
            directions = {layer: self._profile.directions[layer] for layer in window}
            self._effects[window] = self._effect(replace(self._profile, directions=directions))
            self._report()
        return self._effects[window]

    def _effect(self, profile: Profile) -> WindowEffect:
        largest = largest_coefficient(profile)
        first = replace(profile, unit=FIRST_RATIO * largest)
        kl = max(self._cost(first)[0], 1e-9)
        profile = replace(profile, unit=min(first.unit * (self._budget / kl) ** 0.5, largest))
        kl, lexical = self._cost(profile)
        scale = max(1.0 if profile.unit == largest else 0.0, kl / self._budget, 1e-9) ** 0.5
        return WindowEffect(lexical / scale, self._reading(profile) / scale)

    def _cost(self, profile: Profile) -> tuple[float, float]:
        """(mean KL, mean change of the expected log-odds) per token of the unsteered model's texts at strength 1."""
        self._steered.write(profile, 1.0)
        divergence = expected = 0.0
        for steered, base in zip(self._steered.predictions(self._texts, steer=True), self._base, strict=True):
            divergence += float(kl_divergence(steered, base).double().sum())
            expected += float(((steered.exp() - base.exp()) @ self._log_odds).double().sum())
        count = sum(len(base) for base in self._base)
        return divergence / count, expected / count

    def _reading(self, profile: Profile) -> float:
        """The distance along the directions between texts sampled at strengths +1 and −1, mean over candidate blocks.

        1 is the distance between the data's preferred and rejected responses.
        """
        written = [self._read(profile, strength) for strength in (1.0, -1.0)]
        directions = torch.stack([self._profile.directions[layer] for layer in self._profile.layers])
        gains = ((written[0] - written[1]) * directions).sum(-1) / directions.square().sum(-1)
        return float(gains.mean())

    def _read(self, profile: Profile, strength: float) -> torch.Tensor:
        """Mean block outputs of the unsteered model over texts that the steered model samples, `[layers, hidden]`."""
        steered, prompts = self._steered, self._evidence.prompts
        rows = [prompts[i % len(prompts)] for i in range(READ_TEXTS)]
        steered.write(profile, strength)
        examples = steered.continuations(rows, tokens=READ_TOKENS, seed=self._seed)
        batches = pooled(steered.lm, examples, self._profile.layers)
        return torch.cat([batch.vectors for batch in batches]).mean(0).cpu()

    def _report(self, *, done: bool = False) -> None:
        if self._progress is not None:
            expected = min(len(self._profile.layers), FIRST_BLOCKS) + 4
            self._progress(
                "layers", len(self._effects), len(self._effects) if done else max(expected, len(self._effects) + 1)
            )


def _range(part: str, whole: str) -> range:
    first, dash, last = part.strip().partition("-")
    if not first.isdecimal() or (dash and not last.strip().isdecimal()):
        raise FitError(f"layers {whole!r} cannot be read; write auto, 12, 10-20 (both ends included) or 3,5,7")
    if not dash:
        return range(int(first), int(first) + 1)
    if int(last) < int(first):
        raise FitError(f"layers {whole!r}: {part.strip()} runs downwards; write {last.strip()}-{first.strip()}")
    return range(int(first), int(last) + 1)
