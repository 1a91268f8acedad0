"""The OpenAPI document is whole and true: its examples work, answers have the forms it states, its page is offline."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer
from jsonschema import Draft202012Validator, ValidationError
from typer.testing import CliRunner

from scripts import api_docs
from server.api.document import FILE
from server.app import create_app
from server.engines.torch.engine import TorchEngine
from server.settings import Settings
from steering_vectors.profiles.metadata import ProfileSummary
from tests.support.running import HeldEngine
from tests.support.serving import engine_fixture, live_server, profiles_fixture, until

pytestmark = pytest.mark.slow

DOCUMENT: dict[str, Any] = create_app(Settings()).openapi()
SCHEMAS = DOCUMENT["components"]["schemas"]
ROUTES = [(path, method, route) for path, routes in DOCUMENT["paths"].items() for method, route in routes.items()]
OF_JOBS = {(path, method) for path, method, route in ROUTES if "jobs" in route["tags"] and path != "/jobs"}
CHANGES = {
    (path, method)
    for path, method, _ in ROUTES
    if path.startswith("/profiles/") and (method != "get" or path.count("/") > 2)
} - OF_JOBS
PROMPT = {"prompt": "Bread is", "max_tokens": 3}
CHAT = {"model": "demo:warm", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3}
COMPLETION = {"model": "demo:warm", **PROMPT}
SCHEDULE = [{"from_token": 0, "strength": 0.0}, {"from_token": 1, "strength": 1.0}]
SCHEDULED = {"profiles": [{"name": "warm", "schedule": SCHEDULE}, {"name": "concise", "strength": 0.0}]}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {**CHAT, "logprobs": True, "top_logprobs": 2},
    "/v1/completions": {**COMPLETION, "logprobs": 2, "echo": True},
    "/generate": {**PROMPT, "steering": SCHEDULED, "projections": True},
    "/compare": {**PROMPT, "variants": ["warm", "concise@0"], "kl": True},
}
engine = engine_fixture(slots=4)
profiles = profiles_fixture("warm", "concise")


@pytest.fixture(scope="module")
def client(engine: HeldEngine, profiles: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    database = str(tmp_path_factory.mktemp("feedback") / "f.db")
    with live_server(engine, profiles, feedback_database=database, jobs=True) as made:
        yield made


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
        if "text/plain" in answer["content"]:
            assert answer["content"]["text/plain"]["example"]
            continue
        if FILE in answer["content"]:
            continue
        content = answer["content"]["application/json"]
        assert content["schema"]["$ref"].removeprefix("#/components/schemas/") in SCHEMAS
        if status == "default" or int(status) >= 400:
            assert content["schema"]["$ref"].endswith("/ErrorAnswer")
        if status != "default":
            assert "example" in content


def test_every_field_of_a_profiles_summary_is_declared() -> None:
    assert ProfileSummary.__annotations__.keys() <= SCHEMAS["ProfileDetails"]["properties"].keys()


def test_every_reference_leads_somewhere() -> None:
    references = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(DOCUMENT)))
    assert references <= set(SCHEMAS)
    assert "x-streamed" not in json.dumps(DOCUMENT)


def check_form(value: Any, schema: dict[str, Any]) -> None:
    Draft202012Validator({**schema, "components": DOCUMENT["components"]}).validate(value)


def check_answer(answer: httpx.Response, path: str, method: str = "post") -> Any:
    """The JSON of an answer, which has the form that the document states for its status."""
    responses = DOCUMENT["paths"][path][method]["responses"]
    stated = responses.get(str(answer.status_code), responses["default"])
    check_form(answer.json(), stated["content"]["application/json"]["schema"])
    return answer.json()


def event_data(path: str) -> dict[str, Any]:
    """What the document says of the data of a route's events."""
    (route,) = DOCUMENT["paths"][path].values()
    stream = route["responses"]["200"]["content"]["text/event-stream"]
    data: dict[str, Any] = stream["itemSchema"]["properties"]["data"]
    return data


def event_schema(path: str) -> dict[str, Any]:
    data = event_data(path)
    schema: dict[str, Any] = next(one for one in data.get("anyOf", [data]) if "contentSchema" in one)["contentSchema"]
    return schema


def events_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(one.removeprefix("data: ")) for one in text.split("\n\n") if one.startswith("data: {")]


def test_examples_have_the_form_they_illustrate() -> None:
    checked = 0
    for path, _, route in ROUTES:
        for answer in route["responses"].values():
            content = answer.get("content", {})
            if "example" in content.get("application/json", {}):
                check_form(content["application/json"]["example"], content["application/json"]["schema"])
                checked += 1
            for event in events_of(content.get("text/event-stream", {}).get("example", "")):
                check_form(event, event_schema(path))
                checked += 1
    assert checked > 40


@pytest.mark.parametrize("change", [{"extra": 1}, {"id": None}, {"usage": {}}, {"finish_reason": "error"}])
def test_the_form_is_exact(change: dict[str, Any]) -> None:
    example = DOCUMENT["paths"]["/generate"]["post"]["responses"]["200"]["content"]["application/json"]["example"]
    with pytest.raises(ValidationError):
        check_form({**example, **change}, {"$ref": "#/components/schemas/GenerateAnswer"})


@pytest.mark.parametrize(
    ("path", "method", "route"),
    [one for one in ROUTES if one[:2] not in CHANGES | OF_JOBS],  # which have tests of their own
    ids=lambda value: value if type(value) is str else "",
)
def test_the_examples_work(
    client: httpx.Client, engine: HeldEngine, path: str, method: str, route: dict[str, Any]
) -> None:
    """What the document shows can be sent as it stands to a server with these profiles."""
    for parameter in route.get("parameters", []):
        if parameter["in"] == "path" and parameter["name"] != "generation_id":
            path = path.replace(f"{{{parameter['name']}}}", parameter["schema"]["examples"][0])
    body = None
    if "requestBody" in route:
        schema = route["requestBody"]["content"]["application/json"]["schema"]
        body = SCHEMAS[schema["$ref"].rpartition("/")[2]]["examples"][0] if "$ref" in schema else schema["examples"][0]
    if path == "/feedback/users/u-17":  # one of whom something is stored
        said = {"kind": "thumb", "prompt": "Bread is", "answer": {"text": "good."}, "thumb": "up", "user": "u-17"}
        assert client.post("/feedback", json=said).status_code == 201
    if "{" not in path:
        assert client.request(method, path, json=body).status_code == int(min(route["responses"]))
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
    check_answer(client.post("/score", json=score), "/score")
    check_answer(client.post("/steering/resolve", json={"steering": SCHEDULED}), "/steering/resolve")
    with generation(client, engine) as name:
        changed = client.patch(f"/generations/{name}", json={"steering": "warm"})
        assert check_answer(changed, "/generations/{generation_id}", "patch")["id"] == name


@pytest.mark.parametrize("path", BODIES)
def test_answers_have_the_form_that_is_stated(client: httpx.Client, path: str) -> None:
    check_answer(client.post(path, json=BODIES[path]), path)
    options = {"stream_options": {"include_usage": True}} if path.startswith("/v1") else {}
    events = events_of(client.post(path, json={**BODIES[path], "stream": True, **options}).text)
    assert len(events) > 2
    for one in events:
        check_form(one, event_schema(path))


@pytest.mark.parametrize(
    ("path", "stated"),
    [
        ("/v1/models", "/v1/models"),
        ("/v1/models/demo:warm", "/v1/models/{model}"),
        ("/v1/models/demo", "/v1/models/{model}"),
        ("/v1/models/kind", "/v1/models/{model}"),
        ("/profiles", "/profiles"),
        ("/profiles/warm", "/profiles/{name}"),
        ("/profiles/kind", "/profiles/{name}"),
        ("/health", "/health"),
        ("/ready", "/ready"),
        ("/version", "/version"),
    ],
)
def test_states_have_the_form_that_is_stated(client: httpx.Client, path: str, stated: str) -> None:
    check_answer(client.get(path), stated, "get")


def test_errors_and_rejected_profiles_have_the_form_that_is_stated(client: httpx.Client, profiles: Path) -> None:
    check_form(client.get("/nothing").json(), {"$ref": "#/components/schemas/ErrorAnswer"})
    (profiles / "cut.safetensors").write_bytes(b"x")
    until(lambda: client.get("/profiles/cut").status_code == 200)
    check_answer(client.get("/profiles"), "/profiles", "get")
    assert check_answer(client.get("/profiles/cut"), "/profiles/{name}", "get")["error"]


def test_null_is_declared_where_it_means_absent(client: httpx.Client) -> None:
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    for body in ("ChatBody", "CompletionBody", "GenerateBody", "SteeringBody", "SteeringTermBody", "StreamOptions"):
        for name, field in schemas[body]["properties"].items():
            assert ({"type": "null"} in field.get("anyOf", [])) is (name not in schemas[body].get("required", [])), name
    nothing = {"steering": {"profiles": [], "apply_to": None, "preserve_norm": None, "allow_beyond_safe": None}}
    assert client.post("/steering/resolve", json=nothing).status_code == 200


@pytest.mark.parametrize("path", BODIES)
def test_a_stream_that_fails_ends_in_the_error_that_is_stated(client: httpx.Client, path: str) -> None:
    huge = {"profiles": [{"name": "warm", "strength": 7e37}], "allow_beyond_safe": True}  # leaves no finite logits
    steering = {"variants": [huge]} if path == "/compare" else {"steering": huge}
    body = {**BODIES[path], "stream": True, "echo": None, "logprobs": None, "top_logprobs": None, **steering}
    if "model" in body:
        body["model"] = "demo"
    last = events_of(client.post(path, json=body).text)[-1]
    check_form(last, {"$ref": "#/components/schemas/ErrorAnswer"})
    check_form(last, event_schema(path))
    assert (last["error"]["param"], last["error"]["code"]) == ("strength", "generation_failed")


def test_the_last_event_of_openais_streams_is_declared() -> None:
    for path in BODIES:
        done = {"type": "string", "const": "[DONE]"} in event_data(path).get("anyOf", [])
        assert done is path.startswith("/v1")


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


script = typer.Typer()
script.command()(api_docs.main)


def test_the_written_page_is_what_the_routes_say() -> None:
    result = CliRunner().invoke(script, ["--check"])
    assert result.exit_code == 0, result.output
