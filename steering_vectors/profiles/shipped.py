"""The profiles that come with trimtab, for base models that can be had by pip.

`scripts/shipped_profiles.py` fits them from public data.
"""

from __future__ import annotations

from pathlib import Path

from steering_vectors.profiles.files import SUFFIX, load_profile
from steering_vectors.profiles.profile import ModelIdentity

DIRECTORY = Path(__file__).resolve().parents[1] / "shipped"


def shipped_profiles(model: ModelIdentity | None = None) -> dict[str, Path]:
    """The files of the shipped profiles by name: all, or those that were fitted on the weights of a model."""
    files = {path.stem: path for path in sorted(DIRECTORY.glob(f"*{SUFFIX}"))}
    if model is None:
        return files
    return {name: path for name, path in files.items() if load_profile(path).model.fingerprint == model.fingerprint}
