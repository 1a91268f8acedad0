"""A LoRA that learns a shift of activations, as in RAHF's second step: a profile's shift, or a method's per token."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from steering_vectors.data.corpus import Corpus, corpus_for
from steering_vectors.data.preferences import Preferences
from steering_vectors.errors import FitError
from steering_vectors.methods import Task, method_named
from steering_vectors.methods.rahf import FIRST_STEPS
from steering_vectors.methods.tuned import train_on
from steering_vectors.models.forward import evaluating
from steering_vectors.models.loading import LanguageModel
from steering_vectors.profiles.metadata import MethodOptions
from steering_vectors.profiles.mixture import Mixture, Term
from steering_vectors.profiles.profile import Profile
from steering_vectors.progress import Progress
from steering_vectors.tuning.cache import tuned_directory
from steering_vectors.tuning.paired_reading import Reading, Twin, alone, differences, pad_id, plain_twin, read, readings
from steering_vectors.tuning.trainable_weights import LoraShape, LoraWeights
from steering_vectors.tuning.training import Run, TrainingSchedule

NAME = "default"  # peft's own name for a single adapter
HELDOUT = 0.2
MAX_CHECKED = 64  # held-out responses
CHECK_BATCH = 16
MIN_SQUARE = 1e-12
PAPER_STRENGTH = 5.0
PAPER_DEPTH = (9 / 32, 17 / 32)  # of the blocks whose outputs are targets


@dataclass(frozen=True, slots=True)
class DistillSettings:
    """Options of `distill` and `distill_method`.

    The defaults are those of RAHF-SCIT (arXiv:2312.15997): 450 `steps` of `batch` 64 responses, a peak `learning_rate`
    of 3e-4, `rank` 8. `targets` are peft's module names, comma-separated, or `all-linear`; empty takes peft's choice
    for the architecture. Only the first `response_tokens` of a response are read. Raises FitError for values below 1.
    """

    steps: int = 450
    batch: int = 64
    learning_rate: float = 3e-4
    rank: int = 8
    alpha: int = 16
    dropout: float = 0.05
    targets: str = ""
    response_tokens: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.steps, self.batch, self.rank, self.alpha, self.response_tokens) < 1 or self.learning_rate <= 0:
            raise FitError("steps, batch, rank, alpha, response tokens and the learning rate must be positive")

    def shape(self, last_block: int) -> LoraShape:
        return LoraShape(self.rank, self.alpha, self.dropout, self.targets, last_block)


PAPER_SETTINGS: Mapping[str, DistillSettings] = {
    "rahf-scit": DistillSettings(),
    "rahf-dual": DistillSettings(steps=2500, batch=8, learning_rate=9e-6, response_tokens=64),
}


def paper_settings(method: str, **options: Any) -> DistillSettings:
    """The settings of a method's paper, with the given options in place of the paper's."""
    return replace(PAPER_SETTINGS[method], **options)


@dataclass(frozen=True, slots=True)
class MethodTarget:
    """A method whose difference per token is the target of a LoRA.

    `name` selects the default instructions, as a profile's name does in `fit`. `options` are the method's. `layers` are
    the target blocks; empty takes the paper's, the middle ones. `strength` is α. Raises FitError for a method without
    a difference per token, and for strength 0.
    """

    method: str
    name: str = ""
    options: MethodOptions = field(default_factory=dict)
    layers: tuple[int, ...] = ()
    strength: float = PAPER_STRENGTH

    def __post_init__(self) -> None:
        if self.method not in FIRST_STEPS:
            raise FitError(f"method {self.method!r} has no difference per token; use {' or '.join(FIRST_STEPS)}")
        if self.strength == 0:
            raise FitError("strength 0 changes nothing, so there is nothing to distil")


@dataclass(frozen=True, slots=True)
class Distilled:
    """The mean distance to the target on `rows` held-out responses, before and after training, and their ratio.

    `notes` are sentences about rows that were left out.
    """

    before: float
    after: float
    rows: int
    layers: tuple[int, ...]
    notes: tuple[str, ...] = ()

    @property
    def ratio(self) -> float:
        return self.after / self.before


def distill(
    lm: LanguageModel,
    profile: Profile,
    pairs: Preferences,
    folder: Path,
    settings: DistillSettings | None = None,
    *,
    strength: float = 1.0,
    skip_long_rows: bool = False,
    progress: Progress | None = None,
) -> Distilled:
    """Fit a LoRA to a profile's shift and save it to `folder` in peft's format.

    On the data's responses after their plain prompts, at every steered block l and response token t, the LoRA learns
    the unsteered output plus the shift:

        loss = mean over l, responses and t of ‖h_lora − (h_base + α·c·d_l)‖₂

    A fifth of the rows, split by prompt, is held out to measure the distance. Training is cached and resumable.

    Raises ProfileMismatch for a profile of another model, SteeringError for a strength beyond the safe range, FitError
    if the LoRA cannot be trained or written.
    """
    settings = settings or DistillSettings()
    profile.check_model(lm.identity, allow_mismatch=False)
    shifts = Mixture((Term(profile, strength),)).shifts().by_layer()
    if not shifts:
        raise FitError("strength 0 changes nothing, so there is nothing to distil")
    parts = _split(lm, pairs, settings, skip_long_rows)
    training, heldout = (
        [plain_twin(ids, start) for ids, start in (*sides.positives, *sides.negatives)]
        for sides in (part.sides() for part in parts)
    )
    layers = sorted(shifts)
    constant = torch.stack([shifts[layer] for layer in layers])[:, None, None].to(lm.device)
    weights = LoraWeights(lm, {NAME: settings.shape(max(layers))}, settings.seed)
    try:
        student = _Student(lm, weights, layers, lambda _twins: constant, settings)
        key = {"profile": profile.version or profile.name, "strength": strength}
        return replace(student.trained(training, heldout, folder, key, progress), notes=tuple(parts[0].notes))
    finally:
        weights.close()


def distill_method(
    lm: LanguageModel,
    target: MethodTarget,
    pairs: Preferences,
    folder: Path,
    settings: DistillSettings | None = None,
    *,
    skip_long_rows: bool = False,
    progress: Progress | None = None,
) -> Distilled:
    """Fit a LoRA to a method's difference per token and save it to `folder` in peft's format.

        loss = mean over l, responses and t of ‖h_lora − (h_base + α·v_{l,t})‖₂,   v = h(p⁺, q, r) − h(p⁻, q, r)

    v comes from the tuned model (or two models) of the method's first step, whose weights `fit` caches. h_base is the
    untuned model, so the adapter belongs to the model that is served; in the paper, both start from the first step's
    model. Paper: RAHF (arXiv:2312.15997, §3.3). Without settings, the method's paper's are used.

    Raises FitError if the LoRA cannot be trained or written, and for rows with weights, which it cannot use.
    """
    if pairs.weighted:
        raise FitError("a method's LoRA cannot use the weights of rows: let all rows count alike")
    settings = settings or paper_settings(target.method)
    layers = target.layers or paper_blocks(lm.num_layers)
    step = FIRST_STEPS[target.method]
    options = method_named(target.method).complete(target.options)
    parts = _split(lm, pairs, settings, skip_long_rows)
    train, heldout = (
        Task(
            lm, {}, texts.positives, texts.negatives, sides.positives, sides.negatives, sides.paired, target.name,
            seed=settings.seed, options=options, progress=progress, wanted=layers,
        )
        for texts, sides in ((part.pairs, part.sides()) for part in parts)
    )  # fmt: skip
    with step.tuned(train, {NAME: settings.shape(max(layers))}) as first:
        assert isinstance(first.weights, LoraWeights)

        def shift(twins: Sequence[Twin]) -> torch.Tensor:
            return target.strength * differences(lm, twins, layers, first.side)[0]

        student = _Student(lm, first.weights, layers, shift, settings)
        key = {"method": target.method, "options": options, "layers": layers, "strength": target.strength}
        unseen = [twin for side in step.sides(heldout) for twin in side]
        return replace(student.trained(first.twins, unseen, folder, key, progress), notes=tuple(parts[0].notes))


def paper_blocks(num_layers: int) -> tuple[int, ...]:
    """The middle blocks, from 0.28 to 0.53 of the depth; every second one in models of 16 blocks or more."""
    first, last = (round(share * num_layers) for share in PAPER_DEPTH)
    return tuple(range(first, max(first, last) + 1, 2 if num_layers >= 16 else 1))


@dataclass(frozen=True, slots=True, eq=False)
class _Student:
    """The LoRA that learns to change the outputs of `layers` by `shift`, which gives the change for responses: float32
    `[layers, rows, response, hidden]`, or a shape that broadcasts to it, without gradients."""

    lm: LanguageModel
    weights: LoraWeights
    layers: Sequence[int]
    shift: Callable[[Sequence[Twin]], torch.Tensor]
    settings: DistillSettings

    def trained(
        self,
        training: Sequence[Twin],
        heldout: Sequence[Twin],
        folder: Path,
        key: Mapping[str, object],
        progress: Progress | None,
    ) -> Distilled:
        settings = self.settings
        training, heldout = self._cut(training), self._cut(heldout)
        file = tuned_directory(self.lm, [training], {**asdict(settings), **key}) / "distilled.safetensors"
        run = Run(self.weights, NAME, TrainingSchedule(settings.steps, settings.learning_rate), file, settings.seed)
        train_on(
            self.lm, run, training, settings.batch, lambda twins: self._distance(*self._goal(twins)), alone,
            progress=progress, stage="distil",
        )  # fmt: skip
        checked = heldout[:: -(-len(heldout) // MAX_CHECKED)]
        before, after = self._distances(checked)
        self.weights.save(NAME, folder)
        return Distilled(before, after, len(checked), tuple(self.layers))

    def _distance(self, reading: Reading, base: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        """Mean distance over blocks, responses and their tokens. Call it inside `weights.use`."""
        return _mean(read(self.lm, reading, self.layers) - base - shift, reading)

    def _goal(self, twins: Sequence[Twin]) -> tuple[Reading, torch.Tensor, torch.Tensor]:
        """The reading after plain prompts, the untuned model's outputs, and their target change."""
        plain = [replace(twin, positive=twin.plain, negative=twin.plain) for twin in twins]
        reading, _ = readings(plain, pad_id(self.lm), self.lm.device)
        with self.weights.use(None), evaluating(self.lm.model), torch.no_grad():
            return reading, read(self.lm, reading, self.layers), self.shift(twins)

    def _distances(self, twins: Sequence[Twin]) -> tuple[float, float]:
        """Mean distances of the untuned and of the tuned model from the target."""
        before = after = 0.0
        for start in range(0, len(twins), CHECK_BATCH):
            part = twins[start : start + CHECK_BATCH]
            with self.weights.use(NAME), torch.no_grad():
                reading, base, shift = self._goal(part)
                before += float(_mean(shift.expand_as(base), reading)) * len(part)
                after += float(self._distance(reading, base, shift)) * len(part)
        return before / len(twins), after / len(twins)

    def _cut(self, twins: Sequence[Twin]) -> list[Twin]:
        return [replace(twin, response=twin.response[: self.settings.response_tokens]) for twin in twins]


def _mean(difference: torch.Tensor, reading: Reading) -> torch.Tensor:
    """Mean norm of `[layers, rows, response, hidden]` over blocks, responses and their tokens."""
    response = reading.response  # [rows, columns]
    distances = difference.masked_fill(~response[None, :, :, None], 0).square().sum(-1).clamp_min(MIN_SQUARE).sqrt()
    per_row = (distances * response).sum(-1) / response.sum(-1)  # [blocks, rows]
    return per_row.mean()


def _split(
    lm: LanguageModel, pairs: Preferences, settings: DistillSettings, skip_long_rows: bool
) -> tuple[Corpus, Corpus]:
    """The rows to train on, and the held-out rows."""
    return corpus_for(lm, pairs, skip_long_rows=skip_long_rows).split(HELDOUT, settings.seed, min_side=4)
