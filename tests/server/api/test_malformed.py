"""Malformed requests over HTTP: each is answered with a status of 4xx and an error object that names what is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings

from server.app import create_app
from server.settings import Settings
from tests.support.answer_mutations import check, examples, requests
from tests.support.malformed import CASES, Case, says
from tests.support.serving import engine_fixture, live_server, profiles_fixture

pytestmark = pytest.mark.slow

DOCUMENT: dict[str, Any] = create_app(Settings()).openapi()

engine = engine_fixture(slots=2, context=64, max_queue=4)
profiles = profiles_fixture("warm", "concise")


@pytest.fixture(scope="module")
def client(engine: Any, profiles: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    feedback = tmp_path_factory.mktemp("feedback") / "feedback.db"
    with live_server(engine, profiles, max_queue=4, feedback_database=str(feedback)) as made:
        yield made


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_refused_by_name(client: httpx.Client, case: Case) -> None:
    response = client.request(case.method, case.path, content=case.content, headers=case.headers)
    error = response.json()["error"]
    assert set(response.json()) == {"error", "request_id"}
    assert set(error) == {"message", "type", "param", "code"}
    assert (response.status_code, error["param"]) == (case.status, case.param), error
    assert says(error["message"], case.message), error["message"]


def test_every_case_is_another() -> None:
    asked = [(case.method, case.path, case.content, *case.headers.values()) for case in CASES]
    assert len(set(asked)) == len(asked)


@settings(max_examples=250, suppress_health_check=list(HealthCheck))
@given(request=requests(examples(DOCUMENT)))
def test_whatever_is_sent_there_is_an_answer(client: httpx.Client, request: tuple[str, bytes]) -> None:
    path, body = request
    check(client.post(path, content=body, headers={"content-type": "application/json"}))
