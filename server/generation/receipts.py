"""The `steering` and `usage` of every answer: what was applied, and what was counted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, NotRequired

from typing_extensions import TypedDict

from server.engines.protocol import AppliedTerm, ApplyTo, Finished, Operator, Segment, SteeringPlan
from server.http.answers import about

Point = tuple[int, Segment]  # a token of the completion from which strengths held, and the segment it lies in

EXAMPLE_SHA256 = "fb09e9ae0f85d2a0d9b41ff2bb16eba63945a3e2bb08ba0ce36ab2f7023dfc8b"

FinishReason = Annotated[
    Literal["stop", "length"], about("`stop`: an end-of-sequence token or a stop condition; `length`: the token limit.")
]
StopReason = Annotated[
    str | int | None, about("The matched stop string or stop token id; null for an end-of-sequence token or `length`.")
]
Projections = Annotated[
    dict[str, list[float]],
    about("With `projections`: for each profile, the residual stream's projection onto it at each token."),
]


class GateReceipt(TypedDict):
    """The gate's decision for a prompt."""

    opened: Annotated[bool, about("Whether the profile was applied.")]
    similarity: Annotated[
        float | None, about("Similarity of the prompt to the gate's condition; null for a prompt too short.")
    ]


class StrengthPoint(TypedDict):
    """A strength and the token from which it applied."""

    from_token: Annotated[int, about("The first completion token drawn with this strength.")]
    strength: Annotated[float, about("The strength; 0 while the profile was not part of the steering.")]


class SteeringReceipt(TypedDict):
    """How one profile was applied."""

    name: Annotated[str, about("The profile.", "warm")]
    version: Annotated[str, about("The sha256 of the profile's file, which identifies its vectors.", EXAMPLE_SHA256)]
    strength: Annotated[float, about("The strength that was applied.", 0.8)]
    operator: Annotated[Operator, about("`add` shifts the residual stream; `ablate` removes a direction from it.")]
    layers: Annotated[list[int], about("The steered blocks; empty at strength 0.", [5])]
    apply_to: Annotated[ApplyTo, about("`generated`: from the last prompt token on; `all`: the prompt too.")]
    steered_tokens: Annotated[int, about("The number of steered positions; 0 at strength 0.", 24)]
    calibrated: Annotated[
        bool, about("Whether the profile was applied as it was calibrated, so that its KL estimate holds.", True)
    ]
    preserve_norm: NotRequired[
        Annotated[Literal[True], about("Present if the norm of steered residuals was preserved.")]
    ]
    allow_beyond_safe: NotRequired[
        Annotated[Literal[True], about("Present if strengths beyond the safe range were allowed.")]
    ]
    gate: NotRequired[Annotated[GateReceipt, about("Present for a profile with a gate.")]]
    timeline: NotRequired[
        Annotated[list[StrengthPoint], about("Present if the steering changed during the generation.")]
    ]


Receipts = Annotated[list[SteeringReceipt], about("One entry per applied profile; empty if unsteered.")]


class Ending(TypedDict):
    """Why a generation ended."""

    finish_reason: FinishReason
    stop_reason: StopReason


class PromptTokensDetails(TypedDict):
    """Details of the prompt's tokens."""

    cached_tokens: Annotated[int, about("Prompt tokens whose KV cache was reused.", 0)]


class Usage(TypedDict):
    """Token counts. A prompt counts once for all of its choices."""

    prompt_tokens: Annotated[int, about("Tokens of the prompts.", 12)]
    completion_tokens: Annotated[int, about("Generated tokens, over all choices.", 24)]
    total_tokens: Annotated[int, about("The sum of both.", 36)]
    prompt_tokens_details: Annotated[PromptTokensDetails, about("How much of the prompt was cached.")]


def usage(finished: Sequence[Finished], n: int = 1) -> Usage:
    """OpenAI's usage. A prompt counts once for all of its n choices, and its cached tokens are the first choice's."""
    first = finished[::n]
    prompt = sum(one.prompt_tokens for one in first)
    completion = sum(one.completion_tokens for one in finished)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(one.cached_tokens for one in first)},
    }


def ending(finished: Finished) -> Ending:
    """Of a generation that neither failed nor was cancelled."""
    reason: Literal["stop", "length"] = "stop" if finished.reason == "stop" else "length"
    return {"finish_reason": reason, "stop_reason": finished.matched_stop}


def receipt(finished: Sequence[Finished]) -> list[SteeringReceipt]:
    """One entry per profile; `steered_tokens` is summed over the choices.

    If the steering changed, `strength`, `layers` and `apply_to` are those of the last steering that named the profile,
    and `timeline` has its strengths; of several choices, those of the one with the most changes.
    """
    segments = [segment for one in finished for segment in one.segments]
    versions = dict.fromkeys(version for segment in segments for version in segment.plan.versions)
    if not versions:
        return []
    points = max((_points(one) for one in finished), key=len)
    return [_entry(version, points, finished) for version in versions]


def applied_entry(applied: AppliedTerm, plan: SteeringPlan, strength: float) -> SteeringReceipt:
    entry: SteeringReceipt = {
        "name": applied.term.profile,
        "version": applied.term.version,
        "strength": strength,
        "operator": applied.operator,
        "layers": list(applied.layers) if strength else [],
        "apply_to": plan.apply_to,
        "steered_tokens": applied.steered_tokens,
        "calibrated": applied.calibrated,
    }
    if plan.preserve_norm:
        entry["preserve_norm"] = True
    if plan.allow_beyond_safe:
        entry["allow_beyond_safe"] = True
    return entry


def _entry(version: str, points: Sequence[Point], finished: Sequence[Finished]) -> SteeringReceipt:
    naming = [
        (segment, applied, end)
        for one in finished
        for segment, end in _with_ends(one)
        for applied in segment.terms
        if applied.term.version == version
    ]
    segment, applied, end = naming[-1]
    term = applied.term
    entry = applied_entry(applied, segment.plan, term.at(end - 1 - segment.from_token))
    entry["calibrated"] = all(applied.calibrated for _, applied, _ in naming)
    entry["steered_tokens"] = sum(applied.steered_tokens for _, applied, _ in naming)
    if decisions := [one.gates[term.profile] for one in finished if term.profile in one.gates]:
        entry["gate"] = {"opened": decisions[0].opened, "similarity": decisions[0].similarity}
    if len(points) > 1:
        timeline: list[StrengthPoint] = []
        acting: AppliedTerm | None = None
        looked_at: Segment | None = None
        for token, segment in points:
            if segment is not looked_at:
                acting = next((one for one in segment.terms if one.term.version == version), None)
                looked_at = segment
            strength = 0.0 if acting is None else acting.at(token - segment.from_token)
            if not timeline or timeline[-1]["strength"] != strength:
                timeline.append({"from_token": token, "strength": strength})
        entry["strength"] = timeline[-1]["strength"]
        entry["timeline"] = timeline
    return entry


def _with_ends(finished: Finished) -> list[tuple[Segment, int]]:
    """The segments, each with the token of the completion at which it ended."""
    ends = [segment.from_token for segment in finished.segments[1:]] + [finished.completion_tokens]
    pairs = zip(finished.segments, ends, strict=True)
    return [(segment, max(end, segment.from_token + 1)) for segment, end in pairs]


def _points(finished: Finished) -> list[Point]:
    """Every token at which a strength or the plan changed."""
    return [
        (segment.from_token + token, segment)
        for segment, end in _with_ends(finished)
        for token in segment.plan.changes(end - segment.from_token)
    ]
