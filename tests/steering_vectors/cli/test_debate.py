"""`trimtab debate`: what it prints, its JSON, and its errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.steering_vectors.cli.conftest import Run

pytestmark = pytest.mark.slow

SHORT = ("--answer-tokens", "6", "--rebuttal-tokens", "4", "--confidence", "0.5")


def test_it_writes_pairs_and_goes_on(run: Run, tiny: Path, warm: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"Ask {number}\n" for number in range(8)))
    sides = ("--first-steering", "warm@1", "--second-steering", "warm@-1", "--second", "No.", "--profiles", warm)
    command = ("debate", "--model", tiny, "--prompts", prompts, "--folder", tmp_path / "work", *sides, *SHORT)
    result = run(*command)
    assert result.exit_code == 0, result.output
    assert "pairs from 8 prompts" in result.stdout
    assert "the same in both orders" in result.stdout
    printed = json.loads(run(*command, "--json").stdout)
    assert printed["pairs"] == len((tmp_path / "work" / "pairs.jsonl").read_text().splitlines())
    assert printed["judged"] <= printed["prompts"] == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "both sides are the same"),
        (("--first", "Be kind.", "--judge", "none"), "--judge 'none' is not one of model, person, and no address"),
        (("--first-steering", "cold@1"), "profile 'cold' not found"),
        (("--first-steering", "cold@@"), "'cold@@' is no steering such as"),
    ],
)
def test_refusals(run: Run, tiny: Path, warm: Path, tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    result = run("debate", "--model", tiny, "--profiles", warm, "--folder", tmp_path / "work", *options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"error: {message}" in result.stderr
