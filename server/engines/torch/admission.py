"""What may enter the engine: which prompts fit the context, and which options go together."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from server.engines.errors import reject
from server.engines.protocol import GenerationRequest
from steering_vectors.errors import RequestError, SteeringError
from steering_vectors.profiles.mixture import Mixture


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
