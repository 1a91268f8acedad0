"""Token ids to text while tokens arrive, and stop strings.

The joined stream equals the whole text (`decoded_after`) for any ids, at a cost per token that does not grow with the
length.

**Why a window is enough.** The decoders of `tokenizers` rewrite tokens one by one, with four exceptions, all of them
local. A start of text may lose a space: every window but the first begins with tokens that were sent before, whose text
is taken off again. UTF-8 sequences cross the tokens of a byte-level tokenizer: a window that begins 4 tokens (so 4
bytes or more) back parses its end as the whole text does, and a final U+FFFD is held back because the next token may
complete it. A run of byte-fallback tokens reads as text if all of it is valid, else as one U+FFFD for each byte: it is
held back until another token ends it. A space may join the last token to the next: it comes with the next. A tokenizer
whose decoder is not known to be of this kind is decoded once, at the end.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from steering_vectors.data.chat import decoded, text_after

_CONTEXT = 4  # tokens, of a byte or more each: the longest UTF-8 sequence
_LONGEST_CONTEXT = 16  # where the window is cut back to _CONTEXT
_REPLACEMENT = "\ufffd"
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> Mapping[str, int]:
    """The tokens that texts leave out, by what they are written as. Kept for each tokenizer."""
    return _reading(tokenizer).special


def is_byte_level(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether tokens are bytes, written in the alphabet of byte-level tokenizers."""
    return _reading(tokenizer).byte_level


class Detokenizer:
    """The text of one completion while its tokens arrive, up to a stop string.

    The stop string that is complete first ends the text just before it, as if characters came one at a time; if several
    end at the same character, the longest counts. `matched_stop` is then set, and no text follows.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int], stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._reading = _reading(tokenizer)
        self._stops = _StopStrings(stop)
        self._open: list[int] = []  # tokens whose text may still change
        self._prompt_ids: Sequence[int] | None = prompt_ids  # until there is text: many requests only score
        self._context: list[int] = []
        self._context_text = ""
        self._unsettled_prompt = False

    @property
    def matched_stop(self) -> str | None:
        return self._stops.matched

    def push(self, token_ids: Sequence[int], *, stops: bool = True) -> str:
        """Take the next tokens; returns the text that they settle, often none. Without `stops`, a stop string that is
        complete in this text does not end it; one that goes on in later text may."""
        count = 0
        for token_id in token_ids:
            if self._reading.shows(token_id):
                self._open.append(token_id)
                if self._reading.settles(token_id):
                    count = len(self._open)
        return self._stops.push(self._advance(count, self._settled), stops) if count else ""

    def finish(self, *, stops: bool = True) -> str:
        """The rest of the text. Nothing may be pushed afterwards."""
        silent = self._prompt_ids is not None and not self._open
        rest = "" if silent else self._stops.push(self._advance(len(self._open), str), stops)
        self._context, self._context_text = [], ""
        return rest + self._stops.held

    def _settled(self, text: str) -> str:
        """Without a last character that may be an incomplete one."""
        return text.removesuffix(_REPLACEMENT) if self._reading.byte_level else text

    def _advance(self, count: int, visible: Callable[[str], str]) -> str:
        """Move `count` open tokens into the context; returns what `visible` lets see of the text they add."""
        if self._prompt_ids is not None:  # the prompt's end is the first context
            self._context = self._reading.end_of(self._prompt_ids)
            self._context_text = decoded(self._tokenizer, self._context)
            self._unsettled_prompt = self._settled(self._context_text) != self._context_text
            self._prompt_ids = None
        context = self._context + self._open[:count]
        del self._open[:count]
        text = decoded(self._tokenizer, context)
        new = text_after(self._settled(self._context_text), visible(text))
        if new and self._unsettled_prompt:  # the prompt's own U+FFFD was not completed: it belongs to the prompt
            self._unsettled_prompt = False
            new = new.removeprefix(_REPLACEMENT)
        if len(context) > _LONGEST_CONTEXT:
            context = self._reading.end_of(context)
            text = decoded(self._tokenizer, context)
        self._context, self._context_text = context, text
        return new


class _StopStrings:
    """Passes text on up to the first stop string; holds back an end that may be the start of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self.held = ""
        self.matched: str | None = None

    def push(self, text: str, stops: bool) -> str:
        if self.matched is not None:
            return ""
        text = self.held + text
        found = stops and [(text.index(stop) + len(stop), -len(stop), stop) for stop in self._stops if stop in text]
        if found:
            end, _, self.matched = min(found)
            self.held = ""
            return text[: end - len(self.matched)]
        sent = len(text) - max((_overlap(text, stop) for stop in self._stops), default=0)
        self.held = text[sent:]
        return text[:sent]


class _Reading:
    """What is known of how a tokenizer's decoder reads tokens. Of one that is not of a known kind, not `local`, nothing
    is: all text waits for the end."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        steps = _decoder_steps(tokenizer)
        kinds = {step["type"] for step in steps or ()}
        self._local = steps is not None and _is_local(steps)
        self._byte_fallback = "ByteFallback" in kinds
        self.byte_level = self._local and "ByteLevel" in kinds
        added = tokenizer.added_tokens_decoder.items()
        self.special: Mapping[str, int] = {str(token): token_id for token_id, token in added if token.special}
        self._skipped = frozenset(self.special.values())
        if self._local:
            self._token = tokenizer.backend_tokenizer.id_to_token

    def end_of(self, ids: Sequence[int]) -> list[int]:
        """The last ids, enough to decode what follows them as if all had been there: at least 4 tokens that are not
        empty, and the whole of a byte-fallback run that is still open."""
        if not self._local:
            return list(ids)
        end: list[int] = []
        texts, closed = 0, False
        for token_id in reversed(ids):
            if texts >= _CONTEXT and closed:
                break
            if self.shows(token_id):
                end.append(token_id)
                texts += self._token(token_id) != ""
                closed = closed or self.settles(token_id)
        return end[::-1]

    def shows(self, token_id: int) -> bool:
        """Whether the decoder sees the token: it leaves out special ones and ids beyond the vocabulary."""
        return not self._local or (token_id not in self._skipped and self._token(token_id) is not None)

    def settles(self, token_id: int) -> bool:
        """Whether no later token changes how tokens up to this one read (but for an incomplete last character)."""
        return self._local and not (self._byte_fallback and _BYTE_TOKEN.fullmatch(self._token(token_id)))


_READINGS: WeakKeyDictionary[PreTrainedTokenizerBase, _Reading] = WeakKeyDictionary()


def _reading(tokenizer: PreTrainedTokenizerBase) -> _Reading:
    """What is known of this tokenizer; remembered, because large tokenizers take milliseconds to look through."""
    if tokenizer not in _READINGS:
        _READINGS[tokenizer] = _Reading(tokenizer)
    return _READINGS[tokenizer]


def _decoder_steps(tokenizer: PreTrainedTokenizerBase) -> list[Mapping[str, Any]] | None:
    """The decoder as a flat list of its serialised steps, empty without a decoder; None if it cannot be looked into."""
    if (
        not isinstance(tokenizer, PreTrainedTokenizerFast)
        or type(tokenizer)._decode is not PreTrainedTokenizerFast._decode
    ):
        return None
    decoder = tokenizer.backend_tokenizer.decoder
    if decoder is None:
        return []
    try:
        state = json.loads(decoder.__getstate__())
    except Exception:  # a decoder written in Python: `tokenizers` raises a plain Exception
        return None
    return _flat(state)


def _flat(step: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    if step["type"] != "Sequence":
        return [step]
    return [inner for part in step["decoders"] for inner in _flat(part)]


def _is_local(steps: Sequence[Mapping[str, Any]]) -> bool:
    kinds = [step["type"] for step in steps]
    if len(kinds) <= 1 and set(kinds) <= {"WordPiece", "BPEDecoder"}:
        return True
    if kinds[0] == "ByteLevel":
        return set(kinds[1:]) <= {"Fuse"}
    fuse = kinds.index("Fuse") if "Fuse" in kinds else len(kinds)
    return all(_is_local_step(step, fused=place > fuse) for place, step in enumerate(steps))


def _is_local_step(step: Mapping[str, Any], *, fused: bool) -> bool:
    """Whether a step looks at one token at a time, or only at a start of text shorter than a context."""
    match step["type"]:
        case "Strip":
            return bool(step["stop"] == 0 and step["start"] < _CONTEXT)
        case "Replace":
            return not fused and step["content"] != ""
        case "ByteFallback" | "Metaspace":
            return not fused
        case kind:
            return bool(kind == "Fuse")


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a beginning of `stop`, but not all of it."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
