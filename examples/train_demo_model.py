"""Train the embedded demo model from scratch: tokenizer, weights and preference sets, all from one seed.

    python examples/train_demo_model.py --steps 2400 --out steering_vectors/demo

writes `OUT/model/` (a Hugging Face folder, bfloat16) and `OUT/preferences/`. A checkpoint is kept next to the log
of the run; `--resume` continues from it with the same batches as an unbroken run. The text comes from
`demo_corpus`, which this file asks for documents and otherwise leaves alone.
"""

import argparse
import json
import math
import random
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.demo_corpus.dialogues import Document, write_documents
from examples.demo_corpus.preferences import save_preferences

PAD, BOS, END, SYSTEM, USER, ASSISTANT = (
    "<|pad|>",
    "<|bos|>",
    "<|end|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
)
SPECIAL_TOKENS = (PAD, BOS, END, SYSTEM, USER, ASSISTANT)
VOCABULARY = 2048
CONTEXT = 512
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role: ' + message['role']) }}{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Run:
    """What a training run is made of; equal runs give equal weights on one machine."""

    seed: int
    steps: int
    documents: int
    batch_tokens: int
    learning_rate: float


def render(document: Document) -> str:
    """A document as the model reads it, special tokens included."""
    if document.prose:
        return f"{BOS}{document.prose}{END}"
    turns = (f"<|{message['role']}|>{message['content']}{END}" for message in document.messages)
    return BOS + "".join(turns)


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer; it begins plain text with the BOS token and every string survives it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A small Llama with random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def pack(encoded: list[list[int]], length: int, pad: int) -> Tensor:
    """Rows of `length` ids that each begin with a document and hold as many whole ones as fit."""
    rows: list[list[int]] = [[]]
    for ids in encoded:
        if len(rows[-1]) + len(ids) > length and rows[-1]:
            rows.append([])
        rows[-1].extend(ids[:length])
    return torch.tensor([row + [pad] * (length - len(row)) for row in rows])  # [rows, length]


def pick_batches(run: Run, packed: dict[int, Tensor], start: int) -> Iterator[Tensor]:
    """The batch of every step from `start` on; every sixth step has rows of the full context."""
    for step in range(start, run.steps):
        length = CONTEXT if step % 6 == 5 else CONTEXT // 2
        generator = torch.Generator().manual_seed(run.seed * 1_000_003 + step)
        rows = packed[length]
        yield rows[torch.randint(len(rows), (run.batch_tokens // length,), generator=generator)]


def compute_loss(model: LlamaForCausalLM, batch: Tensor, pad: int) -> Tensor:
    """Mean next-token cross-entropy in nats over all tokens but padding."""
    logits = model(input_ids=batch, use_cache=False).logits[:, :-1]  # [rows, length - 1, vocabulary]
    targets = batch[:, 1:].masked_fill(batch[:, 1:] == pad, -100)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def build_optimizer(model: LlamaForCausalLM, run: Run) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=run.learning_rate, betas=(0.9, 0.98), fused=True)


def schedule(run: Run, step: int) -> float:
    """Learning rate: a linear warm-up over 60 steps, then a cosine down to two percent."""
    warm = min(1.0, (step + 1) / 60)
    return run.learning_rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / run.steps)))


def train(
    model: LlamaForCausalLM, packed: dict[int, Tensor], run: Run, checkpoint: Path, resume: bool, pad: int
) -> dict[str, float]:
    """Train to the last step and return the figures of the run."""
    optimizer = build_optimizer(model, run)
    start, spent, average, seen = 0, 0.0, 0.0, 0
    if resume and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start, spent, average, seen = state["step"], state["spent"], state["average"], state["seen"]
    model.train()
    began = time.monotonic() - spent
    for step, batch in enumerate(pick_batches(run, packed, start), start):
        for group in optimizer.param_groups:
            group["lr"] = schedule(run, step)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = compute_loss(model, batch, pad)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seen += int((batch != pad).sum())
        average = loss.item() if step == 0 else 0.98 * average + 0.02 * loss.item()
        spent = time.monotonic() - began
        report(step + 1, run, average, seen, spent)
        if (step + 1) % 200 == 0:
            save_checkpoint(checkpoint, model, optimizer, step + 1, spent, average, seen)
    return {"loss": round(average, 4), "tokens": seen, "seconds": round(spent)}


def report(step: int, run: Run, average: float, seen: int, spent: float) -> None:
    """One line of progress every 25 steps."""
    if step % 25 == 0 or step == run.steps:
        eta = spent / step * (run.steps - step)
        print(
            f"step {step}/{run.steps}  loss {average:.3f}  {seen / spent:.0f} tokens/s  eta {eta:.0f} s",
            flush=True,
        )


def save_checkpoint(
    path: Path,
    model: LlamaForCausalLM,
    optimizer: torch.optim.Optimizer,
    step: int,
    spent: float,
    average: float,
    seen: int,
) -> None:
    """Write the state of the run, whole or not at all."""
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "spent": spent,
        "average": average,
        "seen": seen,
    }
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int) -> float:
    """Loss on fresh documents of another seed."""
    documents = [render(document) for document in write_documents(400, seed + 1)]
    rows = pack(tokenizer(documents, add_special_tokens=False)["input_ids"], CONTEXT // 2, tokenizer.pad_token_id)
    model.eval()
    losses = [compute_loss(model, part, tokenizer.pad_token_id).item() for part in rows.split(16)]
    return sum(losses) / len(losses)


def save_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the Hugging Face folder in bfloat16 and put it in the place of an older one."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=".model-", dir=folder.parent))
    fresh.chmod(0o755)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model.generation_config = GenerationConfig(**ids, pad_token_id=tokenizer.pad_token_id)
    model.to(torch.bfloat16).save_pretrained(fresh)  # type: ignore[arg-type]
    tokenizer.save_pretrained(fresh)
    old = folder.with_name(f".{folder.name}-old")
    if folder.exists():
        folder.replace(old)
    fresh.replace(folder)
    shutil.rmtree(old, ignore_errors=True)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("steering_vectors/demo"))
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--documents", type=int, default=36_000)
    parser.add_argument("--batch-tokens", type=int, default=2560)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--checkpoint", type=Path, default=Path(tempfile.gettempdir()) / "demo-model.pt")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint")
    return parser.parse_args()


def main() -> None:
    """Train as the command line says and write everything."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    run = Run(options.seed, options.steps, options.documents, options.batch_tokens, options.learning_rate)
    texts = [render(document) for document in write_documents(run.documents, run.seed)]
    tokenizer = train_tokenizer(re.sub(r"<\|\w+\|>", " ", text) for text in texts[:12_000])
    encoded: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    random.Random(run.seed).shuffle(encoded)
    pad: int = tokenizer.pad_token_id
    packed = {length: pack(encoded, length, pad) for length in (CONTEXT // 2, CONTEXT)}
    model = build_model(tokenizer, run.seed)
    size = sum(p.numel() for p in model.parameters())
    print(f"{size} parameters, {sum(map(len, encoded))} tokens of text", flush=True)
    figures: dict[str, Any] = {
        "parameters": size,
        **train(model, packed, run, options.checkpoint, options.resume, pad),
    }
    figures["fresh_loss"] = round(evaluate(model, tokenizer, run.seed), 4)
    save_model(model, tokenizer, options.out / "model")
    save_preferences(options.out / "preferences", run.seed)
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
