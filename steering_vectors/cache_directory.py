"""The directory of what is computed once and may be deleted: converted models and tuned weights."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> Path:
    """`TRIMTAB_CACHE`, else `trimtab` in the user's cache directory."""
    if chosen := os.environ.get("TRIMTAB_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "trimtab"
