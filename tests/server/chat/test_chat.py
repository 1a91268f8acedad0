"""`trimtab chat`: whole conversations with a real server, from a pipe and from a terminal."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput
from rich.console import Console

from benchmarks.common.forked import ForkedCommand
from server import cli
from server.chat.conversation import ChatError, Conversation, Sampling, open_conversation, read_steering
from server.chat.remote import Remote
from server.chat.screen import Screen, clean
from server.chat.terminal import converse, typed_lines
from server.engines.config import EngineConfig
from server.engines.protocol import Delta, Event, EventStream, GenerationRequest
from server.engines.torch.engine import TorchEngine
from steering_vectors.models.loading import load_model
from tests.support.serving import live_server, save_profiles, until

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]
FIRST, SECOND = "How do I bake bread?", "And tea?"
GREEDY = ("--temperature", "0", "--max-tokens", "24")
SECONDS = 60


class Halted:
    """A stream that gives its first text and then nothing until it is closed."""

    def __init__(self, events: EventStream) -> None:
        self._events = events
        self._text = False

    def __aiter__(self) -> Halted:
        return self

    async def __anext__(self) -> Event:
        if self._text:
            await asyncio.Event().wait()
        event = await self._events.__anext__()
        self._text = isinstance(event, Delta) and bool(event.text)
        return event

    async def aclose(self) -> None:
        await self._events.aclose()


class HaltingEngine(TorchEngine):
    """An engine that, while `halting`, halts every stream it begins."""

    halting = False

    async def submit(self, requests: Sequence[GenerationRequest]) -> EventStream:
        events = await super().submit(requests)
        return Halted(events) if self.halting else events


@pytest.fixture(scope="module")
def engine() -> Iterator[HaltingEngine]:
    engine = HaltingEngine(load_model("demo", dtype="float32"), EngineConfig(slots=4))
    yield engine
    asyncio.run(engine.close())


@pytest.fixture(scope="module")
def profiles(engine: TorchEngine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("profiles")
    save_profiles(directory, engine.info.identity, "warm", "concise", unit=0.2, calibration={"kl_at_1": 0.1})
    return directory


@pytest.fixture(scope="module")
def client(engine: HaltingEngine, profiles: Path) -> Iterator[httpx.Client]:
    with live_server(engine, profiles) as client:
        yield client


Talk = Callable[..., ForkedCommand]


@pytest.fixture
def start(client: httpx.Client, tmp_path: Path) -> Talk:
    """Start the command, talking to the live server unless told otherwise."""

    def started(*options: str, **environment: str) -> ForkedCommand:
        state = {"TRIMTAB_URL": str(client.base_url), "XDG_STATE_HOME": str(tmp_path)}
        return ForkedCommand(["chat", *options], {**os.environ, **state, **environment}, directory=tmp_path)

    return started


def talk(process: ForkedCommand, *lines: str) -> tuple[list[str], str, int]:
    """What it says to these lines: stdout's lines, stderr, and the exit code."""
    with process:
        out, errors = process.communicate("".join(f"{line}\n" for line in lines), timeout=SECONDS)
        return out.splitlines(), errors, process.wait(SECONDS)


def answer(client: httpx.Client, *said: str, **fields: Any) -> dict[str, Any]:
    """What the API answers after what was said by turns, greedy and short as in GREEDY."""
    roles = ("user", "assistant")
    messages = [{"role": roles[place % 2], "content": text} for place, text in enumerate(said)]
    body = {"model": "demo", "messages": messages, "temperature": 0, "max_tokens": 24, **fields}
    found: dict[str, Any] = client.post("/v1/chat/completions", json=body).raise_for_status().json()
    return found


def text_of(found: dict[str, Any]) -> str:
    return str(found["choices"][0]["message"]["content"])


def receipt_of(found: dict[str, Any]) -> str:
    end = ", cut at the limit" if found["choices"][0]["finish_reason"] == "length" else ""
    terms = [f"{one['name']}@{one['strength']:g} at {one['steered_tokens']} positions" for one in found["steering"]]
    return f"[{', '.join(terms) or 'no steering'}; {found['usage']['completion_tokens']} tokens{end}]"


def effect_of(client: httpx.Client, steering: str) -> str:
    """What /steer says of it."""
    found = client.post("/steering/resolve", json={"steering": steering}).raise_for_status().json()["steering"]
    terms = [
        f"{one['name']}@{one['strength']:g} at blocks {', '.join(map(str, one['layers']))}, "
        f"{'calibrated' if one['calibrated'] else 'not calibrated'}"
        for one in found
    ]
    return f"[steering: {'; '.join(terms)}]"


def test_a_conversation_is_what_the_api_says(start: Talk, client: httpx.Client) -> None:
    lines, errors, code = talk(start(*GREEDY), FIRST, "", SECOND)
    first = answer(client, FIRST)
    second = answer(client, FIRST, text_of(first), SECOND)
    expected = [text_of(first), receipt_of(first), text_of(second), receipt_of(second)]
    assert (lines, errors, code) == ("\n".join(expected).splitlines(), "", 0)


def test_a_seed_repeats_a_reply(start: Talk, client: httpx.Client) -> None:
    lines, _, _ = talk(start("--seed", "11", "--max-tokens", "24"), FIRST)
    assert "\n".join(lines[:-1]) == text_of(answer(client, FIRST, temperature=1, seed=11))


@pytest.mark.parametrize("words", ["warm 0.8 concise -0.3", "warm@0.8+concise@-0.3"])
def test_steering_holds_from_then_on_and_shows(start: Talk, client: httpx.Client, words: str) -> None:
    lines, errors, code = talk(start(*GREEDY), f"/steer {words}", FIRST, "/steer off", FIRST, "/steer")
    steered = answer(client, FIRST, steering="warm@0.8+concise@-0.3")
    plain = answer(client, FIRST, text_of(steered), FIRST)
    assert lines[0] == effect_of(client, "warm@0.8+concise@-0.3")
    assert "not calibrated" in lines[0]  # a mix never is
    assert lines.count(receipt_of(steered)) == 1
    assert "warm@0.8 at " in receipt_of(steered)
    assert lines[-2:] == [receipt_of(plain), "[steering: none]"]
    assert text_of(steered) in "\n".join(lines)
    assert (errors, code) == ("", 0)


def test_an_alias_is_a_model_and_a_steering(start: Talk, client: httpx.Client) -> None:
    lines, _, _ = talk(start(*GREEDY, "--model", "demo:warm@0.8"), "/steer", FIRST)
    assert lines[0] == effect_of(client, "warm@0.8")
    assert lines[0].startswith("[steering: warm@0.8 at blocks 1, 3, ")
    assert lines[0].endswith(", calibrated]")
    assert lines[-1] == receipt_of(answer(client, FIRST, steering="warm@0.8"))


def test_a_steering_that_cannot_be_is_told_at_once(start: Talk, client: httpx.Client) -> None:
    said = ("/steer warm 0", "/steer kind", "/steer warm 9", "/steer warm 1.5 concise 1.5", "/steer WARM", "/steer")
    lines, errors, code = talk(start(), *said)
    assert errors.splitlines() == [
        "error: profile 'kind' is not served; served are: concise, warm",
        "error: strength 9 of profile 'warm' is beyond its safe range of ±2; "
        "set steering.allow_beyond_safe to true to go beyond it",
        *(
            f"error: {client.post('/steering/resolve', json={'steering': steering}).json()['error']['message']}"
            for steering in ("warm@1.5+concise@1.5", "WARM@1")
        ),
    ]
    assert lines == ["[steering: warm@0 at no block]"] * 2  # that one stays
    assert code == 2


def test_errors_are_the_servers_own_words_and_lose_nothing(start: Talk, client: httpx.Client) -> None:
    long = f"/system {'word ' * 5000}"
    said = ("/steer warm 0.5", long, FIRST, "/system off", "/retry", "/nothing")
    lines, errors, code = talk(start(*GREEDY), *said)
    found = answer(client, FIRST, steering="warm@0.5")
    refusal, unknown = errors.splitlines()
    assert "tokens" in refusal
    assert unknown == (
        "error: there is no command /nothing: /help lists them (a question that begins with / needs a space first)"
    )
    assert lines[0] == effect_of(client, "warm@0.5")
    assert "\n".join(lines[-2:]).endswith(receipt_of(found))
    assert text_of(found) in "\n".join(lines)
    assert code == 2


def test_retry_takes_the_place_of_the_last_reply(start: Talk, client: httpx.Client) -> None:
    lines, _, _ = talk(start(*GREEDY), FIRST, "/steer warm", "/retry", "/history")
    found = answer(client, FIRST, steering="warm")
    assert "\n".join(lines).endswith(f"{receipt_of(found)}\n> {FIRST}\n{text_of(found)}")


def test_compare_shows_both(start: Talk, client: httpx.Client) -> None:
    lines, errors, _ = talk(start(*GREEDY), "/compare", "/steer warm 0.8", f"/compare {FIRST}", FIRST, "/compare")
    plain, steered = answer(client, FIRST, seed=0), answer(client, FIRST, steering="warm@0.8", seed=0)
    pair = f"no steering: {text_of(plain).strip()}\n{receipt_of(plain)}\n"
    pair += f"warm@0.8: {text_of(steered).strip()}\n{receipt_of(steered)}"
    whole = "\n".join(lines)
    assert whole.count(pair) == 2
    assert whole.endswith(pair)
    assert errors == "error: nothing has been asked yet\n"


def test_system_clear_history_and_save(start: Talk, client: httpx.Client, tmp_path: Path) -> None:
    said = (
        "/system Be kind.",
        FIRST,
        "/save one.json",
        "/save one.json",
        "/clear",
        "/history",
        FIRST,
        "/save two.json",
    )
    lines, errors, _ = talk(start(*GREEDY), *said)
    body = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": FIRST}]
    found = answer(client, messages=body)
    assert lines[0] == "[system: Be kind.]"
    assert lines.count(receipt_of(found)) == 2
    assert errors == "error: one.json exists: name another file\n"
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    assert one == two
    assert one["turns"][0]["reply"]["text"] == text_of(found)
    assert (one["system"], one["sampling"]["temperature"]) == ("Be kind.", 0)


def test_profiles_and_help_are_tables(start: Talk) -> None:
    lines, errors, code = talk(start(COLUMNS="120"), "/profiles", "/help", "/quit", FIRST)
    assert errors == ""
    assert [line.split()[:3] for line in lines[1:3]] == [["concise", "served", "±2"], ["warm", "served", "±2"]]
    assert [line.split()[0] for line in lines[3:]] == [
        "/steer", "/profiles", "/compare", "/retry", "/system", "/clear", "/history", "/save", "/help", "/quit",
    ]  # fmt: skip
    assert code == 0


def test_ctrl_c_stops_the_reply_and_the_session_goes_on(
    start: Talk, client: httpx.Client, engine: HaltingEngine
) -> None:
    before = engine.stats().finished.get("cancelled", 0)
    engine.halting = True
    process = start(*GREEDY)
    assert process.stdout is not None
    try:
        process.stdin.write(f"{FIRST}\n")
        process.stdin.flush()
        begun = process.stdout.read(1)
        engine.halting = False
        process.send_signal(signal.SIGINT)
        until(lambda: engine.stats().finished.get("cancelled", 0) == before + 1)
        lines, errors, code = talk(process, SECOND)
    finally:
        engine.halting = False
        process.kill()
    part = begun + lines[0]
    second = answer(client, FIRST, part, SECOND)
    assert text_of(answer(client, FIRST)).startswith(part)
    assert lines[1:] == f"[stopped]\n{text_of(second)}\n{receipt_of(second)}".splitlines()
    assert (errors, code) == ("", 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--url", "http://127.0.0.1:1/v1/"),
            "no server answers at http://127.0.0.1:1: start one with `trimtab serve`, or name another by --url",
        ),
        (("--url", "nowhere"), "--url 'nowhere' is no address such as http://127.0.0.1:8000"),
        (("--model", "gpt"), "model 'gpt' is not served; GET /v1/models lists what is"),
        (("--model", "demo:kind"), "profile 'kind' is not served; served are: concise, warm"),
    ],
)
def test_what_keeps_it_from_beginning(start: Talk, options: tuple[str, ...], message: str) -> None:
    assert talk(start(*options), FIRST) == ([], f"error: {message}\n", 2)


def test_a_key_comes_from_the_environment(engine: HaltingEngine, profiles: Path, tmp_path: Path, start: Talk) -> None:
    keys = tmp_path / "keys"
    keys.write_text("secret\n")
    with live_server(engine, profiles, api_key_file=keys) as client:
        url = str(client.base_url)
        lines, _, code = talk(start(*GREEDY, TRIMTAB_URL=url, TRIMTAB_API_KEY="secret"), FIRST)
        assert (len(lines) > 1, code) == (True, 0)
        _, errors, code = talk(start(TRIMTAB_URL=url), FIRST)
        assert (errors, code) == ("error: this server requires a key: send it as 'Authorization: Bearer KEY'\n", 2)


def test_it_starts_without_model_code() -> None:
    code = (
        "import sys, server.cli, server.chat.terminal; print({'torch', 'transformers', 'fastapi'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "set()"


@pytest.fixture
def keyboard() -> Iterator[PipeInput]:
    with create_pipe_input() as keyboard, create_app_session(input=keyboard, output=DummyOutput()):
        yield keyboard


@pytest.fixture
def conversation(client: httpx.Client) -> Iterator[Conversation]:
    """One whose screen is a wide terminal that is written to a string."""
    out = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=120, highlight=False, markup=False)
    remote = Remote(str(client.base_url))
    yield open_conversation(remote, Screen(out, out), "", "", Sampling(temperature=0, max_tokens=24))
    remote.close()


def shown(conversation: Conversation) -> str:
    file = conversation.screen._out.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


@pytest.mark.parametrize("writable", [True, False])
def test_at_a_terminal(
    client: httpx.Client,
    conversation: Conversation,
    keyboard: PipeInput,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    writable: bool,
) -> None:
    """Lines are remembered if they can be, Ctrl-C at the prompt drops the line, Ctrl-D ends."""
    state = tmp_path / "state"
    if not writable:
        state.write_text("a file where a directory should be")
    monkeypatch.setenv("XDG_STATE_HOME", str(state))
    keyboard.send_text(f"half a li\x03{FIRST}\r/steer warm\r/compare\r\x04")
    assert converse(conversation, typed_lines(conversation), patient=True)
    whole = shown(conversation)
    assert text_of(answer(client, FIRST)) in whole
    assert whole.count(effect_of(client, "warm@1")) == 1
    assert "no steering" in whole.splitlines()[-3]
    assert "warm@1" in whole.splitlines()[-3]
    history = state / "trimtab" / "chat_history"
    if writable:
        assert f"+{FIRST}" in history.read_text().splitlines()
    else:
        assert state.read_text() == "a file where a directory should be"


def test_control_characters_of_a_model_do_nothing() -> None:
    assert clean("a\x1b[2Jb\r\x07\x9b1mc\n\td") == "a�[2Jb���1mc\n\td"


@pytest.mark.parametrize(
    ("text", "steering"),
    [
        ("warm", "warm@1"),
        ("warm +0.8", "warm@0.8"),
        ("warm concise -1e-1", "warm@1+concise@-0.1"),
        ("", ""),
    ],
)
def test_steering_as_it_is_typed(text: str, steering: str) -> None:
    assert read_steering(text) == steering


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0.8", "'0.8' is not a profile: write for example /steer warm 0.8 concise -0.3"),
        ("warm 1 2", "'2' is not a profile: write for example /steer warm 0.8 concise -0.3"),
        ("warm nan", "the strength of 'warm' must be a finite number"),
    ],
)
def test_steering_that_cannot_be_read(text: str, message: str) -> None:
    with pytest.raises(ChatError) as refusal:
        read_steering(text)
    assert str(refusal.value) == message


class InterruptedInput(io.StringIO):
    def readline(self, _size: int | None = -1, /) -> str:
        raise KeyboardInterrupt


def test_ctrl_c_at_a_pipe_that_says_nothing_ends_it(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["trimtab", "chat", "--url", str(client.base_url)])
    monkeypatch.setattr(sys, "stdin", InterruptedInput())
    with pytest.raises(SystemExit) as leaving:
        cli.main()
    assert leaving.value.code == 130


def test_a_text_that_is_interrupted_is_shown_once() -> None:
    """The signal comes while the console writes, as it does when a model writes fast."""

    class Interrupting(io.StringIO):
        def write(self, text: str, /) -> int:
            signal.raise_signal(signal.SIGINT)
            return super().write(text)

    out = Interrupting()
    with pytest.raises(KeyboardInterrupt):
        Screen(Console(file=out)).line("once")
    Screen(Console(file=io.StringIO())).line()
    assert out.getvalue() == "once\n"
