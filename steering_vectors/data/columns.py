"""The columns of a table: their renaming, the format that they fit, and what to write where they fit none."""

from __future__ import annotations

import re
import shlex
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from steering_vectors.data.cells import is_blank
from steering_vectors.data.preferences import Kind
from steering_vectors.data.records import COLUMNS, PROMPT, SYSTEM, WEIGHT
from steering_vectors.data.tables import BadRow, Table
from steering_vectors.errors import DataError

FORMATS = "{prompt, chosen, rejected}, {prompt, completion, label} or {positive, negative}"
EXAMPLE = (
    "rename them, as in columns prompt=question,chosen=good,rejected=bad; one text per row needs a label, true or false"
)
PROMPT_NAMES = ("prompt", "question", "instruction", "query", "conversations", "input", "context", "messages")
COMPLETION_NAMES = ("completion", "response", "output", "answer", "generation", "sentence", "text", "input")
OPTIONAL = {PROMPT: PROMPT_NAMES, SYSTEM: ("system", "system prompt", "system message")}  # and their usual names
CHOSEN_WORDS = {"chosen", "preferred", "accepted", "matching", "better", "best", "good", "positive", "pos", "winner"}
REJECTED_WORDS = {"rejected", "reject", "dispreferred", "worse", "worst", "bad", "negative", "neg", "loser"}
OTHER_WORDS = {"score", "rating", "reward", "model", "policy", "id", "logprob", "logps", "tokens", "length", "rank"}
NUMBERED = re.compile(r"(.*?)[_ -]?([0-9]|[ABab]|[jk])")


def parse_columns(text: str) -> dict[str, str]:
    """Read `prompt=question,chosen=matching` as the `columns` of `load_pairs`. Raises DataError.

    A comma separates two entries only if a name and an equals sign follow it, so column names may contain commas.
    """
    renames: dict[str, str] = {}
    for part in re.split(r",(?=\s*\w*\s*=)", text):
        name, equals, column = (piece.strip() for piece in part.partition("="))
        if not (name and equals) or name in renames:
            raise DataError(f"columns {text!r} cannot be read; write prompt=question,chosen=matching")
        renames[name] = column
    return checked_renames(renames)


def checked_renames(renames: Mapping[str, str]) -> dict[str, str]:
    """A copy of `renames`. Raises DataError for a name that no format has, and for a column that is named twice."""
    known = [*OPTIONAL, WEIGHT, *(column for columns in COLUMNS.values() for column in columns)]
    named = [column for column in renames.values() if column]
    for name, column in renames.items():
        if name not in known:
            raise DataError(f"columns: {name!r} is not a column of any format; rename to one of {', '.join(known)}")
        if not column and name not in OPTIONAL:
            raise DataError(f"columns: {name} must name a column; only {' and '.join(OPTIONAL)} can be left out")
        if named.count(column) > 1:
            raise DataError(f"columns: {column!r} is named twice; read each column once")
    return dict(renames)


def renamed(cells: Mapping[str, Any], renames: Mapping[str, str]) -> dict[str, Any]:
    """The cells by their new names, without columns that are left out."""
    taken = {*renames, *renames.values()}
    kept = {column: value for column, value in cells.items() if column not in taken}
    return kept | {name: cells[column] for name, column in renames.items() if column and column in cells}


def find_kind(table: Table, renames: Mapping[str, str]) -> Kind:
    """The format of the first complete row, else that of the first row with a column of any format.

    Raises DataError, with the renaming to write, if there is none or more than one, and for a renaming of a column that
    no row has.
    """
    _check_named(table, renames)
    rows = [renamed(row.cells, renames) for row in table.rows if not isinstance(row.cells, BadRow)]
    allowed = [kind for kind, columns in COLUMNS.items() if set(renames) - {*OPTIONAL, WEIGHT} <= set(columns)]
    for wanted in (all, any):
        for cells in rows:
            fits = [kind for kind in allowed if wanted(column in cells for column in COLUMNS[kind])]
            if wanted is all and len(fits) > 1:
                message = f"the columns fit the formats {' and '.join(fits)}; choose one with columns"
                raise DataError(message, path=table.source)
            if fits:
                _check_sides(table, fits[0], renames)
                return fits[0]
    if not table.rows:
        raise DataError("there are no rows in it", path=table.source)
    row = table.rows[0]
    if isinstance(row.cells, BadRow):
        raise DataError(row.cells.message, path=table.source, line=row.line)
    found = ", ".join(map(str, row.cells)) or "none"
    raise DataError(
        f"the columns ({found}) fit none of the formats {FORMATS}; {_remedy(row.cells, renames)}",
        path=table.source,
        line=row.line,
    )


def check_unread(table: Table, kind: Kind, renames: Mapping[str, str], name: str) -> None:
    """Raise DataError if the prompt, or the system prompt, that no row has is in a column of another name."""
    rows = [row.cells for row in table.rows if not isinstance(row.cells, BadRow)]
    others = dict.fromkeys(column for cells in rows for column in cells if column not in renames.values())
    words = {" ".join(_words(column)): column for column in others}
    likely = [words[one] for one in OPTIONAL[name] if one in words]
    found = [column for column in likely if not all(is_blank(cells.get(column)) for cells in rows)]
    if not found:
        return
    sides = dict(renames)
    if name == PROMPT and kind == "contrast":  # whose texts have no prompt
        sides = {new: renames.get(side, side) for new, side in zip(COLUMNS["preference"], COLUMNS[kind], strict=True)}
    remedy = f"read it with {_written({name: found[0], **sides})}"
    if {"instruction", "input"} <= set(map(str.lower, found)):
        remedy = "write instruction and input to one column prompt"
    raise DataError(
        f"no row has a {'prompt' if name == PROMPT else 'system prompt'}, but the column {found[0]!r} looks like one; "
        f"{remedy}, or leave it out with {_written({name: '', **renames})}",
        path=table.source,
    )


def _check_named(table: Table, renames: Mapping[str, str]) -> None:
    rows = [(row.line, row.cells) for row in table.rows if not isinstance(row.cells, BadRow)]
    known = dict.fromkeys(column for _, cells in rows for column in cells)
    if rows and (missing := sorted({*renames.values()} - known.keys() - {""})):
        found = ", ".join(map(str, known)) or "none"
        message = f"there is no column {missing[0]!r}, which columns names; the columns are {found}"
        raise DataError(message, path=table.source, line=rows[0][0])


def _check_sides(table: Table, kind: Kind, renames: Mapping[str, str]) -> None:
    """Raise DataError for a column of the format that no row has, with the renaming to write."""
    rows = [(row.line, row.cells) for row in table.rows if not isinstance(row.cells, BadRow)]
    for name in COLUMNS[kind]:
        if not any(name in renamed(cells, renames) for _, cells in rows):
            line, cells = rows[0]
            renaming = _renaming(cells, renames)
            remedy = f"write {renaming}" if renaming else "name it in columns"
            message = f"it is missing; if the column has another name, {remedy}"
            raise DataError(message, path=table.source, line=line, field=renames.get(name, name))


def _remedy(cells: Mapping[str, Any], renames: Mapping[str, str]) -> str:
    """What to do about a row whose columns fit no format."""
    if renaming := _renaming(cells, renames):
        return f"rename them: {renaming}"
    if numbered := _numbered(_texts(cells)):
        one, two = numbered
        return (
            f"{one} and {two} do not say which text is preferred: write the preferred text of each row to chosen, and "
            "the other to rejected"
        )
    if lists := [name for name, value in cells.items() if isinstance(value, list) and _are_texts(value)]:
        return f"{lists[0]} is a list of texts: write the preferred one to chosen, and another to rejected"
    return EXAMPLE


def _renaming(cells: Mapping[str, Any], renames: Mapping[str, str]) -> str:
    """The renaming that the names of columns suggest, as it is written; an empty text if they leave doubt.

    `renames` are kept.
    """
    cells = renamed(cells, renames)
    texts = _texts(cells)
    rejected = [name for name, words in texts.items() if REJECTED_WORDS & set(words) or _negated(words)]
    chosen = [name for name, words in texts.items() if CHOSEN_WORDS & set(words) and name not in rejected]
    labels = [name for name in cells if {"label", "labels", "tag"} & set(_words(name))]
    completion = _named(texts, COMPLETION_NAMES, without=labels)
    if len(chosen) == len(rejected) == 1:
        wanted = {"chosen": chosen[0], "rejected": rejected[0]}
    elif len(labels) == 1 and completion:
        wanted = {"completion": completion, "label": labels[0]}
    else:
        return ""
    prompt = _named(texts, PROMPT_NAMES, without=[*wanted.values()])
    return _written(({PROMPT: prompt} if prompt else {}) | wanted | dict(renames))


def _texts(cells: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """The words in the names of columns that hold texts or messages."""
    texts = {name: _words(name) for name, value in cells.items() if isinstance(value, str | list | dict)}
    return {name: words for name, words in texts.items() if not OTHER_WORDS & set(words)}


def _named(texts: Mapping[str, Sequence[str]], names: Sequence[str], *, without: Sequence[str]) -> str:
    """The first column that has one of these words in its name, in their order; an empty text if there is none."""
    found = [column for name in names for column, words in texts.items() if name in words and column not in without]
    return found[0] if found else ""


def _numbered(texts: Mapping[str, Any]) -> tuple[str, str] | None:
    """Two columns, and no third one, whose names differ in the number or letter at their end only."""
    stems = defaultdict[str, list[str]](list)
    for name in texts:
        if match := NUMBERED.fullmatch(str(name)):
            stems[match[1]].append(name)
    found = [(names[0], names[1]) for names in stems.values() if len(names) == 2]
    return found[0] if found else None


def _written(columns: Mapping[str, str]) -> str:
    """A renaming as it is written in a shell, without columns that keep their names."""
    return "columns " + shlex.quote(",".join(f"{name}={old}" for name, old in columns.items() if old != name))


def _words(name: Any) -> tuple[str, ...]:
    """The words of a name in lower case: not_matching, notMatching and not-matching are not, matching."""
    return tuple(word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+|\d+", str(name)))


def _negated(words: Sequence[str]) -> bool:
    return bool({"not", "non"} & set(words)) and bool(CHOSEN_WORDS & set(words))


def _are_texts(value: list[Any]) -> bool:
    return len(value) > 1 and all(isinstance(one, str) for one in value)
