"""Preference pairs: two replies to one question that differ in one axis only.

Rows for fitting use the training questions and phrases. Held-out rows use questions and phrases that occur neither in
the training text nor in the rows for fitting.
"""

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

from examples.demo_corpus.dialogues import HELDOUT_QUESTIONS, QUESTIONS, ask, draw_manner
from examples.demo_corpus.replies import compose
from examples.demo_corpus.topics import TOPICS

AXIS_OF = {"warm": "warmth", "concise": "brevity", "careful": "care", "honest": "honesty"}
TRAIN_ROWS = 480
HELDOUT_ROWS = 184
Row = dict[str, list[dict[str, str]]]


def write_pairs(manner: str, count: int, seed: int, heldout: bool) -> list[Row]:
    """Create `count` preference rows for one manner, with questions and topics in turn."""
    rng = random.Random(f"{seed}-{manner}-{heldout}")
    templates = HELDOUT_QUESTIONS if heldout else QUESTIONS
    prompts = [(template, topic) for template in templates for topic in TOPICS]
    rng.shuffle(prompts)
    rows: list[Row] = []
    for i in range(count):
        template, topic = prompts[i % len(prompts)]
        base = draw_manner(rng)
        chosen = rejected = ""
        while chosen == rejected:  # a short reply may not show the axis
            reply_seed = rng.getrandbits(40)
            chosen, rejected = (
                compose(topic, dataclasses.replace(base, **{AXIS_OF[manner]: value}), reply_seed, heldout=heldout)
                for value in (1, -1)
            )
        rows.append(
            {
                "prompt": [{"role": "user", "content": ask(template, topic)}],
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": rejected}],
            }
        )
    return rows


def save_preferences(folder: Path, seed: int) -> None:
    """Write `MANNER.train.jsonl` and `MANNER.heldout.jsonl` for every manner."""
    folder.mkdir(parents=True, exist_ok=True)
    for manner in AXIS_OF:
        for split, count in (("train", TRAIN_ROWS), ("heldout", HELDOUT_ROWS)):
            rows: list[Any] = list(write_pairs(manner, count, seed, split == "heldout"))
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (folder / f"{manner}.{split}.jsonl").write_text(lines, encoding="utf-8")
