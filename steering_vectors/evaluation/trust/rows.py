"""The rows of a vertical: the files that they are read from, their selection, and their prompts for one model."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from transformers import PreTrainedTokenizerBase

from steering_vectors.data.batches import Encoded
from steering_vectors.data.chat import Example, Message, chat_template_source, encode_example
from steering_vectors.data.tables import BadRow, TableRow, read_table
from steering_vectors.errors import DataError
from steering_vectors.measures.results import SourceFile
from steering_vectors.models.limits import context_limit
from steering_vectors.models.loading import LanguageModel

PATTERNS = {
    "toxicity": "rtp/*.jsonl",
    "bias": "crows-pairs/*.csv",
    "ethics": "ethics/*.csv",
    "truthfulness": "truthfulqa/*.json",
}
MIN_ROWS = 8

Item = TypeVar("Item")
Kept = TypeVar("Kept")


@dataclass(frozen=True, slots=True)
class Source(Generic[Item]):
    rows: list[Item]
    files: list[SourceFile]
    place: str


def find_files(folder: Path, vertical: str) -> list[Path]:
    """The files of a vertical, sorted by name. Raises DataError if there is none."""
    pattern = PATTERNS[vertical]
    found = sorted(path for one in (pattern, f"{pattern}.gz") for path in folder.glob(one) if path.is_file())
    if not found:
        raise DataError(
            f"there is no file {pattern} for the vertical {vertical}: add one, or leave the vertical out",
            path=str(folder),
        )
    return found


def read_source(folder: Path, vertical: str, parse: Callable[[Mapping[str, Any]], Item]) -> Source[Item]:
    """Read the files of a vertical. Raises DataError for a bad row, with file, line and field, and for too few rows."""
    tables = [read_table(str(path)) for path in find_files(folder, vertical)]
    rows = [_parsed(row, table.source, parse) for table in tables for row in table.rows]
    place = ", ".join(table.source for table in tables)
    if len(rows) < MIN_ROWS:
        raise DataError(f"contains {len(rows)} rows, but {vertical} needs at least {MIN_ROWS}", path=place)
    files: list[SourceFile] = [{"file": Path(table.source).name, "sha256": table.sha256} for table in tables]
    return Source(rows, files, place)


def text_cell(cells: Mapping[str, Any], field: str) -> str:
    """Return the text in a cell. Raises BadRow if it is missing, empty or not a text."""
    if field not in cells:
        raise BadRow(f"is missing; the row has {', '.join(map(str, cells))}", field)
    value = cells[field]
    if not isinstance(value, str) or not value.strip():
        raise BadRow("must be a non-empty text", field)
    return value


def select(
    rows: Sequence[Item], count: int, seed: int, encode: Callable[[Item], Kept], fits: Callable[[Kept], bool]
) -> tuple[list[Kept], int]:
    """Draw and encode rows until `count` fit the model's context, and return them in file order, with the number of
    drawn rows that do not fit. Equal seeds draw equal rows for one model. Nothing is truncated."""
    order = random.Random(seed).sample(range(len(rows)), len(rows))
    kept: dict[int, Kept] = {}
    left_out = 0
    for index in order:
        if len(kept) == count:
            break
        encoded = encode(rows[index])
        if fits(encoded):
            kept[index] = encoded
        else:
            left_out += 1
    return [kept[index] for index in sorted(kept)], left_out


def require_rows(count: int, left_out: int, vertical: str, limit: int | None) -> None:
    """Raise DataError if fewer than 8 rows are left."""
    if count < MIN_ROWS:
        raise DataError(
            f"{vertical}: only {count} of {count + left_out} rows fit the model's context of {limit} tokens; at least "
            f"{MIN_ROWS} are needed; leave the vertical out, or use a model with a larger context"
        )


def _parsed(row: TableRow, source: str, parse: Callable[[Mapping[str, Any]], Item]) -> Item:
    try:
        if isinstance(row.cells, BadRow):
            raise row.cells
        return parse(row.cells)
    except BadRow as error:
        raise DataError(error.message, path=source, line=row.line, field=error.field) from error


@dataclass(frozen=True, slots=True)
class Reader:
    """Encodes the rows of a vertical for one model; `limit` is its context in tokens, if it has one."""

    tokenizer: PreTrainedTokenizerBase
    chat: bool
    limit: int | None

    def prompt(self, *, chat: str, plain: str) -> str | tuple[Message, ...]:
        """The prompt: `chat` as a user's message if the tokenizer has a chat template, else `plain` as it is."""
        return (Message("user", chat),) if self.chat else plain

    def answers(self, prompt: str | tuple[Message, ...], texts: Iterable[str]) -> list[Encoded]:
        """The prompt followed by each answer, separated by a space if the prompt is plain text."""
        space = "" if self.chat else " "
        return [encode_example(self.tokenizer, Example(prompt, f"{space}{text}")) for text in texts]

    def fits(self, examples: Iterable[Encoded]) -> bool:
        return self.limit is None or all(len(ids) <= self.limit for ids, _ in examples)

    def has_room(self, prompt_tokens: int, answer_tokens: int) -> bool:
        return self.limit is None or prompt_tokens + answer_tokens <= self.limit


def reader_for(lm: LanguageModel) -> Reader:
    return Reader(lm.tokenizer, chat_template_source(lm.tokenizer) == "tokenizer", context_limit(lm))
