"""Fitting and serving use the same end-of-text tokens and the same context limit."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch

from server.engines.config import EngineConfig
from server.engines.torch.engine import TorchEngine
from steering_vectors.errors import ModelError
from steering_vectors.measures.steered_model import steerable
from steering_vectors.models.limits import DEFAULT_CONTEXT, checked_context, context_limit, eos_ids
from steering_vectors.models.loading import LanguageModel, wrap_model
from tests.support.running import request, run_all
from tests.support.tiny import tiny_model
from tests.support.tiny_tokenizers import CHATML, chatml_tokenizer, tiny_tokenizer

GENERATION, OTHER, CONFIG, TOKENIZER, PLAIN = CANDIDATES = (20, 21, 22, 23, 24)
TOKENS = 12


def model_with(generation: Any, config: Any, tokenizer: int | None) -> LanguageModel:
    """A model that writes each of CANDIDATES with equal probability, and no other token. The arguments are the
    end-of-text tokens in its generation configuration, its configuration and its tokenizer."""
    network = tiny_model("phi")
    projection = network.get_output_embeddings()
    with torch.no_grad():
        projection.weight.zero_()
        projection.bias.fill_(-1e4)
        projection.bias[list(CANDIDATES)] = 0.0
    words = tiny_tokenizer()
    words.eos_token = None if tokenizer is None else words.convert_ids_to_tokens(tokenizer)
    network.config.eos_token_id = config
    if generation == "no generation config":
        network.generation_config = None
    else:
        network.generation_config.eos_token_id = generation
    return wrap_model(network, words)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("generation", "config", "tokenizer", "expected"),
    [
        (GENERATION, CONFIG, TOKENIZER, {GENERATION, TOKENIZER}),
        ([GENERATION, OTHER], CONFIG, TOKENIZER, {GENERATION, OTHER, TOKENIZER}),
        (None, CONFIG, TOKENIZER, {CONFIG, TOKENIZER}),
        (None, [CONFIG, OTHER], TOKENIZER, {CONFIG, OTHER, TOKENIZER}),
        ("no generation config", CONFIG, TOKENIZER, {CONFIG, TOKENIZER}),
        (None, None, TOKENIZER, {TOKENIZER}),
        (None, None, None, set()),
    ],
)
def test_calibration_and_serving_end_texts_at_the_same_tokens(
    generation: Any, config: Any, tokenizer: int | None, expected: set[int]
) -> None:
    lm = model_with(generation, config, tokenizer)
    assert eos_ids(lm) == expected
    with steerable(lm) as steered:
        sampled = steered.sample([[0, 5]] * 40, tokens=TOKENS, seed=0)
    requests = [request([0, 5], temperature=1.0, seed=seed, max_tokens=TOKENS) for seed in range(40)]
    served = run_all(lm, requests, slots=8, context=64)
    for ids in sampled:
        assert not expected & set(ids[:-1])
        assert ids[-1] in expected or len(ids) == TOKENS
    for one in served:
        assert not expected & set(one.ids)
        assert (one.end.reason == "length") == (len(one.ids) == TOKENS)
    for seen in ([token for ids in sampled for token in ids], [token for one in served for token in one.ids]):
        assert set(CANDIDATES) - expected <= set(seen)


def chat_model(template: str | None, *, tokenizer: str, generation: list[str], config: str = "</s>") -> LanguageModel:
    """A model with ChatML's tokens whose parts say these tokens end a text."""
    words = chatml_tokenizer(template)
    words.eos_token = tokenizer
    network = tiny_model("llama")
    network.config.eos_token_id = words.convert_tokens_to_ids(config)
    network.generation_config.eos_token_id = words.convert_tokens_to_ids(generation) or None
    return wrap_model(network, words)


TURNS = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}END\n{% endfor %}"


@pytest.mark.parametrize(
    ("template", "tokenizer", "generation", "expected"),
    [
        # all agree
        (CHATML, "<|im_end|>", ["<|im_end|>"], {"<|im_end|>"}),
        # an early Llama 3: neither generation config nor tokenizer has the turn's end
        (CHATML, "</s>", ["</s>"], {"</s>", "<|im_end|>"}),
        # Gemma: the generation config has both, the tokenizer one
        (CHATML, "</s>", ["</s>", "<|im_end|>"], {"</s>", "<|im_end|>"}),
        # a fine-tune of a base model: its generation config is the base model's, its tokenizer is not
        (CHATML, "<|im_end|>", ["</s>"], {"</s>", "<|im_end|>"}),
        # no generation config: the model's config, whose token need not be the tokenizer's
        (CHATML, "<|im_end|>", [], {"</s>", "<|im_end|>"}),
        # a template without an end of turn, one that begins turns only, and one that cannot be used
        (TURNS.replace("END", ""), "</s>", ["</s>"], {"</s>"}),
        (TURNS.replace("END", "</s>"), "</s>", ["</s>"], {"</s>"}),
        ("{% if %}", "</s>", ["</s>"], {"</s>"}),
        # an end that is an added token only
        (TURNS.replace("END", "</think>"), "</s>", ["</s>"], {"</s>", "</think>"}),
    ],
)
def test_a_text_ends_at_every_token_that_is_said_to_end_it(
    template: str, tokenizer: str, generation: list[str], expected: set[str]
) -> None:
    lm = chat_model(template, tokenizer=tokenizer, generation=generation)
    assert set(lm.tokenizer.convert_ids_to_tokens(sorted(eos_ids(lm)))) == expected


def test_a_default_of_the_models_config_ends_nothing_beside_a_generation_config() -> None:
    lm = chat_model(CHATML, tokenizer="<|im_end|>", generation=["<|im_end|>"], config="a")
    assert eos_ids(lm) == {lm.tokenizer.convert_tokens_to_ids("<|im_end|>")}


def test_a_token_that_the_model_does_not_have_ends_nothing() -> None:
    words = chatml_tokenizer()
    words.eos_token = "<|im_end|>"
    network = tiny_model("llama", vocab_size=370)
    network.generation_config.eos_token_id = [1, 400, -1]
    lm = wrap_model(network, words)
    assert eos_ids(lm) == {1}
    (one,) = run_all(lm, [request([0, 5], max_tokens=4, min_tokens=3)], slots=1, context=64)
    assert len(one.ids) >= 3


def test_a_reply_ends_where_the_template_ends_a_turn() -> None:
    """The generation config and the tokenizer know </s> only; the model writes <|im_end|>."""
    lm = chat_model(CHATML, tokenizer="</s>", generation=["</s>"])
    end = lm.tokenizer.convert_tokens_to_ids("<|im_end|>")
    network = tiny_model("phi")
    with torch.no_grad():
        network.get_output_embeddings().weight.zero_()
        network.get_output_embeddings().bias[end] = 1e4
    network.generation_config.eos_token_id = 1
    (one,) = run_all(wrap_model(network, lm.tokenizer), [request([0, 5], max_tokens=8)], slots=1, context=64)
    assert (one.ids, one.end.reason) == ((), "stop")


def test_a_served_model_has_the_context_of_the_fitted_one() -> None:
    lm = wrap_model(tiny_model("llama", max_position_embeddings=48), tiny_tokenizer())
    assert context_limit(lm) == 48
    engine = TorchEngine(lm, EngineConfig(slots=2))
    assert engine.info.context == 48
    asyncio.run(engine.close())


@pytest.mark.parametrize(("wanted", "expected"), [(None, 256), (256, 256), (2, 2)])
def test_a_smaller_context_is_accepted(wanted: int | None, expected: int) -> None:
    lm = wrap_model(tiny_model("llama"), tiny_tokenizer())
    assert checked_context(lm, wanted) == expected


def test_no_context_is_longer_than_the_default_unless_asked_for() -> None:
    lm = wrap_model(tiny_model("llama", max_position_embeddings=DEFAULT_CONTEXT * 2), tiny_tokenizer())
    assert checked_context(lm, None) == DEFAULT_CONTEXT
    assert checked_context(lm, DEFAULT_CONTEXT * 2) == DEFAULT_CONTEXT * 2


@pytest.mark.parametrize(("wanted", "error"), [(257, "more than the model's 256"), (1, "too short: at least 2")])
def test_an_impossible_context_is_refused(wanted: int, error: str) -> None:
    lm = wrap_model(tiny_model("llama"), tiny_tokenizer())
    with pytest.raises(ModelError, match=error):
        checked_context(lm, wanted)
