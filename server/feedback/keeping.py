"""Keeps generations as they end: prompt, text, receipt and sampling, of whole answers and streams alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from server.access.callers import Caller
from server.engines.protocol import Delta, Event, Finished, SamplingParameters
from server.feedback.items import Answer, ChatTurn, Kept, ModelOfAnswer, PromptValue, Who, user_id
from server.generation.choices import Choice
from server.generation.intake import Ask, Prompt
from server.generation.receipts import ending, receipt

DEFAULTS = asdict(SamplingParameters())


def who(caller: Caller) -> Who:
    return Who(caller.tenant, caller.name, caller.is_admin, caller.speaks_for)


@dataclass(slots=True, eq=False)
class Keeping:
    """Collects what one request's generations write. `put` gets each as it ends, as a function that builds what is
    stored, and its size in characters."""

    ask: Ask
    who: Who
    model: ModelOfAnswer
    put: Callable[[Callable[[], Kept], int], None]
    answer_id: str | None = None
    _texts: dict[int, list[str]] = field(default_factory=dict)

    def event(self, place: int, choice: Choice, event: Event) -> None:
        """The engine has sent an event of the choice at this place. Costs nothing but a list's entry per event."""
        if isinstance(event, Delta):
            self._texts.setdefault(place, []).append(event.text)
        elif isinstance(event, Finished):
            self._keep(place, choice, event, "".join(self._texts.pop(place, ())))

    def _keep(self, place: int, choice: Choice, finished: Finished, text: str) -> None:
        if self.ask.completions is not None or not finished.completion_tokens:  # nothing was generated
            return
        created, answer_id = time.time(), self.answer_id
        prompt = self.ask.prompts[place // (len(self.ask.plans) * self.ask.n)]

        def build() -> Kept:
            data: Answer = {
                "prompt": _plain(prompt),
                "text": text,
                "generation": choice.id,
                "choice": place,
                "created": created,
                "model": self.model,
                "encoding": _encoding(self.ask.encoding),
                "sampling": _sampling(choice.request.sampling),
                "steering": receipt([finished]),
                "finish_reason": ending(finished)["finish_reason"],
                "completion_tokens": finished.completion_tokens,
            }
            if answer_id is not None:
                data["answer_id"] = answer_id
            return Kept(choice.id, place, self.who, user_id(self.ask.user), data)

        self.put(build, len(text) + _size(prompt))


def _plain(prompt: Prompt) -> PromptValue:
    if isinstance(prompt, tuple):
        turns: list[ChatTurn] = [{"role": message.role, "content": message.content} for message in prompt]
        return turns
    return prompt


def _size(prompt: Prompt) -> int:
    return sum(len(message.content) for message in prompt) if isinstance(prompt, tuple) else len(prompt)


def _sampling(sampling: SamplingParameters) -> dict[str, Any]:
    """What was set, and what is at its default and matters to all texts."""
    given = asdict(sampling)
    return {
        name: value
        for name, value in given.items()
        if name in ("temperature", "top_p", "seed", "max_tokens") or value != DEFAULTS[name]
    }


def _encoding(encoding: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in encoding.items() if value not in ({}, None)}
