"""Text and messages as token ids, for fitting and serving."""

from __future__ import annotations

import hashlib

import pytest
from transformers import PreTrainedTokenizerFast

from steering_vectors.data.chat import (
    Example,
    Message,
    chat_template_sha256,
    chat_template_source,
    encode_example,
    encode_prompt,
    render_chat,
)
from steering_vectors.errors import DataError, ModelError, RequestError
from tests.support.tiny_tokenizers import CHAT_TEMPLATE, byte_fallback_tokenizer, tiny_tokenizer

HELLO = (Message("user", "What would you like?"),)
TALK = (Message("system", "Be kind."), *HELLO, Message("assistant", "Soup."), Message("user", "Today?"))
STRICT = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ messages[0]['content'] }}{{ tone }}"
)


@pytest.fixture(scope="module")
def chat() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def plain() -> PreTrainedTokenizerFast:
    return tiny_tokenizer(chat_template=False)


@pytest.fixture(scope="module")
def sentencepiece() -> PreTrainedTokenizerFast:
    return byte_fallback_tokenizer(chat_template=False)


def with_template(template: object) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer(chat_template=False)
    tokenizer.chat_template = template
    return tokenizer


def decoded(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def test_the_tokenizers_own_template_is_used(chat: PreTrainedTokenizerFast) -> None:
    assert chat_template_source(chat) == "tokenizer"
    assert render_chat(chat, TALK) == (
        "<s>system: Be kind.\n<s>user: What would you like?\n<s>assistant: Soup.\n<s>user: Today?\n<s>assistant:"
    )


def test_without_a_template_contents_are_joined_by_newlines(plain: PreTrainedTokenizerFast) -> None:
    assert chat_template_source(plain) == "fallback"
    assert render_chat(plain, TALK) == "Be kind.\nWhat would you like?\nSoup.\nToday?"


def test_template_variables_reach_the_template() -> None:
    assert render_chat(with_template(STRICT), HELLO, template_kwargs={"tone": "!"}) == "What would you like?!"


@pytest.mark.parametrize("name", ["tokenize", "chat_template", "messages", "conversation", "add_generation_prompt"])
def test_template_variables_cannot_be_arguments_of_the_renderer(chat: PreTrainedTokenizerFast, name: str) -> None:
    with pytest.raises(RequestError) as caught:
        render_chat(chat, HELLO, template_kwargs={name: True})
    assert caught.value.param == "chat_template_kwargs"
    assert caught.value.message == f"chat_template_kwargs cannot set {name!r}: it is set by the server; leave it out"


def test_template_variables_without_a_template_are_refused(plain: PreTrainedTokenizerFast) -> None:
    with pytest.raises(RequestError, match="cannot set 'tone': this tokenizer has no chat template"):
        render_chat(plain, HELLO, template_kwargs={"tone": "!"})


def test_what_a_template_refuses_is_an_error_of_the_request() -> None:
    with pytest.raises(RequestError) as caught:
        render_chat(with_template(STRICT), TALK)
    assert caught.value.param == "messages"
    assert caught.value.message == "the model's chat template refuses these messages: System role not supported"


@pytest.mark.parametrize("template", ["{{ messages[9].content.x }}", "{% if %}", "{{ 1 + messages[0]['content'] }}"])
def test_a_template_that_fails_is_an_error_of_the_request(template: str) -> None:
    with pytest.raises(RequestError, match="the model's chat template refuses these messages: "):
        render_chat(with_template(template), HELLO)


def test_no_messages_are_an_error(chat: PreTrainedTokenizerFast) -> None:
    with pytest.raises(RequestError, match="messages is empty; send at least one message"):
        render_chat(chat, [])


def test_the_sha256_is_that_of_the_template(chat: PreTrainedTokenizerFast, plain: PreTrainedTokenizerFast) -> None:
    assert chat_template_sha256(chat) == hashlib.sha256(CHAT_TEMPLATE.encode()).hexdigest()
    assert chat_template_sha256(plain) is None


def test_of_several_templates_the_default_is_used() -> None:
    tokenizer = with_template({"default": STRICT, "tool_use": "x"})
    assert chat_template_sha256(tokenizer) == hashlib.sha256(STRICT.encode()).hexdigest()


def test_several_templates_without_a_default_are_an_error() -> None:
    with pytest.raises(ModelError, match=r"several chat templates \(rag, tool_use\) and none called 'default'"):
        chat_template_source(with_template({"rag": "x", "tool_use": "y"}))


def test_a_text_gets_one_bos(plain: PreTrainedTokenizerFast) -> None:
    ids = encode_prompt(plain, "The boat")
    assert ids[0] == plain.bos_token_id
    assert decoded(plain, ids) == "The boat"


def test_a_text_that_brings_its_bos_gets_no_other(plain: PreTrainedTokenizerFast) -> None:
    assert encode_prompt(plain, "<s>The boat") == encode_prompt(plain, "The boat")


def test_special_tokens_can_be_left_out(plain: PreTrainedTokenizerFast) -> None:
    assert encode_prompt(plain, "The boat", add_special_tokens=False) == encode_prompt(plain, "The boat")[1:]


def test_a_rendered_chat_has_the_bos_of_its_template_only(chat: PreTrainedTokenizerFast) -> None:
    ids = encode_prompt(chat, HELLO)
    assert ids == chat(render_chat(chat, HELLO), add_special_tokens=False)["input_ids"]
    assert ids.count(chat.bos_token_id) == 2


def test_a_template_without_bos_gets_none() -> None:
    tokenizer = with_template("{{ messages[0]['content'] }}")
    assert tokenizer.bos_token_id not in encode_prompt(tokenizer, HELLO)


def test_the_fallback_gets_a_bos(plain: PreTrainedTokenizerFast) -> None:
    assert encode_prompt(plain, HELLO) == encode_prompt(plain, "What would you like?")


@pytest.mark.parametrize(("prompt", "param"), [("", "prompt"), ((), "messages")])
def test_an_empty_prompt_is_an_error(chat: PreTrainedTokenizerFast, prompt: str, param: str) -> None:
    with pytest.raises(RequestError, match=f"{param} is empty") as caught:
        encode_prompt(chat, prompt)
    assert caught.value.param == param


def test_half_a_surrogate_pair_is_an_error(plain: PreTrainedTokenizerFast) -> None:
    with pytest.raises(RequestError, match="prompt contains half of a surrogate pair"):
        encode_prompt(plain, "smile \ud83d")


@pytest.mark.parametrize("prompt", ["The boat", HELLO, TALK])
def test_an_example_begins_with_what_the_server_would_see(chat: PreTrainedTokenizerFast, prompt: str) -> None:
    ids, start = encode_example(chat, Example(prompt, " turned slowly"))
    assert ids[:start] == encode_prompt(chat, prompt)
    assert decoded(chat, ids[start:]) == " turned slowly"


def test_the_completion_is_tokenised_alone(plain: PreTrainedTokenizerFast) -> None:
    ids, start = encode_example(plain, Example("The bo", "at"))
    assert ids[start:] == plain("at", add_special_tokens=False)["input_ids"]


def test_without_a_prompt_the_response_starts_after_the_bos(plain: PreTrainedTokenizerFast) -> None:
    ids, start = encode_example(plain, Example(None, "The boat"))
    assert (ids, start) == (encode_prompt(plain, "The boat"), 1)


def test_without_prompt_and_bos_the_response_starts_at_once() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = None
    ids, start = encode_example(tokenizer, Example(None, "The boat"))
    assert (ids, start) == (encode_prompt(tokenizer, "The boat"), 0)


@pytest.mark.parametrize("completion", [" turned", "  turned", " ☀ 船"])
def test_a_leading_space_is_not_doubled(sentencepiece: PreTrainedTokenizerFast, completion: str) -> None:
    ids, _ = encode_example(sentencepiece, Example("The boat", completion))
    assert decoded(sentencepiece, ids) == "The boat" + completion


def test_a_completion_without_tokens_is_an_error(plain: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="the completion '' contains no token of this model; remove the row"):
        encode_example(plain, Example("The boat", ""))


def test_a_real_tokenizer_that_prepends_spaces_is_continued_exactly(shared: object) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(f"{shared}/models/stories260k")
    ids, start = encode_example(tokenizer, Example("Once upon a time", " there was a girl."))
    assert decoded(tokenizer, ids) == "Once upon a time there was a girl."
    assert ids == encode_prompt(tokenizer, "Once upon a time there was a girl.")
    assert start == len(encode_prompt(tokenizer, "Once upon a time"))
