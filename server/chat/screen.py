"""The output of a conversation: replies, receipts and tables to stdout, errors to stderr.

Control characters are removed, so that a model's text never moves the cursor.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from steering_vectors.profiles.metadata import range_text

CONTROL = {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}
SIDE_BY_SIDE = 80
COLUMNS = ("name", "status", "safe range", "layers", "method", "description")


class Screen:
    """The two streams of a terminal, or of a pipe."""

    def __init__(self, out: Console | None = None, errors: Console | None = None) -> None:
        self._out = out or Console(highlight=False, emoji=False, markup=False)
        self._errors = errors or Console(stderr=True, highlight=False, emoji=False, markup=False)

    def piece(self, text: str) -> None:
        _print(self._out, clean(text), end="", soft_wrap=True)

    def line(self, text: str = "") -> None:
        _print(self._out, clean(text), soft_wrap=True)

    def note(self, text: str) -> None:
        """A dim line beside the conversation."""
        _print(self._out, clean(text), style="dim", soft_wrap=True)

    def error(self, text: str) -> None:
        _print(self._errors, clean(f"error: {text}"), style="red", soft_wrap=True)

    def profiles(self, entries: Iterable[Mapping[str, Any]]) -> None:
        self._table(COLUMNS, [_row(entry) for entry in entries])

    def pairs(self, pairs: Iterable[tuple[str, str]]) -> None:
        grid = Table.grid(padding=(0, 2))
        for name, meaning in pairs:
            grid.add_row(Text(clean(name), no_wrap=True), Text(clean(meaning)))
        _print(self._out, grid)

    def compared(self, titles: Sequence[str], texts: Sequence[str], receipts: Sequence[str]) -> None:
        """Replies to one question: side by side if they fit, else one after the other."""
        if self._out.is_terminal and self._out.width >= SIDE_BY_SIDE:
            self._table(titles, [texts, receipts])
            return
        for title, text, receipt in zip(titles, texts, receipts, strict=True):
            self.line(f"{title}: {text}")
            self.note(receipt)

    def effect(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """What a steering would do, in one line: strengths, blocks, and whether they are calibrated."""
        self.note(f"[steering: {'; '.join(map(_effect, entries)) or 'none'}]")

    def _table(self, titles: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        for title in titles:
            table.add_column(Text(clean(title)), overflow="fold")
        for row in rows:
            table.add_row(*(Text(clean(cell)) for cell in row))
        _print(self._out, table)


@contextmanager
def unbroken() -> Iterator[None]:
    """Hold a Ctrl-C back until the block is done: an interrupted console would print its text again."""
    caught: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _frame: caught.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if caught:
        raise KeyboardInterrupt


def _print(console: Console, what: RenderableType, **how: Any) -> None:
    with unbroken():
        console.print(what, **how)


def clean(text: str) -> str:
    """A text without control characters, but for tabs and line ends."""
    return text.translate(CONTROL)


def _effect(entry: Mapping[str, Any]) -> str:
    term, layers = f"{entry['name']}@{entry['strength']:g}", entry["layers"]
    if not layers:
        return f"{term} at no block"
    blocks = f"block{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}"
    return f"{term} at {blocks}, {'' if entry['calibrated'] else 'not '}calibrated"


def _row(entry: Mapping[str, Any]) -> list[str]:
    high = entry.get("max_strength")
    limit = "" if high is None else range_text((entry.get("min_strength", -high), high))
    layers = ", ".join(map(str, entry.get("layers", [])))
    about = entry.get("error") or entry.get("description", "")
    return [entry["name"], entry["status"], limit, layers, entry.get("method", ""), about]
