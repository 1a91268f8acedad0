"""Settings: from flags, the environment and defaults; what cannot work is refused by name."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks.common.forked import ForkedCommand
from server import cli
from server.engines import config
from server.http.listener import listen
from server.settings import (
    ConfigurationError,
    Settings,
    is_loopback,
    load_settings,
    refuse_mistyped_access,
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
    first = ["Options", "Model", "Serving", "Steering", "Limits", "Performance", "GPU", "Security", "Logging"]
    assert panels == [*first, "Feedback", "Jobs"]
    assert shown.index("─ GPU ─") < shown.index("--device ") < shown.index("─ Security ─")


def test_flags_become_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []
    monkeypatch.setattr(cli, "serve", given.append)
    words = ["serve", "--port", "9000", "--no-prefix-reuse", "--dtype", "bfloat16", "--profiles", "there"]
    assert CliRunner().invoke(cli.app, words).exit_code == 0
    assert given == [{"port": 9000, "prefix_reuse": False, "dtype": "bfloat16", "profiles": Path("there")}]


def test_unknown_variables_are_found() -> None:
    assert unknown_variables({"TRIMTAB_PORT": "1", "TRIMTAB_PROT": "1", "PATH": ""}) == ["TRIMTAB_PROT"]


@pytest.mark.parametrize("name", ["TRIMTAB_API_KEYS", "TRIMTAB_APIKEY", "trimtab_api_key_fil", "TRIMTAB_ALOWED_HOSTS"])
def test_a_mistyped_variable_of_access_is_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"the environment variable {name} is not a setting: is TRIMTAB_A"):
        refuse_mistyped_access(unknown_variables({name: "secret"}))


def test_other_variables_are_not_taken_for_access() -> None:
    kubernetes = {
        "TRIMTAB_SERVICE_HOST": "10.0.0.1",
        "TRIMTAB_PORT_8000_TCP": "tcp://10.0.0.1:8000",
        "TRIMTAB_PROT": "1",
    }
    refuse_mistyped_access(unknown_variables(kubernetes))


@pytest.mark.parametrize("name", ["TRIMTAB_API_KEY", "TRIMTAB_API_KEY_FILE", "trimtab_api_key"])
def test_an_empty_variable_of_a_key_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "")
    with pytest.raises(ConfigurationError, match=f"{name.upper()} is empty: give it a value, or unset it"):
        load_settings()


@pytest.mark.parametrize("given", [{"api_key": ""}, {"api_key": " \n"}, {"api_key_file": " "}])
def test_an_empty_key_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=r"--api-key(-file)? \(TRIMTAB_API_KEY(_FILE)?\) is empty"):
        load_settings(given)


def test_a_key_is_not_shown_in_representations_and_errors() -> None:
    assert "s3cret" not in repr(load_settings({"api_key": "s3cret"}))
    with pytest.raises(ConfigurationError) as failure:
        load_settings({"api_key": "s3cret", "limits_storage": "rediss:/user:s3cret@there", "port": -1})
    assert "--limits-storage (TRIMTAB_LIMITS_STORAGE): " in failure.value.message
    assert "s3cret" not in failure.value.message


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "::ffff:192.0.2.1"])
def test_other_machines_do_not_reach_a_server_without_keys(host: str) -> None:
    with pytest.raises(ConfigurationError) as failure:
        load_settings({"host": host})
    assert says(failure.value.message, f"--host {host} lets other machines reach a server without keys: …")
    assert load_settings({"host": host, "allow_unauthenticated": True}).host == host
    assert load_settings({"host": host, "api_key": "secret"}).host == host
    assert load_settings({"host": host, "api_key_file": "keys"}).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost"])
def test_loopback_needs_no_keys(host: str) -> None:
    assert is_loopback(host)
    assert load_settings({"host": host}).host == host


@pytest.mark.parametrize("name", ["requests_per_minute", "tokens_per_minute", "concurrent_requests"])
def test_budgets_need_keys(name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"--{name.replace('_', '-')} is counted for each key"):
        load_settings({name: 1})
    assert getattr(load_settings({name: 1, "api_key": "secret"}), name) == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"uds": "a.sock", "host": "::1"}, "--uds is listened on in place of --host: leave one of them out"),
        ({"uds": "a.sock", "port": 80}, "--uds is listened on in place of --port: leave one of them out"),
        ({"uds_mode": "660"}, "--uds-mode is for --uds: leave it out, or give --uds"),
        ({"uds": "a.sock", "uds_mode": "rw-"}, "--uds-mode (TRIMTAB_UDS_MODE): …'rw-'"),
        ({"uds": "a.sock", "uds_mode": "666"}, "--uds-mode 666 lets every user of this machine reach a server without "
         "keys: give --api-key-file or TRIMTAB_API_KEY, or --allow-unauthenticated if everyone may use it"),
        ({"ssl_keyfile": "key.pem"}, "--ssl-keyfile needs --ssl-certfile: give it, or leave both out"),
        ({"ssl_keyfile_password": "x"}, "--ssl-keyfile-password needs --ssl-certfile: give it, or leave both out"),
        ({"ssl_ca_certs": "ca.pem"}, "--ssl-ca-certs needs --ssl-certfile: give it, or leave both out"),
        ({"default_timeout_seconds": 7200}, "--default-timeout-seconds is 7200, more than --max-timeout-seconds, which "
         "is 3600: raise that, or lower this"),
        ({"jobs": True}, "--jobs needs a database to store jobs in: give --feedback-database"),
        ({"jobs_at_once": 2}, "--jobs-at-once is for jobs: leave it out, or give --jobs"),
        ({"keep_jobs": "soon"}, "--keep-jobs is a time such as 30m, 12h or 7d, or forever; not 'soon'"),
        ({"max_n": 129}, "--max-n (TRIMTAB_MAX_N): …128, not 129"),
        ({"max_queue_share": 0}, "--max-queue-share (TRIMTAB_MAX_QUEUE_SHARE): …0, not 0"),
    ],
)  # fmt: skip
def test_settings_that_contradict_each_other_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError) as failure:
        load_settings(given)
    assert says(failure.value.message, message)


@pytest.mark.parametrize("mode", ["600", "660", "700", "772"])
def test_a_unix_socket_that_not_every_user_may_write_to_needs_no_keys(mode: str) -> None:
    local = mode != "772"
    with contextlib.nullcontext() if local else pytest.raises(ConfigurationError, match="--uds-mode 772"):
        load_settings({"uds": "a.sock", "uds_mode": mode})
    assert load_settings({"uds": "a.sock", "uds_mode": mode, "api_key": "secret"}).is_local is local


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


@pytest.mark.parametrize(
    ("variables", "error"),
    [
        ({"TRIMTAB_HOST": "0.0.0.0"}, "error: --host 0.0.0.0 lets other machines reach a server without keys: …"),
        ({"TRIMTAB_API_KEY": ""}, "error: TRIMTAB_API_KEY is empty: …"),
        ({"TRIMTAB_API_KEY_FILE": ""}, "error: TRIMTAB_API_KEY_FILE is empty: …"),
        ({"TRIMTAB_API_KEY_FILE": "/missing/keys"}, "error: the API key file /missing/keys cannot be read …"),
        ({"TRIMTAB_API_KEYS": "secret"}, "error: the environment variable TRIMTAB_API_KEYS is not a setting: …"),
    ],
)
def test_a_server_that_would_be_open_by_mistake_does_not_start(
    variables: dict[str, str],
    error: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["trimtab", "serve", "--port", "0", "--profiles", str(tmp_path)])
    with pytest.raises(SystemExit) as leaving:
        cli.main()
    assert leaving.value.code == 2
    assert says(capsys.readouterr().err, f"{error}\n")


def test_version() -> None:
    assert CliRunner().invoke(cli.app, ["--version"]).output.startswith("trimtab ")


PACKAGES_LOADED = "print(*{name.partition('.')[0] for name in sys.modules})"


def test_the_server_imports_nothing_it_does_not_need() -> None:
    """Also the tests' own code in that process imports none of these."""
    with ForkedCommand([], os.environ, code=f"import sys, server.app; {PACKAGES_LOADED}") as process:
        printed, errors = process.communicate("", timeout=60)
    loaded = set(printed.split())
    assert "server" in loaded, errors
    assert loaded & {"sklearn", "datasets", "peft", "matplotlib", "pandas"} == set()


def test_help_and_the_command_import_no_more_than_they_show() -> None:
    """One process after the other would take a second each; what a help loads is still loaded after the next."""
    helps = [["--help"], ["fit", "--help"], ["show", "--help"]]
    shown = f"[CliRunner().invoke(cli.app, words) for words in {helps}]"
    code = f"import sys; from server import cli; from typer.testing import CliRunner; {shown}; {PACKAGES_LOADED}"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    heavy = {"torch", "transformers", "fastapi", "uvicorn", "pydantic_settings", "httpx", "prompt_toolkit"}
    assert set(done.stdout.split()) & heavy == set()
