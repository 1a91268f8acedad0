"""Texts under a constraint: they obey, steered or not and however hot, and their neighbours do not notice."""

from __future__ import annotations

import asyncio
import json
import re
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Annotated, Any, Literal

import httpx
import openai
import pydantic
import pytest
import torch

from server.engines.protocol import Constraint, SamplingParameters
from server.engines.torch.constraints.matching import CompiledGrammar, GrammarCompiler, Matcher, allowed_tokens
from server.engines.torch.engine import TorchEngine
from server.engines.torch.sampling.request_sampler import RequestSampler
from server.engines.torch.sampling.sample import sample
from steering_vectors.data.chat import encode_prompt
from steering_vectors.errors import RequestError
from steering_vectors.models.loading import LanguageModel, wrap_model
from tests.support.running import PATIENCE, Outcome, outcome, request, running
from tests.support.serving import demo_engine, live_server, save_profiles
from tests.support.tiny import tiny_model
from tests.support.tiny_tokenizers import byte_fallback_tokenizer, tiny_tokenizer

pytestmark = pytest.mark.slow

MESSAGES: list[Any] = [{"role": "user", "content": "How do I bake bread?"}]
HOT: dict[str, Any] = {"model": "demo", "messages": MESSAGES, "max_tokens": 400, "temperature": 1.5}
RECIPE: dict[str, Any] = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "pattern": "^[A-Z][a-z]{2,9}( [a-z]{2,9}){0,2}$"},
        "level": {"enum": ["easy", "medium", "hard"]},
        "minutes": {"type": "integer", "minimum": 5, "maximum": 240},
        "vegan": {"type": "boolean"},
        "steps": {
            "type": "array",
            "minItems": 1,
            "maxItems": 3,
            "items": {
                "type": "object",
                "properties": {"do": {"type": "string", "maxLength": 24}, "heat": {"enum": [None, 180, 220]}},
                "required": ["do", "heat"],
                "additionalProperties": False,
            },
        },
        "author": {
            "type": "object",
            "properties": {"name": {"type": "string", "minLength": 1, "maxLength": 12}},
            "required": ["name"],
            "additionalProperties": False,
        },
    },
    "required": ["title", "level", "minutes", "vegan", "steps"],
    "additionalProperties": False,
}
AS_RECIPE = {"type": "json_schema", "json_schema": {"name": "recipe", "schema": RECIPE, "strict": True}}


def check_recipe(text: str) -> None:
    """What RECIPE says, said again by hand."""
    recipe = json.loads(text)
    needed = {"title", "level", "minutes", "vegan", "steps"}
    assert needed <= set(recipe) <= needed | {"author"}
    assert re.fullmatch("[A-Z][a-z]{2,9}( [a-z]{2,9}){0,2}", recipe["title"])
    assert recipe["level"] in ("easy", "medium", "hard")
    assert type(recipe["minutes"]) is int
    assert 5 <= recipe["minutes"] <= 240
    assert type(recipe["vegan"]) is bool
    assert 1 <= len(recipe["steps"]) <= 3
    for step in recipe["steps"]:
        assert set(step) == {"do", "heat"}
        assert len(step["do"]) <= 24
        assert step["heat"] in (None, 180, 220)
    if "author" in recipe:
        assert set(recipe["author"]) == {"name"}
        assert 1 <= len(recipe["author"]["name"]) <= 12


@pytest.fixture(scope="module")
def engine() -> Iterator[TorchEngine]:
    with demo_engine(slots=16) as engine:
        yield engine


@pytest.fixture(scope="module")
def client(engine: TorchEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    directory = tmp_path_factory.mktemp("profiles")
    save_profiles(directory, engine.info.identity, "warm", unit=10.0, calibration={"kl_at_1": 0.1})
    with live_server(engine, directory) as client:
        yield client


def post(client: httpx.Client, body: dict[str, Any], path: str = "/v1/chat/completions") -> dict[str, Any]:
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return dict(response.json())


def together(client: httpx.Client, bodies: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Text and finish reason of each body's only choice, all sent at once."""
    with ThreadPoolExecutor(len(bodies)) as pool:
        choices = [whole["choices"][0] for whole in pool.map(lambda body: post(client, body), bodies)]
    return [(choice["message"]["content"], choice["finish_reason"]) for choice in choices]


def test_hot_and_steered_texts_obey_a_schema(client: httpx.Client) -> None:
    steered = [{}, {"steering": "warm@1.5"}]
    found = together(
        client, [{**HOT, "response_format": AS_RECIPE, "seed": seed, **steered[seed % 2]} for seed in range(24)]
    )
    ended = [text for text, reason in found if reason == "stop"]
    for text in ended:
        check_recipe(text)
    assert len(ended) >= 20, found  # the others were cut off by their length
    assert len(set(ended)) == len(ended)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/generate"])
def test_every_route_takes_every_constraint(client: httpx.Client, path: str) -> None:
    body: dict[str, Any] = {"max_tokens": 400, "temperature": 1.5, "seed": 1}
    body |= {"prompt": "Bread is"} if path == "/v1/completions" else {"messages": MESSAGES}
    body |= {} if path == "/generate" else {"model": "demo"}

    def written(**constraint: Any) -> str:
        whole = post(client, {**body, **constraint}, path)
        choice = whole["choices"][0] if "choices" in whole else whole
        assert choice["finish_reason"] == "stop"
        return str(choice["message"]["content"] if "message" in choice else choice["text"])

    check_recipe(written(response_format=AS_RECIPE))
    level = RECIPE["properties"]["level"]
    assert json.loads(written(guided_json=level, response_format={"type": "text"})) in level["enum"]
    pattern = r"[a-c]{2,5}-\d{3}(, (yes|no)){1,3}"
    assert re.fullmatch(pattern, written(guided_regex=pattern))
    choices = ["list", "listen", "listened", "été 🍞", 'a "quoted"\nword']
    drawn = {written(guided_choice=choices, seed=seed) for seed in range(5)}
    assert drawn <= set(choices)
    assert len(drawn) > 1
    sums = written(guided_grammar='start: term ("+" term){1,2}\nterm: /[1-9][0-9]?/ | "(" term ")"')
    assert re.fullmatch(r"[()]*\d\d?[()]*(\+[()]*\d\d?[()]*){1,2}", sums)
    assert eval(sums) > 0


def test_attributes_of_rules_are_carried_out(client: httpx.Client) -> None:
    """Those that llguidance sees to."""
    body = {**HOT, "max_tokens": 80, "n": 8, "seed": 2, "steering": "warm@0.5", "logprobs": True}

    def written(rule: str) -> list[dict[str, Any]]:
        whole = post(client, {**body, "guided_grammar": f'start: "<" x "!"\n{rule}'})
        return [choice for choice in whole["choices"] if choice["finish_reason"] == "stop"]

    limited = written("x[max_tokens=4]: /[a-z ]*/")
    assert len(limited) == 8
    for choice in limited:
        assert re.fullmatch("<[a-z ]*!", choice["message"]["content"])
        assert len(choice["logprobs"]["content"]) <= 4 + 2
    for rule in ("x[lazy]: /[a-z]*e/", 'x[suffix="e"]: /[a-z]*/'):
        texts = {choice["message"]["content"] for choice in written(rule)}
        assert len(texts) > 1
        assert all(re.fullmatch("<[a-df-z]*e!", text) for text in texts), texts


def test_any_object_is_json(client: httpx.Client) -> None:
    body = {**HOT, "temperature": 0.8, "n": 6, "max_tokens": 120, "seed": 4}
    whole = post(client, {**body, "response_format": {"type": "json_object"}})
    texts = [(one["message"]["content"], one["finish_reason"]) for one in whole["choices"]]
    ended = [text for text, reason in texts if reason == "stop"]
    assert len(ended) >= 3, texts
    assert all(isinstance(json.loads(text), dict) for text in ended)
    assert all(text.startswith("{") for text, _ in texts)


def test_choices_have_places_of_their_own(client: httpx.Client) -> None:
    body = {**HOT, "guided_json": RECIPE, "seed": 9}
    three, one = post(client, {**body, "n": 3}), post(client, body)
    texts = [choice["message"]["content"] for choice in three["choices"]]
    assert len(set(texts)) == 3
    assert texts[0] == one["choices"][0]["message"]["content"]
    for choice in three["choices"]:
        if choice["finish_reason"] == "stop":
            check_recipe(choice["message"]["content"])


def test_a_stream_is_its_whole(client: httpx.Client) -> None:
    body = {**HOT, "response_format": AS_RECIPE, "seed": 3, "steering": "warm@0.5"}
    frames = client.post("/v1/chat/completions", json={**body, "stream": True}).text.split("\n\n")[:-2]
    chunks = [json.loads(frame.removeprefix("data: "))["choices"][0] for frame in frames]
    (choice,) = post(client, body)["choices"]
    assert "".join(chunk["delta"].get("content", "") for chunk in chunks) == choice["message"]["content"]
    assert chunks[-1]["finish_reason"] == choice["finish_reason"]


def test_neighbours_do_not_notice(client: httpx.Client) -> None:
    free = [
        {**HOT, "max_tokens": 40, "temperature": 0},
        {**HOT, "max_tokens": 40, "temperature": 0, "steering": "warm@0.7"},
        {**HOT, "max_tokens": 40, "seed": 5, "top_p": 0.9},
        {**HOT, "max_tokens": 40, "temperature": 0, "repetition_penalty": 1.3, "min_tokens": 30},
    ]
    alone = [together(client, [body])[0] for body in free]
    bound = [{**HOT, "response_format": AS_RECIPE, "seed": seed, "max_tokens": 50} for seed in range(8)]
    assert together(client, [*bound, *free])[8:] == alone


def test_the_sdk_parses_into_a_model(client: httpx.Client) -> None:
    class Step(pydantic.BaseModel):
        do: Annotated[str, pydantic.Field(max_length=20)]
        minutes: Annotated[int, pydantic.Field(ge=0, le=90)]

    class Plan(pydantic.BaseModel):
        mood: Literal["calm", "eager"]
        steps: Annotated[list[Step], pydantic.Field(max_length=2)]
        first: Step | None

    sdk = openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0)
    done = sdk.chat.completions.parse(
        model="demo:warm@0.5", messages=MESSAGES, response_format=Plan, temperature=1.5, seed=2, max_tokens=300
    )
    assert isinstance(done.choices[0].message.parsed, Plan)


def test_logprobs_stay_the_models_own(client: httpx.Client) -> None:
    body = {**HOT, "temperature": 0, "guided_choice": ["zebra"], "logprobs": True, "top_logprobs": 1}
    told = post(client, body)["choices"][0]["logprobs"]["content"]
    free = post(client, {**HOT, "temperature": 0, "max_tokens": 1, "logprobs": True, "top_logprobs": 1})
    assert told[0]["top_logprobs"] == free["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    assert told[0]["logprob"] < -1  # under the mask it would be 0


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        (
            {"guided_json": {"type": "objekt"}},
            "guided_json",
            "guided_json cannot be compiled: ",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}},
            "response_format",
            "response_format cannot be compiled: ",
        ),
        ({"guided_regex": "("}, "guided_regex", "guided_regex cannot be compiled: "),
        ({"guided_grammar": "start: foo"}, "guided_grammar", "guided_grammar cannot be compiled: "),
        (
            {"guided_grammar": 'start: x "b"\nx[capture, stop="b", temperature=0.1]: /a*/'},
            "guided_grammar",
            "guided_grammar has rule attributes that are not supported: capture (read it out of the text); "
            "stop (what was written is not hidden; use suffix or lazy); "
            "temperature (one holds for the whole text; set that of the request)",
        ),
        (
            {"guided_grammar": 'start: "a" <[*]> "b"'},
            "guided_grammar",
            "guided_grammar names <[*]>, which ends every text: a text ends with its grammar by itself",
        ),
        (
            {"guided_regex": "a" * 65_537},
            "guided_regex",
            "guided_regex has 65537 bytes; at most 65536 are taken: make it shorter",
        ),
        (
            {"guided_regex": "a", "response_format": {"type": "json_object"}},
            "guided_regex",
            "response_format and guided_regex are both given: use only one of them",
        ),
        (
            {"guided_grammar": "start: /a/", "guided_choice": ["a"]},
            "guided_grammar",
            "guided_choice and guided_grammar are both given: use only one of them",
        ),
        ({"guided_choice": []}, "guided_choice", "field 'guided_choice': "),
        ({"guided_json": "{}"}, "guided_json", "field 'guided_json': it should "),
        (
            {"response_format": {"type": "json_schema"}},
            "response_format.json_schema",
            "response_format of type json_schema needs a json_schema",
        ),
        (
            {"response_format": {"type": "text", "json_schema": {"name": "x", "schema": {}}}},
            "response_format.json_schema",
            "json_schema does not belong to type text",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
            "response_format.json_schema.name",
            "field 'response_format.json_schema.name' is missing",
        ),
        (
            {"response_format": {"type": "json_object", "indent": 2}},
            "response_format.indent",
            "unknown field 'response_format.indent'",
        ),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos", "ignore_eos cannot be used with a constraint"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_followed_is_refused(
    client: httpx.Client, change: dict[str, Any], param: str, message: str, stream: bool
) -> None:
    response = client.post("/v1/chat/completions", json={**HOT, **change, "stream": stream})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert error["message"].startswith(message)
    assert "\n" not in error["message"]


def test_without_the_package_the_remedy_is_named(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    error = client.post("/v1/chat/completions", json={**HOT, "guided_regex": "never before"}).json()["error"]
    assert error["param"] == "guided_regex"
    assert error["message"] == "guided_regex needs a package that this server lacks: pip install 'trimtab[schema]'"


# The engine, without HTTP.


def run(
    language_model: LanguageModel, wishes: Sequence[tuple[Constraint, dict[str, Any]]], **options: Any
) -> list[Outcome]:
    ids = encode_prompt(language_model.tokenizer, "On the table there")

    async def main() -> list[Outcome]:
        async with running(language_model, **options) as engine:

            async def one(constraint: Constraint, sampling: dict[str, Any]) -> Outcome:
                return await outcome(engine, replace(request(ids, **sampling), constraint=constraint))

            return await asyncio.gather(*(one(*wish) for wish in wishes))

    return asyncio.run(main())


def regex(text: str) -> Constraint:
    return Constraint("regex", text)


@pytest.mark.parametrize("make", [tiny_tokenizer, byte_fallback_tokenizer])
def test_other_tokenizers_write_what_was_asked(make: Any) -> None:
    """A model's vocabulary may be larger than its tokenizer's: what lies beyond is never written."""
    model = wrap_model(tiny_model("llama"), make(), name="tiny")
    pattern = "(The|the|é|麦)( [a-z]{1,6}){2,4}[.!]"
    wish = {"max_tokens": 60, "temperature": 2.0}
    for one in run(model, [(regex(pattern), {**wish, "seed": seed}) for seed in range(8)]):
        assert one.end.reason == "stop"
        assert re.fullmatch(pattern, one.text), one.text
        assert "".join(one.deltas) == one.text


def test_a_text_ends_where_nothing_may_follow() -> None:
    model = wrap_model(tiny_model("llama"), tiny_tokenizer(), name="tiny")
    exact, open_end, longer, nothing = run(
        model,
        [
            (regex("abc"), {}),
            (regex("a+"), {"max_tokens": 5, "min_tokens": 5, "temperature": 1.0}),
            (regex("abc"), {"min_tokens": 12}),
            (regex(""), {"min_tokens": 3}),
        ],
    )
    for one in (exact, longer):
        assert (one.text, one.end.reason) == ("abc", "stop")
        assert len(one.ids) == one.end.completion_tokens <= 3  # no token was spent on the end
    assert (open_end.text, open_end.end.reason) == ("aaaaa", "length")  # its end was barred
    assert (nothing.text, nothing.end.reason) == ("", "stop")


def test_a_grammar_that_outgrows_its_means_is_an_error_not_an_end() -> None:
    model = wrap_model(tiny_model("llama"), tiny_tokenizer(), name="tiny")
    failed, sound = run(
        model, [(regex("((a{1,1000}){1,1000}){1,1000}"), {"max_tokens": 200, "min_tokens": 200}), (regex("b{9}"), {})]
    )
    assert failed.end.reason == "error"
    assert failed.end.error is not None
    assert failed.end.error.startswith("constraint cannot be followed any further (")
    assert (sound.text, sound.end.reason) == ("b" * 9, "stop")


def compiled(text: str) -> CompiledGrammar:
    return GrammarCompiler(tiny_tokenizer(), frozenset({1})).compile(regex(text))


def test_a_constraint_bars_after_penalties_and_bias() -> None:
    tokenizer = tiny_tokenizer()
    a, b, c = (tokenizer.convert_tokens_to_ids(letter) for letter in "abc")
    grammar = compiled("[ab]")
    wish = SamplingParameters(temperature=0, logit_bias={c: 100.0, b: 3.0})
    logits = torch.zeros(2, 400)
    logits[:, a] = 2.0
    before = logits.clone()
    bound = RequestSampler(wish, vocab_size=400, eos_ids=frozenset({1}), prompt_ids=[5], matcher=Matcher(grammar))
    free = RequestSampler(SamplingParameters(temperature=0), vocab_size=400, eos_ids=frozenset({1}), prompt_ids=[5])
    assert sample(logits, [bound, free]) == [b, a]
    assert torch.equal(logits, before)
    bound.observe(b)
    assert bound.complete
    assert sample(logits, [bound, free]) == [1, a]


@pytest.mark.parametrize("cores", [2, 8])  # with many, the rows' masks are computed in threads
def test_rows_of_one_grammar_move_apart(cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    grammar = compiled("ab|cd")
    tokenizer = tiny_tokenizer()
    a, b, c, d = (tokenizer.convert_tokens_to_ids(letter) for letter in "abcd")
    assert (grammar.backend.executor is not None) == (cores == 8)
    first, second = Matcher(grammar), Matcher(grammar)
    first.advance(a)
    second.advance(c)
    allowed = allowed_tokens([first, second, Matcher(grammar)], 400)
    assert allowed[0].nonzero()[0].tolist() == [b]
    assert allowed[1].nonzero()[0].tolist() == [d]
    assert {a, c} <= set(allowed[2].nonzero()[0].tolist())


def test_models_whose_texts_cannot_end_are_refused() -> None:
    with pytest.raises(RequestError, match="this model has no end-of-sequence token"):
        GrammarCompiler(tiny_tokenizer(), frozenset()).compile(regex("a"))


def test_a_grammar_compiles_beside_the_event_loop(engine: TorchEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream comes to its end before a constraint is compiled that was asked for earlier."""
    ended, compile_now = threading.Event(), GrammarCompiler.compile

    def compile_later(compiler: GrammarCompiler, constraint: Constraint) -> CompiledGrammar:
        assert ended.wait(PATIENCE), "the event loop waited for the compiler"
        return compile_now(compiler, constraint)

    monkeypatch.setattr(GrammarCompiler, "compile", compile_later)
    ids = encode_prompt(engine.info.tokenizer, "Bread is")
    plain = request(ids, max_tokens=30, ignore_eos=True)
    bound = replace(request(ids, max_tokens=1), constraint=regex("never asked for elsewhere"))

    async def main() -> tuple[int, str]:
        task = asyncio.create_task(outcome(engine, bound))
        await asyncio.sleep(0)  # it is asked for
        seen = await outcome(engine, plain)
        assert seen.end.reason == "length"
        assert not task.done()
        ended.set()
        return len(seen.ids), (await task).end.reason

    assert asyncio.run(main()) == (30, "length")
