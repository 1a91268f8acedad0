"""What must hold of readers of foreign bytes and texts, whatever they are given: profile files, steering strings, event
streams. `PROPERTIES` has a source of input and a check for each; a check raises for a violation."""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import httpx
import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from rich.console import Console
from safetensors.torch import save as to_safetensors

from server.chat.conversation import Conversation
from server.chat.remote import Remote, RemoteError
from server.chat.screen import Screen
from server.engines.errors import UnknownModel
from server.generation.steering_grammar import of_alias, parse_steering
from server.http.sse import frame
from steering_vectors.errors import ProfileError, SteeringError, TrimtabError
from steering_vectors.profiles.files import profile_summary, read_profile
from steering_vectors.profiles.profile import ModelIdentity, Profile
from tests.support.answer_mutations import VALUES

HIDDEN = 4
MAX_SECONDS = 5.0  # of processor time, for one input
MODEL = ModelIdentity("tiny", "LlamaForCausalLM", HIDDEN, 4, "0" * 64)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@cache
def a_file() -> tuple[dict[str, Any], bytes]:
    """The header and the data of a valid profile."""
    directions = {layer: torch.arange(1.0, HIDDEN + 1) for layer in (0, 2)}
    tensors = {f"block.{layer}.direction": direction for layer, direction in directions.items()}
    profile = Profile(name="warm", model=MODEL, directions=directions, method="mean-diff", residual_norms={0: 2.0})
    tensors["block.0.residual_norm"] = torch.tensor(2.0)
    summary: dict[str, Any] = {**profile_summary(profile), "format_version": 1}
    for name in ("version", "residual_norms", "direction_norms"):
        del summary[name]
    data = to_safetensors(tensors, metadata={"trimtab": json.dumps(summary)})
    read_profile(data, "warm")
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def packed(header: Any, rest: bytes, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + rest


@st.composite
def profile_files(draw: DrawFn) -> bytes:
    """A valid file with something in its header, its metadata, its lengths or its bytes changed; or any bytes."""
    header, rest = a_file()
    header = json.loads(json.dumps(header))
    kind = draw(st.sampled_from(["bytes", "length", "offsets", "tensor", "metadata", "value", "damage", "cut", "deep"]))
    name = draw(st.sampled_from(sorted(set(header) - {"__metadata__"})))
    if kind == "bytes":
        return draw(st.binary(max_size=200))
    if kind == "length":
        return packed(header, rest, draw(st.integers(0, 2**64 - 1) | st.integers(0, 2000)))
    if kind == "deep":
        return packed(b'{"a":' * draw(st.integers(1, 20_000)), rest)
    if kind == "offsets":
        header[name]["data_offsets"] = draw(st.lists(st.integers(0, 2**63) | st.integers(0, 40), max_size=3))
    elif kind == "tensor":
        field = draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
        header[name][field] = draw(VALUES | st.sampled_from(["F64", "BF16", "I64", [HIDDEN, 1], [2**62, 2**62]]))
    elif kind == "metadata":
        header["__metadata__"] = draw(VALUES | st.dictionaries(st.just("trimtab"), TEXTS))
    elif kind == "value":
        metadata = json.loads(header["__metadata__"]["trimtab"])
        holder = metadata["model"] if draw(st.booleans()) else metadata
        holder[draw(st.sampled_from(sorted(holder)) | TEXTS)] = draw(VALUES)
        header["__metadata__"]["trimtab"] = json.dumps(metadata)
    data = bytearray(packed(header, rest))
    if kind == "cut":
        return bytes(data[: draw(st.integers(0, len(data)))])
    if kind == "damage":
        for _ in range(draw(st.integers(1, 4))):
            data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data)


def in_words(error: TrimtabError) -> None:
    """A refusal says something."""
    assert error.message


def check_profile_file(data: bytes) -> None:
    """It is refused in words, or whole."""
    try:
        profile = read_profile(data, "warm")
    except ProfileError as error:
        in_words(error)
        return
    assert profile.version == hashlib.sha256(data).hexdigest()
    assert all(direction.isfinite().all() for direction in profile.directions.values())
    assert all(direction.shape == (profile.model.hidden_size,) for direction in profile.directions.values())
    json.dumps(profile_summary(profile), allow_nan=False)


PIECES = ["warm", "a#0123abcd", "@", "0.8", "-1e5", "+", "1e999", ".", "nan"]
REPEATED = ["a+", "+", "@", "warm@1+", "9", "a#"]
STEERING = st.one_of(
    st.text(st.sampled_from("aw0159.eE+-@# _\n\u0663é"), max_size=40),
    st.lists(st.sampled_from(PIECES), max_size=12).map("".join),
    TEXTS,
    st.builds(lambda part, count: part * count, st.sampled_from(REPEATED), st.integers(1, 3000)),
)


def check_steering(text: str) -> None:
    """It is refused in words, or what it means can be written again."""
    try:
        plan = parse_steering(text)
    except SteeringError as error:
        in_words(error)
        return
    again = "+".join(f"{term.profile}@{term.strength!r}" for term in plan.terms)
    assert parse_steering(again) == plan
    assert of_alias(f"demo:{text}", "demo") == plan
    try:
        of_alias(text, "demo")
    except (SteeringError, UnknownModel):
        return


def encoded(value: Any) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


CHOICES = st.fixed_dictionaries(
    {"delta": st.dictionaries(st.just("content"), TEXTS | st.none(), max_size=1)},
    optional={"finish_reason": st.sampled_from(["stop", "length", None]) | VALUES},
)
CHUNKS: SearchStrategy[Any] = st.fixed_dictionaries(
    {"choices": st.lists(CHOICES, max_size=2)}, optional={"usage": VALUES, "steering": VALUES, "error": VALUES}
)
ODD_LINES = [b"data: [DONE]\n\n", b"data:", b"\r\n", b": ping\n\n", b"data: " + b"[" * 5000 + b"\n", b"data: 1" * 900]
LINES = st.one_of(
    CHUNKS.filter(lambda chunk: "error" not in chunk).map(encoded),
    CHUNKS.map(encoded),
    VALUES.map(encoded),
    st.binary(max_size=30),
    st.sampled_from(ODD_LINES),
)
STREAMS = st.tuples(st.lists(LINES, max_size=6).map(b"".join), st.integers(1, 64))


@cache
def a_remote() -> Remote:
    return Remote("http://127.0.0.1:1")


def check_stream(given: tuple[bytes, int]) -> None:
    """The chat client shows a reply, or says what is wrong with the server."""
    content, size = given

    def answer(_request: httpx.Request) -> httpx.Response:
        parts = (content[start : start + size] for start in range(0, len(content), size))
        return httpx.Response(200, headers={"content-type": "text/event-stream"}, content=parts)

    remote = a_remote()
    remote._client = httpx.Client(base_url=remote.url, transport=httpx.MockTransport(answer), trust_env=False)
    console = Console(file=io.StringIO(), width=80)
    try:
        Conversation(remote, Screen(console, console), "demo").ask("How?")
    except RemoteError as error:
        in_words(error)


EVENTS = st.dictionaries(TEXTS, VALUES, max_size=4)


def check_event(event: Mapping[str, Any]) -> None:
    """It is one line for every reader, and holds what was sent."""
    try:
        content = frame(event)
    except ValueError:  # half a surrogate pair, which no decoder of tokens gives
        assert any(0xD800 <= ord(letter) < 0xE000 for letter in json.dumps(event, ensure_ascii=False))
        return
    line, end = content.decode().splitlines()
    assert (line[:6], end) == ("data: ", "")
    assert json.dumps(json.loads(line[6:])) == json.dumps(event)


PROPERTIES: Mapping[str, tuple[SearchStrategy[Any], Callable[[Any], None]]] = {
    "profile files": (profile_files(), check_profile_file),
    "steering strings": (STEERING, check_steering),
    "streams that the chat client reads": (STREAMS, check_stream),
    "events that the server sends": (EVENTS, check_event),
}


def check_in_time(check: Callable[[Any], None], given: Any) -> None:
    """Check an input, and that this takes little processor time."""
    began = time.process_time()
    check(given)
    assert time.process_time() - began < MAX_SECONDS, "it took too long"
