"""Labelled prompts of a gate: unusable ones are named by file, line and column."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from steering_vectors.errors import DataError
from steering_vectors.fitting.gates import fit_gate, load_gate_prompts
from steering_vectors.models.loading import wrap_model
from tests.support.tiny import tiny_model, tiny_tokenizer

ROWS: list[dict[str, Any]] = [{"prompt": f"Ask {i}?", "label": i % 2 == 0} for i in range(16)]


def written(tmp_path: Path, index: int, **cells: Any) -> str:
    rows = [row | cells if number == index else row for number, row in enumerate(ROWS)]
    path = tmp_path / "gate.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("prompt", [None, "", []], ids=str)
def test_a_gate_needs_every_prompt(tmp_path: Path, prompt: Any) -> None:
    path = written(tmp_path, 4, prompt=prompt)
    with pytest.raises(DataError) as caught:
        load_gate_prompts(path)
    assert str(caught.value) == f"{path}, line 5, field 'prompt': it is empty"


@pytest.mark.parametrize(
    ("column", "remedy"), [("score", ""), ("system", "; write the system prompt as the first message of prompt")]
)
def test_other_columns_are_refused(tmp_path: Path, column: str, remedy: str) -> None:
    path = written(tmp_path, 4, **{column: "Be brief."})
    with pytest.raises(DataError) as caught:
        load_gate_prompts(path)
    problem = f"the rows of a gate have only the columns prompt and label{remedy}"
    assert str(caught.value) == f"{path}, line 5, field '{column}': {problem}"


def test_prompts_keep_their_lines(tmp_path: Path) -> None:
    prompts = load_gate_prompts(written(tmp_path, 0))
    assert prompts.opening == tuple(f"Ask {i}?" for i in range(0, 16, 2))
    assert prompts.lines == (*range(1, 17, 2), *range(2, 17, 2))


@pytest.mark.parametrize("index", [4, 5], ids=["opening", "other"])
def test_prompts_that_cannot_be_encoded_are_named(tmp_path: Path, index: int) -> None:
    lm = wrap_model(tiny_model("llama"), tiny_tokenizer())
    lm.tokenizer.chat_template = "{{ raise_exception('no messages') }}"
    path = written(tmp_path, index, prompt=[{"role": "user", "content": "Ask?"}])
    with pytest.raises(DataError) as caught:
        fit_gate(lm, load_gate_prompts(path))
    assert str(caught.value) == (
        f"{path}, line {index + 1}, field 'prompt': a prompt of the gate cannot be encoded: "
        "the model's chat template refuses these messages: no messages"
    )
