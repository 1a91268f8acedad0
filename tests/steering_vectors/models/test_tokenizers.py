"""What rendering short conversations shows of chat templates, and the choice among several."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from steering_vectors.errors import ModelError
from steering_vectors.models.loading import load_model, wrap_model
from steering_vectors.models.tokenizers import (
    ChatTemplate,
    chat_template,
    choose_template,
    control_tokens,
    vocabulary_of,
)
from tests.support.tiny import save_tiny, tiny_model
from tests.support.tiny_tokenizers import CHATML, chatml_tokenizer, tiny_tokenizer

PARTS = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
EITHER = (
    "{% for message in messages %}[{{ message['role'] }}]{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}{% endfor %}"
)
SYSTEM_PART = (  # as Mistral Small 3.1 has it
    "{% if messages[0]['role'] == 'system' %}[SYS]{{ messages[0]['content'][0]['text'] }}[/SYS]"
    "{% set messages = messages[1:] %}{% endif %}"
    "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}{% endfor %}"
)
NO_SYSTEM = (
    "{% for message in messages %}{% if message['role'] != 'system' %}[{{ message['role'] }}]{{ message['content'] }}"
    "{% endif %}{% endfor %}"
)
REFUSES_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}<s>{{ message['role'] }}\n{{ message['content'] | trim }}</s>\n{% endfor %}"
)
MERGES_SYSTEM = (  # into the last user message, as Mistral's
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set rest = messages[1:] %}"
    "{% else %}{% set rest = messages %}{% endif %}<s>"
    "{% for message in rest %}{% if message['role'] == 'user' %}[INST] {% if system is defined and loop.last %}"
    "{{ system + '\n\n' }}{% endif %}{{ message['content'] }} [/INST]{% else %} {{ message['content'] }}</s>{% endif %}"
    "{% endfor %}"
)
TEXT = {"user": "text", "system": "text", "assistant": "text"}


def read(template: object) -> ChatTemplate:
    tokenizer = chatml_tokenizer()
    tokenizer.chat_template = template
    found = chat_template(tokenizer)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("template", "formats"),
    [
        (CHATML, TEXT),
        (PARTS, dict.fromkeys(TEXT, "parts")),
        (EITHER, TEXT),
        (SYSTEM_PART, {**TEXT, "system": "parts"}),
        (NO_SYSTEM, {**TEXT, "system": None}),
        (REFUSES_SYSTEM, TEXT),
        (MERGES_SYSTEM, TEXT),
        ("{{ messages[0]['content'] }}", {**TEXT, "system": "text", "assistant": None}),
        ("{% for m in messages %}{{ m['content'] if m['content'] is not string }}{% endfor %}", dict.fromkeys(TEXT)),
        ("{# a revision of the vision #}" + CHATML, TEXT),
    ],
)
def test_the_form_in_which_a_template_reads_content(template: str, formats: dict[str, str | None]) -> None:
    found = read(template)
    assert found.formats == formats
    assert (found.problem is None) == (formats["user"] is not None)


@pytest.mark.parametrize(
    ("template", "token"),
    [
        (CHATML, "<|im_end|>"),
        (PARTS, "<|im_end|>"),
        (REFUSES_SYSTEM, "</s>"),
        (MERGES_SYSTEM, "</s>"),
        (EITHER, None),
        ("{% for m in messages %}<|im_start|>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}", None),
        ("{% for m in messages %}<s>{{ m['content'] }}{% endfor %}<s>", None),  # BOS begins a text
        ("{% for m in messages %}<|im_start|>{{ m['content'] }}{% endfor %}<|im_start|>assistant", None),  # a next turn
        ("{% for m in messages %}{{ m['content'] }} \n<|im_end|></s>{% endfor %}", "<|im_end|>"),
        # a thought before a reply ends by another token, a middle turn by another than the last
        (
            "{% for m in messages %}{{ m['role'] }}<think></think>{{ m['content'] }}"
            "{{ '</s>' if loop.last else '<|im_end|>' }}{% endfor %}",
            "</s>",
        ),
    ],
)
def test_the_token_that_ends_a_reply(template: str, token: str | None) -> None:
    assert read(template).end_of_turn == token


@pytest.mark.parametrize(
    ("template", "header"),
    [
        (CHATML, ""),
        (MERGES_SYSTEM, ""),  # a reply follows at once
        (CHATML.split("{% if add")[0], "<|im_start|>assistant\n"),  # it ignores the request for a prompt
        (CHATML.split("{% if add")[0] + "<|im_start|>assistant\n", ""),  # it has one always
        ("{{ messages[0]['content'] }}", ""),
    ],
)
def test_the_header_that_a_template_leaves_out(template: str, header: str) -> None:
    assert read(template).header == header


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (
            {"rag": CHATML, "tool_use": CHATML},
            "the model has several chat templates (rag, tool_use) and none called 'default': "
            "choose one with --chat-template NAME, or send plain text",
        ),
        (
            "{% if %}",
            "the model's chat template is not valid Jinja (line 1: Expected an expression, got 'end of statement "
            "block'): choose another with --chat-template, or send plain text",
        ),
        (
            "{{ bos_token }}",
            "the model's chat template leaves out the text of user messages: choose another with --chat-template, or "
            "send plain text",
        ),
        (
            "  \n",
            "the model's chat template leaves out the text of user messages: choose another with --chat-template, or "
            "send plain text",
        ),
    ],
)
def test_a_template_that_cannot_be_used_says_why(template: object, problem: str) -> None:
    assert read(template).problem == problem


@pytest.mark.parametrize("template", [None, "", {}])
def test_no_template(template: object) -> None:
    tokenizer = chatml_tokenizer()
    tokenizer.chat_template = template
    assert chat_template(tokenizer) is None


def test_a_template_that_is_replaced_is_read_again() -> None:
    tokenizer = chatml_tokenizer()
    first = chat_template(tokenizer)
    assert chat_template(tokenizer) is first
    tokenizer.chat_template = PARTS
    found = chat_template(tokenizer)
    assert found is not None
    assert found.source == PARTS


def test_of_several_templates_the_default_is_read() -> None:
    assert read({"default": CHATML, "tool_use": "{{ tools[0] }}"}).source == CHATML


def test_control_tokens_are_special_or_stand_between_turns() -> None:
    tokenizer = chatml_tokenizer()
    assert control_tokens(tokenizer) == {"<s>", "</s>", "<|im_end|>", "<|im_start|>"}
    tokenizer.chat_template = None
    assert control_tokens(tokenizer) == {"<s>", "</s>", "<|im_end|>"}


def test_a_template_is_chosen_by_name() -> None:
    tokenizer = chatml_tokenizer()
    tokenizer.chat_template = {"rag": PARTS, "chat": CHATML}
    choose_template(tokenizer, "rag")
    assert tokenizer.chat_template == PARTS


def test_a_template_is_chosen_by_file(tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text(PARTS)
    tokenizer = chatml_tokenizer()
    choose_template(tokenizer, str(tmp_path / "mine.jinja"))
    assert tokenizer.chat_template == PARTS


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("rag", r"'rag' is neither one of the tokenizer's \(named ones: chat, tools\) nor a file .*\(No such file"),
        ("", r"'' is neither one of .*\(Is a directory\)"),
        ("empty.jinja", r"empty.jinja is empty"),
        ("latin.jinja", r"'.*latin.jinja' is neither .*invalid start byte"),
        ("a\0b", r"is neither .*null byte"),
    ],
)
def test_a_choice_that_is_nothing_is_refused(tmp_path: Path, choice: str, message: str) -> None:
    (tmp_path / "empty.jinja").write_text(" \n")
    (tmp_path / "latin.jinja").write_bytes(b"{{ '\xff' }}")
    tokenizer = chatml_tokenizer()
    tokenizer.chat_template = {"chat": CHATML, "tools": CHATML}
    with pytest.raises(ModelError, match=message):
        choose_template(tokenizer, str(tmp_path / choice) if choice.endswith("jinja") else choice)


def test_load_model_chooses_among_the_templates_of_a_directory(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    save_tiny("llama", tmp_path, chat_template=False)
    tokenizer.chat_template = {"rag": PARTS, "chat": CHATML}
    tokenizer.save_pretrained(tmp_path)
    assert sorted(path.stem for path in (tmp_path / "additional_chat_templates").iterdir()) == ["chat", "rag"]
    assert load_model(str(tmp_path), chat_template="rag").tokenizer.chat_template == PARTS
    with pytest.raises(ModelError, match="'other' is neither one of the tokenizer's"):
        load_model(str(tmp_path), chat_template="other")


def test_templates_in_the_tokenizers_configuration_are_found(tmp_path: Path) -> None:
    tiny_tokenizer(chat_template=False).save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    listed = [{"name": "rag", "template": PARTS}, {"name": "chat", "template": CHATML}]
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": listed}))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    choose_template(tokenizer, "chat")
    assert tokenizer.chat_template == CHATML


def test_a_tokenizer_knows_the_vocabulary_of_its_model() -> None:
    tokenizer: PreTrainedTokenizerFast = tiny_tokenizer()
    assert vocabulary_of(tokenizer) is None
    wrap_model(tiny_model("llama"), tokenizer)
    assert vocabulary_of(tokenizer) == 384
