"""The messages of the protocol as JSON.

A message becomes an object with its class's name in `message`, and its fields. Numbers that JSON lacks become the
strings "nan", "inf" and "-inf".
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from server.engines import protocol

KINDS: Mapping[str, type[Any]] = {
    kind.__name__: kind
    for kind in (
        protocol.SamplingParameters,
        protocol.Constraint,
        protocol.StrengthSchedule,
        protocol.PlanTerm,
        protocol.SteeringPlan,
        protocol.GenerationRequest,
        protocol.TokenLogprob,
        protocol.PromptLogprobs,
        protocol.Delta,
        protocol.GateDecision,
        protocol.AppliedTerm,
        protocol.Segment,
        protocol.SteeringChange,
        protocol.Finished,
        protocol.TermEffect,
        protocol.BlockEffect,
        protocol.PlanEffect,
        protocol.EngineStats,
    )
}
Message = TypeVar("Message")


def to_json(message: Any) -> str:
    """One message, on one line."""
    kind = type(message).__name__
    if KINDS.get(kind) is not type(message):
        raise TypeError(f"{kind} is not a message of the protocol")
    return json.dumps({"message": kind, **_plain(message)}, allow_nan=False, ensure_ascii=True, separators=(",", ":"))


def from_json(text: str, kind: type[Message] | None = None) -> Any:
    """The message that `to_json` wrote. Raises ValueError for anything else, or for another kind than is expected."""
    data = json.loads(text)
    if not isinstance(data, dict) or data.get("message") not in KINDS:
        raise ValueError("this is not a message of the protocol")
    found = KINDS[data.pop("message")]
    if kind is not None and found is not kind:
        raise ValueError(f"a {kind.__name__} is expected, not a {found.__name__}")
    return _read(found, data)


def _plain(value: Any) -> Any:
    """A value in JSON's own types."""
    if is_dataclass(value):
        return {one.name: _plain(getattr(value, one.name)) for one in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _read(form: Any, value: Any) -> Any:
    """The value of a field of this type."""
    origin, arguments = get_origin(form), get_args(form)
    if isinstance(form, type) and is_dataclass(form):
        hints = _hints(form)
        return form(**{name: _read(hints[name], one) for name, one in value.items()})
    if origin in (Union, UnionType):
        return _read(next(one for one in arguments if _fits(one, value)), value)
    if origin is tuple:
        kinds = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        return tuple(_read(one, item) for one, item in zip(kinds, value, strict=True))
    if origin is not None and origin is not Literal and issubclass(origin, Mapping):
        return {arguments[0](key): _read(arguments[1], one) for key, one in value.items()}
    return float(value) if form is float else value


def _fits(form: Any, value: Any) -> bool:
    """Whether a member of a union may have written this value."""
    if form is NoneType:
        return value is None
    if value is None:
        return False
    if is_dataclass(form):
        return isinstance(value, dict)
    if get_origin(form) is tuple:
        return isinstance(value, list)
    return form is float or isinstance(value, form)


@cache
def _hints(kind: type[Any]) -> dict[str, Any]:
    return get_type_hints(kind, vars(protocol))
