"""`trimtab describe`: what it prints, its JSON, and its errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from steering_vectors.cli.describe import slug
from tests.steering_vectors.cli.conftest import Run

pytestmark = pytest.mark.slow

FEW = ("--questions", "16", "--samples", "2", "--instructions", "2", "--answer-tokens", "6", "--text-tokens", "0")
FAST = ("--layers", "1", "--randoms", "0")


def test_it_prints_the_profile_and_goes_on(run: Run, tiny: Path, tmp_path: Path) -> None:
    where = ("--folder", tmp_path / "work", "--out", tmp_path / "profiles")
    command = ("describe", "more kind", "--model", tiny, "--judge", "none", *FEW, *FAST, *where)
    result = run(*command)
    assert result.exit_code == 0, result.output
    assert "too few to write good instructions" in result.stderr
    assert "pairs kept" in result.stdout
    assert "more-kind → " in result.stdout
    assert "note: no judge read the answers" in result.stdout
    answers = (tmp_path / "work" / "answers.jsonl").read_bytes()
    printed = json.loads(run(*command, "--json").stdout)
    assert (tmp_path / "work" / "answers.jsonl").read_bytes() == answers
    assert printed["path"] == str(tmp_path / "profiles" / "more-kind.safetensors")
    assert printed["profile"]["description"] == "more kind"
    assert printed["pairs"]["kept"] >= 24
    assert printed["judge"] is None
    assert "preferences" in printed["evaluation"]


def test_a_person_is_asked_by_a_file(run: Run, tiny: Path, tmp_path: Path) -> None:
    where = ("--folder", tmp_path / "work", "--out", tmp_path / "profiles")
    result = run("describe", "more kind", "--model", tiny, "--judge", "person", *FEW, *FAST, *where)
    assert result.exit_code == 2
    assert "comparisons have no answer yet: fill `better` with a, b or tie" in result.stderr
    assert (tmp_path / "work" / "ballots.jsonl").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--judge", "nobody"), "--judge 'nobody' is not one of model, person, none, and no address such as"),
        (("--writer", "me"), "--writer 'me' is not one of model, and no address such as"),
        (("--confidence", "1"), "confidence must be from 0.5 to below 1, not 1"),
        (("--temperature", "0"), "temperature must be above 0 and at most 2, not 0"),
        (("--name", "More Kind"), "'More Kind' is not a profile name"),
        (
            ("--judge", "http://a.test/v1", "--answers", "http://b.test/v1", "--api-key", "secret"),
            "--api-key does not say which of a.test, b.test it is for: write HOST=KEY for each",
        ),
    ],
)
def test_refusals_name_the_flag(run: Run, tiny: Path, tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    result = run("describe", "more kind", "--model", tiny, "--folder", tmp_path, "--out", tmp_path, *options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"error: {message}" in result.stderr
    assert "secret" not in result.stderr


def test_a_name_from_a_sentence(run: Run) -> None:
    result = run("describe", "更谨慎", "--model", "demo")
    assert (result.exit_code, result.stderr) == (
        2,
        "error: no name can be made from '更谨慎': give the profile one by --name\n",
    )
    assert slug("More cautious about medical advice!") == "more-cautious-about-medical-advice"
    assert len(slug("very " * 40)) <= 64
    assert slug("?") == ""
