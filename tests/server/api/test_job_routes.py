"""Jobs over HTTP and `trimtab jobs`: a live server on the demo model, whose jobs run in processes of their own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from server import cli
from server.access.keys import add_key
from server.engines.torch.engine import TorchEngine
from steering_vectors.data.sources import load_pairs
from tests.server.api.test_document import DOCUMENT, SCHEMAS, check_answer
from tests.server.http.test_error_responses import error_of
from tests.support.serving import engine_fixture, live_server, profiles_fixture, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

engine = engine_fixture(slots=2, context=96)
profiles = profiles_fixture("kind", "concise")
PATIENCE = 200.0
SMALL = {"layers": "4", "text_tokens": 0}  # what a fit costs least with
PAIRS = [
    {"prompt": f"How do I bake bread number {n}?", "chosen": f"Gladly! Mix {n}.", "rejected": f"No. Buy {n}."}
    for n in range(40)
]


@pytest.fixture(scope="module")
def client(engine: TorchEngine, profiles: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder = tmp_path_factory.mktemp("jobs")
    (folder / "data").mkdir()
    (folder / "data" / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    (folder / "secret.jsonl").write_text("secret\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(folder))  # where a machine's places for jobs are
        data = folder / "data"
        with live_server(engine, profiles, feedback_database=str(folder / "f.db"), jobs=True, jobs_data=data) as made:
            yield made


def submitted(client: httpx.Client, path: str, body: Any, **headers: str) -> str:
    answer = client.post(path, json=body, headers=headers)
    assert answer.status_code == 201, answer.text
    job: str = answer.json()["id"]
    assert answer.headers["location"] == f"/jobs/{job}"
    assert answer.json()["state"] == "queued"
    return job


def events(client: httpx.Client, job: str) -> list[dict[str, Any]]:
    """All events of a job, to its end."""
    with client.stream("GET", f"/jobs/{job}/events", timeout=PATIENCE) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        return [json.loads(line.removeprefix("data: ")) for line in stream.iter_lines() if line]


@pytest.fixture(scope="module")
def fitted(client: httpx.Client) -> dict[str, Any]:
    """A job that fitted the profile `warm`, when it had ended; with its events."""
    job = submitted(client, "/profiles/warm/fit", {"pairs": PAIRS, "description": "warm", **SMALL})
    found = events(client, job)
    return {**found[-1], "events": found}


def test_a_fit_is_followed_and_published(client: httpx.Client, fitted: dict[str, Any]) -> None:
    assert fitted["state"] == "succeeded", fitted
    states = list(dict.fromkeys(one["state"] for one in fitted["events"]))
    assert (states[0], states[-1]) == ("queued", "succeeded")
    assert {one["progress"]["stage"] for one in fitted["events"] if "progress" in one} & {"capture", "calibrate"}
    profile = client.get("/profiles/warm").json()
    assert (profile["version"], profile["description"]) == (fitted["version"], "warm")
    assert profile["data"]["source"] == "pairs.jsonl"
    assert fitted["result"]["layers"] == profile["layers"] == [4]
    (entry,) = client.get("/audit", params={"profile": "warm"}).json()["changes"]
    assert (entry["action"], entry["to_version"], entry["request_id"]) == ("upload", fitted["version"], fitted["id"])
    shown = client.get(f"/jobs/{fitted['id']}").json()
    assert shown == fitted["events"][-1]
    assert (shown["data"], shown["attempts"], shown["by"]) == ({"pairs": 40}, 1, "127.0.0.1")
    assert "bread" not in json.dumps(shown)
    log = client.get(f"/jobs/{fitted['id']}/log")
    assert log.headers["content-type"].startswith("text/plain")
    assert "-- attempt 1 begins" in log.text
    steered = client.post("/generate", json={"prompt": "Bread is", "steering": "warm@0.1", "max_tokens": 2})
    assert steered.status_code == 200, steered.text
    assert steered.json()["steering"][0]["version"] == fitted["version"]


def test_a_calibration_replaces_the_version_that_it_read(client: httpx.Client, fitted: dict[str, Any]) -> None:
    body = {"data": "pairs.jsonl", "kl_budget": 0.05, "text_tokens": 0}
    before = client.get("/profiles/warm").json()
    (*_, end) = events(client, submitted(client, "/profiles/warm/calibrate", body))
    assert end["state"] == "succeeded", end
    profile = client.get("/profiles/warm").json()
    assert profile["version"] == end["version"] != before["version"]
    assert profile["calibration"]["kl_budget"] == 0.05
    versions = [one["version"] for one in client.get("/profiles/warm/versions").json()["versions"]]
    assert versions[:2] == [end["version"], before["version"]]


def test_an_evaluation_publishes_nothing(client: httpx.Client, fitted: dict[str, Any]) -> None:
    before = client.get("/profiles/warm").json()["version"]
    body = {"data": "demo:warm", "strengths": [1, -1, 0], "rows": 8, "randoms": 1, "reward_samples": 0}
    (*_, end) = events(client, submitted(client, "/profiles/warm/evaluate", body))
    assert end["state"] == "succeeded", end
    assert "version" not in end
    assert [one["strength"] for one in end["result"]["strengths"]] == [-1.0, 0.0, 1.0]
    assert client.get("/profiles/warm").json()["version"] == before
    (listed,) = client.get("/jobs", params={"kind": "evaluate"}).json()["jobs"]
    assert listed == {name: value for name, value in end.items() if name != "result"}


def test_a_refinement_stages_what_people_prefer(client: httpx.Client, fitted: dict[str, Any]) -> None:
    served = client.get("/profiles/warm").json()["version"]
    for better, other in load_pairs("demo:warm").pairs()[:60]:
        assert not isinstance(better.prompt, str | None)
        prompt = [{"role": one.role, "content": one.content} for one in better.prompt]
        sides = {"a": {"text": better.completion}, "b": {"text": other.completion}}
        stored = client.post("/feedback", json={"kind": "pair", "better": "a", "prompt": prompt, **sides})
        assert stored.status_code == 201, stored.text
    body = {**SMALL, "every_vote": True, "trust": [], "canary_share": 0.25}
    (*_, end) = events(client, submitted(client, "/profiles/warm/refine", body))
    assert end["state"] == "succeeded", end
    report = end["result"]
    assert (report["outcome"], report["baseline"], report["share"]) == ("canary", served, 0.25), report
    assert report["gain"]["low"] > 0
    assert "version" not in end  # a canary is not the current version
    assert client.get("/profiles/warm").json()["version"] == served
    entry = client.get("/audit", params={"profile": "warm"}).json()["changes"][0]
    assert (entry["action"], entry["to_version"], entry["address"]) == ("refine", report["candidate"], "127.0.0.1")
    assert entry["request_id"] == end["id"]
    canary = client.post("/generate", json={"prompt": "Bread is", "steering": "warm#canary@0.1", "max_tokens": 2})
    assert canary.json()["steering"][0]["version"] == report["candidate"]


def test_errors_of_the_data_are_the_jobs(client: httpx.Client) -> None:
    rows = [{**PAIRS[0], "chosen": 5}, *PAIRS[1:]]
    (*_, end) = events(client, submitted(client, "/profiles/cold/fit", {"pairs": rows, **SMALL}))
    assert end["state"] == "failed"
    assert end["failure"]["code"] == "invalid_data"
    assert end["failure"]["message"].startswith("pairs.jsonl, line 1, field 'chosen': ")
    assert client.get("/profiles/cold").status_code == 404


def test_a_job_is_cancelled_and_deleted(client: httpx.Client) -> None:
    running = submitted(client, "/profiles/slow/fit", {"data": "demo:warm", "text_count": 256})
    waiting = submitted(client, "/profiles/slow/fit", {"data": "demo:warm"})
    until(lambda: client.get(f"/jobs/{running}").json()["state"] == "running", within=PATIENCE)
    assert (
        error_of(client.delete(f"/jobs/{running}"), 409)["message"] == f"the job {running} is running: cancel it first"
    )
    assert client.post(f"/jobs/{waiting}/cancel").json()["state"] == "cancelled"
    assert error_of(client.post(f"/jobs/{waiting}/cancel"), 409)["message"] == f"the job {waiting} is cancelled already"
    assert client.post(f"/jobs/{running}/cancel").json()["cancelling"] is True
    assert events(client, running)[-1]["state"] == "cancelled"
    assert client.get("/profiles/slow").status_code == 404
    listed = client.get("/jobs", params={"state": "cancelled", "profile": "slow"}).json()["jobs"]
    assert [one["id"] for one in listed] == [waiting, running]
    assert client.delete(f"/jobs/{waiting}").json() == {"id": waiting}
    for method, path in (("GET", ""), ("GET", "/events"), ("GET", "/log"), ("POST", "/cancel"), ("DELETE", "")):
        error = error_of(client.request(method, f"/jobs/{waiting}{path}"), 404)
        assert (error["code"], error["message"]) == ("job_not_found", f"there is no job '{waiting}'")


def test_the_examples_of_the_document_work(client: httpx.Client, fitted: dict[str, Any]) -> None:
    for kind in ("fit", "calibrate", "evaluate", "refine"):
        path = f"/profiles/{{name}}/{kind}"
        schema = DOCUMENT["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
        for example in SCHEMAS[schema.rpartition("/")[2]]["examples"]:
            answer = client.post(f"/profiles/warm/{kind}", json=example)
            assert answer.status_code == 201, answer.text
            job = check_answer(answer, path)["id"]
            check_answer(client.post(f"/jobs/{job}/cancel"), "/jobs/{id}/cancel")
            assert events(client, job)[-1]["state"] == "cancelled"
            check_answer(client.get(f"/jobs/{job}"), "/jobs/{id}", "get")
            check_answer(client.delete(f"/jobs/{job}"), "/jobs/{id}", "delete")
    check_answer(client.get("/jobs"), "/jobs", "get")
    check_answer(client.get(f"/jobs/{fitted['id']}"), "/jobs/{id}", "get")


@pytest.mark.parametrize(
    ("path", "body", "status", "code", "message"),
    [
        ("warm/fit", {}, 400, "invalid_request",
         "the preference data is missing: send one of data, pairs and feedback"),
        ("warm/fit", {"data": "demo:warm", "feedback": {}}, 400, "invalid_request",
         "the preference data has 2 sources: data, feedback: send one of data, pairs and feedback"),
        ("warm/fit", {"data": "demo:cold"}, 400, "invalid_request",
         "'demo:cold' is not an embedded data set; use demo: with one of careful, concise, honest, warm"),
        ("warm/fit", {"data": "../secret.jsonl"}, 400, "invalid_request",
         "data '../secret.jsonl' is no file in the server's --jobs-data"),
        ("warm/fit", {"data": "/etc/passwd"}, 400, "invalid_request",
         "data '/etc/passwd' is no file in the server's --jobs-data"),
        ("warm/fit", {"data": "hf:/etc"}, 400, "invalid_request",
         "data 'hf:/etc' is no file in the server's --jobs-data"),
        ("warm/fit", {"data": "hf:a/../../etc"}, 400, "invalid_request",
         "data 'hf:a/../../etc' is no file in the server's --jobs-data"),
        ("warm/fit", {"data": "demo:warm", "method": "magic"}, 400, "fit_failed", None),
        ("warm/fit", {"data": "demo:warm", "options": {"magic": 1}}, 400, "fit_failed", None),
        ("warm/fit", {"data": "demo:warm", "kl_budget": -1}, 400, "fit_failed",
         "the KL budget must be a positive number of nats per token, not -1"),
        ("warm/fit", {"data": "demo:warm", "keep_endings": True, "layering": "incremental"}, 400, "fit_failed",
         "keep_endings works with independent layering only: leave one of both out"),
        ("warm/fit", {"data": "demo:warm", "model": "demo"}, 400, "unknown_field", "unknown field 'model'"),
        ("warm/fit", {"data": "demo:warm", "seed": "0"}, 400, "invalid_value", None),
        ("warm/fit", {"pairs": []}, 400, "invalid_value", None),
        ("warm/fit", {"feedback": {"rows": "all"}}, 400, "invalid_value", None),
        ("Not%20a%20name/fit", {"data": "demo:warm"}, 400, "invalid_name", None),
        ("nobody/calibrate", {"data": "demo:warm"}, 404, "profile_not_found", "profile 'nobody' is not served"),
        ("nobody/evaluate", {"data": "demo:warm"}, 404, "profile_not_found", "profile 'nobody' is not served"),
        ("kind/evaluate", {"data": "demo:warm", "strengths": [1]}, 400, "fit_failed",
         "strengths must hold 0 and at least two others, as in -1,0,1"),
        ("kind/calibrate", {"data": "demo:warm", "perplexity_bound": 1}, 400, "fit_failed",
         "the perplexity bound must be a factor above 1, not 1"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_there_is_a_job(
    client: httpx.Client, path: str, body: Any, status: int, code: str, message: str | None
) -> None:
    before = client.get("/jobs").json()["jobs"][:1]
    error = error_of(client.post(f"/profiles/{path}", json=body), status)
    assert error["code"] == code, error
    if message is not None:
        assert error["message"] == message
    assert client.get("/jobs").json()["jobs"][:1] == before


def test_conditions_are_checked_when_a_job_is_asked_for(client: httpx.Client) -> None:
    body = {"data": "demo:warm"}
    answer = client.post("/profiles/kind/fit", json=body, headers={"if-none-match": "*"})
    assert error_of(answer, 412)["param"] == "if-none-match"
    answer = client.post("/profiles/kind/calibrate", json=body, headers={"if-match": '"0123456789"'})
    assert error_of(answer, 412)["param"] == "if-match"


@pytest.mark.parametrize("query", [{"state": "done"}, {"limit": 0}, {"before": "x"}, {"page": 2}])
def test_bad_queries_are_refused_by_name(client: httpx.Client, query: dict[str, Any]) -> None:
    assert error_of(client.get("/jobs", params=query), 400)["param"] == next(iter(query))


def test_pages_of_jobs(client: httpx.Client, fitted: dict[str, Any]) -> None:
    seen: list[str] = []
    query: dict[str, Any] = {"limit": 2}
    while True:
        answer = client.get("/jobs", params=query).json()
        seen += [one["id"] for one in answer["jobs"]]
        if answer["next"] is None:
            break
        query["before"] = answer["next"]
    assert seen == [one["id"] for one in client.get("/jobs").json()["jobs"]]
    assert fitted["id"] in seen


def test_a_server_without_jobs_says_so(engine: TorchEngine, profiles: Path, tmp_path: Path) -> None:
    with live_server(engine, profiles, feedback_database=str(tmp_path / "f.db")) as client:
        for method, path in (("GET", "/jobs"), ("POST", "/profiles/warm/fit")):
            error = error_of(client.request(method, path, json={"data": "demo:warm"}), 404)
            assert (error["code"], error["message"]) == ("jobs_off", "this server runs no jobs: start it with --jobs")


def test_jobs_need_the_scope_admin(engine: TorchEngine, profiles: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    secret, _ = add_key(keys, "user", ["generate", "feedback"])
    with live_server(engine, profiles, api_key_file=keys) as client:
        for method, path in (("GET", "/jobs"), ("GET", "/jobs/job-1/log"), ("POST", "/profiles/warm/fit")):
            answer = client.request(method, path, headers={"authorization": f"Bearer {secret}"})
            assert error_of(answer, 403)["code"] == "insufficient_scope"


@pytest.fixture
def run(client: httpx.Client) -> Callable[..., tuple[int, str]]:
    def run(*words: str) -> tuple[int, str]:
        done = CliRunner().invoke(cli.app, ["jobs", *words], env={"TRIMTAB_URL": str(client.base_url)})
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        return done.exit_code, done.stdout

    return run


def test_the_commands(
    client: httpx.Client, fitted: dict[str, Any], run: Callable[..., tuple[int, str]], capfd: pytest.CaptureFixture[str]
) -> None:
    job, short = fitted["id"], fitted["version"][:8]
    line = f"{job}  fit  warm  succeeded  {short}"
    code, out = run("list", "--profile", "warm", "--state", "succeeded")
    assert (code, line in out.splitlines()) == (0, True)
    assert job in [one["id"] for one in json.loads(run("list", "--json")[1])["jobs"]]
    code, out = run("show", job)
    assert (code, out.splitlines()[0]) == (0, line)
    assert json.loads(run("show", job, "--json")[1]) == fitted["events"][-1]
    assert "-- attempt 1 begins" in run("log", job)[1]
    assert run("follow", job) == (0, f"{line}\n")
    assert [json.loads(one)["state"] for one in run("follow", job, "--json")[1].splitlines()] == ["succeeded"]
    failed = submitted(client, "/profiles/cold/fit", {"pairs": PAIRS[:3]})
    code, out = run("follow", failed)
    assert code == 2
    assert out.startswith(f"{failed}  fit  cold  failed  pairs.jsonl: ")
    assert run("delete", failed) == (0, f"{failed} was deleted\n")
    waiting = submitted(client, "/profiles/cold/fit", {"data": "demo:warm"})
    code, out = run("cancel", waiting)
    assert code == 0
    assert out.startswith(f"{waiting}  fit  cold  ")
    assert events(client, waiting)[-1]["state"] == "cancelled"
