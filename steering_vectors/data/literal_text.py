"""Text in which the names of control tokens are plain text, such as the content of a message.

A tokenizer turns `<|im_end|>` into a control token wherever it stands. The tokenizer made here knows its control tokens
by other names, which nobody can write, so that all other text is tokenised as usual.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from steering_vectors.errors import RequestError
from steering_vectors.models.tokenizers import control_tokens

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

PRIVATE = range(0xF0000, 0xFFFFE)  # characters without a meaning
THOUGHT = re.compile(r"<[/\w:|]*think\w*\|?>", re.IGNORECASE)

Marks = Mapping[str, str]  # a private character for each name of a control token


def holds_control_token(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Whether a text contains the name of a control token."""
    return _names(control_tokens(tokenizer)).search(text) is not None


def marked(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], thoughts: Sequence[bool]
) -> tuple[list[str], Marks]:
    """The texts with a private character in place of each name of a control token, and those characters.

    Where `thoughts` is set, the marks of a thought keep their meaning: templates look for them in replies.
    """
    names = _names(control_tokens(tokenizer))
    found = {match for text in texts for match in names.findall(text)}
    if not found:
        return list(texts), {}
    taken = set().union(*texts)
    free = (chr(code) for code in PRIVATE if chr(code) not in taken)
    marks = dict(zip(sorted(found), free, strict=False))

    def mark(text: str, thought: bool) -> str:
        return names.sub(lambda one: one[0] if thought and THOUGHT.fullmatch(one[0]) else marks[one[0]], text)

    return list(map(mark, texts, thoughts)), marks


def restored(text: str, marks: Marks) -> str:
    """A marked text with the names of control tokens."""
    return text.translate({ord(mark): name for name, mark in marks.items()})


def encode_marked(
    tokenizer: PreTrainedTokenizerBase, text: str, marks: Marks, *, add_special_tokens: bool = False
) -> list[int]:
    """Encode a marked text: the names behind marks as plain text, all others as control tokens. Raises RequestError for
    a tokenizer that is not of the library `tokenizers`, whose control tokens cannot be renamed."""
    controls = control_tokens(tokenizer)
    if not getattr(tokenizer, "is_fast", False):
        name = min(marks)
        raise RequestError(
            f"the text contains the control token {name!r}, which this tokenizer cannot read as text: leave it out"
        )
    aliases, backend = _renamed(tokenizer, controls)
    aliased = _names(controls).sub(lambda one: aliases[one[0]], text)
    return list(backend.encode(restored(aliased, marks), add_special_tokens=add_special_tokens).ids)


@lru_cache(maxsize=64)
def _names(controls: frozenset[str]) -> re.Pattern[str]:
    """Matches any of the names, the longest at each place. Beginnings are shared: some models have 6,000 names."""
    tree: dict[str, Any] = {}
    for name in controls:
        node = tree
        for letter in name:
            node = node.setdefault(letter, {})
        node[""] = {}
    return re.compile(_pattern(tree) if controls else "(?!)")


def _pattern(node: Mapping[str, Any]) -> str:
    """Matches what goes on from a node of the tree; the key "" is the end of a name."""
    ways = [re.escape(letter) + _pattern(rest) for letter, rest in sorted(node.items()) if letter]
    if not ways:
        return ""
    pattern = ways[0] if len(ways) == 1 else f"(?:{'|'.join(ways)})"
    return f"(?:{pattern})?" if "" in node else pattern


_RENAMED: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[frozenset[str], dict[str, str], Tokenizer]] = (
    WeakKeyDictionary()
)


def _renamed(tokenizer: PreTrainedTokenizerBase, controls: frozenset[str]) -> tuple[dict[str, str], Tokenizer]:
    """Other names of the control tokens, and a tokenizer that knows them by those. Kept for each tokenizer."""
    known = _RENAMED.get(tokenizer)
    if known is None or known[0] != controls:
        nonce = secrets.token_hex(8)
        aliases = {name: f"\U000ffffd{nonce}{place}\U000ffffd" for place, name in enumerate(sorted(controls))}
        known = _RENAMED[tokenizer] = (controls, aliases, _rename(tokenizer.backend_tokenizer, aliases))
    return known[1], known[2]


def _rename(tokenizer: Tokenizer, aliases: Mapping[str, str]) -> Tokenizer:
    from tokenizers import Tokenizer

    state: dict[str, Any] = json.loads(tokenizer.to_str())
    state["truncation"] = state["padding"] = None
    for token in state["added_tokens"]:
        token["content"] = aliases.get(token["content"], token["content"])
    model = state["model"]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {aliases.get(piece, piece): token_id for piece, token_id in vocabulary.items()}
    else:  # of a unigram model: pieces with scores
        model["vocab"] = [[aliases.get(piece, piece), score] for piece, score in vocabulary]
    if unknown := model.get("unk_token"):
        model["unk_token"] = aliases.get(unknown, unknown)
    return Tokenizer.from_str(json.dumps(state))
