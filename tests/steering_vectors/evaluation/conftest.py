"""A tiny model and pairs that differ in their replies."""

from __future__ import annotations

import pytest

from steering_vectors.data.chat import Example
from steering_vectors.data.preferences import Preferences
from steering_vectors.models.loading import LanguageModel, wrap_model
from tests.support.tiny import tiny_model
from tests.support.tiny_tokenizers import tiny_tokenizer


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return wrap_model(tiny_model("llama"), tiny_tokenizer())


@pytest.fixture(scope="module")
def pairs() -> Preferences:
    names = [f"Ask {row}" for row in range(40)]
    good, bad = ([Example(name, text) for name in names] for text in (" please, kindly", " three apples"))
    return Preferences("preference", tuple(good), tuple(bad), sha256="5" * 64)
