"""The prompts of the verticals, for models with and without a chat template."""

from __future__ import annotations

from steering_vectors.data.chat import Message, encode_prompt, encode_text
from steering_vectors.evaluation.trust.rows import reader_for
from steering_vectors.models.loading import LanguageModel, wrap_model
from tests.support.tiny import tiny_model
from tests.support.tiny_tokenizers import tiny_tokenizer


def model(*, chat_template: bool) -> LanguageModel:
    return wrap_model(tiny_model("llama"), tiny_tokenizer(chat_template=chat_template))


def test_a_chat_model_is_asked_by_a_message() -> None:
    lm = model(chat_template=True)
    reader = reader_for(lm)
    prompt = reader.prompt(chat="Is it?", plain="Q: Is it?\nA:")
    ids, start = reader.answers(prompt, ["Yes"])[0]
    assert ids[:start] == encode_prompt(lm.tokenizer, (Message("user", "Is it?"),))
    assert lm.tokenizer.decode(ids[start:]) == "Yes"


def test_a_plain_model_is_asked_by_text() -> None:
    lm = model(chat_template=False)
    reader = reader_for(lm)
    ids, start = reader.answers(reader.prompt(chat="Is it?", plain="Q: Is it?\nA:"), ["Yes"])[0]
    assert lm.tokenizer.decode(ids, skip_special_tokens=True) == "Q: Is it?\nA: Yes"
    assert lm.tokenizer.decode(ids[start:]) == " Yes"


def test_a_sentence_counts_from_its_first_token() -> None:
    tokenizer = tiny_tokenizer(chat_template=True)
    ids, start = encode_text(tokenizer, "The boat")
    assert (start, ids[0]) == (1, tokenizer.bos_token_id)
    bare = tiny_tokenizer()
    bare.backend_tokenizer.post_processor = None
    assert encode_text(bare, "The boat") == (ids, 1)


def test_the_context_is_the_model_s() -> None:
    reader = reader_for(model(chat_template=False))
    assert reader.fits([(range(256), 1)])
    assert not reader.fits([(range(10), 1), (range(257), 1)])
