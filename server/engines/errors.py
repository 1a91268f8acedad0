"""Refusing a request in one line."""

from __future__ import annotations

from steering_vectors.errors import RequestError


def reject(condition: bool, message: str, param: str) -> None:
    """Raise RequestError for the named field if the condition holds."""
    if condition:
        raise RequestError(message, param=param)
