"""`trimtab distill`, `trimtab distill-method` and `trimtab bake`: the folders they write, and their errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from steering_vectors.models.loading import load_model
from tests.steering_vectors.cli.conftest import Run

FEW = ("--steps", "2", "--batch", "4")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))


def test_distill_writes_an_adapter(run: Run, tiny: Path, pairs: Path, warm: Path, tmp_path: Path) -> None:
    command = ("distill", "warm", "--profiles", warm, "--model", tiny, "--data", pairs, *FEW)
    result = run(*command, "--out", tmp_path / "lora")
    assert result.exit_code == 0, result.output
    first, *rest = result.stdout.splitlines()
    assert first == f"adapter: {tmp_path / 'lora'}"
    assert [line.partition(":")[0] for line in rest] == [
        "profile", "version", "layers", "distance before", "distance after", "ratio", "rows",
    ]  # fmt: skip
    assert (tmp_path / "lora" / "adapter_model.safetensors").exists()
    again = run(*command, "--out", tmp_path / "lora")
    expected = f"error: --out {tmp_path / 'lora'} exists and is not empty; name a new folder\n"
    assert (again.exit_code, again.stdout, again.stderr) == (2, "", expected)


def test_distill_method_writes_an_adapter(run: Run, tiny: Path, pairs: Path, tmp_path: Path) -> None:
    options = ("-o", "epochs=0.5", "-o", "positive=a", "-o", "negative=b", "--layers", "1", *FEW)
    fixed = ("--model", tiny, "--data", pairs, "--out", tmp_path / "rahf", "--json")
    result = run("distill-method", "rahf-dual", *fixed, "--goal", "warm", *options)
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert (printed["method"], printed["layers"]) == ("rahf-dual", [1])
    assert (tmp_path / "rahf" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("pca",), "method 'pca' has no difference per token; use rahf-scit or rahf-dual"),
        (("rahf-scit", "--strength", "0"), "strength 0 changes nothing, so there is nothing to distil"),
        (("rahf-scit", "-o", "rank"), "--option 'rank' is not KEY=VALUE"),
        (("rahf-scit", "-o", "rank=1", "-o", "rank=2"), "--option rank is given twice"),
        (("rahf-scit", "--layers", "9"), "layer 9 is out of range: this model has blocks 0 to 2"),
    ],
)
def test_unusable_methods(
    run: Run, tiny: Path, pairs: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    result = run("distill-method", *arguments, "--model", tiny, "--data", pairs, "--out", tmp_path / "out")
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", f"error: {message}\n")


def test_bake_writes_a_model(run: Run, tiny: Path, warm: Path, tmp_path: Path) -> None:
    out = tmp_path / "baked"
    result = run("bake", "warm", "--profiles", warm, "--model", tiny, "--out", out, "--json")
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert (printed["model"], printed["profile"], printed["strength"]) == (str(out), "warm", 1.0)
    assert load_model(str(out)).identity.fingerprint != load_model(str(tiny)).identity.fingerprint
    blocked = run("bake", "warm", "--profiles", warm, "--model", tiny, "--out", out)
    assert (blocked.exit_code, blocked.stderr) == (
        2,
        f"error: --out {out} exists and is not empty; name a new folder\n",
    )
