"""Two tokenizers trained in-process: byte-level BPE, and SentencePiece-like with byte fallback.

Both fit the vocabulary of the tiny models, add <s> before a text, and can have a chat template.
"""

from __future__ import annotations

import json

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
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


def _finished(tokenizer: Tokenizer, chat_template: bool, **special: str) -> PreTrainedTokenizerFast:
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    assert tokenizer.get_vocab_size() <= VOCAB
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", **special
    )
    if chat_template:
        fast.chat_template = CHAT_TEMPLATE
    return fast
