"""Baselines that change weights: supervised tuning on the preferred responses, and DPO, both through trl.

The LoRA has the shape of RAHF's first step, so that stored sizes are comparable.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from steering_vectors.data.chat import Example
from steering_vectors.data.preferences import Preferences
from steering_vectors.models.loading import LanguageModel

STEPS = {"sft": 150, "dpo": 100}
BATCH = 16
RANK = 16
LEARNING_RATES = {"sft": 1e-3, "dpo": 5e-4}
BETA = 0.1


def train_baseline(kind: str, lm: LanguageModel, pairs: Preferences, folder: Path, seed: int) -> None:
    """Tune with `sft` on the preferred responses or with `dpo` on the pairs, and save the adapter in peft's format."""
    disable_progress_bars()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    rows = Dataset.from_list([row(kind, good, bad) for good, bad in pairs.pairs()])
    shape = LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=0.05, target_modules="all-linear")
    trainer = trainer_of(kind, lm, rows, shape, settings(kind, folder, seed))
    trainer.train()
    trainer.model.save_pretrained(folder)


def row(kind: str, good: Example, bad: Example) -> dict[str, Any]:
    """A row in trl's format, as messages."""
    if good.prompt is None or isinstance(good.prompt, str):
        raise ValueError("the baselines need prompts that are messages")
    prompt = [asdict(message) for message in good.prompt]
    chosen, rejected = ([{"role": "assistant", "content": one.completion}] for one in (good, bad))
    return {"prompt": prompt, **({"completion": chosen} if kind == "sft" else {"chosen": chosen, "rejected": rejected})}


def settings(kind: str, folder: Path, seed: int) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "run"),
        "max_steps": STEPS[kind],
        "per_device_train_batch_size": BATCH,
        "learning_rate": LEARNING_RATES[kind],
        "lr_scheduler_type": "cosine",
        "warmup_steps": STEPS[kind] // 10,
        "seed": seed,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    }


def trainer_of(kind: str, lm: LanguageModel, rows: Dataset, shape: LoraConfig, options: dict[str, Any]) -> Any:
    common = {"model": lm.model, "train_dataset": rows, "processing_class": lm.tokenizer, "peft_config": shape}
    if kind == "sft":
        return SFTTrainer(args=SFTConfig(**options), **common)
    return DPOTrainer(args=DPOConfig(beta=BETA, **options), **common)
