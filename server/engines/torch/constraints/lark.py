"""What a grammar in llguidance's variant of Lark asks for beyond a form of text.

Owns telling rules' attributes, `name[key, key=value]: …`, and special tokens, `<name>` and `<[ids]>`, from everything
else that a grammar may hold: strings, expressions, comments, JSON, brackets around what is optional. Takes for granted
that llguidance could read the grammar.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

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
    | (?P<literal> "(?:\\.|[^"\\])*" | /(?:\\.|[^/\\])+/[imslux]* )
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
    place = 0
    while place < len(grammar):
        lexeme = _LEXEME.match(grammar, place)
        assert lexeme is not None, "any character is a mark"
        place = lexeme.end()
        if lexeme.lastgroup == "json":
            blank = _BLANK.match(grammar, place)
            _, place = _JSON.raw_decode(grammar, blank.end() if blank else place)
        if lexeme.lastgroup != "skip":
            yield lexeme.group() if lexeme.lastgroup in ("word", "mark", "special") else ""
