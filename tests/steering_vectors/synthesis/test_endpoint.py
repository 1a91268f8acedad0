"""Writers and judges of an OpenAI-compatible endpoint, which is trimtab's own server here."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import httpx
import pytest

from steering_vectors.data.chat import Message
from steering_vectors.models.loading import LanguageModel
from steering_vectors.synthesis import endpoint as module
from steering_vectors.synthesis.brief import INSTRUCTIONS, QUESTIONS, brief_in
from steering_vectors.synthesis.debate import DebateSettings, debate
from steering_vectors.synthesis.endpoint import Endpoint, EndpointError
from steering_vectors.synthesis.folder import Folder
from steering_vectors.synthesis.judges import Case, EndpointJudge, ModelJudge, Rule
from steering_vectors.synthesis.templates import Trait
from steering_vectors.synthesis.writers import Ask, EndpointWriter, Length, Voice
from tests.support.serving import client_fixture, engine_fixture, profiles_fixture

pytestmark = pytest.mark.slow

engine = engine_fixture(slots=4, context=512)
profiles = profiles_fixture("one", unit=0.5)
client = client_fixture()
TEA = (Message("user", "How do I make tea?"),)


@pytest.fixture(scope="module")
def served(client: httpx.Client) -> Iterator[Endpoint]:
    with closing(Endpoint(str(client.base_url))) as endpoint:
        yield endpoint


def test_the_model_is_the_first_one_that_the_server_lists(served: Endpoint, client: httpx.Client) -> None:
    assert served.name == f"{str(client.base_url).rstrip('/')}/v1#demo"
    with closing(Endpoint(f"{client.base_url}#demo:one@0.5")) as named:
        assert named.model == "demo:one@0.5"


def test_texts_repeat_and_a_steering_must_have_a_receipt(served: Endpoint) -> None:
    writer, length = EndpointWriter(served), Length(16, 1.5)
    asks = [
        Ask(TEA, Voice("Be kind."), 1),
        Ask(TEA, Voice(steering="one@0.5"), 1),
        Ask(TEA, seed=1),
        Ask(TEA, seed=2),
    ]
    first = list(writer.write(asks, length))
    assert list(writer.write(asks, length)) == first
    assert len({one.text for one in first[1:]}) == 3
    with pytest.raises(EndpointError, match=r"status 40\d: .*three") as caught:
        list(writer.write([Ask(TEA, Voice(steering="three"))], length))
    assert caught.value.status in (400, 404)


def test_the_judge_reads_the_log_probabilities_that_the_model_judge_reads(
    served: Endpoint, demo: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case("Which answer is kinder?", "How do I make tea?", "Heat the water, dear.", "Leave me alone.")
    (local,) = ModelJudge(demo).votes([case])
    (remote,) = EndpointJudge(served).votes([case])
    for one, other in zip(local, remote, strict=True):
        assert one.swapped is other.swapped
        if one.mass > 0.5:  # the demo model seldom thinks of A and B, and then they are not listed
            assert one.log_odds == pytest.approx(other.log_odds, abs=0.01)
    (sampled,) = EndpointJudge(served, samples=2).votes([case])
    assert [vote.swapped for vote in sampled] == [False, True]


def test_a_debate_of_served_profiles(served: Endpoint, tmp_path: Path) -> None:
    settings = DebateSettings(
        Voice(steering="one@0.5"),
        Voice(steering="one@-0.5"),
        length=Length(12, 1.5),
        rebuttal=Length(6),
        rule=Rule(0.5),
    )
    prompts = [(Message("user", f"How do I make {thing}?"),) for thing in ("tea", "bread", "a knot")]
    try:
        found = debate(prompts, tmp_path, settings, EndpointWriter(served), EndpointJudge(served))
    except module.TrimtabError as error:
        assert "no verdict on 3 prompts counts" in str(error)  # noqa: PT017
    else:
        assert found.pairs <= 3
    rows = Folder(tmp_path).rows("answers.jsonl")
    assert {row["steering"] for row in rows} == {"one@0.5", "one@-0.5"}
    assert len(rows) == 6
    assert len(Folder(tmp_path).rows("rebuttals.jsonl")) in (2, 4, 6)


@pytest.mark.skipif(importlib.util.find_spec("llguidance") is None, reason="llguidance is not installed")
def test_an_endpoint_writes_instructions_by_their_schema(
    served: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    brief = "steering_vectors.synthesis.brief"
    monkeypatch.setattr(f"{brief}.WRITING", Length(200, 0.7))
    monkeypatch.setattr(f"{brief}.LONGEST", 12)
    folder = Folder(tmp_path)
    folder.write(QUESTIONS, ({"question": f"Why {number}?"} for number in range(8)))
    found = brief_in(folder, Trait("kind"), instructions=1, questions=12, writer=EndpointWriter(served))
    assert len(found.instructions) == 1
    assert folder.rows(INSTRUCTIONS, ("positive", "negative"))


def test_a_server_that_is_not_there_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(module.time, "sleep", waits.append)
    with pytest.raises(EndpointError, match=r"http://127\.0\.0\.1:9/v1 cannot be reached \(ConnectError\)"):
        Endpoint("http://127.0.0.1:9")
    assert waits == [1.0, 2.0, 4.0, 8.0]


@pytest.mark.parametrize("path", ["/health", "/metrics"])
def test_a_server_of_another_kind(client: httpx.Client, path: str) -> None:
    with pytest.raises(EndpointError, match="answers with status 404"):
        Endpoint(f"{str(client.base_url).rstrip('/')}{path}")
