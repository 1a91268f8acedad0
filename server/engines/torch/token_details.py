"""What is reported of tokens besides their text: log-probabilities, divergences, projections and gate decisions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from server.engines.protocol import GateDecision, TokenLogprob
from server.engines.torch.sampling.logprobs import divergence, token_logprobs
from server.engines.torch.sampling.projections import projection
from server.engines.torch.scheduling.request_state import RequestState
from steering_vectors.runtime.runner import Residuals


@dataclass(frozen=True, slots=True)
class TokenDetails:
    """The details of one drawn token, each empty unless it was asked for."""

    logprobs: tuple[TokenLogprob, ...] = ()
    divergences: tuple[float, ...] = ()
    projections: tuple[tuple[float, ...], ...] = ()


def token_details(
    states: Sequence[RequestState], logits: torch.Tensor, tokens: Sequence[int], residuals: Mapping[int, Residuals]
) -> list[TokenDetails]:
    """The details of the tokens just drawn from logits `[rows, vocabulary]`; `residuals` are by slot."""
    logprobs = _logprobs(states, logits, tokens)
    return [
        TokenDetails(
            logprobs.get(place, ()),
            () if state.unsteered_logits is None else (divergence(logits[place], state.unsteered_logits),),
            (tuple(projection(profile, residuals[state.slot]) for profile in state.projected),)
            if state.projected
            else (),
        )
        for place, state in enumerate(states)
    ]


def score_prompt(state: RequestState, start: int, logits: torch.Tensor) -> list[TokenLogprob]:
    """Log-probabilities of the prompt tokens that logits `[tokens, vocabulary]` from position `start` on predict; they
    are added to the state's scores."""
    wanted = state.request.prompt_ids[start + 1 : start + 1 + len(logits)]
    new = token_logprobs(logits[: len(wanted)], wanted, [state.request.prompt_logprobs or 0] * len(wanted))
    state.prompt_scores += new
    return new


def decide_gates(state: RequestState, sums: Residuals) -> bool:
    """Add a chunk's summed residuals to the mean that decides the prompt's gates; decide them, and return True, once
    all but the prompt's last token are computed."""
    undecided = state.steering.undecided
    for name, gate in undecided.items():
        state.gate_sums[name] = state.gate_sums.get(name, 0) + sums[gate.layer]
    if state.computed < state.prompt_length - 1:
        return False
    decisions = {}
    for name, gate in undecided.items():
        similarity = gate.similarity((state.gate_sums[name] / state.computed).cpu())
        decisions[name] = GateDecision(similarity, gate.opens(similarity))
    state.steering.decide(state.completion_length, decisions)
    return True


def _logprobs(
    states: Sequence[RequestState], logits: torch.Tensor, tokens: Sequence[int]
) -> dict[int, tuple[TokenLogprob]]:
    """Log-probabilities by place among the rows, where they are wanted."""
    wanted = {place: top for place, state in enumerate(states) if (top := state.request.logprobs) is not None}
    if not wanted:
        return {}
    places = list(wanted)
    found = token_logprobs(logits[places], [tokens[place] for place in places], list(wanted.values()))
    return {place: (one,) for place, one in zip(places, found, strict=True)}
