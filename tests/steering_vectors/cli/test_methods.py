"""`trimtab methods`: every method, its options and its paper."""

from __future__ import annotations

import json

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
