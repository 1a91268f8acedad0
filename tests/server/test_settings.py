"""Settings: from flags, the environment and defaults; what cannot work is refused by name."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from server import cli
from server.engines import config
from server.http.listener import listen
from server.settings import (
    ConfigurationError,
    Settings,
    load_settings,
    read_api_keys,
    unknown_variables,
)
from tests.support.malformed import says

pytestmark = pytest.mark.slow


def test_defaults() -> None:
    settings = load_settings()
    assert (settings.model, settings.host, settings.port, settings.slots) == ("demo", "127.0.0.1", 8000, 16)
    assert (settings.context, settings.dtype, settings.device) == (None, "auto", "cpu")
    assert settings.profiles == Path("profiles")


def test_defaults_are_the_engines() -> None:
    settings = load_settings()
    assert settings.slots == config.DEFAULT_SLOTS
    assert settings.max_queue == config.DEFAULT_QUEUE
    assert settings.prefill_chunk == config.DEFAULT_CHUNK
    assert settings.prefix_reuse


def test_a_flag_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_PORT", "9000")
    monkeypatch.setenv("TRIMTAB_SLOTS", "3")
    settings = load_settings({"port": 9001})
    assert (settings.port, settings.slots) == (9001, 3)


def test_an_empty_variable_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_CONTEXT", "")
    assert load_settings().context is None


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("port", 65536, "--port (TRIMTAB_PORT): …65535, not 65536"),
        ("port", -1, "--port (TRIMTAB_PORT): …0, not -1"),
        ("slots", 0, "--slots (TRIMTAB_SLOTS): …1, not 0"),
        ("context", 1, "--context (TRIMTAB_CONTEXT): …2, not 1"),
        ("threads", 0, "--threads (TRIMTAB_THREADS): …1, not 0"),
        ("dtype", "int8", "--dtype (TRIMTAB_DTYPE): …'auto'…'float32'…'bfloat16'…'float16'"),
        ("device", "../cpu", "--device (TRIMTAB_DEVICE): …"),
        ("served_model_name", "a b", "--served-model-name (TRIMTAB_SERVED_MODEL_NAME): …"),
    ],
)
def test_senseless_values_are_refused_by_name(name: str, value: Any, text: str) -> None:
    with pytest.raises(ConfigurationError) as failure:
        load_settings({name: value})
    assert says(failure.value.message, f"{text}…")


@pytest.mark.parametrize(
    ("given", "flag"),
    [({"cuda_graphs": True}, "--cuda-graphs"), ({"gpu_memory_utilization": 0.5}, "--gpu-memory-utilization")],
)
def test_what_is_for_gpus_is_refused_on_a_cpu(given: dict[str, Any], flag: str) -> None:
    with pytest.raises(ConfigurationError) as failure:
        load_settings(given)
    assert failure.value.message == f"{flag} is for GPUs: leave it out, or serve with --device cuda"
    assert load_settings({**given, "device": "cuda:0"}).device == "cuda:0"
    assert load_settings({"cuda_graphs": False}).cuda_graphs is False


def test_every_setting_is_a_flag_of_serve() -> None:
    shown = CliRunner().invoke(cli.app, ["serve", "--help"], env={"COLUMNS": "200"}).output
    assert [name for name in Settings.model_fields if f"--{name.replace('_', '-')}" not in shown] == []
    assert [name for name in Settings.model_fields if f"TRIMTAB_{name.upper()}" not in shown] == []


def test_flags_are_grouped_by_what_they_concern() -> None:
    shown = CliRunner().invoke(cli.app, ["serve", "--help"], env={"COLUMNS": "200"}).output
    panels = re.findall(r"╭─ (\w+) ─", shown)
    assert panels == ["Options", "Model", "Serving", "Steering", "Limits", "Performance", "GPU", "Security", "Logging"]
    assert shown.index("─ GPU ─") < shown.index("--device ") < shown.index("─ Security ─")


def test_flags_become_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []
    monkeypatch.setattr(cli, "serve", given.append)
    words = ["serve", "--port", "9000", "--no-prefix-reuse", "--dtype", "bfloat16", "--profiles", "there"]
    assert CliRunner().invoke(cli.app, words).exit_code == 0
    assert given == [{"port": 9000, "prefix_reuse": False, "dtype": "bfloat16", "profiles": Path("there")}]


def test_unknown_variables_are_found() -> None:
    assert unknown_variables({"TRIMTAB_PORT": "1", "TRIMTAB_PROT": "1", "PATH": ""}) == ["TRIMTAB_PROT"]


def test_keys_are_read_one_a_line(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# of the team\nfirst\n\n second \n")
    assert read_api_keys(path) == {"first", "second"}


def test_a_key_file_without_keys_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    with pytest.raises(ConfigurationError, match="cannot be read"):
        read_api_keys(path)
    path.write_text("\n# nothing\n")
    with pytest.raises(ConfigurationError, match="holds no key"):
        read_api_keys(path)


def test_a_busy_port_is_said_before_the_model_is_loaded() -> None:
    with listen("127.0.0.1", 0) as taken, pytest.raises(ConfigurationError) as failure:
        listen("127.0.0.1", taken.getsockname()[1])
    assert "in use; stop what runs there or choose another --port" in failure.value.message


def test_errors_of_the_command_are_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["trimtab", "serve", "--slots", "0"])
    with pytest.raises(SystemExit) as leaving:
        cli.main()
    assert leaving.value.code == 2
    error = "error: --slots (TRIMTAB_SLOTS): …1, not 0\n"
    assert says(capsys.readouterr().err, error)


def test_version() -> None:
    assert CliRunner().invoke(cli.app, ["--version"]).output.startswith("trimtab ")


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    return set(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split())


def test_the_server_imports_nothing_it_does_not_need() -> None:
    assert loaded_by("import server.app") & {"sklearn", "datasets", "peft", "matplotlib", "pandas"} == set()


HEAVY = {"torch", "transformers", "fastapi", "uvicorn", "pydantic_settings", "httpx", "prompt_toolkit"}


@pytest.mark.parametrize("words", [["--help"], ["fit", "--help"], ["show", "--help"]])
def test_help_imports_no_more_than_it_shows(words: list[str]) -> None:
    run = f"from server import cli; from typer.testing import CliRunner; CliRunner().invoke(cli.app, {words})"
    assert loaded_by(run) & HEAVY == set()


def test_the_command_imports_no_model_code() -> None:
    assert loaded_by("import server.cli") & HEAVY == set()
