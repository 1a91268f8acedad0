"""Fit the missing profiles of the demo model in a directory: one per manner, by mean difference.

    python scripts/demo_profiles.py --out profiles

One process with one thread runs per core, because the model is too small for more threads.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
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
    force: Annotated[bool, typer.Option(help="Fit existing profiles again.")] = False,
) -> None:
    missing = [name for name in DESCRIPTIONS if force or not (out / f"{name}.safetensors").exists()]
    if not missing:
        return
    print(f"fitting the demo profiles {', '.join(missing)}: about two minutes", flush=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(min(len(missing), os.cpu_count() or 1)) as pool:
        for done in as_completed([pool.submit(fit_one, name, out) for name in missing]):
            print(done.result(), flush=True)


def fit_one(name: str, out: Path) -> str:
    import torch
    from transformers.utils.logging import disable_progress_bar

    from steering_vectors import fit, load_model, load_pairs, save_profile

    disable_progress_bar()
    torch.set_num_threads(1)
    start = time.perf_counter()
    pairs = load_pairs(f"demo:{name}")
    profile = fit(load_model("demo"), None, pairs, name=name, description=DESCRIPTIONS[name])
    path = save_profile(profile, out)
    return f"fitted {path} in {time.perf_counter() - start:.0f} s"


if __name__ == "__main__":
    typer.run(main)
