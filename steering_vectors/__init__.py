"""Preference vectors for language models: fit them, store them, steer with them.

    lm = load_model("demo")
    pairs = load_pairs("preferences.jsonl")
    profile = fit(lm, pairs, FitSettings(name="warm", method="mean-diff"))
    with steer(lm.model, profile, strength=0.8):
        lm.model.generate(...)

`fit(model, tokenizer, pairs, name="warm")` does the same for a model of transformers.

The names in `__all__` are the public interface. They are imported at their first use, so that `import steering_vectors`
does not load torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from steering_vectors.data.preferences import Preferences
    from steering_vectors.data.sources import load_pairs
    from steering_vectors.distillation.baking import bake
    from steering_vectors.distillation.lora import (
        Distilled,
        DistillSettings,
        MethodTarget,
        distill,
        distill_method,
        paper_settings,
    )
    from steering_vectors.evaluation.preference_suite import EvaluationSettings, evaluate
    from steering_vectors.evaluation.reward import Reward
    from steering_vectors.evaluation.trust.suite import TrustSettings, evaluate_trust
    from steering_vectors.fitting.calibration import CalibrationSettings, calibrate
    from steering_vectors.fitting.fit import FitSettings, fit
    from steering_vectors.fitting.gates import GatePrompts, load_gate_prompts
    from steering_vectors.measures.results import PreferenceEvaluation, TrustEvaluation
    from steering_vectors.models.blocks import find_blocks
    from steering_vectors.models.loading import LanguageModel, load_model, wrap_model
    from steering_vectors.profiles.files import load_profile, profile_summary, save_profile
    from steering_vectors.profiles.metadata import Calibration, DataRecord, Metrics, ProfileSummary
    from steering_vectors.profiles.mixture import Mixture, Term
    from steering_vectors.profiles.profile import Profile
    from steering_vectors.steering.generate import steer

__all__ = [
    "Calibration",
    "CalibrationSettings",
    "DataRecord",
    "DistillSettings",
    "Distilled",
    "EvaluationSettings",
    "FitSettings",
    "GatePrompts",
    "LanguageModel",
    "MethodTarget",
    "Metrics",
    "Mixture",
    "PreferenceEvaluation",
    "Preferences",
    "Profile",
    "ProfileSummary",
    "Reward",
    "Term",
    "TrustEvaluation",
    "TrustSettings",
    "bake",
    "calibrate",
    "distill",
    "distill_method",
    "evaluate",
    "evaluate_trust",
    "find_blocks",
    "fit",
    "load_gate_prompts",
    "load_model",
    "load_pairs",
    "load_profile",
    "paper_settings",
    "profile_summary",
    "save_profile",
    "steer",
    "wrap_model",
]

_MODULES = {
    "data.preferences": ("Preferences",),
    "data.sources": ("load_pairs",),
    "distillation.baking": ("bake",),
    "distillation.lora": (
        "DistillSettings",
        "Distilled",
        "MethodTarget",
        "distill",
        "distill_method",
        "paper_settings",
    ),
    "evaluation.preference_suite": ("EvaluationSettings", "evaluate"),
    "evaluation.reward": ("Reward",),
    "evaluation.trust.suite": ("TrustSettings", "evaluate_trust"),
    "fitting.calibration": ("CalibrationSettings", "calibrate"),
    "fitting.fit": ("FitSettings", "fit"),
    "fitting.gates": ("GatePrompts", "load_gate_prompts"),
    "measures.results": ("PreferenceEvaluation", "TrustEvaluation"),
    "models.blocks": ("find_blocks",),
    "models.loading": ("LanguageModel", "load_model", "wrap_model"),
    "profiles.files": ("load_profile", "profile_summary", "save_profile"),
    "profiles.metadata": ("Calibration", "DataRecord", "Metrics", "ProfileSummary"),
    "profiles.mixture": ("Mixture", "Term"),
    "profiles.profile": ("Profile",),
    "steering.generate": ("steer",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
