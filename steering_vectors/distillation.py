"""A profile's shift learnt by a LoRA: RAHF's second step, so that steering can be had as an adapter.

Owns the loss, the target and how near a LoRA comes to it. Knows nothing of files but the adapter's folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from steering_vectors.batches import Progress
from steering_vectors.contrast import Reading, Twin, pad_id, plain_twin, read, readings
from steering_vectors.corpus import Corpus, context_length, encode_corpus
from steering_vectors.errors import FitError
from steering_vectors.methods.tuning import train_on
from steering_vectors.mixture import Mixture, Term
from steering_vectors.models import LanguageModel
from steering_vectors.preferences import Preferences
from steering_vectors.profile import Profile
from steering_vectors.training import Run, Schedule
from steering_vectors.tuning_cache import tuned_directory
from steering_vectors.weights import LoraShape, LoraWeights

NAME = "default"  # peft's own name for a single adapter
HELDOUT = 0.2
CHECKED = 64
TINY = 1e-12


@dataclass(frozen=True, slots=True)
class DistillSettings:
    """The paper's shape and schedule (arXiv:2312.15997, SCIT): 450 steps of 64 responses at 3e-4, a LoRA of rank 8 on
    the query and value projections (`targets` empty: peft's choice for the architecture)."""

    steps: int = 450
    batch: int = 64
    learning_rate: float = 3e-4
    rank: int = 8
    alpha: int = 16
    dropout: float = 0.05
    targets: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.steps, self.batch, self.rank, self.alpha) < 1 or self.learning_rate <= 0:
            raise FitError("steps, batch, rank, alpha and the learning rate must be positive")


@dataclass(frozen=True, slots=True)
class Distilled:
    """What came of it: mean distance to the target on held-out responses, before and after, and their ratio."""

    before: float
    after: float
    rows: int

    @property
    def ratio(self) -> float:
        return self.after / self.before


def distill(
    lm: LanguageModel,
    profile: Profile,
    pairs: Preferences,
    folder: Path,
    *,
    strength: float = 1.0,
    settings: DistillSettings | None = None,
    skip_long_rows: bool = False,
    progress: Progress | None = None,
) -> Distilled:
    """Fit a LoRA to the profile's shift and save it in peft's format.

    On the data's responses after their plain prompts, at every steered block l and response token t, the LoRA's output
    is drawn to the unsteered model's plus the shift:

        loss = mean over l, responses and t of ‖h_lora − (h_base + α·c·d_l)‖₂

    A fifth of the rows, by prompt, is held out to measure the distance. Tuning is cached and resumable as a fit's first
    step is. Raises ProfileMismatch, SteeringError beyond the safe range, FitError for what cannot be tuned or written.
    """
    settings = settings or DistillSettings()
    profile.check_model(lm.identity, allow_mismatch=False)
    shifts = Mixture((Term(profile, strength),)).shifts()
    if not shifts:
        raise FitError("at strength 0 there is nothing to distil")
    corpus = encode_corpus(lm.tokenizer, pairs, limit=context_length(lm.model.config), skip_long_rows=skip_long_rows)
    training, heldout = (_twins(part) for part in corpus.split(HELDOUT, settings.seed, min_side=4))
    shape = LoraShape(settings.rank, settings.alpha, settings.dropout, settings.targets, last_block=max(shifts))
    weights = LoraWeights(lm, [NAME], shape, settings.seed)
    goal = _Goal(lm, weights, shifts)
    try:
        _tune(goal, training, settings, profile, strength, progress)
        checked = heldout[:: -(-len(heldout) // CHECKED)]
        found = Distilled(goal.distance(checked, tuned=False), goal.distance(checked, tuned=True), len(checked))
        weights.save(folder)
    finally:
        weights.close()
    return found


class _Goal:
    """The target representation, and how far the tuned or the untuned model is from it."""

    def __init__(self, lm: LanguageModel, weights: LoraWeights, shifts: Mapping[int, torch.Tensor]) -> None:
        self.lm, self.weights = lm, weights
        self._layers = sorted(shifts)
        self._shift = torch.stack([shifts[layer] for layer in self._layers]).to(lm.device)  # [blocks, hidden]

    def loss(self, twins: Sequence[Twin]) -> torch.Tensor:
        """Mean distance over blocks, responses and their tokens; inside `weights.use`."""
        reading, _ = readings(twins, pad_id(self.lm), self.lm.device)
        with self.weights.aside(), torch.no_grad():
            target = read(self.lm, reading, self._layers) + self._shift[:, None, None]
        return self._mean(read(self.lm, reading, self._layers) - target, reading)

    def distance(self, twins: Sequence[Twin], *, tuned: bool) -> float:
        """The same over many responses, without gradients; untuned it is the shift's own norm."""
        if not tuned:
            return float(self._shift.norm(dim=-1).mean())
        total = 0.0
        with self.weights.use(NAME), torch.no_grad():
            for start in range(0, len(twins), 16):
                part = twins[start : start + 16]
                total += float(self.loss(part)) * len(part)
        return total / len(twins)

    def _mean(self, difference: torch.Tensor, reading: Reading) -> torch.Tensor:
        response = reading.response  # [rows, columns]
        distances = difference.masked_fill(~response[None, :, :, None], 0).square().sum(-1).clamp_min(TINY).sqrt()
        per_row = (distances * response).sum(-1) / response.sum(-1)  # [blocks, rows]
        return per_row.mean()


def _tune(
    goal: _Goal,
    twins: Sequence[Twin],
    settings: DistillSettings,
    profile: Profile,
    strength: float,
    progress: Progress | None,
) -> None:
    inputs = {**asdict(settings), "profile": profile.version or profile.name, "strength": strength}
    file = tuned_directory(goal.lm, [twins], inputs) / "distilled.safetensors"
    run = Run(goal.weights, NAME, Schedule(settings.steps, settings.learning_rate), file, settings.seed)
    train_on(goal.lm, run, twins, settings.batch, goal.loss, progress=progress, stage="distil")


def _twins(corpus: Corpus) -> list[Twin]:
    """The responses of both sides after their plain prompts."""
    sides = corpus.sides()
    return [plain_twin(ids, start) for ids, start in (*sides.positives, *sides.negatives)]
