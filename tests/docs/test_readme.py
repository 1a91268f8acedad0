"""What the README tells people to type is typed here, against a live server with the demo model."""

from __future__ import annotations

import ast
import asyncio
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from scripts import readme_examples
from scripts.readme_examples import Answer, block_of, blocks, differences, faults, receipt_of, written
from server.cli import app
from server.settings import Settings
from steering_vectors.models.loading import load_model
from steering_vectors.profiles.files import save_profile
from tests.support.few_texts import few_texts
from tests.support.serving import demo_engine, live_server, random_profile

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def block(language: str, word: str) -> str:
    """The one block of that language in which a word occurs."""
    found = [text for kind, text in BLOCKS if kind == language and word in text]
    assert len(found) == 1, word
    return found[0]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    profiles = tmp_path_factory.mktemp("profiles")
    with demo_engine(slots=4) as engine:
        save_profile(random_profile(engine.info.identity, "cheerful"), profiles)
        with live_server(engine, profiles) as client:
            yield client


def here(text: str, client: httpx.Client) -> str:
    """A block with the live server's port."""
    assert "127.0.0.1:8000" in text
    return text.replace("127.0.0.1:8000", f"127.0.0.1:{client.base_url.port}")


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("strength", [-1, 0, 1])
def test_the_curl_command(client: httpx.Client, strength: int) -> None:
    command = here(block("bash", "curl"), client).replace('"strength": 1', f'"strength": {strength}')
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    answer = json.loads(done.stdout)
    assert answer["text"]
    assert answer["steering"][0]["strength"] == strength


def test_the_openai_client(client: httpx.Client) -> None:
    code = here(block("python", "OpenAI("), client).replace("smollm2:", "demo:")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *text, receipt = done.stdout.strip().splitlines()
    assert text
    assert [(entry["name"], entry["strength"]) for entry in ast.literal_eval(receipt)] == [("cheerful", 0.8)]


def test_fit_and_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few_texts(monkeypatch, short=True)
    monkeypatch.chdir(ROOT)
    for command in block("bash", "trimtab fit").strip().splitlines():
        words = command.split()
        assert words[0] == ".venv/bin/trimtab"
        done = CliRunner().invoke(app, [str(tmp_path) if word == "profiles" else word for word in words[1:]])
        assert done.exit_code == 0, done.stderr
        assert "polite" in done.stdout
    assert (tmp_path / "polite.safetensors").is_file()


def test_the_python_interface(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    few_texts(monkeypatch, short=True)
    monkeypatch.chdir(ROOT)
    exec(compile(block("python", "steer(lm.model"), "README.md", "exec"), {})
    assert len(capsys.readouterr().out.strip()) > 20


def test_the_two_commands_exist() -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(re.findall(r"^make (\w+)", block("bash", "make serve"), re.MULTILINE)) <= set(targets)


# The example replies. `make check-examples` compares them with those of SmolLM2; here the same code runs on the demo
# model and a random profile.


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Answer]:
    profiles = tmp_path_factory.mktemp("examples")
    save_profile(random_profile(load_model("demo").identity, readme_examples.PROFILE), profiles)
    return asyncio.run(readme_examples.ask(Settings(profiles=profiles, threads=1), README))


def changed(answers: dict[int, Answer], strength: int, **fields: object) -> dict[int, Answer]:
    return {**answers, strength: {**answers[strength], **fields}}


def test_the_examples_are_answers_to_the_curl_command(answers: dict[int, Answer]) -> None:
    assert readme_examples.request_of(README)["messages"] == [{"role": "user", "content": "How was your day?"}]
    for strength, answer in answers.items():
        (receipt,) = answer["steering"]
        assert receipt["strength"] == strength
        assert receipt["steered_tokens"] == (answer["usage"]["completion_tokens"] if strength else 0)


def test_examples_that_were_written_are_up_to_date(answers: dict[int, Answer]) -> None:
    page = written(README, blocks(answers, "here"))
    assert differences(page, answers, "here") == []
    assert written(page, blocks(answers, "here")) == page
    assert page.partition("<!-- replies -->")[0] == README.partition("<!-- replies -->")[0]
    assert page.rpartition("<!-- end of receipt -->")[2] == README.rpartition("<!-- end of receipt -->")[2]


def test_on_the_same_kind_of_machine_every_character_counts(answers: dict[int, Answer]) -> None:
    page = written(README, blocks(answers, "here"))
    assert len(differences(page, changed(answers, 0, text="Another reply."), "here")) == 1
    (receipt,) = answers[1]["steering"]
    for field, value in {"version": "0" * 64, "steered_tokens": receipt["steered_tokens"] - 1}.items():
        assert len(differences(page, changed(answers, 1, steering=[{**receipt, field: value}]), "here")) == 1


def test_on_another_kind_what_depends_on_rounding_may_differ(answers: dict[int, Answer]) -> None:
    page = written(README, blocks(answers, "here"))
    rounded = {**answers[1]["steering"][0], "steered_tokens": 3}
    assert differences(page, changed(answers, 1, text="Another.", steering=[rounded]), "elsewhere") == []
    for field, value in {
        "version": "0" * 64,
        "layers": [2],
        "operator": "ablate",
        "calibrated": True,
        "name": "cold",
    }.items():
        other = changed(answers, 1, steering=[{**rounded, field: value}])
        assert len(differences(page, other, "elsewhere")) == 1, field
    fewer = {strength: answer for strength, answer in answers.items() if strength}
    assert len(differences(page, fewer, "elsewhere")) == 1


def test_what_an_example_must_show(answers: dict[int, Answer]) -> None:
    assert faults(answers) == []
    assert faults(changed(answers, 0, text=answers[1]["text"])) == ["two strengths give the same reply"]
    unsteered = {**answers[1]["steering"][0], "steered_tokens": 2}
    tokens = answers[1]["usage"]["completion_tokens"]
    assert faults(changed(answers, 1, steering=[unsteered])) == [f"strength 1: 2 of {tokens} tokens were steered"]


def test_a_reply_that_was_cut_ends_in_an_ellipsis(answers: dict[int, Answer]) -> None:
    for reason, end in {"length": "and so …", "stop": "and so"}.items():
        shown = blocks(changed(answers, 1, text="and  so", finish_reason=reason), "here")["replies"]
        assert shown.splitlines()[-1] == f"| 1 | {end} |"


def test_the_readme_has_the_form_that_is_written(answers: dict[int, Answer]) -> None:
    receipt = receipt_of(block_of(README, "receipt"))
    assert set(receipt) == set(answers[1]["steering"][0])
    assert (receipt["name"], receipt["strength"], receipt["calibrated"]) == ("cheerful", 1.0, True)
    rows = re.findall(r"^\| (\S+) \| (.+) \|$", block_of(README, "replies"), re.MULTILINE)
    assert [row[0] for row in rows] == ["strength", "−1", "0", "1"]
    assert len({row[1] for row in rows}) == 4


def test_continuous_integration_checks_the_examples() -> None:
    assert "make check-examples" in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert "scripts/readme_examples.py --check" in (ROOT / "Makefile").read_text(encoding="utf-8")
