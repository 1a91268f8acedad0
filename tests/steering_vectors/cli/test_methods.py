"""`trimtab methods`: every method, its options and its paper."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from steering_vectors.cli.fit import METHODS
from steering_vectors.methods import method_named, method_names
from tests.steering_vectors.cli.conftest import Run


def test_json_lists_every_method(run: Run) -> None:
    result = run("methods", "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    listed = json.loads(result.stdout)
    assert [one["name"] for one in listed] == list(method_names())
    for one in listed:
        assert one["direction"]
        assert "arXiv:" in one["paper"]
        defaults = {option["name"]: option["default"] for option in one["options"]}
        assert defaults == method_named(one["name"]).complete({})
        assert all(option["help"] for option in one["options"])
    bipo = next(one for one in listed if one["name"] == "bipo")
    assert bipo["options"][0] == {"name": "beta", "type": "float", "default": 0.1, "help": "β of the loss."}


def test_the_table_shows_every_option(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    text = run("methods").stdout
    for name in method_names():
        assert name in text
        assert all(option in text for option in method_named(name).complete({}))


def test_the_help_of_fit_names_every_method() -> None:
    assert tuple(METHODS.split(", ")) == method_names()


@pytest.mark.slow
def test_methods_are_compared_and_stored(run: Run, tiny: Path, pairs: Path, tmp_path: Path) -> None:
    result = run(
        *("methods", "compare", "--model", tiny, "--data", pairs, "--methods", "mean-diff, pca", "--layers", 1),
        *("--randoms", 1, "--heldout-fraction", 0.4, "--rows", 8, "--out", tmp_path / "made"),
        *("--report", tmp_path / "page.html"),
    )
    assert result.exit_code == 0, result.stderr
    rows = [line.split()[0] for line in result.stdout.splitlines() if re.match(r" +[a-z-]+ +1 +[+-]", line)]
    assert rows == ["mean-diff", "pca", "random"]
    assert f"report: {tmp_path / 'page.html'}" in result.stdout
    assert sorted(path.stem for path in (tmp_path / "made").glob("*.safetensors")) == ["mean-diff", "pca"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--methods", "magic"), "error: method 'magic' is not one of mean-diff"),
        (("-o", "rank=4"), "error: --option rank=4 names no method; write METHOD.rank=4"),
        (("--methods", "pca", "-o", "bipo.beta=1"), "error: options are given for bipo, which is not compared"),
    ],
)
def test_unusable_choices(run: Run, tiny: Path, pairs: Path, arguments: tuple[str, ...], message: str) -> None:
    result = run("methods", "compare", "--model", tiny, "--data", pairs, *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(message)
