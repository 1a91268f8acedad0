"""Unusable data: `fit`, `calibrate` and `evaluate` print one line on stderr and write nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from steering_vectors.cli.app import register
from steering_vectors.profiles.files import load_profile
from tests.support.full_disk import full_disk
from tests.support.tiny import POSITIONS, save_tiny, tiny_tokenizer

pytestmark = pytest.mark.slow

Rows = list[dict[str, Any]]

app = typer.Typer()
register(app)


def pairs(count: int = 40) -> Rows:
    return [
        {"prompt": f"What of {row}?", "chosen": f"warm {row} kindly", "rejected": f"three {row} letters"}
        for row in range(count)
    ]


def changed(count: int, of: Rows | None = None, **cells: Any) -> Rows:
    """Rows with other cells in the first `count`."""
    rows = pairs() if of is None else of
    return [{**row, **cells} if number < count else row for number, row in enumerate(rows)]


def labelled(positives: int, negatives: int) -> Rows:
    labels = [True] * positives + [False] * negatives
    return [{"prompt": f"Ask {row}", "completion": f"warm {row}", "label": label} for row, label in enumerate(labels)]


def same(count: int) -> Rows:
    return [{**row, "rejected": row["chosen"]} if number < count else row for number, row in enumerate(pairs())]


LONG = "warm " * POSITIONS

BAD: dict[str, tuple[Rows, str]] = {
    "few": (pairs(15), "it has 15 usable rows; at least 16 are needed"),
    "none": ([], "there are no rows in it"),
    "one side": (labelled(40, 0), "it has 0 usable rows with label false; at least 8 are needed"),
    "hardly a side": (labelled(5, 40), "it has 5 usable rows with label true; at least 8 are needed"),
    "a missing side": (
        [{"prompt": "a", "chosen": "b"}] * 40,
        "line 1, field 'rejected': it is missing; if the column has another name",
    ),
    "equal sides": (
        same(40),
        "line 1, field 'rejected': chosen and rejected are equal, so nothing is preferred",
    ),
    "an equal pair": (
        same(1),
        "line 1, field 'rejected': chosen and rejected are equal, so nothing is preferred",
    ),
    "an empty response": (
        changed(1, chosen=""),
        "line 1, field 'chosen': it is empty; correct the row, or skip such rows with --skip-bad-rows",
    ),
    "a long response": (
        changed(1, chosen=LONG),
        f"but the model's context holds {POSITIONS}; 1 of 40 rows are too",
    ),
    "a long prompt": (
        changed(40, prompt=LONG),
        f"but the model's context holds {POSITIONS}; 40 of 40 rows are too",
    ),
}
FIXED = {
    "calibrate": (),
    "evaluate preferences": ("--randoms", "0", "--rows", "8"),
    "fit": ("--layers", "1"),
}
QUICK = {"evaluate preferences": ("--strengths", "-1,0,1", "--reward-samples", "0"), "fit": ("--no-calibrate",)}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Rows], Path]:
    def write(rows: Rows) -> Path:
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.fixture(scope="module")
def kept(model: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of an existing profile."""
    directory = tmp_path_factory.mktemp("kept")
    data = directory / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in pairs()))
    assert run("fit", model, data, directory, "--layers", "1").exit_code == 0
    return (directory / "kind.safetensors").read_bytes()


@pytest.fixture
def profiles(tmp_path: Path, kept: bytes) -> Path:
    directory = tmp_path / "profiles"
    directory.mkdir()
    (directory / "kind.safetensors").write_bytes(kept)
    return directory


def run(command: str, model: Path, data: Path, profiles: Path, *more: str) -> Result:
    place = ["--out" if command == "fit" else "--profiles", str(profiles)]
    fixed = [*command.split(), "kind", "--model", str(model), "--data", str(data), *place, *FIXED[command]]
    return CliRunner().invoke(app, [*fixed, *more])


def check_refused(result: Result, profiles: Path, kept: bytes, message: str) -> None:
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert [path.name for path in profiles.iterdir()] == ["kind.safetensors"]
    assert (profiles / "kind.safetensors").read_bytes() == kept


@pytest.mark.parametrize("command", FIXED)
@pytest.mark.parametrize("case", BAD)
def test_bad_data_is_one_line_and_leaves_the_profile(
    model: Path, profiles: Path, kept: bytes, write: Callable[[Rows], Path], command: str, case: str
) -> None:
    rows, message = BAD[case]
    data = write(rows)
    result = run(command, model, data, profiles)
    check_refused(result, profiles, kept, message)
    assert str(data) in result.stderr


@pytest.mark.parametrize("command", FIXED)
def test_enough_rows_must_remain(
    model: Path, profiles: Path, kept: bytes, write: Callable[[Rows], Path], command: str
) -> None:
    result = run(command, model, write(changed(25, chosen="")), profiles, "--skip-bad-rows")
    check_refused(result, profiles, kept, "it has 15 usable rows (25 bad ones were skipped); at least 16 are needed")
    result = run(command, model, write(changed(25, chosen=LONG)), profiles, "--skip-long-rows")
    message = f"it has 15 usable rows (25 exceed the model's context of {POSITIONS} tokens); at least 16 are needed"
    check_refused(result, profiles, kept, message)


def test_rows_with_equal_sides_are_skipped_and_counted(
    model: Path, profiles: Path, write: Callable[[Rows], Path]
) -> None:
    result = run("fit", model, write(same(10)), profiles, "--no-calibrate", "--skip-bad-rows")
    assert result.exit_code == 0, result.stderr
    assert "note: 10 bad rows were skipped" in result.stdout
    data = load_profile(profiles / "kind.safetensors").data
    assert (data["rows"], data["bad_rows_skipped"]) == (30, 10)


def conversations(count: int = 40) -> Rows:
    """Rows of messages, of which every tenth begins with two turns of the user."""
    return [
        {
            "prompt": [{"role": "user", "content": f"What of {row}?"}] * (2 if row % 10 == 4 else 1),
            "chosen": f"warm {row} kindly",
            "rejected": f"three {row} letters",
        }
        for row in range(count)
    ]


@pytest.fixture
def strict(model: Path, tmp_path: Path) -> Path:
    """The model with a template that refuses more than one turn."""
    strict = tmp_path / "strict"
    shutil.copytree(model, strict)
    tokenizer = tiny_tokenizer()
    template = str(tokenizer.chat_template)
    tokenizer.chat_template = "{% if messages | length > 1 %}{{ raise_exception('one turn') }}{% endif %}" + template
    tokenizer.save_pretrained(strict)
    return strict


PROBLEM = "the model's chat template refuses these messages: one turn"
SKIPPED = f"4 bad rows were skipped; the first: line 5, field 'prompt': {PROBLEM}"


@pytest.mark.parametrize("command", FIXED)
def test_rows_that_the_template_refuses(
    strict: Path, profiles: Path, kept: bytes, write: Callable[[Rows], Path], command: str
) -> None:
    data = write(conversations())
    result = run(command, strict, data, profiles)
    check_refused(
        result,
        profiles,
        kept,
        f"error: {data}, line 5, field 'prompt': {PROBLEM}; 4 of 40 rows cannot be encoded; correct the row, or skip "
        "such rows with --skip-bad-rows",
    )
    result = run(command, strict, data, profiles, "--skip-bad-rows", *QUICK.get(command, ()))
    assert result.exit_code == 0, result.stderr
    assert unwrapped(result).count(f"note: {SKIPPED}") == 1
    if command == "fit":
        stored = load_profile(profiles / "kind.safetensors").data
        assert (stored["rows"], stored["bad_rows_skipped"]) == (36, 4)
    result = run(command, strict, data, profiles, "--skip-bad-rows", *QUICK.get(command, ()), "--json")
    assert result.stdout.count(json.dumps(SKIPPED)) == 1
    if command == "calibrate":
        assert load_profile(profiles / "kind.safetensors").calibration["notes"] == [SKIPPED]


@pytest.mark.parametrize(
    "command",
    [
        ("distill", "kind", "--steps", "1", "--batch", "2"),
        ("distill-method", "rahf-scit", "--steps", "1", "--batch", "2", "-o", "epochs=0.1", "--layers", "1"),
        ("methods", "compare", "--methods", "mean-diff,pca", "--layers", "1", "--randoms", "0", "--rows", "8"),
    ],
    ids=lambda command: command[0],
)
def test_commands_that_store_no_profile_note_skipped_rows(
    strict: Path,
    profiles: Path,
    write: Callable[[Rows], Path],
    command: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    rows = conversations()
    rows[39]["prompt"] = [{"role": "user", "content": LONG}]
    fixed = ["--model", str(strict), "--data", str(write(rows)), "--skip-bad-rows", "--skip-long-rows"]
    fixed += ["--profiles", str(profiles)] if command[0] == "distill" else []
    long = "1 rows longer than the model's context were left out"
    for number, more in enumerate(((), ("--json",))):
        out = ["--out", str(tmp_path / f"out-{number}")]
        result = CliRunner().invoke(app, [*command, *fixed, *out, *more])
        assert result.exit_code == 0, result.output
        if more:
            printed = json.loads(result.stdout)
            assert printed.get("data", printed)["notes"] == [SKIPPED, long]
        else:
            assert [unwrapped(result).count(f"note: {note}") for note in (SKIPPED, long)] == [1, 1]


def unwrapped(result: Result) -> str:
    return " ".join(result.stdout.split())


def test_notes_and_skipped_rows_are_printed(model: Path, profiles: Path, write: Callable[[Rows], Path]) -> None:
    data = write([row | {"source": "web"} for row in same(1)])
    result = run("fit", model, data, profiles, "--no-calibrate", "--skip-bad-rows")
    skipped = "line 1, field 'rejected': chosen and rejected are equal, so nothing is preferred"
    assert result.stderr.splitlines()[:2] == [
        "note: columns that were not read: source",
        f"skipped: {data}, {skipped}",
    ]
    assert "note: columns that were not read: source" in unwrapped(result)
    assert f"note: 1 bad rows were skipped; the first: {skipped}" in unwrapped(result)


def test_the_flag_to_type_is_in_the_error(
    model: Path, profiles: Path, kept: bytes, write: Callable[[Rows], Path]
) -> None:
    names = {"prompt": "question", "chosen": "response_chosen", "rejected": "response_rejected"}
    data = write([{names[key]: value for key, value in row.items()} for row in pairs()])
    flag = "--columns prompt=question,chosen=response_chosen,rejected=response_rejected"
    check_refused(run("fit", model, data, profiles), profiles, kept, f"rename them: {flag}\n")
    assert run("fit", model, data, profiles, "--no-calibrate", *flag.split()).exit_code == 0


def test_a_full_disk_leaves_the_profile(
    model: Path, profiles: Path, kept: bytes, write: Callable[[Rows], Path]
) -> None:
    data = write(pairs())
    for command in ("fit", "calibrate"):
        with full_disk(1000):
            result = run(command, model, data, profiles)
        assert result.exit_code == 2
        assert "kind.safetensors: cannot be written" in result.stderr.splitlines()[-1]
        assert [path.name for path in profiles.iterdir()] == ["kind.safetensors"]
        assert (profiles / "kind.safetensors").read_bytes() == kept


def test_a_disk_that_is_full_while_tuning(
    model: Path,
    profiles: Path,
    kept: bytes,
    write: Callable[[Rows], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    data, tuned = write(pairs()), ("--method", "rahf-scit", "-o", "epochs=0.5", "--no-calibrate")
    with full_disk(1000):
        result = run("fit", model, data, profiles, *tuned)
    assert result.exit_code == 2
    assert "free some space, or set TRIMTAB_CACHE to another directory" in result.stderr.splitlines()[-1]
    assert (profiles / "kind.safetensors").read_bytes() == kept
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix in (".part", ".tmp")]
    assert run("fit", model, data, profiles, *tuned).exit_code == 0
    assert load_profile(profiles / "kind.safetensors").method == "rahf-scit"
