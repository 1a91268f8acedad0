"""The gates that a candidate must pass: better on held-out votes, and costs within bounds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from typing_extensions import TypedDict

from server.learning.comparison import Compared
from steering_vectors.errors import FitError
from steering_vectors.profiles.profile import Profile


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a candidate may cost, compared with the version that is served.

    - `confidence` of the interval of the difference on held-out votes, which must lie above 0.
    - `min_prompts`: held-out prompts with votes, below which nothing is decided.
    - `max_kl_ratio`, `max_perplexity_ratio`: factors over KL(steered‖base) per token, and over the unsteered perplexity
      of steered texts.
    - `max_trust_harm`: the change for the worse of the main figure of each vertical of the trust suite.

    Raises FitError for values that cannot be used.
    """

    confidence: float = 0.95
    min_prompts: int = 8
    max_kl_ratio: float = 1.25
    max_perplexity_ratio: float = 1.25
    max_trust_harm: float = 0.05

    def __post_init__(self) -> None:
        if not 0.5 <= self.confidence < 1:
            raise FitError(f"confidence must be at least 0.5 and below 1, not {self.confidence:g}")
        if self.min_prompts < 2:
            raise FitError(f"min_prompts must be at least 2, not {self.min_prompts}")
        if not min(self.max_kl_ratio, self.max_perplexity_ratio) > 0 or math.isnan(self.max_trust_harm):
            raise FitError("max_kl_ratio and max_perplexity_ratio must be positive, and max_trust_harm a number")


class Gate(TypedDict):
    """One condition: `value` must be above, at least or at most `bound`, as `rule` says."""

    name: str
    value: float
    rule: str
    bound: float
    holds: bool


def gates_of(compared: Compared, candidate: Profile, baseline: Profile, bounds: Bounds, strength: float) -> list[Gate]:
    """Every gate of a candidate, passed or not."""
    kl = max(compared.baseline.kl, baseline.calibration.get("kl_budget", 0.0))
    safe = min(abs(strength), baseline.safe_limit(strength))
    gates = [
        _above("the low end of the gain on held-out votes", compared.votes.low, 0.0),
        _at_most("KL per token", compared.candidate.kl, bounds.max_kl_ratio * kl),
        _at_most(
            "perplexity", compared.candidate.perplexity, bounds.max_perplexity_ratio * compared.baseline.perplexity
        ),
        _at_least("safe strength", candidate.safe_limit(strength), safe),
    ]
    return gates + [
        _at_most(f"harm to {name}", one["harm"], bounds.max_trust_harm) for name, one in compared.trust.items()
    ]


def failed(gates: Sequence[Gate]) -> list[str]:
    """What did not hold, one sentence for each gate."""
    return [
        f"{gate['name']} is {gate['value']:.4g}, not {gate['rule']} {gate['bound']:.4g}"
        for gate in gates
        if not gate["holds"]
    ]


def _above(name: str, value: float, bound: float) -> Gate:
    return {"name": name, "value": value, "rule": "above", "bound": bound, "holds": value > bound}


def _at_most(name: str, value: float, bound: float) -> Gate:
    return {"name": name, "value": value, "rule": "at most", "bound": bound, "holds": value <= bound}


def _at_least(name: str, value: float, bound: float) -> Gate:
    return {"name": name, "value": value, "rule": "at least", "bound": bound, "holds": value >= bound}
