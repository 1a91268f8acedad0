"""Which tokens end a model's texts and how long they may be, the same for fitting, evaluation and serving."""

from __future__ import annotations

import json
from typing import Any

from transformers import PretrainedConfig

from steering_vectors.errors import ModelError
from steering_vectors.models.loading import LanguageModel
from steering_vectors.models.tokenizers import chat_template

DEFAULT_CONTEXT = 4096  # tokens, where nobody asks for more
MIN_CONTEXT = 2


def eos_ids(lm: LanguageModel) -> frozenset[int]:
    """The tokens that end a text: all that say so of themselves.

    They are those of the generation config, or of the model's config if that has none, where transformers' `generate`
    stops; the tokenizer's EOS token; and the token that the chat template writes after a reply. A chat model ends its
    turns with the last one, and its generation config often lacks it. The model's config alone is no reason to stop:
    many architectures have a default there, which is another token in other vocabularies.
    """
    generation = lm.model.generation_config
    stated = (
        None if generation is None else generation.eos_token_id,
        lm.model.config.get_text_config().eos_token_id,
    )
    first: int | list[int] = next((ids for ids in stated if ids is not None and ids != []), [])
    template = chat_template(lm.tokenizer)
    turn = None if template is None else lm.tokenizer.added_tokens_encoder.get(template.end_of_turn)
    found = {*([first] if isinstance(first, int) else first), lm.tokenizer.eos_token_id, turn}
    return frozenset(int(one) for one in found if one is not None and 0 <= one < lm.vocab_size)


def context_limit(lm: LanguageModel) -> int | None:
    """The largest number of positions the model can compute; None if nothing bounds it.

    Rotary embeddings that depend on the longest row of a batch (dynamic, longrope) bound it by the length up to which
    they do not, so that a row never depends on its neighbours.
    """
    config: PretrainedConfig = lm.model.config.get_text_config()
    limits = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len")]
    described = json.dumps(config.to_dict(), default=str)
    if any(f'"{kind}"' in described for kind in ("dynamic", "longrope")):
        limits.append(_original_length(config.to_dict()))
    known = [int(limit) for limit in limits if isinstance(limit, int) and limit > 0]
    return min(known, default=None)


def checked_context(lm: LanguageModel, wanted: int | None) -> int:
    """The context to run with: what is wanted, or else the model's own, at most DEFAULT_CONTEXT.

    Raises ModelError if more is wanted than the model can compute, or too little.
    """
    limit = context_limit(lm)
    if wanted is None:
        return min(limit or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
    if wanted < MIN_CONTEXT:
        raise ModelError(f"a context of {wanted} tokens is too short: at least {MIN_CONTEXT}")
    if limit is not None and wanted > limit:
        raise ModelError(f"a context of {wanted} tokens is more than the model's {limit}")
    return wanted


def _original_length(config: dict[str, Any]) -> int | None:
    """`original_max_position_embeddings`, wherever a configuration keeps it."""
    for key, value in config.items():
        if key == "original_max_position_embeddings" and isinstance(value, int):
            return value
        if isinstance(value, dict) and (found := _original_length(value)) is not None:
            return found
    return None
