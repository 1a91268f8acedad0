"""What was applied: the `steering` of every answer, one entry per profile, from what the engine tells at the end.

Owns how a steering that changed on the way is told. Knows nothing of routes or of where the receipt stands.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from server.engines.protocol import Finished, GenerationRequest, Segment
from steering_vectors.profiles.mixture import Term

Json = dict[str, Any]
Key = tuple[str, str]


def receipt(finished: Sequence[Finished]) -> list[Json]:
    """One entry per profile; `steered_tokens` is summed over the choices.

    Where the steering changed, `strength`, `layers` and `apply_to` are those of the last steering that named the
    profile, and `timeline` tells its strength from each token of the completion on; of several choices the one with
    most changes is told.
    """
    keys = dict.fromkeys(_key(term) for one in finished for segment in one.segments for term in segment.mixture.terms)
    told = max((one.segments for one in finished), key=len)
    return [_entry(key, told, finished) for key in keys]


def told_projections(request: GenerationRequest, projections: Sequence[Sequence[float]]) -> Json:
    """`projections` of an answer, by profile, one number for each token; nothing if they were not asked for."""
    if not request.projections:
        return {}
    columns = zip(*projections, strict=True) if projections else [()] * len(request.projections)
    pairs = zip(request.projections, columns, strict=True)
    return {"projections": {profile.name: list(column) for profile, column in pairs}}


def _entry(key: Key, told: Sequence[Segment], finished: Sequence[Finished]) -> Json:
    every = [segment for one in finished for segment in one.segments]
    naming = [segment for segment in every if _strength(key, segment) is not None]
    steered = sum(segment.steered_tokens for segment in naming if _strength(key, segment))
    entries = [_applied(key, segment, steered) for segment in naming]
    entry = {**entries[-1], "calibrated": all(one["calibrated"] for one in entries), "steered_tokens": steered}
    if decisions := [one.gates[key[0]] for one in finished if key[0] in one.gates]:
        entry["gate"] = {"opened": decisions[0].opened, "similarity": decisions[0].similarity}
    if len(told) > 1:
        entry["strength"] = _strength(key, told[-1]) or 0.0
        entry["timeline"] = _timeline(key, told)
    return entry


def _applied(key: Key, segment: Segment, steered: int) -> Json:
    place = [_key(term) for term in segment.mixture.terms].index(key)
    return segment.mixture.receipt(steered)[place]


def _timeline(key: Key, segments: Sequence[Segment]) -> list[Json]:
    """From each token at which the profile's strength changed; 0 while it was not named."""
    points: list[Json] = []
    for segment in segments:
        strength = _strength(key, segment) or 0.0
        if not points or points[-1]["strength"] != strength:
            points.append({"from_token": segment.from_token, "strength": strength})
    return points


def _strength(key: Key, segment: Segment) -> float | None:
    """The strength at which a profile acted: 0 behind a shut gate, None where it was not named."""
    asked = next((term.strength for term in segment.mixture.terms if _key(term) == key), None)
    return asked if asked is None or key[0] not in segment.mixture.closed else 0.0


def _key(term: Term) -> Key:
    return term.profile.name, term.profile.version
