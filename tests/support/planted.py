"""A tiny model with a planted direction in its residual stream, for methods to find.

The embeddings of two letters lie at opposite ends of the direction, the output projection reads it as one letter
against the other, and the first block's attention carries it from any token to later ones. Preferred responses repeat
one letter, rejected responses the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from steering_vectors.data.chat import Example, encode_example
from steering_vectors.measures.activations import capture
from steering_vectors.methods import Task, method_named
from steering_vectors.models.loading import LanguageModel, wrap_model
from tests.support.tiny import tiny_model
from tests.support.tiny_tokenizers import tiny_tokenizer

GOOD, BAD = "x", "z"
OPTIONS: dict[str, Mapping[str, Any]] = {
    "contrast-prompts": {"positive": GOOD * 6, "negative": BAD * 6},
    "bipo": {"epochs": 6.0},
    "rahf-scit": {"positive": "1", "negative": "2", "epochs": 8.0, "learning_rate": 1e-2},
    "rahf-dual": {"positive": "1", "negative": "2", "epochs": 8.0, "learning_rate": 1e-2},
}


def planted_model(seed: int = 0, **overrides: Any) -> tuple[LanguageModel, torch.Tensor]:
    """The model, and the unit direction from the bad letter to the good one."""
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", tie_word_embeddings=False, **overrides)
    axis = torch.nn.functional.normalize(
        torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(seed)), dim=0
    )
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        scale = embeddings.norm(dim=-1).mean()
        embeddings -= torch.outer(embeddings @ axis, axis)
        head -= torch.outer(head @ axis, axis)
        for letter, sign in ((GOOD, 1), (BAD, -1)):
            token = tokenizer.encode(letter, add_special_tokens=False)[0]
            embeddings[token] += sign * 2 * scale * axis
            head[token] += sign * 4 * head.norm(dim=-1).mean() * axis
        attention.v_proj.weight[0] = 2 * axis
        attention.o_proj.weight[:, 0] = 2 * scale * axis
    return wrap_model(model, tokenizer), axis


def planted_task(lm: LanguageModel, method: str, layers: tuple[int, ...] = (1,), rows: int = 12) -> Task:
    """Pairs that differ in the letter that their responses repeat."""
    sides = [[Example(f"Ask {i} again, ", letter * (3 + i % 4)) for i in range(rows)] for letter in (GOOD, BAD)]
    ids = [[encode_example(lm.tokenizer, one) for one in side] for side in sides]
    statistics = capture(lm, ids[0], ids[1], layers, paired=True)
    options = method_named(method).complete(OPTIONS.get(method, {}))
    return Task(lm, statistics, sides[0], sides[1], ids[0], ids[1], True, "planted", options=options)
