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
    from steering_vectors.data.preferences import Preferences as Preferences
    from steering_vectors.data.sources import load_pairs as load_pairs
    from steering_vectors.distillation.baking import bake as bake
    from steering_vectors.distillation.lora import Distilled as Distilled
    from steering_vectors.distillation.lora import DistillSettings as DistillSettings
    from steering_vectors.distillation.lora import MethodTarget as MethodTarget
    from steering_vectors.distillation.lora import distill as distill
    from steering_vectors.distillation.lora import distill_method as distill_method
    from steering_vectors.distillation.lora import paper_settings as paper_settings
    from steering_vectors.evaluation.compare_methods import ComparisonSettings as ComparisonSettings
    from steering_vectors.evaluation.compare_methods import compare_methods as compare_methods
    from steering_vectors.evaluation.preference_suite import EvaluationSettings as EvaluationSettings
    from steering_vectors.evaluation.preference_suite import evaluate as evaluate
    from steering_vectors.evaluation.reward import Reward as Reward
    from steering_vectors.evaluation.trust.suite import TrustSettings as TrustSettings
    from steering_vectors.evaluation.trust.suite import evaluate_trust as evaluate_trust
    from steering_vectors.fitting.calibration import CalibrationSettings as CalibrationSettings
    from steering_vectors.fitting.calibration import calibrate as calibrate
    from steering_vectors.fitting.fit import FitSettings as FitSettings
    from steering_vectors.fitting.fit import fit as fit
    from steering_vectors.fitting.gates import GatePrompts as GatePrompts
    from steering_vectors.fitting.gates import load_gate_prompts as load_gate_prompts
    from steering_vectors.measures.results import MethodComparison as MethodComparison
    from steering_vectors.measures.results import PreferenceEvaluation as PreferenceEvaluation
    from steering_vectors.measures.results import TrustEvaluation as TrustEvaluation
    from steering_vectors.models.blocks import find_blocks as find_blocks
    from steering_vectors.models.loading import LanguageModel as LanguageModel
    from steering_vectors.models.loading import load_model as load_model
    from steering_vectors.models.loading import wrap_model as wrap_model
    from steering_vectors.profiles.files import load_profile as load_profile
    from steering_vectors.profiles.files import profile_summary as profile_summary
    from steering_vectors.profiles.files import save_profile as save_profile
    from steering_vectors.profiles.metadata import Calibration as Calibration
    from steering_vectors.profiles.metadata import DataRecord as DataRecord
    from steering_vectors.profiles.metadata import Metrics as Metrics
    from steering_vectors.profiles.metadata import ProfileSummary as ProfileSummary
    from steering_vectors.profiles.mixture import Mixture as Mixture
    from steering_vectors.profiles.mixture import Term as Term
    from steering_vectors.profiles.profile import Profile as Profile
    from steering_vectors.steering.generate import steer as steer

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
    "evaluation.compare_methods": ("ComparisonSettings", "compare_methods"),
    "evaluation.preference_suite": ("EvaluationSettings", "evaluate"),
    "evaluation.reward": ("Reward",),
    "evaluation.trust.suite": ("TrustSettings", "evaluate_trust"),
    "fitting.calibration": ("CalibrationSettings", "calibrate"),
    "fitting.fit": ("FitSettings", "fit"),
    "fitting.gates": ("GatePrompts", "load_gate_prompts"),
    "measures.results": ("MethodComparison", "PreferenceEvaluation", "TrustEvaluation"),
    "models.blocks": ("find_blocks",),
    "models.loading": ("LanguageModel", "load_model", "wrap_model"),
    "profiles.files": ("load_profile", "profile_summary", "save_profile"),
    "profiles.metadata": ("Calibration", "DataRecord", "Metrics", "ProfileSummary"),
    "profiles.mixture": ("Mixture", "Term"),
    "profiles.profile": ("Profile",),
    "steering.generate": ("steer",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
