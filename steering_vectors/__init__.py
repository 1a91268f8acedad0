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
    from steering_vectors.datasets import load_pairs
    from steering_vectors.fitting import fit
    from steering_vectors.mixture import Mixture, Term
    from steering_vectors.models import LanguageModel, find_blocks, load_model
    from steering_vectors.profile import Profile
    from steering_vectors.steering import steer
    from steering_vectors.storage import load_profile, save_profile

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
    "LanguageModel": "models",
    "Mixture": "mixture",
    "Profile": "profile",
    "Term": "mixture",
    "find_blocks": "models",
    "fit": "fitting",
    "load_model": "models",
    "load_pairs": "datasets",
    "load_profile": "storage",
    "save_profile": "storage",
    "steer": "steering",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
