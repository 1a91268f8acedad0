"""How long work reports its progress."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Told the stage of long work, how much is done of how much, and what there is to say of it."""

    def __call__(self, stage: str, done: int, total: int, /, detail: str = "") -> None: ...
