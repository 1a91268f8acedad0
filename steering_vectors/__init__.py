"""Preference vectors for language models: fit them, store them, steer with them.

    pairs = load_pairs("preferences.jsonl")
    lm = load_model("demo")
    profile = fit(lm.model, lm.tokenizer, pairs, method="mean-diff")
    with steer(lm.model, profile, strength=0.8):
        lm.model.generate(...)

What is named in `__all__` is the public interface. It is imported at its first use, so that `import steering_vectors`
costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steering_vectors.data.sources import load_pairs
    from steering_vectors.fitting.fit import fit
    from steering_vectors.models.blocks import find_blocks
    from steering_vectors.models.loading import LanguageModel, load_model
    from steering_vectors.profiles.files import load_profile, save_profile
    from steering_vectors.profiles.mixture import Mixture, Term
    from steering_vectors.profiles.profile import Profile
    from steering_vectors.steering.generate import steer

__all__ = [
    "LanguageModel",
    "Mixture",
    "Profile",
    "Term",
    "find_blocks",
    "fit",
    "load_model",
    "load_pairs",
    "load_profile",
    "save_profile",
    "steer",
]

_HOMES = {
    "LanguageModel": "models.loading",
    "Mixture": "profiles.mixture",
    "Profile": "profiles.profile",
    "Term": "profiles.mixture",
    "find_blocks": "models.blocks",
    "fit": "fitting.fit",
    "load_model": "models.loading",
    "load_pairs": "data.sources",
    "load_profile": "profiles.files",
    "save_profile": "profiles.files",
    "steer": "steering.generate",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
