"""Methods side by side on the same data: each fitted profile at equal KL, its effect, its costs and controls."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from safetensors.torch import save

from steering_vectors.data.corpus import encode_corpus, prompts_with_room
from steering_vectors.data.preferences import Preferences
from steering_vectors.errors import FitError
from steering_vectors.evaluation.preference_suite import EvaluationSettings, PreferenceSuite
from steering_vectors.fitting.calibration import (
    DEFAULT_KL_BUDGET,
    SAMPLED_TOKENS,
    CalibrationSettings,
    calibrate_on,
    trained_and_fresh,
)
from steering_vectors.fitting.fit import FitSettings, fit
from steering_vectors.measures import results
from steering_vectors.measures.controls import random_controls
from steering_vectors.measures.steered_model import steerable
from steering_vectors.methods import method_named, method_names
from steering_vectors.models.limits import context_limit
from steering_vectors.models.loading import LanguageModel
from steering_vectors.profiles.metadata import OptionValue
from steering_vectors.profiles.profile import Profile
from steering_vectors.progress import Progress
from steering_vectors.tuning.instructions import instructions_for

STRENGTHS = (-1.0, 0.0, 1.0)


@dataclass(frozen=True, slots=True)
class ComparisonSettings:
    """Options of `compare_methods`.

    - `methods`: names of methods, all if empty. `options`: by method, its own options.
    - `goal`: the name under which methods that use instructions look for theirs, as a profile's name does in `fit`.
    - `layers`, `heldout_fraction`, `kl_budget`, `seed`, `skip_long_rows`: as in `FitSettings`, the same for all.
    - `rows`: the maximum number of held-out rows that are measured.
    - `randoms`: the number of random directions, at the blocks of the first profile and at the same KL.
    """

    methods: Sequence[str] = ()
    options: Mapping[str, Mapping[str, OptionValue]] = field(default_factory=dict)
    goal: str = "helpful"
    layers: str | Sequence[int] = "auto"
    heldout_fraction: float = 0.2
    kl_budget: float = DEFAULT_KL_BUDGET
    rows: int = 256
    randoms: int = 3
    seed: int = 0
    skip_long_rows: bool = False

    def __post_init__(self) -> None:
        for name in (*self.methods, *self.options):
            method_named(name)
        if unused := self.options.keys() - set(self.chosen):
            raise FitError(f"options are given for {min(unused)}, which is not compared")

    @property
    def chosen(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.methods)) or method_names()


def compare_methods(
    lm: LanguageModel,
    pairs: Preferences,
    settings: ComparisonSettings | None = None,
    *,
    progress: Progress | None = None,
) -> tuple[results.MethodComparison, list[Profile]]:
    """Fit each method to the same training rows, calibrate it to the same KL, and measure it on the same held-out rows.

    Returns the figures and the profiles, which are named after their methods. A method that cannot be fitted to this
    data is listed with its reason; FitError is raised if all fail.
    """
    settings = settings or ComparisonSettings()
    profiles: dict[str, Profile] = {}
    seconds: dict[str, float] = {}
    failed: dict[str, str] = {}
    for name in settings.chosen:
        start = time.perf_counter()
        try:
            fitted = fit(lm, pairs, _fit_settings(settings, name), progress=_named(progress, name))
        except FitError as error:
            failed[name] = error.message
            continue
        profiles[name], seconds[name] = replace(fitted, name=name), time.perf_counter() - start
    if not profiles:
        raise FitError("; ".join(f"{name}: {reason}" for name, reason in failed.items()))
    limit = context_limit(lm)
    corpus = encode_corpus(lm.tokenizer, pairs, limit=limit, skip_long_rows=settings.skip_long_rows)
    _, fresh = trained_and_fresh(next(iter(profiles.values())), corpus)
    prompts = prompts_with_room(lm, fresh.pairs, room=SAMPLED_TOKENS, seed=settings.seed)
    controls = []
    for control in random_controls(next(iter(profiles.values())), settings.randoms, seed=settings.seed):
        start = time.perf_counter()
        at_budget = calibrate_on(
            lm,
            control,
            prompts,
            CalibrationSettings(kl_budget=settings.kl_budget, seed=settings.seed),
            progress=progress,
        )
        controls.append((at_budget, time.perf_counter() - start))
    with steerable(lm) as steered:
        suite = PreferenceSuite(
            steered,
            fresh,
            EvaluationSettings(STRENGTHS, settings.rows, settings.randoms, 0, settings.seed),
            progress,
        )
        rows = [
            _measured(suite, profile, prompts, taken)
            for profile, taken in [*((profiles[name], seconds[name]) for name in profiles), *controls]
        ]
        found: results.MethodComparison = {
            "model": lm.identity.id,
            "data": suite.data,
            "unit": suite.unit,
            "kl_budget": settings.kl_budget,
            "methods": rows,
            "prompting": suite.prompting(instructions_for(settings.goal), limit),
            "failed": failed,
        }
    return found, list(profiles.values())


def _fit_settings(settings: ComparisonSettings, name: str) -> FitSettings:
    return FitSettings(
        name=settings.goal,
        method=name,
        options=settings.options.get(name, {}),
        layers=settings.layers,
        heldout_fraction=settings.heldout_fraction,
        kl_budget=settings.kl_budget,
        seed=settings.seed,
        skip_long_rows=settings.skip_long_rows,
    )


def _measured(
    suite: PreferenceSuite, profile: Profile, prompts: Sequence[Sequence[int]], seconds: float
) -> results.ComparedMethod:
    return {
        **suite.margins(profile),
        "method": profile.method,
        "layers": list(profile.layers),
        "max_strength": profile.max_strength,
        "kl_at_1": profile.calibration["kl_at_1"],
        "costs": suite.costs(profile, prompts),
        "seconds": seconds,
        "stored_bytes": len(save({str(layer): one for layer, one in profile.directions.items()})),
        "notes": list(profile.metrics.get("notes", [])),
    }


def _named(progress: Progress | None, method: str) -> Progress | None:
    """The progress with stages named after the method too."""
    if progress is None:
        return None

    def report(stage: str, done: int, total: int, /, detail: str = "") -> None:
        progress(f"{method}: {stage}", done, total, detail=detail)

    return report
