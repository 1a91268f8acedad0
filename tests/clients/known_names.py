"""What schemathesis cannot know: names that this server has. Without them hardly a request would reach the model."""

from __future__ import annotations

from typing import Any

import schemathesis

NAMES = {"model": "demo", "profile": "warm", "steering": "warm@0.5"}
SHORT = {"max_tokens": 4}


@schemathesis.hook
def before_call(context: schemathesis.HookContext, case: schemathesis.Case, kwargs: dict[str, Any]) -> None:
    """Names that are strings become known ones, so that what is made wrong on purpose stays wrong."""
    body = case.body
    if isinstance(body, dict):
        known = {name: value for name, value in NAMES.items() if isinstance(body.get(name), str)}
        short = SHORT if "model" in known else {}
        case.body = {**short, **body, **known}
