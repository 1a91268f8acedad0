"""How long a profile's step is: the unit at which strength 1 costs a given divergence from the unsteered model.

Owns the search for the unit and what is stored about it. Knows nothing of data, of layers' choice or of files; prompts
come as token ids. A budget per token means different things to different tokenizers, so the cost per character is
stored beside it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from steering_vectors.batches import Progress
from steering_vectors.errors import FitError
from steering_vectors.models import LanguageModel
from steering_vectors.profile import Profile
from steering_vectors.steered import SteeredModel, steerable

DEFAULT_KL_BUDGET = 0.1  # nats per token
SAMPLED_TOKENS = 48
ROWS = 96  # texts per measurement; fewer prompts are sampled several times each
TOLERANCE = 0.03
EVALUATIONS = 12


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
    tokens: int = SAMPLED_TOKENS,
    seed: int = 0,
    progress: Progress | None = None,
) -> Profile:
    """The profile with the unit c at which KL(steered‖base) at α = 1 is `kl_budget` nats per token.

    The mean is over the steered positions of texts that the steered model writes after the prompts (T = 1, at most
    `tokens` each, up to and with the token that ends one), over the whole vocabulary. Every candidate c is measured
    with the same random numbers. The search ends within 3 % of the budget or after 12 measurements. If even the c that
    makes the shift as long as the median residual norm at some block stays below the budget, that c is taken and
    `unreached` stored. Raises FitError without prompts, residual norms or a positive budget.
    """
    if not prompts:
        raise FitError("there is no prompt to calibrate on; add rows with other prompts")
    check_budget(kl_budget)
    rows = [prompts[i % len(prompts)] for i in range(max(ROWS, len(prompts)))]
    costs: dict[float, Cost] = {}
    with steerable(lm) as steered:

        def kl_at(coefficient: float) -> float:
            costs[coefficient] = cost_at(steered, replace(profile, unit=coefficient), rows, tokens=tokens, seed=seed)
            if progress is not None:
                progress("calibrate", len(costs), EVALUATIONS)
            return costs[coefficient].per_token

        found = search(kl_at, largest_coefficient(profile), kl_budget, tolerance=TOLERANCE, evaluations=EVALUATIONS)
    if progress is not None:
        progress("calibrate", EVALUATIONS, EVALUATIONS)
    cost = costs[found.coefficient]
    calibration = {
        "kl_budget": kl_budget,
        "kl_at_1": cost.per_token,
        "kl_per_character": cost.per_character,
        "unreached": found.unreached,
        "prompts": len(prompts),
        "prompts_sha256": hashlib.sha256(json.dumps([list(prompt) for prompt in prompts]).encode()).hexdigest(),
        "texts": len(rows),
        "tokens": cost.tokens,
        "seed": seed,
    }
    return replace(profile, unit=found.coefficient, calibration=calibration)


def cost_at(
    steered: SteeredModel, profile: Profile, prompts: Sequence[Sequence[int]], *, tokens: int, seed: int
) -> Cost:
    """What a profile costs at strength 1, over texts that the steered model writes. Raises FitError if not finite."""
    steered.write(profile, 1.0)
    texts = steered.sample(prompts, tokens=tokens, seed=seed)
    examples = [([*prompt, *text], len(prompt)) for prompt, text in zip(prompts, texts, strict=True)]
    sums, counts = steered.divergences(examples)
    total, count = float(sums.sum()), int(counts.sum())
    if not math.isfinite(total):
        raise FitError("the steered model's logits are not finite: load the model with --dtype float32")
    characters = sum(len(text) for text in steered.lm.tokenizer.batch_decode(texts, skip_special_tokens=True))
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
    kl_at: Callable[[float], float], largest: float, budget: float, *, tolerance: float, evaluations: int
) -> Reached:
    """Find c in (0, largest] with kl_at(c) within `tolerance` of the budget, by bisection on log c.

    KL grows about as c² while it is small, so each step tries the point that a straight line in log-log through the
    bracket's ends predicts, and halves the bracket where that falls outside its middle 90 %.
    """
    top = Reached(largest, kl_at(largest))
    if top.kl < budget * (1 - tolerance):
        return replace(top, unreached=True)
    low, high, best, used = None, top, top, 1
    while abs(best.kl / budget - 1) > tolerance and used < evaluations:
        guess = _between(low, high, budget)
        tried, used = Reached(guess, kl_at(guess)), used + 1
        if abs(math.log(max(tried.kl, 1e-12) / budget)) < abs(math.log(max(best.kl, 1e-12) / budget)):
            best = tried
        low, high = (tried, high) if tried.kl < budget else (low, tried)
    return best


def _between(low: Reached | None, high: Reached, budget: float) -> float:
    """The next coefficient to try; without a lower end, the one that KL ∝ c² predicts."""
    if low is None:
        return high.coefficient * min(math.sqrt(budget / high.kl), 0.9)
    width = math.log(high.coefficient / low.coefficient)
    rise = math.log(max(high.kl, 1e-12) / max(low.kl, 1e-12))
    share = math.log(budget / max(low.kl, 1e-12)) / rise if rise > 0 else 0.5
    return low.coefficient * math.exp(width * (share if 0.05 < share < 0.95 else 0.5))


def check_budget(kl_budget: float) -> None:
    if not math.isfinite(kl_budget) or kl_budget <= 0:
        raise FitError(f"the KL budget must be a positive number of nats per token, not {kl_budget:g}")
