"""The help of every command loads no model code and describes every flag."""

from __future__ import annotations

import subprocess
import sys

import pytest
import typer

from steering_vectors.cli import flags
from tests.steering_vectors.cli.conftest import Run, app

COMMANDS = (
    ("fit",),
    ("methods",),
    ("calibrate",),
    ("show",),
    ("evaluate",),
    ("evaluate", "preferences"),
    ("evaluate", "trust"),
    ("distill",),
    ("distill-method",),
    ("bake",),
)
NO_MODEL_CODE = """
import sys, typer
from steering_vectors.cli.app import register
app = typer.Typer()
register(app)
for command in {commands}:
    app([*command, "--help"], standalone_mode=False)
print({{"torch", "transformers", "sklearn", "numpy"}} & sys.modules.keys(), file=sys.stderr)
"""


def test_help_loads_no_model_code() -> None:
    code = NO_MODEL_CODE.format(commands=[(), *COMMANDS])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "set()\n"
    assert done.stdout.count("Usage:") == len(COMMANDS) + 1


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_flag_is_described_and_has_a_panel(words: tuple[str, ...]) -> None:
    command = typer.main.get_command(app)
    for word in words:
        command = command.commands[word]
    assert command.help or command.callback.__doc__
    for parameter in command.params:
        if parameter.name == "help":
            continue
        assert parameter.help, parameter.name
        assert parameter.help.endswith((".", "…")), parameter.name
        assert parameter.rich_help_panel in {*flags.PANELS, None}


def test_old_flags_are_not_shown(run: Run) -> None:
    assert "--bake" not in run("distill", "--help").stdout
    assert "--method" not in run("distill", "--help").stdout
    shown = run("evaluate", "--help").stdout
    assert "--suite" not in shown
    assert "_suites" not in shown
