"""The fields of OpenAI's API that are not supported, with their no-op values. Null is always a no-op."""

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
NATIVE_NO_OPS: Mapping[str, tuple[Any, ...]] = {
    **NO_OPS,
    "n": (1,),
    "stream_options": (),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "echo": (False,),
}
