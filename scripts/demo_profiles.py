"""Fit the demo model's profiles that are missing from a directory: one per manner, by mean difference.

python scripts/demo_profiles.py --out profiles
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

DESCRIPTIONS = {
    "warm": "kind and encouraging; the opposite is cold",
    "concise": "short; the opposite is wordy",
    "careful": "warns and checks; the opposite is reckless",
    "honest": "admits its limits; the opposite is boastful",
}


def main(
    out: Annotated[Path, typer.Option(help="Directory of profiles.")] = Path("profiles"),
    force: Annotated[bool, typer.Option(help="Fit also those that are there.")] = False,
) -> None:
    missing = [name for name in DESCRIPTIONS if force or not (out / f"{name}.safetensors").exists()]
    if not missing:
        return
    from steering_vectors import fit, load_model, load_pairs, save_profile

    language_model = load_model("demo")
    for name in missing:
        start = time.perf_counter()
        profile = fit(language_model, None, load_pairs(f"demo:{name}"), name=name, description=DESCRIPTIONS[name])
        path = save_profile(profile, out)
        print(f"fitted {path} in {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    typer.run(main)
