"""What may enter the engine: the checks of a request, and the state it becomes. Runs beside the event loop."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from server.engines.detokenizer import Detokenizer, special_tokens
from server.engines.errors import reject
from server.engines.protocol import EngineInfo, GenerationRequest, SteeringPlan
from server.engines.torch.constraints.matching import CompiledGrammar, Matcher
from server.engines.torch.plans import ResolvedPlan, SteeringState
from server.engines.torch.sampling.request_sampler import RequestSampler, check_vocabulary
from server.engines.torch.scheduling.request_state import RequestState
from steering_vectors.errors import RequestError, SteeringError
from steering_vectors.profiles.profile import Profile


class Admission:
    """Checks requests and plans for one model, and makes the states of requests."""

    def __init__(self, info: EngineInfo, *, dtype: torch.dtype, eos_ids: frozenset[int]) -> None:
        self._info = info
        self._dtype = dtype
        self._eos_ids = eos_ids

    def states(
        self,
        request: GenerationRequest,
        plan: ResolvedPlan,
        profiles: Mapping[str, Profile],
        grammar: CompiledGrammar | None,
    ) -> list[RequestState]:
        """The states of a request's choices; `plan` is its plan, resolved. Raises RequestError that names the field of
        the protocol."""
        self._check(request)
        if plan.gates and "gates" not in self._info.capabilities:
            raise SteeringError("this model computes a prompt in one piece, so no gate can be decided in it")
        if plan.gates and request.prompt_logprobs is not None:
            raise SteeringError("a profile with a gate cannot score a prompt: it is the prompt that decides it")
        stop_ids = self._stop_ids(request)
        return [
            RequestState(
                name,
                request,
                SteeringState(
                    plan,
                    generated_from=len(request.prompt_ids) - request.scored_suffix - 1,
                    gates_stay_closed=len(request.prompt_ids) == 1,  # a gate looks at all tokens but the last
                ),
                RequestSampler(
                    request.sampling,
                    vocab_size=self._info.vocab_size,
                    eos_ids=self._eos_ids,
                    prompt_ids=request.prompt_ids,
                    choice=choice,
                    matcher=None if grammar is None else Matcher(grammar),
                    stop_ids=stop_ids,
                ),
                Detokenizer(self._info.tokenizer, request.prompt_ids, request.sampling.stop),
                stop_ids,
                tuple(profiles[version] for version in request.projections),
                request.versions,
            )
            for choice, name in enumerate(request.ids)
        ]

    def resolve(self, plan: SteeringPlan, profiles: Mapping[str, Profile]) -> ResolvedPlan:
        resolved = ResolvedPlan(plan, profiles)
        resolved.check(self._dtype)
        return resolved

    def _check(self, request: GenerationRequest) -> None:
        prompt, vocabulary, context = request.prompt_ids, self._info.vocab_size, self._info.context
        reject(not prompt, "the prompt is empty", "prompt_ids")
        reject(
            any(not 0 <= token < vocabulary for token in prompt),
            f"the prompt has a token id outside of the vocabulary, 0 to {vocabulary - 1}",
            "prompt_ids",
        )
        if len(prompt) + (request.sampling.max_tokens != 0) > context:
            raise RequestError(
                f"the prompt has {len(prompt)} tokens; the context holds {context}, prompt and completion together: "
                "shorten the prompt",
                param="prompt_ids",
                code="context_length_exceeded",
            )
        check_vocabulary(request.sampling, vocabulary)
        endless = request.constraint is not None and request.sampling.ignore_eos
        reject(endless, "ignore_eos cannot be used with a constraint, whose texts end: leave it out", "ignore_eos")
        if request.divergence and self._info.slots < 2:
            raise RequestError("divergence needs a second slot", param="divergence", code="too_few_slots")

    def _stop_ids(self, request: GenerationRequest) -> dict[int, int | str]:
        """The tokens that end the text, each with what is reported."""
        special = special_tokens(self._info.tokenizer) if request.sampling.stop else {}
        stop_ids: dict[int, int | str] = {}
        for text in request.sampling.stop:
            if text in special:
                stop_ids[special[text]] = text
            elif held := next((one for one in special if len(one) > 1 and not one.isspace() and one in text), None):
                raise RequestError(
                    f"stop string {text!r} holds the special token {held!r}, which texts leave out: stop at {held!r} "
                    "alone",
                    param="stop",
                )
        stop_ids.update((token_id, token_id) for token_id in request.sampling.stop_token_ids)
        return stop_ids


def check_no_new_gates(known: Collection[str], plan: ResolvedPlan) -> None:
    """Raise SteeringError for a gate that the prompt of a running request did not decide."""
    for name in plan.gates:
        if name not in known:
            raise SteeringError(
                f"profile {name!r} has a gate, which a prompt decides before it is answered: it cannot join a running "
                "generation"
            )
