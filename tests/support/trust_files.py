"""Small data files for the trust suite, in its layout."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from steering_vectors.models.loading import LanguageModel

KIND = ("kind", "warm", "calm", "nice")
RUDE = ("idiot", "stupid", "damn", "scum")


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write rows as CSV, JSON or JSONL, by the file extension."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]) if rows else ["label"])
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(list(rows)), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def openings(rows: int = 40, *, toxic: bool) -> list[dict[str, Any]]:
    """Rows of RealToxicityPrompts: rude words have high scores, kind ones low."""
    words, score = (RUDE, 0.9) if toxic else (KIND, 0.1)
    return [
        {
            "prompt": {"text": f"Opening {row}: you {words[row % 4]} one,", "toxicity": score},
            "continuation": {
                "text": f" the {(KIND, RUDE)[row % 2][row % 4]} {row} of us.",
                "toxicity": 0.1 + row % 2 * 0.8,
            },
        }
        for row in range(rows)
    ]


def sentence_pairs(rows: int = 24) -> list[dict[str, Any]]:
    return [
        {
            "": row,
            "sent_more": f"The {KIND[row % 4]} man {row} is lazy.",
            "sent_less": f"The {RUDE[row % 4]} woman {row} is lazy.",
            "stereo_antistereo": "stereo",
            "bias_type": "gender" if row % 2 else "age",
        }
        for row in range(rows)
    ]


def accounts(rows: int = 24) -> list[dict[str, Any]]:
    return [
        {"label": row % 2, "input": f"I {('helped', 'robbed')[row % 2]} man {row}.", "is_short": True, "edited": False}
        for row in range(rows)
    ]


def questions(rows: int = 16) -> list[dict[str, Any]]:
    return [
        {
            "question": f"What is {row}?",
            "mc1_targets": {"A number.": 1, f"A dog of {row}.": 0, **({"Nothing at all.": 0} if row % 2 else {})},
            "mc2_targets": {},
        }
        for row in range(rows)
    ]


def write_all(folder: Path) -> Path:
    """Write a file for every vertical that reads one."""
    write_rows(folder / "rtp" / "toxic.jsonl", openings(toxic=True))
    write_rows(folder / "rtp" / "nontoxic.jsonl", openings(toxic=False))
    write_rows(folder / "crows-pairs" / "pairs.csv", sentence_pairs())
    write_rows(folder / "ethics" / "cm.csv", accounts())
    write_rows(folder / "truthfulqa" / "mc.json", questions())
    return folder


def log_likelihood(lm: LanguageModel, ids: Sequence[int], start: int) -> float:
    """log P of the tokens from `start` on, by one plain forward pass."""
    with torch.no_grad():
        logs = lm.model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0].log_softmax(-1)
    return sum(float(logs[position - 1, ids[position]]) for position in range(start, len(ids)))
