"""What trimtab's own routes answer, for the OpenAPI document. `answers` says what holds them to it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from server.api.fields.answers import (
    APPLIED,
    FINISH,
    PROJECTIONS,
    RECEIPT,
    STOP,
    USAGE,
    Answer,
    FinishReason,
    SteeringReceipt,
    Usage,
)
from steering_vectors.profiles.profile import ApplyTo, Layering, Operator

ENDING = {"finish_reason": "stop", "stop_reason": None, "usage": USAGE, "steering": [RECEIPT]}


class GenerateAnswer(Answer):
    """The answer to POST /generate."""

    examples = ({"id": "gen-c9f0f895", "text": "Mix flour, water and yeast.", **ENDING},)

    id: str = Field(description="The id of the generation.")
    text: str = Field(description="What the model wrote.")
    projections: dict[str, list[float]] = Field({}, description=PROJECTIONS)
    finish_reason: FinishReason = Field(description=FINISH)
    stop_reason: str | int | None = Field(description=STOP)
    usage: Usage = Field(description="Tokens read and written.")
    steering: list[SteeringReceipt] = Field(description=APPLIED)


class GenerateEvent(Answer):
    """One event of a streamed generation: a `delta`, or at the end everything else."""

    examples = ({"id": "gen-c9f0f895", "delta": "Mix flour"}, {"id": "gen-c9f0f895", **ENDING})

    id: str = Field(description="The id of the generation, in every event; the first has an empty delta.")
    delta: str = Field("", description="The next piece of text.")
    projections: dict[str, list[float]] = Field({}, description=PROJECTIONS)
    finish_reason: FinishReason = Field("stop", description=f"In the last event. {FINISH}")
    stop_reason: str | int | None = Field(None, description=f"In the last event. {STOP}")
    usage: Usage | None = Field(None, description="In the last event. Tokens read and written.")
    steering: list[SteeringReceipt] = Field([], description=f"In the last event. {APPLIED}")


class ProfileState(Answer):
    """What is known of every file of the profile directory, and of what it serves."""

    name: str = Field(description="The profile's name, which is that of its file.")
    status: Literal["served", "rejected"] = Field(
        description="`rejected`: the newest file is not valid; the version before it may still be served."
    )
    error: str = Field("", description="Why the newest file was rejected.")
    version: str = Field("", description="The sha256 of the file that is served.")
    description: str = Field("", description="What it does, in its maker's words.")
    method: str = Field("", description="How it was made.")
    operator: Operator = Field("add", description="`add` shifts the residual stream, `ablate` takes a direction out.")
    layering: Layering = Field("independent", description="How directions of several blocks combine.")
    layers: list[int] = Field([], description="The blocks that have a direction.")
    unit: float = Field(1.0, description="The factor from strength to shift that calibration found.")
    max_strength: float = Field(2.0, description="The safe range: strengths beyond ± this are refused.")
    created_at: str = Field("", description="When it was made.")


LISTED: dict[str, Any] = {
    "name": "warm",
    "status": "served",
    "version": RECEIPT["version"],
    "description": "kind and encouraging; the opposite is cold",
    "method": "mean-diff",
    "operator": "add",
    "layering": "independent",
    "layers": [5],
    "unit": 4.627192848098149,
    "max_strength": 1.7,
    "created_at": "2026-11-21T01:17:32+00:00",
}


class ListedProfile(ProfileState):
    """One profile of the list. A rejected one of which no version is served has `name`, `status` and `error` only."""

    examples = (LISTED,)


class ProfileList(Answer):
    """Every file of the profile directory."""

    examples = ({"profiles": [LISTED]},)

    profiles: list[ListedProfile] = Field(description="By name.")


class ProfileModel(Answer):
    """The model that a profile was fitted on."""

    id: str = Field(description="Its name there.")
    architecture: str = Field(description="Its class in transformers.")
    hidden_size: int = Field(description="The width of its residual stream.")
    num_layers: int = Field(description="How many blocks it has.")
    fingerprint: str = Field(description="A sha256 over shapes and a sample of weights, which tells models apart.")


class ProfileDetails(ProfileState):
    """All there is to know about a profile but its vectors."""

    examples = (
        {
            **LISTED,
            "method_options": {"tokens": "response", "seed": 0},
            "apply_to": "generated",
            "calibration": {"kl_budget": 0.1, "kl_at_1": 0.1002437291537019, "unreached": False},
            "model": {
                "id": "demo",
                "architecture": "LlamaForCausalLM",
                "hidden_size": 192,
                "num_layers": 8,
                "fingerprint": "259400c1f3c080c53c239f2aa74f454c3034c7687c0041418b98d29ff06cff21",
            },
            "chat_template_sha256": "7c44bc3c15e16f4b547ba1c1f92cfbc1f60c5e22b9eebce835bf84def58dc421",
            "data": {"source": "warm.train.jsonl", "kind": "preference", "rows": 480},
            "metrics": {"notes": []},
            "residual_norms": {"5": 129.38165283203125},
            "direction_norms": {"5": 13.03648619923215},
            "trimtab_version": "0.1.0",
        },
    )

    method_options: dict[str, Any] = Field({}, description="The options of its method.")
    apply_to: ApplyTo = Field("generated", description="Where it is meant to apply.")
    calibration: dict[str, Any] = Field({}, description="How its unit and safe range were found, with the curve.")
    model: ProfileModel | None = Field(None, description="The model it was fitted on.")
    chat_template_sha256: str | None = Field(None, description="The chat template it was fitted with.")
    data: dict[str, Any] = Field({}, description="The preference data: source, rows, digest.")
    metrics: dict[str, Any] = Field({}, description="What was measured while fitting, and notes.")
    residual_norms: dict[str, float] = Field({}, description="The median norm of the residual stream, by block.")
    direction_norms: dict[str, float] = Field({}, description="The norms of its directions, by block.")
    trimtab_version: str = Field("", description="What made it.")


class Health(Answer):
    """The process answers."""

    examples = ({"status": "ok"},)

    status: Literal["ok"] = Field(description="Always `ok`.")


class Ready(Answer):
    """The server can serve."""

    examples = ({"status": "ready", "model": "demo", "profiles": 4},)

    status: Literal["ready"] = Field(description="Always `ready`; before, the answer is a 503.")
    model: str = Field(description="The base model's name on /v1.")
    profiles: int = Field(description="How many profiles are served.")


class Version(Answer):
    """What runs here."""

    examples = (
        {
            "version": "0.1.0",
            "torch": "2.13.0",
            "transformers": "5.23.0",
            "model": "demo",
            "dtype": "auto",
            "quantize": None,
            "device": "cpu",
        },
    )

    version: str = Field(description="Of trimtab.")
    torch: str = Field(description="Of PyTorch.")
    transformers: str = Field(description="Of transformers.")
    model: str = Field(description="The model, as the server was told.")
    dtype: str = Field(description="The number format, as the server was told.")
    quantize: Literal["int8", "int4"] | None = Field(description="What linear layers are quantised to, if they are.")
    device: str = Field(description="Where it runs, as the server was told.")
