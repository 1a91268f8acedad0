"""From an engine's errors to a client's: fields get the names of the request, and remedies are added by code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from server.engines.errors import GenerationFailed, Unavailable
from server.engines.protocol import Finished
from steering_vectors.errors import RequestError, TrimtabError

FIELDS: Mapping[str, str] = {
    "allow_beyond_safe": "steering.allow_beyond_safe",
    "apply_to": "steering.apply_to",
    "divergence": "kl",
    "ids": "id",
    "layers": "steering.layers",
    "preserve_norm": "steering.preserve_norm",
    "prompt_ids": "prompt",
    "schedule": "steering.schedule",
    "terms": "steering",
    "version": "steering",
}
REMEDIES: Mapping[str, str] = {"too_few_slots": "start the server with --slots 2 or more"}
REWORDED: Mapping[str, tuple[str, str]] = {
    "strength_out_of_range": ("set allow_beyond_safe", "set steering.allow_beyond_safe")
}


@contextmanager
def client_errors(fields: Mapping[str, str] | None = None) -> Iterator[None]:
    """Translate what is raised inside. `fields` are the names of this request's own fields, before the common ones."""
    try:
        yield
    except TrimtabError as error:
        translate(error, fields)
        raise


def translate(error: TrimtabError, fields: Mapping[str, str] | None = None) -> None:
    """Name the client's field in `param`, and in a message that begins with the engine's; add the remedy."""
    names = {**FIELDS, **(fields or {})}
    message = error.message
    if error.param is not None and (name := names.get(error.param)) is not None:
        if message.startswith(f"{error.param} "):
            message = name + message.removeprefix(error.param)
        error.param = name
    if (remedy := REMEDIES.get(error.code)) is not None:
        message = f"{message}: {remedy}"
    if error.code in REWORDED:
        message = message.replace(*REWORDED[error.code])
    error.message = message
    error.args = (message,)


def raise_failure(finished: Finished, fields: Mapping[str, str] | None = None) -> None:
    """Raise what a choice that could not be finished means to its client; nothing for one that could."""
    if finished.reason == "cancelled":
        raise Unavailable("the generation was cancelled by the server: send the request again", code="cancelled")
    if finished.reason == "error":
        message = finished.error or "the generation failed"
        if finished.error_param is None:
            raise GenerationFailed(message)
        error = RequestError(message, param=finished.error_param, code=GenerationFailed.code)
        translate(error, fields)
        raise error
