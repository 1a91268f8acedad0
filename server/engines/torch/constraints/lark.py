"""What a grammar in llguidance's variant of Lark asks for beyond a form of text.

Owns telling rules' attributes, `name[key, key=value]: …`, and special tokens, `<name>` and `<[ids]>`, from everything
else that a grammar may hold: strings, expressions, comments, JSON, brackets around what is optional. Reads any text in
time that grows with its length; of one that llguidance cannot read, what is found has no meaning.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

# What llguidance leaves to whoever draws the tokens, and what to do without it. It sees to max_tokens, lazy and suffix.
NOT_CARRIED_OUT = {
    "capture": "read it out of the text",
    "stop_capture": "read it out of the text",
    "stop": "what was written is not hidden; use suffix or lazy",
    "temperature": "one holds for the whole text; set that of the request",
}

_LEXEME = re.compile(
    r"""
      (?P<skip> [ \t]+ | (?:\#|//)[^\n]* )
    | (?P<json> %(?:json|regex|llguidance)(?![a-z]) )
    | (?P<literal> "(?:\\.|[^"\\])*+(?:"|\\?\Z) | /(?:\\.|[^/\\])++(?:/[imslux]*|\\?\Z) )
    | (?P<special> <[^<>\s]+> )
    | (?P<word> [A-Za-z_][A-Za-z0-9_-]* )
    | (?P<mark> . )
    """,
    re.VERBOSE | re.DOTALL,
)
_BLANK = re.compile(r"\s*")
_JSON = json.JSONDecoder(strict=False)


def attributes(grammar: str) -> set[str]:
    """The names of all attributes of its rules."""
    found: set[str] = set()
    names: list[str] = []  # in the latest bracket; a rule's attributes, if a colon follows it
    last = ""
    for lexeme in _lexemes(grammar):
        if lexeme == "[":
            names = []
        elif last in ("[", ",") and lexeme.isidentifier():
            names.append(lexeme)
        elif last == "]" and lexeme == ":":
            found.update(names)
        last = lexeme
    return found


def count_rules(grammar: str) -> int:
    """The number of its rules and terminals, or a little more."""
    return sum(lexeme == ":" for lexeme in _lexemes(grammar))


def schemas(grammar: str) -> list[Any]:
    """The JSON that it holds: schemas, and parameters of expressions. Raises ValueError for what is not JSON."""
    return [value for kind, value in _scan(grammar) if kind == "json"]


def special_tokens(grammar: str) -> set[str]:
    """The special tokens that it names, with their brackets."""
    return {lexeme for lexeme in _lexemes(grammar) if len(lexeme) > 1 and lexeme.startswith("<")}


def stands_for(special: str, token_id: int, text: str) -> bool:
    """Whether a special token, or a range of them, is or holds the token of this id and text."""
    if not special.startswith("<["):
        return special == text
    ranges = special.removeprefix("<[").removesuffix("]>")
    if ranges == "*":
        return True
    ends = [part.partition("-") for part in ranges.removeprefix("^").split(",") if part]
    inside = any(int(low) <= token_id <= int(high or low) for low, _, high in ends)
    return inside != ranges.startswith("^")


def _lexemes(grammar: str) -> Iterator[str]:
    """Names and marks as they stand; every literal and piece of JSON as an empty string; no blanks or comments."""
    for kind, lexeme in _scan(grammar):
        yield lexeme if kind in ("word", "mark", "special") else ""


def _scan(grammar: str) -> Iterator[tuple[str | None, Any]]:
    """Kinds and lexemes, without blanks and comments; the value of JSON."""
    place = 0
    while place < len(grammar):
        lexeme = _LEXEME.match(grammar, place)
        assert lexeme is not None, "any character is a mark"
        place = lexeme.end()
        if lexeme.lastgroup == "json":
            blank = _BLANK.match(grammar, place)
            value, place = _JSON.raw_decode(grammar, blank.end() if blank else place)
            yield "json", value
        elif lexeme.lastgroup != "skip":
            yield lexeme.lastgroup, lexeme.group()
