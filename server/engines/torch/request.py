"""One live request in the engine's thread, and what is told of its tokens besides their text.

Knows nothing of threads, of slots or of how a pass is computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from server.engines.detokenizer import Detokenizer
from server.engines.protocol import GateDecision, TokenLogprob
from server.engines.torch.mailbox import Mailbox
from server.engines.torch.sampling.logprobs import divergence, token_logprobs
from server.engines.torch.sampling.projections import projection
from server.engines.torch.sampling.request_sampler import RowSampler
from server.engines.torch.scheduling.request_state import Sequence as TokenSequence
from steering_vectors.profiles.gate import Gate

Residuals = Mapping[int, torch.Tensor]
"""Block outputs `[hidden]` by layer."""


@dataclass(slots=True, eq=False)
class Row:
    """Everything that belongs to one live request."""

    sequence: TokenSequence
    sampler: RowSampler
    detokenizer: Detokenizer
    mailbox: Mailbox
    scores: list[TokenLogprob] = field(default_factory=list)  # of the prompt so far
    sums: dict[str, torch.Tensor] = field(default_factory=dict)  # by gated profile, of the prompt's residuals
    unsteered: torch.Tensor | None = None  # logits of the shadow for the token to be drawn, [vocabulary]

    @property
    def blamed(self) -> str | None:
        """Which field of the request is to blame for logits that are no numbers: a constraint that allows nothing, else
        the strength of what steered; None if neither is."""
        grammar = self.sequence.request.grammar
        if grammar is not None and self.sampler.problem is not None:
            return grammar.constraint.field
        steered = any(not segment.mixture.is_neutral for segment in self.sequence.segments)
        return "strength" if steered else None

    def decide(self, sums: Residuals) -> bool:
        """Add a chunk's summed residuals to what decides the prompt's gates; decide them, and tell so, once all but the
        prompt's last token are in."""
        sequence = self.sequence
        for name, gate in sequence.undecided.items():
            self.sums[name] = self.sums.get(name, 0) + sums[gate.layer]
        if sequence.computed < sequence.prompt_length - 1:
            return False
        means = {name: total / sequence.computed for name, total in self.sums.items()}
        sequence.decide({name: _decided(gate, means[name]) for name, gate in sequence.undecided.items()})
        return True


def score(rows: Sequence[Row], starts: Sequence[int], found: Sequence[torch.Tensor]) -> list[list[TokenLogprob]]:
    """Log-probabilities of the prompts' tokens that chunks predict, whose logits `[tokens, vocabulary]` begin at these
    positions; they are added to the rows' scores."""
    scores = []
    for row, start, logits in zip(rows, starts, found, strict=True):
        request = row.sequence.request
        wanted = request.prompt_ids[start + 1 : start + 1 + len(logits)]
        # a row at a time: what the caches hold is read twice at the price of once
        new = token_logprobs(logits[: len(wanted)], wanted, [request.prompt_logprobs or 0] * len(wanted))
        row.scores += new
        scores.append(new)
    return scores


@dataclass(frozen=True, slots=True)
class Told:
    """What is told of a token besides its text, each empty unless it was asked for."""

    logprobs: tuple[TokenLogprob, ...] = ()
    divergences: tuple[float, ...] = ()
    projections: tuple[tuple[float, ...], ...] = ()


def tell(
    rows: Sequence[Row], logits: torch.Tensor, tokens: Sequence[int], residuals: Mapping[int, Residuals]
) -> list[Told]:
    """Of the tokens just drawn from logits `[rows, vocabulary]`; `residuals` are by slot."""
    chances = _chances(rows, logits, tokens)
    return [
        Told(
            chances.get(place, ()),
            () if row.unsteered is None else (divergence(logits[place], row.unsteered),),
            _projections(row, residuals),
        )
        for place, row in enumerate(rows)
    ]


def _chances(rows: Sequence[Row], logits: torch.Tensor, tokens: Sequence[int]) -> dict[int, tuple[TokenLogprob]]:
    """Log-probabilities by place among the rows, where they are wanted."""
    wanted = {place: top for place, row in enumerate(rows) if (top := row.sequence.request.logprobs) is not None}
    if not wanted:
        return {}
    places = list(wanted)
    found = token_logprobs(logits[places], [tokens[place] for place in places], list(wanted.values()))
    return {place: (one,) for place, one in zip(places, found, strict=True)}


def _projections(row: Row, residuals: Mapping[int, Residuals]) -> tuple[tuple[float, ...], ...]:
    profiles = row.sequence.request.projections
    if not profiles:
        return ()
    return (tuple(projection(profile, residuals[row.sequence.slot]) for profile in profiles),)


def _decided(gate: Gate, mean: torch.Tensor) -> GateDecision:
    similarity = gate.similarity(mean.cpu())
    return GateDecision(similarity, gate.opens(similarity))
