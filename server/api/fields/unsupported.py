"""Fields of OpenAI's that this server does not support, with the values of each that ask for nothing.

Null always asks for nothing. Any other value is refused by name, because a field that is ignored is a promise broken.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NO_OPS: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "reasoning_effort": ("none",),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "web_search_options": (),
}
MESSAGE_NO_OPS: Mapping[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "name": (),
    "refusal": (),
    "tool_call_id": (),
    "tool_calls": ([],),
}
STREAM_NO_OPS: Mapping[str, tuple[Any, ...]] = {"include_obfuscation": (False,)}
