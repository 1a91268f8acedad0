"""Single tokens as text and as bytes, for log-probabilities. Byte-level tokenizers split characters, so that a token
is not always text."""

from __future__ import annotations

import re

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from server.engines.detokenizer import is_byte_level
from steering_vectors.data.chat import decoded

BYTES: dict[str, bytes] = {letter: bytes([byte]) for byte, letter in bytes_to_unicode().items()}
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
SPACE = "\u2581"


class TokenTexts:
    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, bytes] = {}
        self.special = frozenset(tokenizer.all_special_ids)  # ids that are left out of texts
        self._added = {token_id: str(token) for token_id, token in tokenizer.added_tokens_decoder.items()}

    def bytes_of(self, token_id: int) -> bytes:
        """The UTF-8 bytes that a token stands for, its leading space too; of a special token its name."""
        if token_id not in self._known:
            self._known[token_id] = self._read(token_id)
        return self._known[token_id]

    def text_of(self, token_id: int) -> str:
        return self.bytes_of(token_id).decode(errors="replace")

    def of_prompt(self, prompt: str | list[int]) -> str:
        return prompt if isinstance(prompt, str) else decoded(self._tokenizer, prompt)

    def _read(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id].encode()
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        if token is None:  # the model's vocabulary may be larger than the tokenizer's
            return b""
        if is_byte_level(self._tokenizer):
            return b"".join(BYTES[letter] if letter in BYTES else letter.encode() for letter in token)
        if match := BYTE_TOKEN.fullmatch(token):
            return bytes.fromhex(match[1])
        if SPACE in token:
            return str(token).replace(SPACE, " ").encode()
        return str(self._tokenizer.convert_tokens_to_string([token])).encode()
