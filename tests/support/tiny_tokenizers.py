"""Tokenizers trained in-process: byte-level BPE, and two like SentencePiece's with byte fallback (BPE and unigram).

All fit the vocabulary of the tiny models, add <s> before a text, and can have a chat template.
"""

from __future__ import annotations

import json

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

VOCAB = 384  # 256 bytes, two special tokens, merges
SENTENCES = (
    "The little boat turned slowly into the wind, and the water was warm.",
    "What would you like to eat today? I would like some soup, please.",
    "She said that the answer is always: ask again, and ask kindly!",
    "On the table there are three apples, two pears and one letter.",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer(*, chat_template: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, trained at the call, that adds <s> before a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return _finished(tokenizer, chat_template)


def byte_fallback_tokenizer(*, chat_template: bool = True) -> PreTrainedTokenizerFast:
    """A SentencePiece-like tokenizer: ▁ for spaces, and bytes <0x00> … <0xFF> for text outside the vocabulary."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=110, show_progress=False))
    learned = json.loads(trained.to_str())["model"]
    pieces = ["<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += sorted(learned["vocab"], key=learned["vocab"].get)
    merges = [tuple(merge) for merge in learned["merges"]]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _finished(tokenizer, chat_template, unk_token="<unk>")


def unigram_tokenizer(*, chat_template: bool = True, prepend_scheme: str = "always") -> PreTrainedTokenizerFast:
    """A SentencePiece-like unigram tokenizer with byte fallback. `prepend_scheme` says which texts get a ▁."""
    trained = Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(SENTENCES, trainers.UnigramTrainer(vocab_size=110, show_progress=False))
    pieces = [("<s>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"<0x{byte:02X}>", -20.0) for byte in range(256))]
    pieces += [(piece, score) for piece, score in json.loads(trained.to_str())["model"]["vocab"]]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        if prepend_scheme != "never"
        else [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return _finished(tokenizer, chat_template, unk_token="<unk>")


def legacy_llama_tokenizer() -> PreTrainedTokenizerFast:
    """Like `byte_fallback_tokenizer`, with a normalizer that writes the ▁, as Llama's legacy conversion has."""
    tokenizer = byte_fallback_tokenizer(chat_template=False).backend_tokenizer
    tokenizer.pre_tokenizer = None
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return _finished(tokenizer, False, unk_token="<unk>")


def prefix_space_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that puts a space before every text."""
    tokenizer = tiny_tokenizer(chat_template=False).backend_tokenizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return _finished(tokenizer, False)


def chatml_tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with ChatML's tokens: <|im_end|> is special, <|im_start|> is only an added token."""
    fast = tiny_tokenizer(chat_template=False)
    fast.add_tokens(["<|im_start|>", "<think>", "</think>"])
    fast.add_tokens([AddedToken("<|im_end|>", special=True, normalized=False)], special_tokens=True)
    fast.chat_template = CHATML if template is None else template
    return fast


def _finished(tokenizer: Tokenizer, chat_template: bool, **special: str) -> PreTrainedTokenizerFast:
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    assert tokenizer.get_vocab_size() <= VOCAB
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", **special
    )
    if chat_template:
        fast.chat_template = CHAT_TEMPLATE
    return fast
