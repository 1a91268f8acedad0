"""The code of docs/data.md makes preference data of the files that it names."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest

from steering_vectors.data.chat import Example
from steering_vectors.data.sources import load_pairs

PAGE = Path(__file__).resolve().parents[2] / "docs" / "data.md"
NUMBERS = range(16)


def made() -> dict[str, Any]:
    """The files before their conversion, as JSON values; a list of texts is a file of lines."""
    return {
        "annotations.json": [
            {"instruction": f"q {n}", "output_1": "one", "output_2": "two", "preference": 1 + n % 2} for n in NUMBERS
        ],
        "helpful.json": [
            {"text": [f"\n\nHuman: q {n}\n\nAssistant: {text}" for text in "ab"], "score": [n % 2, 1 - n % 2]}
            for n in NUMBERS
        ],
        "xstest.csv": [
            {"prompt": f"q {n}", "completion": "a", "final_label": ("1_full_compliance", "2_full_refusal")[n % 2]}
            for n in NUMBERS
        ],
        "mc_task.json": [{"question": f"q {n}", "mc1_targets": {"true": 1, "false": 0}} for n in NUMBERS],
        "sentiment.0": [f"bad {n}" for n in NUMBERS],
        "sentiment.1": [f"good {n}" for n in NUMBERS],
        "rtp.jsonl": [
            {"prompt": {"text": f"q {n}"}, "continuation": {"text": " a", "toxicity": [0.1, 0.9, None][n % 3]}}
            for n in range(30)
        ],
    }


@pytest.fixture
def converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, rows in made().items():
        path = tmp_path / name
        if name.endswith(".csv"):
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        elif name.endswith(".json"):
            path.write_text(json.dumps(rows))
        else:
            path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    exec(compile(code, str(PAGE), "exec"), {})
    return tmp_path


def test_the_code_of_the_page_writes_preference_data(converted: Path) -> None:
    found = {path.stem: load_pairs(path) for path in converted.glob("*.jsonl") if path.stem != "rtp"}
    assert {name: (data.kind, len(data.positives), len(data.negatives)) for name, data in found.items()} == {
        "alpaca_eval": ("preference", 16, 16),
        "helpful": ("preference", 16, 16),
        "xstest": ("unpaired", 8, 8),
        "truthful": ("unpaired", 16, 16),
        "yelp": ("unpaired", 16, 16),
        "civil": ("unpaired", 10, 10),
    }
    assert found["alpaca_eval"].pairs()[:2] == [
        (Example("q 0", "one"), Example("q 0", "two")),
        (Example("q 1", "two"), Example("q 1", "one")),
    ]
    assert [(good.completion, bad.completion) for good, bad in found["helpful"].pairs()[:2]] == [("b", "a"), ("a", "b")]
    assert found["yelp"].positives[0] == Example(None, "good 0")
    assert found["truthful"].positives[0] == Example("q 0", "true")
