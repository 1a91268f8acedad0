"""Deprecated spellings print a notice on stderr and do the same as the new ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from steering_vectors.models.loading import load_model
from tests.steering_vectors.cli.conftest import Run
from tests.support.trust_files import write_all

pytestmark = pytest.mark.slow


def notice(old: str, new: str) -> str:
    return f"notice: `{old}` is now `{new}`; the old form will be removed in the next version\n"


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def place(tiny: Path, warm: Path) -> tuple[Any, ...]:
    return ("--profiles", warm, "--model", tiny)


FEW = ("--strengths", "-1,0,1", "--randoms", "0", "--reward-samples", "0", "--json")


def test_evaluate_without_a_subcommand(run: Run, pairs: Path, place: tuple[Any, ...]) -> None:
    old = run("evaluate", "warm", *place, "--data", pairs, *FEW)
    new = run("evaluate", "preferences", "warm", *place, "--data", pairs, *FEW)
    assert (old.exit_code, old.stdout) == (new.exit_code, new.stdout) == (0, old.stdout)
    assert (old.stderr, new.stderr) == (notice("trimtab evaluate NAME", "trimtab evaluate preferences"), "")
    assert json.loads(old.stdout)["evaluations"][0]["profile"] == "warm"
    assert run("evaluate", *place, "--data", pairs, *FEW, "warm").stdout == old.stdout


def test_evaluate_with_a_suite(run: Run, pairs: Path, place: tuple[Any, ...], tmp_path: Path) -> None:
    folder, few = write_all(tmp_path / "trust"), ("--strengths", "-1,0,1", "--json", "--verticals", "ethics,bias")
    old = run(
        "evaluate", "warm", *place, "--suite", "trust", *few, "--trust-data", folder, "--trust-rows", "16",
        "--trust-randoms", "0",
    )  # fmt: skip
    new = run("evaluate", "trust", "warm", *place, *few, "--data", folder, "--rows", "16", "--randoms", "0")
    assert (old.exit_code, old.stdout) == (new.exit_code, new.stdout) == (0, old.stdout)
    assert old.stderr == notice("trimtab evaluate NAME --suite trust", "trimtab evaluate trust")
    both = run(
        "evaluate", "warm", *place, "--suite", "all", "--data", pairs, *FEW, "--verticals", "privacy", "--trust-rows",
        "8", "--trust-randoms", "0",
    )  # fmt: skip
    assert both.exit_code == 0, both.output
    one = json.loads(both.stdout)["evaluations"][0]
    assert list(one["trust"]) == ["privacy"]
    assert one["strengths"][0]["margin"]
    new_forms = "trimtab evaluate preferences` and `trimtab evaluate trust"
    assert both.stderr == notice("trimtab evaluate NAME --suite all", new_forms)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "--suite preference reads preferences: name them by --data (--suite trust needs none)"),
        (
            ("--suite", "all"),
            "--suite all reads preferences: name them by --data (--suite trust needs none)",
        ),
        (("--suite", "virtue"), "--suite 'virtue' is not one of preference, trust, all"),
        (
            ("--suite", "trust", "--data", "x.jsonl"),
            "--suite trust does not read --data: leave it out, or ask for --suite preference or all",
        ),
        (
            ("--data", "x.jsonl", "--trust-rows", "20", "--verticals", "bias"),
            "--suite preference does not read --trust-rows, --verticals: leave it out, or ask for --suite trust or all",
        ),
    ],
)
def test_options_of_another_suite(run: Run, place: tuple[Any, ...], options: tuple[str, ...], message: str) -> None:
    result = run("evaluate", "warm", *place, *options)
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", f"error: {message}\n")


def test_distill_with_bake(run: Run, place: tuple[Any, ...], tmp_path: Path) -> None:
    old = run("distill", "warm", *place, "--bake", "--out", tmp_path / "old", "--json")
    new = run("bake", "warm", *place, "--out", tmp_path / "new", "--json")
    assert (old.exit_code, old.stderr) == (0, notice("trimtab distill --bake", "trimtab bake"))
    assert json.loads(old.stdout) == {**json.loads(new.stdout), "model": str(tmp_path / "old")}
    models = [load_model(str(tmp_path / name)).identity.fingerprint for name in ("old", "new")]
    assert models[0] == models[1]


@pytest.mark.parametrize("method", [("--method", "rahf-dual"), ("--method=rahf-dual",)])
def test_distill_with_a_method(run: Run, tiny: Path, pairs: Path, tmp_path: Path, method: tuple[str, ...]) -> None:
    options = ("-o", "epochs=0.5", "--goal", "warm", "--layers", "1", "--steps", "2", "--batch", "4", "--json")
    fixed = ("--model", tiny, "--data", pairs, *options)
    old = run("distill", *method, *fixed, "--out", tmp_path / "old")
    new = run("distill-method", "rahf-dual", *fixed, "--out", tmp_path / "new")
    assert old.exit_code == 0, old.output
    assert old.stderr == notice("trimtab distill --method", "trimtab distill-method")
    assert json.loads(old.stdout) == {**json.loads(new.stdout), "adapter": str(tmp_path / "old")}
