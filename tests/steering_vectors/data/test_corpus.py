"""Rows that one model cannot use: they are named by line and column, or left out and counted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from steering_vectors.data.corpus import Corpus, corpus_for, encode_corpus
from steering_vectors.data.sources import load_pairs
from steering_vectors.errors import DataError
from steering_vectors.models.loading import wrap_model
from tests.support.preference_rows import PREFERENCE, REMEDY, Rows, Write, as_csv, changed, turns
from tests.support.tiny import POSITIONS, tiny_model, tiny_tokenizer
from tests.support.tiny_tokenizers import CHAT_TEMPLATE

CHAT: Rows = [{"chosen": turns(f"q {i}", f"yes {i}"), "rejected": turns(f"q {i}", "no")} for i in range(24)]
LABELLED: Rows = [{"prompt": turns(f"q {i}"), "completion": f"text {i}", "label": i % 2 == 0} for i in range(24)]
SYSTEM = {"role": "system", "content": "Be brief."}
REFUSED = "the model's chat template refuses these messages: no system"


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer whose template refuses system messages, and without a token for the letter y."""
    tokenizer = tiny_tokenizer()
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer.chat_template = refusal + CHAT_TEMPLATE
    return tokenizer


def error_of(tokenizer: PreTrainedTokenizerBase, path: str, **options: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        encode_corpus(tokenizer, load_pairs(path, **options), limit=200)
    return caught.value


def with_system(rows: Rows, *numbers: int) -> Rows:
    """The rows with a system message before the conversations of some."""
    return [
        {key: [SYSTEM, *cell] if isinstance(cell, list) else cell for key, cell in row.items()} if n in numbers else row
        for n, row in enumerate(rows)
    ]


def test_a_row_that_the_template_refuses_is_named(write: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write(with_system(CHAT, 5, 9))
    error = error_of(tokenizer, path)
    counted = f"2 of 24 rows cannot be encoded; {REMEDY}"
    assert str(error) == f"{path}, line 6, field 'chosen': {REFUSED}; {counted}"
    assert (error.path, error.line, error.field) == (path, 6, "chosen")


def test_the_column_of_the_prompt_is_named_as_in_the_file(write: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{"asked": turns(f"q {i}"), "chosen": f"yes {i}", "rejected": "no"} for i in range(24)]
    rows[7]["asked"] = [SYSTEM, *turns("q 7")]
    path = write(rows)
    error = error_of(tokenizer, path, columns={"prompt": "asked"})
    assert str(error).startswith(f"{path}, line 8, field 'asked': {REFUSED}; 1 of 24 rows cannot be encoded")


@pytest.mark.parametrize("number", [2, 3], ids=["preferred", "other"])
def test_unpaired_rows_keep_their_lines(write: Write, tokenizer: PreTrainedTokenizerBase, number: int) -> None:
    """The sides are apart in memory, in another order than in the file."""
    path = write(changed(LABELLED, number, prompt=[SYSTEM, *turns("q")]))
    error = error_of(tokenizer, path)
    assert str(error).startswith(f"{path}, line {number + 1}, field 'prompt': {REFUSED}; 1 of 24 rows")


def test_the_line_is_that_of_the_file(write: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    """Skipped rows and cells of several lines do not shift it."""
    rows = changed(changed(PREFERENCE * 2, 0, chosen="two\nlines"), 1, rejected="")
    path = write(as_csv(changed(rows, 20, rejected="warm " * 300)), "data.csv")
    error = error_of(tokenizer, path, skip_bad_rows=True)
    assert (error.line, error.field) == (23, "rejected")


def test_refused_rows_are_skipped_and_counted(write: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = with_system(CHAT, 5, 9)
    path = write([*rows, {"chosen": turns("q", ""), "rejected": turns("q", "no")}])
    corpus = encode_corpus(tokenizer, load_pairs(path, skip_bad_rows=True), limit=200)
    assert (corpus.pairs.rows, corpus.pairs.skipped, corpus.long_rows) == (22, 3, 0)
    assert corpus.pairs.skip_messages == (
        f"{path}, line 25, field 'chosen[1].content': it is empty",
        f"{path}, line 6, field 'chosen': {REFUSED}",
        f"{path}, line 10, field 'chosen': {REFUSED}",
    )
    kept = [line for line in range(1, 25) if line not in (6, 10)]
    assert corpus.pairs.lines == tuple(kept)
    assert corpus.pairs.pairs() == [pair for n, pair in enumerate(load_pairs(write(CHAT)).pairs()) if n + 1 in kept]
    assert len(corpus.sides().positives) == 22
    assert corpus.notes == [
        "3 bad rows were skipped; the first: line 25, field 'chosen[1].content': it is empty; "
        f"the first that this model cannot use: line 6, field 'chosen': {REFUSED}"
    ]
    assert encode_corpus(tokenizer, load_pairs(write(CHAT)), limit=200).notes == []


def test_enough_rows_must_remain(write: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write(with_system(CHAT, *range(9)))
    assert str(error_of(tokenizer, path, skip_bad_rows=True)) == (
        f"{path}: it has 15 usable rows (9 bad ones were skipped); at least 16 are needed; "
        f"the first bad row: line 1, field 'chosen': {REFUSED}"
    )


def test_refused_and_long_rows_are_counted_apart(write: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = changed(with_system(CHAT, 0, 1, 2, 3, 4), 5, chosen=turns("q 5", "warm " * 300))
    pairs = load_pairs(write(rows), skip_bad_rows=True)
    corpus = encode_corpus(tokenizer, pairs, limit=200, skip_long_rows=True)
    assert (corpus.pairs.rows, corpus.pairs.skipped, corpus.long_rows) == (18, 5, 1)
    notes = [
        f"5 bad rows were skipped; the first: line 1, field 'chosen': {REFUSED}",
        "1 rows longer than the model's context were left out",
    ]
    assert corpus.notes == notes
    assert [part.notes for part in corpus.split(0.5, 0, min_side=4)] == [notes, notes]
    rows = changed(with_system(CHAT, *range(8)), 9, chosen=turns("q 9", "warm " * 300))
    pairs = load_pairs(write(rows), skip_bad_rows=True)
    with pytest.raises(DataError) as caught:
        encode_corpus(tokenizer, pairs, limit=200, skip_long_rows=True)
    assert "it has 15 usable rows (8 bad ones were skipped, 1 exceed the model's context of 200 tokens)" in str(
        caught.value
    )


def test_a_long_row_is_named(write: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write(changed(PREFERENCE, 3, rejected="warm " * 300))
    error = error_of(tokenizer, path, skip_bad_rows=True)
    assert (error.path, error.line, error.field) == (path, 4, "rejected")
    assert str(error).endswith(
        " tokens, but the model's context holds 200; 1 of 16 rows are too long; leave them out with skip_long_rows "
        "(rows are never truncated)"
    )


def without_letter(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer without any token for z: its normaliser deletes the letter."""
    from tokenizers import normalizers

    backend: Any = tokenizer
    backend.backend_tokenizer.normalizer = normalizers.Replace("z", "")
    return tokenizer


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_a_text_without_a_token_is_named(write: Write, tokenizer: PreTrainedTokenizerBase, side: str) -> None:
    path = write(changed(PREFERENCE, 3, **{side: "zzz"}))
    error = error_of(without_letter(tokenizer), path)
    assert str(error).startswith(
        f"{path}, line 4, field {side!r}: the completion 'zzz' contains no token of this model"
    )
    pairs = load_pairs(write([*PREFERENCE, PREFERENCE[3] | {side: "zzz"}]), skip_bad_rows=True)
    corpus = encode_corpus(tokenizer, pairs, limit=None)
    assert (corpus.pairs.rows, corpus.pairs.skipped) == (16, 1)


def test_tokens_beyond_the_embedding_are_named(write: Write) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<new>"])
    token = tokenizer.convert_tokens_to_ids("<new>")
    lm = wrap_model(tiny_model("llama", vocab_size=token), tokenizer)
    known = f"contains '<new>', token {token} of the tokenizer, but the model has {token} tokens only: leave it out"
    for column, text in (("rejected", "the text"), ("prompt", "prompt")):
        path = write(changed(PREFERENCE, 3, **{column: "bad <new>"}))
        with pytest.raises(DataError) as caught:
            corpus_for(lm, load_pairs(path), skip_long_rows=False)
        assert str(caught.value).startswith(f"{path}, line 4, field {column!r}: {text} {known}; 1 of ")


def test_rows_in_memory_are_named_by_their_text(write: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    pairs = replace(load_pairs(write(with_system(LABELLED, 3))), lines=(), source="")
    with pytest.raises(DataError) as caught:
        encode_corpus(tokenizer, pairs, limit=None)
    assert str(caught.value) == f"negative example 2 ('text 3'): {REFUSED}; 1 of 24 rows cannot be encoded"


def test_replaced_rows_have_no_lines(write: Write) -> None:
    pairs = load_pairs(write(CHAT))
    assert pairs.lines == tuple(range(1, 25))
    assert replace(pairs, positives=pairs.positives[:16], negatives=pairs.negatives[:16]).lines == ()


def test_parts_keep_the_lines_of_their_rows(write: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    for rows in (CHAT, LABELLED):
        corpus = encode_corpus(tokenizer, load_pairs(write(rows)), limit=None)
        lines = dict(zip(corpus.pairs.items(), corpus.pairs.lines, strict=True))
        parts: list[Corpus] = [*corpus.split(0.25, 3, min_side=4)]
        for part in parts:
            assert part.pairs.lines == tuple(lines[item] for item in part.pairs.items())
        assert sorted(line for part in parts for line in part.pairs.lines) == list(range(1, 25))


def test_the_limit_is_the_context_of_the_model(write: Write) -> None:
    lm = wrap_model(tiny_model("llama"), tiny_tokenizer())
    pairs = load_pairs(write(changed(PREFERENCE, 1, chosen="warm " * POSITIONS)))
    with pytest.raises(DataError, match=f"line 2, field 'chosen': it has .* holds {POSITIONS}; 1 of 16 rows are too"):
        corpus_for(lm, pairs, skip_long_rows=False)
