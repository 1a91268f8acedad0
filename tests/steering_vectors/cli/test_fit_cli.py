"""`trimtab fit` and `trimtab show`: what they write where, exactly, and how they fail."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from steering_vectors.cli.app import register
from steering_vectors.profiles.files import load_profile
from tests.support.tiny import tiny_model
from tests.support.tiny_tokenizers import tiny_tokenizer

app = typer.Typer()
register(app)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model("llama").save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, draw = tmp_path_factory.mktemp("data") / "kind.jsonl", random.Random(0)
    rows = [
        {
            "question": f"What of {row}?",
            "chosen": " ".join(draw.choices(["warm", "kindly", "please"], k=5)),
            "rejected": " ".join(draw.choices(["wind", "three", "letter"], k=5)),
        }
        for row in range(40)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def profiles(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("profiles")
    result = run("fit", "kind", model, data, directory, "--layers", "1-2", "--description", "kind words")
    assert result.exit_code == 0, result.output
    return directory


def run(command: str, name: str, model: Path, data: Path | str, out: Path, *more: str) -> Result:
    fixed = [command, name, "--model", str(model), "--data", str(data), "--out", str(out)]
    return CliRunner().invoke(app, [*fixed, "--columns", "prompt=question", *more])


def test_fit_writes_a_profile_and_says_so(model: Path, data: Path, tmp_path: Path) -> None:
    result = run("fit", "kind", model, data, tmp_path, "--layers", "1")
    assert result.exit_code == 0
    profile = load_profile(tmp_path / "kind.safetensors")
    assert (profile.name, profile.layers, profile.method) == ("kind", (1,), "mean-diff")
    text = result.stdout
    assert f"kind → {tmp_path}/kind.safetensors" in text
    assert "method mean-diff, layers 1, unit " in text
    assert f"strength 1 costs {profile.calibration['kl_at_1']:.3g} nats of KL per token" in text
    assert "note: only 40 rows" in text
    assert f"trimtab show {tmp_path}/kind.safetensors" in text
    for strength in ("-1", "+0", "+1"):
        assert f" {strength} " in text
    assert "calibrating the unit" in result.stderr


def test_fit_json_is_one_object(model: Path, data: Path, tmp_path: Path) -> None:
    options = ("--layers", "1", "--no-calibrate", "--json", "--method", "pca", "--tokens", "last", "--seed", "5")
    result = run("fit", "kind", model, data, tmp_path, *options)
    assert result.exit_code == 0
    summary = json.loads(result.stdout)
    assert result.stdout.count("\n") == 1
    assert summary["path"] == str(tmp_path / "kind.safetensors")
    assert summary["version"] == load_profile(summary["path"]).version
    assert (summary["method"], summary["unit"], summary["calibration"]) == ("pca", 1.0, {})
    assert summary["method_options"] == {"tokens": "last", "heldout_fraction": 0.2, "seed": 5}
    assert result.stderr == ""


def test_show_takes_a_file_or_a_name(profiles: Path) -> None:
    path = profiles / "kind.safetensors"
    by_file = CliRunner().invoke(app, ["show", str(path)])
    by_name = CliRunner().invoke(app, ["show", "kind", "--profiles", str(profiles)])
    assert by_file.exit_code == by_name.exit_code == 0
    assert by_file.stdout == by_name.stdout
    profile = load_profile(path)
    for fact in (profile.version, profile.model.fingerprint, profile.data["sha256"], "kind words", "independent"):
        assert fact in by_file.stdout
    assert "median ‖h‖" in by_file.stdout


def test_show_json(profiles: Path) -> None:
    result = CliRunner().invoke(app, ["show", "kind", "--profiles", str(profiles), "--json"])
    summary = json.loads(result.stdout)
    assert summary["layers"] == [1, 2]
    assert summary["description"] == "kind words"
    assert summary["metrics"]["propensity"]["rows"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--layers", "9"), "error: layer 9 is out of range: this model has blocks 0 to 2\n"),
        (("--method", "magic"), "error: method 'magic' is not one of mean-diff, pca, probe"),
        (("--dtype", "int8"), "error: dtype 'int8' is not one of auto, float32, bfloat16, float16\n"),
        (("--columns", "prompt"), "error: 'prompt' does not rename columns; write prompt=question,chosen=matching\n"),
        (("--kl-budget", "0"), "error: the KL budget must be a positive number of nats per token, not 0\n"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(
    model: Path, data: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    result = run("fit", "kind", model, data, tmp_path, *options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_missing_things_are_named(model: Path, profiles: Path, tmp_path: Path) -> None:
    result = run("fit", "kind", model, "demo:nothing", tmp_path)
    assert result.stderr.startswith("error: 'demo:nothing' is not an embedded preference set: there are careful, ")
    result = CliRunner().invoke(app, ["show", "cold", "--profiles", str(profiles)])
    expected = f"there is no profile 'cold': neither that file nor {profiles}/cold.safetensors exists (there: kind)"
    assert (result.exit_code, result.stderr) == (2, f"error: {expected}\n")


def test_help_loads_no_model_code() -> None:
    code = (
        "import sys, steering_vectors.cli.app\nprint({'torch', 'transformers', 'sklearn'} & sys.modules.keys() or [])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
