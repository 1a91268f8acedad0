"""What the document cannot tell schemathesis: the names that this server has, and which fields exclude each other.

Without it hardly a valid request would reach the model. What is made wrong on purpose stays wrong: there, only names
that are strings become known ones.
"""

from __future__ import annotations

from typing import Any

import schemathesis

NAMES = {"model": "demo", "profile": "warm", "steering": "warm@0.5"}
ONE_PROMPT = {"/generate", "/compare", "/score"}


@schemathesis.hook
def before_call(context: schemathesis.HookContext, case: schemathesis.Case, kwargs: dict[str, Any]) -> None:
    if not isinstance(case.body, dict):
        return
    case.body |= {name: value for name, value in NAMES.items() if isinstance(case.body.get(name), str)}
    if case.meta is not None and case.meta.generation.mode.is_positive:
        _choose_one(case.body, case.path in ONE_PROMPT)
        case.headers.pop("x-trimtab-steering", None)


def _choose_one(body: dict[str, Any], one_prompt: bool) -> None:
    """Of fields that are given beside one another, or not at all, where there must be exactly one."""
    if body.get("steering") is not None:
        body.pop("profile", None)
    if body.get("profile") is None:
        body.pop("strength", None)
    if one_prompt and body.get("messages"):
        body.pop("prompt", None)
    elif one_prompt:
        body["prompt"] = body.get("prompt") or "Bread"
        body.pop("messages", None)
