"""Feedback over HTTP: a live server on the demo model that keeps its generations."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.access.keys import Scope, add_key
from server.engines.torch.engine import TorchEngine
from tests.server.access.test_gate import bearer
from tests.server.http.test_error_responses import error_of
from tests.support.serving import engine_fixture, live_server, profiles_fixture, until

pytestmark = pytest.mark.slow

engine = engine_fixture(slots=4, context=96)
profiles = profiles_fixture("warm", "concise")
BREAD = [{"role": "user", "content": "How do I bake bread?"}]
UP: dict[str, Any] = {"kind": "thumb", "thumb": "up"}
PAIR: dict[str, Any] = {"kind": "pair", "better": "a"}
TEXTS = {"prompt": "Bread is", "a": {"text": "good."}, "b": {"text": "hard."}}


@dataclass(frozen=True)
class Keyed:
    """A client of a server with keys, their texts, and generations of the keys `mine` and `other`."""

    client: httpx.Client
    secrets: dict[str, str]
    made: dict[str, str]


@pytest.fixture(scope="module")
def client(engine: TorchEngine, profiles: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    file = tmp_path_factory.mktemp("database") / "feedback.db"
    with live_server(engine, profiles, feedback_database=str(file), keep_generations="1h") as made:
        yield made


def generate(client: httpx.Client, **body: Any) -> dict[str, Any]:
    found = client.post("/generate", json={"prompt": "Bread is", "max_tokens": 4, "ignore_eos": True, **body})
    assert found.status_code == 200, found.text
    answer: dict[str, Any] = found.json()
    return answer


def give(client: httpx.Client, body: Any, **headers: str) -> httpx.Response:
    return client.post("/feedback", json=body, headers={name.replace("_", "-"): text for name, text in headers.items()})


def newest(client: httpx.Client, **query: Any) -> dict[str, Any]:
    entries: list[dict[str, Any]] = client.get("/feedback", params={"limit": 1000, **query}).json()["feedback"]
    return entries[-1]


def stored(response: httpx.Response) -> str:
    assert response.status_code == 201, response.text
    (one,) = response.json()["feedback"]
    name: str = one["id"]
    return name


def test_a_pair_of_generations_is_stored_with_what_they_were(client: httpx.Client) -> None:
    a = generate(client, steering="warm@0.5", seed=1, temperature=0.7)
    b = generate(client, seed=2)
    body = {"kind": "pair", "a": {"generation": a["id"]}, "b": {"generation": b["id"]}, "better": "b", "user": "u-1"}
    name = stored(give(client, body))
    entry = newest(client)
    assert (entry["id"], entry["kind"], entry["better"], entry["user"]) == (name, "pair", "b", "u-1")
    first, second = entry["answers"]
    assert (first["text"], second["text"]) == (a["text"], b["text"])
    assert first["prompt"] == second["prompt"] == "Bread is"
    assert first["steering"] == a["steering"]
    assert second["steering"] == []
    assert first["sampling"] == {"temperature": 0.7, "top_p": 1.0, "seed": 1, "max_tokens": 4, "ignore_eos": True}
    assert first["model"]["name"] == "demo"
    assert newest(client, profile="warm")["id"] == name
    assert newest(client, profile=f"warm#{a['steering'][0]['version'][:8]}")["id"] == name
    assert client.get("/feedback", params={"profile": "concise"}).json() == {"feedback": [], "next": None}


@pytest.mark.parametrize("stream", [False, True])
def test_choices_of_a_chat_are_named_by_its_id_or_their_own(client: httpx.Client, stream: bool) -> None:
    body = {
        "model": "demo",
        "messages": BREAD,
        "n": 2,
        "max_tokens": 4,
        "stream": stream,
        "seed": 3,
        "ignore_eos": True,
    }
    answer = client.post("/v1/chat/completions", json=body)
    if stream:
        chunks = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
        name = chunks[0]["id"]
        parts = [one for chunk in chunks for one in chunk["choices"]]
        ids = {one["index"]: one["generation_id"] for one in parts if "generation_id" in one}
        texts = {index: "".join(p["delta"].get("content") or "" for p in parts if p["index"] == index) for index in ids}
    else:
        name = answer.json()["id"]
        ids = {one["index"]: one["generation_id"] for one in answer.json()["choices"]}
        texts = {one["index"]: one["message"]["content"] for one in answer.json()["choices"]}
    for index in (0, 1):
        for answer_body in ({"generation": name, "choice": index}, {"generation": ids[index]}):
            stored(give(client, {"kind": "thumb", "answer": answer_body, "thumb": "up"}))
            (about,) = newest(client)["answers"]
            assert (about["text"], about["choice"], about["answer_id"]) == (texts[index], index, name)
            assert about["prompt"] == BREAD
    error = error_of(give(client, {"kind": "thumb", "answer": {"generation": name}, "thumb": "up"}), 400)
    assert (error["param"], "several choices" in error["message"]) == ("answer.choice", True)
    error = error_of(give(client, {"kind": "thumb", "answer": {"generation": name, "choice": 2}, "thumb": "up"}), 404)
    assert (error["param"], error["code"]) == ("answer.choice", "generation_not_found")


@pytest.mark.parametrize(
    "said",
    [
        {"kind": "pair", **TEXTS, "better": "tie"},
        {"kind": "thumb", "prompt": BREAD, "answer": {"text": "No."}, "thumb": "down"},
        {"kind": "rating", "prompt": "Bread is", "answer": {"text": "good."}, "rating": 4.0, "min": 1.0, "max": 7.0},
        {"kind": "edit", "prompt": "Bread is", "answer": {"text": "hard."}, "corrected": "good.\x00\U0001f35e"},
        {"kind": "signal", "prompt": "Bread is", "answer": {"text": "good."}, "signal": "copied"},
        {
            "kind": "signal",
            "prompt": "Bread is",
            "answer": {"text": "good."},
            "signal": "dwell_seconds",
            "seconds": 2.5,
        },
        {"kind": "comment", "prompt": "Bread is", "answer": {"text": "good."}, "comment": "it left out the salt"},
    ],
    ids=lambda said: str(said["kind"]),
)
def test_every_kind_is_stored_as_it_was_said(client: httpx.Client, said: dict[str, Any]) -> None:
    name = stored(give(client, said))
    entry = newest(client, kind=said["kind"])
    assert entry["id"] == name
    values = {field: value for field, value in said.items() if field not in ("prompt", "a", "b", "answer", "kind")}
    assert {field: entry[field] for field in values} == values
    sides = [said["a"], said["b"]] if said["kind"] == "pair" else [said["answer"]]
    assert entry["answers"] == [{"prompt": said["prompt"], "text": side["text"]} for side in sides]


@pytest.mark.parametrize("by_header", [False, True])
def test_the_same_key_stores_once(client: httpx.Client, by_header: bool) -> None:
    key = f"key-{by_header}"
    vote = {"kind": "pair", **TEXTS, "better": "a"}
    send = (
        (lambda body: give(client, body, Idempotency_Key=key))
        if by_header
        else (lambda body: give(client, {**body, "idempotency_key": key}))
    )
    first = send(vote)
    again = send(vote)
    assert (first.status_code, again.status_code) == (201, 201)
    assert first.json() == again.json()
    assert ("idempotent-replayed" in first.headers, again.headers["idempotent-replayed"]) == (False, "true")
    error = error_of(send({**vote, "better": "b"}), 409)
    assert (error["code"], error["param"]) == ("idempotency_conflict", "idempotency_key")


def test_a_list_is_stored_whole_or_not_at_all(client: httpx.Client) -> None:
    vote = {"kind": "pair", **TEXTS, "better": "a"}
    before = newest(client)["id"]
    wrong = {"kind": "thumb", "answer": {"generation": "gen-none"}, "thumb": "up"}
    error = error_of(give(client, [vote, vote, wrong]), 404)
    assert (error["param"], error["code"]) == ("[2].answer.generation", "generation_not_found")
    assert newest(client)["id"] == before
    found = give(client, [vote, {**vote, "better": "b"}], Idempotency_Key="list")
    assert found.status_code == 201
    assert len({one["id"] for one in found.json()["feedback"]}) == 2
    assert give(client, [vote, {**vote, "better": "b"}], Idempotency_Key="list").json() == found.json()


@pytest.fixture(scope="module")
def keyed(engine: TorchEngine, profiles: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    """A server with keys, and generations of two of them. The user `gone` was deleted."""
    folder = tmp_path_factory.mktemp("keyed")
    keys = folder / "keys"
    both: list[Scope] = ["generate", "feedback"]
    scopes: dict[str, list[Scope]] = {"mine": both, "other": both, "generating": ["generate"], "admin": ["admin"]}
    secrets = {name: add_key(keys, name, of_key)[0] for name, of_key in scopes.items()}
    secrets["judge"], _ = add_key(keys, "judge", ["feedback"], speaks_for=["mine", "other"])
    secrets["judge_of_other"], _ = add_key(keys, "judge_of_other", ["feedback"], speaks_for=["other"])
    secrets["alone"], _ = add_key(keys, "alone", ["feedback"])
    settings: dict[str, Any] = {"feedback_database": str(folder / "feedback.db"), "keep_generations": "forever"}
    with live_server(engine, profiles, api_key_file=keys, **settings) as client:
        made = {}
        for name, key, body in (
            ("bread", "mine", {}),
            ("bread2", "mine", {"seed": 2}),
            ("tea", "mine", {"prompt": "Tea is"}),
            ("others", "other", {"seed": 3}),
        ):
            client.headers.update(bearer(secrets[key]))
            made[name] = generate(client, **body)["id"]
        client.headers.update(bearer(secrets["admin"]))
        until(lambda: 'kept_generations_total{outcome="kept"} 4.0' in client.get("/metrics").text)
        stored(
            give(client, {"kind": "comment", "prompt": "x", "answer": {"text": "y"}, "comment": "z", "user": "gone"})
        )
        stored(give(client, {"kind": "pair", **TEXTS, "better": "a", "idempotency_key": "used"}))
        assert client.delete("/feedback/users/gone").status_code == 200
        yield Keyed(client, secrets, made)


UNKNOWN = "there is no kept generation {name!r} of {whose}: it may be older than --keep-generations"
BOTH_ARE_ONE = "both sides are the same text: nothing can be preferred"


@pytest.mark.parametrize(
    ("key", "body", "status", "code", "param", "message"),
    [
        pytest.param(
            "mine",
            {**UP, "answer": {"generation": "gen-none"}},
            404,
            "generation_not_found",
            "answer.generation",
            UNKNOWN.format(name="gen-none", whose="this key"),
            id="unknown generation",
        ),
        pytest.param(
            "mine",
            {**UP, "answer": {"generation": "{others}"}},
            404,
            "generation_not_found",
            "answer.generation",
            UNKNOWN.format(name="{others}", whose="this key"),
            id="foreign generation",
        ),
        pytest.param(
            "alone",
            {**UP, "answer": {"generation": "{bread}"}},
            404,
            "generation_not_found",
            "answer.generation",
            UNKNOWN.format(name="{bread}", whose="this key"),
            id="foreign generation of a key that only gives feedback",
        ),
        pytest.param(
            "judge_of_other",
            {**PAIR, "a": {"generation": "{others}"}, "b": {"generation": "{bread}"}},
            404,
            "generation_not_found",
            "b.generation",
            UNKNOWN.format(name="{bread}", whose="this key, or of those that it speaks for"),
            id="generation of a key that is not spoken for",
        ),
        pytest.param(
            "mine",
            {**PAIR, "a": {"generation": "{bread}"}, "b": {"generation": "{bread}"}},
            400,
            "same_sides",
            "b",
            BOTH_ARE_ONE,
            id="twice the same generation",
        ),
        pytest.param(
            "mine", {**PAIR, **TEXTS, "b": TEXTS["a"]}, 400, "same_sides", "b", BOTH_ARE_ONE, id="twice the same text"
        ),
        pytest.param(
            "mine",
            {"kind": "edit", "prompt": "x", "answer": {"text": "a"}, "corrected": "a"},
            400,
            "same_sides",
            "corrected",
            "the corrected text is the original: nothing was corrected",
            id="nothing was corrected",
        ),
        pytest.param(
            "mine",
            {**PAIR, "a": {"generation": "{bread}"}, "b": {"generation": "{tea}"}},
            400,
            "different_prompts",
            "b",
            "the two generations answer different prompts: compare answers to one prompt",
            id="answers to different prompts",
        ),
        pytest.param(
            "mine",
            {"kind": "comment", "prompt": "x", "answer": {"text": "a"}, "comment": "x" * 2**20},
            400,
            "invalid_value",
            "comment",
            "field 'comment': string should have at most 16384 characters",
            id="comment of 1 MB",
        ),
        pytest.param(
            "mine",
            {"kind": "edit", "prompt": "x", "answer": {"text": "a"}, "corrected": "x" * 2**20},
            400,
            "invalid_value",
            "corrected",
            "field 'corrected': string should have at most 131072 characters",
            id="text of 1 MB",
        ),
        pytest.param(
            "mine",
            {"kind": "comment", "prompt": "x", "answer": {"text": "a"}, "comment": "x" * 2**22},
            413,
            "body_too_large",
            None,
            "the body is larger than the limit of 4194304 bytes",
            id="body of more than 4 MiB",
        ),
        pytest.param(
            "mine",
            {**PAIR, **TEXTS, "user": "gone"},
            410,
            "user_deleted",
            "user",
            "this user's feedback was deleted: send feedback under another id, or without one",
            id="deleted user",
        ),
        pytest.param(
            "admin",
            {**PAIR, **TEXTS, "better": "b", "idempotency_key": "used"},
            409,
            "idempotency_conflict",
            "idempotency_key",
            "this idempotency key was used for other feedback: send each feedback with a key of its own",
            id="used idempotency key",
        ),
        pytest.param(
            "generating",
            {**PAIR, **TEXTS},
            403,
            "insufficient_scope",
            None,
            "the key 'generating' lacks the scope 'feedback', which this route needs",
            id="key without the scope",
        ),
    ],
)
def test_bad_votes_have_exact_answers(
    keyed: Keyed, key: str, body: dict[str, Any], status: int, code: str, param: str | None, message: str
) -> None:
    keyed.client.headers.update(bearer(keyed.secrets[key]))
    before = counted(keyed)
    error = error_of(give(keyed.client, filled(body, keyed.made)), status)
    assert (error["code"], error["param"], error["message"]) == (code, param, filled(message, keyed.made))
    assert counted(keyed) == before


def filled(value: Any, names: Mapping[str, str]) -> Any:
    """A body or a text in which names of generations have become their ids."""
    text = json.dumps(value)
    for name, made in names.items():
        text = text.replace(f"{{{name}}}", made)
    return json.loads(text)


def counted(keyed: Keyed) -> int:
    """How much feedback is stored."""
    admin = bearer(keyed.secrets["admin"])
    return len(keyed.client.get("/feedback", params={"limit": 1000}, headers=admin).json()["feedback"])


def test_keys_name_their_own_generations_and_those_that_they_speak_for(keyed: Keyed) -> None:
    client, secrets, made = keyed.client, keyed.secrets, keyed.made
    found = {}
    for name, secret in secrets.items():
        client.headers.update(bearer(secret))
        votes = [give(client, {**UP, "answer": {"generation": made[one]}}).status_code for one in ("bread", "others")]
        found[name] = (*votes, client.get("/feedback").status_code, client.delete("/feedback/users/x").status_code)
    assert found == {
        "mine": (201, 404, 403, 403),
        "other": (404, 201, 403, 403),
        "generating": (403, 403, 403, 403),
        "admin": (201, 201, 200, 404),
        "judge": (201, 201, 403, 403),
        "judge_of_other": (404, 201, 403, 403),
        "alone": (404, 404, 403, 403),
    }
    client.headers.update(bearer(secrets["judge"]))
    pair = {**PAIR, "a": {"generation": made["bread"]}, "b": {"generation": made["others"]}, "idempotency_key": "one"}
    name = stored(give(client, pair))
    client.headers.update(bearer(secrets["mine"]))
    assert stored(give(client, {**PAIR, **TEXTS, "idempotency_key": "one"})) != name  # keys count for each API key
    client.headers.update(bearer(secrets["admin"]))
    by = {entry["id"]: entry["key"] for entry in client.get("/feedback").json()["feedback"]}
    assert by[name] == "judge"
    client.headers.update(bearer(secrets["judge"]))
    assert client.post("/generate", json={"prompt": "x"}).status_code == 403


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"kind": "pair", **TEXTS, "better": "c"}, "better", "invalid_value"),
        ({"kind": "pair", **TEXTS}, "better", "missing_field"),
        ({"kind": "vote"}, None, "invalid_value"),
        ({"kind": "pair", **TEXTS, "better": "a", "note": "x"}, "note", "unknown_field"),
        ({"kind": "thumb", "answer": {"text": "a"}, "thumb": "up"}, "prompt", "invalid_feedback"),
        ({"kind": "thumb", "prompt": "x", "answer": {}, "thumb": "up"}, "answer", "invalid_feedback"),
        ({"kind": "rating", "prompt": "x", "answer": {"text": "a"}, "rating": 6}, "rating", "invalid_feedback"),
        (
            {"kind": "signal", "prompt": "x", "answer": {"text": "a"}, "signal": "dwell_seconds"},
            "seconds",
            "invalid_feedback",
        ),
        ({"kind": "pair", **TEXTS, "better": "a", "user": "a\x00"}, "user", "invalid_value"),
        ([], None, "invalid_value"),
        (
            [{"kind": "pair", **TEXTS, "better": "a"}, {"kind": "pair", **TEXTS, "better": 1}],
            "[1].better",
            "invalid_value",
        ),
    ],
)
def test_bad_feedback_names_its_field(client: httpx.Client, body: Any, param: str | None, code: str) -> None:
    error = error_of(give(client, body), 400)
    assert (error["param"], error["code"]) == (param, code)
    assert len(error["message"]) < 300


def test_pages_follow_each_other(client: httpx.Client) -> None:
    for better in ("a", "b", "tie"):
        stored(give(client, {"kind": "pair", **TEXTS, "better": better, "user": "pager"}))
    seen, after = [], "0"
    while after is not None:
        page = client.get("/feedback", params={"user": "pager", "limit": 2, "after": after}).json()
        seen += [entry["better"] for entry in page["feedback"]]
        after = page["next"]
    assert seen == ["a", "b", "tie"]
    first = newest(client, user="pager")["created_at"]
    assert client.get("/feedback", params={"user": "pager", "until": "2020-01-01T00:00:00Z"}).json()["feedback"] == []
    assert newest(client, user="pager", since=first)["better"] == "tie"
    assert error_of(client.get("/feedback", params={"cursor": "x"}), 400)["code"] == "unknown_field"


def test_a_deleted_user_is_gone_and_does_not_come_back(client: httpx.Client) -> None:
    mine = generate(client, user="anna/1")
    vote = {"kind": "thumb", "answer": {"generation": mine["id"]}, "thumb": "up", "idempotency_key": "anna"}
    stored(give(client, {**vote, "user": "anna/1"}))
    stored(give(client, {**vote, "idempotency_key": "ben", "user": "ben"}))
    assert client.delete("/feedback/users/anna/1").json() == {"feedback": 1, "about_user": 1, "generations": 1}
    assert client.delete("/feedback/users/anna/1").json() == {"feedback": 0, "about_user": 0, "generations": 0}
    error = error_of(give(client, {**vote, "user": "anna/1"}), 410)
    assert (error["code"], error["param"]) == ("user_deleted", "user")
    assert error_of(give(client, vote), 404)["code"] == "generation_not_found"
    later = generate(client, user="anna/1")
    assert error_of(give(client, {"kind": "thumb", "answer": {"generation": later["id"]}, "thumb": "up"}), 404)
    assert error_of(client.delete("/feedback/users/nobody"), 404)["code"] == "user_not_found"
    assert 'trimtab_kept_generations_total{outcome="deleted_user"} 1.0' in client.get("/metrics").text


def test_metrics_count_by_kind_and_outcome(client: httpx.Client) -> None:
    give(client, {"kind": "comment", "prompt": "x", "answer": {"text": "y"}, "comment": "z", "idempotency_key": "m"})
    give(client, {"kind": "comment", "prompt": "x", "answer": {"text": "y"}, "comment": "z", "idempotency_key": "m"})
    give(client, {"kind": "comment", "answer": {"generation": "gen-none"}, "comment": "z"})
    text = client.get("/metrics").text
    for line in (
        'trimtab_feedback_total{kind="comment",outcome="replayed"} 1.0',
        'trimtab_feedback_total{kind="comment",outcome="refused"} 1.0',
        "trimtab_feedback_queue 0.0",
    ):
        assert line in text
    assert 'trimtab_kept_generations_total{outcome="kept"}' in text


def test_logs_have_no_texts(client: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        made = generate(client, prompt="a secret prompt")
        give(client, {"kind": "comment", "answer": {"generation": made["id"]}, "comment": "a secret comment"})
        give(client, {"kind": "comment", "prompt": "a secret", "answer": {"text": "secret"}, "comment": 7})
    assert caplog.records
    assert "secret" not in caplog.text


def test_generations_are_kept_over_a_restart(engine: TorchEngine, profiles: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"feedback_database": str(tmp_path / "feedback.db"), "keep_generations": "1h"}
    with live_server(engine, profiles, **settings) as client:
        made = generate(client)
    with live_server(engine, profiles, **settings) as client:
        stored(give(client, {"kind": "thumb", "answer": {"generation": made["id"]}, "thumb": "up"}))
        assert newest(client)["answers"][0]["text"] == made["text"]


def test_without_a_database_feedback_is_off(engine: TorchEngine, profiles: Path) -> None:
    with live_server(engine, profiles) as client:
        for response in (
            give(client, {"kind": "pair", **TEXTS, "better": "a"}),
            client.get("/feedback"),
            client.delete("/feedback/users/x"),
        ):
            error = error_of(response, 404)
            assert error["code"] == "feedback_off"
            assert "--feedback-database" in error["message"]
