"""Reward against KL: the gain of a profile beside the KL-regularised optimum.

The best policy at a given divergence from the model p₀ is p*(x) ∝ p₀(x)·exp(r(x)/β) (Korbak et al., arXiv:2205.11275):
texts sampled from p₀, weighted by the softmax of r/β.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from steering_vectors.errors import FitError
from steering_vectors.evaluation.reward import Reward
from steering_vectors.measures.controls import bootstrap
from steering_vectors.measures.results import OptimumRecord, RewardCurve, RewardPoint
from steering_vectors.measures.steered_model import SteeredModel
from steering_vectors.profiles.profile import Profile
from steering_vectors.progress import Progress

PROMPTS = 16
STEERED_TEXTS = 8  # per prompt and strength
MIN_EFFECTIVE = 8.0  # effective samples that an estimate needs
GRID = tuple(2.0 ** (power / 2) for power in range(-6, 9))  # of 1/β, in units of 1 / standard deviation of r
HALVINGS = 60


def optimum(rewards: np.ndarray, sharpness: float) -> OptimumRecord:
    """The optimum for β = 1/`sharpness`, from rewards `[prompts, samples]` of texts that the model itself sampled.
    β < 0 is the policy that seeks low reward. Figures are means over prompts.

    With weights w = softmax(r/β) over a prompt's N samples, the self-normalised estimates are E[r] = Σ w·r and
    KL = Σ w·log(N·w) = E[r]/β − log mean exp(r/β). KL cannot exceed log N, and is too low where few samples carry the
    weight.
    """
    scaled = sharpness * rewards
    logs = scaled - scaled.max(1, keepdims=True)
    logs -= np.log(np.exp(logs).sum(1, keepdims=True))
    weights = np.exp(logs)
    kl = (weights * (logs + math.log(rewards.shape[1]))).sum(1)
    return {
        "beta": 1 / sharpness if sharpness else math.inf,
        "reward": float((weights * rewards).sum(1).mean()),
        "kl": float(np.maximum(kl, 0).mean()),
        "effective": float((1 / (weights**2).sum(1)).mean()),
    }


def frontier(rewards: np.ndarray) -> list[OptimumRecord]:
    """The optimum over a range of β of both signs, by rising reward; empty if all texts score alike."""
    scale = float(rewards.std(1).mean())
    if scale == 0:
        return []
    steps = [*(-step for step in reversed(GRID)), *GRID]
    return [optimum(rewards, step / scale) for step in steps]


def optimum_at(rewards: np.ndarray, kl: float, sign: int) -> OptimumRecord | None:
    """The optimum that costs `kl` nats per text, towards high (`sign` 1) or low (−1) reward; None if the samples do
    not reach that KL, or if fewer than 8 effective samples would carry it."""
    scale = float(rewards.std(1).mean())
    if scale == 0 or kl <= 0:
        return None
    low, high = math.log(1e-6 / scale), math.log(1e6 / scale)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if optimum(rewards, sign * math.exp(middle))["kl"] < kl else (low, middle)
    found = optimum(rewards, sign * math.exp(high))
    shown = math.isclose(found["kl"], kl, rel_tol=1e-3) and found["effective"] >= MIN_EFFECTIVE
    return found if shown else None


def reward_curve(
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
) -> RewardCurve:
    """Measure reward against KL(steered‖base) for a profile at each strength, beside the KL-regularised optimum.

    For each of at most 16 prompts, `samples` texts of at most `tokens` tokens are drawn from the unsteered model, and 8
    at each other strength. The KL of a text is the sum of the exact divergences at its tokens, so the mean over texts
    is the divergence of whole texts, in nats. Intervals are 95 % bootstrap over prompts. `optimum` is the best mean
    reward at a strength's KL, `share` the part of that gain that the profile makes; both are None where the samples do
    not show the optimum (see `optimum_at`).

    Raises FitError without prompts, for fewer than two samples, and for scores that are not finite.
    """
    if not prompts or samples < 2:
        raise FitError("reward against KL needs prompts, and at least two samples each")
    prompts = prompts[:PROMPTS]

    def sampled(strength: float, each: int, seed: int) -> tuple[np.ndarray, float]:
        """The rewards of sampled texts, float64 `[prompts, texts]`, and their mean KL in nats per text."""
        steered.write(profile, strength)
        rows = [prompt for prompt in prompts for _ in range(each)]
        texts = steered.sample(rows, tokens=tokens, seed=seed)
        scores = reward(steered.lm.tokenizer.batch_decode(texts, skip_special_tokens=True))
        if not bool(np.isfinite(scores).all()):
            raise FitError("the reward gave a score that is not finite")
        rewards = np.asarray(scores, dtype=np.float64).reshape(len(prompts), each)
        if not strength:
            return rewards, 0.0
        examples = [([*prompt, *text], len(prompt)) for prompt, text in zip(rows, texts, strict=True)]
        return rewards, float(steered.divergences(examples)[0].mean())

    base, _ = sampled(0.0, samples, seed)
    points: list[RewardPoint] = []
    for number, strength in enumerate(strengths, start=1):
        if progress is not None:
            progress("reward", number, len(strengths) + 1)
        rewards, kl = sampled(strength, STEERED_TEXTS, seed + 1) if strength else (base, 0.0)
        points.append(_point(strength, rewards, kl, base, seed))
    if progress is not None:
        progress("reward", len(strengths) + 1, len(strengths) + 1)
    return {
        "prompts": len(prompts),
        "samples_per_prompt": samples,
        "texts_per_prompt": STEERED_TEXTS,
        "kl_unit": "nats per text",
        "kl_limit": math.log(samples),
        "strengths": points,
        "optimum": frontier(base),
    }


def _point(strength: float, rewards: np.ndarray, kl: float, base: np.ndarray, seed: int) -> RewardPoint:
    """The figures of rewards `[prompts, texts]`, beside those of the unsteered model."""
    means = rewards.mean(1)  # [prompts]
    best = optimum_at(base, kl, 1 if strength > 0 else -1)
    start = float(base.mean())
    return {
        "strength": strength,
        "reward": float(means.mean()),
        "reward_95": bootstrap(lambda rows: float(means[rows].mean()), len(means), seed=seed),
        "kl": kl,
        "optimum": best["reward"] if best else None,
        "share": (float(means.mean()) - start) / (best["reward"] - start) if best else None,
    }
