"""`trimtab fit`: its files, its output and its errors."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from steering_vectors.cli.app import register
from steering_vectors.profiles.files import load_profile
from tests.support.tiny import tiny_model
from tests.support.tiny_tokenizers import tiny_tokenizer

pytestmark = pytest.mark.slow

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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--layers", "9"), "error: layer 9 is out of range: this model has blocks 0 to 2\n"),
        (
            ("--method", "magic"),
            "error: method 'magic' is not one of mean-diff, pca, probe, contrast-prompts, bipo, rahf-scit, rahf-dual\n",
        ),
        (("-o", "rank=2"), "error: mean-diff has no option 'rank'; it has none\n"),
        (("--tokens", "first"), "error: tokens is 'first', not one of response, last\n"),
        (("--dtype", "int8"), "error: dtype 'int8' is not one of auto, float32, bfloat16, float16\n"),
        (("--columns", "prompt"), "error: columns 'prompt' cannot be read; write prompt=question,chosen=matching\n"),
        (("--kl-budget", "0"), "error: the KL budget must be a positive number of nats per token, not 0\n"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(
    model: Path, data: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    result = run("fit", "kind", model, data, tmp_path, *options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == message
    assert not list(tmp_path.iterdir())


def test_an_unknown_embedded_set(model: Path, tmp_path: Path) -> None:
    result = run("fit", "kind", model, "demo:nothing", tmp_path)
    assert result.stderr.startswith(
        "error: 'demo:nothing' is not an embedded data set; use demo: with one of careful, "
    )


def test_a_gate_is_fitted_and_stored(model: Path, data: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"{word} {row}", "label": word == "warm"} for row in range(10) for word in ("warm", "three")]
    gate = tmp_path / "gate.jsonl"
    gate.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run("fit", "kind", model, data, tmp_path, "--layers", "1", "--no-calibrate", "--gate", str(gate))
    assert result.exit_code == 0, result.output
    assert "gate: steers prompts whose similarity at block" in result.stdout
    stored = load_profile(tmp_path / "kind.safetensors").gate
    assert stored is not None
    assert (stored.metrics["prompts"], stored.metrics["source"]) == ([10, 10], "gate.jsonl")
    gate.write_text("".join(json.dumps(row) + "\n" for row in rows[:15]))
    refused = run("fit", "kind", model, data, tmp_path, "--gate", str(gate))
    expected = f"error: {gate}: there are 7 prompts with label false; a gate needs at least 8 of each\n"
    assert (refused.exit_code, refused.stderr) == (2, expected)


def chats(directory: Path, reply: str) -> Path:
    """Rows of messages whose last one has this chosen reply."""
    turn = {"role": "user", "content": "What?"}
    rows = [
        {
            "prompt": [turn],
            "chosen": [{"role": "assistant", "content": f"warm {row}"}],
            "rejected": [{"role": "assistant", "content": f"wind {row}"}],
        }
        for row in range(20)
    ]
    rows[-1]["chosen"] = [{"role": "assistant", "content": reply}]
    path = directory / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def fit_chats(model: Path, data: Path, out: Path, *more: str) -> Result:
    fixed = ["fit", "kind", "--model", str(model), "--data", str(data), "--out", str(out), "--layers", "1"]
    return CliRunner().invoke(app, [*fixed, "--no-calibrate", *more])


def test_a_template_can_be_chosen(model: Path, tmp_path: Path) -> None:
    template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"
    (tmp_path / "mine.jinja").write_text(template)
    chosen = ("--chat-template", str(tmp_path / "mine.jinja"))
    assert fit_chats(model, chats(tmp_path, "warm"), tmp_path, *chosen).exit_code == 0
    stored = load_profile(tmp_path / "kind.safetensors").chat_template_sha256
    assert stored == hashlib.sha256(template.encode()).hexdigest()


def test_a_template_that_does_not_exist_is_an_error(model: Path, tmp_path: Path) -> None:
    result = fit_chats(model, chats(tmp_path, "warm"), tmp_path, "--chat-template", "rag")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: the chat template 'rag' is neither one of the tokenizer's")


@pytest.mark.parametrize(
    ("reply", "tokens", "reason"),
    [
        (
            "warm</s>",
            384,
            "the completion ends in '</s>', the name of a control token: remove it, because a completion's end is not "
            "part of its text",
        ),
        (
            "warm<pad>it",
            373,
            "the text contains '<pad>', token 373 of the tokenizer, but the model has 373 tokens only: leave it out",
        ),
    ],
)
def test_a_reply_that_cannot_be_encoded_is_named(tmp_path: Path, reply: str, tokens: int, reason: str) -> None:
    tiny_model("llama", vocab_size=tokens).save_pretrained(tmp_path / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<pad>"])
    tokenizer.save_pretrained(tmp_path / "model")
    result = fit_chats(tmp_path / "model", chats(tmp_path, reply), tmp_path)
    assert result.exit_code == 2
    counted = "1 of 20 rows cannot be encoded; correct the row, or skip such rows with --skip-bad-rows"
    assert result.stderr.strip().endswith(f", line 20, field 'chosen': {reason}; {counted}")
    assert fit_chats(tmp_path / "model", chats(tmp_path, "warm"), tmp_path).exit_code == 0
