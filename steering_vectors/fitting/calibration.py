"""Calibration: the unit at which strength 1 costs a KL budget, and the range of strengths that is safe.

A budget per token is not comparable between tokenizers, so the cost per character is stored beside it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from steering_vectors.data.corpus import Corpus, corpus_for, prompts_with_room
from steering_vectors.data.preferences import Preferences
from steering_vectors.errors import FitError
from steering_vectors.measures.curve import PERPLEXITY_BOUND, TEXTS, curve_record, measure_curve, safe_strength
from steering_vectors.measures.long_texts import (
    COMPARED_TEXTS,
    DEFAULT_TEXT_TOKENS,
    LONG_TEXTS,
    measure_long_texts,
    safe_range,
    tells_endings,
)
from steering_vectors.measures.propensity import REPORT_ROWS, propensity_report
from steering_vectors.measures.steered_model import SteeredModel, steerable
from steering_vectors.models.limits import context_limit
from steering_vectors.models.loading import LanguageModel
from steering_vectors.profiles.metadata import Calibration, LongTextCheck, LongTextPoint, Metrics
from steering_vectors.profiles.profile import Profile
from steering_vectors.progress import Progress

DEFAULT_KL_BUDGET = 0.1  # nats per token
SAMPLED_TOKENS = 48
ROWS = 192  # texts; fewer prompts are sampled several times each
ROUGH_ROWS = 48  # texts of the first search
TOLERANCE, ROUGH_TOLERANCE = 0.05, 0.25
EVALUATIONS, ROUGH_EVALUATIONS = 4, 10
POWERS = (2.0, 8.0)  # of c by which KL grows: 2 on given texts, more on texts that change with c
START = 0.2  # of the largest coefficient
MIN_KL = 1e-12
MIN_SAFE_STRENGTH = 0.1
EXPECTED_CHECKS = 3  # of the safe range on long texts


@dataclass(frozen=True, slots=True)
class CalibrationSettings:
    """Options of `calibrate`.

    `kl_budget` is in nats of KL(steered‖base) per token at strength 1. `perplexity_bound` is the factor over the
    unsteered perplexity that ends the safe range. `text_tokens` is the length of the texts on which the safe range is
    checked, and `text_count` their number at each strength; 0 tokens leave the check out. Raises FitError for values
    that cannot be used.
    """

    kl_budget: float = DEFAULT_KL_BUDGET
    perplexity_bound: float = PERPLEXITY_BOUND
    text_tokens: int = DEFAULT_TEXT_TOKENS
    text_count: int = LONG_TEXTS
    seed: int = 0
    skip_long_rows: bool = False
    allow_model_mismatch: bool = False

    def __post_init__(self) -> None:
        if not math.isfinite(self.kl_budget) or self.kl_budget <= 0:
            raise FitError(f"the KL budget must be a positive number of nats per token, not {self.kl_budget:g}")
        if not math.isfinite(self.perplexity_bound) or self.perplexity_bound <= 1:
            raise FitError(f"the perplexity bound must be a factor above 1, not {self.perplexity_bound:g}")
        if self.text_tokens < 0:
            raise FitError(
                f"text_tokens must be a number of tokens, or 0 for no check of long texts, not {self.text_tokens}"
            )
        if self.text_count < 1:
            raise FitError(f"text_count must be at least 1, not {self.text_count}")


def calibrate(
    lm: LanguageModel,
    profile: Profile,
    pairs: Preferences,
    settings: CalibrationSettings | None = None,
    *,
    progress: Progress | None = None,
) -> Profile:
    """Set a profile's unit and safe range, and measure its held-out margins, on the prompts of preference data.

    If the profile was fitted on the same data, only the rows that it was not trained on are used. `calibrate_on`
    describes the measurement. Raises ProfileMismatch for a profile of another model unless `allow_model_mismatch` is
    set, DataError for rows that this model cannot use, FitError if the calibration fails.
    """
    settings = settings or CalibrationSettings()
    profile.check_model(lm.identity, allow_mismatch=settings.allow_model_mismatch)
    corpus = corpus_for(lm, pairs, skip_long_rows=settings.skip_long_rows)
    _, fresh = trained_and_fresh(profile, corpus)
    calibrated = calibrate_on(
        lm,
        profile,
        prompts_with_room(lm, fresh.pairs, room=SAMPLED_TOKENS, seed=settings.seed),
        settings,
        progress=progress,
    )
    with steerable(lm) as steered:
        report = propensity_report(steered, calibrated, fresh.sides().thinned(REPORT_ROWS))
    metrics: Metrics = {**calibrated.metrics, "propensity": report}
    calibration: Calibration = {**calibrated.calibration}
    if corpus.notes:
        calibration["notes"] = corpus.notes
    return replace(calibrated, metrics=metrics, calibration=calibration)


def trained_and_fresh(profile: Profile, corpus: Corpus) -> tuple[Corpus | None, Corpus]:
    """Split data into the rows that a profile was trained on and the others; None and all rows for other data."""
    options = profile.method_options
    if corpus.pairs.sha256 != profile.data.get("sha256") or "heldout_fraction" not in options:
        return None, corpus
    return corpus.split(float(options["heldout_fraction"]), int(options["seed"]), min_side=4)


def calibrate_on(
    lm: LanguageModel,
    profile: Profile,
    prompts: Sequence[Sequence[int]],
    settings: CalibrationSettings,
    *,
    tokens: int = SAMPLED_TOKENS,
    start: float | None = None,
    progress: Progress | None = None,
) -> Profile:
    """Set a profile's unit and safe range on prompts of token ids. `start` is a guess at the unit, if there is one.

    The unit c is the coefficient at which KL(steered‖base) at strength 1 is the budget. The mean is
    taken over the whole vocabulary and over the steered positions of texts that the steered model samples after the
    prompts (temperature 1, at most `tokens` tokens each, up to and including an end-of-text token).

    1. A rough search on 48 texts samples them again at every candidate c, with the same random numbers.
    2. A second search samples 192 texts at every candidate. It ends within 5 % of the budget, or after four candidates
       with the closest. It begins where the first one ended, with the power of c by which KL grew there.
    3. If the budget is not reached even at the c that makes the shift as long as the median residual norm at some
       block, that c is taken and the calibration says `unreached`.

    The safe range is read from the curve of perplexity over strength (see `measure_curve`), and each end of it becomes
    smaller if long texts have faults there (see `safe_range`); it is at least ±0.1. As far as the model's context is
    too short, longer texts are not checked. Raises FitError without prompts or residual norms.
    """
    if not prompts:
        raise FitError("there is no prompt to calibrate on; add rows with other prompts")
    rows = [prompts[i % len(prompts)] for i in range(max(ROWS, len(prompts)))]
    with steerable(lm) as steered:
        found, cost = UnitSearch(steered, profile, rows, tokens, settings.seed, progress).find_unit(
            settings.kl_budget, start
        )
        profile = replace(profile, unit=found.coefficient)
        curve = measure_curve(
            steered, profile, rows[:TEXTS],
            bound=settings.perplexity_bound, tokens=tokens, seed=settings.seed, progress=progress,
        )  # fmt: skip
        safe = max(MIN_SAFE_STRENGTH, safe_strength(curve, settings.perplexity_bound))
        low, high, checked = -safe, safe, None
        if settings.text_tokens:
            (low, high), checked = _checked_on_long_texts(steered, profile, prompts, safe, settings, progress)
        low, high = min(low, -MIN_SAFE_STRENGTH), max(high, MIN_SAFE_STRENGTH)
    calibration: Calibration = {
        "kl_budget": settings.kl_budget,
        "kl_at_1": cost.per_token,
        "kl_per_character": cost.per_character,
        "tokens": cost.tokens,
        "prompts": len(prompts),
        "prompts_sha256": hashlib.sha256(json.dumps([list(prompt) for prompt in prompts]).encode()).hexdigest(),
        "unreached": found.unreached,
        "texts": len(rows),
        "seed": settings.seed,
        "perplexity_bound": settings.perplexity_bound,
        "curve": curve_record(curve),
    }
    if checked is not None:
        calibration["long_texts"] = checked
    return replace(profile, max_strength=high, min_strength=None if low == -high else low, calibration=calibration)


def _checked_on_long_texts(
    steered: SteeredModel,
    profile: Profile,
    prompts: Sequence[Sequence[int]],
    safe: float,
    settings: CalibrationSettings,
    progress: Progress | None,
) -> tuple[tuple[float, float], LongTextCheck]:
    """The safe range by long texts, within ±`safe`, and how it was measured. Prompts that leave no room for them are
    left out if there are others; else the texts are shorter."""
    limit, tokens, count, done = context_limit(steered.lm), settings.text_tokens, settings.text_count, 0
    fitting = [prompt for prompt in prompts if limit is None or len(prompt) + tokens <= limit]
    if limit is not None and not fitting:
        tokens = limit - max(map(len, prompts))
    rows = [(fitting or prompts)[i % len(fitting or prompts)] for i in range(count)]

    def measure(strengths: Sequence[float]) -> list[LongTextPoint]:
        nonlocal done
        found = measure_long_texts(
            steered, profile, strengths, rows, tokens=tokens, seed=settings.seed, compared=COMPARED_TEXTS
        )
        done += 1
        if progress is not None:
            progress("texts", min(done, EXPECTED_CHECKS - 1), EXPECTED_CHECKS)
        return found

    if progress is not None:
        progress("texts", 0, EXPECTED_CHECKS)
    found, points = safe_range(measure, safe, texts=count, bound=settings.perplexity_bound)
    if progress is not None:
        progress("texts", EXPECTED_CHECKS, EXPECTED_CHECKS)
    unsteered = next(point for point in points if point["strength"] == 0)
    return found, {
        "tokens": tokens,
        "texts": count,
        "short_range": safe,
        "tells_endings": tells_endings(unsteered, texts=count),
        "points": points,
    }


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of steering over sampled texts, in nats of KL(steered‖base)."""

    per_token: float
    per_character: float | None
    tokens: int

    @classmethod
    def of(cls, lm: LanguageModel, divergence: float, texts: Sequence[Sequence[int]]) -> Cost:
        """The cost of texts, from their KL in all. Raises FitError if it is not finite."""
        total, tokens = finite(divergence), sum(map(len, texts))
        characters = sum(map(len, lm.tokenizer.batch_decode(list(map(list, texts)), skip_special_tokens=True)))
        return cls(total / max(tokens, 1), total / characters if characters else None, tokens)


@dataclass(frozen=True, slots=True)
class Reached:
    """The result of a search: the coefficient, its KL in nats per token, and whether the budget is out of reach."""

    coefficient: float
    kl: float
    unreached: bool = False


class UnitSearch:
    """The search for the coefficient at which a profile costs the budget."""

    def __init__(
        self,
        steered: SteeredModel,
        profile: Profile,
        prompts: Sequence[Sequence[int]],
        tokens: int,
        seed: int,
        progress: Progress | None,
    ) -> None:
        self._steered, self._profile, self._prompts = steered, profile, prompts
        self._tokens, self._seed, self._progress = tokens, seed, progress
        self._done = 0

    def find_unit(self, budget: float, start: float | None = None) -> tuple[Reached, Cost]:
        """Return the coefficient that meets the budget, and the cost there. `start` is the first one tried."""
        largest = largest_coefficient(self._profile)
        few: dict[float, Cost] = {}
        rough = search(
            self._costs(few, ROUGH_ROWS), largest, budget,
            start=min(start or START * largest, largest), tolerance=ROUGH_TOLERANCE, evaluations=ROUGH_EVALUATIONS,
        )  # fmt: skip
        power = _power({coefficient: cost.per_token for coefficient, cost in few.items()}, budget)
        all_texts: dict[float, Cost] = {}
        found = search(
            self._costs(all_texts, len(self._prompts)), largest, budget,
            start=min(rough.coefficient * math.exp(math.log(budget / max(rough.kl, MIN_KL)) / power), largest),
            tolerance=TOLERANCE, evaluations=EVALUATIONS, power=power,
        )  # fmt: skip
        self._report(last=True)
        return found, all_texts[found.coefficient]

    def _costs(self, found: dict[float, Cost], texts: int) -> Callable[[float], float]:
        """A function that samples the first texts at a coefficient, notes their cost, and returns their KL."""

        def kl_at(coefficient: float) -> float:
            self._report()
            profile, prompts = replace(self._profile, unit=coefficient), self._prompts[:texts]
            (one,) = self._steered.sample_and_compare(profile, [1.0], prompts, tokens=self._tokens, seed=self._seed)
            found[coefficient] = Cost.of(self._steered.lm, float(one.divergences.sum()), one.texts)
            return found[coefficient].per_token

        return kl_at

    def _report(self, *, last: bool = False) -> None:
        expected = ROUGH_EVALUATIONS + EVALUATIONS
        self._done += 1
        if self._progress is not None:
            self._progress("calibrate", expected if last else min(self._done, expected - 1), expected)


def _power(kl: Mapping[float, float], budget: float) -> float:
    """The power of c by which KL grows between the two coefficients whose KL is closest to the budget; 2 for one."""
    nearest = sorted(kl, key=lambda coefficient: abs(math.log(max(kl[coefficient], MIN_KL) / budget)))[:2]
    if len(nearest) < 2:
        return 2.0
    one, other = nearest
    rise = math.log(max(kl[one], MIN_KL) / max(kl[other], MIN_KL)) / math.log(one / other)
    least, most = POWERS
    return min(max(rise, least), most)


def finite(divergence: float) -> float:
    """The divergence itself. Raises FitError if it is not finite."""
    if not math.isfinite(divergence):
        raise FitError("the steered model's logits are not finite: load the model with dtype float32")
    return divergence


def largest_coefficient(profile: Profile) -> float:
    """The smallest c at which ‖c·d‖ equals the median residual norm at some block (norm ratio 1)."""
    ratios = [
        profile.residual_norms.get(layer, 0.0) / norm
        for layer, shift in profile.injected().items()
        if (norm := float(shift.norm())) > 0
    ]
    if not ratios or min(ratios) <= 0:
        raise FitError(f"profile {profile.name!r} cannot be calibrated without its residual norms; fit it again")
    return min(ratios)


def search(
    kl_at: Callable[[float], float],
    largest: float,
    budget: float,
    *,
    start: float,
    tolerance: float,
    evaluations: int,
    power: float = 2.0,
) -> Reached:
    """Find c in (0, largest] with kl_at(c) within `tolerance` of the budget, by interpolation on log c.

    KL grows roughly as c^`power`. The search follows this law from `start` until the budget is bracketed.
    Then each step interpolates linearly in log-log space between the bracket's ends, or bisects the bracket if that
    point is outside its middle 90 %. Returns the closest point after `evaluations`.
    """
    low: Reached | None = None
    high: Reached | None = None
    best, guess = Reached(largest, math.inf), start
    for _ in range(evaluations):
        tried = Reached(guess, kl_at(guess))
        if _distance(tried, budget) < _distance(best, budget):
            best = tried
        if abs(tried.kl / budget - 1) <= tolerance:
            return tried
        if tried.kl < budget and guess >= largest:
            return replace(tried, unreached=True)
        low, high = (tried, high) if tried.kl < budget else (low, tried)
        guess = _next(low, high, largest, budget, power)
    return best


def _next(low: Reached | None, high: Reached | None, largest: float, budget: float, power: float) -> float:
    if low is not None and high is not None:
        return _between(low, high, budget)
    end = low or high
    assert end is not None
    factor = min(max(math.exp(math.log(budget / max(end.kl, MIN_KL)) / power), 0.1), 10.0)
    return min(end.coefficient * factor, largest)


def _between(low: Reached, high: Reached, budget: float) -> float:
    width = math.log(high.coefficient / low.coefficient)
    rise = math.log(max(high.kl, MIN_KL) / max(low.kl, MIN_KL))
    share = math.log(budget / max(low.kl, MIN_KL)) / rise if rise > 0 else 0.5
    return low.coefficient * math.exp(width * (share if 0.05 < share < 0.95 else 0.5))


def _distance(reached: Reached, budget: float) -> float:
    return abs(math.log(max(reached.kl, MIN_KL) / budget))
