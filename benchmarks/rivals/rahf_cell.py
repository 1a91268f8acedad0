"""One cell of the experiment: one method for one manner with one seed, fitted and measured in its own process.

    python -m benchmarks.rivals.rahf_cell MANNER SEED METHOD FILE.json

The peak memory of the process is that of the method.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from benchmarks.quality.conditions import Condition, Ids, Instructed, Vector, Weights, measure
from benchmarks.quality.dose_response import PREFERENCES, heldout_prompts
from benchmarks.quality.manners import judge
from steering_vectors import Profile, fit, load_model, load_pairs, save_profile
from steering_vectors.data.chat import Message, encode_prompt
from steering_vectors.data.corpus import Sides, encode_corpus
from steering_vectors.data.preferences import Preferences
from steering_vectors.fitting.calibration import CalibrationSettings, calibrate
from steering_vectors.measures.controls import random_controls
from steering_vectors.measures.steered_model import steerable
from steering_vectors.models.loading import LanguageModel
from steering_vectors.tuning.instructions import instructed, instructions_for

PROMPTS = 64
SAMPLES = 1  # replies per prompt
TOKENS = 100
HELDOUT = 0.2  # of the training file, as in fit, for choosing blocks and calibrating
UNTUNED = ("contrast-prompts", "mean-diff", "pca", "probe")
VECTORS = ("random", *UNTUNED, "bipo", "rahf-scit", "rahf-dual")
BASELINES = ("sft", "dpo")
ADAPTERS = ("rahf-scit-lora", "rahf-dual-lora")
SECOND_STEP = {"steps": 100, "batch": 16, "learning_rate": 1e-3}
BLOCKS, STRENGTH = (3,), 1.0
METHODS = ("base", "prompting", *VECTORS, *BASELINES, *ADAPTERS)


@dataclass(frozen=True, slots=True)
class Setting:
    """The inputs that all methods for a manner share."""

    lm: LanguageModel
    manner: str
    seed: int
    pairs: Preferences
    questions: tuple[tuple[Message, ...], ...]
    sides: Sides  # pairs of the held-out file

    @property
    def prompts(self) -> list[Ids]:
        return [encode_prompt(self.lm.tokenizer, question) for question in self.questions] * SAMPLES


@dataclass(frozen=True, slots=True)
class Made:
    """The result of a method: conditions to measure by name, stored bytes, and remarks for the table."""

    conditions: dict[str, Any]
    stored: int
    remarks: dict[str, Any]


def main(manner: str, seed: int, method: str, out: Path) -> None:
    disable_progress_bar()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    setting = prepare(manner, seed)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        started = time.perf_counter()
        made = make(setting, method, Path(folder))
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        plain = stack.enter_context(steerable(load_model("demo")))
        results = {}
        for name, recipe in made.conditions.items():
            condition = recipe(plain, stack)
            results[name] = measure(
                condition, plain, setting.prompts, setting.sides, lambda text, ended: judge(manner, text, ended=ended),
                tokens=TOKENS, seed=1000 + seed,
            )  # fmt: skip
    record = {
        "manner": manner, "seed": seed, "method": method, "seconds": seconds, "peak_bytes": peak,
        "stored_bytes": made.stored, **made.remarks, "conditions": results,
    }  # fmt: skip
    partial = out.with_suffix(".part")
    partial.write_text(json.dumps(record, indent=1))
    partial.replace(out)


def prepare(manner: str, seed: int) -> Setting:
    lm = load_model("demo")
    questions = heldout_prompts(PREFERENCES / f"{manner}.heldout.jsonl", PROMPTS)
    corpus = encode_corpus(lm.tokenizer, load_pairs(PREFERENCES / f"{manner}.heldout.jsonl"), limit=None)
    return Setting(
        lm,
        manner,
        seed,
        load_pairs(PREFERENCES / f"{manner}.train.jsonl"),
        tuple(tuple(Message(**one) for one in question) for question in questions),
        corpus.sides(),
    )


def make(setting: Setting, method: str, folder: Path) -> Made:
    if method == "base":
        return Made({"0": lambda plain, _: Instructed(plain, lambda prompt: prompt)}, 0, {})
    if method == "prompting":
        return prompting(setting)
    if method in VECTORS:
        return vector(setting, method, folder)
    if method in BASELINES:
        return baseline(setting, method, folder)
    return adapter(setting, method.removesuffix("-lora"), folder)


def prompting(setting: Setting) -> Made:
    """p⁻ and p⁺ as system messages."""
    instructions = instructions_for(setting.manner)
    tokenizer = setting.lm.tokenizer
    plain_ids = {tuple(encode_prompt(tokenizer, one)): one for one in known_prompts(setting)}

    def rewritten(text: str) -> Any:
        return lambda prompt: encode_prompt(tokenizer, instructed(tokenizer, plain_ids[tuple(prompt)], text) or "")

    texts = {"-1": instructions.negative, "+1": instructions.positive}
    conditions = {
        name: (lambda plain, _, text=text: Instructed(plain, rewritten(text))) for name, text in texts.items()
    }
    return Made(conditions, len(instructions.positive.encode()), {"instructions": [*texts.values()]})


def known_prompts(setting: Setting) -> list[Any]:
    """Every measured prompt, as messages."""
    positives, _ = load_pairs(PREFERENCES / f"{setting.manner}.heldout.jsonl").sides()
    return [*setting.questions, *(one.prompt for one in positives)]


def vector(setting: Setting, method: str, folder: Path) -> Made:
    profile = random_profile(setting) if method == "random" else fitted(setting, method)
    stored = save_profile(profile, folder).stat().st_size
    conditions = {
        f"{strength:+g}": (lambda plain, _, strength=strength: Vector(plain, profile, strength))
        for strength in (-1.0, 1.0)
    }
    return Made(conditions, stored, {
        "layers": list(profile.layers), "unit": profile.unit, "max_strength": profile.max_strength,
        "kl_at_1": profile.calibration["kl_at_1"], "layer_scores": profile.metrics.get("layer_choice", {}),
    })  # fmt: skip


def fitted(setting: Setting, method: str) -> Profile:
    return fit(setting.lm, None, setting.pairs, name=setting.manner, method=method, seed=setting.seed)


def random_profile(setting: Setting) -> Profile:
    """A random direction at the block that mean-diff chose, calibrated to the same KL."""
    control = random_controls(fitted(setting, "mean-diff"), 1, seed=setting.seed)[0]
    control = replace(control, method_options={"heldout_fraction": HELDOUT, "seed": setting.seed})
    _, heldout = setting.pairs.split(HELDOUT, setting.seed)
    return calibrate(setting.lm, control, heldout, CalibrationSettings(seed=setting.seed))


def baseline(setting: Setting, kind: str, folder: Path) -> Made:
    from benchmarks.rivals.weight_baselines import train_baseline

    train, _ = setting.pairs.split(HELDOUT, setting.seed)
    train_baseline(kind, setting.lm, train, folder / "adapter", setting.seed)
    return adapted(folder / "adapter", {})


def adapter(setting: Setting, method: str, folder: Path) -> Made:
    """The LoRA of RAHF's second step."""
    from steering_vectors.distillation.lora import DistillSettings, MethodTarget, distill_method

    settings = DistillSettings(**SECOND_STEP, seed=setting.seed)
    target = MethodTarget(method, setting.manner, layers=BLOCKS, strength=STRENGTH)
    found = distill_method(setting.lm, target, setting.pairs, folder / "adapter", settings=settings)
    return adapted(folder / "adapter", {"distance_ratio": found.ratio, "layers": list(found.layers)})


def adapted(folder: Path, remarks: dict[str, Any]) -> Made:
    def weights(plain: Any, stack: ExitStack) -> Condition:
        return Weights(stack.enter_context(steerable(load_model("demo", adapter=folder))), plain)

    return Made({"+1": weights}, (folder / "adapter_model.safetensors").stat().st_size, remarks)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
