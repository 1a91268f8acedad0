"""Prefix reuse in a conversation of ten turns: each turn computes only new tokens, and the replies do not change."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.support.serving import demo_engine, live_server, save_profiles

pytestmark = pytest.mark.slow

QUESTIONS = [
    "How do I bake a loaf of bread that stays soft for days?",
    "And what about the crust, can it be made thinner?",
    "What should I do tomorrow morning before work?",
    "Can you tell me how to plant tomatoes in a pot?",
    "How would I mend a bicycle that has a flat tyre?",
    "What is a good way to learn the piano at home?",
    "How do I write a letter to a friend of long ago?",
    "Can I paint the kitchen on my own in one day?",
    "What should I pack for a long walk in the hills?",
    "How do I make good coffee without any machine?",
]


def converse(directory: Path, steering: str | None, *, reuse: bool) -> list[tuple[str, dict[str, int]]]:
    """Run ten turns over HTTP on a new server. Returns each reply with its prompt tokens and computed tokens."""
    messages: list[dict[str, str]] = []
    turns = []
    with demo_engine(slots=3, prefix_reuse=reuse) as engine:
        save_profiles(directory, engine.info.identity, "warm", unit=2.0)
        with live_server(engine, directory) as client:
            for question in QUESTIONS:
                messages.append({"role": "user", "content": question})
                body = {"model": "demo", "messages": messages, "max_tokens": 40, "temperature": 0, "steering": steering}
                answer: dict[str, Any] = client.post("/v1/chat/completions", json=body).json()
                reply, usage = answer["choices"][0]["message"]["content"], answer["usage"]
                messages.append({"role": "assistant", "content": reply})
                cached = usage["prompt_tokens_details"]["cached_tokens"]
                counts = {"prompt": usage["prompt_tokens"], "completion": usage["completion_tokens"]}
                turns.append((reply, {**counts, "computed": counts["prompt"] - cached}))
    return turns


@pytest.mark.parametrize("steering", [None, "warm@0.5"])
def test_a_conversation_prefills_its_tail(tmp_path: Path, steering: str | None) -> None:
    turns = converse(tmp_path, steering, reuse=True)
    plain = converse(tmp_path, steering, reuse=False)
    assert [reply for reply, _ in turns] == [reply for reply, _ in plain]
    assert all(counts["computed"] == counts["prompt"] for _, counts in plain)
    computed, prompts = (sum(counts[key] for _, counts in turns) for key in ("computed", "prompt"))
    if steering is None:
        assert computed < 0.15 * prompts
    else:  # keys from the last prompt token on are steered, so the next turn computes the reply and the message
        for (_, before), (_, after) in pairwise(turns):
            assert after["computed"] <= after["prompt"] - before["prompt"] + 1
