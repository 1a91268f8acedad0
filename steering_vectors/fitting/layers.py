"""Which blocks a profile steers: as the user says, or by measurement.

Owns the reading of a layer list and the automatic choice. Knows nothing of how directions are found or stored.
"""

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
LOWER_SHARE = 0.85  # of the blocks are candidates; the last ones hardly leave room for the shift to act
FIRST_LOOK = 16  # single blocks tried before looking closer around the best
WIDEST = 4  # blocks in a window
GAIN = 1.05  # a wider window must be better by this factor
TEXTS = 24
TEXT_TOKENS = 24
READ_TEXTS = 48
READ_TOKENS = 48
FIRST_RATIO = 0.15  # norm ratio at which the cost is first looked at

Window = tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Evidence:
    """What windows are judged by: held-out prompts, and the training data's token log-odds."""

    prompts: Sequence[Sequence[int]]
    log_odds: torch.Tensor  # [vocabulary] float32


@dataclass(frozen=True, slots=True)
class Shifts:
    """What a window moves at the budget: log-odds per token, and how the model reads what it writes."""

    lexical: float
    reading: float


@dataclass(frozen=True, slots=True)
class LayerChoice:
    """The chosen blocks, and the score of every window that was tried."""

    layers: Window
    scores: dict[Window, float]


def parse_layers(layers: str | Sequence[int], num_layers: int) -> Window | None:
    """Read `auto` (None), `12`, `10-20` (both ends included), `3,5,7` or a list; ascending, each once.

    Raises FitError for anything else, and for blocks that the model does not have, naming those it has.
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
    """The blocks that the automatic choice looks at: all but the last 15 %."""
    return tuple(range(max(1, int(LOWER_SHARE * num_layers))))


def choose_layers(
    steered: SteeredModel,
    profile: Profile,
    evidence: Evidence,
    *,
    kl_budget: float,
    seed: int = 0,
    progress: Progress | None = None,
) -> LayerChoice:
    """The contiguous window of blocks that moves the model most towards the preferred side at equal cost.

    The model first continues the prompts unsteered, 24 texts of 24 tokens. For each window a coefficient c is sought at
    which mean KL(steered‖base) over these texts is about the budget, and two shifts are measured:

    - lexical, from 0 to c, of the expected log-odds E_{v~p}[log P(v|preferred)/P(v|rejected)] of the next token in
      these texts,
    - reading, between texts sampled at c and at −c (48 each, 48 tokens, the same random numbers): the difference of
      the unsteered model's mean activations over them, projected on the directions; 1 is as far as the data's preferred
      and rejected responses are apart.

    Both are divided by √(KL/budget), since a shift grows as c and KL as c². The first sees single tokens only, the
    second whole texts, through the model's own eyes. The score is the mean of both, each relative to the best single
    block. Single blocks come first (at most 16 over the model, then those around the best); the best one grows by its
    lower or upper neighbour while that raises the score by 5 %, up to four blocks.
    """
    steered.write(profile, 0.0)
    prompts = [evidence.prompts[i % len(evidence.prompts)] for i in range(TEXTS)]
    examples = steered.continuations(prompts, tokens=TEXT_TOKENS, seed=seed)
    bench = _Bench(steered, profile, evidence, examples, kl_budget, seed, progress)
    return bench.choose()


class _Bench:
    """Windows are measured here once each, under equal conditions."""

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
        self._shifts: dict[Window, Shifts] = {}
        self._best = Shifts(0.0, 0.0)

    def choose(self) -> LayerChoice:
        layers = self._profile.layers
        stride = -(-len(layers) // FIRST_LOOK)
        places = range(stride // 2, len(layers), stride)
        self._set_reference([(layers[place],) for place in places])
        best = max(places, key=lambda place: self._score((layers[place],)))
        around = layers[max(0, best - stride + 1) : best + stride]
        window = self._grow(max(((layer,) for layer in around), key=self._score))
        self._tell(done=True)
        return LayerChoice(window, {tried: self._score(tried) for tried in self._shifts})

    def _set_reference(self, windows: Sequence[Window]) -> None:
        shifts = [self._measure(window) for window in windows]
        self._best = Shifts(max(one.lexical for one in shifts), max(one.reading for one in shifts))

    def _grow(self, window: Window) -> Window:
        while len(window) < WIDEST:
            neighbours = [layer for layer in (window[0] - 1, window[-1] + 1) if layer in self._profile.layers]
            wider = max((tuple(sorted((*window, one))) for one in neighbours), key=self._score, default=window)
            if self._score(wider) <= max(0.0, GAIN * self._score(window)):
                break
            window = wider
        return window

    def _score(self, window: Window) -> float:
        """Mean of both shifts relative to the references; one without a positive reference says nothing."""
        shifts = self._measure(window)
        pairs = ((shifts.lexical, self._best.lexical), (shifts.reading, self._best.reading))
        shares = [shift / best for shift, best in pairs if best > 0]
        return sum(shares) / len(shares) if shares else shifts.reading

    def _measure(self, window: Window) -> Shifts:
        if window not in self._shifts:
            directions = {layer: self._profile.directions[layer] for layer in window}
            self._shifts[window] = self._shift(replace(self._profile, directions=directions))
            self._tell()
        return self._shifts[window]

    def _shift(self, profile: Profile) -> Shifts:
        largest = largest_coefficient(profile)
        first = replace(profile, unit=FIRST_RATIO * largest)
        kl = max(self._cost(first)[0], 1e-9)
        profile = replace(profile, unit=min(first.unit * (self._budget / kl) ** 0.5, largest))
        kl, lexical = self._cost(profile)
        scale = max(1.0 if profile.unit == largest else 0.0, kl / self._budget, 1e-9) ** 0.5
        return Shifts(lexical / scale, self._reading(profile) / scale)

    def _cost(self, profile: Profile) -> tuple[float, float]:
        """(mean KL, mean rise of the expected log-odds) per token of the model's own texts at strength 1."""
        self._steered.write(profile, 1.0)
        divergence = expected = 0.0
        for steered, base in zip(self._steered.predictions(self._texts, steer=True), self._base, strict=True):
            divergence += float(kl_divergence(steered, base).double().sum())
            expected += float(((steered.exp() - base.exp()) @ self._log_odds).double().sum())
        count = max(sum(len(base) for base in self._base), 1)
        return divergence / count, expected / count

    def _reading(self, profile: Profile) -> float:
        """How far apart the unsteered model reads the texts written at strengths +1 and −1, along the directions.

        1 is as far as the data's preferred and rejected responses are; the mean over all candidate blocks.
        """
        written = [self._read(profile, strength) for strength in (1.0, -1.0)]
        directions = torch.stack([self._profile.directions[layer] for layer in self._profile.layers])
        gains = ((written[0] - written[1]) * directions).sum(-1) / directions.square().sum(-1)
        return float(gains.mean())

    def _read(self, profile: Profile, strength: float) -> torch.Tensor:
        """Mean block outputs of the unsteered model over texts that the steered model writes, `[layers, hidden]`."""
        steered, prompts = self._steered, self._evidence.prompts
        rows = [prompts[i % len(prompts)] for i in range(READ_TEXTS)]
        steered.write(profile, strength)
        examples = steered.continuations(rows, tokens=READ_TOKENS, seed=self._seed)
        batches = pooled(steered.lm, examples, self._profile.layers)
        return torch.cat([batch.vectors for batch in batches]).mean(0).cpu()

    def _tell(self, *, done: bool = False) -> None:
        if self._progress is not None:
            expected = min(len(self._profile.layers), FIRST_LOOK) + 4
            self._progress(
                "layers", len(self._shifts), len(self._shifts) if done else max(expected, len(self._shifts) + 1)
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
