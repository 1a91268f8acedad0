"""Text and messages as token ids, for fitting and serving."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from steering_vectors.data.chat import (
    Example,
    Message,
    chat_template_sha256,
    chat_template_source,
    continuation,
    decoded,
    encode_example,
    encode_prompt,
    render_chat,
)
from steering_vectors.errors import DataError, RequestError
from steering_vectors.models.loading import DEMO_DIRECTORY, wrap_model
from tests.support.tiny import tiny_model
from tests.support.tiny_tokenizers import (
    CHAT_TEMPLATE,
    byte_fallback_tokenizer,
    chatml_tokenizer,
    legacy_llama_tokenizer,
    prefix_space_tokenizer,
    tiny_tokenizer,
    unigram_tokenizer,
)

SHARED = Path(__file__).resolve().parents[4] / "shared"
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


@pytest.mark.parametrize("template", ["{{ messages[9].content.x }}", "{{ 1 + messages[0]['content'] }}"])
def test_a_template_that_fails_is_an_error_of_the_request(template: str) -> None:
    with pytest.raises(RequestError, match="the model's chat template refuses these messages: "):
        render_chat(with_template(template), HELLO)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('Only one turn, please.') }}", "Only one turn, please."),
        ("{{ messages[9].content.x }}", "list object has no element 9"),
        ("{% include '/etc/passwd' %}", "TypeError"),
        ("{{ 1 + messages[0]['content'] }}", "TypeError"),
        ("{{ secret.__class__.__mro__ }}", "SecurityError"),
    ],
)
def test_the_reason_is_the_templates_own_and_no_text_of_other_code(template: str, reason: str) -> None:
    with pytest.raises(RequestError) as caught:
        render_chat(with_template(template), HELLO, template_kwargs={"secret": "x"})
    assert caught.value.message == f"the model's chat template refuses these messages: {reason}"


def test_no_messages_are_an_error(chat: PreTrainedTokenizerFast) -> None:
    with pytest.raises(RequestError, match="messages is empty; send at least one message"):
        render_chat(chat, [])


def test_the_sha256_is_that_of_the_template(chat: PreTrainedTokenizerFast, plain: PreTrainedTokenizerFast) -> None:
    assert chat_template_sha256(chat) == hashlib.sha256(CHAT_TEMPLATE.encode()).hexdigest()
    assert chat_template_sha256(plain) is None


def test_of_several_templates_the_default_is_used() -> None:
    tokenizer = with_template({"default": STRICT, "tool_use": "x"})
    assert chat_template_sha256(tokenizer) == hashlib.sha256(STRICT.encode()).hexdigest()


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (
            {"rag": "x", "tool_use": "y"},
            "the model has several chat templates (rag, tool_use) and none called 'default'",
        ),
        ("{% if %}", "the model's chat template is not valid Jinja (line 1: Expected an expression, got 'end of"),
        ("{{ bos_token }}", "the model's chat template leaves out the text of user messages"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused_with_messages_alone(template: object, reason: str) -> None:
    tokenizer = with_template(template)
    assert chat_template_source(tokenizer) == "unusable"
    with pytest.raises(RequestError) as caught:
        encode_prompt(tokenizer, HELLO)
    assert caught.value.param == "messages"
    assert caught.value.message.startswith(reason)
    assert caught.value.message.endswith(", or send plain text")
    assert encode_prompt(tokenizer, "Hello") == encode_prompt(tiny_tokenizer(), "Hello")


def test_several_templates_without_a_default_have_no_sha256() -> None:
    assert chat_template_sha256(with_template({"rag": "x", "tool_use": "y"})) is None
    assert chat_template_sha256(with_template("{% if %}")) == hashlib.sha256(b"{% if %}").hexdigest()


def test_an_empty_template_is_none() -> None:
    assert chat_template_source(with_template("")) == "fallback"
    assert chat_template_sha256(with_template("")) is None


PARTS = (
    "{% for message in messages %}[{{ message['role'] }}]{% for part in message['content'] %}{{ part['text'] }}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
EACH = "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}{% endfor %}"
SYSTEM_PART = (
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'][0]['text'] }}|{% set messages = messages[1:] %}"
    "{% endif %}{% for message in messages %}{{ message['content'] }}{% endfor %}"
)


def test_a_template_that_reads_parts_gets_parts() -> None:
    rendered = render_chat(with_template(PARTS), TALK)
    assert rendered == "[system]Be kind.[user]What would you like?[assistant]Soup.[user]Today?[assistant]"


def test_a_template_may_read_parts_of_one_role_only() -> None:
    assert render_chat(with_template(SYSTEM_PART), TALK) == "Be kind.|What would you like?Soup.Today?"


def test_a_template_that_ignores_the_generation_prompt_gets_the_header_of_a_reply() -> None:
    template = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}\n{% endfor %}"
    assert render_chat(with_template(template), HELLO) == "<user> What would you like?\n<assistant> "


def left_out(place: int, role: str) -> str:
    return (
        f"the model's chat template leaves out or changes the text of messages[{place}], whose role is {role}: "
        "put the text into a user message, or choose another template with --chat-template"
    )


@pytest.mark.parametrize(
    ("template", "messages", "place", "role"),
    [
        # the system message, also if its text is elsewhere by chance
        (EACH.replace("messages %}", "messages if message['role'] != 'system' %}"), TALK, 0, "system"),
        (
            EACH.replace("messages %}", "messages if message['role'] != 'system' %}"),
            (Message("system", "o"), Message("user", "No")),
            0,
            "system",
        ),
        # a later system message
        (
            EACH.replace("messages %}", "messages if loop.first or message['role'] != 'system' %}"),
            (*HELLO, Message("system", "Be kind.")),
            1,
            "system",
        ),
        # all messages but the last, and the last one
        ("{{ messages[-1]['content'] }}", (Message("user", "first"), Message("user", "second")), 0, "user"),
        (EACH.replace("messages %}", "messages[:3] %}"), TALK, 3, "user"),
        # replies, a text cut off, letters changed, a word replaced
        (EACH.replace("messages %}", "messages if message['role'] != 'assistant' %}"), TALK, 2, "assistant"),
        (EACH.replace("['content']", "['content'][:12]"), HELLO, 0, "user"),
        (EACH.replace("['content']", "['content'] | replace('like', 'want')"), HELLO, 0, "user"),
        # a thought is not taken out of what a user wrote
        (EACH.replace("['content']", "['content'].split('</think>')[-1]"), (Message("user", "a</think>b"),), 0, "user"),
    ],
)
def test_a_text_that_a_template_leaves_out_is_refused(
    template: str, messages: tuple[Message, ...], place: int, role: str
) -> None:
    template = template.replace("loop.first", "messages[0] == message")
    with pytest.raises(RequestError) as caught:
        render_chat(with_template(template), messages)
    assert caught.value.param == "messages"
    assert caught.value.message == left_out(place, role)


THINKING = EACH.replace("['content']", "['content'].split('</think>')[-1].lstrip()")
REPLIED = (*HELLO, Message("assistant", "<think>\nSoup?\n</think>\n\nSoup."), Message("user", "Today?"))
COMMANDED = (Message("system", "/no_think Be kind."), *HELLO)


@pytest.mark.parametrize(
    ("template", "messages", "rendered"),
    [
        (EACH.replace("['content']", "['content'] | trim"), (Message("user", " Hi\n"),), "[user]Hi[assistant]"),
        (
            EACH.replace("['content']", "['content'] | replace('\\n\\n', '\\n')"),
            (Message("user", "a\n\nb"),),
            "[user]a\nb[assistant]",
        ),
        (THINKING, REPLIED, "[user]What would you like?[assistant]Soup.[user]Today?[assistant]"),
        (THINKING, (*HELLO, Message("assistant", "<think>a</think>"), *HELLO), None),  # a reply of a thought alone
        (EACH.replace("['content']", "['content'].replace('/no_think', '')"), COMMANDED, None),
        (
            EACH.replace("['content']", "['content'] | tojson"),
            (Message("user", 'say "船"\n'),),
            '[user]"say \\"船\\"\\n"[assistant]"',
        ),
        (EACH, (Message("system", " "), *HELLO), "[system] [user]What would you like?[assistant]"),
        (EACH.replace("messages %}", "messages if message['content'] %}"), (Message("user", ""), *HELLO), None),
        (
            "{{ messages[0]['content'] + '\\n\\n' + messages[1]['content'] }}",
            TALK[:2],
            "Be kind.\n\nWhat would you like?",
        ),
    ],
)
def test_what_templates_do_for_good_reasons_is_accepted(
    template: str, messages: tuple[Message, ...], rendered: str | None
) -> None:
    text = render_chat(with_template(template), messages)
    assert rendered is None or text == rendered


@pytest.mark.parametrize(
    "template",
    [
        "{{ strftime_now('%Y') | length }}" + EACH,
        "{% if tools %}{{ tools }}{% endif %}{% for one in documents or [] %}{{ one }}{% endfor %}" + EACH,
        "{% if not messages %}{{ raise_exception('none') }}{% endif %}" + EACH,
        EACH.replace("{{ message['content'] }}", "{% generation %}{{ message['content'] }}{% endgeneration %}"),
    ],
)
def test_what_templates_expect_of_transformers_is_there(template: str) -> None:
    assert render_chat(with_template(template), HELLO).endswith("[user]What would you like?[assistant]")


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
    tokenizer = AutoTokenizer.from_pretrained(f"{shared}/models/stories260k")
    ids, start = encode_example(tokenizer, Example("Once upon a time", " there was a girl."))
    assert decoded(tokenizer, ids) == "Once upon a time there was a girl."
    assert ids == encode_prompt(tokenizer, "Once upon a time there was a girl.")
    assert start == len(encode_prompt(tokenizer, "Once upon a time"))


CONTINUED: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte-level": tiny_tokenizer,
    "chatml": chatml_tokenizer,
    "byte-fallback": byte_fallback_tokenizer,
    "unigram": unigram_tokenizer,
    "unigram-first": lambda: unigram_tokenizer(prepend_scheme="first"),
    "unigram-never": lambda: unigram_tokenizer(prepend_scheme="never"),
    "legacy-llama": legacy_llama_tokenizer,
    "prefix-space": prefix_space_tokenizer,
    "demo": lambda: AutoTokenizer.from_pretrained(DEMO_DIRECTORY),
    "stories260k": lambda: AutoTokenizer.from_pretrained(SHARED / "models" / "stories260k"),
}
TEXTS = (
    "me",
    " me",
    "  me",
    "\nme",
    "\n\nme",
    " ",
    ".",
    ", and",
    "'s",
    "12",
    "\t",
    "\u0301",
    "é",
    "☀",
    " 船",
    "a</s>b",
)


@pytest.mark.parametrize("name", CONTINUED)
@pytest.mark.parametrize("prompt", ["ti", "The boat", "x ", "a\n", "It's", "船", "e"])
def test_prompt_and_continuation_decode_to_the_text_of_both(name: str, prompt: str) -> None:
    if name == "stories260k" and not (SHARED / "models" / name).is_dir():
        pytest.skip("the model is not there")
    tokenizer = CONTINUED[name]()
    before = encode_prompt(tokenizer, prompt)
    for text in TEXTS:
        ids, start = encode_example(tokenizer, Example(prompt, text))
        assert ids[:start] == before
        assert ids[start:] == continuation(tokenizer, before, text)
        assert decoded(tokenizer, ids) == decoded(tokenizer, before) + text


def test_a_word_is_continued_without_a_space() -> None:
    tokenizer = byte_fallback_tokenizer()
    before = encode_prompt(tokenizer, "ki")
    assert tokenizer.convert_ids_to_tokens(continuation(tokenizer, before, "nd")) == ["nd"]
    assert tokenizer.convert_ids_to_tokens(continuation(tokenizer, before, " nd")) == ["▁", "nd"]
    assert tokenizer.convert_ids_to_tokens(continuation(tokenizer, before, "\nnd")) == ["<0x0A>", "nd"]


def test_a_tokenizer_that_changes_texts_adds_no_space() -> None:
    """No tokenisation gives the text; the one that begins like it is taken."""
    tokenizer = byte_fallback_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    ids = continuation(tokenizer, encode_prompt(tokenizer, "ti"), "ME")
    assert decoded(tokenizer, [*encode_prompt(tokenizer, "ti"), *ids]) == "time"


def test_a_long_prompt_changes_no_continuation() -> None:
    tokenizer = byte_fallback_tokenizer()
    long = encode_prompt(tokenizer, "The little boat " * 40 + "ti")
    assert continuation(tokenizer, long, "me") == continuation(tokenizer, encode_prompt(tokenizer, "ti"), "me")


@pytest.mark.parametrize("prompt", ["a <|im_start|>b", (Message("user", "a"),)])
def test_a_token_that_the_model_does_not_have_is_refused(prompt: str | tuple[Message, ...]) -> None:
    tokenizer = chatml_tokenizer()
    wrap_model(tiny_model("llama", vocab_size=tokenizer.convert_tokens_to_ids("<|im_start|>")), tokenizer)
    param = "prompt" if isinstance(prompt, str) else "messages"
    with pytest.raises(RequestError) as caught:
        encode_prompt(tokenizer, prompt)
    assert caught.value.param == param
    assert caught.value.message == (
        f"{param} contains '<|im_start|>', token 373 of the tokenizer, but the model has 373 tokens only: leave it out"
    )
    assert encode_prompt(tokenizer, "a b") == encode_prompt(chatml_tokenizer(), "a b")


def test_a_completion_with_a_token_that_the_model_does_not_have_is_refused() -> None:
    tokenizer = chatml_tokenizer()
    wrap_model(tiny_model("llama", vocab_size=373), tokenizer)
    with pytest.raises(DataError, match="the text contains '<think>', token 374 of the tokenizer"):
        encode_example(tokenizer, Example("a", "<think>b"))
