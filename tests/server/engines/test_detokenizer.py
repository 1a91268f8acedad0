"""Text from ids: the stream against the whole, for every kind of decoder, and stop strings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from server.engines.detokenizer import Detokenizer
from steering_vectors.data.chat import decoded_after

ROOT = Path(__file__).resolve().parents[3]
STORED = {
    "demo": ROOT / "steering_vectors" / "demo" / "model",
    "stories260k": ROOT.parent / "shared" / "models" / "stories260k",
    "babyllama": ROOT.parent / "shared" / "models" / "babyllama-tok105",
}
WORDS = ["a", "ab", "the", "cat", ".", ",", "!", "'", "é", "猫", "😀", "\ufffd", " "]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def wrap(model: models.Model, decoder: decoders.Decoder | None, *, clean_up: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer with this decoder, two special tokens and two added ones that are text."""
    tokenizer = Tokenizer(model)
    if decoder is not None:
        tokenizer.decoder = decoder
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("«ü ▁»", special=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=clean_up
    )


def byte_level(decoder: decoders.Decoder | None = None, **options: bool) -> PreTrainedTokenizerFast:
    """All bytes, words, and tokens that end one character and begin the next."""
    letters = dict(zip(sorted(range(256), key=byte_letter), sorted(pre_tokenizers.ByteLevel.alphabet()), strict=True))
    pieces = [bytes([byte]) for byte in range(256)] + [f" {word}".encode() for word in WORDS]
    pieces += [
        b"\xf0\x9f",
        b"\x98\x80",
        b"\x98\x80\xf0\x9f",
        b"\xac\xe2\x82",
        b"\xe2\x82",
        b"\xef\xbf",
        b"a\xe2",
        b"\xed\xa0",
    ]
    vocabulary = {"".join(letters[byte] for byte in piece): place for place, piece in enumerate(pieces)}
    tokenizer = models.BPE(vocabulary, [])
    return wrap(tokenizer, decoder or decoders.ByteLevel(), **options)


def byte_letter(byte: int) -> int:
    """GPT-2's letter for a byte: itself if printable, else counted up from 256."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return byte if byte in printable else 256 + [b for b in range(256) if b not in printable].index(byte)


def sentence_pieces() -> models.Model:
    pieces = ["<unk>", *BYTES, "▁", "▁▁", *WORDS[:-1], *(f"▁{word}" for word in WORDS[:-1])]
    vocabulary = {piece: place for place, piece in enumerate(pieces)}
    return models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True)


def word_pieces() -> models.Model:
    pieces = ["[UNK]", *WORDS[:-1], *(f"##{word}" for word in WORDS[:-1]), "n't", "do not", ""]
    return models.WordPiece({piece: place for place, piece in enumerate(pieces)}, unk_token="[UNK]")


def suffixed_pieces() -> models.Model:
    pieces = [*WORDS[:-1], *(f"{word}</w>" for word in WORDS[:-1])]
    return models.BPE({piece: place for place, piece in enumerate(pieces)}, [], end_of_word_suffix="</w>")


def fallback_decoder(*last: decoders.Decoder) -> decoders.Decoder:
    return decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *last])


class Reversed:
    """A decoder in Python, of which nothing is known."""

    def decode_chain(self, tokens: list[str]) -> list[str]:
        return tokens[::-1]


def python_decoder() -> PreTrainedTokenizerFast:
    tokenizer = wrap(word_pieces(), None)
    tokenizer.backend_tokenizer.decoder = decoders.Decoder.custom(Reversed())
    return tokenizer


WINDOWED: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte-level": byte_level,
    "llama": lambda: wrap(sentence_pieces(), fallback_decoder(decoders.Strip(" ", 1, 0))),
    "gemma": lambda: wrap(sentence_pieces(), fallback_decoder()),
    "metaspace": lambda: wrap(sentence_pieces(), decoders.Metaspace()),
    "metaspace-fallback": lambda: wrap(
        sentence_pieces(), decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    ),
    "wordpiece": lambda: wrap(word_pieces(), decoders.WordPiece(cleanup=False)),
    "wordpiece-cleanup": lambda: wrap(word_pieces(), decoders.WordPiece(cleanup=True), clean_up=True),
    "bpe-suffix": lambda: wrap(suffixed_pieces(), decoders.BPEDecoder()),
    "joined": lambda: wrap(word_pieces(), None),
}
WHOLE: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "ctc": lambda: wrap(word_pieces(), decoders.CTC(pad_token="a")),
    "late-fallback": lambda: wrap(sentence_pieces(), decoders.Sequence([decoders.Fuse(), decoders.ByteFallback()])),
    "replace-late": lambda: wrap(sentence_pieces(), fallback_decoder(decoders.Replace("ab", "c"))),
    "replace-bytes": lambda: byte_level(decoders.Sequence([decoders.ByteLevel(), decoders.Replace("ab", "c")])),
    "replace-by-nothing": lambda: wrap(word_pieces(), decoders.Sequence([decoders.Replace("b", ""), decoders.Fuse()])),
    "metaspace-late": lambda: wrap(sentence_pieces(), decoders.Sequence([decoders.Fuse(), decoders.Metaspace()])),
    "strip-long": lambda: wrap(sentence_pieces(), fallback_decoder(decoders.Strip(" ", 4, 0))),
    "wordpiece-fused": lambda: wrap(word_pieces(), decoders.Sequence([decoders.WordPiece(), decoders.Fuse()])),
    "python": python_decoder,
}


@cache
def tokenizer_of(kind: str) -> PreTrainedTokenizerBase:
    if kind in STORED:
        if not STORED[kind].is_dir():
            pytest.skip(f"{STORED[kind].name} is not beside the checkout")
        return AutoTokenizer.from_pretrained(STORED[kind])
    return (WINDOWED | WHOLE)[kind]()


def stream(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], pushes: Sequence[Sequence[int]], stop: Sequence[str] = ()
) -> tuple[list[str], str | None]:
    detokenizer = Detokenizer(tokenizer, prompt, stop)
    parts = [detokenizer.push(ids) for ids in pushes]
    return [*parts, detokenizer.finish()], detokenizer.matched_stop


def cut(ids: Sequence[int], sizes: Sequence[int]) -> list[Sequence[int]]:
    """The ids in pushes of these sizes, the rest one by one."""
    pushes, start = [], 0
    for size in sizes:
        pushes.append(ids[start : start + size])
        start += size
    return pushes + [[token_id] for token_id in ids[start:]]


Ids = st.lists(st.integers(0, 10**6), max_size=24)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*WINDOWED, *WHOLE, *STORED])
@settings(max_examples=150, suppress_health_check=list(HealthCheck))
@given(prompt=Ids, completion=Ids, sizes=st.lists(st.integers(0, 4), max_size=4))
@example(prompt=[0], completion=[], sizes=[])
def test_invariant_4_joined_stream_equals_text(
    kind: str, prompt: list[int], completion: list[int], sizes: list[int]
) -> None:
    tokenizer = tokenizer_of(kind)
    beyond = len(tokenizer) + 3  # a model's vocabulary is often larger than its tokenizer's
    prompt, completion = ([token_id % beyond for token_id in ids] for ids in (prompt, completion))
    parts, _ = stream(tokenizer, prompt, cut(completion, sizes))
    assert "".join(parts) == decoded_after(tokenizer, prompt, completion)


Byte = st.sampled_from(
    [*b"\xf0\x9f\x98\x80", *b"\xe2\x82\xac", *b"\xef\xbf\xbd", *b"\xc3\xa9", 0x80, 0xFF, 0xED, 0x41, 0x20]
)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["byte-level", "llama", "gemma", "metaspace-fallback", "stories260k"])
@settings(max_examples=200, suppress_health_check=list(HealthCheck))
@given(
    data=st.lists(Byte, max_size=28),
    start=st.integers(0, 28),
    words=st.sets(st.integers(0, 28)),
)
def test_invariant_4_joined_stream_equals_text_of_broken_characters(
    kind: str, data: list[int], start: int, words: set[int]
) -> None:
    tokenizer = tokenizer_of(kind)
    ids = [byte_id(tokenizer, byte) for byte in data]
    for place in sorted(words):
        ids.insert(place, tokenizer.convert_tokens_to_ids("a"))
    parts, _ = stream(tokenizer, ids[:start], cut(ids[start:], ()))
    assert "".join(parts) == decoded_after(tokenizer, ids[:start], ids[start:])


def byte_id(tokenizer: PreTrainedTokenizerBase, byte: int) -> int:
    piece = BYTES[byte] if BYTES[byte] in tokenizer.get_vocab() else chr(byte_letter(byte))
    return int(tokenizer.convert_tokens_to_ids(piece))


TEXTS = [
    "The cat sat. It's 3 o'clock, isn't it ?",
    "  two  spaces\n\tand tabs  ",
    "👩‍👩‍👧‍👦 family, flag 🇪🇺, 😀😀😀 and thumbs 👍🏽!",
    "今日は猫と遊びました。漢字😀かな",
    "ภาษาไทยไม่มีช่องว่าง",
    "naïve café — “quotes” …",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", ["byte-level", "llama", *STORED])
def test_invariant_4_joined_stream_equals_text_of_real_texts(kind: str, text: str) -> None:
    tokenizer = tokenizer_of(kind)
    if kind == "llama":
        tokenizer = with_spaces(tokenizer)
    elif kind == "byte-level":
        tokenizer = with_bytes(tokenizer)
    ids = tokenizer.encode(text, add_special_tokens=False)
    for split in range(0, len(ids) + 1, 3):
        parts, _ = stream(tokenizer, ids[:split], cut(ids[split:], ()))
        assert "".join(parts) == decoded_after(tokenizer, ids[:split], ids[split:])
    if kind != "babyllama":  # its vocabulary lacks most characters
        assert decoded_after(tokenizer, [], ids) == text


def with_spaces(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return tokenizer


def with_bytes(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def ids_of(kind: str, *pieces: str) -> list[int]:
    return [tokenizer_of(kind).convert_tokens_to_ids(piece) for piece in pieces]


def test_a_leading_space_is_kept_after_a_prompt_and_lost_at_the_start_of_text() -> None:
    tokenizer, (the, cat) = tokenizer_of("llama"), ids_of("llama", "▁the", "▁cat")
    bos = tokenizer.bos_token_id
    assert stream(tokenizer, [bos, the], [[cat]])[0] == [" cat", ""]
    assert stream(tokenizer, [bos], [[the], [cat]])[0] == ["the", " cat", ""]


def test_special_tokens_are_not_text_but_added_words_are() -> None:
    tokenizer = tokenizer_of("byte-level")
    pushes = [ids_of("byte-level", piece) for piece in ("a", "</s>", "<think>", "«ü ▁»")]
    assert stream(tokenizer, [0], pushes)[0] == ["a", "", "<think>", "«ü ▁»", ""]


@pytest.mark.parametrize("kind", ["byte-level", "llama"])
def test_a_character_is_sent_when_it_is_complete(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    emoji = [[byte_id(tokenizer, byte)] for byte in "😀".encode()]
    after = {"byte-level": ["😀", "a", ""], "llama": ["", "😀a", ""]}[kind]  # the run could still turn out invalid
    assert stream(tokenizer, ids_of(kind, "a"), [*emoji, ids_of(kind, "a")])[0] == ["", "", "", *after]


def test_unfinished_bytes_are_flushed_as_replacement_characters() -> None:
    for kind, flushed in (("byte-level", "\ufffd"), ("llama", "\ufffd\ufffd")):
        tokenizer = tokenizer_of(kind)
        pushes = [[byte_id(tokenizer, byte)] for byte in b"\xf0\x9f"]
        assert stream(tokenizer, ids_of(kind, "a"), pushes)[0] == ["", "", flushed]


@pytest.mark.parametrize("kind", ["byte-level", "llama"])
def test_a_completion_that_completes_the_prompts_last_character_has_all_of_it(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    prompt, rest = ([byte_id(tokenizer, byte) for byte in half] for half in (b"a\xf0\x9f", b"\x98\x80"))
    if kind == "llama":
        prompt[0] = ids_of(kind, "a")[0]  # else a valid byte of the prompt's own run would turn invalid
    assert "".join(stream(tokenizer, prompt, [rest])[0]) == "😀"
    broken = stream(tokenizer, prompt, [ids_of(kind, "cat" if kind == "llama" else "a")])[0]
    assert "".join(broken) == ("cat" if kind == "llama" else "a")  # the prompt's own U+FFFD is not repeated


@pytest.mark.parametrize("kind", [*WINDOWED])
def test_the_cost_of_a_token_does_not_grow(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizer_of(kind)
    decoded: list[int] = []
    decode = type(tokenizer).decode

    def counting(self: PreTrainedTokenizerBase, ids: list[int], **options: bool) -> str:
        decoded.append(len(ids))
        return str(decode(self, ids, **options))

    ids = ids_of(kind, *(("Ġa", "Ġthe") if kind == "byte-level" else ("a", "the"))) * 500
    detokenizer = Detokenizer(tokenizer, ids)
    monkeypatch.setattr(type(tokenizer), "decode", counting)
    for token_id in ids:
        detokenizer.push([token_id])
    assert max(decoded) < 20
    assert len(decoded) < 1.2 * len(ids)


def test_a_long_run_of_bytes_is_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizer_of("llama")
    run = [byte_id(tokenizer, byte) for byte in "猫".encode()] * 300
    detokenizer = Detokenizer(tokenizer, ids_of("llama", "a"))
    with monkeypatch.context() as patch:
        patch.setattr(type(tokenizer), "decode", None)
        assert {detokenizer.push([token_id]) for token_id in run} == {""}
    assert detokenizer.push(ids_of("llama", "ab")) == "猫" * 300 + "ab"


# Stop strings


def letters(text: str) -> list[int]:
    return ids_of("byte-level", *(chr(byte_letter(byte)) for byte in text.encode()))


@pytest.mark.parametrize(
    ("text", "stop", "expected", "matched"),
    [
        ("one END two", ["END"], "one ", "END"),
        ("one EN two", ["END"], "one EN two", None),
        ("ends with EN", ["END"], "ends with EN", None),
        ("ENENEND", ["ENEND"], "EN", "ENEND"),
        ("abcd", ["abcd", "bc"], "a", "bc"),  # complete first
        ("abc", ["bc", "abc", "c"], "", "abc"),  # complete at once: the longest
        ("abc", ["abc", "ab"], "", "ab"),
        ("a\n\nb", ["\n\n"], "a", "\n\n"),
        ("x猫😀y", ["😀"], "x猫", "😀"),
        ("aaaa", ["aa"], "", "aa"),
        ("ab", [], "ab", None),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_stop_strings(text: str, stop: list[str], expected: str, matched: str | None, size: int) -> None:
    ids = letters(text)
    pushes = [ids[start : start + size] for start in range(0, len(ids), size)]
    parts, found = stream(tokenizer_of("byte-level"), letters("prompt "), pushes, stop)
    assert ("".join(parts), found) == (expected, matched)


@settings(max_examples=150)
@given(
    text=st.text("abc", max_size=30),
    stop=st.lists(st.text("abc", min_size=1, max_size=5), max_size=3),
    sizes=st.lists(st.integers(0, 7), max_size=12),
)
def test_stop_strings_match_as_if_characters_came_one_by_one(text: str, stop: list[str], sizes: list[int]) -> None:
    heads = (text[:end] for end in range(1, len(text) + 1))
    matches = ([s for s in stop if head.endswith(s)] for head in heads)
    end, longest = next(((n, max(found, key=len)) for n, found in enumerate(matches, 1) if found), (len(text), None))
    expected = text[: end - len(longest or "")]
    parts, matched = stream(tokenizer_of("byte-level"), letters("x"), cut(letters(text), sizes), stop)
    assert ("".join(parts), matched) == (expected, longest)


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    parts, _ = stream(tokenizer_of("byte-level"), letters("x"), [[i] for i in letters("one E, EN!")], ["END"])
    assert parts == ["o", "n", "e", " ", "", "E,", " ", "", "", "EN!", ""]


def test_nothing_follows_a_stop_string() -> None:
    detokenizer = Detokenizer(tokenizer_of("byte-level"), letters("x"), ["b"])
    assert detokenizer.matched_stop is None
    assert detokenizer.push(letters("abc")) == "a"
    assert detokenizer.matched_stop == "b"
    assert detokenizer.push(letters("d")) == detokenizer.finish() == ""


def test_a_stop_string_in_the_prompt_or_across_its_end_does_not_count() -> None:
    parts, matched = stream(tokenizer_of("byte-level"), letters("END EN"), [letters("D.")], ["END"])
    assert ("".join(parts), matched) == ("D.", None)


@pytest.mark.parametrize("kind", WHOLE)
def test_what_is_not_known_to_be_local_is_decoded_at_the_end(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    ids = ids_of(kind, "a", *(["b"] if kind == "replace-bytes" else ["ab", "cat"])) * 8
    *parts, rest = stream(tokenizer, ids[:1], [[token_id] for token_id in ids])[0]
    assert set(parts) == {""}
    assert rest == decoded_after(tokenizer, ids[:1], ids)


def test_a_stop_string_is_found_in_the_rest_of_a_decoder_that_waits() -> None:
    parts, matched = stream(
        tokenizer_of("replace-late"), ids_of("replace-late", "a"), [ids_of("replace-late", "ab", "cat")], ["cat"]
    )
    assert (parts, matched) == (["", "c"], "cat")
