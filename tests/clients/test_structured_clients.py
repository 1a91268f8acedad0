"""Answers in a given structure, as clients ask for them: through `response_format`."""

from __future__ import annotations

from typing import Literal

import openai
import pytest
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

QUESTION = "How do I bake bread?"


class Verdict(BaseModel):
    manner: Literal["warm", "cold"]
    confident: bool


@pytest.mark.parametrize("model", ["demo", "demo:warm@0.8"])
def test_openai_parses(url: str, model: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        answer = client.chat.completions.parse(
            model=model, messages=[{"role": "user", "content": QUESTION}], response_format=Verdict, seed=1
        )
    assert isinstance(answer.choices[0].message.parsed, Verdict)
    assert Verdict.model_validate_json(answer.choices[0].message.content or "") == answer.choices[0].message.parsed


def test_openai_parses_a_stream(url: str) -> None:
    with (
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
        client.chat.completions.stream(
            model="demo", messages=[{"role": "user", "content": QUESTION}], response_format=Verdict, seed=1
        ) as stream,
    ):
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Verdict)


def test_langchain_structures(url: str) -> None:
    model = ChatOpenAI(model="demo", base_url=f"{url}/v1", api_key="none", max_retries=0)
    assert isinstance(model.with_structured_output(Verdict, method="json_schema").invoke(QUESTION), Verdict)
