"""The OpenAPI document is whole and true: its examples work, answers have the forms it states, its page is offline."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.api.fields.answers import Answer, ErrorAnswer
from server.api.native.responses import (
    GenerateAnswer,
    GenerateEvent,
    Health,
    ProfileDetails,
    ProfileList,
    Ready,
    Version,
)
from server.api.native.steering_responses import ChangeAnswer, CompareAnswer, CompareEvent, ResolveAnswer, ScoreAnswer
from server.api.openai.responses import ChatChunk, ChatCompletion, Completion, CompletionChunk, ModelEntry, ModelList
from server.app import create_app
from server.engines.torch.engine import TorchEngine
from server.settings import Settings
from tests.support.running import HeldEngine
from tests.support.serving import client_fixture, engine_fixture, live_server, profiles_fixture, until

ROOT = Path(__file__).resolve().parents[3]
DOCUMENT: dict[str, Any] = create_app(Settings()).openapi()
SCHEMAS = DOCUMENT["components"]["schemas"]
ROUTES = [(path, method, route) for path, routes in DOCUMENT["paths"].items() for method, route in routes.items()]
PROMPT = {"prompt": "Bread is", "max_tokens": 3}
CHAT = {"model": "demo:warm", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3}
COMPLETION = {"model": "demo:warm", **PROMPT}
SCHEDULE = [{"from_token": 0, "strength": 0.0}, {"from_token": 1, "strength": 1.0}]
SCHEDULED = {"profiles": [{"name": "warm", "schedule": SCHEDULE}, {"name": "concise", "strength": 0.0}]}
BODIES: dict[str, tuple[dict[str, Any], type[Answer], type[Answer]]] = {
    "/v1/chat/completions": ({**CHAT, "logprobs": True, "top_logprobs": 2}, ChatCompletion, ChatChunk),
    "/v1/completions": ({**COMPLETION, "logprobs": 2, "echo": True}, Completion, CompletionChunk),
    "/generate": ({**PROMPT, "steering": SCHEDULED, "projections": True}, GenerateAnswer, GenerateEvent),
    "/compare": ({**PROMPT, "variants": ["warm", "concise@0"], "kl": True}, CompareAnswer, CompareEvent),
}
engine = engine_fixture(slots=4)
profiles = profiles_fixture("warm", "concise")
client = client_fixture()


def test_every_field_of_every_object_is_described() -> None:
    fields = [(name, field) for name, schema in SCHEMAS.items() for field in schema.get("properties", {}).items()]
    assert [(name, field) for name, (field, schema) in fields if not schema.get("description")] == []
    assert [name for name, schema in SCHEMAS.items() if not schema.get("description")] == []


@pytest.mark.parametrize(("path", "method", "route"), ROUTES, ids=lambda value: value if type(value) is str else "")
def test_every_route_tells_what_it_does_and_answers(path: str, method: str, route: dict[str, Any]) -> None:
    assert route["summary"]
    assert set(route["tags"]) <= {tag["name"] for tag in DOCUMENT["tags"]}  # by which the page is divided
    assert route["description"]
    assert "422" not in route["responses"]
    assert all(parameter["description"] for parameter in route.get("parameters", []))
    for status, answer in route["responses"].items():
        if status == "204":  # says nothing
            continue
        content = answer["content"]["application/json"]
        assert content["schema"]["$ref"].removeprefix("#/components/schemas/") in SCHEMAS
        if status == "default" or int(status) >= 400:
            assert content["schema"]["$ref"].endswith("/ErrorAnswer")
        if status != "default":
            assert "example" in content


def test_every_reference_leads_somewhere() -> None:
    references = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(DOCUMENT)))
    assert references <= set(SCHEMAS)
    assert "x-streamed" not in json.dumps(DOCUMENT)


def all_answers(kind: type[Answer] = Answer) -> list[type[Answer]]:
    below = [one for child in kind.__subclasses__() for one in all_answers(child)]
    return [kind, *below]


@pytest.mark.parametrize("kind", [kind for kind in all_answers() if kind.examples])
def test_examples_have_the_form_they_illustrate(kind: type[Answer]) -> None:
    for example in kind.examples:
        kind.model_validate(example)


@pytest.mark.parametrize(("path", "method", "route"), ROUTES, ids=lambda value: value if type(value) is str else "")
def test_the_examples_work(
    client: httpx.Client, engine: HeldEngine, path: str, method: str, route: dict[str, Any]
) -> None:
    """What the document shows can be sent as it stands to a server with these profiles."""
    for parameter in route.get("parameters", []):
        if parameter["name"] != "generation_id":
            path = path.replace(f"{{{parameter['name']}}}", parameter["schema"]["examples"][0])
    body = None
    if "requestBody" in route:
        schema = route["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
        body = SCHEMAS[schema]["examples"][0]
    if "{" not in path:
        assert client.request(method, path, json=body).status_code == 200
        return
    with generation(client, engine) as name:
        answer = client.request(method, path.replace("{generation_id}", name), json=body)
        assert answer.status_code == 200, answer.text


@contextmanager
def generation(client: httpx.Client, engine: HeldEngine) -> Iterator[str]:
    """The id of one that runs until its steering is changed, and then to its end."""
    engine.hold(after=2, until_change=True)
    body = {"prompt": "Bread", "max_tokens": 20, "ignore_eos": True, "stream": True}
    with client.stream("POST", "/generate", json=body) as stream:
        lines = stream.iter_lines()  # which, once forgotten, closes the stream
        yield json.loads(next(lines).removeprefix("data: "))["id"]


def test_answers_about_steering_have_the_form_that_is_stated(client: httpx.Client, engine: HeldEngine) -> None:
    score = {"prompt": "Bread", "completions": [" is"], "steering": "warm", "top_logprobs": 2}
    ScoreAnswer.model_validate(client.post("/score", json=score).json())
    ResolveAnswer.model_validate(client.post("/steering/resolve", json={"steering": SCHEDULED}).json())
    with generation(client, engine) as name:
        ChangeAnswer.model_validate(client.patch(f"/generations/{name}", json={"steering": "warm"}).json())


@pytest.mark.parametrize("path", BODIES)
def test_answers_have_the_form_that_is_stated(client: httpx.Client, path: str) -> None:
    body, whole, event = BODIES[path]
    whole.model_validate(client.post(path, json=body).json())
    options = {"stream_options": {"include_usage": True}} if path.startswith("/v1") else {}
    streamed = client.post(path, json={**body, "stream": True, **options}).text.split("\n\n")
    events = [json.loads(text.removeprefix("data: ")) for text in streamed if "{" in text]
    assert len(events) > 2
    for one in events:
        event.model_validate(one)


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/v1/models", ModelList),
        ("/v1/models/demo:warm", ModelEntry),
        ("/v1/models/demo", ModelEntry),
        ("/profiles", ProfileList),
        ("/profiles/warm", ProfileDetails),
        ("/health", Health),
        ("/ready", Ready),
        ("/version", Version),
    ],
)
def test_states_have_the_form_that_is_stated(client: httpx.Client, path: str, kind: type[Answer]) -> None:
    kind.model_validate(client.get(path).json())


def test_errors_and_rejected_profiles_have_the_form_that_is_stated(client: httpx.Client, profiles: Path) -> None:
    for path in ("/nothing", "/v1/models/kind", "/profiles/kind"):
        ErrorAnswer.model_validate(client.get(path).json())
    (profiles / "cut.safetensors").write_bytes(b"x")
    until(lambda: client.get("/profiles/cut").status_code == 200)
    ProfileList.model_validate(client.get("/profiles").json())
    assert ProfileDetails.model_validate(client.get("/profiles/cut").json()).error


def test_null_is_declared_where_it_means_absent(client: httpx.Client) -> None:
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    for body in ("ChatBody", "CompletionBody", "GenerateBody", "SteeringBody", "SteeringTermBody", "StreamOptions"):
        for name, field in schemas[body]["properties"].items():
            assert ({"type": "null"} in field.get("anyOf", [])) is (name not in schemas[body].get("required", [])), name
    nothing = {"steering": {"profiles": [], "apply_to": None, "preserve_norm": None, "allow_beyond_safe": None}}
    assert client.post("/steering/resolve", json=nothing).status_code == 200


@pytest.mark.parametrize("path", BODIES)
def test_a_stream_that_fails_ends_in_the_error_that_is_stated(client: httpx.Client, path: str) -> None:
    (kind,) = (one for one in ROUTES if one[0] == path)
    stream = kind[2]["responses"]["200"]["content"]["text/event-stream"]["itemSchema"]
    told = json.dumps(stream)
    assert f'"#/components/schemas/{BODIES[path][2].__name__}"' in told
    assert '"#/components/schemas/ErrorAnswer"' in told
    huge = {"profiles": [{"name": "warm", "strength": 7e37}], "allow_beyond_safe": True}  # leaves no finite logits
    steering = {"variants": [huge]} if path == "/compare" else {"steering": huge}
    body = {**BODIES[path][0], "stream": True, "echo": None, "logprobs": None, "top_logprobs": None, **steering}
    if "model" in body:
        body["model"] = "demo"
    events = [one for one in client.post(path, json=body).text.split("\n\n") if one.startswith("data: {")]
    error = ErrorAnswer.model_validate_json(events[-1].removeprefix("data: ")).error
    assert (error.param, error.code) == ("strength", "generation_failed")


def test_the_last_event_of_openais_streams_is_declared(client: httpx.Client) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    for path, last in (("/v1/chat/completions", True), ("/v1/completions", True), ("/generate", False)):
        stream = paths[path]["post"]["responses"]["200"]["content"]["text/event-stream"]
        data = stream["itemSchema"]["properties"]["data"]
        assert ({"type": "string", "const": "[DONE]"} in data.get("anyOf", [])) is last


def test_the_page_needs_no_other_host(engine: TorchEngine, profiles: Path, tmp_path: Path) -> None:
    """Also for a browser that has no key yet: the page and what it loads are open."""
    keys = tmp_path / "keys"
    keys.write_text("secret\n")
    with live_server(engine, profiles, api_key_file=keys) as client:
        page = client.get("/docs")
        assert page.status_code == 200
        assert not re.findall(r"https?:|[\"'(]//", page.text)
        loaded = [*re.findall(r"(?:src|href)=\"([^\"]+)\"", page.text), *re.findall(r"url: '([^']+)'", page.text)]
        assert "/openapi.json" in loaded
        assert len(loaded) == 4
        for path in loaded:
            assert client.get(path).status_code == 200
        assert client.get("/docs-files/../v1/models").status_code == 401


def test_the_written_page_is_what_the_routes_say() -> None:
    command = [sys.executable, "scripts/api_docs.py", "--check"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
