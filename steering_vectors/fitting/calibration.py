"""How long a profile's step is, and how many steps are safe.

Owns the search for the unit, at which strength 1 costs a given divergence from the unsteered model, and what is stored
about it; the curve over strengths and the safe range come from `curve`. Knows nothing of data, of layers' choice or of
files; prompts come as token ids. A budget per token means different things to different tokenizers, so the cost per
character is stored beside it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from steering_vectors.data.batches import Encoded
from steering_vectors.errors import FitError
from steering_vectors.measures.curve import PERPLEXITY_BOUND, TEXTS, curve_record, measure_curve, safe_strength
from steering_vectors.measures.steered_model import SteeredModel, steerable
from steering_vectors.models.loading import LanguageModel
from steering_vectors.profiles.profile import Profile
from steering_vectors.progress import Progress

DEFAULT_KL_BUDGET = 0.1  # nats per token
SAMPLED_TOKENS = 48
ROWS = 384  # texts; fewer prompts are sampled several times each
ROUGH_ROWS = 96  # of them, that the first search looks at
TOLERANCE, ROUGH_TOLERANCE = 0.03, 0.15
EVALUATIONS, ROUGH_EVALUATIONS = 6, 10
ROUNDS = 3  # of writing texts and searching on them
NEAR = 0.05  # texts written at c stand for those written at c·exp(±NEAR)
START = 0.2  # of the largest coefficient
LEAST_MOVE = 1.03  # by which the search moves until there is a bracket
TINY = 1e-12
LEAST_SAFE = 0.1


@dataclass(frozen=True, slots=True)
class Cost:
    """What steering costs over sampled texts, in nats of KL(steered‖base)."""

    per_token: float
    per_character: float | None
    tokens: int


@dataclass(frozen=True, slots=True)
class Reached:
    """Where a search ended: the coefficient, the divergence there, and whether the budget was out of reach."""

    coefficient: float
    kl: float
    unreached: bool = False


def calibrate(
    lm: LanguageModel,
    profile: Profile,
    prompts: Sequence[Sequence[int]],
    *,
    kl_budget: float = DEFAULT_KL_BUDGET,
    perplexity_bound: float = PERPLEXITY_BOUND,
    tokens: int = SAMPLED_TOKENS,
    seed: int = 0,
    progress: Progress | None = None,
) -> Profile:
    """The profile with the unit c at which KL(steered‖base) at α = 1 is `kl_budget` nats per token, with its curve, and
    with the `max_strength` up to which steered texts' perplexity is within `perplexity_bound` times that of unsteered.

    The mean is over the steered positions of texts that the steered model writes after the prompts (T = 1, at most
    `tokens` each, up to and with the token that ends one), over the whole vocabulary. A search comes near on 96 texts,
    written anew for every candidate c with the same random numbers. From there 384 texts are written, and a second
    search reads these alone, since the KL of texts written anew jumps from one c to the next; it ends within 3 % of the
    budget, and is repeated, at most three times, if it moved c by over 5 %. If even the c that makes the shift as long
    as the median residual norm at some block stays below the budget, that c is taken and `unreached` stored. The safe
    range is read from the curve (see `measure_curve`), a tenth at least. Raises FitError without prompts, residual
    norms, a positive budget or a bound above 1.
    """
    if not prompts:
        raise FitError("there is no prompt to calibrate on; add rows with other prompts")
    check_budget(kl_budget)
    check_bound(perplexity_bound)
    rows = [prompts[i % len(prompts)] for i in range(max(ROWS, len(prompts)))]
    with steerable(lm) as steered:
        bench = _Bench(steered, profile, rows, tokens, seed, progress)
        found, cost = bench.find_unit(kl_budget)
        profile = replace(profile, unit=found.coefficient)
        curve = measure_curve(
            steered, profile, rows[:TEXTS], bound=perplexity_bound, tokens=tokens, seed=seed, progress=progress
        )
    calibration = {
        "kl_budget": kl_budget,
        **_record(cost, prompts),
        "unreached": found.unreached,
        "texts": len(rows),
        "seed": seed,
        "perplexity_bound": perplexity_bound,
        "curve": curve_record(curve),
    }
    safe = max(LEAST_SAFE, safe_strength(curve, perplexity_bound))
    return replace(profile, max_strength=safe, calibration=calibration)


def _record(cost: Cost, prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
    return {
        "kl_at_1": cost.per_token,
        "kl_per_character": cost.per_character,
        "tokens": cost.tokens,
        "prompts": len(prompts),
        "prompts_sha256": hashlib.sha256(json.dumps([list(prompt) for prompt in prompts]).encode()).hexdigest(),
    }


class _Bench:
    """What a profile costs at one coefficient or another, and the one at which it costs the budget."""

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

    def find_unit(self, budget: float) -> tuple[Reached, Cost]:
        """Where the budget is met, and what texts cost there."""
        largest = largest_coefficient(self._profile)
        few = self._prompts[:ROUGH_ROWS]
        found = search(
            lambda c: self._cost(c, self._texts(c, few)).per_token, largest, budget,
            start=START * largest, tolerance=ROUGH_TOLERANCE, evaluations=ROUGH_EVALUATIONS,
        )  # fmt: skip
        for _ in range(ROUNDS):
            written = found.coefficient
            found, cost = self._find_on(self._texts(written, self._prompts), largest, budget, written)
            if abs(math.log(found.coefficient / written)) <= NEAR:
                break
        self._tell(last=True)
        return found, cost

    def _find_on(self, texts: Sequence[Encoded], largest: float, budget: float, start: float) -> tuple[Reached, Cost]:
        costs: dict[float, Cost] = {}

        def kl_at(coefficient: float) -> float:
            costs[coefficient] = self._cost(coefficient, texts)
            return costs[coefficient].per_token

        found = search(kl_at, largest, budget, start=start, tolerance=TOLERANCE, evaluations=EVALUATIONS)
        return found, costs[found.coefficient]

    def _texts(self, coefficient: float, prompts: Sequence[Sequence[int]]) -> list[Encoded]:
        self._steered.write(replace(self._profile, unit=coefficient), 1.0)
        return self._steered.continuations(prompts, tokens=self._tokens, seed=self._seed)

    def _cost(self, coefficient: float, texts: Sequence[Encoded]) -> Cost:
        self._tell()
        return cost_of(self._steered, replace(self._profile, unit=coefficient), texts)

    def _tell(self, *, last: bool = False) -> None:
        expected = ROUGH_EVALUATIONS + EVALUATIONS
        self._done += 1
        if self._progress is not None:
            self._progress("calibrate", expected if last else min(self._done, expected - 1), expected)


def cost_of(steered: SteeredModel, profile: Profile, texts: Sequence[Encoded]) -> Cost:
    """What a profile costs at strength 1 over given texts. Raises FitError if that is not finite."""
    steered.write(profile, 1.0)
    sums, counts = steered.divergences(texts)
    total, count = float(sums.sum()), int(counts.sum())
    if not math.isfinite(total):
        raise FitError("the steered model's logits are not finite: load the model with --dtype float32")
    written = [list(ids[start:]) for ids, start in texts]
    characters = sum(len(text) for text in steered.lm.tokenizer.batch_decode(written, skip_special_tokens=True))
    return Cost(total / max(count, 1), total / characters if characters else None, count)


def largest_coefficient(profile: Profile) -> float:
    """The c at which, for the first block, ‖c·d‖ equals the median residual norm there (norm ratio 1)."""
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
) -> Reached:
    """Find c in (0, largest] with kl_at(c) within `tolerance` of the budget, by bisection on log c.

    KL grows about as c² while it is small, so the search goes from `start` where that law points until the budget is
    bracketed; then each step tries the point that a straight line in log-log through the
    bracket's ends predicts, and halves the bracket where that falls outside its middle 90 %.
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
        guess = _next(low, high, largest, budget)
    return best


def _next(low: Reached | None, high: Reached | None, largest: float, budget: float) -> float:
    if low is not None and high is not None:
        return _between(low, high, budget)
    end = low or high
    assert end is not None
    factor = math.sqrt(budget / max(end.kl, TINY))
    factor = min(max(factor, LEAST_MOVE), 10.0) if low else max(min(factor, 1 / LEAST_MOVE), 0.1)
    return min(end.coefficient * factor, largest)


def _between(low: Reached, high: Reached, budget: float) -> float:
    width = math.log(high.coefficient / low.coefficient)
    rise = math.log(max(high.kl, TINY) / max(low.kl, TINY))
    share = math.log(budget / max(low.kl, TINY)) / rise if rise > 0 else 0.5
    return low.coefficient * math.exp(width * (share if 0.05 < share < 0.95 else 0.5))


def _distance(reached: Reached, budget: float) -> float:
    return abs(math.log(max(reached.kl, TINY) / budget))


def check_budget(kl_budget: float) -> None:
    if not math.isfinite(kl_budget) or kl_budget <= 0:
        raise FitError(f"the KL budget must be a positive number of nats per token, not {kl_budget:g}")


def check_bound(perplexity_bound: float) -> None:
    if not math.isfinite(perplexity_bound) or perplexity_bound <= 1:
        raise FitError(f"the perplexity bound must be a factor above 1, not {perplexity_bound:g}")
