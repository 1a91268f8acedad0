"""What reward a profile gains for the divergence it costs, beside the best that any steering could.

Owns the KL-regularised optimum as samples show it, and the measurement of profiles against it. Knows nothing of how a
reward comes about. The best policy at a given divergence from the model p₀ is p*(x) ∝ p₀(x)·exp(r(x)/β) (Korbak et al.,
arXiv:2205.11275): texts sampled from p₀, weighted by the softmax of r/β.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from steering_vectors.errors import FitError
from steering_vectors.evaluation.reward import Reward
from steering_vectors.measures.controls import bootstrap
from steering_vectors.measures.steered_model import SteeredModel
from steering_vectors.profiles.profile import Profile
from steering_vectors.progress import Progress

PROMPTS = 16
STEERED_TEXTS = 8  # per prompt and strength
LEAST_EFFECTIVE = 8.0  # samples that the weights must leave for an estimate to count
GRID = tuple(2.0 ** (power / 2) for power in range(-6, 9))  # of 1/β, in units of 1 / standard deviation of r
HALVINGS = 60


@dataclass(frozen=True, slots=True)
class OptimumPoint:
    """The optimum at one β, over prompts: expected reward, KL(p*‖p₀) in nats per text, and how many samples per prompt
    the weights leave (1/Σw²), the mean. β < 0 is the policy that seeks low reward."""

    beta: float
    reward: float
    kl: float
    effective: float


def optimum(rewards: np.ndarray, sharpness: float) -> OptimumPoint:
    """The optimum for β = 1/`sharpness`, from rewards of texts that the model itself wrote: `[prompts, samples]`.

    With weights w = softmax(r/β) over a prompt's N samples, E[r] = Σ w·r and KL = Σ w·log(N·w) = E[r]/β − log mean
    exp(r/β), the self-normalised estimates; KL cannot exceed log N, and is too low where few samples carry the weight.
    """
    scaled = sharpness * rewards
    logs = scaled - scaled.max(1, keepdims=True)
    logs -= np.log(np.exp(logs).sum(1, keepdims=True))
    weights = np.exp(logs)
    kl = (weights * (logs + math.log(rewards.shape[1]))).sum(1)
    return OptimumPoint(
        beta=1 / sharpness if sharpness else math.inf,
        reward=float((weights * rewards).sum(1).mean()),
        kl=float(np.maximum(kl, 0).mean()),
        effective=float((1 / (weights**2).sum(1)).mean()),
    )


def frontier(rewards: np.ndarray) -> list[OptimumPoint]:
    """The optimum over a range of β of both signs, by rising reward; empty where all texts score alike."""
    scale = float(rewards.std(1).mean())
    if scale == 0:
        return []
    steps = [*(-step for step in reversed(GRID)), *GRID]
    return [optimum(rewards, step / scale) for step in steps]


def optimum_at(rewards: np.ndarray, kl: float, sign: int) -> OptimumPoint | None:
    """The optimum that costs `kl` nats per text, towards high (`sign` 1) or low (−1) reward; None if the samples do
    not reach so far, or too few of them would carry it."""
    scale = float(rewards.std(1).mean())
    if scale == 0 or kl <= 0:
        return None
    low, high = math.log(1e-6 / scale), math.log(1e6 / scale)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if optimum(rewards, sign * math.exp(middle)).kl < kl else (low, middle)
    found = optimum(rewards, sign * math.exp(high))
    return found if math.isclose(found.kl, kl, rel_tol=1e-3) and found.effective >= LEAST_EFFECTIVE else None


def reward_report(
    steered: SteeredModel,
    profile: Profile,
    reward: Reward,
    prompts: Sequence[Sequence[int]],
    strengths: Sequence[float],
    *,
    samples: int,
    tokens: int,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Reward against KL(steered‖base) for a profile at every strength, and the optimum's frontier; ready for JSON.

    `samples` texts per prompt are drawn from the unsteered model, 8 per prompt at every other strength, of at most
    `tokens` tokens each. A text's KL is the sum of the exact divergences at its tokens, so their mean over texts of the
    steered model is the divergence of whole texts, in nats. Intervals are 95 % bootstrap over prompts. `optimum` of a
    strength is the best reward at its KL, and `share` how much of that gain the profile makes: None where the samples
    do not show it (see `optimum_at`). Raises FitError without prompts, or for scores that are not finite.
    """
    if not prompts or samples < 2:
        raise FitError("reward against KL needs prompts, and at least two samples each")
    prompts = prompts[:PROMPTS]

    def told(done: int) -> None:
        if progress is not None:
            progress("reward", done, len(strengths) + 1)

    def scored(strength: float, each: int, seed: int) -> tuple[np.ndarray, float]:
        steered.write(profile, strength)
        rows = [prompt for prompt in prompts for _ in range(each)]
        texts = steered.sample(rows, tokens=tokens, seed=seed)
        scores = _finite(reward(steered.lm.tokenizer.batch_decode(texts, skip_special_tokens=True)))
        examples = [([*prompt, *text], len(prompt)) for prompt, text in zip(rows, texts, strict=True)]
        kl = float(steered.divergences(examples)[0].mean()) if strength else 0.0
        return scores.reshape(len(prompts), each), kl

    base, _ = scored(0.0, samples, seed)
    told(1)
    points = []
    for number, strength in enumerate(strengths, start=2):
        found, kl = scored(strength, STEERED_TEXTS, seed + 1) if strength else (base, 0.0)
        points.append(_point(strength, found, kl, base, seed))
        told(number)
    return {
        "prompts": len(prompts),
        "samples_per_prompt": samples,
        "texts_per_prompt": STEERED_TEXTS,
        "kl_unit": "nats per text",
        "kl_limit": math.log(samples),
        "strengths": points,
        "optimum": [asdict(point) for point in frontier(base)],
    }


def _point(strength: float, found: np.ndarray, kl: float, base: np.ndarray, seed: int) -> dict[str, Any]:
    means = found.mean(1)  # [prompts]
    best = optimum_at(base, kl, 1 if strength > 0 else -1)
    gain = float(means.mean() - base.mean())
    return {
        "strength": strength,
        "reward": float(means.mean()),
        "reward_95": bootstrap(lambda rows: float(means[rows].mean()), len(means), seed=seed),
        "kl": kl,
        "optimum": best.reward if best else None,
        "share": gain / (best.reward - float(base.mean())) if best else None,
    }


def _finite(scores: np.ndarray) -> np.ndarray:
    if not bool(np.isfinite(scores).all()):
        raise FitError("the reward gave a score that is not finite")
    return np.asarray(scores, dtype=np.float64)
