"""From an engine's errors to a client's: fields get the names of the request, and remedies are added by code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from steering_vectors.errors import TrimtabError

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


@contextmanager
def client_errors(fields: Mapping[str, str] | None = None) -> Iterator[None]:
    """Translate what is raised inside: name the client's field in `param`, and in a message that begins with the
    engine's; add the remedy. `fields` are the names of this request's own fields, before the common ones."""
    try:
        yield
    except TrimtabError as error:
        names = {**FIELDS, **(fields or {})}
        message = error.message
        if error.param is not None and (name := names.get(error.param)) is not None:
            if message.startswith(f"{error.param} "):
                message = name + message.removeprefix(error.param)
            error.param = name
        if error.code == "too_few_slots":
            message = f"{message}: start the server with --slots 2 or more"
        elif error.code == "strength_out_of_range":
            message = message.replace("set allow_beyond_safe", "set steering.allow_beyond_safe")
        error.message = message
        error.args = (message,)
        raise
