"""How far a profile moves a model's preferences, what that costs, and how it compares with controls.

Owns the preference suite: margins and accuracies against strength, per-sample steerability, costs, random directions of
the same norm, and the prompting baseline. Knows nothing of files or of how results are shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from steering_vectors.data.batches import Encoded
from steering_vectors.data.corpus import Corpus, encode_corpus, prompts_with_room
from steering_vectors.data.preferences import Preferences
from steering_vectors.data.sides import Sides, spread
from steering_vectors.errors import DataError, FitError
from steering_vectors.evaluation.frontier import reward_report
from steering_vectors.evaluation.reward import Reward, judged
from steering_vectors.fitting.calibration import SAMPLED_TOKENS
from steering_vectors.fitting.recalibration import parted
from steering_vectors.measures.controls import bootstrap, measured_profile, random_controls
from steering_vectors.measures.curve import curve_record, measure_point
from steering_vectors.measures.propensity import Propensity, propensity
from steering_vectors.measures.steered_model import SteeredModel, steerable
from steering_vectors.models.limits import context_limit
from steering_vectors.models.loading import LanguageModel
from steering_vectors.profiles.profile import Profile
from steering_vectors.progress import Progress
from steering_vectors.tuning.instructions import instructions_for
from steering_vectors.tuning.twins import twins_of

STRENGTHS = (-1.0, -0.5, 0.0, 0.5, 1.0)
ROWS = 256
RANDOMS = 10
TEXTS = 64
REWARD_SAMPLES = 64  # unsteered texts per prompt, for the optimum


@dataclass(frozen=True, slots=True)
class EvaluationSettings:
    """`rows` held-out rows at most are read; `randoms` random directions are compared with; `reward_samples` texts per
    prompt show the optimum of reward against KL (0: not measured)."""

    strengths: tuple[float, ...] = STRENGTHS
    rows: int = ROWS
    randoms: int = RANDOMS
    reward_samples: int = REWARD_SAMPLES
    seed: int = 0
    skip_long_rows: bool = False

    def __post_init__(self) -> None:
        if 0.0 not in self.strengths or len(set(self.strengths)) < 3:
            raise FitError("strengths must hold 0 and at least two others, as in -1,0,1")


def evaluate(
    lm: LanguageModel,
    profile: Profile,
    pairs: Preferences,
    settings: EvaluationSettings | None = None,
    *,
    reward: Reward | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The preference suite for one profile, as a JSON-ready object.

    Of the data that the profile was fitted to, only rows that it was not trained on are read. Margins are in nats:
    log P(chosen) − log P(rejected) per pair, or per token between unpaired sides. `steerability` is the per-sample
    least-squares slope of the margin over strength (arXiv:2407.12404), `anti_steerable` the share of samples whose
    slope is negative; both need pairs. Intervals are 95 % bootstrap over samples. `reward` scores sampled texts against
    their KL (see `reward_report`); without one it is fitted to rows that are not tested on (see `judged`). Raises
    ProfileMismatch for a profile of another model.
    """
    settings = settings or EvaluationSettings()
    profile.check_model(lm.identity, allow_mismatch=False)
    limit = context_limit(lm)
    corpus = encode_corpus(lm.tokenizer, pairs, limit=limit, skip_long_rows=settings.skip_long_rows)
    trained, corpus = parted(profile, corpus)
    sides = corpus.sides().thinned(settings.rows)
    prompts = prompts_with_room(lm, corpus.pairs, room=SAMPLED_TOKENS, seed=settings.seed)
    repeated = [prompts[i % len(prompts)] for i in range(TEXTS)]
    with steerable(lm) as steered:
        bench = _Bench(steered, sides, settings, progress)
        own = bench.measure(profile)
        return {
            **measured_profile(lm, profile),
            "data": {"rows": corpus.pairs.rows, "read": len(sides.positives), "sha256": pairs.sha256},
            "unit": "nats per response" if sides.paired else "nats per token",
            **own,
            "costs": bench.costs(profile, repeated),
            "norm_ratios": norm_ratios(profile),
            "random": [
                bench.measure(control) for control in random_controls(profile, settings.randoms, seed=settings.seed)
            ],
            "prompting": _prompting(bench, corpus, profile.name, limit, settings),
            "reward": bench.rewards(profile, prompts, reward, trained, corpus),
        }


def norm_ratios(profile: Profile) -> dict[str, float]:
    """Norm of the shift at strength 1 over the median residual norm, per block that has one stored."""
    return {
        str(layer): profile.unit * float(shift.norm()) / profile.residual_norms[layer]
        for layer, shift in profile.injected().items()
        if profile.residual_norms.get(layer)
    }


def slopes(strengths: Sequence[float], margins: np.ndarray) -> np.ndarray:
    """Least-squares slopes over strength of margins `[strengths, samples]`: `[samples]`."""
    centred = np.asarray(strengths) - np.mean(strengths)
    result: np.ndarray = centred @ margins / (centred @ centred)
    return result


class _Bench:
    """One model, one set of held-out rows; profiles are measured on it under equal conditions."""

    def __init__(
        self, steered: SteeredModel, sides: Sides, settings: EvaluationSettings, progress: Progress | None
    ) -> None:
        self.steered, self.sides, self.settings = steered, sides, settings
        self._progress, self._done = progress, 0
        self._base = propensity(steered, sides, steer=False)

    def measure(self, profile: Profile) -> dict[str, Any]:
        """Margin and accuracy at every strength, and for pairs the distribution of slopes."""
        seen = []
        for strength in self.settings.strengths:
            self.steered.write(profile, strength)
            seen.append(propensity(self.steered, self.sides, steer=True) if strength else self._base)
        self._tell()
        report: dict[str, Any] = {
            "strengths": [
                {"strength": strength, **summary(one, self.settings.seed)}
                for strength, one in zip(self.settings.strengths, seen, strict=True)
            ]
        }
        if self.sides.paired:
            margins = torch.stack([one.positives - one.negatives for one in seen]).numpy()
            report |= steerability(slopes(self.settings.strengths, margins), self.settings.seed)
        return report

    def costs(self, profile: Profile, prompts: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
        """KL(steered‖base) per token and perplexity under the unsteered model, of sampled texts at every strength."""
        points = [
            measure_point(self.steered, profile, strength, prompts, tokens=SAMPLED_TOKENS, seed=self.settings.seed)
            for strength in self.settings.strengths
        ]
        self._tell()
        return curve_record(points)

    def rewards(
        self,
        profile: Profile,
        prompts: Sequence[Sequence[int]],
        reward: Reward | None,
        trained: Corpus | None,
        fresh: Corpus,
    ) -> dict[str, Any]:
        """Reward against KL at every strength beside the optimum, or a note on why there is none."""
        settings, tokenizer = self.settings, self.steered.lm.tokenizer
        if not settings.reward_samples:
            return {"note": "it was not asked for"}
        try:
            found = judged(reward, trained, fresh, tokenizer, most=SAMPLED_TOKENS, seed=settings.seed)
        except DataError as error:
            return {"note": error.message}
        return {"scorer": found.quality} | reward_report(
            self.steered, profile, found.reward, prompts, settings.strengths,
            samples=settings.reward_samples, tokens=SAMPLED_TOKENS, seed=settings.seed, progress=self._progress,
        )  # fmt: skip

    def under(self, positives: Sequence[Encoded], negatives: Sequence[Encoded]) -> dict[str, Any]:
        """What the unsteered model says of these readings of the rows."""
        self._tell()
        sides = Sides(tuple(positives), tuple(negatives), self.sides.paired)
        return summary(propensity(self.steered, sides, steer=False), self.settings.seed)

    def _tell(self) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress("evaluate", self._done, self.settings.randoms + 4)


def summary(one: Propensity, seed: int = 0) -> dict[str, Any]:
    """Margin and accuracy with their intervals."""
    if not one.paired:
        return {"margin": one.margin, "accuracy": one.accuracy}
    margins = (one.positives - one.negatives).numpy()
    return {
        "margin": one.margin,
        "margin_95": bootstrap(lambda rows: float(margins[rows].mean()), len(margins), seed=seed),
        "accuracy": one.accuracy,
        "accuracy_95": bootstrap(lambda rows: float((margins[rows] > 0).mean()), len(margins), seed=seed),
    }


def steerability(values: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """Mean slope, its interval, quartiles, and the share of samples that move the other way."""
    return {
        "steerability": float(values.mean()),
        "steerability_95": bootstrap(lambda rows: float(values[rows].mean()), len(values), seed=seed),
        "steerability_quartiles": [float(one) for one in np.percentile(values, [25, 50, 75])],
        "anti_steerable": float((values < 0).mean()),
        "slopes": [float(one) for one in values],
    }


def _prompting(
    bench: _Bench, corpus: Corpus, name: str, limit: int | None, settings: EvaluationSettings
) -> dict[str, Any]:
    """The same rows without a vector, under the instruction p⁺ and under p⁻."""
    instructions = instructions_for(name)
    positives, negatives = (spread(side, settings.rows) for side in corpus.pairs.sides())
    readings: dict[str, Any] = {"positive_instruction": instructions.positive}
    twins = [
        twins_of(bench.steered.lm.tokenizer, side, [corpus.encoded[one] for one in side], instructions, limit=limit)
        for side in (positives, negatives)
    ]
    if bench.sides.paired and not len(twins[0]) == len(twins[1]) == len(positives):
        return readings | {"note": "with an instruction ahead of them some rows exceed the model's context"}
    for key, prompt in (("positive", 0), ("negative", 1)):
        encoded = [
            [((*(twin.positive, twin.negative)[prompt], *twin.response), len((twin.positive, twin.negative)[prompt]))
             for twin in side]
            for side in twins
        ]  # fmt: skip
        readings[key] = bench.under(*encoded)
    return readings
