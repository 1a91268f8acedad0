"""`trimtab evaluate preferences` and `trimtab evaluate trust`: tables, JSON, the HTML page, and errors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from steering_vectors.cli.evaluate import VERTICALS
from steering_vectors.cli.flags import parse_strengths
from steering_vectors.errors import FitError
from steering_vectors.evaluation.trust.suite import VERTICALS as ALL_VERTICALS
from tests.steering_vectors.cli.conftest import Run
from tests.support.trust_files import write_all

pytestmark = pytest.mark.slow

FEW = ("--strengths", "-1,0,1", "--randoms", "1")


def test_preferences_prints_and_writes(run: Run, tiny: Path, pairs: Path, warm: Path, tmp_path: Path) -> None:
    page = tmp_path / "pages" / "report.html"
    command = ("evaluate", "preferences", "warm", "--profiles", warm, "--model", tiny, "--data", pairs, *FEW)
    result = run(*command, "--rows", "16", "--reward-samples", "0", "--report", page)
    assert result.exit_code == 0, result.output
    assert "margin (nats per response)" in result.stdout
    assert f"report: {page}" in result.stdout
    assert page.read_text().startswith("<!doctype html>")
    small = (*command, "--rows", "8", "--reward-samples", "4")
    printed = json.loads(run(*small, "--json").stdout)["evaluations"]
    assert [one["profile"] for one in printed] == ["warm"]
    assert printed[0]["data"]["read"] == 8
    assert printed[0]["reward"]["samples_per_prompt"] == 4


def test_trust_prints_and_writes(run: Run, tiny: Path, warm: Path, tmp_path: Path) -> None:
    page, folder = tmp_path / "report.html", write_all(tmp_path / "trust")
    command = ("evaluate", "trust", "warm", "--profiles", warm, "--model", tiny, *FEW)
    result = run(*command, "--data", folder, "--rows", "16", "--report", page)
    assert result.exit_code == 0, result.output
    assert "trust relative to strength 0" in result.stdout
    assert "wrong_passed" in result.stdout
    assert page.read_text().count("<svg") == 5
    alone = run(*command, "--verticals", "privacy", "--rows", "8", "--json")
    assert alone.exit_code == 0, alone.output
    one = json.loads(alone.stdout)["evaluations"][0]
    assert list(one["trust"]) == ["privacy"]
    assert np.isfinite(one["trust"]["privacy"]["strengths"][0]["figures"]["log_odds"]["value"])


@pytest.mark.parametrize(
    ("suite", "options", "message"),
    [
        (
            "preferences",
            ("--strengths", "1,high"),
            "--strengths '1,high' is not a list of numbers, as in -1,-0.5,0,0.5,1",
        ),
        ("preferences", ("--strengths", "-1,1"), "strengths must hold 0 and at least two others, as in -1,0,1"),
        (
            "trust",
            (),
            "the vertical toxicity needs a folder with rtp/*.jsonl: name the folder, or leave the vertical out",
        ),
        (
            "trust",
            ("--verticals", "virtue"),
            "vertical 'virtue' is not one of toxicity, bias, ethics, truthfulness, privacy",
        ),
    ],
)
def test_refusals_name_the_flag(
    run: Run, tiny: Path, pairs: Path, warm: Path, suite: str, options: tuple[str, ...], message: str
) -> None:
    data = ("--data", pairs) if suite == "preferences" else ()
    result = run("evaluate", suite, "warm", "--profiles", warm, "--model", tiny, *data, *options)
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", f"error: {message}\n")


def test_each_suite_has_its_own_flags_only(run: Run, warm: Path, pairs: Path) -> None:
    for command, flag in (("preferences", "--verticals"), ("trust", "--reward-samples"), ("trust", "--columns")):
        result = run("evaluate", command, "warm", "--model", "demo", flag, "1")
        assert result.exit_code == 2
        assert f"No such option: {flag}" in result.stderr


def test_strengths_are_sorted() -> None:
    assert parse_strengths("1,-1,0") == (-1.0, 0.0, 1.0)
    with pytest.raises(FitError, match="is not a list of numbers"):
        parse_strengths("1,inf")


def test_the_default_verticals_are_all() -> None:
    assert tuple(VERTICALS.split(",")) == ALL_VERTICALS
