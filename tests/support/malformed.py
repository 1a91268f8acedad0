"""Malformed requests, each with the expected status, field and message.

They are written for a server with two slots, a queue of four, a context of 64 tokens and the profiles warm and concise.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

JSON = "application/json"
CHAT = {"model": "demo", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
COMPLETION = {"model": "demo", "prompt": "Hello", "max_tokens": 1}
FIELD = re.compile(r"(?:unknown )?field '([^']+)'|([a-z_]+(?:\[\d+\])?)")  # the start of a message that names a field
LONG = [{"role": "user", "content": "Hello " * 99}]
NO_OBJECT = "it should …, not"
PROMPT_FORMS = "it must be a string or a list of token ids, or a list of either, and not empty"
NEITHER = "send either prompt or messages: neither is given"
UNSERVED = "profile 'kind' is not served; served are: concise, warm"
UNREADABLE = "cannot be read at {!r}; write for example 'warm@0.8+concise@-0.3'"
WAIVE = "set steering.allow_beyond_safe to true to go beyond it"
BEYOND = f"beyond its safe range of ±2; {WAIVE}"
OVERFLOW = "the shift overflows the model's dtype: use a smaller strength"
TOO_MANY = "7 generations exceed the 4 that one request may have here: request fewer"
NO_JSON = "the body is not valid JSON"
SEND_JSON = "send JSON, with the header Content-Type: application/json"


def says(told: str, message: str) -> bool:
    """Whether a text equals the message, in which … matches anything."""
    return re.fullmatch(".*".join(re.escape(part) for part in message.split("…")), told, re.DOTALL) is not None


class Case(NamedTuple):
    """A request and its response. … in a message matches anything, such as the text of another library."""

    method: str
    path: str
    content: bytes | None
    headers: Mapping[str, str | bytes]
    status: int
    param: str | None
    message: str

    def __str__(self) -> str:
        return f"{self.method} {self.path} {(self.content or b'')[:60]!r}"


def post(path: str, body: Any, message: str, param: str | None = None, *, status: int = 400) -> Case:
    """Pass `param` if the message does not begin with the field."""
    named = FIELD.match(message)
    param = param or (named and (named[1] or named[2]))
    return Case("POST", path, json.dumps(body).encode(), {"content-type": JSON}, status, param, message)


def chat(change: Mapping[str, Any], message: str, param: str | None = None, *, status: int = 400) -> Case:
    return post("/v1/chat/completions", {**CHAT, **change}, message, param, status=status)


def completion(change: Mapping[str, Any], message: str, param: str | None = None) -> Case:
    return post("/v1/completions", {**COMPLETION, **change}, message, param)


def patch(body: Mapping[str, Any], message: str, param: str | None = None, *, status: int = 400) -> Case:
    return post("/generations/gen-0", body, message, param, status=status)._replace(method="PATCH")


def header(path: str, body: Mapping[str, Any], steering: bytes, message: str) -> Case:
    return post(path, body, message, "steering")._replace(
        headers={"content-type": JSON, "x-trimtab-steering": steering}
    )


def raw(path: str, content: bytes, message: str, param: str | None = None, *, kind: str = JSON) -> Case:
    return Case("POST", path, content, {"content-type": kind}, 400, param, message)


def route(method: str, path: str, message: str, *, status: int = 405) -> Case:
    return Case(method, path, None, {}, status, None, message)


def term(**fields: Any) -> dict[str, Any]:
    return {"steering": {"profiles": [{"name": "warm", **fields}]}}


def points(*pairs: tuple[Any, Any]) -> list[dict[str, Any]]:
    return [{"from_token": token, "strength": strength} for token, strength in pairs]


CASES = [
    # chats
    chat(
        {"model": "other"},
        "model 'other' is not served; this server has 'demo' and, steered, 'demo:PROFILE@STRENGTH'",
        status=404,
    ),
    chat({"model": 5}, "field 'model': it should …, not 5"),
    chat(
        {"model": "demo:"},
        "the steering is empty; write for example 'warm@0.8+concise@-0.3', or leave it out",
        "steering",
    ),
    chat({"model": "demo:warm@"}, f"steering 'warm@' {UNREADABLE.format('warm@')}"),
    chat({"model": "demo:warm+warm"}, "profile 'warm' occurs twice in one steering", "steering"),
    chat(
        {"model": "demo:warm", "steering": "warm"},
        "both the model's alias 'demo:warm' and the field steering steer: use only one of them",
        "steering",
    ),
    chat({"messages": LONG}, "the prompt has …", "messages"),
    chat({"messages": []}, "messages is empty; send at least one message"),
    chat({"messages": None}, "field 'messages' is missing"),
    chat({"messages": "Hello"}, "field 'messages': it should …, not \"Hello\""),
    chat({"messages": [1]}, f"field 'messages[0]': {NO_OBJECT} 1"),
    chat({"messages": [{}]}, "field 'messages[0].role' is missing"),
    chat({"messages": [{"role": "user", "content": None}]}, "field 'messages[0].content' is missing"),
    chat(
        {"messages": [{"role": "user", "content": 1}]},
        "field 'messages[0].content': it should …, not 1",
    ),
    chat(
        {"messages": [{"role": "tool", "content": "x"}]},
        "field 'messages[0].role': it should …'system'…'developer'…'user'…'assistant', not \"tool\"",
    ),
    chat(
        {"messages": [{"role": "user", "content": "x", "name": "Ann"}]},
        "field 'messages[0].name' is not supported: leave it out or set it to \"\"",
    ),
    chat(
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "field 'messages[0].content': a text part is an object of type and text, nothing else",
    ),
    chat(
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "field 'messages[0].content': a content part of type 'image_url' is not supported, only text",
    ),
    chat({"temprature": 1}, "unknown field 'temprature'"),
    chat({"temprature": None}, "unknown field 'temprature'"),
    chat({"[x]": 1}, "unknown field '[x]'"),
    chat({"max_tokens": True}, "field 'max_tokens': it should …, not true"),
    chat({"max_tokens": 0}, "max_tokens must be at least 1; 0 is for completions with echo"),
    chat({"max_tokens": "5"}, "field 'max_tokens': it should …, not \"5\""),
    chat(
        {"max_completion_tokens": 2},
        "max_tokens and max_completion_tokens differ: set only one of them",
        "max_completion_tokens",
    ),
    chat({"max_completion_tokens": 0}, "field 'max_completion_tokens': it should …1, not 0"),
    chat({"min_tokens": -1}, "min_tokens must be 0 or more, not -1"),
    chat({"min_tokens": 2}, "min_tokens (2) is more than max_tokens (1)"),
    chat({"temperature": -1}, "temperature must lie in 0 to 100, not -1.0"),
    chat({"temperature": "hot"}, "field 'temperature': it should …, not \"hot\""),
    chat({"temperature": 10**400}, "field 'temperature': it should …"),
    chat({"top_p": 0}, "top_p must lie above 0 and up to 1, not 0.0"),
    chat({"top_k": -2}, "field 'top_k': it should …-1, not -2"),
    chat({"min_p": 1.5}, "min_p must lie in 0 to 1, not 1.5"),
    chat({"repetition_penalty": 0}, "repetition_penalty must lie in 0.01 to 100, not 0.0"),
    chat({"presence_penalty": 3}, "presence_penalty must lie in -2 to 2, not 3.0"),
    chat({"frequency_penalty": -2.5}, "frequency_penalty must lie in -2 to 2, not -2.5"),
    chat({"seed": 2**63}, "field 'seed': it should …9223372036854775808, not 9223372036854775808"),
    chat({"seed": 1.5}, "field 'seed': it should …, not 1.5"),
    chat({"n": 0}, "field 'n': it should …1, not 0"),
    chat({"n": 7}, f"n: {TOO_MANY}"),
    chat({"n": 129}, "field 'n': it should …128, not 129"),
    chat({"stop": ""}, "a stop string must not be empty", "stop"),
    chat({"stop": [1]}, "field 'stop[0]': it should …, not 1"),
    chat({"stop": ["x"] * 17}, "field 'stop': …16…, not 17"),
    chat({"stop_token_ids": [3072]}, "stop_token_ids names token 3072, but this model's token ids go from 0 to 3071"),
    chat(
        {"stop_token_ids": [1] * 1025},
        "field 'stop_token_ids': …1024…, not 1025",
    ),
    chat({"logprobs": 2}, "field 'logprobs': it should …, not 2"),
    chat({"top_logprobs": 2}, "top_logprobs needs logprobs: set logprobs to true"),
    chat({"logprobs": True, "top_logprobs": 21}, "field 'top_logprobs': it should …20, not 21"),
    chat({"echo": True}, "field 'echo' is not supported: leave it out or set it to false"),
    chat({"tools": [{}]}, "field 'tools' is not supported: leave it out or set it to []"),
    chat(
        {"parallel_tool_calls": 1},
        "field 'parallel_tool_calls' is not supported: leave it out or set it to true or set it to false",
    ),
    chat({"metadata": {"a": 1}}, "field 'metadata.a': it should …, not 1"),
    chat({"stream": "yes"}, "field 'stream': it should …, not \"yes\""),
    chat({"stream_options": {"include_usage": True}}, "stream_options is for streams only: set stream to true"),
    chat({"stream": True, "stream_options": {"include": True}}, "unknown field 'stream_options.include'"),
    chat(
        {"response_format": {"type": "xml"}},
        "field 'response_format.type': it should …'text'…'json_object'…'json_schema', not \"xml\"",
    ),
    chat({"response_format": "json"}, f"field 'response_format': {NO_OBJECT} \"json\""),
    chat(
        {"chat_template_kwargs": {"tokenize": True}},
        "chat_template_kwargs cannot set 'tokenize': it is set by the server; leave it out",
    ),
    chat({"chat_template_kwargs": []}, "field 'chat_template_kwargs': it should …, not []"),
    # steering
    chat({"steering": "kind"}, UNSERVED, "steering", status=404),
    chat({"steering": "warm#00000000"}, "profile 'warm' is served in version…", "steering", status=404),
    chat(
        {"steering": ""},
        "the steering is empty; write for example 'warm@0.8+concise@-0.3', or leave it out",
        "steering",
    ),
    chat({"steering": "warm@@1"}, f"steering 'warm@@1' {UNREADABLE.format('warm@@1')}"),
    chat({"steering": "warm@nan"}, f"steering 'warm@nan' {UNREADABLE.format('warm@nan')}"),
    chat({"steering": "warm@1e999"}, "the strength of 'warm' must be a finite number", "steering"),
    chat({"steering": "Warm"}, f"steering 'Warm' {UNREADABLE.format('Warm')}"),
    chat({"steering": "warm@2.5"}, f"strength 2.5 of profile 'warm' is {BEYOND}"),
    chat(
        {"steering": "warm@1.5+concise@-1"},
        f"the strengths of this mix add up to 2.5, beyond the safe range of 2; {WAIVE}",
        "steering",
    ),
    chat({"steering": 3}, f"field 'steering': {NO_OBJECT} 3"),
    chat({"steering": {}}, "field 'steering.profiles' is missing"),
    chat({"steering": {"profiles": "warm"}}, "field 'steering.profiles': it should …, not \"warm\""),
    chat(
        {"steering": {"profiles": [], "apply_to": "prompt"}},
        "field 'steering.apply_to': it should …'generated'…'all', not \"prompt\"",
    ),
    chat(
        {"steering": {"profiles": [], "preserve_norm": 1}},
        "field 'steering.preserve_norm': it should …, not 1",
    ),
    chat(term(amount=1), "unknown field 'steering.profiles[0].amount'"),
    chat(term(strength="1"), "field 'steering.profiles[0].strength': it should …, not \"1\""),
    chat(
        term(layers=[]),
        "profile 'warm': the list of layers is empty; leave it out to use all layers",
        "steering.layers",
    ),
    chat(term(layers=[2]), "profile 'warm' has no direction at layer 2; it has layers [1, 3, 5, 7]", "steering.layers"),
    chat(term(layers=["1"]), "field 'steering.profiles[0].layers[0]': it should …, not \"1\""),
    chat(
        {"steering": {"profiles": [{"name": "warm", "strength": 1e308}], "allow_beyond_safe": True}},
        OVERFLOW,
        "strength",
    ),
    chat(
        {"steering": {"profiles": [{"name": "warm", "strength": 7e37}], "allow_beyond_safe": True}},
        "the model's logits are not finite; the strength may be too high",
        "strength",
    ),
    chat(
        {"steering": {"profiles": [{"name": "warm"}, {"name": "warm"}]}},
        "profile 'warm' occurs twice in one steering",
        "steering",
    ),
    chat(
        {"steering": {"profiles": [{"name": "warm#"}]}},
        "'warm#' is neither NAME, NAME#SHA8 nor NAME#ALIAS; served are: concise, warm",
        "steering",
        status=404,
    ),
    chat(
        term(strength=0.5, schedule=points((0, 1))),
        "strength and schedule are both given: use only one of them",
        "steering.schedule",
    ),
    chat(term(interpolation="linear"), "interpolation is given without schedule", "steering.interpolation"),
    chat(term(schedule=[]), "a schedule begins with the strength from token 0", "steering.schedule"),
    chat(term(schedule=points((3, 1))), "a schedule begins with the strength from token 0", "steering.schedule"),
    chat(term(schedule=[{"from_token": 0}]), "field 'steering.profiles[0].schedule[0].strength' is missing"),
    chat(
        term(schedule=points((-1, 1))),
        "field 'steering.profiles[0].schedule[0].from_token': it should …0, not -1",
    ),
    chat(
        term(schedule=points((4097, 1))),
        "field 'steering.profiles[0].schedule[0].from_token': it should …4096, not 4097",
    ),
    chat(term(schedule=points((0, 9))), f"strength 9 of profile 'warm' is {BEYOND}"),
    chat(
        term(schedule=points((0, 1), (0, 1))), "a schedule's tokens must rise from point to point", "steering.schedule"
    ),
    chat(
        term(schedule=points((0, 1)), interpolation="cubic"),
        "field 'steering.profiles[0].interpolation': it should …'step'…'linear', not \"cubic\"",
    ),
    # completions
    completion({"prompt": None}, "field 'prompt' is missing"),
    completion({"prompt": ""}, "prompt is empty; send at least one character"),
    completion({"prompt": []}, f"field 'prompt': {PROMPT_FORMS}"),
    completion({"prompt": ["x", 1]}, f"field 'prompt': {PROMPT_FORMS}"),
    completion({"prompt": [True]}, f"field 'prompt': {PROMPT_FORMS}"),
    completion({"prompt": [3072]}, "the prompt has a token id outside of the vocabulary, 0 to 3071", "prompt"),
    completion({"prompt": [10**30]}, "the prompt has a token id outside of the vocabulary, 0 to 3071", "prompt"),
    completion(
        {"prompt": [5] * 64},
        "the prompt has 64 tokens; the context holds 64, prompt and completion together: shorten the prompt",
        "prompt",
    ),
    completion({"prompt": ["x"] * 7}, f"prompt: {TOO_MANY}"),
    completion({"max_tokens": 0}, "max_tokens must be at least 1; 0 is for completions with echo"),
    completion({"max_completion_tokens": 1}, "unknown field 'max_completion_tokens'"),
    completion({"logprobs": 21}, "field 'logprobs': it should …20, not 21"),
    completion({"logprobs": True}, "field 'logprobs': it should …, not true"),
    completion({"top_logprobs": 2}, "field 'top_logprobs' is not supported: leave it out or set it to 0"),
    completion({"best_of": 2}, "field 'best_of' is not supported: leave it out or set it to 1"),
    completion({"suffix": "x"}, "field 'suffix' is not supported: leave it out or set it to \"\""),
    completion(
        {"echo": True, "steering": {"profiles": [{"name": "warm"}], "apply_to": "generated"}},
        "with echo the prompt's tokens are scored, so they are steered: leave apply_to out or set it to all",
        "steering.apply_to",
    ),
    completion({"logit_bias": {"1": 101}}, "field 'logit_bias.1': it should …100, not 101"),
    completion({"logit_bias": {"1": "x"}}, "field 'logit_bias.1': it should …, not \"x\""),
    completion({"logit_bias": {"x": 1}}, "field 'logit_bias.x': …^(0|[1-9][0-9]{0,8})$…, not \"x\""),
    completion(
        {"logit_bias": {"1": 1, "01": 2}},
        "field 'logit_bias.01': …^(0|[1-9][0-9]{0,8})$…, not \"01\"",
    ),
    completion(
        {"logit_bias": {"3072": 1}}, "logit_bias names token 3072, but this model's token ids go from 0 to 3071"
    ),
    completion({"guided_regex": 1}, "field 'guided_regex': it should …, not 1"),
    completion({"guided_regex": "(?=a)"}, "guided_regex cannot be compiled…"),
    completion({"guided_regex": "[^\\s\\S]"}, "guided_regex cannot be followed…"),
    completion({"guided_choice": [1]}, "field 'guided_choice[0]': it should …, not 1"),
    completion(
        {"guided_choice": ["x"] * 1025},
        "field 'guided_choice': …1024…, not 1025",
    ),
    completion({"guided_grammar": ""}, "guided_grammar cannot be compiled…"),
    completion({"guided_grammar": "start: start"}, "guided_grammar cannot be followed…"),
    completion({"guided_grammar": 'start: "a" start', "max_tokens": 9}, "guided_grammar cannot be followed…"),
    completion({"guided_json": []}, "field 'guided_json': it should …, not []"),
    completion({"guided_json": {"$ref": "#"}}, "guided_json cannot be followed…"),
    completion({"guided_json": {"$ref": "http://localhost/x"}}, "guided_json cannot be compiled…"),
    completion({"guided_json": {"type": "integer", "minimum": 5, "maximum": 1}}, "guided_json cannot be compiled…"),
    completion(
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}},
        "field 'response_format.json_schema.name': …^[a-zA-Z0-9_-]{1,64}$…, not \"a b\"",
    ),
    # the native routes
    post("/generate", {}, NEITHER, "prompt"),
    post(
        "/generate",
        {"prompt": "a", "messages": [{"role": "user", "content": "b"}]},
        "send either prompt or messages: both are given",
        "prompt",
    ),
    *(
        post(path, {"messages": LONG, **more}, "the prompt has …", "messages")
        for path, more in (
            ("/generate", {}),
            ("/compare", {"variants": ["warm"]}),
            ("/score", {"completions": ["a"]}),
        )
    ),
    post("/generate", {"prompt": ["a"]}, "field 'prompt': it must be a string or a list of token ids, and not empty"),
    post("/generate", {"prompt": "a", "model": "demo"}, "unknown field 'model'"),
    post("/generate", {"prompt": "a", "n": 2}, "field 'n' is not supported: leave it out or set it to 1"),
    post("/generate", {"prompt": "a", "profile": "kind"}, UNSERVED, status=404),
    post(
        "/generate",
        {"prompt": "a", "profile": ["warm"]},
        "field 'profile': it should …, not [\"warm\"]",
    ),
    post(
        "/generate", {"prompt": "a", "strength": 0.5}, "strength is given without profile: name the profile it is for"
    ),
    post("/generate", {"prompt": "a", "profile": "warm", "strength": 5}, f"strength 5 of profile 'warm' is {BEYOND}"),
    post(
        "/generate",
        {"prompt": "a", "profile": "warm", "steering": "warm"},
        "profile and steering are both given: use only one of them",
        "steering",
    ),
    post(
        "/generate",
        {"prompt": "a", "guided_regex": "a", "guided_choice": ["a"]},
        "guided_regex and guided_choice are both given: use only one of them",
        "guided_choice",
    ),
    post("/compare", {"variants": ["warm"]}, NEITHER, "prompt"),
    post("/compare", {"prompt": "x"}, "field 'variants' is missing"),
    post(
        "/compare",
        {"prompt": "x", "variants": []},
        "field 'variants': …1…",
    ),
    post("/compare", {"prompt": "x", "variants": [1]}, f"field 'variants[0]': {NO_OBJECT} 1"),
    post("/compare", {"prompt": "x", "variants": ["warm"] * 7}, f"variants: {TOO_MANY}"),
    post(
        "/compare",
        {"prompt": "x", "variants": ["warm"] * 9},
        "field 'variants': …8…, not 9",
    ),
    post("/compare", {"prompt": "x", "variants": ["warm", "warm@9"]}, f"strength 9 of profile 'warm' is {BEYOND}"),
    post(
        "/compare",
        {"prompt": "x", "variants": ["warm", "warm@@"]},
        f"steering 'warm@@' {UNREADABLE.format('warm@@')}",
        "variants[1]",
    ),
    post("/compare", {"prompt": "x", "variants": ["warm", "kind"]}, UNSERVED, "variants[1]", status=404),
    post(
        "/compare",
        {"prompt": "x", "variants": ["warm"], "max_tokens": 0},
        "max_tokens must be at least 1; 0 is for completions with echo",
    ),
    post("/compare", {"prompt": "x", "variants": ["warm"], "steering": "warm"}, "unknown field 'steering'"),
    post("/score", {"completions": ["x"]}, NEITHER, "prompt"),
    post("/score", {"prompt": "x"}, "field 'completions' is missing"),
    post(
        "/score",
        {"prompt": "x", "completions": []},
        "field 'completions': …1…",
    ),
    post("/score", {"prompt": "x", "completions": [""]}, "completions[0] holds no token of this model"),
    post(
        "/score",
        {"prompt": "x", "completions": [[3072]]},
        "completions[0] has a token id outside of the vocabulary, 0 to 3071",
    ),
    post("/score", {"prompt": "x", "completions": ["y"] * 7}, f"completions: {TOO_MANY}"),
    post(
        "/score",
        {"prompt": "x", "completions": ["y"] * 1025},
        "field 'completions': …1024…, not 1025",
    ),
    post("/score", {"prompt": "x", "completions": ["y"], "max_tokens": 3}, "unknown field 'max_tokens'"),
    post(
        "/score",
        {"prompt": "x", "completions": ["y"], **term(schedule=points((0, 1)))},
        "completions are scored under a constant steering: leave the schedule out",
        "steering.schedule",
    ),
    post("/steering/resolve", {}, "field 'steering' is missing"),
    post(
        "/steering/resolve",
        {"steering": "warm@0.5,concise"},
        f"steering 'warm@0.5,concise' {UNREADABLE.format('warm@0.5,concise')}",
    ),
    post("/steering/resolve", {"steering": "warm", "prompt": "x"}, "unknown field 'prompt'"),
    post(
        "/steering/resolve",
        {"steering": {"profiles": [{"name": "warm", "strength": 1e308}], "allow_beyond_safe": True}},
        OVERFLOW,
        "strength",
    ),
    patch({}, "field 'steering' is missing"),
    patch({"steering": "kind"}, UNSERVED, "steering", status=404),
    patch({"steering": "warm@9"}, f"strength 9 of profile 'warm' is {BEYOND}"),
    patch({"steering": "warm", "strength": 1}, "unknown field 'strength'"),
    patch({"steering": "warm"}, "there is no generation 'gen-0' here", "id", status=404),
    # headers
    header(
        "/generate",
        {"prompt": "a"},
        b"",
        "the steering is empty; write for example 'warm@0.8+concise@-0.3', or leave it out",
    ),
    header("/generate", {"prompt": "a"}, b"w\xe4rm", f"steering 'wärm' {UNREADABLE.format('wärm')}"),
    header(
        "/generate",
        {"prompt": "a", "profile": "warm"},
        b"warm",
        "both the field profile and the header x-trimtab-steering steer: use only one of them",
    ),
    header(
        "/v1/completions",
        {**COMPLETION, "model": "demo:warm"},
        b"warm",
        "both the model's alias 'demo:warm' and the header x-trimtab-steering steer: use only one of them",
    ),
    *(
        header(
            path,
            body,
            b"warm",
            "the header x-trimtab-steering is not accepted here: put the steering into the body",
        )
        for path, body in (
            ("/compare", {"prompt": "a", "variants": ["warm"]}),
            ("/steering/resolve", {"steering": "warm"}),
        )
    ),
    # bodies that are not JSON objects
    raw("/v1/chat/completions", b'{"model": "demo",', f"{NO_JSON}: …"),
    raw("/v1/chat/completions", b'{"temperature": NaN}', f"{NO_JSON}: …"),
    raw("/v1/chat/completions", b'{"temperature": -Infinity}', f"{NO_JSON}: …"),
    raw("/v1/completions", b'{"prompt": "\\ud800"}', f"{NO_JSON}: …"),
    raw("/v1/completions", b'{"prompt": "\xed\xa0\x80"}', f"{NO_JSON}: …"),
    raw("/v1/completions", '{"prompt": "x"}'.encode("utf-16"), f"{NO_JSON}: …"),
    raw(
        "/generate",
        b'{"prompt": "a", "seed": 1, "seed": 2}',
        f'{NO_JSON}: Detected duplicate key "seed" at line 1 column 35',
    ),
    raw("/generate", b'{"a": {"b": 1, "\\u0062": 2}}', f'{NO_JSON}: Detected duplicate key "b" at line 1 column 25'),
    raw("/v1/completions", b'{"seed": 007}', f"{NO_JSON}: invalid number at line 1 column 11"),
    raw("/generate", b'{"max_tokens": 1' + b"0" * 5000 + b"}", f"{NO_JSON}: number out of range at line 1 column 4317"),
    raw(
        "/generate",
        b'{"prompt": "a", "temperature": 1e999}',
        "field 'temperature': it should …, not Infinity",
        "temperature",
    ),
    raw("/generate", b"[" * 10_000, f"{NO_JSON}: …"),
    raw("/generate", b"\xff", f"{NO_JSON}: …"),
    raw("/generate", b"", "the body is missing: send a JSON object"),
    raw("/generate", b"null", f"the body: {NO_OBJECT} null"),
    raw("/compare", b"[{}]", f"the body: {NO_OBJECT} [{{}}]"),
    raw("/compare", b'{"prompt": "x"} {}', f"{NO_JSON}: …"),
    raw("/score", b'{"prompt": "x",}', f"{NO_JSON}: …"),
    raw("/score", b'"x"', f'the body: {NO_OBJECT} "x"'),
    raw("/steering/resolve", b"{'steering': 'warm'}", f"{NO_JSON}: …"),
    raw("/steering/resolve", b'{"steering": "warm"}', SEND_JSON, kind="text/plain"),
    raw("/generate", b"prompt=a", SEND_JSON, kind="application/x-www-form-urlencoded"),
    # routes and methods
    route("POST", "/v1/embeddings", "there is no route '/v1/embeddings'", status=404),
    route("POST", "/v1/models", "'/v1/models' does not accept POST"),
    route("DELETE", "/v1/completions", "'/v1/completions' does not accept DELETE"),
    route("PUT", "/compare", "'/compare' does not accept PUT"),
    route("GET", "/generations/gen-0", "'/generations/gen-0' does not accept GET"),
    route("POST", "/profiles", "'/profiles' does not accept POST"),
    route("GET", "/profiles/%00", "profile '\\x00' is not served; served are: concise, warm", status=404),
]
