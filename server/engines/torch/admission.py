"""What may enter the engine: how long a context a model bears, and which prompts fit it."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from typing import Any

from server.engines.errors import reject
from server.engines.protocol import GenerationRequest
from steering_vectors.errors import ModelError, RequestError, SteeringError
from steering_vectors.models.loading import LanguageModel
from steering_vectors.profiles.mixture import Mixture

DEFAULT_CONTEXT = 4096


def check_prompt(prompt_ids: Sequence[int], *, vocabulary: int, context: int, writes: bool) -> None:
    """Raise RequestError if a prompt is empty, has an id outside of the vocabulary, or does not fit the context, with
    room for a token if any is to be written."""
    reject(not prompt_ids, "the prompt is empty", "prompt")
    reject(
        any(not 0 <= token < vocabulary for token in prompt_ids),
        f"the prompt has a token id outside of the vocabulary, 0 to {vocabulary - 1}",
        "prompt",
    )
    if len(prompt_ids) > context - writes:
        raise RequestError(
            f"the prompt has {len(prompt_ids)} tokens; the context holds {context}, prompt and completion together: "
            "shorten the prompt",
            param="prompt",
            code="context_length_exceeded",
        )


def check_options(request: GenerationRequest, *, slots: int) -> None:
    """Raise RequestError for options that contradict each other, or that so few slots do not bear."""
    endless = request.grammar is not None and request.sampling.ignore_eos
    reject(endless, "ignore_eos cannot be used with a constraint, whose texts end: leave it out", "ignore_eos")
    alone = request.divergence and slots < 2
    reject(alone, "divergences need a second slot: start the server with --slots 2 or more", "kl")


def check_gates(request: GenerationRequest, mixture: Mixture, *, chunked: bool) -> None:
    """Raise SteeringError for a profile with a gate where the prompt cannot decide it."""
    if mixture.gated and not chunked:
        raise SteeringError("this model computes a prompt in one piece, so no gate can be decided in it")
    if mixture.gated and request.prompt_logprobs is not None:
        raise SteeringError("a profile with a gate cannot score a prompt: it is the prompt that decides it")


def check_no_new_gates(known: Collection[str], mixture: Mixture) -> None:
    """Raise SteeringError for a gate that the prompt of a running request did not decide."""
    for term in mixture.gated:
        if term.profile.name not in known:
            raise SteeringError(
                f"profile {term.profile.name!r} has a gate, which a prompt decides before it is answered: it cannot "
                "join a running generation"
            )


def checked_context(language_model: LanguageModel, context: int | None) -> int:
    """The context to run with; None takes the model's own, at most 4096. Raises ModelError beyond the model's."""
    limit = context_limit(language_model)
    if context is None:
        return min(limit or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
    if context < 2:
        raise ModelError(f"a context of {context} tokens is too short: at least 2")
    if limit is not None and context > limit:
        raise ModelError(f"a context of {context} tokens is more than the model's {limit}")
    return context


def context_limit(language_model: LanguageModel) -> int | None:
    """The most positions the model can be run on; None where nothing bounds it.

    Rotary embeddings that depend on the longest row of a batch (dynamic, longrope) are bounded by the length up to
    which they do not, so that a row never depends on its neighbours.
    """
    config = language_model.model.config.get_text_config()
    limits = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len")]
    described = json.dumps(config.to_dict(), default=str)
    if any(f'"{kind}"' in described for kind in ("dynamic", "longrope")):
        limits.append(_original_length(config.to_dict()))
    known = [int(limit) for limit in limits if isinstance(limit, int) and limit > 0]
    return min(known, default=None)


def _original_length(config: dict[str, Any]) -> int | None:
    """`original_max_position_embeddings`, wherever a configuration keeps it."""
    for key, value in config.items():
        if key == "original_max_position_embeddings" and isinstance(value, int):
            return value
        if isinstance(value, dict) and (found := _original_length(value)) is not None:
            return found
    return None


def eos_ids(language_model: LanguageModel) -> frozenset[int]:
    """Every end-of-sequence id of the generation configuration; else of the model's; else of the tokenizer."""
    model = language_model.model
    generation = model.generation_config.eos_token_id if model.generation_config is not None else None
    for ids in (generation, model.config.get_text_config().eos_token_id, language_model.tokenizer.eos_token_id):
        if ids is not None:
            return frozenset([ids] if isinstance(ids, int) else ids)
    return frozenset()
