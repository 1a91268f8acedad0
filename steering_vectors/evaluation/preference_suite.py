"""The preference suite: margins against strength, their cost, and controls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from steering_vectors.data.batches import Encoded
from steering_vectors.data.corpus import Corpus, Sides, corpus_for, prompts_with_room, spread
from steering_vectors.data.preferences import Preferences
from steering_vectors.errors import DataError, FitError
from steering_vectors.evaluation.frontier import reward_curve
from steering_vectors.evaluation.reward import Reward, judged
from steering_vectors.fitting.calibration import SAMPLED_TOKENS, trained_and_fresh
from steering_vectors.measures import results
from steering_vectors.measures.controls import bootstrap, measured_profile, random_controls
from steering_vectors.measures.curve import curve_record, measure_points
from steering_vectors.measures.propensity import Propensity, propensity
from steering_vectors.measures.steered_model import SteeredModel, steerable
from steering_vectors.models.limits import context_limit
from steering_vectors.models.loading import LanguageModel
from steering_vectors.profiles.metadata import CurvePointRecord
from steering_vectors.profiles.profile import Profile
from steering_vectors.progress import Progress
from steering_vectors.tuning.instructions import Instructions, instructions_for
from steering_vectors.tuning.paired_reading import Twin
from steering_vectors.tuning.twins import twins_of

TEXTS = 64  # whose cost is measured at each strength


@dataclass(frozen=True, slots=True)
class EvaluationSettings:
    """Options of `evaluate`.

    `rows` is the maximum number of held-out rows, `randoms` the number of random directions to compare with,
    `reward_samples` the number of unsteered texts per prompt that show the optimum of reward against KL (0 leaves the
    reward out). Raises FitError unless `strengths` holds 0 and at least two others.
    """

    strengths: tuple[float, ...] = (-1.0, -0.5, 0.0, 0.5, 1.0)
    rows: int = 256
    randoms: int = 10
    reward_samples: int = 64
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
    instructions: Instructions | None = None,
    progress: Progress | None = None,
) -> results.PreferenceEvaluation:
    """Measure a profile on held-out preferences.

    Of the data that the profile was fitted to, only the rows that it was not trained on are read. Margins are in nats:
    log P(chosen) − log P(rejected) per pair, or per token between unpaired sides. `steerability` is the mean
    least-squares slope of a row's margin over strength (arXiv:2407.12404), `anti_steerable` the share of rows with a
    negative slope; both need pairs. Intervals are 95 % bootstrap over rows.

    `reward` scores sampled texts against their KL (see `reward_curve`). Without one, a small reward is fitted to rows
    that are not tested on (see `judged`). `instructions` are those of the prompting baseline, by default those of the
    profile's name.

    Raises ProfileMismatch for a profile of another model, DataError for rows that this model cannot use.
    """
    settings = settings or EvaluationSettings()
    profile.check_model(lm.identity, allow_mismatch=False)
    limit = context_limit(lm)
    corpus = corpus_for(lm, pairs, skip_long_rows=settings.skip_long_rows)
    trained, fresh = trained_and_fresh(profile, corpus)
    prompts = prompts_with_room(lm, fresh.pairs, room=SAMPLED_TOKENS, seed=settings.seed)
    with steerable(lm) as steered:
        suite = PreferenceSuite(steered, fresh, settings, progress)
        return {
            **measured_profile(lm, profile),
            "data": suite.data,
            "unit": suite.unit,
            **suite.margins(profile),
            "costs": suite.costs(profile, prompts),
            "norm_ratios": norm_ratios(profile),
            "random": [
                suite.margins(control) for control in random_controls(profile, settings.randoms, seed=settings.seed)
            ],
            "prompting": suite.prompting(instructions or instructions_for(profile.name), limit),
            "reward": suite.reward(profile, prompts, reward, trained),
        }


def norm_ratios(profile: Profile) -> dict[str, float]:
    """Norm of the shift at strength 1 over the median residual norm, by block."""
    norms = profile.residual_norms
    return {str(layer): shift / norms[layer] for layer, shift in profile.shift_norms().items() if norms.get(layer)}


def slopes(strengths: Sequence[float], margins: np.ndarray) -> np.ndarray:
    """Least-squares slopes over strength of margins `[strengths, rows]`: `[rows]`."""
    centred = np.asarray(strengths) - np.mean(strengths)
    result: np.ndarray = centred @ margins / (centred @ centred)
    return result


class PreferenceSuite:
    """Measures profiles under equal conditions, on one model and one set of held-out rows."""

    def __init__(
        self, steered: SteeredModel, fresh: Corpus, settings: EvaluationSettings, progress: Progress | None
    ) -> None:
        self.sides = fresh.sides().thinned(settings.rows)
        self._steered, self._fresh, self._settings = steered, fresh, settings
        self._progress, self._done = progress, 0
        self._base = propensity(steered, self.sides, steer=False)

    @property
    def unit(self) -> str:
        """The unit of margins."""
        return "nats per response" if self.sides.paired else "nats per token"

    @property
    def data(self) -> results.EvaluatedRows:
        pairs, read = self._fresh.pairs, len(self.sides.positives)
        return {"rows": pairs.rows, "read": read, "sha256": pairs.sha256, "notes": self._fresh.notes}

    def margins(self, profile: Profile) -> results.MarginsByStrength:
        """Margin and accuracy at each strength, and for pairs the distribution of slopes."""
        settings, seen = self._settings, []
        for strength in settings.strengths:
            self._steered.write(profile, strength)
            seen.append(propensity(self._steered, self.sides, steer=True) if strength else self._base)
        self._report()
        found: results.MarginsByStrength = {
            "strengths": [
                {"strength": strength, **estimate(one, settings.seed)}
                for strength, one in zip(settings.strengths, seen, strict=True)
            ]
        }
        if self.sides.paired:
            margins = torch.stack([one.positives - one.negatives for one in seen]).numpy()
            values = slopes(settings.strengths, margins)
            found["steerability"] = float(values.mean())
            found["steerability_95"] = bootstrap(
                lambda rows: float(values[rows].mean()), len(values), seed=settings.seed
            )
            found["steerability_quartiles"] = [float(one) for one in np.percentile(values, [25, 50, 75])]
            found["anti_steerable"] = float((values < 0).mean())
            found["slopes"] = [float(one) for one in values]
        return found

    def costs(self, profile: Profile, prompts: Sequence[Sequence[int]]) -> list[CurvePointRecord]:
        """KL(steered‖base) per token, and perplexity under the unsteered model, of texts sampled at each strength."""
        repeated = [prompts[i % len(prompts)] for i in range(TEXTS)]
        points = measure_points(
            self._steered, profile, self._settings.strengths, repeated, tokens=SAMPLED_TOKENS, seed=self._settings.seed
        )
        self._report()
        return curve_record(points)

    def prompting(self, instructions: Instructions, limit: int | None) -> results.PromptingBaseline:
        """The same rows without a vector, under the instruction p⁺ and under p⁻."""
        tokenizer = self._steered.lm.tokenizer
        positives, negatives = (spread(side, self._settings.rows) for side in self._fresh.pairs.sides())
        twins = [
            twins_of(tokenizer, side, [self._fresh.encoded[one] for one in side], instructions, limit=limit)
            for side in (positives, negatives)
        ]
        found: results.PromptingBaseline = {"positive_instruction": instructions.positive}
        if self.sides.paired and not len(twins[0]) == len(twins[1]) == len(positives):
            found["note"] = "with an instruction added, some rows exceed the model's context"
            return found
        found["positive"] = self._unsteered(*([_read_after(twin, twin.positive) for twin in side] for side in twins))
        found["negative"] = self._unsteered(*([_read_after(twin, twin.negative) for twin in side] for side in twins))
        return found

    def reward(
        self, profile: Profile, prompts: Sequence[Sequence[int]], reward: Reward | None, trained: Corpus | None
    ) -> results.RewardReport | results.NotMeasured:
        """Reward against KL at each strength, or a note on why it was not measured."""
        settings, tokenizer = self._settings, self._steered.lm.tokenizer
        if not settings.reward_samples:
            return {"note": "it was not requested"}
        try:
            chosen, quality = judged(
                reward, trained, self._fresh, tokenizer, max_tokens=SAMPLED_TOKENS, seed=settings.seed
            )
        except DataError as error:
            return {"note": error.message}
        curve = reward_curve(
            self._steered, profile, chosen, prompts, settings.strengths,
            samples=settings.reward_samples, tokens=SAMPLED_TOKENS, seed=settings.seed, progress=self._progress,
        )  # fmt: skip
        return {"scorer": quality, **curve}

    def _unsteered(self, positives: Sequence[Encoded], negatives: Sequence[Encoded]) -> results.MarginEstimate:
        self._report()
        sides = Sides(tuple(positives), tuple(negatives), self.sides.paired)
        return estimate(propensity(self._steered, sides, steer=False), self._settings.seed)

    def _report(self) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress("evaluate", self._done, self._settings.randoms + 4)


def estimate(one: Propensity, seed: int = 0) -> results.MarginEstimate:
    if not one.paired:
        return {"margin": one.margin, "accuracy": one.accuracy}
    margins = (one.positives - one.negatives).numpy()
    return {
        "margin": one.margin,
        "margin_95": bootstrap(lambda rows: float(margins[rows].mean()), len(margins), seed=seed),
        "accuracy": one.accuracy,
        "accuracy_95": bootstrap(lambda rows: float((margins[rows] > 0).mean()), len(margins), seed=seed),
    }


def _read_after(twin: Twin, prompt: Sequence[int]) -> Encoded:
    return [*prompt, *twin.response], len(prompt)
